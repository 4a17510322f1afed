"""What a hyper-parameter may be, said once in its type and checked wherever it is given.

`lr: Positive` is an ordinary annotation for a type checker, the allowed range for a reader, and a check at run time:
the configuration reads it before anything starts, `check_fields` applies it when a dataclass is built from Python and
`checked` when a function is called.
"""

import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Hashable, Iterator
from numbers import Real
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, cast, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Interval, Le, Lt

Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Probability = Annotated[float, Interval(ge=0, le=1)]
Share = Annotated[float, Interval(gt=0, le=1)]
Decay = Annotated[float, Interval(ge=0, lt=1)]
Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]

P = ParamSpec("P")
R = TypeVar("R")

_SIGNS: dict[type, tuple[str, str, Callable[[Any, Any], bool]]] = {
    Gt: (">", "gt", operator.gt),
    Ge: (">=", "ge", operator.ge),
    Lt: ("<", "lt", operator.lt),
    Le: ("<=", "le", operator.le),
}


def limits(hint: Any) -> Iterator[Any]:
    """The limits (Gt, Ge, Lt, Le) in a type hint, those inside a union included."""
    if get_origin(hint) is Annotated:
        for extra in hint.__metadata__:
            yield from (extra if isinstance(extra, Interval) else (extra,))
    else:
        for part in get_args(hint):
            yield from limits(part)


def _literals(hint: Any) -> list[Any]:
    """The Literal types in a hint, itself or the members of a union."""
    return [part for part in (hint, *get_args(hint)) if get_origin(part) is Literal]


def check(name: str, value: Any, hint: Any) -> None:
    """Raises ValueError when `value`, or an element of it, lies outside the range that its type `hint` states."""
    if isinstance(value, list | tuple):
        for position, element in enumerate(value):
            check(f"{name}[{position}]", element, hint)
    options = [option for literal in _literals(hint) for option in get_args(literal)]
    if options and isinstance(value, str) and value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")
    if isinstance(value, bool) or not isinstance(value, Real):  # numpy's numbers are Real
        return
    wanted = [(_SIGNS[type(limit)], limit) for limit in limits(hint) if type(limit) in _SIGNS]
    if not all(holds(value, getattr(limit, field)) for (_, field, holds), limit in wanted):
        allowed = " and ".join(f"{sign} {getattr(limit, field)}" for (sign, field, _), limit in wanted)
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


@functools.cache
def _hints(owner: Any) -> dict[str, Any]:
    return get_type_hints(owner, include_extras=True)


def check_fields(instance: Any) -> None:
    """Raises ValueError when a field of a dataclass instance is out of the range that its annotation states."""
    hints = _hints(cast(Hashable, type(instance)))
    for field in dataclasses.fields(instance):
        value, hint = getattr(instance, field.name), hints[field.name]
        if value is None and any(limits(hint)) and type(None) not in get_args(hint):
            raise ValueError(f"{field.name} must be given, got None")
        check(field.name, value, hint)


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, raising ValueError for arguments out of the ranges that its annotations state."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        hints = _hints(function)
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            check(name, value, hints.get(name))
        return function(*args, **kwargs)

    return call
