"""Optimizers see a stage as a part of the whole network, wherever it is cut."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fdg_jax as fdg
from fdg_jax.partition.network import InStack, Place, units
from tests import networks

DATA = networks.batches(10)


def layers() -> list[fdg.Layer]:
    """Six layers, three of them in nested chains, two in a repeat."""
    inner = fdg.chain([networks.dense(networks.WIDTH), networks.batch_norm()])
    nested = fdg.chain([networks.dense(networks.WIDTH), inner])
    return [
        nested,
        fdg.repeat(networks.dense(networks.WIDTH), 2),
        networks.dense(networks.CLASSES, lambda x: x),
    ]


def pipeline(num_stages: int, optimizer, network=None) -> fdg.Pipeline:
    network = layers() if network is None else network
    # A stage that is no chain has its place as well.
    stages = network if num_stages == len(network) else None
    if stages is None:
        costs = [1] * sum(getattr(layer, "times", 1) for layer in network)
        stages = fdg.partition(network, num_stages, DATA[0][0], cost=costs)
    return fdg.Pipeline(stages, networks.loss_fn, optimizer, fdg.schedule.backprop(num_stages))


def by_layer(pipe: fdg.Pipeline, state: fdg.PipelineState) -> list:
    from fdg_jax.partition.layerwise import separate

    params = tuple(jax.device_get(own) for own in pipe.params(state))
    return separate(fdg.chain([stage.layer for stage in pipe.stages]), params)


@pytest.mark.parametrize("num_stages", [2, 3])
def test_one_definition_trains_the_same_for_every_k(num_stages):
    names = ("kernel", "bias", "scale")
    labels = fdg.per_layer(lambda n, name: f"{3 if n == 4 else n} {name}")
    rates = {f"{n} {name}": 0.1 / (n + 1 + len(name)) for n in range(6) for name in names}
    rates["1 bias"] = 0.0
    optimizer = optax.partition({k: optax.sgd(rate, 0.9) for k, rate in rates.items()}, labels)
    ends = []
    for k in (1, num_stages):
        pipe = pipeline(k, optimizer)
        ends.append(by_layer(pipe, networks.run(pipe, DATA)[0]))
    assert networks.difference(*ends) <= 1e-12
    assert not np.any(ends[0][1]["bias"])
    assert np.any(ends[0][0]["bias"])


def test_paths_begin_with_the_layers_number():
    seen: dict[int, set] = {}

    def optimizer(k):
        def labels(params):
            paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
            seen.setdefault(k, set()).update((path[0].idx, path[1].key) for path in paths)
            return jax.tree.map(lambda leaf: "all", params)

        return optax.partition({"all": optax.sgd(0.1)}, labels)

    pipe = pipeline(3, optimizer)
    pipe.init(jax.random.key(0), *DATA[0])
    dense = ("kernel", "bias")
    assert seen == {
        0: {*((n, name) for n in (0, 1) for name in dense), (2, "bias"), (2, "scale")},
        1: {(3, name) for name in dense},
        2: {(5, name) for name in dense},
    }


def test_ranges_numbers_names_and_the_default():
    network = ({"w": 0, "b": 0}, {"w": 0, "b": 0}, {"w": 0, "b": 0})
    labels = fdg.per_layer({"b": "bias", range(1, 9): "late", 0: "first"})
    assert labels(network) == ({"w": "first", "b": "bias"}, *({"w": "late", "b": "bias"},) * 2)
    assert labels((None, {"w": 0}, None)) == (None, {"w": "late"}, None)


def test_layers_of_a_stack_have_one_label():
    optimizer = optax.partition(
        {"a": optax.sgd(0.1), "b": optax.sgd(0.2)}, fdg.per_layer({4: "b"}, "a")
    )
    with pytest.raises(ValueError, match="layers 3 to 4 is one array of a repeat"):
        pipeline(1, optimizer).init(jax.random.key(0), *DATA[0])
    with pytest.raises(ValueError, match="a tuple"):
        fdg.per_layer({})({"w": 0})


def test_the_optimizer_may_be_made_from_the_numbers_of_the_layers():
    asked = {}

    def optimizer(k, numbers):
        asked[k] = numbers
        return optax.sgd(0.1)

    pipeline(3, optimizer)
    assert asked == {0: range(3), 1: range(3, 5), 2: range(5, 6)}
    asked = {}
    pipeline(2, lambda k, rate=0.1: optax.sgd(rate))


def test_places_are_taken_and_given_back():
    headed = fdg.with_head(fdg.chain(layers()), networks.dense(2))
    params, _ = headed.init(jax.random.key(0), jnp.zeros((8, 4)))
    place = Place(headed, 2, 9, headed=True)
    whole = place.whole(params)
    assert len(whole) == 10
    assert whole[:2] == (None, None)
    assert whole[6] == InStack()
    assert whole[8] is None
    assert whole[9] is params[1]
    again = place.own(whole)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert [number for number, _ in units(headed, 2)] == [2, 3, 4, 5, 7]


def test_params_that_are_no_tuple_are_refused():
    with pytest.raises(ValueError, match="params: are a list; per_layer needs a tuple"):
        fdg.per_layer({0: "frozen"})([{"w": 0.0}])


def test_a_rule_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="rule: is a list; give a dictionary"):
        fdg.per_layer([0, 1])


@pytest.mark.parametrize("key", [6, -1, range(7, 9), range(0)])
@pytest.mark.parametrize("num_stages", [1, 2])
def test_a_number_that_fits_no_layer_is_refused(key, num_stages):
    labels = fdg.per_layer({range(9): "a", key: "a"})
    optimizer = optax.partition({"a": optax.sgd(0.1), "default": optax.sgd(0.1)}, labels)
    pipe = pipeline(num_stages, optimizer)
    with pytest.raises(ValueError, match=r"fits no layer; the network has layers 0 to 5"):
        networks.run(pipe, DATA[:1])
