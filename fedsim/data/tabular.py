"""Tables about people with a label and a sensitive group: Adult, COMPAS, Drug consumption.

Columns "x" (E, F), "y" and "a" (E,). The attribute chosen as sensitive is no part of "x".
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.data.dataset import Dataset
from fedsim.data.files import load
from fedsim.data.sources import ADULT, COMPAS, DRUG_CONSUMPTION
from fedsim.data.tables import parse

_ADULT_COLUMNS = (
    *("age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship"),
    *("race", "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country", "income"),
)
_ADULT_NUMBERS = ("age", "fnlwgt", "education-num", "capital-gain", "capital-loss", "hours-per-week")
_ADULT_WORDS = ("workclass", "education", "marital-status", "occupation", "relationship", "race", "native-country")
_AGES = ("under 25", "25 to 45", "over 45")  # ProPublica's groups
_SCORES = ("Nscore", "Escore", "Oscore", "Ascore", "Cscore", "Impulsive", "SS")
_PEOPLE = ("Age", "Gender", "Education", "Country", "Ethnicity")
_DRUGS = (
    *("Alcohol", "Amphet", "Amyl", "Benzos", "Caff", "Cannabis", "Choc", "Coke", "Crack", "Ecstasy", "Heroin"),
    *("Ketamine", "Legalh", "LSD", "Meth", "Mushrooms", "Nicotine", "Semer", "VSA"),
)
_USES = {
    4: ("never", "before the last year", "in the last year", "last day"),
    7: ("never", "over a decade ago", "last decade", "last year", "last month", "last week", "last day"),
}
# Sensitive attributes of the drug study: what the groups are called, and the values at which the next one begins.
_DRUG_GROUPS = {
    "education": ("Education", ("no degree", "degree"), (0.4,)),
    "gender": ("Gender", ("male", "female"), (0.0,)),
    "age": ("Age", ("18 to 24", "25 to 34", "35 and over"), (-0.5, 0.2)),
}


def adult(
    path: str | Path | None = None,
    sensitive: Literal["sex", "race", "age"] = "sex",
    common_test: Literal["none", "official"] = "none",
) -> Dataset:
    """Does this person earn more than 50,000 dollars a year? 48,842 people of the 1994 census.

    No row is dropped: "?" is a category of its own. Categories are one-hot, over those of both files. Numbers are
    scaled to [0, 1] by the minimum and maximum of the file they come from. Sex is one feature, 1 for women, if
    another attribute is sensitive. Ages form three groups: under 25, 25 to 45, over 45.

    Args:
        path: the folder of adult.data and adult.test.
        sensitive: the attribute that "a" numbers.
        common_test: with "official", the 16,281 people of adult.test are the common test set, otherwise they are
            divided among the clients with the 32,561 of adult.data.
    """
    _allowed("sensitive", sensitive, ("sex", "race", "age"))
    _allowed("common_test", common_test, ("none", "official"))
    files = load(ADULT, path)
    parts = [parse(files[name], _ADULT_COLUMNS, skip="|") for name in ("adult.data", "adult.test")]
    sex = _joined(part.codes("sex", ("Male", "Female")) for part in parts)
    age = _joined(part.numbers("age") for part in parts)
    races, race = np.unique(_joined(part.columns["race"] for part in parts), return_inverse=True)
    groups, a = {
        "sex": (("Male", "Female"), sex),
        "race": (tuple(str(name) for name in races), race),
        "age": (_AGES, _age_group(age)),
    }[sensitive]
    features = [_joined(_unit(part.numbers(name)) for part in parts) for name in _ADULT_NUMBERS if name != sensitive]
    features += [_one_hot(_joined(part.columns[name] for part in parts)) for name in _ADULT_WORDS if name != sensitive]
    features += [sex[:, None]] if sensitive != "sex" else []
    y = _joined(part.codes("income", (f"<=50K{end}", f">50K{end}")) for part, end in zip(parts, ("", "."), strict=True))
    columns = _columns(features, y, a)
    cut = len(parts[0].lines)
    test = {name: column[cut:] for name, column in columns.items()} if common_test == "official" else {}
    return Dataset(
        "adult",
        {name: column[:cut] for name, column in columns.items()} if test else columns,
        test,
        {"y": ("<=50K", ">50K"), "a": groups},
        "Becker, Kohavi, Adult, UCI Machine Learning Repository, 1996, https://doi.org/10.24432/C5XW20",
    )


def compas(path: str | Path | None = None, sensitive: Literal["race", "sex", "age"] = "race") -> Dataset:
    """Was this defendant charged again within two years? 6,172 people of Broward County, Florida.

    The rows are those that ProPublica kept. Age, decile score and number of priors are cut into bins at percentiles;
    a decile score or a number of priors also counts in all lower bins. Charge, score and sex are one-hot. Race is
    either African-American or not, and never a feature.

    Args:
        path: the folder of compas-scores-two-years.csv.
        sensitive: the attribute that "a" numbers.
    """
    _allowed("sensitive", sensitive, ("race", "sex", "age"))
    table = parse(load(COMPAS, path)["compas-scores-two-years.csv"], COMPAS.columns, skip=COMPAS.columns[0])
    table = table.rows(table.columns["days_b_screening_arrest"] != "")
    table = table.rows(
        (abs(table.integers("days_b_screening_arrest")) <= 30)
        & (table.integers("is_recid") != -1)
        & (table.columns["c_charge_degree"] != "O")
        & ~np.isin(table.columns["score_text"], ("N/A", ""))
    )
    age, sex = table.integers("age"), table.codes("sex", ("Male", "Female"))
    few, many = (20, 40, 60, 80, 90, 100), (0, 50, 70, 80, 90, 100)
    features = [
        np.eye(2)[table.codes("c_charge_degree", ("F", "M"))],
        np.eye(3)[table.codes("score_text", ("Low", "Medium", "High"))],
        _filled(_bin(table.integers("decile_score"), few)),
        _filled(_bin(table.integers("priors_count"), many)),
    ]
    if sensitive != "sex":
        features.append(np.eye(2)[sex])
    if sensitive != "age":
        features.append(np.eye(6)[_bin(age, few)])
    groups, a = {
        "race": (("other", "African-American"), (table.columns["race"] == "African-American").astype(np.int64)),
        "sex": (("Male", "Female"), sex),
        "age": (_AGES, _age_group(age)),
    }[sensitive]
    return Dataset(
        "compas",
        _columns(features, table.codes("two_year_recid", ("0", "1")), a),
        names={"y": ("no", "yes"), "a": groups},
        source="Angwin, Larson, Mattu, Kirchner, Machine bias, ProPublica, 2016",
    )


def drug_consumption(
    path: str | Path | None = None,
    sensitive: Literal["education", "gender", "age"] = "education",
    drug: str = "Cannabis",
    classes: Literal[4, 7] = 4,
) -> Dataset:
    """When did this person last take a drug? 1,885 answers.

    Features are the publisher's twelve scores, as they are. The four classes are: never, not in the last year, in the
    last year but not on the last day, on the last day.

    Args:
        path: the folder of drug_consumption.data.
        sensitive: the attribute that "a" numbers.
        drug: one of the file's 19 drugs, such as Cannabis, Nicotine or LSD.
        classes: 7 for the answers as they were given, 4 for those above.
    """
    _allowed("sensitive", sensitive, tuple(_DRUG_GROUPS))
    _allowed("drug", drug, _DRUGS)
    _allowed("classes", classes, (4, 7))
    columns = ("ID", *_PEOPLE, *_SCORES, *_DRUGS)
    table = parse(load(DRUG_CONSUMPTION, path)["drug_consumption.data"], columns)
    column, groups, cuts = _DRUG_GROUPS[sensitive]
    y = table.codes(drug, [f"CL{level}" for level in range(7)])
    return Dataset(
        "drug_consumption",
        _columns(
            [table.numbers(name)[:, None] for name in (*_PEOPLE, *_SCORES) if name != column],
            y if classes == 7 else np.array([0, 1, 1, 2, 2, 2, 3])[y],
            np.searchsorted(cuts, table.numbers(column), side="right"),
        ),
        names={"y": _USES[classes], "a": groups},
        source="Fehrman, Egan, Mirkes, Drug consumption (quantified), UCI Machine Learning Repository, 2015, "
        "https://doi.org/10.24432/C5TC7S",
    )


def _allowed(name: str, value: object, values: tuple[object, ...]) -> None:
    if value not in values:
        raise ValueError(f"{name} must be one of {', '.join(map(str, values))}, got {value!r}")


def _joined(parts: Iterable[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate(list(parts))


def _unit(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values scaled to [0, 1], (E, 1); all 0 where they are all equal."""
    span = values.max() - values.min()
    return np.asarray((values - values.min()) / (span or 1.0))[:, None]


def _one_hot(words: NDArray[np.str_]) -> NDArray[np.float64]:
    values, codes = np.unique(words, return_inverse=True)
    return np.eye(len(values))[codes]


def _bin(values: NDArray[np.int64], percents: Sequence[int]) -> NDArray[np.int64]:
    """In which bin each value lies, (E,): the first one whose upper limit, a percentile, it does not exceed."""
    return np.searchsorted(np.percentile(values, percents), values)


def _filled(bins: NDArray[np.int64]) -> NDArray[np.float64]:
    """1 in a row's own bin and all lower ones, (E, 6)."""
    return np.asarray(np.tri(6)[bins])


def _age_group(age: NDArray[Any]) -> NDArray[np.int64]:
    return np.searchsorted((25, 46), age, side="right")


def _columns(features: Sequence[NDArray[Any]], y: NDArray[np.int64], a: NDArray[np.int64]) -> dict[str, Tensor]:
    x = np.concatenate(features, axis=1, dtype=np.float32)
    return {"x": torch.from_numpy(x), "y": torch.from_numpy(y), "a": torch.from_numpy(a)}
