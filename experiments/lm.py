"""Trains a small decoder-only transformer on the bytes of a text, with FDG or a baseline.

    python -m experiments.lm --flagfile=experiments/flags/lm_quick.cfg --workdir=runs/lm

The text is a file (--text), or the documentation of Python's standard library as it is installed.
Its end is held out; the loss on it, in nats per byte, is the result. Every setting is a flag; a
flag that the chosen method does not use is checked but ignored.

Each stage has an AdamW or Muon of its own, after clipping by the stage's own gradient norm; --beta
shrinks what it gives, since a factor before it would cancel. There are no checkpoints: what is
stopped begins again, with --overwrite.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fdg_jax as fdg
from experiments.common import command, machine, workdir
from experiments.common.errors import Failed, UsageError
from experiments.common.memory import memory
from experiments.common.screen import Screen
from experiments.text import corpus
from experiments.text.settings import Settings, define_flags, from_flags
from experiments.text.transformer import kernels, reversible_transformer, transformer
from experiments.training import curves, family, methods, remedies, setup
from experiments.training.loop import params_sha256
from experiments.training.shown import stage_table
from fdg_jax.errors import StageError
from fdg_jax.schedule import LEGEND, Schedule
from fdg_jax.tie import Tie


def optimizer(settings: Settings, schedule: Schedule, stage: int) -> optax.GradientTransformation:
    """A stage's own: clipped by its share of the norm, AdamW or Muon, then shrunk."""
    period, num_stages = schedule.period, schedule.num_stages
    total, warmup = math.ceil(settings.steps / period), settings.warmup_steps // period
    own = remedies.StageSettings(
        optax.warmup_cosine_decay_schedule(0.0, settings.learning_rate, warmup, total),
        (schedule, stage),
        period,
        settings.b1,
        settings.weight_decay,
        methods.beta(settings),
        hops=num_stages - 1 - stage,
        mask=kernels,
        exclude="logits",
        clip_norm=settings.clip_norm / math.sqrt(num_stages),
    )
    return remedies.optimizer(settings, own)


def make(settings: Settings, vocabulary: int) -> tuple[fdg.Pipeline, fdg.Partition]:
    """The transformer in stages of about equal FLOPs, and its pipeline.

    Raises:
      UsageError: the network does not fit the machine, or the batch does not fit the devices.
    """
    network = reversible_transformer if settings.reversible else transformer
    layers = network(vocabulary, settings.width, settings.blocks, settings.heads)
    example = jax.ShapeDtypeStruct((settings.batch_size, settings.context), jnp.int32)
    params, _ = jax.eval_shape(fdg.chain(layers).init, jax.random.key(0), example)
    # Weights, gradients and AdamW's two moments, in float32.
    needed = 4 * 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    if needed > memory() and jax.default_backend() == "cpu":
        raise UsageError(
            f"--width={settings.width}: the network's weights, gradients and moments take "
            f"{needed / 1e9:,.0f} GB, more than this machine has; choose less"
        )
    # One device a stage; a method that does not cut the network has them all in its one stage.
    devices, num_stages = jax.devices()[: settings.num_stages], methods.num_stages(settings)
    if num_stages == 1 and settings.batch_size % len(devices):
        raise UsageError(
            f"--batch_size={settings.batch_size}: does not divide over the {len(devices)} devices "
            f"of --method={settings.method}; choose a multiple"
        )
    stages = fdg.partition(layers, num_stages, example)
    schedule = methods.schedule(settings)
    own = family.assemble(settings, schedule, stages, setup.loss_fn, vocabulary, images=False)
    pipe = fdg.Pipeline(
        own.stages,
        own.loss_fn,
        lambda k: optimizer(settings, schedule, k),
        schedule,
        devices=devices,
        gradient=methods.gradient(settings),
        max_ahead=settings.max_ahead,
        on_nonfinite="stop",
        synthesizers=own.synthesizers,
        message_dtype=setup.message_dtype(settings.message_dtype),
        tie=tied(layers) if settings.tie_embedding else None,
    )
    return pipe, stages


def tied(layers: Sequence[fdg.Layer]) -> Tie:
    """The embedding's table as the kernel of the head."""
    last = sum(layer.size for layer in layers) - 1
    return fdg.tie(0, last, "token", "logits/kernel", transpose=True)


def described_stages(
    pipe: fdg.Pipeline, stages: fdg.Partition, settings: Settings, params: list[Any]
) -> list[dict[str, Any]]:
    """One row a stage: where it is, what it holds, how late its gradients are."""
    edges = (0, *stages.cuts, stages.layers)
    return [
        {
            "stage": k,
            "devices": [str(device) for device in stage.mesh.devices.flat],
            "layers": [edges[k], edges[k + 1]],
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params[k])),
            "cost": stages.costs[k],
            "delay": pipe.schedule.delay(k),
            "staleness": pipe.schedule.staleness(k),
            "in_flight": pipe.schedule.in_flight(k),
            "shrink": methods.beta(settings) ** (len(stages) - 1 - k),
        }
        for k, stage in enumerate(pipe.stages)
    ]


def evaluation(
    pipe: fdg.Pipeline, source: corpus.Text, settings: Settings
) -> Callable[[fdg.PipelineState], tuple[float, float]]:
    """What gives loss (nats per byte) and error on the held-out text, in sequences side by side."""
    x, labels = corpus.windows(source.validation, settings.context)
    size, last = settings.batch_size, pipe.stages[-1]

    @jax.jit
    def totals(outputs: jax.Array, labels: jax.Array, count: jax.Array) -> jax.Array:
        losses, metrics = jax.vmap(setup.loss_fn)(outputs, labels)
        real = jnp.arange(size) < count
        return jnp.stack([jnp.sum(losses * real), jnp.sum(metrics["error"] * real)])

    def evaluate(state: fdg.PipelineState) -> tuple[float, float]:
        sums: np.ndarray = np.zeros(2)
        for start in range(0, len(x), size):
            # The last batch is filled up, so that there is one shape to compile.
            rows = np.minimum(np.arange(start, start + size), len(x) - 1)
            count = np.int32(min(size, len(x) - start))
            placed = jax.device_put((labels[rows], count), (last.sharded, last.replicated))
            sums += jax.device_get(totals(pipe.predict(state, x[rows]), *placed))
        return float(sums[0]) / len(x), float(sums[1]) / len(x)

    return evaluate


def run(settings: Settings) -> dict[str, Any]:
    """Trains as ``settings`` says and returns what stands in summary.json.

    Raises:
      UsageError: something in ``settings`` cannot be done; nothing has been written then.
      Failed: a stage failed, or numbers were not finite.
    """
    settings.check()
    workdir.check(settings.workdir, overwrite=settings.overwrite)
    source = corpus.load(settings.text, settings.validation_fraction, settings.context)
    setup.prepare_jax(settings.num_stages)
    pipe, stages = make(settings, len(source.vocabulary))
    example = jax.ShapeDtypeStruct((settings.batch_size, settings.context), jnp.int32)
    key = jax.random.fold_in(jax.random.key(settings.seed), setup.MODEL_KEY)
    state = pipe.init(key, example, example)

    out = workdir.Workdir(settings.workdir, overwrite=settings.overwrite)
    table = described_stages(pipe, stages, settings, pipe.params(state))
    described = {
        "experiment": "lm",
        **dataclasses.asdict(settings),
        "text_name": source.name,
        "text_sha256": source.sha256,
        "train_bytes": len(source.train),
        "validation_bytes": len(source.validation),
        "vocabulary": list(source.vocabulary),
        "cuts": list(stages.cuts),
        "balance": stages.balance,
        "stages": table,
        **machine.environment(),
    }
    out.write_json("config.json", described)
    screen = Screen(settings.steps)
    screen.line(
        f"{settings.method} on {source.name}: {len(source.train):,} bytes for training, "
        f"{len(source.validation):,} held out, {len(source.vocabulary)} different ones; "
        f"K = {len(stages)}, {settings.steps:,} steps of {settings.batch_size} x "
        f"{settings.context} bytes"
    )
    screen.line(f"\n{pipe.schedule}\n\n{LEGEND}\n")
    stage_table(screen, stages, table)

    tokens = settings.batch_size * settings.context  # of a mini-batch
    evaluate = evaluation(pipe, source, settings)
    waiting: collections.deque[dict[str, Any]] = collections.deque()
    seconds, logged_batch, logged_seconds = 0.0, 0, 0.0

    def record(step: int, split: str, loss: float, error: float, **speed: Any) -> None:
        epoch = step * tokens / len(source.train)
        line = {"step": step, "epoch": epoch, "split": split, "loss": loss, "error": error}
        out.append_metrics({**line, **speed})

    def log(done: Sequence[dict[str, Any]], step: int, now: float) -> None:
        nonlocal logged_batch, logged_seconds
        values = jax.device_get(list(done))
        # In double precision, whatever the devices count in.
        loss, error = (float(np.mean([float(v[i]) for v in values])) for i in ("loss", "error"))
        below = family.stage_errors(values, lambda column: float(np.mean(column)))
        seen = done[-1]["batch"] + 1
        speed = tokens * (seen - logged_batch) / max(now - logged_seconds, 1e-9)
        logged_batch, logged_seconds = seen, now
        more = {"bytes_per_second": round(speed), "seconds": round(now, 3), **below}
        record(seen, "train", loss, error, **more)
        screen.advance(step, loss, error, speed, "bytes")

    def assess(state: fdg.PipelineState, step: int) -> float:
        loss, error = evaluate(state)
        record(step, "validation", loss, error, seconds=round(seconds, 3))
        screen.line(
            f"step {step:6d}  validation loss {loss:.4f} nats per byte  "
            f"error {100 * error:5.2f} %  {seconds:7.1f} s"
        )
        return loss

    try:
        with screen, jax.transfer_guard("disallow"):
            clock = time.perf_counter()
            for step in range(settings.steps):
                shape = (settings.context, settings.batch_size)
                batch = corpus.batch(source.train, *shape, settings.seed, step)
                state, metrics = pipe.step(state, batch)
                waiting.extend(family.lines_of(metrics, len(stages) - 1))
                # The pipeline has waited for all but the last max_ahead ticks.
                ended = len(waiting) - settings.max_ahead - 1
                if (step + 1) % settings.log_every_steps == 0 and ended > 0:
                    done = [waiting.popleft() for _ in range(ended)]
                    log(done, step + 1, seconds + time.perf_counter() - clock)
                if (step + 1) % settings.eval_every_steps == 0 and step + 1 < settings.steps:
                    pipe.check()
                    jax.block_until_ready(state)
                    seconds += time.perf_counter() - clock
                    assess(state, step + 1)
                    clock = time.perf_counter()
            state, rest = pipe.drain(state)
            pipe.check()
            jax.block_until_ready(state)
            seconds += time.perf_counter() - clock
            log([*waiting, *family.lines_of(rest, len(stages) - 1)], settings.steps, seconds)
            loss = assess(state, settings.steps)
    except KeyboardInterrupt:
        screen.line("there are no checkpoints: begin again with --overwrite")
        raise
    except StageError as error:
        raise Failed(f"{error}; lower --learning_rate in a new run") from error

    summary: dict[str, Any] = {
        "validation_loss": loss,
        "train_seconds": round(seconds, 3),
        "bytes_per_second": round(tokens * settings.steps / seconds, 1),
        "steps": settings.steps,
        "method": settings.method,
        "stages": len(stages),
        "balance": stages.balance,
        "staleness": [row["staleness"] for row in table],
        "params_sha256": params_sha256(pipe.true_params(state)),
    }
    network = "reversible transformer" if settings.reversible else "transformer"
    title = f"{network} on {source.name}: {settings.method}, K = {len(stages)}"
    out.write_bytes("curves.png", curves.draw(out.metrics(), title))
    out.write_json("summary.json", summary)  # the last: a run that has it is finished
    rows = [
        ("validation loss", f"{loss:.4f} nats per byte"),
        ("training time", f"{seconds:.1f} s"),
        ("bytes per second", f"{summary['bytes_per_second']:,.0f}"),
        ("params sha256", summary["params_sha256"][:16] + "..."),
        ("results", settings.workdir),
    ]
    screen.table("Result", ("", ""), rows)
    return summary


def main() -> None:
    run(from_flags())


if __name__ == "__main__":
    define_flags()
    command.run(main)
