"""Ctrl-C arrives between steps: the state is whole, and nothing is lost."""

import contextlib
import os
import signal
import threading
import time

import jax
import numpy as np
import pytest

import fdg_jax as fdg
from fdg_jax.engine import interrupt
from tests import networks

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


@pytest.mark.usefixtures("interruptible")
def test_a_run_that_is_interrupted_often_ends_like_one_that_is_not():
    pipe = pipeline()
    key = jax.random.key(7)
    state = pipe.init(key, *DATA[0])
    for step in range(40):
        state, _ = pipe.step(state, DATA[step % 8])
    undisturbed = pipe.params(state)

    stop = threading.Event()

    def press() -> None:
        rng = np.random.default_rng(0)
        while not stop.wait(rng.uniform(0, 0.004)):
            os.kill(os.getpid(), signal.SIGINT)

    state, step, interrupts = pipe.init(key, *DATA[0]), 0, 0
    thread = threading.Thread(target=press)
    thread.start()
    try:
        while step < 40:
            try:
                # Both in one statement: an interrupt after it finds both or neither.
                (state, _), step = pipe.step(state, DATA[step % 8]), step + 1
            except KeyboardInterrupt:
                interrupts += 1
    except KeyboardInterrupt:
        pytest.skip("an interrupt in the test's own lines")
    finally:
        stop.set()
        while thread.is_alive():
            try:
                thread.join()
            except KeyboardInterrupt:
                continue
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(2 * interrupt._PATIENCE)
    assert interrupts > 0
    assert networks.difference(pipe.params(state), undisturbed) == 0


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


def test_handlers_of_the_program_are_left_alone():
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        with interrupt.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            assert seen == [1]
    finally:
        signal.signal(signal.SIGINT, before)


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
