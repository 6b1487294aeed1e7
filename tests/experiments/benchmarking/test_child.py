"""Backpropagation in a process of its own."""

import dataclasses
import io
import json
import os

import pytest

from experiments import benchmark
from experiments.benchmarking import child, contender
from experiments.benchmarking.child import OneCore
from experiments.benchmarking.other_process import LeftOut
from experiments.benchmarking.workload import Settings, Workload
from experiments.training import setup

SETTINGS = Settings(
    "somewhere", ("backprop", "backprop_one_core"), model="small_resnet", image_size=4, batch_size=8
)


def test_it_trains_what_backprop_trains_on_one_core():
    row = benchmark.make("backprop_one_core", Workload(SETTINGS))
    try:
        (pid,) = row.processes
        (core,) = os.sched_getaffinity(pid)
        assert row.about.endswith(f"may use core {core} alone")
        assert row.turn(4) > 0
        here = contender.make("backprop", Workload(SETTINGS))
        here.turn(5)  # with the one that makes it ready
        assert row.loss == pytest.approx(here.loss, rel=1e-5)
    finally:
        row.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_it_is_left_out_where_a_process_cannot_be_held_to_a_core(monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity")
    with pytest.raises(LeftOut, match="does not hold a process to a core"):
        OneCore("backprop_one_core", SETTINGS)


@pytest.mark.slow
def test_untuned_trains_what_jax_makes_of_it_and_its_memory_is_not_kept():
    row = benchmark.make("backprop_untuned", Workload(SETTINGS))
    try:
        assert row.turn(4) > 0
        here = contender.make("backprop_xla", Workload(SETTINGS))
        here.turn(5)
        assert row.loss == pytest.approx(here.loss, rel=1e-5)
    finally:
        row.close()


@pytest.mark.slow
def test_two_processes_train_what_one_does():
    work = Workload(dataclasses.replace(SETTINGS, partition="2"))
    row = benchmark.make("fdg_two_processes", work)
    try:
        cores = [os.sched_getaffinity(pid) for pid in row.processes]
        assert [len(own) for own in cores] == [1, 1]
        assert cores[0] != cores[1]
        assert row.turn(4) > 0
        here = contender.make("fdg", work)
        here.turn(here.fill + 4)
        assert row.loss == pytest.approx(here.loss, rel=1e-5)
    finally:
        row.close()


@pytest.mark.parametrize(
    ("name", "kept"), [("backprop_one_core", True), ("backprop_untuned", False)]
)
def test_which_of_them_keeps_memory(monkeypatch, capsys, name, kept):
    asked = []
    monkeypatch.setattr(setup, "prepare_jax", lambda stages, keep_memory: asked.append(keep_memory))
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: None)
    monkeypatch.setattr("jax.config.update", lambda name, value: None)
    words = json.dumps(dataclasses.asdict(SETTINGS))
    monkeypatch.setattr("sys.argv", ["child", name, words, "1234", "0"])
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    child.main()
    assert asked == [kept]
    assert "core" in json.loads(capsys.readouterr().out)
