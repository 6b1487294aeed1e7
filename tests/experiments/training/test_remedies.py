"""What --remedy and its flags make of a stage's optimizer, in both programs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fdg_jax as fdg
from experiments.common.errors import UsageError
from experiments.images import settings as cifar
from experiments.images.settings import Settings
from experiments.images.task import optimizer as optimizer_of
from experiments.text import settings as lm
from experiments.training import remedies
from tests.optim.recursion import trained

RULE = fdg.schedule.fdg(4, "backward_first")  # stage 0 is 5 updates late
RATE = optax.cosine_decay_schedule(0.1, 100)


def of(config, stage=0):
    return trained(optimizer_of(config, RATE, RULE, stage))


DECAY = optax.add_decayed_weights(5e-4)
SGD = {
    "none": lambda: optax.chain(DECAY, optax.sgd(RATE, momentum=0.9)),
    "prediction": lambda: fdg.delayed_sgd(RATE, 0.9, 5, stretch=0, spike=False, weight_decay=5e-4),
    "spike": lambda: optax.chain(
        DECAY, fdg.scale_by_spike_compensation(0.9, 5), optax.scale_by_learning_rate(RATE)
    ),
    "error_feedback": lambda: optax.chain(
        DECAY, optax.sgd(RATE, momentum=0.9), fdg.error_feedback(5)
    ),
    "recipe": lambda: fdg.recipes.sgd(RATE, 5, weight_decay=5e-4),
}


@pytest.mark.parametrize("remedy", remedies.REMEDIES)
def test_sgd_with_every_remedy(remedy):
    found = of(Settings("-", method="fdg", num_stages=4, order="backward_first", remedy=remedy))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12),
        found,
        trained(SGD[remedy]()),
    )


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_the_last_stage_of_every_remedy_is_the_plain_optimizer(optimizer):
    plain = of(Settings("-", num_stages=4, optimizer=optimizer), stage=3)
    allowed = [r for r in remedies.REMEDIES if optimizer == "sgd" or r != "spike"]
    for remedy in allowed:
        config = Settings(
            "-",
            num_stages=4,
            optimizer=optimizer,
            remedy=remedy,
            momentum_stretch=2.0,
            rate_anneal_steps=50,
        )
        jax.tree.map(np.testing.assert_array_equal, of(config, stage=3), plain)


@pytest.mark.parametrize("remedy", ["none", "prediction", "spike", "error_feedback", "recipe"])
@pytest.mark.parametrize(
    "change",
    [{"prediction_horizon": 0.5}, {"momentum_stretch": 0.25}, {"rate_anneal_steps": 50}],
    ids=str,
)
def test_every_flag_changes_what_it_is_about(remedy, change):
    config = Settings("-", num_stages=4, order="backward_first", remedy=remedy)
    before, after = of(config), of(dataclasses.replace(config, **change))
    unused = remedy == "none" or ("prediction_horizon" in change and remedy == "spike")
    assert np.array_equal(before["bias"], after["bias"]) == unused


@pytest.mark.parametrize("remedy", ["none", "prediction", "error_feedback", "recipe"])
def test_the_true_weights_of_shrunk_muon_move_as_those_of_shrunk_updates(remedy):
    config = Settings(
        "-", num_stages=4, order="backward_first", optimizer="muon", remedy=remedy, beta=0.5
    )
    optimizer = optimizer_of(config, RATE, RULE, 0)
    params = {"kernel": jnp.eye(3), "bias": jnp.ones(3)}
    state = optimizer.init(params)
    for _ in range(5):
        updates, state = optimizer.update(params, state, params)
        params = optax.apply_updates(params, updates)
    true = fdg.true_params(params, state)
    # Five steps against the gradient, each an eighth of the rate and less.
    assert 0.85 < float(true["bias"][0]) < 1
    assert 0.85 < float(true["kernel"][0, 0]) < 1


def test_shrinking_comes_before_sgd_and_after_muon():
    common = {"num_stages": 4, "order": "backward_first", "remedy": "recipe"}
    for optimizer in ("sgd", "muon"):
        full = Settings("-", optimizer=optimizer, momentum=0.0, weight_decay=0.0, **common)
        half = dataclasses.replace(full, beta=0.5)
        start = trained(optax.identity(), 0)
        one, other = (
            trained(optimizer_of(config, RATE, RULE, 0), 1)["bias"] for config in (full, half)
        )
        np.testing.assert_allclose(other - start["bias"], (one - start["bias"]) * 0.5**3, rtol=1e-9)


def test_adam_beside_muon_has_a_rate_of_its_own():
    config = Settings("-", num_stages=1, method="backprop", optimizer="muon", weight_decay=0.0)
    slow = dataclasses.replace(config, adam_learning_rate=0.01)
    start, one, other = trained(optax.identity(), 0), of(config, 3), of(slow, 3)
    np.testing.assert_array_equal(one["kernel"], other["kernel"])
    assert (
        np.abs(one["bias"] - start["bias"]).max() > 3 * np.abs(other["bias"] - start["bias"]).max()
    )


def test_both_programs_have_the_same_flags():
    names = {field.name for field in dataclasses.fields(remedies.Remedies)} | {"optimizer"}
    for program, settings in ((cifar, cifar.Settings), (lm, lm.Settings)):
        assert names <= {field.name for field in dataclasses.fields(settings)}
        assert names <= set(program.HELP)
        assert "{" not in program.HELP["optimizer"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "adam"}, "--optimizer=adam: no such choice; allowed are sgd, muon"),
        ({"remedy": "all"}, "--remedy=all: no such choice with --optimizer=sgd; allowed are none"),
        ({"optimizer": "muon", "remedy": "spike"}, "--remedy=spike: no such choice with --optim"),
        ({"prediction_horizon": -0.5}, "--prediction_horizon=-0.5: must be finite, and 0 or more"),
        ({"momentum_stretch": -1.0}, "--momentum_stretch=-1: must be finite"),
        ({"adam_learning_rate": 0.0}, "--adam_learning_rate=0: must be finite and above 0"),
        ({"rate_anneal_steps": -1}, "--rate_anneal_steps=-1: must lie in 0"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        Settings("-", **change).check()
