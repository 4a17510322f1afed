"""A model's gradient is autograd's wherever it is asked for, and what cannot be vectorised is refused by name."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedsim.model import Model, cross_entropy, gradient, mean, squared_error


class Tied(nn.Module):
    """Two layers that share one weight, and a third that nobody asks."""

    def __init__(self):
        super().__init__()
        self.inside, self.outside, self.idle = (nn.Linear(3, 3, bias=False) for _ in range(3))
        self.outside.weight = self.inside.weight

    def forward(self, x):
        return self.outside(torch.tanh(self.inside(x)))


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)).to(dtype)


def tied():
    torch.manual_seed(0)
    return Tied().double()


def batch(*clients, size=6, dtype=torch.float64):
    torch.manual_seed(1)
    mask = torch.rand(*clients, size) < 0.7
    return {"x": torch.randn(*clients, size, 3, dtype=dtype), "y": torch.randint(3, (*clients, size)), "mask": mask}


def by_autograd(module, examples):
    """(loss, gradients by name) of the examples under the mask, as anybody would get them in torch."""
    kept = examples["mask"]
    loss = functional.cross_entropy(module(examples["x"][kept]), examples["y"][kept])
    parameters = dict(module.named_parameters())
    parts = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
    return loss.detach(), dict(zip(parameters, parts, strict=True))


# Gradients


@pytest.mark.parametrize("build", [network, tied])
def test_the_gradient_is_that_of_autograd_on_the_examples_under_the_mask(build):
    module, examples = build(), batch()
    loss, gradients = Model(module).gradient(Model(module).params, examples)
    expected_loss, expected = by_autograd(module, examples)
    assert loss == pytest.approx(float(expected_loss), rel=1e-14)
    assert gradients.keys() == expected.keys()
    for name, part in expected.items():
        assert torch.allclose(gradients[name], part, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("build", [network, tied])
def test_inside_vmap_each_client_gets_the_gradient_that_it_gets_alone(build):
    model = Model(build())
    params = {name: leaf + torch.randn(4, *leaf.shape, dtype=leaf.dtype) for name, leaf in model.params.items()}
    examples = batch(4)
    together_loss, together = torch.func.vmap(model.gradient)(params, examples)
    for client in range(4):
        alone = model.gradient({k: v[client] for k, v in params.items()}, {k: v[client] for k, v in examples.items()})
        assert together_loss[client] == pytest.approx(float(alone[0]), rel=1e-13)
        for name, part in alone[1].items():
            assert torch.allclose(together[name][client], part, rtol=1e-11, atol=1e-14)


def test_a_parameter_that_nobody_uses_has_gradient_zero_inside_and_outside_vmap():
    model, examples = Model(tied()), batch()
    alone = model.gradient(model.params, examples)[1]["idle.weight"]
    inside = torch.func.vmap(lambda x: model.gradient(model.params, examples | {"x": x})[1])(examples["x"][None])
    assert torch.equal(alone, torch.zeros(3, 3, dtype=torch.float64))
    assert torch.equal(inside["idle.weight"][0], alone)


def test_a_weight_with_two_names_is_one_parameter_used_twice():
    model = Model(tied())
    assert sorted(model.params) == ["idle.weight", "inside.weight"]
    x = torch.randn(4, 3, dtype=torch.float64)
    weight = torch.randn(3, 3, dtype=torch.float64)
    outputs = model.outputs(model.params | {"inside.weight": weight}, {"x": x})
    assert torch.allclose(outputs, torch.tanh(x @ weight.T) @ weight.T)


def test_the_gradient_changes_nothing_and_hangs_on_nothing():
    model, examples = Model(network()), batch()
    before = {name: leaf.clone() for name, leaf in model.params.items()}
    loss, gradients = model.gradient(model.params, examples)
    assert not loss.requires_grad and not any(part.requires_grad for part in gradients.values())
    for name, leaf in model.params.items():
        assert torch.equal(leaf, before[name]) and leaf.grad is None and not leaf.requires_grad
    assert all(parameter.grad is None for parameter in model.module.parameters())


def test_a_gradient_is_found_even_where_autograd_is_switched_off():
    model, examples = Model(network()), batch()
    with torch.no_grad():
        _, without = model.gradient(model.params, examples)
    _, usual = model.gradient(model.params, examples)
    assert all(torch.equal(without[name], part) for name, part in usual.items())


def test_the_gradient_of_a_nested_tree_has_its_names():
    def loss(params, factor):
        return factor * (params["head"]["w"] * params["body"]).sum()

    head, body = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    value, parts = gradient(loss, {"body": body, "head": {"w": head}}, 2.0)
    assert float(value) == 2 * (1 * 3 + 2 * 5)
    assert torch.equal(parts["head"]["w"], 2 * body) and torch.equal(parts["body"], 2 * head)


def test_without_examples_the_loss_and_its_gradient_are_zero():
    model, examples = Model(network()), batch()
    loss, gradients = model.gradient(model.params, examples | {"mask": torch.zeros(6, dtype=torch.bool)})
    assert loss == 0 and not any(part.any() for part in gradients.values())
    empty = {name: column[:0] for name, column in examples.items()}
    assert model.loss(model.params, empty) == 0


# Losses


def test_losses_are_by_example():
    outputs, labels = torch.randn(5, 3), torch.randint(3, (5,))
    by_hand = torch.stack([row.exp().sum().log() - row[label] for row, label in zip(outputs, labels, strict=True)])
    assert torch.allclose(cross_entropy(outputs, labels), by_hand, atol=1e-6)
    targets = torch.randn(5, 3)
    assert torch.allclose(squared_error(outputs, targets), ((outputs - targets) ** 2).sum(1) / 2)


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 2), (5, 2, 3), (0, 2)])
def test_the_squared_error_takes_outputs_of_any_shape(shape):
    outputs, targets = torch.randn(shape), torch.randn(shape)
    by_hand = [float(((o - t) ** 2).sum() / 2) for o, t in zip(outputs, targets, strict=True)]
    assert squared_error(outputs, targets).tolist() == pytest.approx(by_hand)


def test_the_squared_error_compares_a_column_with_plain_numbers_example_by_example():
    outputs, targets = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1.0, 0.0, 1.0])
    assert squared_error(outputs, targets).tolist() == [0, 2**2 / 2, 3**2 / 2]
    with pytest.raises(ValueError, match=r"outputs of shape \(3, 2\) against targets of shape \(3,\)"):
        squared_error(torch.zeros(3, 2), targets)


def test_a_regression_reaches_the_least_squares_solution():
    torch.manual_seed(0)
    module = nn.Linear(3, 1, bias=False).double()
    model = Model(module, squared_error, target="rating")
    examples = {"x": torch.randn(20, 3, dtype=torch.float64), "rating": torch.randn(20, dtype=torch.float64)}
    solution = torch.linalg.lstsq(examples["x"], examples["rating"][:, None]).solution.T
    _, gradients = model.gradient({"weight": solution}, examples | {"mask": torch.ones(20, dtype=torch.bool)})
    assert gradients["weight"].abs().max() < 1e-14


def test_the_mean_counts_only_what_the_mask_holds_whatever_stands_elsewhere():
    values = torch.tensor([1.0, float("nan"), 5.0, float("inf")])
    assert mean(values, torch.tensor([True, False, True, False])) == (1 + 5) / 2
    assert mean(values, torch.zeros(4, dtype=torch.bool)) == 0


# What a model is


def test_parameters_are_copies_without_those_that_are_held_fixed():
    module = network()
    module[0].weight.requires_grad_(False)
    model = Model(module)
    assert "0.weight" not in model.params and "0.bias" in model.params
    model.params["0.bias"].add_(1)
    assert not torch.equal(model.params["0.bias"], module[0].bias)
    outputs = model.outputs(Model(module).params, batch())
    assert torch.equal(outputs, module(batch()["x"]))


def test_buffers_are_constants():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.register_buffer("shift", torch.full((3,), 7.0))

        def forward(self, x):
            return x * self.scale + self.shift

    model = Model(Shifted())
    assert list(model.params) == ["scale"]
    assert torch.equal(model.outputs(model.params, {"x": torch.ones(2, 3)}), torch.full((2, 3), 8.0))


def test_columns_may_have_other_names():
    model = Model(network(), inputs="pixels", target="digit")
    examples = batch()
    renamed = {"pixels": examples["x"], "digit": examples["y"], "mask": examples["mask"]}
    assert model.loss(model.params, renamed) == Model(network()).loss(model.params, examples)


@pytest.mark.parametrize(
    "module",
    [
        nn.BatchNorm1d(3),
        nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)),
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.BatchNorm2d(2))),
        nn.BatchNorm1d(3, affine=False),
        nn.InstanceNorm2d(3, track_running_stats=True),
    ],
)
def test_running_statistics_are_refused_with_the_place_and_what_to_use(module):
    name = next((name for name, part in module.named_modules() if "Norm" in type(part).__name__), "") or "itself"
    with pytest.raises(ValueError, match=rf"module {name} is \w+Norm\dd with running statistics.*use GroupNorm"):
        Model(module)


def test_batch_norm_is_refused_even_without_them_because_batches_are_padded():
    with pytest.raises(ValueError, match=r"module 1 is BatchNorm1d, which mixes.*use GroupNorm or LayerNorm"):
        Model(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)))


@pytest.mark.parametrize("norm", [nn.GroupNorm(1, 3), nn.LayerNorm(3), nn.InstanceNorm1d(3)])
def test_norms_of_one_example_are_welcome(norm):
    assert Model(nn.Sequential(nn.Linear(3, 3), norm)).module[1] is norm


# Dropout


@dataclass(frozen=True)
class Case:
    module: nn.Module
    draws: bool


@pytest.mark.parametrize(
    "case",
    [
        Case(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)), True),
        Case(nn.Sequential(nn.Linear(3, 3), nn.AlphaDropout(0.1)), True),
        Case(nn.LSTM(3, 3, num_layers=2, dropout=0.5), True),
        Case(nn.MultiheadAttention(4, 2, dropout=0.1), True),
        Case(nn.RReLU(), True),
        Case(nn.LSTM(3, 3), False),
        Case(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.0)), False),
        Case(network(), False),
    ],
    ids=str,
)
def test_a_model_knows_whether_it_draws(case):
    assert Model(case.module).stochastic is case.draws


def test_dropout_is_for_training_only():
    model = Model(nn.Sequential(nn.Dropout(0.5), nn.Flatten()))
    examples = {"x": torch.ones(1000, 3)}
    torch.manual_seed(0)
    trained = model.outputs({}, examples)
    assert set(trained.unique().tolist()) == {0.0, 2.0}
    assert abs(float((trained == 0).float().mean()) - 0.5) < 5 * 0.5 / 3000**0.5
    assert torch.equal(model.predict({}, examples), examples["x"])
    assert model.module.training, "predicting leaves the module as it was"


def test_a_loss_that_depends_on_no_parameter_has_a_gradient_of_zeros():
    params = {"w": torch.ones(2)}
    value, slope = gradient(lambda params, x: x.sum(), params, torch.ones(3))
    assert value == 3 and torch.equal(slope["w"], torch.zeros(2))
    _, slopes = torch.func.vmap(lambda x: gradient(lambda params, x: x.sum(), params, x))(torch.ones(4, 3))
    assert torch.equal(slopes["w"], torch.zeros(4, 2))


@pytest.mark.parametrize("way", ["outputs", "predict"])
def test_a_parameter_that_is_missing_is_told_and_not_taken_from_the_module(way):
    model = Model(network())
    params = dict(model.params)
    del params["0.bias"]
    with pytest.raises(ValueError, match=r"the model needs 0.bias, and is given only 0.weight"):
        getattr(model, way)(params, batch())
