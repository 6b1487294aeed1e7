"""Whether other programs are seen, and this one not mistaken for them."""

import os

import pytest

from experiments.common import machine


def test_processor_time_of_others(monkeypatch, tmp_path):
    second = os.sysconf("SC_CLK_TCK")
    core = min(os.sched_getaffinity(0))
    monkeypatch.setattr(machine, "STAT", tmp_path / "stat")
    monkeypatch.setattr(machine, "cores", lambda: 1)

    def write(user: float, system: float, idle: float) -> None:
        numbers = [int(value * second) for value in (user, 0, system, idle, 0, 0, 0, 0, 0, 0)]
        line = f"cpu{core} {' '.join(map(str, numbers))}\n"
        # The sum of all cores, and a core of somebody else: not counted.
        machine.STAT.write_text(f"cpu 9 9 9 9\n{line}cpu99999 {' '.join(['1'] * 10)}\nintr 5\n")

    write(10, 5, 100)
    before = machine.usage()
    write(12, 6, 107)
    after = machine.usage()
    assert after.busy - before.busy == 3
    later = machine.Usage(before.wall + 10, after.busy, after.idle, before.own + 1)
    # 3 s busy, 1 s of them its own, in 10 s.
    assert machine.cores_of_others(before, later) == pytest.approx(0.2)
    short = later._replace(wall=before.wall + 0.1)
    assert machine.cores_of_others(before, short) is None
    # A sandbox whose clocks stand still says nothing.
    assert machine.cores_of_others(before, before._replace(wall=before.wall + 10)) is None
    machine.STAT.unlink()
    assert machine.usage().busy is None


def test_at_rest(monkeypatch):
    monkeypatch.setattr(machine, "load", lambda: (0.9, 0.2, 0.1))
    monkeypatch.setattr(machine, "cores_of_others", lambda before, after: 0.2)
    assert machine.at_rest(0.5, 0.0)[1] is None  # the load lags behind
    monkeypatch.setattr(machine, "cores_of_others", lambda before, after: 0.7)
    found, reason = machine.at_rest(0.5, 0.0)
    assert reason == "other programs used 0.70 cores before it began"
    assert found == {"load_average": [0.9, 0.2, 0.1], "cores_of_others": 0.7}
    assert machine.at_rest(1.0, 0.0)[1] is None
    monkeypatch.setattr(machine, "cores_of_others", lambda before, after: None)
    assert machine.at_rest(0.5, 0.0)[1] == "the load average was 0.90 before it began"
