"""A value out of its range is named, with the range and where it was given; everything else passes."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pytest
from annotated_types import Gt, Interval, Lt

from fedsim.ranges import (
    Count,
    Decay,
    Natural,
    NonNegative,
    Positive,
    Probability,
    Share,
    check,
    check_fields,
    checked,
    limits,
)
from strategies.fedopt import FedOpt

# hint -> (values at the edge that are allowed, values beyond it)
EDGES = {
    "Positive": (Positive, (5e-324, 1e300), (0, -1.0), "> 0"),
    "NonNegative": (NonNegative, (0, 0.0, 2), (-5e-324,), ">= 0"),
    "Probability": (Probability, (0, 1, 0.5), (-0.01, 1.01), ">= 0 and <= 1"),
    "Share": (Share, (0.01, 1), (0, 1.01), "> 0 and <= 1"),
    "Decay": (Decay, (0, 0.999), (-0.1, 1, 1.5), ">= 0 and < 1"),
    "Count": (Count, (1, 10**12), (0, -3), ">= 1"),
    "Natural": (Natural, (0, 7), (-1,), ">= 0"),
}


@dataclass(frozen=True)
class Recipe:
    lr: Positive
    share: Share | None = None
    widths: tuple[Count, ...] = (1,)
    label: str = ""

    def __post_init__(self):
        check_fields(self)


@checked
def cook(lr: Positive, *, epochs: Count = 1, widths: list[Natural] | None = None, note: str = "", rest=None):
    """Cooks."""
    return lr, epochs, widths, note, rest


@pytest.mark.parametrize("name", EDGES)
def test_each_range_ends_where_it_says(name):
    hint, inside, outside, allowed = EDGES[name]
    for value in inside:
        check("x", value, hint)
    for value in outside:
        with pytest.raises(ValueError) as caught:
            check("x", value, hint)
        assert str(caught.value) == f"x must be {allowed}, got {value!r}"


@pytest.mark.parametrize("name", EDGES)
def test_what_is_not_a_number_is_in_no_range(name):
    with pytest.raises(ValueError, match="got nan"):
        check("x", float("nan"), EDGES[name][0])


def test_limits_are_found_inside_unions_sequences_and_intervals():
    assert list(limits(Positive | None)) == [Gt(0)]
    assert list(limits(dict[str, list[Positive]])) == [Gt(0)]
    assert list(limits(Annotated[float, Interval(gt=0, lt=2)])) == [Gt(0), Lt(2)]
    assert list(limits(float)) == list(limits(int | None)) == []


def test_a_field_out_of_range_is_named():
    with pytest.raises(ValueError, match=r"^lr must be > 0, got -0\.5$"):
        Recipe(-0.5)
    with pytest.raises(ValueError, match=r"^share must be > 0 and <= 1, got 2$"):
        Recipe(0.5, share=2)


def test_fields_within_range_absent_or_without_range_pass():
    assert Recipe(0.5, share=None, label="any").label == "any"
    assert Recipe(0.5, share=1).share == 1


def test_an_element_out_of_range_is_named_by_its_place():
    with pytest.raises(ValueError, match=r"^widths\[1\] must be >= 1, got 0$"):
        Recipe(0.5, widths=(3, 0))
    with pytest.raises(ValueError, match=r"^widths\[2\] must be >= 0, got -1$"):
        cook(1.0, widths=[0, 1, -1])
    assert cook(1.0, widths=[0, 1])[2] == [0, 1]


@pytest.mark.parametrize("number", [np.float32(-1), np.float64(-1), np.int64(-1), np.float32("nan")])
def test_numbers_of_numpy_are_numbers(number):
    with pytest.raises(ValueError, match="lr must be > 0, got"):
        Recipe(number)


def test_an_argument_out_of_range_is_named_however_it_is_given():
    for call in (lambda: cook(0), lambda: cook(lr=0)):
        with pytest.raises(ValueError, match=r"^lr must be > 0, got 0$"):
            call()
    with pytest.raises(ValueError, match=r"^epochs must be >= 1, got 0$"):
        cook(1.0, epochs=0)


def test_a_checked_function_is_otherwise_the_same():
    assert cook(2.0, epochs=3, note="n", rest=-1) == (2.0, 3, None, "n", -1)
    assert cook.__name__ == "cook" and cook.__doc__ == "Cooks."
    with pytest.raises(TypeError, match="missing a required argument: 'lr'"):
        cook()
    with pytest.raises(TypeError, match="unexpected keyword argument 'rate'"):
        cook(1.0, rate=2)


def test_truth_values_and_words_are_not_measured():
    check("x", True, Annotated[float, Gt(5)])
    check("x", "-1", Positive)
    check("x", None, Positive)


def test_a_word_must_be_one_of_those_that_its_type_names():
    with pytest.raises(ValueError, match="optimiser must be one of 'adam', .*, got 'adagard'"):
        FedOpt(optimiser="adagard")
    assert FedOpt(optimiser="adagrad").optimiser == "adagrad"
