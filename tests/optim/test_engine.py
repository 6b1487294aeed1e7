"""Every remedy on the pipeline against the oracle, in float64."""

import itertools

import jax
import optax
import pytest

import fdg_jax as fdg
from fdg_jax import optim
from tests import networks

SCHEDULES = {
    "fdg": fdg.schedule.fdg,
    "fdg backward first": lambda k: fdg.schedule.fdg(k, "backward_first"),
    "ddg": fdg.schedule.ddg,
    "pipedream": fdg.schedule.pipedream,
    "pipedream_2bw": fdg.schedule.pipedream_2bw,
    "adl": lambda k: fdg.schedule.adl(k, accumulate=2),
    "adl sum": lambda k: fdg.schedule.adl(k, accumulate=3, reduction="sum"),
}


def rate(count):
    return 0.05 / (1 + 0.05 * count)


def remedies(late: float) -> dict[str, optax.GradientTransformation]:
    """All of them, for a stage with this staleness; those of matrices first."""
    sgd = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(rate, momentum=0.9))
    adamw = optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.1)
    ahead = optim.adam_displacement(rate, b1=0.9, b2=0.95, weight_decay=0.1)
    rotated = fdg.scale_by_basis_rotation(eps=1e-3, every=4)
    return {
        "muon": fdg.recipes.muon(rate, late),
        "rotation": optax.chain(rotated, optax.scale(-0.02)),
        "delayed_sgd": fdg.delayed_sgd(rate, 0.9, late, weight_decay=5e-4),
        "last update": fdg.predict_weights(sgd, late, "last_update", horizon=0.5),
        "momentum": fdg.predict_weights(sgd, late, "momentum"),
        "adamw": fdg.predict_weights(adamw, late, "last_update"),
        "adam displacement": fdg.predict_weights(adamw, late, ahead),
        "spike": optax.chain(fdg.scale_by_spike_compensation(0.9, late), optax.scale(-0.02)),
        "error feedback": optax.chain(adamw, fdg.error_feedback(late)),
        "rate": optax.sgd(fdg.staleness_rate(0.05, late, 20), momentum=0.9),
    }


MATRICES = ("muon", "rotation", "delayed_sgd")


class Labels:
    """Gives every array of the network another remedy, matrices those of matrices.

    Args:
      stages: of the network; their arrays are counted through.
    """

    def __init__(self, stages, example) -> None:
        names = list(remedies(1.0))
        turns = itertools.cycle(MATRICES), itertools.cycle(names[len(MATRICES) :])
        params, _ = jax.eval_shape(fdg.chain(list(stages)).init, jax.random.key(0), example)
        self.of_stage = [
            jax.tree_util.tree_map_with_path(
                lambda path, leaf: next(turns["kernel" not in jax.tree_util.keystr(path)]), own
            )
            for own in params
        ]
        assert set(jax.tree.leaves(self.of_stage)) == set(names)


def optimizer(schedule: fdg.schedule.Schedule, labels: Labels):
    """Of each stage: every array has the remedy of its label."""

    def of_stage(k: int) -> optax.GradientTransformation:
        # One update more than there is: no remedy rests, not even in the last stage.
        parts = remedies(schedule.mean_staleness(k) + 1)
        names = jax.tree.leaves(labels.of_stage[k])
        whole = optax.partition(
            parts, lambda tree: jax.tree.unflatten(jax.tree.structure(tree), names)
        )
        # One program for the oracle as well, which dispatches operation by operation.
        return optax.GradientTransformation(whole.init, jax.jit(whole.update))

    return of_stage


# A few minutes in all; every schedule, every K and every gradient are among the fast ones.
CASES = [
    pytest.param(name, k, gradient, marks=[pytest.mark.slow] if slow else [])
    for i, name in enumerate(SCHEDULES)
    for j, k in enumerate((2, 3, 4))
    for n, gradient in enumerate(("stale", "recompute_stale", "recompute"))
    for slow in [(i + j + n) % 7 != 0]
]


@pytest.mark.parametrize(("name", "num_stages", "gradient"), CASES)
def test_remedies_equal_the_oracle(name, num_stages, gradient):
    data = networks.batches(20)
    stages = fdg.partition(networks.network(), num_stages, data[0][0], cost=[1] * 7)
    schedule = SCHEDULES[name](num_stages)
    chosen = optimizer(schedule, Labels(stages, data[0][0]))
    pipe, state = networks.assert_equals_oracle(stages, chosen, schedule, data, gradient=gradient)
    moved = networks.difference(pipe.params(state), pipe.true_params(state))
    assert 1e-4 < moved < 1
