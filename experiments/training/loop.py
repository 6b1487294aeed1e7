"""The training loop, from top to bottom."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

import fdg_jax as fdg
from experiments.common import workdir
from experiments.common.errors import Failed, Stopped
from experiments.common.screen import Screen
from experiments.training import (
    cluster,
    curves,
    evaluation,
    family,
    resume,
    setup,
    timeline,
    writers,
)
from experiments.training.config import Config
from experiments.training.shown import conclude, evaluated_line, introduce
from experiments.training.task import Loader, Task
from fdg_jax import distributed
from fdg_jax.errors import NonFiniteError, StageError

C = TypeVar("C", bound=Config)


def run(config: C, make: type[Task[C]]) -> dict[str, Any]:
    """Trains according to ``config`` and returns the content of summary.json.

    A stopped run in the workdir resumes from its newest intact checkpoint, with the same result as
    if it had not been stopped; a finished run is left unchanged.

    Args:
      config: the settings.
      make: the class of the program's task.

    Raises:
      UsageError: ``config`` is invalid; nothing has been written.
      Stopped: stopped by a signal; the same ``config`` resumes.
      Failed: a stage failed, numbers were not finite, or the data cannot be read.
    """
    # --- All usage errors are raised before the first file is written.
    config.check()
    earlier = resume.find(config)
    if earlier is not None and earlier.finished:
        print(f"{config.workdir}: this run is finished; nothing is changed")
        return workdir.read_json(config.workdir, "summary.json")
    workdir.check(config.workdir, overwrite=config.overwrite or earlier is not None)
    cluster.agree_on_run(earlier)
    setup.prepare_jax(config.num_stages, config.devices_per_stage)
    task = make(config)
    run = setup.make(task, None if earlier is None else earlier.config["cuts"])
    pipe, loader, metric = run.pipe, task.loader, task.metric
    first, last = pipe.stages[0], pipe.stages[-1]
    writes = last.owner == jax.process_index()
    checkpoints = resume.Checkpoints(run)

    saved = checkpoints.restore() if earlier is not None else None
    if saved is None:
        model_key = jax.random.fold_in(jax.random.key(config.seed), setup.MODEL_KEY)
        example = task.inputs(config.batch_size), task.targets(config.batch_size)
        saved = (pipe.init(model_key, *example), resume.NOTHING)
    state, past = saved

    watch = timeline.Watch(run, past["step"])

    # --- Description of the run, on disk and on screen.
    out = workdir.Workdir(
        config.workdir,
        overwrite=config.overwrite,
        folders=resume.folders(config),
        resume=earlier is not None,
        writes=writes,
    )
    table = setup.stage_table(run, pipe.params(state))
    described = setup.describe(run, table)
    if earlier is None:
        out.write_json("config.json", described)
    else:
        described = earlier.config
        out.cut_metrics(past["lines"])
    screen = Screen(run.total_steps, shown=writes)
    introduce(screen, run, table)
    if earlier is not None:
        screen.line(f"goes on after step {past['step']}")

    # --- Programs outside the pipeline: augmentation before it, evaluation after it.
    inputs = task.training_inputs(first)
    evaluate = evaluation.Evaluation(run)
    wishes = cluster.Wishes(pipe, config.max_ahead)

    # --- Training. Only evaluations wait for devices; the log reads batches that are known to be
    # done.
    waiting: collections.deque[dict[str, Any]] = collections.deque(past["waiting"])
    best, evaluated = past["best"], past["evaluated"]
    train_seconds, logged_batch, logged_seconds = past["clocks"]
    eval_steps = evaluation.every(run)
    speed_name, per_batch = f"{task.unit}_per_second", task.per_batch(config)

    def log(done: Sequence[dict[str, Any]], step: int, seconds: float) -> None:
        nonlocal logged_batch, logged_seconds
        if not writes:
            return
        values = jax.device_get(list(done))
        # In double precision, as checkpoints store the pending ones. Non-finite values are omitted,
        # as they were in training.
        loss, error = (finite_mean([float(v[i]) for v in values]) for i in ("loss", "error"))
        seen = done[-1]["batch"] + 1
        speed = per_batch * (seen - logged_batch) / max(seconds - logged_seconds, 1e-9)
        logged_batch, logged_seconds = seen, seconds
        out.append_metrics(
            {
                "step": seen,
                "epoch": seen / loader.steps_per_epoch,
                "split": "train",
                "loss": loss,
                "error": error,
                speed_name: round(speed, 1),
                "seconds": round(seconds, 3),
                **family.stage_errors(values, finite_mean),
            }
        )
        screen.advance(step, loss, error, speed, task.unit)

    def assess(state: fdg.PipelineState, step: int) -> dict[str, float]:
        """Evaluates after ``step`` steps; this does not count as training time."""
        begin = time.perf_counter()
        result = evaluate(state)
        speed = task.held_out[1].size / (time.perf_counter() - begin)
        epoch = step / loader.steps_per_epoch
        out.append_metrics(
            {
                "step": step,
                "epoch": epoch,
                "split": task.split,
                **result,
                speed_name: round(speed, 1),
                "seconds": round(train_seconds, 3),
            }
        )
        screen.line(evaluated_line(task, epoch, step, result, train_seconds))
        if any(left_out := pipe.skipped(state)):
            screen.line(f"not finite and left out, per stage: {', '.join(map(str, left_out))}")
        return result

    def save(
        state: fdg.PipelineState, step: int, seconds: float, score: float | None = None
    ) -> None:
        extra = {
            "lines": out.lines,
            "waiting": list(waiting),
            "best": best,
            "evaluated": evaluated if step == run.total_steps else None,
            "clocks": [seconds, logged_batch, logged_seconds],
        }
        checkpoints.save(state, step, extra, score)

    with (
        screen,
        failures(checkpoints),
        checkpoints.checkpointer,
        writers.attached(config.writers if writes else "", out, described),
        resume.Stop() as stop,
        jax.transfer_guard("disallow"),
    ):
        clock = time.perf_counter()
        for step in range(past["step"], run.total_steps):
            watch.before(step)
            examples, labels = fetch(loader, step)
            state, metrics = pipe.step(state, (inputs(examples, step), labels))
            waiting.extend(family.lines_of(metrics, len(pipe.stages) - 1))
            if (step + 1) % config.log_every_steps == 0:
                # The pipeline has waited for all except the last max_ahead ticks.
                count = len(waiting) - config.max_ahead - 1
                if count > 0:
                    done = [waiting.popleft() for _ in range(count)]
                    log(done, step + 1, train_seconds + time.perf_counter() - clock)
            if step + 1 == run.total_steps:
                break
            score = None
            if (step + 1) % eval_steps == 0:
                pipe.check()
                jax.block_until_ready(state)
                train_seconds += time.perf_counter() - clock
                value = assess(state, step + 1)[metric]
                score, best = (value, value) if value < best else (None, best)
                clock = time.perf_counter()
            stopping, late = wishes.heard(step + 1, stop.asked, checkpoints.late)
            if stopping or checkpoints.due(step + 1, best=score is not None, late=late):
                save(state, step + 1, train_seconds + time.perf_counter() - clock, score)
            if stopping:
                raise Stopped(checkpoints.farewell(step + 1))

        state, rest = pipe.drain(state)
        pipe.check()
        jax.block_until_ready(state)
        if evaluated is None:  # otherwise nothing was trained since
            train_seconds += time.perf_counter() - clock
        waiting.extend(family.lines_of(rest, len(pipe.stages) - 1))
        if waiting:
            log(list(waiting), run.total_steps, train_seconds)
            waiting.clear()
        if evaluated is None:  # otherwise the run was stopped after its last evaluation
            evaluated = assess(state, run.total_steps)
            best = min(best, evaluated[metric])
            if checkpoints.on:
                score = finite(evaluated[metric])
                save(state, run.total_steps, train_seconds, score)

    # --- Results.
    left_out = pipe.skipped(state)
    params = [distributed.fetch(tree, last.replicated) for tree in pipe.true_params(state)]
    if not writes:
        distributed.gather(np.int32(run.total_steps))  # waits until the results are written
        return workdir.read_json(config.workdir, "summary.json")
    split = task.split
    summary = {
        f"{split}_error": finite(evaluated["error"]),
        f"{split}_loss": finite(evaluated["loss"]),
        f"best_{split}_{metric}": finite(best),
        "train_seconds": round(train_seconds, 3),
        speed_name: round(per_batch * run.total_steps / train_seconds, 1),
        "steps": run.total_steps,
        "split": split,
        "method": config.method,
        "stages": len(run.stages),
        "balance": described["balance"],
        "staleness": [run.schedule.staleness(k) for k in range(len(run.stages))],
        "left_out": left_out,
        "params_sha256": params_sha256(params),
    }
    title = f"{config.model} on {task.name}: {config.method}, K = {len(run.stages)}"
    out.write_bytes("curves.png", curves.draw(out.metrics(), title))
    watch.write(out, screen)
    out.write_json("summary.json", summary)  # last: marks the run as finished
    conclude(screen, run, summary)
    distributed.gather(np.int32(run.total_steps))
    return summary


def fetch(loader: Loader, step: int) -> tuple[np.ndarray, np.ndarray]:
    """The next mini-batch; any error of the source ends the run."""
    try:
        return next(loader)
    except StopIteration:
        raise Failed(f"step {step}: the data ran dry; check the source of the data") from None
    except Exception as error:
        raise Failed(f"step {step}: the data cannot be read ({error})") from error


@contextlib.contextmanager
def failures(checkpoints: resume.Checkpoints) -> Iterator[None]:
    """Adds the checkpoint to resume from to errors that end a run."""
    try:
        yield
    except (StageError, Failed, jax.errors.JaxRuntimeError) as error:
        step = checkpoints.checkpointer.latest()
        newest = "no checkpoint yet" if step is None else f"newest good checkpoint: step {step}"
        remedy = ""
        if isinstance(error, NonFiniteError):
            remedy = "; lower --learning_rate in a new run, or go on with --on_nonfinite=skip"
        raise Failed(f"{cluster.blame(error)}; {newest}{remedy}") from error


def finite(value: float) -> float | None:
    """The value for JSON; None if not finite."""
    return value if math.isfinite(value) else None


def finite_mean(values: Sequence[float]) -> float:
    """The mean of the finite values; NaN if there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return float(np.mean(finite)) if finite else math.nan


def params_sha256(params: Sequence[Any]) -> str:
    """A hash of parameters: path, dtype, shape and bytes of every leaf, in the order of paths."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(list(params)):
        value = np.asarray(jax.device_get(leaf))
        name = f"{jax.tree_util.keystr(path)} {value.dtype} {value.shape}"
        digest.update(name.encode() + b"\0" + np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()
