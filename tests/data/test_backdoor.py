"""A backdoor: stamped copies at the attackers, told apart by "target", and not a number changed anywhere else."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedsim.config.assembly import assemble
from fedsim.config.experiment import read
from fedsim.data.backdoor import backdoored, stamped, triggered
from fedsim.data.dataset import Dataset
from fedsim.data.datasets import digits
from fedsim.data.federation import Partition, divide
from fedsim.data.partition import dirichlet

PARTS = ("train", "validation", "test")
DIGITS = digits()
DIVIDED = dirichlet(DIGITS.columns, 0, clients=10, alpha=0.5)


def owned(federation, client, split):
    start, size = (int(value[0]) for value in federation.span([client], split))
    return federation.rows[start : start + size].tolist()


# The stamp


def test_the_corner_is_set_and_nothing_else():
    images = torch.rand(4, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    found = stamped(images, size=2, value=7.0)
    for n in range(4):
        for channel in range(3):
            for row in range(5):
                for column in range(6):
                    corner = row >= 3 and column >= 4
                    expected = 7.0 if corner else float(before[n, channel, row, column])
                    assert float(found[n, channel, row, column]) == expected
    assert torch.equal(images, before), "copies are stamped"


def test_pixels_in_a_row_are_stamped_like_the_image_that_they_are():
    images = torch.rand(5, 1, 8, 8)
    for size in (1, 2, 8):
        assert torch.equal(stamped(images.flatten(1), size), stamped(images, size).flatten(1))
        assert torch.equal(stamped(images[:, 0], size), stamped(images, size)[:, 0])
    turned = images.transpose(2, 3)  # not contiguous
    assert torch.equal(stamped(turned), stamped(turned.contiguous()))
    assert stamped(images[:0]).shape == (0, 1, 8, 8)


def test_the_triggered_test_set_has_every_example_of_other_classes_and_their_true_labels():
    found = triggered(DIGITS.test, 7)
    images = [image for image, label in zip(DIGITS.test["x"], DIGITS.test["y"].tolist(), strict=True) if label != 7]
    assert found["y"].tolist() == [label for label in DIGITS.test["y"].tolist() if label != 7]
    assert torch.equal(found["x"][..., 6:, 6:], torch.ones(len(images), 1, 2, 2))
    for image, before in zip(found["x"], images, strict=True):
        assert torch.equal(image[0, :6], before[0, :6]) and torch.equal(image[0, :, :6], before[0, :, :6])


# The federation


@pytest.mark.parametrize(("validation", "test"), [(0.0, 0.0), (0.1, 0.2)])
@pytest.mark.parametrize(("clients", "share", "label"), [(3, 0.6, 7), (1, 1.0, "0"), (10, 0.05, 9)])
def test_copies_stand_behind_the_attackers_own_rows_and_everything_else_is_as_divided(
    clients, share, label, validation, test
):
    plain = divide(DIGITS, DIVIDED, validation, test, seed=5)
    found = backdoored(DIGITS, DIVIDED, label, clients, share, validation=validation, test=test, seed=5)
    attackers = sorted(range(10), key=lambda client: (-plain.sizes()[client], client))[:clients]
    for client in range(10):
        own = plain.examples(client)
        for split in ("validation", "test"):
            assert owned(found, client, split) == owned(plain, client, split)
        size = len(own["y"])
        assert owned(found, client, "train")[:size] == owned(plain, client, "train")
        after = found.examples(client)
        others = int((own["y"] != int(label)).sum())
        copies = round(share * others) if client in attackers else 0
        assert len(after["y"]) == size + copies and after["target"].tolist() == [0] * size + [1] * copies
        assert torch.equal(after["x"][:size], own["x"]) and torch.equal(after["y"][:size], own["y"])
        assert after["y"][size:].tolist() == [int(label)] * copies
        candidates = [image.numpy().tobytes() for image in stamped(own["x"][own["y"] != int(label)])]
        for image in after["x"][size:]:  # each of them is used once at most
            candidates.remove(image.numpy().tobytes())
    total = int(found.columns["target"].sum())
    assert len(found.columns["y"]) == len(DIGITS) + total == len(found.rows)
    assert found.columns["target"].dtype == torch.int64 and not found.test["target"].any()
    assert torch.equal(found.test["x"], DIGITS.test["x"])


def test_parts_stand_next_to_each_other_and_a_client_without_examples_stays_so():
    sizes = np.array([30, 0, 0, 40, 1, 0])
    partition = Partition(np.arange(71), np.concatenate([[0], np.cumsum(sizes)]))
    found = backdoored(DIGITS, partition, 3, clients=6, share=1.0, test=0.1)
    assert (np.diff(found.bounds, axis=1) >= 0).all() and found.bounds[0, 0] == 0
    assert (found.bounds[1:, 0] == found.bounds[:-1, 3]).all() and found.bounds[-1, 3] == len(found.rows)
    assert sorted(found.rows.tolist()) == [*range(71), *range(len(DIGITS), len(found.columns["y"]))]
    for client in range(6):
        others = int((divide(DIGITS, partition, test=0.1).examples(client)["y"] != 3).sum())
        assert int(found.examples(client)["target"].sum()) == others
    assert [found.sizes()[client] for client in (1, 2, 5)] == [0, 0, 0]


def test_without_poison_it_is_the_divided_federation_that_asks_to_forget_nothing():
    plain = divide(DIGITS, DIVIDED, 0.1, 0.2, seed=5)
    clean = backdoored(DIGITS, DIVIDED, 7, poisoned=False, validation=0.1, test=0.2, seed=5)
    assert np.array_equal(clean.rows, plain.rows) and np.array_equal(clean.bounds, plain.bounds)
    assert clean.columns.keys() == clean.test.keys() == {"x", "y", "target"}
    assert not clean.columns["target"].any() and not clean.test["target"].any()
    assert torch.equal(clean.columns["x"], plain.columns["x"])
    assert clean.names == plain.names | {"target": ("kept", "stamped copies of class 7")}


def test_a_tie_goes_to_the_lower_id():
    partition = Partition(np.arange(40), np.array([0, 5, 15, 25, 30, 40]))  # clients 1, 2 and 4 have ten each
    found = backdoored(DIGITS, partition, 3, clients=2)
    assert [bool(found.examples(client)["target"].any()) for client in range(5)] == [False, True, True, False, False]


def test_what_is_drawn_depends_on_the_seed_and_on_the_client_alone():
    def drawn(clients, seed, client):
        examples = backdoored(DIGITS, DIVIDED, 7, clients, seed=seed).examples(client)
        return examples["x"][examples["target"] == 1]

    most = int(divide(DIGITS, DIVIDED).sizes().argmax())
    torch.manual_seed(1)
    one = drawn(1, 0, most)
    torch.manual_seed(2)
    assert torch.equal(one, drawn(5, 0, most)), "nor on how many others attack"
    assert not torch.equal(one, drawn(1, 1, most))


def test_a_class_may_be_named_and_other_columns_are_copied_along():
    names = DIGITS.names | {"y": tuple("abcdefghij"), "a": ("even", "odd")}
    columns = DIGITS.columns | {"a": DIGITS.columns["y"] % 2}
    data = replace(DIGITS, columns=columns, test={}, names=names)
    found = backdoored(data, DIVIDED, "h")
    assert all(np.array_equal(one, found.columns[name]) for name, one in backdoored(data, DIVIDED, 7).columns.items())
    assert found.test == {}
    gone = found.columns["target"] == 1
    images = {image.numpy().tobytes(): a for image, a in zip(stamped(data.columns["x"]), columns["a"], strict=True)}
    for image, a in zip(found.columns["x"][gone], found.columns["a"][gone], strict=True):
        assert images[image.numpy().tobytes()] == a, "of the image, not of the class it is said to be"


def test_an_experiment_may_ask_for_it():
    split = {"use": "fedsim.data.backdoor:backdoored", "label": 7, "clients": 2}
    partition = {"use": "dirichlet", "clients": 10, "alpha": 0.5}
    experiment, _ = read("fedavg/digits")
    found = assemble(experiment.model_copy(update={"split": split, "partition": partition})).federation
    owners = [client for client in range(10) if found.examples(client)["target"].any()]
    clean = found.sizes() - np.array([int(found.examples(client)["target"].sum()) for client in range(10)])
    assert owners == sorted(np.argsort(-clean, kind="stable")[:2].tolist())


# What is refused


def flat(width):
    return Dataset("flat", {"x": torch.zeros(40, width), "y": torch.arange(40) % 2}, names={"y": ("no", "yes")})


FEW = Partition(np.arange(40), np.array([0, 20, 40]))


@pytest.mark.parametrize(
    ("build", "complaint"),
    [
        (lambda: backdoored(flat(10), FEW, 0, 1), "images of 10 numbers in a row have no corner: .* a square h \\* h"),
        (lambda: backdoored(flat(9), FEW, 2, 1), "label must be a class of flat, 'no', 'yes', .* 0 to 1, got 2"),
        (lambda: backdoored(flat(9), FEW, -1, 1), "0 to 1, got -1"),
        (lambda: backdoored(flat(9), FEW, "maybe", 1), "'no', 'yes', .* got 'maybe'"),
        (lambda: backdoored(flat(9), FEW, True, 1), "got True"),
        (lambda: backdoored(flat(9), FEW, "no", 3), "clients must be at most 2, .* got 3"),
        (lambda: backdoored(flat(9), FEW, "no", 0), "clients must be >= 1, got 0"),
        (lambda: backdoored(flat(9), FEW, "no", 1, 0.0), "share must be > 0 and <= 1, got 0.0"),
        (lambda: backdoored(flat(9), FEW, "no", 1, 0.01), "share = 0.01 leaves clients 0 no image to stamp"),
        (lambda: backdoored(flat(9), FEW, "no", 1, size=4), "size must be at most 3, as images are 3 x 3, got 4"),
        (lambda: backdoored(flat(9), FEW, "no", 1, size=4, poisoned=False), "size must be at most 3"),
        (lambda: backdoored(flat(9), FEW, "no", 1, value=math.inf), "value must be finite, got inf"),
        (lambda: backdoored(flat(9), FEW, "no", 1, value=math.nan), "value must be finite, got nan"),
        (lambda: backdoored(flat(9), FEW, "no", 1, validation=0.7, test=0.7), "at most 1, got 0.7"),
        (
            lambda: backdoored(Dataset("bare", {"z": torch.zeros(40)}), FEW, 0, 1),
            "bare has no column x and no column y, only z",
        ),
        (
            lambda: backdoored(Dataset("real", {"x": torch.zeros(40, 9), "y": torch.zeros(40)}), FEW, 0, 1),
            r"real: column 'y' must hold one int64 for each example, got torch.float32 of shape \(40,\)",
        ),
        (
            lambda: backdoored(replace(flat(9), columns=flat(9).columns | {"target": torch.ones(40)}), FEW, 0, 1),
            "flat has a column 'target' already",
        ),
        (lambda: stamped(torch.zeros(3, 4, 4, dtype=torch.uint8)), "images must be floating-point .* got torch.uint8"),
        (lambda: stamped(torch.zeros(3)), r"got torch.float32 of shape \(3,\)"),
    ],
)
def test_what_cannot_be_stamped_is_refused_with_the_numbers(build, complaint):
    with pytest.raises(ValueError, match=complaint):
        build()
