"""Runs a training program that logs its progress and kills itself at a given moment.

    WATCH_PROGRAM=cifar WATCH_LOG=where.jsonl WATCH_KILL="arrays written:2" \
        python -m tests.kills.watched --workdir=...

The program has no hooks for tests. Its functions are wrapped here before it starts, so that each of
the moments below is logged before the program continues; at the n-th pass of the moment in
WATCH_KILL it sends itself SIGKILL. The last line tells where a process was when it was killed:

    {"moment": "arrays", "main": "steady", "save": "arrays", "step": 12}

`main` is the phase of the loop: start, fill (stage 0 has applied no gradient yet), steady,
evaluation, drain, end. `save` is the phase of the thread that writes checkpoints: none, copies
(fetching them from the devices), arrays, manifest, rename, removing (older checkpoints).
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import pathlib
import runpy
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from experiments.common import workdir
from experiments.training import evaluation, resume
from fdg_jax.checkpoint import checkpointer, manifest
from fdg_jax.engine import dispatch, pipeline

# Polling interval for files written by a library without wrapped functions.
LOOK_SECONDS = 0.0002


class Watch:
    """The log, and the moment of the kill.

    Args:
      log: the file to which lines are appended.
      kill: ``moment:n``, or empty.
    """

    def __init__(self, log: str, kill: str) -> None:
        self._file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._lock = threading.Lock()
        self._passed: collections.Counter[str] = collections.Counter()
        self._kill = kill
        self.main, self.save, self.step = "start", "none", 0
        self.behind = ""  # the phase after an evaluation
        self.last = False  # whether the current checkpoint is of the drained state

    def at(self, moment: str, *, main: str | None = None, save: str | None = None) -> None:
        """Logs ``moment`` and changes phases if given.

        Moments of the checkpoint thread have the prefix "last " for the checkpoint of the drained
        state.
        """
        if self.last and threading.current_thread() is not threading.main_thread():
            moment = f"last {moment}"
        with self._lock:
            self.main, self.save = main or self.main, save or self.save
            where = {"moment": moment, "main": self.main, "save": self.save, "step": self.step}
            # One unbuffered system call, so that the line survives the process.
            os.write(self._file, (json.dumps(where) + "\n").encode())
            self._passed[moment] += 1
            if f"{moment}:{self._passed[moment]}" == self._kill:
                os.kill(os.getpid(), signal.SIGKILL)

    @contextlib.contextmanager
    def files(self, folder: pathlib.Path) -> Iterator[None]:
        """Makes every new file in ``folder`` a moment, if the kill is at such a moment.

        Otherwise polling would only cost time.
        """
        if not self._kill.startswith("array file:"):
            yield
            return
        over = threading.Event()

        def look() -> None:
            seen = 0
            while not over.is_set():
                there = sum(len(files) for _, _, files in os.walk(folder))
                for _ in range(seen, there):
                    self.at("array file")
                seen = max(seen, there)
                over.wait(LOOK_SECONDS)

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def wrap(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replaces a function by a wrapper of it."""
    setattr(owner, name, make(getattr(owner, name)))


def around(
    watch: Watch,
    before: str,
    after: str,
    when: Callable[..., bool] = lambda *given: True,
    *,
    main: str | None = None,
    then_save: str | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A wrapper with one moment before the call and one after it.

    Args:
      watch: the log.
      before, after: the moments' names.
      when: a predicate of the call's arguments; other calls are not logged.
      main: the phase of the loop from the call on.
      then_save: the phase of the checkpoint thread after the call.
    """

    def make(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any, **named: Any) -> Any:
            if not when(*given):
                return call(*given, **named)
            watch.at(before, main=main)
            result = call(*given, **named)
            watch.at(after, save=then_save)
            return result

        return wrapped

    return make


def watch_main(watch: Watch) -> None:
    """Wraps functions called by the training loop."""
    wrap(resume.Checkpoints, "restore", around(watch, "restore", "restored"))

    def replacing(write: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(self: workdir.Workdir, name: str, content: bytes) -> None:
            # A run killed after its last checkpoint gets here without an evaluation.
            result = name in ("curves.png", "summary.json")
            watch.at(f"write {name}", main="end" if result else None)
            write(self, name, content)
            watch.at(f"wrote {name}")

        return wrapped

    wrap(workdir.Workdir, "write_bytes", replacing)

    def writing(append: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any) -> None:
            watch.at("line")
            append(*given)
            # An evaluation ends with its line.
            watch.at("line written", main=watch.behind if watch.main == "evaluation" else None)

        return wrapped

    wrap(workdir.Workdir, "append_metrics", writing)

    def stepping(step: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(self: pipeline.Pipeline, state: Any, batch: Any) -> Any:
            watch.step = int(state.tick) + 1
            filling = int(state.tick - state.origin) < self.schedule.delay(0)
            phase = "fill" if filling else "steady"
            watch.at(phase, main=phase)
            return step(self, state, batch)

        return wrapped

    wrap(pipeline.Pipeline, "step", stepping)

    def evaluating(evaluate: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any) -> Any:
            watch.behind = "end" if watch.main == "drain" else watch.main
            watch.at("evaluation", main="evaluation")
            result = evaluate(*given)
            watch.at("evaluated")
            return result

        return wrapped

    wrap(evaluation.Evaluation, "__call__", evaluating)
    wrap(pipeline.Pipeline, "predict", around(watch, "predict", "predicted"))
    wrap(pipeline.Pipeline, "drain", around(watch, "drain", "drained", main="drain"))
    draining = around(watch, "drain tick", "drain ticked", lambda *_: watch.main == "drain")
    wrap(dispatch.Tick, "run", draining)


def watch_saves(watch: Watch) -> None:
    """Wraps functions called by the checkpoint thread."""
    wrap(checkpointer.Checkpointer, "save", around(watch, "save", "save begun"))

    def writing(write: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any) -> None:
            watch.last = watch.main == "end"
            watch.at("copies", save="copies")
            try:
                write(*given)
            finally:
                watch.at("saved", save="none")

        return wrapped

    wrap(checkpointer.Checkpointer, "_write", writing)

    def filling(save: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(self: Any, folder: pathlib.Path, *given: Any) -> Any:
            watch.at("arrays", save="arrays")
            with watch.files(folder.parent):
                result = save(self, folder, *given)
            watch.at("arrays written", save="manifest")
            return result

        return wrapped

    wrap(checkpointer.Checkpointer, "_write_arrays", filling)
    wrap(manifest, "write", around(watch, "manifest", "manifest written", then_save="rename"))

    def partial(path: pathlib.Path, *_: Any) -> bool:
        return path.name.startswith(".step-")

    renaming = around(watch, "rename", "renamed", partial, then_save="removing")
    wrap(pathlib.Path, "rename", renaming)
    # Called by shutil.rmtree, so that an older checkpoint is partly removed.
    unlinking = around(watch, "remove", "removed", lambda *_: watch.save == "removing")
    wrap(os, "unlink", unlinking)


def main() -> None:
    watch = Watch(os.environ["WATCH_LOG"], os.environ.get("WATCH_KILL", ""))
    watch_main(watch)
    watch_saves(watch)
    runpy.run_module(
        f"experiments.{os.environ['WATCH_PROGRAM']}", run_name="__main__", alter_sys=True
    )


if __name__ == "__main__":
    main()
