"""Requests: with which of them the last of a class goes."""

import numpy as np
import pytest
import torch

from fedsim.data.dataset import Dataset
from fedsim.data.federation import Federation, Partition
from fedsim.data.targets import marked
from fedsim.forgetting import gone_with

LABELS = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3])  # of the classes 0 to 4, of which nobody has the last
OWNER = Partition(np.arange(8), np.array([0, 2, 6, 8]))  # the 2s are with clients 1 and 2, the 3 with the last alone


def federation(requests, **settings):
    data = {"x": torch.zeros(8, 2), "y": LABELS}
    return marked(Dataset("some", data, {}, {"y": tuple("abcde")}), OWNER, requests, **settings)


@pytest.mark.parametrize(
    ("requests", "expected"),
    [
        ([{"class": "b"}], (2, 1, 2, 2, 0)),
        ([{"class": "b"}, {"class": ["a", "d"]}], (2, 1, 3, 2, 0)),
        ([{"samples": [2, 3]}], (2, 2, 2, 2, 0)),  # one b is kept
        ([{"samples": [2, 3]}, {"samples": [4]}], (3, 2, 3, 3, 0)),  # the last b
        ([{"client": 2}], (2, 2, 2, 1, 0)),  # who alone has a d, but not all c
        ([{"client": 2}, {"class": "c", "client": 1}], (3, 3, 2, 1, 0)),
    ],
)
def test_a_class_goes_with_the_request_that_names_its_last_example(requests, expected):
    assert gone_with(federation(requests)) == expected
    for left_out in range(1, len(requests) + 1):
        assert gone_with(federation(requests, leave_out=left_out)) == expected


def test_what_nobody_trains_on_keeps_no_class_there():
    kept = federation([{"class": "a"}], test=0.5)
    tested = {int(label) for client in range(3) for label in kept.examples(client, "test")["y"]}
    trained = {int(label) for client in range(3) for label in kept.examples(client)["y"]}
    found = gone_with(kept)
    assert tested - trained, "or there would be nothing to see"
    assert [found[label] for label in range(1, 5)] == [2 if label in trained else 0 for label in range(1, 5)]


NOTHING_ASKED, CLASSES = {"target": torch.zeros(4).long()}, {"y": torch.arange(4)}


@pytest.mark.parametrize(
    "columns",
    [
        CLASSES,
        NOTHING_ASKED,
        NOTHING_ASKED | {"y": torch.rand(4)},  # a quantity
        NOTHING_ASKED | {"y": torch.zeros(4, 2).long()},  # several of an example
    ],
)
def test_without_classes_or_requests_no_class_goes(columns):
    bounds = np.array([[0, 4, 4, 4]])
    assert gone_with(Federation(columns, np.arange(4), bounds)) == ()
    assert gone_with(Federation(CLASSES | NOTHING_ASKED, np.arange(4), bounds)) == (1, 1, 1, 1)
