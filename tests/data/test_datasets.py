"""Loaders: the numbers that the publishers' files are known for, and generated data against closed forms."""

import gzip
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from fedsim.data.datasets import (
    CATALOGUE,
    adult,
    canonical_joint,
    canonical_table,
    compas,
    digits,
    drug_consumption,
    fashion_mnist,
    filmtrust,
    gaussian_task,
    gaussians,
    group_shift,
    latent_factor_ratings,
    movielens_100k,
    random_joint,
)
from fedsim.data.generated import group_shift_posterior
from fedsim.fairness import optimum

real = pytest.mark.skipif(
    "FEDSIM_DATA" not in os.environ, reason="needs the data sets: set FEDSIM_DATA to their folder"
)


def rate(dataset, group=None, label=1):
    y = dataset.columns["y"] if group is None else dataset.columns["y"][dataset.columns["a"] == group]
    return float((y == label).double().mean())


@real
def test_adult_has_its_known_size_and_base_rates():
    dataset = adult()
    assert len(dataset) == 32_561 + 16_281
    assert rate(dataset) == pytest.approx((7841 + 3846) / 48_842)
    assert rate(dataset, group=0) == pytest.approx(0.304, abs=5e-4) and dataset.names["a"][0] == "Male"
    assert rate(dataset, group=1) == pytest.approx(0.109, abs=5e-4)
    x = dataset.columns["x"]
    assert x.dtype == torch.float32 and x.min() == 0 and x.max() == 1
    assert torch.equal(x[:, 6:].sum(1), torch.full((48_842,), 7.0))  # one of each of the seven one-hot columns
    for part in (x[:32_561, :6], x[32_561:, :6]):  # each file is scaled by its own extremes
        assert (part.amin(0) == 0).all() and (part.amax(0) == 1).all()


@real
def test_adults_official_test_set_is_its_second_file():
    dataset, whole = adult(common_test="official"), adult()
    assert len(dataset) == 32_561 and int(dataset.columns["y"].sum()) == 7841
    assert len(dataset.test["y"]) == 16_281 and int(dataset.test["y"].sum()) == 3846
    assert torch.equal(torch.cat([dataset.columns["x"], dataset.test["x"]]), whole.columns["x"])


@real
@pytest.mark.parametrize(("sensitive", "groups", "removed"), [("sex", 2, 0), ("race", 5, 5 - 1), ("age", 3, 1 - 1)])
def test_adults_sensitive_attribute_is_no_feature(sensitive, groups, removed):
    dataset = adult(sensitive=sensitive)
    assert dataset.columns["x"].shape[1] == adult().columns["x"].shape[1] - removed
    assert dataset.columns["a"].unique().tolist() == list(range(groups)) == list(range(len(dataset.names["a"])))
    agreement = [float((column == dataset.columns["a"].float()).double().mean()) for column in dataset.columns["x"].T]
    assert max(agreement) < 1


@real
def test_compas_has_its_known_size_and_base_rates():
    race, sex = compas(), compas(sensitive="sex")
    assert torch.bincount(race.columns["y"]).tolist() == [3363, 2809]
    assert int(race.columns["a"].sum()) == 3175 and race.names["a"][1] == "African-American"
    assert rate(race, group=1) == pytest.approx(0.523, abs=5e-4)
    assert rate(sex, group=0) == pytest.approx(0.479, abs=5e-4)
    assert rate(sex, group=1) == pytest.approx(0.351, abs=5e-4)
    assert sex.columns["x"].shape[1] == race.columns["x"].shape[1] - 2
    assert compas(sensitive="age").columns["x"].shape[1] == race.columns["x"].shape[1] - 6
    filled = race.columns["x"][:, 5:17].reshape(-1, 2, 6)
    assert (filled.diff(dim=2) <= 0).all() and (filled[..., 0] == 1).all()  # lower bins are filled up


@real
def test_drug_consumption_has_its_known_classes_and_base_rates():
    dataset, gender = drug_consumption(), drug_consumption(sensitive="gender")
    assert torch.bincount(dataset.columns["y"]).tolist() == [413, 473, 536, 463]
    assert torch.bincount(drug_consumption(classes=7).columns["y"]).tolist() == [413, 207, 266, 211, 140, 185, 463]
    assert torch.bincount(dataset.columns["a"]).tolist() == [1033, 852]
    assert torch.bincount(gender.columns["a"]).tolist() == [943, 942]
    assert [rate(dataset, group, 3) for group in (0, 1)] == pytest.approx([0.328, 0.146], abs=5e-4)
    assert [rate(gender, group, 3) for group in (0, 1)] == pytest.approx([0.330, 0.161], abs=5e-4)
    assert dataset.columns["x"].shape == (1885, 11)


@real
def test_fashion_mnist_is_balanced_and_normalised():
    dataset = fashion_mnist()
    assert torch.bincount(dataset.columns["y"]).tolist() == [6000] * 10
    assert torch.bincount(dataset.test["y"]).tolist() == [1000] * 10
    x = dataset.columns["x"]
    assert x.shape == (60_000, 1, 28, 28) and x.dtype == torch.float32
    assert float(x.double().mean()) == pytest.approx(0, abs=1e-3) and float(x.double().std()) == pytest.approx(
        1, abs=1e-3
    )


@real
def test_movielens_has_its_known_users_items_and_mean():
    columns = movielens_100k().columns
    assert {name: column.dtype for name, column in columns.items()} == {
        "user": torch.int64,
        "item": torch.int64,
        "rating": torch.float32,
        "time": torch.int64,
    }
    assert columns["user"].unique().tolist() == list(range(943)) and columns["item"].unique().tolist() == list(
        range(1682)
    )
    assert torch.bincount(columns["user"]).min() == 20 and len(columns["user"]) == 100_000
    assert float(columns["rating"].double().mean()) == pytest.approx(3.52986)
    first = [int(columns[name][0]) for name in ("user", "item", "rating", "time")]
    assert first == [195, 241, 3, 881_250_949]


@real
def test_filmtrust_loses_its_three_duplicates_but_the_first_of_each():
    columns = filmtrust().columns
    assert len(columns["user"]) == 35_497 - 3 and "time" not in columns
    assert int(columns["user"].max()) == 1507 and int(columns["item"].max()) == 2070
    assert len(torch.stack([columns["user"], columns["item"]]).unique(dim=1)[0]) == 35_494
    # Person 308 rated film 235 twice: first 4, later 1.5.
    rows = (columns["user"] == 307) & (columns["item"] == 234)
    assert columns["rating"][rows].tolist() == [4.0]


def copy_of(folder, tmp_path, name, change):
    """The data set's folder with one file changed."""
    copy = tmp_path / folder
    shutil.copytree(Path(os.environ["FEDSIM_DATA"]) / folder, copy, dirs_exist_ok=True)
    copy.chmod(0o700)
    compressed = copy / f"{name}.gz"
    place = compressed if compressed.exists() else copy / name
    content = gzip.decompress(place.read_bytes()) if compressed.exists() else place.read_bytes()
    place.unlink()
    (copy / name).write_bytes(change(content))
    return copy


@real
@pytest.mark.parametrize(
    ("loader", "folder", "name", "change", "message"),
    [
        (adult, "adult", "adult.data", lambda c: c.replace(b"39, State-gov", b"xx, State-gov", 1),
         r"adult.data, line 1, column age: expected a number, got 'xx'"),
        (adult, "adult", "adult.test", lambda c: c.replace(b" Private,", b"", 1),
         r"adult.test, line 2: 14 columns, expected 15"),
        (adult, "adult", "adult.data", lambda c: c.replace(b"<=50K", b"50K", 1),
         r"adult.data, line 1, column income: expected one of <=50K, >50K, got '50K'"),
        (adult, "adult", "adult.data", lambda c: b"\x00\xff\xfe binary", r"adult.data, line 1: 1 columns, expected 15"),
        (adult, "adult", "adult.data", lambda c: b"\n\n", r"adult.data has no rows"),
        (compas, "compas", "compas-scores-two-years.csv", lambda c: c.replace(b",score_text,", b",score,", 1),
         r"line 1: there is no column score_text"),
        (compas, "compas", "compas-scores-two-years.csv", lambda c: c.replace(b",Male,69,", b",Male,,", 1),
         r"line 2, column age: expected a number, got ''"),
        (drug_consumption, "drug-consumption", "drug_consumption.data", lambda c: c.replace(b",0.48246,", b",nan,", 1),
         r"line 1, column Gender: expected a number, got 'nan'"),
        (movielens_100k, "movielens-100k", "u.data", lambda c: c.replace(b"196\t", b"19.5\t", 1),
         r"u.data, line 1, column user: expected a whole number, got '19.5'"),
        (filmtrust, "filmtrust", "ratings.txt", lambda c: c[:-3].rsplit(b" ", 1)[0],
         r"ratings.txt, line 35497: 2 columns, expected 3"),
        (fashion_mnist, "fashion-mnist", "train-images-idx3-ubyte", lambda c: c[:-1],
         r"47040015 bytes, expected 47040016: it is cut off"),
        (fashion_mnist, "fashion-mnist", "train-labels-idx1-ubyte", lambda c: b"what", r"is not an IDX file"),
        (fashion_mnist, "fashion-mnist", "t10k-labels-idx1-ubyte",
         lambda c: struct.pack(">BBBBI", 0, 0, 8, 1, 2) + b"\x00\x01", r"has 10000 images, but .* 2 labels"),
    ],
)  # fmt: skip
def test_a_malformed_file_is_refused_with_file_line_and_column(tmp_path, loader, folder, name, change, message):
    with pytest.raises(ValueError, match=message):
        loader(path=copy_of(folder, tmp_path, name, change))


@real
def test_an_unknown_choice_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="sensitive must be one of sex, race, age, got 'height'"):
        adult(sensitive="height")
    with pytest.raises(ValueError, match="drug must be one of Alcohol, .*, got 'Tea'"):
        drug_consumption(drug="Tea")


def test_digits_are_stratified_and_nothing_is_lost():
    dataset, whole = digits(test=0.25, seed=3), digits(test=0.0)
    assert dataset.columns["x"].shape[1:] == (1, 8, 8) and dataset.columns["x"].dtype == torch.float32
    assert float(whole.columns["x"].min()) == 0 and float(whole.columns["x"].max()) == 1
    assert len(whole) == 1797 and whole.test == {}
    sizes, held_out = torch.bincount(whole.columns["y"]), torch.bincount(dataset.test["y"])
    assert (torch.bincount(dataset.columns["y"]) + held_out).tolist() == sizes.tolist()
    assert ((held_out - 0.25 * sizes).abs() <= 0.5).all()
    rows = {tuple(x.flatten().tolist()) for part in (dataset.columns, dataset.test) for x in part["x"]}
    assert rows == {tuple(x.flatten().tolist()) for x in whole.columns["x"]}
    assert not torch.equal(dataset.test["x"], digits(test=0.25, seed=4).test["x"])
    with pytest.raises(ValueError, match="test must be"):
        digits(test=1.0)


def test_gaussian_classes_are_as_far_apart_as_stated_with_unit_noise():
    dataset = gaussians(60_000, classes=4, features=30, separation=5.0, test=0.1, seed=2)
    assert len(dataset) == 54_000 and len(dataset.test["y"]) == 6000
    x, y = dataset.columns["x"], dataset.columns["y"]
    centres = torch.stack([x[y == label].mean(0) for label in range(4)])
    assert centres.norm(dim=1).tolist() == pytest.approx([5 / np.sqrt(2)] * 4, rel=0.02)
    assert float((x - centres[y]).var()) == pytest.approx(1, rel=0.01)
    nearest = torch.cdist(dataset.test["x"], centres).argmin(1)
    assert (nearest == dataset.test["y"]).double().mean() > 0.9
    blurred = gaussians(60_000, classes=4, features=30, separation=0.0, seed=2)
    assert blurred.columns["x"].mean(0).abs().max() < 5 / np.sqrt(48_000)


def test_the_gaussian_task_is_the_published_one():
    near, far = gaussian_task(9000, 0, shift=1.0).columns, gaussian_task(9000, 0, shift=2.5).columns
    assert [int(near[name][0]) for name in ("y", "a", "client")] == [1, 1, 1]
    assert near["x"][0].tolist() == pytest.approx([-0.728307, 0.293850], abs=1e-6)
    assert far["x"][0].tolist() == pytest.approx([-1.178307, 0.143850], abs=1e-6)
    assert torch.bincount(near["client"] * 2 + near["a"]).tolist() == [2012, 867, 1114, 1935, 1562, 1510]
    assert torch.bincount(near["y"]).tolist() == [2960, 3158, 2882]


def test_the_group_shift_is_the_published_one():
    columns = group_shift(8000, seed=0).columns
    assert (int(columns["a"].sum()), int(columns["y"].sum())) == (2810, 4001)
    assert columns["x"][0].tolist() == pytest.approx([-0.84767, -0.75977, 1.31055, 1.18630], abs=5e-6)
    assert columns["x"].shape == (8000, 4) and columns["x"].dtype == torch.float32


def test_the_group_shifts_test_set_is_another_sample_and_the_same_for_all_seeds():
    one, other = group_shift(100, 500, seed=1), group_shift(100, 500, seed=2)
    assert not torch.equal(one.columns["x"], other.columns["x"])
    assert all(torch.equal(one.test[name], other.test[name]) for name in ("x", "y", "a"))
    assert len(one.test["y"]) == 500 and group_shift(100, 0).test == {}
    published = group_shift(500, 0, seed=100).columns
    assert torch.equal(published["x"], one.test["x"])


def test_groups_of_the_group_shift_have_the_stated_sizes_rates_and_places():
    columns = group_shift(400_000, 0, seed=3).columns
    x, y, a = (columns[name].double() for name in ("x", "y", "a"))
    assert float(a.mean()) == pytest.approx(0.35, abs=0.003)
    for group, rate in ((0, 0.6), (1, 0.35)):
        assert float(y[a == group].mean()) == pytest.approx(rate, abs=0.005)
        for label in (0, 1):
            some = x[(a == group) & (y == label)]
            side, sign = 1 - 2 * group, 2 * label - 1
            expected = [1.1 * sign + 0.5 * side, 0.8 * sign, 0.9 * side, 0]
            assert some.mean(0).tolist() == pytest.approx(expected, abs=0.015)
            assert some.std(0).tolist() == pytest.approx([1] * 4, abs=0.015)


def test_the_posterior_of_the_group_shift_is_bayes_rule_and_what_a_sample_shows():
    x = group_shift(300_000, 0, seed=4).columns
    found = group_shift_posterior(x["x"][:50].double().numpy())
    for point, chances in zip(x["x"][:50].double().numpy(), found, strict=True):
        joint = np.zeros((2, 2))
        for group, label in np.ndindex(2, 2):
            side, sign = 1 - 2 * group, 2 * label - 1
            prior = (0.35 if group else 0.65) * ((0.35 if group else 0.6) if label else (0.65 if group else 0.4))
            mean = [1.1 * sign + 0.5 * side, 0.8 * sign, 0.9 * side, 0]
            joint[group, label] = prior * multivariate_normal(mean).pdf(point)
        assert chances.ravel().tolist() == pytest.approx((joint / joint.sum()).ravel().tolist())
    everything = group_shift_posterior(x["x"].double().numpy()).reshape(-1, 4)
    truth = (2 * x["a"] + x["y"]).numpy()
    for cell in range(4):  # of those of whom it is said with so much certainty, so many are there
        place = np.minimum((everything[:, cell] * 10).astype(int), 9)
        said = np.bincount(place, everything[:, cell], 10)
        seen, size = np.bincount(place, truth == cell, 10), np.bincount(place, minlength=10)
        assert (np.abs(said - seen) <= 4 * np.sqrt(size * 0.25) + 1e-9).all()


@pytest.fixture(scope="module")
def shifted():
    """P(client, group, x, label) for one client that has each of 6000 examples of the group shift as an x."""
    posterior = group_shift_posterior(group_shift(6000, 0, seed=7).columns["x"].double().numpy())
    return posterior.transpose(1, 0, 2)[None] / 6000


SHIFTED = [(0.28, 0.9133), (0.21, 0.8994), (0.097, 0.8612), (0.043, 0.8416), (0.027, 0.8357), (0.0074, 0.8284)]


@pytest.mark.parametrize(("gap", "accuracy"), [(1.0, 0.9142), *SHIFTED, (0.0, 0.8257)])
def test_the_best_accuracies_on_the_group_shift_are_the_published_ones(shifted, gap, accuracy):
    shares = shifted.sum((0, 2, 3))
    # Of two groups, the smaller one is the farther from the pooled rate, by the larger one's share of the gap.
    found = optimum(shifted, "demographic parity", (1 - shares.min()) * gap, aware=False)
    assert found.accuracy == pytest.approx(accuracy, abs=1e-4)
    rates = (shifted * found.classifier[..., 1:]).sum((0, 2, 3)) / shares
    assert abs(rates[0] - rates[1]) == pytest.approx(min(gap, 0.304), abs=1e-3)


def test_the_canonical_table_is_the_published_one():
    joint = canonical_table()
    assert joint.shape == (2, 2, 4, 3) and joint.sum() == pytest.approx(1)
    assert joint[0, 0, 0] == pytest.approx([0.090, 0.024, 0.006])
    assert joint.sum(axis=(0, 1, 2)) == pytest.approx([0.3190, 0.3155, 0.3655])
    assert joint.sum(axis=(0, 2, 3)) == pytest.approx([0.45, 0.55])
    assert joint.sum(axis=(2, 3)) == pytest.approx(np.array([[0.30, 0.20], [0.15, 0.35]]))


def test_the_canonical_joint_has_exactly_the_frequencies_of_its_table():
    for copies in (1, 3):
        columns = canonical_joint(copies).columns
        cell = [column.numpy() for column in (columns["client"], columns["a"], columns["x"].argmax(1), columns["y"])]
        counts = np.zeros((2, 2, 4, 3))
        np.add.at(counts, tuple(cell), 1)
        assert counts == pytest.approx(4000 * copies * canonical_table(), abs=1e-9)
        assert (columns["x"].sum(1) == 1).all()


def test_random_joints_are_the_published_ones():
    joint = random_joint(3, 2, 10, 3, seed=1)
    assert joint.sum() == pytest.approx(1) and joint.min() > 0
    expected = np.array([[0.173535, 0.172035], [0.235242, 0.099844], [0.175426, 0.143917]])
    assert joint.sum(axis=(2, 3)) == pytest.approx(expected, abs=1e-6)
    assert joint.sum(axis=1).max(axis=2).sum() == pytest.approx(0.572736, abs=1e-6)  # best prediction from (client, x)
    assert joint.max(axis=3).sum() == pytest.approx(0.573174, abs=1e-6)  # from (client, group, x)
    pooled = random_joint(2, 3, 12, 4, seed=1).sum(axis=0)
    assert pooled.sum(axis=(1, 2)) == pytest.approx([0.273379, 0.347462, 0.379159], abs=1e-6)
    assert pooled.sum(axis=0).max(axis=1).sum() == pytest.approx(0.486263, abs=1e-6)


def test_latent_factor_ratings_are_the_published_ones():
    columns = latent_factor_ratings().columns
    user, item, when = (columns[name].numpy() for name in ("user", "item", "time"))
    sizes = np.bincount(user)
    assert len(sizes) == 300 and len(user) - 300 == 7174 and (sizes.min(), sizes.max()) == (8, 41)
    last = np.array([item[user == one][when[user == one].argmax()] for one in range(300)])
    assert last[:5].tolist() == [283, 41, 93, 380, 293]
    rest = sorted(set(item[user == 0].tolist()) - {283})
    assert len(rest) == 12 and rest[:6] == [90, 95, 120, 161, 168, 213]


def test_the_catalogue_names_every_loader():
    assert list(CATALOGUE)[:6] == [
        "adult",
        "compas",
        "drug_consumption",
        "fashion_mnist",
        "movielens_100k",
        "filmtrust",
    ]
    assert all(loader.__name__ == name and loader.__doc__ for name, loader in CATALOGUE.items())
