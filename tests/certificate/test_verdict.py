"""What it cost, what must hold, and what the verdict is."""

import math

import pytest

from fedsim.certificate.costs import action, epochs, spent
from fedsim.certificate.verdict import Check, Limits, checks, verdict

COSTS = {"forgetting": {"client_epochs": 10.0}, "retraining": {"client_epochs": 100.0}}


def test_costs_are_those_of_the_rounds_that_forget():
    metrics = [
        {"train/loss": 1.0, "test/accuracy": 0.5, "clients": 4, "bytes_up": 5, "bytes_down": 7, "seconds": 2.0},
        {"forget/loss": 1.0, "clients": 3, "bytes_up": 1, "bytes_down": 2, "seconds": 0.5},
        {"clients": 2, "bytes_up": 1, "bytes_down": 2, "seconds": 0.25},  # whose clients told nothing
        {"repair/loss": 1.0, "clients/accuracy": 0.1, "clients": 4, "bytes_up": 10, "bytes_down": 20, "seconds": 1.0},
    ]
    clients = {
        "train": {"epochs": 5},
        "forget": {"epochs": 2},
        "repair": {"use": "x", "client": {"use": "y", "epochs": 3}},
    }
    assert [action(line) for line in metrics] == ["train", "forget", None, "repair"]
    assert spent(metrics, clients, ("train",)) == {
        "rounds": 3, "client_epochs": 3 * 2 + 2 * 2 + 4 * 3, "bytes": 36, "seconds": 1.75,
    }  # fmt: skip
    assert spent(metrics[:1], clients) == {"rounds": 1, "client_epochs": 20, "bytes": 12, "seconds": 2.0}


def test_a_client_that_says_nothing_of_epochs_has_one():
    assert epochs({}) == 1
    assert epochs({"use": "x", "client": {"use": "y"}}) == 1
    assert epochs({"epochs": 4, "client": {"use": "y", "epochs": 2}}) == 4


def models(**after):
    """A retrained model that knows nothing of the target, and one that forgot, by default like it."""
    retrained = {"target_accuracy": 0.0, "forgotten_accuracy": 0.0, "retained_accuracy": 0.9, "membership_loss": 0.5}
    return {"after": retrained | after, "retrained": retrained, "relapsed": retrained | {"target_accuracy": 0.05}}


def test_one_like_the_retrained_passes_all():
    found = checks(models(), COSTS, Limits())
    assert all(check.holds for check in found) and len(found) == 5
    assert verdict(found) == "As if retrained, by all 5 checks that could be made."


@pytest.mark.parametrize(
    ("after", "name"),
    [
        ({"target_accuracy": 0.03}, "difference in accuracy on the target"),
        ({"retained_accuracy": 0.87}, "less accuracy on the rest"),
        ({"membership_loss": 0.46}, "difference in membership AUC, loss threshold"),
        ({"membership_loss": math.nan}, "difference in membership AUC, loss threshold"),
    ],
)
def test_one_that_is_not_fails_what_it_should(after, name):
    found = checks(models(**after), COSTS, Limits())
    assert [check.name for check in found if not check.holds] == [name]
    assert verdict(found) == f"Not as if retrained: {name}."


def test_more_accuracy_on_the_rest_is_no_fault():
    assert all(check.holds for check in checks(models(retained_accuracy=0.99), COSTS, Limits()))


def test_relapse_and_cost():
    relapsed = models() | {"relapsed": {"target_accuracy": 0.2}}
    dear = {"forgetting": {"client_epochs": 30.0}, "retraining": {"client_epochs": 100.0}}
    failed = [check for check in checks(relapsed, dear, Limits()) if not check.holds]
    assert [(check.name, round(check.value, 6)) for check in failed] == [
        ("more accuracy on the target after plain rounds", 0.2),
        ("client epochs, as a share of retraining’s", 0.3),
    ]
    assert all(check.holds for check in checks(relapsed, dear, Limits(relapse=0.2, cost=0.3)))


def test_without_anything_held_out_like_it_the_forgotten_examples_count():
    found = {name: {key: value for key, value in model.items() if key != "target_accuracy"} for name, model in
             models(forgotten_accuracy=0.5).items()}  # fmt: skip
    failed = [check.name for check in checks(found, COSTS, Limits()) if not check.holds]
    assert failed == ["difference in accuracy on the forgotten examples"]


def test_a_backdoor_is_judged_by_its_success():
    found = models(attack_success=0.3, target_accuracy=1.0)
    found["relapsed"] = {"attack_success": 0.1}
    names = {check.name: check.holds for check in checks(found, COSTS, Limits())}
    assert names["backdoor success"] is False and names["backdoor success after plain rounds"] is True
    assert not any("target" in name for name in names)


def test_limits_are_no_less_than_zero():
    with pytest.raises(ValueError, match="target must be >= 0, got -1"):
        Limits(target=-1)
    assert Check("x", 0.0, 0.0).holds
