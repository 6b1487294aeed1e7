"""Parts of published recipes: Nesterov momentum, warm-up, decay of kernels alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fdg_jax as fdg
from experiments.common.errors import UsageError
from experiments.images.settings import Settings
from experiments.images.task import optimizer, warmed_up
from experiments.training.remedies import kernels

PLAIN = Settings("-", learning_rate=0.1, momentum=0.9, weight_decay=0.01)
PARAMS = {
    "conv": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)},
    "norm": {"scale": jnp.ones((4, 2))},  # of four scanned layers
}


def trained(transformation, steps=4):
    params, state = PARAMS, transformation.init(PARAMS)
    for step in range(steps):
        gradient = jax.tree.map(lambda p, step=step: jnp.cos(step + p), params)
        updates, state = transformation.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def made(**changes):
    config = dataclasses.replace(PLAIN, num_stages=1, method="backprop", **changes)
    config.check()
    return optimizer(config, optax.constant_schedule(0.1), fdg.schedule.backprop(1), 0)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay_norms", [False, True])
def test_sgd(nesterov, decay_norms):
    mask = None if decay_norms else kernels
    expected = optax.chain(
        optax.add_decayed_weights(0.01, mask), optax.sgd(0.1, momentum=0.9, nesterov=nesterov)
    )
    found = trained(made(nesterov=nesterov, decay_norms=decay_norms))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, trained(expected))
    others = [
        trained(made(nesterov=a, decay_norms=b)) for a in (False, True) for b in (False, True)
    ]
    same = [np.array_equal(o["norm"]["scale"], found["norm"]["scale"]) for o in others]
    assert sum(same) == 1


def test_kernels():
    assert kernels(PARAMS) == {
        "conv": {"kernel": True, "bias": False},
        "norm": {"scale": False},
    }


def test_warm_up():
    rate = optax.piecewise_constant_schedule(0.4, {6: 0.5})
    found = [float(warmed_up(rate, 4)(count)) for count in range(8)]
    np.testing.assert_allclose(found, [0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.2, 0.2], rtol=1e-6)
    assert warmed_up(rate, 0) is rate


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"warmup_steps": -1}, "--warmup_steps=-1: "),
        ({"nesterov": True, "optimizer": "muon"}, "--nesterov: not with --optimizer=muon"),
        ({"nesterov": True, "remedy": "recipe"}, "--nesterov: not with .* --remedy=recipe"),
        ({"decay_norms": False, "remedy": "prediction"}, "--nodecay_norms: not with "),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        dataclasses.replace(PLAIN, **change).check()


def test_a_run_no_longer_than_its_warm_up():
    config = dataclasses.replace(PLAIN, warmup_steps=20)
    config.check_warmup(21)
    with pytest.raises(UsageError, match=r"^--warmup_steps=20: must be below the run's 20 steps"):
        config.check_warmup(20)
