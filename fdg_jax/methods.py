"""Training methods by name; each combines a schedule and a gradient rule.

Stages of dgl have their own heads and losses (`fdg_jax.with_head`), those of dni and dni_late
synthesizers (`fdg_jax.Synthesizer`).

    method          schedule        gradient rule   description
    backprop        backprop                        back-propagation through the stages
    data_parallel   backprop                        one stage on all devices
    fdg             fdg                             delayed gradients, no locks
    dsp             fdg             recompute       diversely stale parameters
    ddg             ddg                             delayed gradients, backward unlocked
    fr              ddg             recompute       features replay
    adl             adl                             FDG with accumulated gradients
    pipedream       pipedream                       1F1B without a flush, weights stashed
    pipedream_2bw   pipedream_2bw                   two weight versions
    gpipe           gpipe                           micro-batches, all forwards first
    one_f_one_b     one_f_one_b                     micro-batches, 1F1B
    zero_bubble     zero_bubble                     micro-batches, 1F1B with a split backward
    petra           adl             reversible      inputs reconstructed from outputs
    paci            adl             recompute       accumulation, the newest weights
    pipemare        ddg             reconstruct     1F1B without a flush, weights reconstructed
    dgl             local                           a loss in every stage
    dni             dni                             predicted gradients
    dni_late        dni_late                        predicted gradients, with FDG's as targets

If a method does not specify a gradient rule, it is "stale".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

from fdg_jax import schedule
from fdg_jax.schedule import Schedule


@dataclass(frozen=True)
class Method:
    """The definition of a method.

    Attributes:
      schedule: its name in `fdg_jax.schedule`.
      gradient: the method's gradient rule; None: not specified.
      shrinks: whether gradient shrinking is part of it.
      one_stage: whether all devices share one stage instead of having one each.
      stale: whether gradients are stale, so that remedies have an effect.
      accumulate: the default number of backwards per update; None: the schedule's default.
      beside: whether stages need additional networks: heads with losses, or synthesizers.
    """

    schedule: str
    gradient: str | None = None
    shrinks: bool = False
    one_stage: bool = False
    stale: bool = True
    accumulate: int | None = None
    beside: bool = False


METHODS = {
    "backprop": Method("backprop", stale=False),
    "fdg": Method("fdg", shrinks=True),
    "ddg": Method("ddg"),
    "pipedream": Method("pipedream"),
    "pipedream_2bw": Method("pipedream_2bw"),
    "gpipe": Method("gpipe", stale=False),
    "one_f_one_b": Method("one_f_one_b", stale=False),
    "zero_bubble": Method("zero_bubble", stale=False),
    "adl": Method("adl"),
    "fr": Method("ddg", gradient="recompute"),
    "dsp": Method("fdg", gradient="recompute"),
    "petra": Method("adl", gradient="reversible", accumulate=1),
    "paci": Method("adl", gradient="recompute"),
    "pipemare": Method("ddg", gradient="reconstruct"),
    "dgl": Method("local", stale=False, beside=True),
    "dni": Method("dni", stale=False, beside=True),
    "dni_late": Method("dni_late", stale=False, beside=True),
    "data_parallel": Method("backprop", one_stage=True, stale=False),
}


class Preset(TypedDict):
    """The arguments of `fdg_jax.Pipeline` that define a method."""

    schedule: Schedule
    gradient: str


def create(name: str, num_stages: int, **options: Any) -> Preset:
    """Creates a method by name.

    Args:
      name: one of `METHODS`.
      num_stages: K; 1 for methods with one stage.
      **options: options of its schedule (`fdg_jax.schedule.create`).

    Returns:
      Arguments for `fdg_jax.Pipeline`.

    Raises:
      ValueError: unknown method, or an invalid option of its schedule.

    Example:
      >>> made = create("adl", 2, accumulate=4)
      >>> made["schedule"].name, made["gradient"]
      ('adl', 'stale')
    """
    if name not in METHODS:
        raise ValueError(f"name={name!r}: no such method; allowed are {', '.join(METHODS)}")
    method = METHODS[name]
    stages = 1 if method.one_stage else num_stages
    if options.get("accumulate") is None and method.accumulate is not None:
        options["accumulate"] = method.accumulate
    plan = schedule.create(method.schedule, stages, **options)
    return Preset(schedule=plan, gradient=method.gradient or "stale")


def fr(num_stages: int) -> Preset:
    """Features replay: DDG with recomputation at the newest weights.

    Args:
      num_stages: K.

    Returns:
      Arguments for `fdg_jax.Pipeline`.

    Raises:
      ValueError: K < 1.

    Example:
      >>> fr(2)["gradient"]
      'recompute'

    References:
      Huo et al., `Training Neural Networks Using Features Replay
      <https://arxiv.org/abs/1807.04511>`_, 2018.
    """
    return create("fr", num_stages)


def petra(num_stages: int, accumulate: int = 1) -> Preset:
    """PETRA: FDG with inputs reconstructed from outputs, for reversible networks.

    Args:
      num_stages: K.
      accumulate: backwards per update.

    Returns:
      Arguments for `fdg_jax.Pipeline`.

    Raises:
      ValueError: K < 1 or accumulate < 1.

    Example:
      >>> petra(3)["gradient"], petra(3)["schedule"].delay(0)
      ('reversible', 4)

    References:
      Rivaud et al., `PETRA: Parallel End-to-end Training with Reversible Architectures
      <https://arxiv.org/abs/2406.02052>`_, 2024.
    """
    return create("petra", num_stages, accumulate=accumulate)


def paci(num_stages: int, accumulate: int = 2) -> Preset:
    """PACI: gradient accumulation, backward at the newest weights.

    Args:
      num_stages: K.
      accumulate: backwards per update, a; the weights of a forward and of its backward are at most
        ceil(2(K-1-k)/a) updates apart.

    Returns:
      Arguments for `fdg_jax.Pipeline`.

    Raises:
      ValueError: K < 1 or accumulate < 1.

    Example:
      >>> paci(4, 3)["schedule"].staleness(0)
      2

    References:
      `arXiv 2606.07881 <https://arxiv.org/abs/2606.07881>`_.
    """
    return create("paci", num_stages, accumulate=accumulate)


def dsp(num_stages: int) -> Preset:
    """Diversely stale parameters: FDG with recomputation at the newest weights.

    Args:
      num_stages: K.

    Returns:
      Arguments for `fdg_jax.Pipeline`.

    Raises:
      ValueError: K < 1.

    Example:
      >>> dsp(3)["schedule"].staleness(0)
      4

    References:
      Xu et al., `Diversely Stale Parameters for Efficient Training of CNNs
      <https://arxiv.org/abs/1909.02625>`_, 2019.
    """
    return create("dsp", num_stages)


def pipemare(num_stages: int) -> Preset:
    """PipeMare: DDG with recomputation at estimated weights.

    This is its second technique, discrepancy correction. Its first, an initial rate divided by the
    staleness, is `fdg_jax.staleness_rate` in the optimizer; its third, a synchronous start, is
    `fdg_jax.schedule.then`.

    Args:
      num_stages: K.

    Returns:
      Arguments for `fdg_jax.Pipeline`.

    Raises:
      ValueError: K < 1.

    Example:
      >>> import optax
      >>> import fdg_jax as fdg
      >>> preset = pipemare(3)
      >>> preset["schedule"].staleness(0), preset["gradient"]
      (2, 'reconstruct')
      >>> def optimizer(k):
      ...     return optax.sgd(fdg.staleness_rate(0.1, (preset["schedule"], k), anneal_steps=500))

    References:
      Yang et al., `PipeMare: Asynchronous Pipeline Parallel DNN Training
      <https://arxiv.org/abs/1910.05124>`_, 2019.
    """
    return create("pipemare", num_stages)
