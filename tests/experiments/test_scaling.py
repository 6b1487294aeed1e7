"""Stages times data parallelism, simulated: what can be said by hand."""

import pytest
from absl import flags

from experiments import scaling
from experiments.common.errors import UsageError


@pytest.fixture
def given(monkeypatch):
    """The flags of the program, with other values."""
    values = flags.FlagValues()
    monkeypatch.setattr(flags, "FLAGS", values)
    monkeypatch.setattr(scaling, "FLAGS", values)
    for name in ("list", "integer", "float"):
        define = getattr(flags, f"DEFINE_{name}")
        monkeypatch.setattr(
            flags,
            f"DEFINE_{name}",
            lambda *a, define=define, **k: define(*a, flag_values=values, **k),
        )
    scaling.define_flags()

    def parse(*arguments: str) -> None:
        values(["scaling", *arguments])

    return parse


def test_free_messages_leave_all_of_the_speed_to_methods_that_do_not_flush(given):
    given("--microbatches=4")
    free = scaling.Network("free", 1e30, 0.0)
    for stages in (1, 2, 8):
        assert scaling.efficiency("fdg", 64, stages, free) == pytest.approx(1)
    assert scaling.efficiency("gpipe", 64, 8, free) == pytest.approx(4 / (4 + 7))


def test_data_parallelism_pays_for_one_ring(given):
    given("--images=10", "--flops=1e9", "--speed=1e11", "--parameter_bytes=8e6")
    its = scaling.network("a:1e9:1e-3")
    ring = 2 * 7 * (1e-3 + 1e6 / 1e9)
    assert its.all_reduce(8e6, 8) == pytest.approx(ring)
    assert scaling.efficiency("fdg", 8, 1, its) == pytest.approx(0.1 / (0.1 + ring))
    assert its.all_reduce(8e6, 1) == 0


def test_the_table_has_a_line_for_every_method_on_every_number_of_devices(given, capsys):
    given("--devices=8,16", "--stages=1,2", "--methods=fdg,ddg", "--networks=x:1e9:0")
    scaling.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| network | D | method | K=1 | K=2 |"
    assert [line.split("|")[1:4] for line in lines[2:]] == [
        [" x ", f" {d} ", f" {method} "] for d in (8, 16) for method in ("fdg", "ddg")
    ]


WRONG = [
    "--devices=0",
    "--devices=8,x",
    "--stages=3",
    "--stages=",
    "--methods=none",
    "--networks=a:0:0",
    "--networks=a:1",
    "--networks=a:x:0",
    "--speed=0",
]


@pytest.mark.parametrize("flag", WRONG)
def test_what_cannot_be_simulated_is_refused(given, flag):
    given(flag)
    with pytest.raises(UsageError, match=flag.split("=")[0]):
        scaling.main()
