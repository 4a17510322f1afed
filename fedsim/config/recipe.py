"""Recipes: a table with `use`, checked against the callable's signature and types, called later."""

import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from fedsim.config.plugins import ConfigError, closest, find
from fedsim.ranges import limits


class Recipe(NamedTuple):
    """A callable and its arguments, checked but not called yet."""

    where: str
    use: str
    function: Callable[..., Any]
    arguments: dict[str, Any]  # values, and recipes for nested tables
    given: tuple[str, ...]  # arguments that the experiment fills in

    def make(self, context: Mapping[str, Any]) -> Any:
        """What the callable returns."""
        arguments = {
            name: value.make(context) if isinstance(value, Recipe) else value for name, value in self.arguments.items()
        }
        try:
            return self.function(**{name: context[name] for name in self.given}, **arguments)
        except ConfigError:
            raise
        except Exception as error:  # the callable may be anybody's
            raise ConfigError(f"{self.where}: {self.use}: {error or type(error).__name__}") from error


def recipe(table: Any, where: str, group: str, fills: Sequence[str], base: Path | None = None) -> Recipe:
    """Reads a table with `use`; raises ConfigError for a callable, a key or a value that is not right."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where} = {table!r}: must be a table with `use`")
    if "use" not in table:
        raise ConfigError(f"{where}: the key `use` is missing; it names the callable, got the keys {sorted(table)}")
    use = table["use"]
    function = find(use, group, f"{where}.use", base)
    parameters, hints = _parameters(function)
    arguments: dict[str, Any] = {}
    for key, value in table.items():
        if key == "use":
            continue
        if key not in parameters:
            takes = ", ".join(name for name in parameters if name not in fills) or "no arguments"
            raise ConfigError(f"{where}.{key}: {use} takes {takes}; unknown key {key}{closest(key, parameters)}")
        if isinstance(value, Mapping) and "use" in value:
            arguments[key] = recipe(value, f"{where}.{key}", group, fills, base)
        else:
            arguments[key] = _value(value, hints.get(key, Any), f"{where}.{key}")
    given = tuple(name for name in fills if name in parameters and name not in arguments)
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in arguments and name not in given:
            raise ConfigError(f"{where}.{name} is missing: {use} needs it ({describe(hints.get(name, Any))})")
    return Recipe(where, str(use), function, arguments, given)


def _parameters(function: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], dict[str, Any]]:
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = {name: p for name, p in inspect.signature(function).parameters.items() if p.kind in named}
    target = function.__init__ if inspect.isclass(function) else inspect.unwrap(function)
    try:
        hints = get_type_hints(target, include_extras=True)
    except NameError:  # a plug-in's annotation that exists only for type checkers: not checked here
        hints = {}
    return parameters, hints


def _value(value: Any, hint: Any, where: str) -> Any:
    """The value as the type hint wants it, strictly: no string becomes a number."""
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise ConfigError(f"{where} = {value!r}: must be {describe(hint)}, finite and not a date") from None
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True, strict=True))
    except (PydanticUserError, PydanticSchemaGenerationError):
        adapter = TypeAdapter(Any)
    try:
        return adapter.validate_json(text)
    except ValidationError as error:
        raise ConfigError(explain(error, where, hint)) from None


def explain(error: ValidationError, where: str, hint: Any = None, keys: Iterable[str] = ()) -> str:
    """A line for each value that is wrong: its place, itself, and what is allowed."""
    lines = []
    for problem in error.errors(include_url=False):
        path = ".".join([where, *(str(part) for part in problem["loc"])] if where else map(str, problem["loc"]))
        message = problem["msg"].replace("Input should", "must").replace("Field required", "is missing")
        if problem["type"] == "extra_forbidden":
            message = f"unknown key{closest(str(problem['loc'][-1]), keys)}"
        allowed = f" ({describe(hint)})" if hint is not None else ""
        value = "" if problem["type"] == "missing" else f" = {problem['input']!r}"
        lines.append(f"{path}{value}: {message}{allowed}")
    return "\n".join(lines)


def describe(hint: Any) -> str:
    """A type hint in words: "float > 0", "one of 'adam', 'yogi'"."""
    if get_origin(hint) is Annotated:
        signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
        told = [
            f"{s} {getattr(x, k)}" for x in limits(hint) for k, s in signs.items() if getattr(x, k, None) is not None
        ]
        return " ".join([describe(get_args(hint)[0]), " and ".join(told)]).strip()
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(option) for option in get_args(hint))
    if get_args(hint):
        if (
            isinstance(hint, type)
            or get_origin(hint) is not None
            and get_origin(hint).__name__ not in ("UnionType", "Union")
        ):
            return f"{getattr(get_origin(hint), '__name__', hint)} of {', '.join(map(describe, get_args(hint)))}"
        return " or ".join(map(describe, get_args(hint)))
    return "nothing" if hint is type(None) else "anything" if hint is Any else getattr(hint, "__name__", str(hint))
