"""partition: what a layer costs, and where the network is cut."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import fdg_jax as fdg
from fdg_jax.partition import layer_cost, optimal_cuts

KEY = jax.random.key(0)
X = jnp.ones((4, 3))


def dense(width=3):
    return fdg.Layer(
        lambda key, x: (jax.random.normal(key, (x.shape[-1], width)), ()),
        lambda p, s, x, *, train, key: (x @ p, s),
    )


def identity():
    return fdg.from_fn(lambda x: x)


def sums(costs, cuts):
    return [sum(costs[a:b]) for a, b in itertools.pairwise([0, *cuts, len(costs)])]


def value(costs, cuts):
    """Largest stage, then sum of squares: smaller is better."""
    stages = sums(costs, cuts)
    return max(stages), sum(stage**2 for stage in stages)


def best(costs, num_stages):
    """By trying every contiguous split."""
    splits = itertools.combinations(range(1, len(costs)), num_stages - 1)
    return min(value(costs, cuts) for cuts in splits)


def problems(elements, max_stages=9):
    return st.lists(elements, min_size=1, max_size=9).flatmap(
        lambda costs: st.tuples(st.just(costs), st.integers(1, min(len(costs), max_stages)))
    )


@given(problems(st.integers(0, 20)))
def test_no_other_split_has_a_faster_slowest_stage(problem):
    costs, num_stages = problem
    cuts = optimal_cuts(costs, num_stages)
    assert len(cuts) == num_stages - 1
    assert all(a < b for a, b in itertools.pairwise([0, *cuts, len(costs)]))
    assert value(costs, cuts)[0] == best(costs, num_stages)[0]


@given(problems(st.floats(0, 1e12)))
@example(([885944140727.0, 0.5, 885944140727.0, 0.5], 2))
def test_costs_need_not_be_whole_numbers(problem):
    costs, num_stages = problem
    cuts = optimal_cuts(costs, num_stages)
    # Prefix sums round by a few ulps of the total.
    limit = best(costs, num_stages)[0] + 1e-14 * sum(costs)
    assert value(costs, cuts)[0] <= limit


@given(problems(st.integers(0, 20)))
def test_ties_go_to_the_smallest_squares(problem):
    costs, num_stages = problem
    assert value(costs, optimal_cuts(costs, num_stages)) == best(costs, num_stages)


def test_ties_go_to_the_smallest_squares_with_four_stages():
    """1+5, 3, 2, 6 and 1, 5, 3+2, 6 both have 6 as their largest; 85 < 87."""
    assert optimal_cuts([1, 5, 3, 2, 6], 4) == [2, 3, 4]


@given(st.integers(1, 8), st.integers(1, 8), st.sampled_from([0.1, 1 / 3, 1.0, 123457.0]))
def test_equal_layers_are_dealt_evenly(per_stage, num_stages, cost):
    cuts = optimal_cuts([cost] * (per_stage * num_stages), num_stages)
    assert cuts == list(range(per_stage, per_stage * num_stages, per_stage))


def test_given_costs_are_reported():
    stages = fdg.partition([identity()] * 5, 3, X, cost=[1, 2, 3, 4, 5])
    assert isinstance(stages, list)
    assert [stage.size for stage in stages] == [3, 1, 1]
    assert stages.cuts == (3, 4)
    assert stages.layer_costs == (1, 2, 3, 4, 5)
    assert stages.costs == (6, 4, 5)
    assert stages.balance == pytest.approx(5 / 6)
    assert stages.unit == ""


@pytest.mark.parametrize(
    ("costs", "balance"), [([1, 1], 1.0), ([1, 0], 0.5), ([3, 1], 2 / 3), ([0, 0], 1.0)]
)
def test_balance_is_mean_over_largest(costs, balance):
    got = fdg.partition([identity()] * 2, 2, X, cost=costs).balance
    assert got == pytest.approx(balance)


def test_given_cuts_are_taken_as_they_are_and_reported_in_flops():
    layers = [dense(), dense(9), dense(3), identity()]
    stages = fdg.partition(layers, 3, X, cost=[1, 2])
    assert [stage.size for stage in stages] == [1, 1, 2]
    assert stages.cuts == (1, 2)
    assert stages.unit == "FLOPs"
    assert stages.layer_costs == fdg.partition(layers, 1, X, cost="flops").layer_costs
    small, large, other = stages.costs
    assert small < large
    assert stages.balance == pytest.approx((small + large + other) / 3 / max(large, other))


@pytest.mark.parametrize("cost", [(1.0, 2.0), np.array([1, 2]), [jnp.int32(1), jnp.int32(2)]])
def test_costs_and_cuts_may_be_any_sequence_of_numbers(cost):
    assert fdg.partition([identity()] * 3, 3, X, cost=cost).cuts == (1, 2)
    assert fdg.partition([identity()] * 2, 2, X, cost=cost).costs == (1, 2)


def test_flops_are_those_of_forward_and_backward():
    """x @ w, and its two transposed products: three times 2 * batch * rows * columns."""
    stages = fdg.partition([dense(32), dense(64)], 2, jnp.ones((16, 48)), cost="flops")
    assert stages.unit == "FLOPs"
    want = [6 * 16 * 48 * 32, 6 * 16 * 32 * 64]
    np.testing.assert_allclose(stages.layer_costs, want, rtol=0.1)
    assert stages.costs == stages.layer_costs


def test_flops_is_the_default_and_needs_shapes_only():
    layers = [dense(8), dense(3)]
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    assert fdg.partition(layers, 2, shape).layer_costs == fdg.partition(layers, 2, X).layer_costs
    assert fdg.partition(layers, 2, X).unit == "FLOPs"


def test_flops_grow_with_the_batch():
    small, large = (fdg.partition([dense()], 1, jnp.ones((n, 3))).costs[0] for n in (8, 64))
    assert large > 4 * small


def test_one_layer_at_two_shapes_has_two_costs():
    activation = fdg.from_fn(lambda x: x * x)
    stages = fdg.partition([activation, dense(12), activation], 1, X)
    small, _, large = stages.layer_costs
    assert large == pytest.approx(4 * small, rel=0.1)


@pytest.mark.parametrize("cost", ["flops", "time"])
def test_integer_inputs_have_a_cost_too(cost):
    """The first layer of a language model has no gradient with respect to its input."""
    embed = fdg.Layer(
        lambda key, x: (jnp.ones((5, 3)), ()), lambda p, s, x, *, train, key: (p[x], s)
    )
    stages = fdg.partition([embed, dense()], 2, jnp.zeros((4,), jnp.int32), cost=cost)
    assert all(value > 0 for value in stages.costs)


def test_equal_layers_cost_the_same():
    layers = [dense(), fdg.repeat(dense(), 3), dense(), fdg.repeat(dense(), 1)]
    stages = fdg.partition(layers, 3, X)
    assert len(set(stages.layer_costs)) == 1
    assert len(stages.layer_costs) == 6
    assert (stages.cuts, stages.balance) == ((2, 4), 1.0)


@pytest.mark.parametrize("name", ["identity", "reshape"])
def test_a_layer_without_arithmetic_costs_nothing(name):
    f = {"identity": lambda x: x, "reshape": lambda x: x.reshape(x.shape[0], -1)}[name]
    stages = fdg.partition([dense(), fdg.from_fn(f)], 2, X, cost="flops")
    assert stages.layer_costs[1] == 0


def test_time_is_measured_in_seconds():
    """A hundred products take longer than a copy, and equal layers of a repeat are timed once."""

    def slow(x):
        return jax.lax.fori_loop(0, 100, lambda i, y: jnp.tanh(y @ x), x)

    layers = [fdg.repeat(identity(), 3), fdg.from_fn(lambda x: jax.lax.stop_gradient(slow(x)))]
    stages = fdg.partition(layers, 2, jnp.ones((64, 64)), cost="time")
    *fast, last = stages.layer_costs
    assert stages.unit == "seconds"
    # The first has no gradient of its input to compute.
    assert len(set(fast[1:])) == 1
    assert 0 < sum(fast) < last < 10
    assert stages.cuts == (3,)
    assert stages.costs == pytest.approx((sum(fast), last))


class Clock:
    """Says what it is told; every reading is one sample's begin, end, or a look at the limit."""

    def __init__(self, seconds):
        self.now, self.seconds = 0.0, iter(seconds)

    def perf_counter(self):
        self.now += next(self.seconds)
        return self.now


def test_times_are_taken_in_turn_and_the_fastest_counts(monkeypatch):
    """Two layers, two rounds of (wait, run) per layer, and a look at the limit after each."""
    rounds = [0, 5, 0, 2, 0, 0, 3, 0, 4, 0]
    monkeypatch.setattr(layer_cost, "time", Clock([0, *rounds]))
    monkeypatch.setattr(layer_cost, "ROUNDS", 2)
    monkeypatch.setattr(layer_cost, "LIMIT_SECONDS", 1e9)
    assert layer_cost.layer_costs([dense(), dense()], X, "time") == [3, 2]


def test_slow_layers_are_measured_in_fewer_rounds(monkeypatch):
    monkeypatch.setattr(layer_cost, "time", Clock([0, 0, 6, 0, 0, 5, 0]))
    assert layer_cost.layer_costs([dense()], X, "time") == [5]


def test_the_first_layer_is_timed_without_the_gradient_of_its_input():
    @jax.custom_vjp
    def f(p, x):
        return p * x

    def backward(kept, cotangent):
        p, x = kept
        slow = jax.lax.fori_loop(0, 300, lambda i, y: jnp.tanh(y @ y), cotangent)
        return jnp.vdot(x, cotangent), p * slow

    f.defvjp(lambda p, x: (f(p, x), (p, x)), backward)
    layer = fdg.Layer(
        lambda key, x: (jnp.ones(()), ()), lambda p, s, x, *, train, key: (f(p, x), s)
    )
    first, second = layer_cost.layer_costs([layer, layer], jnp.ones((64, 64)), "time")
    assert 3 * first < second


def test_a_repeat_is_cut_in_its_middle():
    stages = fdg.partition([dense(3), fdg.repeat(dense(), 5)], 3, X, cost=[1] * 6)
    assert [stage.size for stage in stages] == [2, 2, 2]
    shapes = [jax.tree.map(jnp.shape, stage.init(KEY, X)[0]) for stage in stages]
    assert shapes == [((3, 3), (1, 3, 3)), ((2, 3, 3),), ((2, 3, 3),)]


def test_two_repeats_of_different_layers_stay_apart():
    stages = fdg.partition([fdg.repeat(dense(), 2), fdg.repeat(dense(), 2)], 1, X, cost=[])
    assert jax.tree.map(jnp.shape, stages[0].init(KEY, X)[0]) == ((2, 3, 3), (2, 3, 3))


def test_a_chain_in_the_list_is_not_cut():
    layers = [fdg.chain([dense(), dense()]), dense()]
    assert [stage.size for stage in fdg.partition(layers, 2, X)] == [2, 1]
    with pytest.raises(ValueError, match="num_stages=3: this network has 2 layers"):
        fdg.partition(layers, 3, X)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_params_of_the_stages_are_those_of_the_whole_chain(num_stages):
    layers = [dense(4), fdg.repeat(dense(4), 4), fdg.chain([dense(2), identity()]), dense(3)]

    def flat(tree):
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])

    parts, first, x = [], 0, X
    for stage in fdg.partition(layers, num_stages, X, cost=[1] * 7):
        params, state = stage.at(first).init(KEY, x)
        x, _ = stage.apply(params, state, x, train=False, key=None)
        first += stage.size
        parts.append(params)
    np.testing.assert_array_equal(flat(parts), flat(fdg.chain(layers).init(KEY, X)[0]))


@pytest.mark.parametrize("num_stages", [0, -1, 5])
@pytest.mark.parametrize("cost", ["flops", "time", [1, 1, 1, 1]])
def test_the_number_of_stages_must_fit(num_stages, cost):
    with pytest.raises(ValueError, match=rf"num_stages={num_stages}: .*4 layers.*in 1\.\.4"):
        fdg.partition([dense()] * 4, num_stages, X, cost=cost)


def test_layers_of_a_repeat_count_one_by_one():
    assert len(fdg.partition([fdg.repeat(dense(), 4)], 4, X)) == 4
    with pytest.raises(ValueError, match=r"in 1\.\.4"):
        fdg.partition([fdg.repeat(dense(), 4)], 5, X)


def test_no_layer_is_refused():
    with pytest.raises(ValueError, match=r"layers=\[\]"):
        fdg.partition([], 1, X)


@pytest.mark.parametrize(
    ("num_stages", "cost", "message"),
    [
        (2, "bytes", r"cost='bytes': allowed are \"flops\", \"time\", 4 costs, or 1 cuts"),
        (2, "", "cost='': allowed are"),
        (2, [1, 1, 1], "has length 3: give 4 costs .* or 1 cuts"),
        (2, [], "has length 0"),
        (2, [1, -1, 1, 1], "costs must be finite and >= 0"),
        (2, [1, float("nan"), 1, 1], "costs must be finite and >= 0"),
        (2, [1, float("inf"), 1, 1], "costs must be finite and >= 0"),
        (3, [2, 1], "rise from 1 to 3"),
        (3, [2, 2], "rise from 1 to 3"),
        (2, [0], "rise from 1 to 3"),
        (2, [4], "rise from 1 to 3"),
        (2, [-1], "rise from 1 to 3"),
        (2, [1.5], "rise from 1 to 3"),
        (2, [float("nan")], "rise from 1 to 3"),
        (2, [float("inf")], "rise from 1 to 3"),
    ],
)
def test_a_wrong_cost_is_named_with_the_remedy(num_stages, cost, message):
    with pytest.raises(ValueError, match=message):
        fdg.partition([dense()] * 4, num_stages, X, cost=cost)


def test_a_number_of_stages_that_is_none_is_refused():
    with pytest.raises(
        ValueError, match=r"num_stages: is a ndarray; give a whole number in 1\.\.2"
    ):
        fdg.partition([fdg.from_fn(np.tanh)] * 2, np.ones((8, 4)), 2)
