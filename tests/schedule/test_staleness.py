"""Staleness, first updates and shrink factors, counted from runs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fdg_jax as fdg
from tests.thinned import thinned


def versions() -> tuple[fdg.Layer, optax.GradientTransformation]:
    """A layer and an optimizer that count: where and when each weight version was used.

    The layer adds w²/2, so its gradient is the weight that its backward used. The optimizer makes
    the weight the number of updates, and notes the gradients: update number minus gradient is the
    staleness, whatever was meant.
    """
    layer = fdg.Layer(
        lambda key, x: (jnp.zeros(()), ()), lambda p, s, x, *, train, key: (x + p**2 / 2, s)
    )

    def update(gradient, state, params=None):
        count, seen = state
        (own,) = jax.tree.leaves(gradient)
        return jax.tree.map(jnp.ones_like, gradient), (count + 1, seen.at[count].set(own))

    return layer, optax.GradientTransformation(lambda p: (0, jnp.zeros(40)), update)


def counted(pipe: fdg.Pipeline, steps: int):
    """Per stage what its updates noted, and the tick of its first update."""
    state = pipe.init(jax.random.key(0), np.ones((4, 1)), np.zeros(4))
    first = {}
    for t in range(steps):
        state, _ = pipe.step(state, (np.ones((4, 1)), np.zeros(4)))
        for k, params in enumerate(pipe.params(state)):
            if float(params) > 0:
                first.setdefault(k, t)
    notes = []
    for stage in state.stages:
        count, seen = stage.opt_state[1]
        notes.append(np.asarray(seen)[: int(count)])
    return notes, first


@pytest.mark.parametrize("order", ["forward_first", "backward_first"])
@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_staleness_first_update_and_shrinking_counted_from_a_run(num_stages, order):
    layer, note = versions()
    table = {
        "forward_first": {2: [2, 0], 3: [4, 2, 0], 4: [6, 4, 2, 0]},
        "backward_first": {2: [1, 0], 3: [3, 1, 0], 4: [5, 3, 1, 0]},
    }
    pipe = fdg.Pipeline(
        [layer] * num_stages,
        lambda y, t: (jnp.mean(y), {}),
        lambda k: optax.chain(fdg.fdg_shrink(0.5, num_stages - 1 - k), note),
        fdg.schedule.fdg(num_stages, order),
    )
    notes, first = counted(pipe, 30)
    # The paper counts iterations t and modules k from 1: the first update is in iteration 2K - k.
    assert [first[k] + 1 for k in range(num_stages)] == [
        2 * num_stages - k for k in range(1, num_stages + 1)
    ]
    for k, seen in enumerate(notes):
        shrink = 0.5 ** (num_stages - 1 - k)
        staleness = np.arange(len(seen)) - seen / shrink
        np.testing.assert_array_equal(staleness[2 * num_stages :], table[order][num_stages][k])


def literature(name: str, num_stages: int) -> list[float]:
    """Mean staleness of each stage in steady state, as the papers have it."""
    hops = [num_stages - 1 - k for k in range(num_stages)]
    return {
        "backprop": [0] * num_stages,
        "gpipe": [0] * num_stages,
        "one_f_one_b": [0] * num_stages,
        "zero_bubble": [0] * num_stages,
        "local": [0] * num_stages,
        "dni": [0] * num_stages,
        "dni_late": [0] * num_stages,
        "ddg": hops,
        "pipedream": hops,
        "fdg": [2 * h for h in hops],
        "adl": [2 * h / 2 for h in hops],  # M = 2
        "pipedream_2bw": [1] * num_stages,
    }[name]


@pytest.mark.parametrize(("name", "num_stages"), thinned(fdg.schedule.NAMED, [2, 3, 4]))
def test_staleness_of_every_method_counted_from_a_run(name, num_stages):
    layer, note = versions()

    def mean(y, t):
        return jnp.mean(y), {}

    # The cotangent of a mean is known.
    exact = fdg.Synthesizer(
        fdg.from_fn(lambda pair: jnp.full_like(pair[0], 1 / pair[0].size)), optax.sgd(0.1)
    )
    schedule = fdg.schedule.create(name, num_stages, microbatches=4, accumulate=None)
    pipe = fdg.Pipeline(
        [layer] * num_stages,
        [mean if k in schedule.losses else None for k in range(num_stages)],
        lambda k: optax.chain(optax.identity(), note),
        schedule,
        synthesizers=exact if schedule.predicts else None,
    )
    notes, _ = counted(pipe, 34)
    for k, seen in enumerate(notes):
        staleness = np.arange(len(seen)) - seen
        steady = staleness[len(seen) // 2 :]
        expected = literature(name, num_stages)[k]
        np.testing.assert_allclose(steady, expected, rtol=0, atol=1e-12)
        assert schedule.mean_staleness(k) == expected
        assert schedule.staleness(k) == np.ceil(expected)


@pytest.mark.parametrize("preset", [fdg.methods.fr, fdg.methods.dsp])
def test_recomputed_gradients_use_todays_weights(preset):
    layer, note = versions()
    pipe = fdg.Pipeline(
        [layer] * 3,
        lambda y, t: (jnp.mean(y), {}),
        lambda k: optax.chain(optax.identity(), note),
        **preset(3),
    )
    for seen in counted(pipe, 30)[0]:
        np.testing.assert_array_equal(np.arange(len(seen)) - seen, 0)
