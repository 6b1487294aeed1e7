"""The program of docs/guides/processes.md, alone and in two processes."""

import re
import shutil
import sys

import pytest

from tests import pages, processes

PAGE = processes.ROOT / "docs" / "guides" / "processes.md"


def run(program, folder, count):
    """What a run of so many processes prints."""
    command = [sys.executable, str(program), f"--folder={folder}"]
    launcher = ["experiments.launch", f"--num_processes={count}", "--", *command]
    (found,) = processes.run([launcher])
    assert found.status == 0, found.text
    lines = [line.split("] ", 1)[1] for line in found.text.splitlines() if "Gloo" not in line]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def near(a, b):
    return a.keys() == b.keys() and all(abs(a[name] - b[name]) < 0.02 for name in a)


@pytest.mark.slow
def test_two_processes_do_what_one_does_and_go_on_from_its_checkpoints(tmp_path):
    ((_, code),) = pages.blocks(PAGE.read_text(encoding="utf-8"))
    assert len(code.splitlines()) <= 60
    program = tmp_path / "program.py"
    program.write_text(code)
    two = run(program, tmp_path / "two", 2)
    assert list(two) == [*(f"batch {n}: loss" for n in (49, 99, 149, 199, 249)), "error"]
    assert two["error"] < 0.25
    assert near(run(program, tmp_path / "one", 1), two)
    checkpoints = sorted(path.name for path in (tmp_path / "two").iterdir())
    assert checkpoints == ["step-000000100", "step-000000200", "step-000000300"]
    # From step 200 on: the last of the lines come again, from one process too.
    shutil.rmtree(tmp_path / "two" / checkpoints[-1])
    shutil.copytree(tmp_path / "two", tmp_path / "again")
    last = {name: value for name, value in two.items() if re.search("249|error|199", name)}
    assert near(run(program, tmp_path / "two", 2), last)
    assert near(run(program, tmp_path / "again", 1), last)


def test_an_error_in_one_process_ends_the_other(tmp_path):
    ((_, code),) = pages.blocks(PAGE.read_text(encoding="utf-8"))
    step = "            state, metrics = pipe.step("
    error = (
        "            if step == 20 and last.here:\n                raise OSError('no more data')\n"
    )
    assert step in code
    program = tmp_path / "program.py"
    program.write_text(code.replace(step, error + step))
    command = [sys.executable, str(program), f"--folder={tmp_path / 'runs'}"]
    (found,) = processes.run([["experiments.launch", "--num_processes=2", "--", *command]])
    assert found.status == 1, found.text
    assert "OSError: no more data" in found.text
    assert "process 1 of 2 ended with status 1; all are ended" in found.text
