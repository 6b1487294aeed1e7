"""The keywords with which a module or function is called in training and in evaluation.

__call__(self, x, mask=None, training=False)      train=True:   call(x, None, True)
                                                  train=False:  call(x, None, False)
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

# Names of flags, without underscores, in lower case.
TRAINING = frozenset({"train", "training", "istrain", "istraining", "trainmode", "trainingmode"})
EVALUATION = frozenset(
    {
        *("deterministic", "isdeterministic", "userunningaverage", "userunningstats"),
        *("inference", "isinference", "inferencemode", "eval", "iseval", "evalmode", "evaluate"),
        *("evaluation", "test", "istest", "testing", "istesting"),
    }
)
# Libraries whose callables have no training flags with other names.
_LIBRARIES = frozenset({"flax", "jax", "jaxlib", "numpy", "optax", "builtins", None})

Values = Mapping[str, Any]
Convention = Callable[[bool], tuple[tuple[Any, ...], dict[str, Any]]]


def mode_of(name: str, train: bool) -> bool | None:
    """The value of a flag with a common name; None: unknown name.

    Args:
      name: the name of a parameter or an attribute.
      train: whether the network is in training mode.

    Example:
      >>> mode_of("is_training", True), mode_of("deterministic", True), mode_of("mask", True)
      (True, False, None)
    """
    plain = name.replace("_", "").lower()
    if plain in TRAINING:
        return train
    return not train if plain in EVALUATION else None


def modes(train_kwargs: Values | None, eval_kwargs: Values | None) -> tuple[Values, Values]:
    """Keywords of training and of evaluation.

    Args:
      train_kwargs: keywords in training.
      eval_kwargs: keywords in evaluation; None: inverted booleans.

    Returns:
      Both, with the same names.

    Raises:
      ValueError: the value of a keyword in evaluation or in training is unknown.

    Example:
      >>> modes({"training": True}, None)[1]
      {'training': False}
    """
    for name, given in (("train_kwargs", train_kwargs), ("eval_kwargs", eval_kwargs)):
        if given is not None and not isinstance(given, Mapping):
            raise ValueError(
                f"{name}={given!r}: must be a mapping from keywords to values, such as "
                "{'training': True}"
            )
    trained = dict(train_kwargs or {})
    if eval_kwargs is None:
        unknown = [name for name, value in trained.items() if not isinstance(value, bool)]
        if unknown:
            raise ValueError(
                f"train_kwargs={trained}: {', '.join(unknown)} cannot be turned round for "
                "evaluation; give eval_kwargs as well"
            )
        return trained, {name: not value for name, value in trained.items()}
    if trained.keys() != dict(eval_kwargs).keys():
        raise ValueError(
            f"eval_kwargs={dict(eval_kwargs)}: must have the keywords of train_kwargs={trained}"
        )
    return trained, dict(eval_kwargs)


def convention(
    call: Callable[..., Any],
    name: str,
    train_kwargs: Values | None = None,
    eval_kwargs: Values | None = None,
    fixed: Collection[str] = (),
) -> Convention:
    """The arguments of a callable besides its input.

    Arguments are positional if possible: a transformation with ``static_argnums`` accepts no
    keywords.

    Args:
      call: a function of the input, or a bound method.
      name: its name, for messages.
      train_kwargs, eval_kwargs: see `modes`; they take precedence over the common names.
      fixed: parameters that are not set.

    Returns:
      ``convention(train) -> (args, kwargs)``.

    Raises:
      ValueError: a flag or a parameter without a default that is not set; a keyword that ``call``
        does not take.

    Example:
      >>> def block(x, mask=None, is_training: bool = False): ...
      >>> convention(block, "block")(True)
      ((None, True), {})
    """
    trained, evaluated = modes(train_kwargs, eval_kwargs)
    parameters = _parameters(call)
    first = [p for p in parameters[:1] if p.kind is not p.VAR_KEYWORD]
    rest = parameters[len(first) :]
    named = [p for p in rest if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    spread = any(p.kind is p.VAR_KEYWORD for p in rest)
    library = is_library(call)
    unknown = trained.keys() - {p.name for p in named}
    if unknown and parameters and not spread:
        raise ValueError(
            f"train_kwargs={trained}: {name} has no parameter {', '.join(sorted(unknown))}; it has "
            f"{', '.join(p.name for p in named) or 'none but its input'}"
        )
    if spread and train_kwargs is None and not library:
        raise ValueError(
            f"{name}: takes **kwargs, so its flags are unknown; give those of training, "
            "train_kwargs={'training': True}, or give train_kwargs={} if it has none"
        )
    known: list[inspect.Parameter] = []
    for p in named:
        if p.name in trained:
            known.append(p)
        elif p.name in fixed:
            continue
        elif _may_be_flag(p) and mode_of(p.name, True) is not None:
            known.append(p)
        elif not library:
            _refuse(p, name)
    steps: list[inspect.Parameter] = []
    by_name = {p.name for p in known}
    for p in named if known else []:  # by position, up to the last flag or a gap
        absent = p.default is p.empty and p not in known
        if not by_name or p.kind is p.KEYWORD_ONLY or p.name in fixed or absent:
            break
        steps.append(p)
        by_name.discard(p.name)
    by_name |= unknown

    def value(key: str, default: Any, train: bool) -> Any:
        given = trained if train else evaluated
        mode = mode_of(key, train) if key in {p.name for p in known} else None
        return given.get(key, default if mode is None else mode)

    def arguments(train: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args = tuple(value(p.name, p.default, train) for p in steps)
        return args, {key: value(key, None, train) for key in sorted(by_name)}

    return arguments


def check_sequence(layers: Iterable[Any], name: str, module: type[Any]) -> None:
    """Rejects a ``Sequential`` whose layers have flags, since it does not forward them.

    Args:
      layers: modules and functions.
      name: name of the ``Sequential``, for messages.
      module: the class of modules.

    Raises:
      ValueError: a layer has flags or parameters that are not set.
    """
    for i, layer in enumerate(layers):
        call: Any = layer.__call__ if isinstance(layer, module) else layer
        if is_library(call):
            continue
        # Layers after the first get several inputs from a tuple or a dict.
        inputs = {p.name for p in _parameters(call) if i and _is_input(p)}
        what = f"{name}.layers[{i}], {type(layer).__name__}"
        args, kwargs = convention(call, what, fixed=inputs)(True)
        if args or kwargs:
            raise ValueError(
                f"{name}: does not set the flags of its layers[{i}], {type(layer).__name__}; give "
                "a list of layers instead, each made of one module"
            )


def is_library(call: Callable[..., Any]) -> bool:
    """Whether a callable belongs to a library with known flags: flax, jax ..."""
    module = getattr(call, "__module__", None)
    return module is None or module.split(".")[0] in _LIBRARIES


def _parameters(call: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(call).parameters.values())
    except (TypeError, ValueError):  # some C callables have no signature
        return []


def _is_input(p: inspect.Parameter) -> bool:
    flag = mode_of(p.name, True) is not None or _says_bool(p)
    return p.default is p.empty and not flag


def _annotation(p: inspect.Parameter) -> str:
    kind = p.annotation
    return kind.__name__ if isinstance(kind, type) else re.sub(r"\btyping\.|\s|'", "", str(kind))


def _says_bool(p: inspect.Parameter) -> bool:
    return _annotation(p) in ("bool", "Optional[bool]", "bool|None", "None|bool")


def _may_be_flag(p: inspect.Parameter) -> bool:
    """Whether a parameter with a common name can be a flag."""
    plain = p.default is p.empty or p.default is None or isinstance(p.default, bool)
    return plain and (p.annotation is p.empty or _says_bool(p) or _annotation(p) == "Any")


def _refuse(p: inspect.Parameter, name: str) -> None:
    flag = isinstance(p.default, bool) or _says_bool(p)
    if p.default is not p.empty and not flag:
        return
    default = "without a default" if p.default is p.empty else f"{p.default} by default"
    remedy = (
        f"if it is a training flag, give train_kwargs={{{p.name!r}: True}}; if it is "
        f"constant, train_kwargs={{{p.name!r}: False}}, eval_kwargs={{{p.name!r}: False}}"
        if flag
        else f"give its values, train_kwargs={{{p.name!r}: ...}}, eval_kwargs={{{p.name!r}: ...}}, "
        "or wrap it in a function of its input only"
    )
    raise ValueError(f"{name}: its parameter {p.name!r} ({default}) is not set; {remedy}")
