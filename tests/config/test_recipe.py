"""Tables with `use`: keys are arguments, checked against the callable's signature and types."""

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import pytest
import torch
from annotated_types import Ge, Lt

from fedsim.config import ConfigError, Recipe, recipe
from fedsim.config.recipe import describe, unfit
from fedsim.data.federation import Federation
from fedsim.ranges import Count, NonNegative, Positive, Share
from fedsim.sampling import Draw, Sampler

PLUGIN = """
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fedsim.ranges import Count, Positive, checked
from fedsim.sampling import Sampler

if TYPE_CHECKING:
    from somewhere import Unknown

@dataclass(frozen=True)
class Parent:
    lr: Positive

@dataclass(frozen=True)
class Child(Parent):
    kind: Literal["a", "b"] = "a"
    seed: int = 0

def plain(seed, size, name="none"):
    return seed, size, name

def greedy(seed: int, **options):
    return seed, options

def half(size: Count, other: Unknown = None):
    return size, other

@checked
def wraps(inner: Sampler, width: Count = 1):
    return inner, width

def needs(model, federation):
    return model, federation

def network():
    from torch import nn
    return nn.Linear(3, 2).weight.detach()

def noise():
    import numpy as np
    return np.random.rand(3).tolist()

def reads(path: Path | None = None, kinds: tuple[str, ...] = ("a",), limit: float = float("inf"), odd: int = "all"):
    return path

def loses():
    raise ConnectionResetError("nobody answered")

def repeats():
    raise ValueError("repeats: once is enough")

def positional(size, /):
    return size

def fails(kind: str):
    raise {"value": ValueError("not this one"), "key": KeyError("lost"), "silent": ValueError()}[kind]
"""


@dataclass
class Own:
    """A class that no value in an experiment is."""


class Call(Protocol):
    """A protocol that cannot be checked at run time."""

    def __call__(self) -> int: ...


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(PLUGIN)
    return tmp_path


def read(folder: Path, function: str, /, *, fills: Sequence[str] = ("seed",), **keys: Any) -> Recipe:
    return recipe({"use": f"mine.py:{function}"} | keys, "part", "fedsim.samplers", fills, folder)


def taken(value: Any, hint: Any) -> Any:
    """What a function with an argument of this type is given for the value."""

    def function(x):
        return x

    function.__annotations__ = {"x": hint}
    function.__module__ = __name__
    globals()["function"] = function
    return recipe({"use": f"{__name__}:function", "x": value}, "part", "", ()).make({})


def test_keys_are_arguments_and_what_is_missing_is_filled_in(folder):
    made = read(folder, "plain", size=3)
    assert made.given == ("seed",)
    assert made.make({"seed": 7}) == (7, 3, "none")


def test_a_filled_in_argument_may_be_set(folder):
    made = read(folder, "plain", size=3, seed=11)
    assert made.given == ()
    assert made.make({"seed": 7}) == (11, 3, "none")


def test_a_filled_in_object_cannot_be_set_to_a_value():
    with pytest.raises(ConfigError, match=r"^part.federation = 3: must be a table with `use` that makes Federation$"):
        recipe({"use": "fedsim.networks:mlp", "federation": 3}, "part", "", ("federation",))


def test_a_function_without_annotations_takes_any_value(folder):
    assert read(folder, "plain", size="large", name=[1, {"a": 2}]).make({"seed": 0}) == (0, "large", [1, {"a": 2}])


def test_a_function_with_other_keyword_arguments_takes_any_key(folder):
    assert read(folder, "greedy", a=1, b="x").make({"seed": 7}) == (7, {"a": 1, "b": "x"})


def test_a_function_with_an_annotation_that_does_not_exist_is_not_checked(folder):
    assert read(folder, "half", size=-1).make({}) == (-1, None)


def test_the_types_of_a_dataclass_are_those_of_its_parents_too(folder):
    assert read(folder, "Child", lr=1).make({"seed": 3}).lr == 1
    with pytest.raises(ConfigError, match=r"^part.lr = 0: must be float > 0$"):
        read(folder, "Child", lr=0)
    with pytest.raises(ConfigError, match=r"^part.kind = 'c': must be one of 'a', 'b'$"):
        read(folder, "Child", lr=1, kind="c")


def test_an_unknown_key_is_answered_with_the_known_ones_without_those_filled_in(folder):
    with pytest.raises(ConfigError, match=r"^part.rate = 1: mine.py:Child takes lr, kind; unknown key rate$"):
        read(folder, "Child", rate=1)
    with pytest.raises(ConfigError, match=r"unknown key knd; did you mean kind\?$"):
        read(folder, "Child", lr=1, knd="a")


def test_a_missing_argument_is_named_with_what_it_may_be(folder):
    with pytest.raises(ConfigError, match=r"^part.lr is missing: mine.py:Child needs it \(float > 0\)$"):
        read(folder, "Child")
    with pytest.raises(ConfigError, match=r"^part.model is missing: mine.py:needs needs it \(anything\)$"):
        read(folder, "needs", fills=("federation",))


def test_tables_nest(folder):
    inner = {"use": "available", "probability": 1.0, "sample": {"use": "uniform", "fraction": 0.5}}
    made = recipe(
        {"use": "dropout", "probability": 0.0, "sample": inner}, "sample", "fedsim.samplers", ("num_clients", "seed")
    )
    draw = made.make({"num_clients": 8, "seed": 1})(1)
    assert isinstance(draw, Draw)
    assert len(draw.ids) == 4


def test_a_mistake_in_a_nested_table_is_named_with_its_whole_path():
    table = {"use": "dropout", "probability": 0.1, "sample": {"use": "uniform", "fraction": 1.5}}
    with pytest.raises(ConfigError, match=r"^sample.sample.fraction = 1.5: must be float > 0 and <= 1$"):
        recipe(table, "sample", "fedsim.samplers", ("num_clients", "seed"))


def test_a_nested_table_without_use_is_told_to_have_one(folder):
    with pytest.raises(ConfigError, match=r"^part.inner = {'fraction': 0.5}: must be a table with `use` that makes S"):
        read(folder, "wraps", inner={"fraction": 0.5})


@pytest.mark.parametrize("table", [3, "mlp", [1], None])
def test_what_is_no_table_is_refused(table):
    with pytest.raises(ConfigError, match="^part = .*must be a table with `use`"):
        recipe(table, "part", "", ())


def test_a_table_without_use_says_what_it_has():
    with pytest.raises(ConfigError, match="^part.use is missing: .*; it has lr, epochs$"):
        recipe({"lr": 1, "epochs": 2}, "part", "", ())
    with pytest.raises(ConfigError, match="^part.use is missing: .*; it is empty$"):
        recipe({}, "part", "", ())


@pytest.mark.parametrize("use", ["builtins:dict", "builtins:max"])
def test_a_callable_whose_arguments_nobody_can_tell_is_refused(use):
    with pytest.raises(ConfigError, match=f"^part.use = '{use}': its arguments cannot be told"):
        recipe({"use": use}, "part", "", ())


@pytest.mark.parametrize(
    ("kind", "told"), [("value", "not this one"), ("key", "KeyError: 'lost'"), ("silent", "ValueError: ")]
)
def test_what_a_callable_raises_is_told_with_its_table(kind, told, folder):
    with pytest.raises(ConfigError) as caught:
        read(folder, "fails", kind=kind).make({})
    assert str(caught.value) == f"part: mine.py:fails: {told}"
    assert caught.value.__cause__ is not None


def test_an_argument_that_can_only_be_given_by_position_is_an_error_when_it_is_made(folder):
    with pytest.raises(ConfigError, match="positional.*missing 1 required positional argument"):
        read(folder, "positional").make({})


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, float, 1.0),
        (3, Count, 3),
        ([1, 2], tuple[int, ...], (1, 2)),
        ([1, 2], Sequence[Count], [1, 2]),
        ("a", Literal["a", "b"], "a"),
        ("all", Count | Literal["all"], "all"),
        (True, bool, True),
        ({"a": 1}, dict[str, int], {"a": 1}),
        ("x", Path, Path.cwd() / "x"),
        ("x", Path | None, Path.cwd() / "x"),
        ("x", str | Path | None, Path.cwd() / "x"),
        ("x", str, "x"),
        (5, Any, 5),
        ({"deep": [{"er": 1}]}, Any, {"deep": [{"er": 1}]}),
    ],
)
def test_a_value_of_the_right_type_is_taken(value, hint, expected):
    found = taken(value, hint)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "told"),
    [
        ("1", int, "'1': must be int"),
        (1.0, int, "1.0: must be int"),
        (True, int, "True: must be int"),
        (1, bool, "1: must be true or false"),
        (1, str, "1: must be str"),
        (0, Positive, "0: must be float > 0"),
        (-1e-300, NonNegative, "-1e-300: must be float >= 0"),
        (1.5, Share | None, "1.5: must be float > 0 and <= 1"),
        ([1, 0], Sequence[Count], "[1, 0]: must be a list of int >= 1 (at place 1 is 0)"),
        ([1], Count | Literal["all"], "[1]: must be int >= 1 or 'all'"),
        ("c", Literal["a", "b"], "'c': must be one of 'a', 'b'"),
        (float("nan"), float, "nan: must be float, but nan is not finite"),
        (-float("inf"), Any, "-inf: must be anything, but -inf is not finite"),
        ([1.0, float("inf")], list[float], "must be a list of float, but inf is not finite"),
        (datetime.date(2020, 1, 2), str, "2020-01-02: must be str, but 2020-01-02 is a date or a time"),
        (datetime.time(7, 30), float, "07:30:00: must be float, but 07:30:00 is a date or a time"),
        (2**63, int, "must be int, but 64 bits do not hold it"),
        (10**400, float, "must be float, but 64 bits do not hold it"),
        (None, int | None, "None: must be int, but TOML has no None; leave the key out"),
        (Own(), Any, "TOML has no Own"),
        ({1: 2}, Any, "the key 1 is not a string"),
        (3, Own, "3: must be a table with `use` that makes Own"),
        (3, Federation, "3: must be a table with `use` that makes Federation"),
        (3, torch.Tensor, "3: must be a table with `use` that makes Tensor"),
        ("uniform", Sampler, "'uniform': must be a table with `use` that makes Sampler"),
        ({"a": 1}, Call, "must be a table with `use` that makes Call"),
        (3, Callable[[], int], "3: must be Callable"),
    ],
)
def test_a_value_of_a_wrong_type_is_refused_with_what_is_allowed(value, hint, told):
    with pytest.raises(ConfigError) as caught:
        taken(value, hint)
    assert str(caught.value).startswith("part.x = ")
    assert told in str(caught.value)


def test_what_toml_can_write_is_fit():
    assert unfit({"a": [1, 2.5, "x", True, {"b": [-(2**63), 2**63 - 1]}]}) == ""


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int, "int"),
        (Annotated[int, Ge(2), Lt(5)], "int >= 2 and < 5"),
        (Share | None, "float > 0 and <= 1"),
        (Mapping[str, int], "a table"),
        (dict[str, Any], "a table"),
        (list[str | int], "a list of str or int"),
        (tuple[int, ...], "a list of int"),
        (type(None), "nothing"),
        (Literal["all"], "'all'"),
    ],
)
def test_types_are_described_in_words(hint, words):
    assert describe(hint) == words


@pytest.mark.parametrize("function", ["network", "noise"])
def test_what_a_callable_draws_from_the_global_generators_depends_on_the_seed_and_the_table_alone(function, folder):
    torch.manual_seed(1)
    np.random.seed(1)
    made = read(folder, function)
    first = made.make({"seed": 7})
    torch.rand(5)
    np.random.rand(5)
    drawn = torch.get_rng_state()
    again, other = made.make({"seed": 7}), made.make({"seed": 8})
    assert torch.equal(torch.get_rng_state(), drawn)
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    elsewhere = recipe({"use": f"mine.py:{function}"}, "elsewhere", "", (), folder).make({"seed": 7})
    assert not np.array_equal(first, elsewhere)


def test_a_path_is_that_of_a_file_beside_the_experiment_and_else_in_the_current_folder(folder, tmp_path, monkeypatch):
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    for place in (folder / "both.csv", tmp_path / "current" / "both.csv", tmp_path / "current" / "one.csv"):
        place.touch()
    assert read(folder, "reads", path="both.csv").make({}) == folder / "both.csv"
    assert read(folder, "reads", path="one.csv").make({}) == tmp_path / "current" / "one.csv"
    assert read(folder, "reads", path="none.csv").make({}) == tmp_path / "current" / "none.csv"
    assert read(folder, "reads", path="both.csv").table["path"] == str(folder / "both.csv")


def test_a_resolved_table_has_what_is_given_and_the_defaults_that_toml_can_say_and_that_are_allowed(folder):
    assert read(folder, "reads").table == {"use": f"{folder}/mine.py:reads", "kinds": ["a"]}
    assert read(folder, "Child", lr=1).table == {"use": f"{folder}/mine.py:Child", "lr": 1, "kind": "a"}
    assert read(folder, "Child", lr=1, seed=5).table["seed"] == 5
    inner = recipe(
        {"use": "dropout", "sample": {"use": "everyone"}, "probability": 0.5},
        "s",
        "fedsim.samplers",
        ["num_clients", "seed"],
    )
    assert inner.table == {
        "use": "fedsim.sampling:dropout",
        "sample": {"use": "fedsim.sampling:everyone"},
        "probability": 0.5,
    }


def test_a_lost_connection_is_no_mistake_in_the_table(folder):
    with pytest.raises(ConnectionError, match="^part: mine.py:loses: nobody answered$"):
        read(folder, "loses").make({})


def test_a_name_that_a_message_begins_with_is_not_said_twice(folder):
    with pytest.raises(ConfigError, match="^part: mine.py:repeats: once is enough$"):
        read(folder, "repeats").make({})
