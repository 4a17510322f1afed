"""What FedFACT predicts after calibration, with its formulas written out."""

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

from clients.fedfact_post import Calibrate, Calibrated, joint_scores
from fedsim.fairness import costs, events
from fedsim.model import Model

GROUPS, CLASSES = 2, 3


def linear(blind=False):
    """A model of the label, or (blind) of group and label together, of five numbers."""
    generator = torch.Generator().manual_seed(1)
    module = nn.Linear(5, GROUPS * CLASSES if blind else CLASSES).double()
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return Model(module)


def batch(n=40, seed=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    return {"x": x, "a": torch.randint(GROUPS, (n,), generator=generator), "mask": torch.ones(n, dtype=torch.bool)}


def test_before_calibration_it_predicts_what_the_model_does():
    model = linear()
    examples = batch()
    rule = Calibrated(model, CLASSES, GROUPS)
    outputs = model.predict(model.params, examples)
    expected = one_hot(outputs.argmax(1), CLASSES).double()
    assert torch.equal(rule({"params": model.params}, {}, examples), expected)
    first = Calibrate(model=model, num_classes=CLASSES, num_groups=GROUPS).personal(torch.Generator())
    assert torch.equal(rule({"params": model.params, "cost": torch.zeros(2, 3, 3)}, first, examples), expected)


@pytest.mark.parametrize("blind", [False, True])
def test_what_a_decision_is_worth_is_the_score_less_its_cost(blind):
    model = linear(blind)
    examples = batch()
    generator = torch.Generator().manual_seed(4)
    at_large, own = torch.randn(2, GROUPS, CLASSES, CLASSES, generator=generator, dtype=torch.float64)
    outputs, worth = model.predict(model.params, examples).softmax(1), torch.zeros(40, CLASSES).double()
    for i in range(40):
        for a in range(GROUPS):
            weight = outputs[i].reshape(GROUPS, CLASSES)[a] if blind else outputs[i] * (examples["a"][i] == a)
            worth[i] += (torch.eye(CLASSES).double() - at_large[a] - own[a]).T @ weight
    if blind:
        del examples["a"]
    for randomised in (False, True):
        rule = Calibrated(model, CLASSES, GROUPS, randomised, 0.3)
        found = rule({"params": model.params, "cost": at_large}, {"cost": own}, examples)
        expected = (worth / 0.3).softmax(1) if randomised else one_hot(worth.argmax(1), CLASSES).double()
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_a_model_that_is_sure_of_the_group_is_one_that_is_told_it():
    model = linear()
    examples = batch()
    told = joint_scores(model, model.params, examples, GROUPS, CLASSES)
    sure = nn.Linear(5 + GROUPS, GROUPS * CLASSES).double()
    sure.weight.data.zero_()
    for a in range(GROUPS):
        rows = slice(CLASSES * a, CLASSES * (a + 1))
        sure.weight.data[rows, :5] = model.params["weight"]
        sure.weight.data[rows, 5 + a] = 2000.0
        sure.bias.data[rows] = model.params["bias"]
    blind = Model(sure)
    shown = {"x": torch.cat([examples["x"], one_hot(examples["a"], GROUPS).double()], 1)}
    torch.testing.assert_close(joint_scores(blind, blind.params, shown, GROUPS, CLASSES), told, rtol=1e-12, atol=1e-14)


def test_with_two_classes_parity_shifts_the_threshold_of_each_group():
    generator = torch.Generator().manual_seed(5)
    price = 0.3 * torch.randn(2, 2, generator=generator, dtype=torch.float64)
    module = nn.Linear(1, 2, bias=False).double()
    module.weight.data = torch.tensor([[0.0], [1.0]]).double()
    chance = torch.linspace(0.005, 0.995, 100, dtype=torch.float64).repeat(2)  # of label 1
    examples = {"x": torch.logit(chance)[:, None], "a": torch.arange(2).repeat_interleave(100)}
    cost = costs(events("demographic parity", 2), price)
    model = Model(module)
    found = Calibrated(model, 2, 2)({"params": model.params, "cost": cost}, {}, examples)[:, 1]
    threshold = (1 + price[:, 1] - price[:, 0]) / 2
    assert (threshold[0] - threshold[1]).abs() > 0.05 and ((threshold > 0.05) & (threshold < 0.95)).all()
    assert torch.equal(found == 1, chance > threshold[examples["a"]])


def test_a_model_with_another_number_of_outputs_is_refused():
    module = nn.Linear(5, 4).double()
    with pytest.raises(ValueError, match="the model has 4 outputs: must be num_classes = 3, or num_groups . num_class"):
        joint_scores(Model(module), Model(module).params, batch(), GROUPS, CLASSES)
