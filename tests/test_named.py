"""Schedules by name, and the program that prints them."""

import subprocess
import sys

import pytest

import fdg_jax as fdg


def printed(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "fdg_jax.schedule", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_options_that_a_schedule_does_not_have_are_ignored():
    options = {"order": "forward_first", "microbatches": 2, "accumulate": 3, "reduction": "sum"}
    assert fdg.schedule.create("ddg", 3, **options).staleness(0) == 2
    assert fdg.schedule.create("gpipe", 3, **options).microbatches == 2
    adl = fdg.schedule.create("adl", 3, **options)
    assert (adl.period, adl.reduction) == (3, "sum")


def test_none_is_the_schedules_own_default():
    assert fdg.schedule.create("pipedream_2bw", 4, accumulate=None).period == 4
    assert fdg.schedule.create("adl", 4, accumulate=None).period == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fdg.schedule.create("gpip", 2), "name='gpip': no such schedule"),
        (lambda: fdg.schedule.gpipe(2, microbatches=0), "microbatches=0"),
        (lambda: fdg.schedule.one_f_one_b(2, microbatches=-1), "microbatches=-1"),
        (lambda: fdg.schedule.adl(2, accumulate=0), "accumulate=0"),
        (lambda: fdg.schedule.adl(2, reduction="max"), "reduction='max'"),
        (lambda: fdg.schedule.pipedream_2bw(4, accumulate=3), "accumulate=3: must be 4 or more"),
        (lambda: fdg.schedule.ddg(0), "num_stages=0"),
    ],
)
def test_bad_options_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_program_prints_the_grid_and_what_is_counted():
    done = printed("--name=fdg", "--stages=4", "--ticks=14")
    assert done.returncode == 0, done.stderr
    assert fdg.schedule.fdg(4).grid(14) in done.stdout
    assert "staleness      |     6     4     2     0" in done.stdout
    assert "in flight      |     7     5     3     1" in done.stdout


@pytest.mark.parametrize(
    "arguments", [["--name=magic"], ["--stages=0"], ["--ticks=-1"], ["--stages=x"], ["--bogus"]]
)
def test_the_program_refuses_with_status_2(arguments):
    done = printed(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
