"""Ctrl-C arrives between steps: the state is whole, and nothing is lost."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest

import fdg_jax as fdg
from fdg_jax.engine import interrupt
from tests import networks

ROOT = pathlib.Path(__file__).parents[2]
DATA = networks.batches(8)


def pipeline() -> fdg.Pipeline:
    stages = fdg.partition(networks.network(), 3, DATA[0][0], cost=[1] * 7)
    return fdg.Pipeline(stages, networks.loss_fn, networks.sgd(0.5, 3), fdg.schedule.fdg(3))


@pytest.fixture
def interruptible():
    """The handler that Python has by itself."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# Trains while SIGINT comes every few milliseconds; prints how many came, and the parameters' hash.
OFTEN = """
import hashlib, os, signal, sys, threading, time
import jax, numpy as np
from tests import networks
from tests.engine.test_interrupt import DATA, pipeline

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job
STEPS, pipe, key, interrupts = 300, pipeline(), jax.random.key(7), 0
state, step = pipe.init(key, *DATA[0]), 0
for _ in range(8):  # compiles
    state, _ = pipe.step(state, DATA[0])
state, rng = pipe.init(key, *DATA[0]), np.random.default_rng(int(sys.argv[1]))

def press():
    # One at a time: the next comes when the one before has been caught, or is lost.
    global sent, lost
    since = time.monotonic()
    while step < STEPS or interrupts < sent:
        time.sleep(rng.uniform(0.001, 0.006))
        if interrupts >= sent and step < STEPS:
            sent += 1
        elif interrupts >= sent or time.monotonic() - since < 30:
            continue
        else:
            lost += 1
        since = time.monotonic()
        os.kill(os.getpid(), signal.SIGINT)

sent, lost, caught, thread = 0, 0, False, threading.Thread(target=press, daemon=True)
starting = bool(int(sys.argv[1]))
while step < STEPS or thread.is_alive() or interrupts < sent:
    try:
        if caught:
            # Counted here, so that the next one comes inside this block, too.
            caught, interrupts = False, interrupts + 1
        if starting:
            starting = False
            thread.start()  # an interrupt may come before it returns
        while step < STEPS:
            while step == STEPS // 2 and thread.is_alive() and not interrupts:
                time.sleep(0.001)  # at least one comes, however busy the machine is
            # In one statement: an interrupt finds both or neither.
            state, step = pipe.step(state, DATA[step % 8])[0], step + 1
        time.sleep(0.01)
    except KeyboardInterrupt:
        caught = True
signal.signal(signal.SIGINT, signal.SIG_IGN)
values = b"".join(np.asarray(v).tobytes() for v in jax.tree.leaves(pipe.params(state)))
print(interrupts, hashlib.sha256(values).hexdigest(), lost, flush=True)
"""


def test_a_run_that_is_interrupted_often_ends_like_one_that_is_not():
    found = []
    for seed in (0, 1):
        command = [sys.executable, "-c", OFTEN, str(seed)]
        environment = {**os.environ, "JAX_ENABLE_X64": "1", "JAX_NUM_CPU_DEVICES": "4"}
        run = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )
        assert run.returncode == 0, run.stderr
        found.append(run.stdout.split())
        # Python ignores, and reports, what is raised in a destructor. Nothing else may lose one.
        assert int(found[-1][2]) <= run.stderr.count("Exception ignored"), run.stderr
    assert int(found[0][0]) == 0
    assert int(found[1][0]) > 0
    assert found[0][1] == found[1][1]


@pytest.mark.usefixtures("interruptible")
def test_one_that_no_step_follows_comes_a_moment_later():
    with interrupt.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
    with pytest.raises(KeyboardInterrupt):
        time.sleep(5)


@pytest.mark.usefixtures("interruptible")
def test_the_next_step_raises_it_before_it_changes_anything():
    pipe = pipeline()
    state = pipe.init(jax.random.key(7), *DATA[0])
    with interrupt.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
    with pytest.raises(KeyboardInterrupt):
        pipe.step(state, DATA[0])
    state, _ = pipe.step(state, DATA[0])
    assert int(state.tick) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGALRM])
def test_handlers_of_the_program_wait_as_well(number):
    seen = []
    before = signal.signal(number, lambda *_: seen.append(1))
    try:
        with interrupt.deferred():
            os.kill(os.getpid(), number)
            time.sleep(0.01)
            assert seen == []
        with interrupt.deferred():
            assert seen == [1]
    finally:
        signal.signal(number, before)


def test_what_a_handler_raises_leaves_the_state_whole():
    class Late(Exception):
        """The time is up."""

    def late(*_) -> None:
        raise Late

    pipe, before = pipeline(), signal.signal(signal.SIGALRM, late)
    state, steps, caught = pipe.init(jax.random.key(7), *DATA[0]), 0, 0
    try:
        while steps < 60:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.003)
                while steps < 60:
                    state, _ = pipe.step(state, DATA[0])
                    steps += 1
            except Late:
                caught += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        time.sleep(0.5)
    except Late:
        caught += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert caught
    pipe.check()
    assert int(state.tick) >= 60


def test_a_handler_that_calls_the_one_before_it():
    seen = []
    first = signal.signal(signal.SIGUSR1, lambda *_: seen.append("first"))
    try:
        with interrupt.deferred():
            pass
        before = signal.getsignal(signal.SIGUSR1)

        def second(*arguments) -> None:
            seen.append("second")
            before(*arguments)

        signal.signal(signal.SIGUSR1, second)
        with interrupt.deferred():
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.01)
        end = time.monotonic() + 5
        while seen != ["second", "first"] and time.monotonic() < end:
            time.sleep(0.01)
        assert seen == ["second", "first"]
    finally:
        signal.signal(signal.SIGUSR1, first)


def test_other_threads_step_as_before():
    pipe, failures = pipeline(), []

    def train() -> None:
        try:
            networks.run(pipe, DATA)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert failures == []
