"""Recipes: a table with `use`, checked against the callable's signature and types, called later."""

import dataclasses
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import date, time
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints, is_typeddict

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic_core import SchemaError

from fedsim.config.plugins import ConfigError, canonical, closest, find, shown
from fedsim.randomness import seeding
from fedsim.ranges import limits

# Filled in: how many values of which column have a name.
COUNTED = {"num_classes": "y", "num_groups": "a", "num_items": "item", "num_targets": "target"}
# All that is filled in where this column's values have names.
NAMED = COUNTED | {"popularity": "item", "gone_with": "target"}
_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
_WORDS: dict[Any, str] = {
    type(None): "nothing",
    bool: "true or false",
    dict: "a table",
    Mapping: "a table",
    Any: "anything",
}


class Recipe(NamedTuple):
    """A callable and its arguments, checked but not called yet."""

    where: str
    use: str
    function: Callable[..., Any]
    arguments: dict[str, Any]  # values, and recipes for nested tables
    given: tuple[str, ...]  # arguments that the experiment fills in, as far as the data tell them
    needed: tuple[str, ...]  # those of them that must be filled in
    table: dict[str, Any]  # the same as a table: no short names, and defaults written out as far as TOML can say them

    def make(self, context: Mapping[str, Any]) -> Any:
        """What the callable returns; what it draws from the global generators depends on the seed alone."""
        arguments = {
            name: value.make(context) if isinstance(value, Recipe) else value for name, value in self.arguments.items()
        }
        filled = {name: context[name] for name in self.given if name in context}
        if lacking := [name for name in self.needed if name not in context]:
            data, column = context["federation"].name, NAMED[lacking[0]]
            raise ConfigError(
                f"{self.where}: {self.use} needs {lacking[0]}, and {data} has no column {column} with names of its "
                f"values: choose other data, or set {self.where}.{lacking[0]}"
            )
        try:
            with seeding(context.get("seed", 0), self.where):
                return self.function(**filled, **arguments)
        except ConfigError:
            raise
        except ConnectionError as error:  # nothing is wrong with the experiment
            raise ConnectionError(f"{self.where}: {self.use}: {error}") from error
        except Exception as error:  # the callable may be anybody's
            plain = isinstance(error, ValueError | OSError) and str(error)
            told = str(error) if plain else f"{type(error).__name__}: {error}"
            told = told.removeprefix(f"{self.use.rpartition(':')[2]}: ")  # some say their name themselves
            raise ConfigError(f"{self.where}: {self.use}: {told}") from error


def recipe(table: Any, where: str, group: str, fills: Sequence[str], base: Path | None = None) -> Recipe:
    """Reads a table with `use`; raises ConfigError for a callable, a key or a value that is not right."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where} = {shown(table)}: must be a table with `use`")
    if "use" not in table:
        has = f"it has {', '.join(map(str, table))}" if table else "it is empty"
        raise ConfigError(f"{where}.use is missing: it names the callable that this table is for; {has}")
    use = table["use"]
    function = find(use, group, f"{where}.use", base)
    parameters, hints, anything = _parameters(function, f"{where}.use = {shown(use)}")
    arguments: dict[str, Any] = {}
    written: dict[str, Any] = {"use": canonical(use, group, base)}
    for key, value in table.items():
        if key == "use":
            continue
        if key not in parameters and not anything:
            takes = ", ".join(name for name in parameters if name not in fills) or "no arguments"
            near = closest(key, parameters) if closest(key, parameters).endswith("?") else ""
            raise ConfigError(f"{where}.{key} = {shown(value)}: {use} takes {takes}; unknown key {key}{near}")
        if isinstance(value, Mapping) and "use" in value:
            inner = arguments[key] = recipe(value, f"{where}.{key}", group, fills, base)
            written[key] = inner.table
        else:
            found = arguments[key] = _value(value, hints.get(key, Any), f"{where}.{key}", base)
            written[key] = str(found) if isinstance(found, Path) else value
    given = tuple(name for name in fills if name in parameters and name not in arguments)
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in arguments and name not in given:
            raise ConfigError(f"{where}.{name} is missing: {use} needs it ({describe(hints.get(name, Any))})")
        if name not in arguments and name not in given and _sayable(parameter.default, hints.get(name, Any)):
            written[name] = _plain(parameter.default)
    needed = tuple(name for name in given if parameters[name].default is inspect.Parameter.empty)
    return Recipe(where, str(use), function, arguments, given, needed, written)


def _plain(value: Any) -> Any:
    return list(map(_plain, value)) if isinstance(value, list | tuple) else value


def _sayable(default: Any, hint: Any) -> bool:
    """Whether a default is the same after it was written into an experiment and read again."""
    if unfit(default) or (isinstance(default, Mapping) and "use" in default):
        return False
    try:
        return bool(_value(_plain(default), hint, "", None) == default)
    except ConfigError:
        return False


def _parameters(function: Callable[..., Any], here: str) -> tuple[dict[str, inspect.Parameter], dict[str, Any], bool]:
    """What can be given by name, the types of these, and whether any other name is taken too."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some of those written in C
        raise ConfigError(f"{here}: its arguments cannot be told; wrap it in a function of yours") from None
    parameters = {parameter.name: parameter for parameter in found if parameter.kind in named}
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in found)
    target: Any = inspect.unwrap(function)
    if inspect.isclass(function) and not dataclasses.is_dataclass(function):
        target = function.__init__
    try:
        hints = get_type_hints(target, include_extras=True)
    except Exception:  # annotations that exist only for type checkers, or none at all: not checked here
        hints = {}
    return parameters, hints, anything


def _value(value: Any, hint: Any, where: str, base: Path | None) -> Any:
    """The value as the type hint wants it, strictly: no string becomes a number.

    A path is made absolute: it is relative to `base`, the experiment's folder, if it exists there, and else to the
    current one.
    """
    here = f"{where} = {shown(value)}"
    if reason := unfit(value):
        raise ConfigError(f"{here}: must be {describe(hint)}, but {reason}")
    if isinstance(value, str) and (hint is Path or Path in get_args(hint)):
        places = [folder / value for folder in (base, Path.cwd()) if folder is not None]
        return next((place for place in places if place.exists()), places[-1]).resolve()
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True, strict=True))
        return adapter.validate_json(json.dumps(value))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        if problem["type"] == "needs_python_object":
            raise ConfigError(f"{here}: must be {_maker(hint)}") from None
        inner = [part for part in problem["loc"] if isinstance(part, int)]
        detail = f" (at place {inner[0]} is {shown(problem['input'])})" if inner else ""
        raise ConfigError(f"{here}: must be {describe(hint)}{detail}") from None
    except (PydanticUserError, SchemaError):  # a type that no value in an experiment has
        if isinstance(hint, type) and not is_typeddict(hint):
            raise ConfigError(f"{here}: must be {_maker(hint)}") from None
        return value


def _maker(hint: Any) -> str:
    return f"a table with `use` that makes {describe(hint)}"


def unfit(value: Any) -> str:
    """Why no experiment can hold this value; "" if it can."""
    if isinstance(value, Mapping):
        odd = next((key for key in value if not isinstance(key, str)), None)
        return f"the key {odd!r} is not a string" if odd is not None else unfit(list(value.values()))
    if isinstance(value, list | tuple):
        return next((reason for part in value if (reason := unfit(part))), "")
    if isinstance(value, float):
        return "" if math.isfinite(value) else f"{value} is not finite"
    if isinstance(value, int):
        return "" if -(2**63) <= value < 2**63 else "64 bits do not hold it"
    if isinstance(value, date | time):
        return f"{value.isoformat()} is a date or a time"
    if value is None:
        return "TOML has no None; leave the key out"
    return "" if isinstance(value, str) else f"TOML has no {type(value).__name__}"


def describe(hint: Any) -> str:
    """A type hint in words: "float > 0", "one of 'adam', 'yogi'"."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        said = next((text for extra in hint.__metadata__ if (text := getattr(extra, "description", None))), None)
        bounds = [(sign, getattr(x, name, None)) for x in limits(hint) for name, sign in _SIGNS.items()]
        told = " and ".join(f"{sign} {bound}" for sign, bound in bounds if bound is not None)
        return said or f"{describe(parts[0])} {told}".strip()
    if origin is Literal:
        return f"one of {', '.join(map(repr, parts))}" if len(parts) > 1 else repr(parts[0])
    if origin in (Union, UnionType):
        return " or ".join(describe(part) for part in parts if part is not type(None))
    if origin in (list, tuple, Sequence, set, frozenset):
        return f"a list of {', '.join(describe(part) for part in parts if part is not ...)}"
    word = origin or hint
    return _WORDS.get(word) or str(getattr(word, "__name__", word))
