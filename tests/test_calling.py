"""What modules and functions are called with: flags, random numbers, what training alone makes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import fdg_jax as fdg

KEY = jax.random.key(1)
X = jax.random.normal(jax.random.key(3), (8, 3), jnp.float32) + 1

FLAGS = {
    "training": True,
    "is_training": True,
    "isTraining": True,
    "deterministic": False,
    "inference": False,
    "eval": False,
    "testing": False,
}


def called(parameter: str, on: str):
    """``call(self, x, <parameter>)`` that multiplies by 2 in training."""
    scope: dict = {"__name__": __name__}
    exec(f"def call(self, x, {parameter}):\n    return x * (2 if {on} else 1)", scope)
    return scope["call"]


def linen_layer(parameter, on, **options):
    kind = type("Block", (linen.Module,), {"__call__": called(parameter, on)})
    return fdg.from_linen(kind(), **options)


def nnx_layer(parameter, on, **options):
    body = {"__init__": lambda self, rngs: None, "__call__": called(parameter, on)}
    kind = type("Block", (nnx.Module,), body)
    return fdg.from_nnx(kind, **options)


def function_layer(parameter, on, **options):
    return fdg.from_fn(functools.partial(called(parameter, on), None), **options)


each = pytest.mark.parametrize("make", [linen_layer, nnx_layer, function_layer])


def scales(layer):
    """What it multiplies by, in training and in evaluation."""
    params, state = layer.init(KEY, X)
    modes = {True: KEY, False: None}
    return [
        float((layer.apply(params, state, X, train=t, key=key)[0] / X).mean())
        for t, key in modes.items()
    ]


@each
@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize(
    "form", ["{}", "*, {}", "{}=False", "{}: bool = True", "{}: bool | None = None"]
)
def test_flags_with_common_names_are_set(make, name, form):
    on = name if FLAGS[name] else f"not {name}"
    assert scales(make(form.format(name), on)) == [2, 1]


@each
@pytest.mark.parametrize("form", ["{}=False", "{}: bool", "{}: bool = True", "*, {}=True"])
def test_a_boolean_that_nobody_sets_is_refused_and_then_named(make, form):
    parameter = form.format("stochastic")
    with pytest.raises(ValueError, match=r"'stochastic' .*train_kwargs=\{'stochastic': True\}"):
        scales(make(parameter, "stochastic"))
    assert scales(make(parameter, "stochastic", train_kwargs={"stochastic": True})) == [2, 1]
    always = {"train_kwargs": {"stochastic": True}, "eval_kwargs": {"stochastic": True}}
    assert scales(make(parameter, "stochastic", **always)) == [2, 2]


@each
def test_other_values_are_given_for_both(make):
    arguments = ("mode='eval'", "mode == 'train'")
    assert scales(make(*arguments)) == [1, 1]  # no boolean: left alone
    with pytest.raises(ValueError, match="give eval_kwargs as well"):
        scales(make(*arguments, train_kwargs={"mode": "train"}))
    both = {"train_kwargs": {"mode": "train"}, "eval_kwargs": {"mode": "eval"}}
    assert scales(make(*arguments, **both)) == [2, 1]


@each
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_kwargs": {"train": True}}, "has no parameter train; it has flag"),
        ({"train_kwargs": True}, "train_kwargs=True: must be a mapping"),
        ({"train_kwargs": {"flag": True}, "eval_kwargs": {}}, "must have the keywords"),
    ],
)
def test_keywords_that_do_not_fit(make, options, message):
    with pytest.raises(ValueError, match=message):
        scales(make("flag=False", "flag", **options))


@each
def test_a_parameter_without_a_default_and_hidden_flags_are_refused(make):
    with pytest.raises(ValueError, match=r"'mask' \(without a default\)"):
        scales(make("mask", "mask"))
    with pytest.raises(ValueError, match=r"takes \*\*kwargs"):
        scales(make("**flags", "flags.get('train')"))
    assert scales(make("**flags", "flags.get('t')", train_kwargs={"t": True})) == [2, 1]
    assert scales(make("**flags", "flags.get('t')", train_kwargs={})) == [1, 1]


def test_what_stands_before_a_flag_keeps_its_default():
    assert scales(linen_layer("gain=None, train: bool = False", "train and gain is None")) == [2, 1]


@pytest.mark.parametrize("f", [jnp.tanh, jax.nn.gelu, jax.jit(jnp.abs), jax.nn.softmax, abs])
def test_functions_of_libraries_keep_their_defaults(f):
    layer = fdg.from_fn(f)
    y, _ = layer.apply((), (), X, train=True, key=None)
    np.testing.assert_array_equal(y, f(X))


def test_what_a_partial_function_fixes_stays():
    f = functools.partial(called("training=False", "training"), None, training=False)
    assert scales(fdg.from_fn(f)) == [1, 1]


@pytest.mark.parametrize("wrap", [linen.remat, linen.jit])
def test_flags_that_are_static_by_position(wrap):
    class Block(linen.Module):
        @linen.compact
        def __call__(self, x, mask=None, train: bool = False):
            x = linen.Dense(16)(x)
            return linen.Dropout(0.5, deterministic=not train)(x)

    layer = fdg.from_linen(wrap(Block, static_argnums=(3,))())
    params, state = layer.init(KEY, X)
    y, _ = layer.apply(params, state, X, train=True, key=KEY)
    assert 0.2 < (y == 0).mean() < 0.8
    y, _ = layer.apply(params, state, X, train=False, key=None)
    assert (y != 0).all()


def test_a_field_that_would_stay_is_refused_or_set():
    class Block(linen.Module):
        train: bool = False

        @linen.compact
        def __call__(self, x):
            return x * (2 if self.train else 1)

    with pytest.raises(ValueError, match="its field train=False would be the same"):
        fdg.from_linen(Block())
    assert scales(fdg.from_linen(Block(), train_kwargs={"train": True})) == [2, 1]


def test_boolean_attributes_of_nnx_are_set():
    class Inner(nnx.Module):
        def __init__(self, rngs):
            self.is_training = False

        def __call__(self, x):
            return x * (2 if self.is_training else 1)

    class Outer(nnx.Module):
        def __init__(self, rngs):
            self.inner = Inner(rngs)

        def __call__(self, x):
            return self.inner(x)

    assert scales(fdg.from_nnx(Outer)) == [2, 1]


class Flagged(linen.Module):
    @linen.compact
    def __call__(self, x, training=False):
        return linen.Dropout(0.5, deterministic=not training)(x)


class FlaggedNnx(nnx.Module):
    def __call__(self, x, training=False):
        return x


def test_a_sequence_that_hands_no_flags_on_is_refused():
    with pytest.raises(ValueError, match=r"flags of its layers\[1\], Flagged; give a list"):
        fdg.from_linen(linen.Sequential([linen.Dense(3), Flagged()]))
    layer = fdg.from_nnx(lambda rngs: nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), FlaggedNnx()))
    with pytest.raises(ValueError, match=r"flags of its layers\[1\], FlaggedNnx; give a list"):
        layer.init(KEY, X)
    assert scales(fdg.from_linen(linen.Sequential([lambda x: 2 * x]))) == [2, 2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fdg.from_nnx(nnx.Linear(3, 2, rngs=nnx.Rngs(0))), "Linear is no function"),
        (lambda: fdg.from_nnx(linen.Dense(2)), "Dense is no function"),
        (lambda: fdg.from_nnx(lambda rngs: linen.Dense(2)).init(KEY, X), "makes Dense, which"),
        (lambda: fdg.from_linen(linen.Dense), "Dense is no instance of a linen module"),
        (
            lambda: fdg.from_linen(nnx.Linear(3, 2, rngs=nnx.Rngs(0))),
            "Linear is no instance of a linen module",
        ),
        (lambda: fdg.from_fn(linen.Dense(2)), "Dense is no function"),
        (lambda: fdg.from_fn(nnx.Linear(3, 2, rngs=nnx.Rngs(0))), "Linear is no function"),
    ],
)
def test_what_is_given_to_the_wrong_adapter(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("train_only", [False, True])
@pytest.mark.parametrize("collection", ["losses", "intermediates"])
def test_the_state_has_what_the_last_call_has_sown(times, train_only, collection):
    class Sows(linen.Module):
        @linen.compact
        def __call__(self, x, train=False):
            seen = self.variable("seen", "calls", lambda: jnp.zeros(()))
            if train and not self.is_initializing():
                seen.value += 1
            for _ in range(times if train or not train_only else 0):
                self.sow(collection, "mean", x.mean())
            return x

    layer = fdg.from_linen(Sows())
    params, state = layer.init(KEY, X)
    structure = jax.tree.structure(state)
    for i in range(3):
        _, state = layer.apply(params, state, i * X, train=True, key=KEY)
        assert jax.tree.structure(state) == structure
        assert state["seen"]["calls"] == i + 1
        if collection == "losses":
            np.testing.assert_allclose(state["losses"]["mean"], [i * X.mean()] * times)
        else:
            assert "intermediates" not in state


def test_a_variable_that_is_a_tuple_is_kept():
    class Pair(linen.Module):
        @linen.compact
        def __call__(self, x):
            pair = self.variable("pair", "both", lambda: (jnp.zeros(()), jnp.zeros(())))
            if not self.is_initializing() and self.is_mutable_collection("pair"):
                pair.value = (pair.value[0] + 1, pair.value[1] + 2)
            return x

    layer = fdg.from_linen(Pair())
    params, state = layer.init(KEY, X)
    for _ in range(3):
        _, state = layer.apply(params, state, X, train=True, key=KEY)
    assert state["pair"]["both"] == (3, 6)


def test_variables_that_are_made_in_apply_alone_are_refused():
    class Late(linen.Module):
        @linen.compact
        def __call__(self, x):
            if not self.is_initializing():
                self.variable("cache", "last", lambda: x)
            return x

    with pytest.raises(ValueError, match="Late: makes the variable cache/last in apply"):
        fdg.from_linen(Late()).init(KEY, X)


def test_weights_that_training_alone_makes():
    class Teacher(linen.Module):
        @linen.compact
        def __call__(self, x, train=False):
            y = linen.Dense(3, name="main")(x)
            return y + linen.Dense(3, name="extra")(x) if train else y

    layer = fdg.from_linen(Teacher())
    params, state = layer.init(KEY, X)
    assert sorted(params) == ["extra", "main"]
    assert jax.tree.map(jnp.shape, params["main"]) == {"bias": (3,), "kernel": (3, 3)}
    both = [layer.apply(params, state, X, train=t, key=KEY)[0] for t in (True, False)]
    np.testing.assert_allclose(both[0] - both[1], X @ params["extra"]["kernel"], rtol=1e-4)


def test_random_numbers_in_evaluation_are_always_the_same():
    class Noise(linen.Module):
        @linen.compact
        def __call__(self, x):
            return x + jax.random.normal(self.make_rng("noise"), x.shape)

    class NoiseNnx(nnx.Module):
        def __init__(self, rngs):
            self.rngs = rngs.fork()

        def __call__(self, x):
            return x + jax.random.normal(self.rngs.noise(), x.shape)

    for layer in (fdg.from_linen(Noise()), fdg.from_nnx(NoiseNnx)):
        params, state = layer.init(KEY, X)
        a, b = (layer.apply(params, state, X, train=False, key=None)[0] for _ in range(2))
        np.testing.assert_array_equal(a, b)
        c, d = (layer.apply(params, state, X, train=True, key=jax.random.key(i))[0] for i in (1, 2))
        assert (c != d).all()
        with pytest.raises(ValueError, match="key=None"):
            layer.apply(params, state, X, train=True, key=None)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_what_an_nnx_call_makes():
    class Loss(nnx.Variable):
        pass

    class Sows(nnx.Module):
        def __init__(self, rngs):
            self.count = nnx.BatchStat(jnp.zeros(()))

        def __call__(self, x):
            self.count[...] += 1
            self.sow(Loss, "mean", x.mean())
            return x

    class Weights(nnx.Module):
        def __call__(self, x):
            self.w = nnx.Param(jnp.ones(3))
            return x * self.w[...]

    class Cache(nnx.Module):
        def __call__(self, x):
            self.last = nnx.Cache(x)
            return x

    layer = fdg.from_nnx(Sows)
    params, state = layer.init(KEY, X)
    for _ in range(3):
        _, state = layer.apply(params, state, X, train=True, key=KEY)
    assert state == {"count": 3}
    for kind, message in ((Weights, "makes weights in its call"), (Cache, "variable last in its")):
        layer = fdg.from_nnx(lambda rngs, kind=kind: kind())
        with pytest.raises(ValueError, match=message):
            layer.apply(*layer.init(KEY, X), X, train=True, key=KEY)
