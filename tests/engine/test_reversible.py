"""PETRA: inputs reconstructed from outputs, on the engine and by the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fdg_jax as fdg
from fdg_jax.engine.reversible import runs
from fdg_jax.partition.cuts import units_of
from tests import networks
from tests.thinned import thinned

DATA = networks.batches(16)


def partitioned(num_stages: int, **options):
    layers = networks.reversible_network(**options)
    return fdg.partition(layers, num_stages, DATA[0][0], cost=[1] * len(units_of(layers)))


SCHEDULES = {
    "fdg": fdg.schedule.fdg,
    "backward first": lambda k: fdg.schedule.fdg(k, "backward_first"),
    "ddg": fdg.schedule.ddg,
    "adl": lambda k: fdg.schedule.adl(k, 2),
    "gpipe": lambda k: fdg.schedule.gpipe(k, 2),
    "zero bubble": lambda k: fdg.schedule.zero_bubble(k, 2),
}


@pytest.mark.parametrize(("schedule", "num_stages"), thinned(SCHEDULES, [1, 2, 3, 4]))
def test_equals_the_oracle(schedule, num_stages):
    if schedule not in ("fdg", "adl") and num_stages != 3:
        pytest.skip("every schedule once, the method at every K")
    networks.assert_equals_oracle(
        partitioned(num_stages),
        networks.sgd(0.5, num_stages),
        SCHEDULES[schedule](num_stages),
        DATA,
        gradient="reversible",
    )


def test_a_stage_of_one_layer_equals_the_oracle():
    branch = networks.dense(networks.WIDTH)
    head = fdg.chain([networks.merge(), networks.dense(3, lambda x: x)])
    stages = [
        fdg.chain([networks.dense(2 * networks.WIDTH), fdg.two_streams()]),
        fdg.coupling(branch),
        head,
    ]
    networks.assert_equals_oracle(
        stages, networks.sgd(0.5, 3), fdg.schedule.fdg(3), DATA, gradient="reversible"
    )


def summing(k: int) -> optax.GradientTransformation:
    """An optimizer that moves nothing and adds up the gradients."""
    del k

    def update(updates, state, params=None):
        return jax.tree.map(jnp.zeros_like, updates), jax.tree.map(jnp.add, state, updates)

    return optax.GradientTransformation(lambda p: jax.tree.map(jnp.zeros_like, p), update)


@pytest.mark.parametrize("num_stages", thinned([2, 3, 4], keep=3))
def test_at_rate_0_gradients_are_those_of_backpropagation(num_stages):
    ends = []
    for make, rule in ((fdg.schedule.backprop, "stale"), (fdg.schedule.fdg, "reversible")):
        pipe = fdg.Pipeline(
            partitioned(num_stages), networks.loss_fn, summing, make(num_stages), gradient=rule
        )
        ends.append([own.opt_state for own in networks.run(pipe, DATA)[0].stages])
    assert networks.difference(*ends) <= 1e-12
    assert max(float(jnp.abs(v).max()) for v in jax.tree.leaves(ends[0])) > 0.1


def test_two_stages_by_hand():
    # Streams (x, t), one number each. Stage 0: q = t + a x, p = x + c q. Stage 1: w (p + q).
    scale = fdg.Layer(lambda key, x: (jnp.ones(()), ()), lambda p, s, x, *, train, key: (p * x, s))
    top = fdg.Layer(
        lambda key, x: (jnp.ones(()), ()),
        lambda p, s, x, *, train, key: (p * (x[0] + x[1]), s),
    )
    pipe = fdg.Pipeline(
        [fdg.reversible(scale, scale), top],
        lambda y, t: (jnp.mean((y - t) ** 2) / 2, {}),
        optax.sgd(0.1),
        fdg.schedule.fdg(2),
        gradient="reversible",
    )
    pairs = [(1.0, 2.0), (0.5, 1.0), (2.0, -1.0), (1.5, 0.5), (1.0, 1.0), (-1.0, 0.5)]
    one = lambda v: np.full((1, 1), v)  # noqa: E731
    state, _ = networks.run(pipe, [((one(x), one(t)), one(0.5)) for x, t in pairs])

    below, w = [(1.0, 1.0)], 1.0  # (a, c) after every update
    made, sent, drift = (0.0, 0.0), {}, 0.0
    for tick in range(len(pairs) + 2):
        if 0 <= (n := tick - 1) < len(pairs):  # stage 1: forward, backward, update
            p, q = made
            error = w * (p + q) - 0.5
            sent[n] = (p, q), error * w
            w -= 0.1 * error * (p + q)
        if tick < len(pairs):  # stage 0: forward
            (x, t), (a, c) = pairs[tick], below[-1]
            q = t + a * x
            made = x + c * q, q
        if (n := tick - 2) >= 0:  # stage 0: backward at the newest weights
            (p, q), d = sent.pop(n)
            a, c = below[-1]
            x = p - c * q
            drift = max(drift, abs(x - pairs[n][0]))
            below.append((a - 0.1 * (d + d * c) * x, c - 0.1 * d * q))
    first, second = pipe.params(state)
    np.testing.assert_allclose([*map(float, first), float(second)], [*below[-1], w], rtol=1e-12)
    assert drift > 1e-3  # the weights have changed in between


def test_nothing_of_a_reversible_stage_is_kept():
    stages = partitioned(4)
    pipe = fdg.Pipeline(
        stages, networks.loss_fn, networks.sgd(1, 4), fdg.schedule.fdg(4), gradient="reversible"
    )
    state = pipe.init(jax.random.key(0), *DATA[0])
    for batch in DATA[:8]:
        state, _ = pipe.step(state, batch)
    plain = 0
    for stage, own in zip(stages[:-1], state.stages, strict=False):
        without = [run for run in runs(stage) if not run.inverts]
        for _, stash in own.flights.items():
            assert stash.residuals is None
            assert len(stash.inputs) == len(without)
        plain += not without
        assert not own.versions.values
    assert plain  # one stage at least is reversible throughout


def test_noise_and_statistics_are_of_the_forward():
    # Statistics move once a batch: as often as without reconstruction, from the same values at K=1.
    made = []
    for rule in ("stale", "reversible"):
        pipe = fdg.Pipeline(
            partitioned(3), networks.loss_fn, optax.sgd(0.0), fdg.schedule.fdg(3), gradient=rule
        )
        made.append([own.model_state for own in networks.run(pipe, DATA)[0].stages])
    assert networks.difference(*made) <= 1e-15
