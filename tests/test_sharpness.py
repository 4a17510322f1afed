"""Sharpness: quadratics in closed form, rows of one norm, and what must not change it."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from fedsim import tree
from fedsim.data.dataset import Dataset
from fedsim.data.federation import Partition, divide
from fedsim.engines.local import Sequential, Vectorised
from fedsim.model import Model, squared_error
from fedsim.sharpness import MeanLoss, Surface, ascent, losses, random_direction, scattered
from fedsim.task import Cohort
from fedsim.testing import check_client, ragged

SIZES = (0, 1, 7, 20, 33, 2)
RADII = (0.0, 0.02, 0.1, 0.5, 3.0)


def surface(model, federation, engine=Sequential, ids=None, **settings):
    ids = list(range(federation.num_clients)) if ids is None else ids
    return Surface(engine(federation, losses(model, **settings), 3), Cohort(ids))


def bowl(size=4, seed=0):
    """A model whose loss over all examples is 1/2 w^T A w, cut into clients of 1, 4 and 3 examples; and A."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, size, generator=generator, dtype=torch.float64)
    columns = {"x": x, "y": torch.zeros(8, 1, dtype=torch.float64)}
    federation = divide(Dataset("bowl", columns), Partition(np.arange(8), np.array([0, 1, 5, 8])))
    module = nn.Linear(size, 1, bias=False).double()
    return Model(module, squared_error), federation, x.T @ x / 8


def at(*values):
    return {"params": {"weight": torch.tensor([values], dtype=torch.float64)}}


POINT = (0.3, -1.2, 0.7, 2.0)


# In closed form.


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
def test_uphill_a_quadratic_rises_by_its_gradient_and_its_curvature_in_that_direction(engine):
    model, federation, curvature = bowl()
    w = at(*POINT)["params"]["weight"][0]
    slope = curvature @ w
    up = slope / slope.norm()
    here = surface(model, federation, engine)
    assert here.loss(at(*POINT)) == pytest.approx(float(w @ curvature @ w) / 2, rel=1e-12)
    torch.testing.assert_close(here.gradient(at(*POINT))["weight"][0], slope, rtol=1e-12, atol=1e-14)
    expected = [float(rho * slope.norm() + rho**2 / 2 * (up @ curvature @ up)) for rho in RADII]
    assert ascent(here, at(*POINT), RADII).tolist() == pytest.approx(expected, rel=1e-10, abs=1e-13)


def test_in_a_random_direction_it_rises_by_the_curvature_there_and_by_the_slope():
    model, federation, curvature = bowl()
    w, steps = at(*POINT)["params"]["weight"][0], (-0.5, 0.1, 1.0)
    found = scattered(surface(model, federation), at(*POINT), steps, number=6, seed=2)
    directions = [random_direction(at(*POINT)["params"], 2, k)["weight"][0] for k in range(6)]
    for row, d in zip(found.each, directions, strict=True):
        expected = [float(t * (d @ curvature @ w) + t**2 / 2 * (d @ curvature @ d)) for t in steps]
        assert row.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(found.mean, found.each.sum(0) / 6)
    spread = ((found.each - found.mean) ** 2).sum(0) / 5
    torch.testing.assert_close(found.deviation, spread.sqrt())
    assert scattered(surface(model, federation), at(*POINT), steps, number=1).deviation.isnan().all()


def test_clients_weigh_as_much_as_they_have_examples(quadratics):
    model, federation = quadratics([[1.0, 1.0], [9.0, 1.0]], [[1.0, 0.0], [0.0, 0.0]])
    # Client 0 alone is left with its two examples twice over: it has 4 of the 6.
    rows, offsets = np.array([0, 1, 0, 1, 2, 3]), np.array([0, 4, 6])
    uneven = divide(Dataset("uneven", federation.columns), Partition(rows, offsets))
    losses_at = [(0.5 - 1) ** 2 / 2 + 0.25**2 / 2, 9 * 0.5**2 / 2 + 0.25**2 / 2]
    found = surface(model, uneven).loss(at(0.5, 0.25))
    assert found == pytest.approx((4 * losses_at[0] + 2 * losses_at[1]) / 6, rel=1e-12)


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
def test_who_does_not_move_does_not_rise(classification, engine):
    model, federation = classification(SIZES)
    here = surface(model, federation, engine)
    assert ascent(here, {"params": model.params}, [0.0]).tolist() == [0.0]
    assert not scattered(here, {"params": model.params}, [0.0], number=3).each.any()


def test_where_the_gradient_is_zero_there_is_no_way_uphill():
    model, federation, _ = bowl()
    assert ascent(surface(model, federation), at(0, 0, 0, 0), [0.1, 5.0]).tolist() == [0.0, 0.0]


# Against plain torch.


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
@pytest.mark.parametrize("batch_size", [3, 256])
def test_loss_and_gradient_are_those_of_all_examples_in_one_batch(classification, engine, batch_size):
    model, federation = classification(SIZES, torch.float64)
    here = surface(model, federation, engine, batch_size=batch_size)
    rows = torch.cat([federation.examples(k, "train")["x"] for k in range(len(SIZES))])
    labels = torch.cat([federation.examples(k, "train")["y"] for k in range(len(SIZES))])
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in model.params.items()}
    loss = nn.functional.cross_entropy(torch.func.functional_call(model.module, leaves, (rows,)), labels)
    loss.backward()
    assert here.loss({"params": model.params}) == pytest.approx(loss.item(), rel=1e-12)
    for name, leaf in here.gradient({"params": model.params}).items():
        torch.testing.assert_close(leaf, leaves[name].grad, rtol=1e-10, atol=1e-13)


# What must not change it.


def test_it_is_the_same_on_both_engines_in_blocks_of_any_size_and_in_any_order_of_clients(classification):
    model, federation = classification(SIZES, torch.float64)
    shared = {"params": model.params}
    first = surface(model, federation)
    expected = ascent(first, shared, RADII), scattered(first, shared, [0.1, 1.0], 3).each
    for block in (1, 2, None):
        for ids in ([0, 1, 2, 3, 4, 5], [4, 0, 5, 2, 1, 3]):
            other = Surface(Vectorised(federation, losses(model), 3, block), Cohort(ids))
            torch.testing.assert_close(ascent(other, shared, RADII), expected[0], rtol=1e-9, atol=1e-13)
            torch.testing.assert_close(scattered(other, shared, [0.1, 1.0], 3).each, expected[1], rtol=1e-9, atol=1e-13)
    some = surface(model, federation, ids=[2, 3])
    assert abs(some.loss(shared) - first.loss(shared)) > 1e-3, "but it is a matter of who is asked"


def relu(factor):
    """The same function for any factor: the first layer times it, the second divided by it."""
    module = nn.Sequential(nn.Linear(5, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False)).double()
    generator = torch.Generator().manual_seed(1)
    for parameter, scale in zip(module.parameters(), (factor, 1 / factor), strict=True):
        parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return Model(module)


def test_the_scale_of_layers_does_not_matter_for_random_directions_but_does_uphill(classification):
    _, federation = classification(SIZES, torch.float64)
    found = []
    for factor in (1.0, 8.0):
        model = relu(factor)
        here, shared = surface(model, federation), {"params": model.params}
        found.append((here.loss(shared), scattered(here, shared, [0.1, 1.0], 4).each, ascent(here, shared, [0.1])))
    (loss, random, up), (same, also, other) = found
    assert loss == pytest.approx(same, rel=1e-12)
    torch.testing.assert_close(also, random, rtol=1e-9, atol=1e-12)
    assert float(other) > 2 * float(up), "negative control: radii are measured in units of the parameters"


class Twin(nn.Module):
    """One number, and 50 (w + 1)^2 or (w - 1)^2 / 2, whichever is less: a sharp minimum and a flat one, both of 0."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))

    def forward(self, x):
        """The loss itself, for each example."""
        return torch.minimum(50 * (self.w + 1) ** 2, 0.5 * (self.w - 1) ** 2).expand(len(x), 1)


def test_a_sharp_minimum_and_a_flat_one_of_the_same_loss_are_told_apart():
    model = Model(Twin(), lambda outputs, targets: outputs[:, 0])
    columns = {"x": torch.zeros(4, 1, dtype=torch.float64), "y": torch.zeros(4)}
    here = surface(model, ragged(columns, (1, 3)))

    def shared(w):
        return {"params": {"w": torch.tensor([[w]], dtype=torch.float64)}}

    # A little beside each, where the loss is 0.005; by rho = 0.05 they rise to 50 * 0.06^2 and 0.15^2 / 2.
    sharp, flat = shared(-1 + 0.01), shared(1 - 0.1)
    assert here.loss(sharp) == pytest.approx(here.loss(flat), rel=1e-9) == pytest.approx(0.005, rel=1e-9)
    assert float(ascent(here, sharp, [0.05])) == pytest.approx(0.18 - 0.005, rel=1e-9)
    assert float(ascent(here, flat, [0.05])) == pytest.approx(0.01125 - 0.005, rel=1e-9)
    # At the minima themselves there is no slope, but a row of one number of size 1 moves by t either way.
    assert here.loss(shared(-1.0)) == here.loss(shared(1.0)) == 0
    found = [scattered(here, shared(w), [0.1], number=5) for w in (-1.0, 1.0)]
    assert found[0].each.flatten().tolist() == pytest.approx([0.5] * 5)
    assert found[1].each.flatten().tolist() == pytest.approx([0.005] * 5)


# Directions.


def parameters():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-3, 0.0]])
    filters = torch.randn(6, 3, 5, 5, generator=generator)
    return {"matrix": matrix, "filters": filters, "bias": torch.ones(7), "scale": torch.tensor(2.0)}


def test_each_row_of_a_direction_has_the_norm_of_the_parameters_row_and_biases_stay():
    params = parameters()
    direction = random_direction(params, seed=4)
    assert direction["matrix"].norm(dim=1).tolist() == pytest.approx([5.0, 0.0, 1e-3])
    assert direction["matrix"][1].tolist() == [0.0, 0.0]
    torch.testing.assert_close(direction["filters"].flatten(1).norm(dim=1), params["filters"].flatten(1).norm(dim=1))
    assert not direction["bias"].any() and not direction["scale"]
    column = random_direction({"w": torch.tensor([[2.0], [-3.0], [0.0]])}, seed=4)["w"]
    assert column.abs().flatten().tolist() == [2.0, 3.0, 0.0], "one number can only keep or change its sign"
    assert all(
        leaf.dtype == params[name].dtype and leaf.shape == params[name].shape for name, leaf in direction.items()
    )


def test_within_a_row_all_directions_are_as_likely():
    row = {"w": torch.tensor([[1.0, 2.0, 2.0]], dtype=torch.float64)}  # of norm 3
    drawn = torch.cat([random_direction(row, 0, number)["w"] for number in range(4000)])
    # Each coordinate has mean 0 and variance 3; products of two have mean 0. Four standard errors.
    assert drawn.mean(0).abs().max() < 4 * (3 / 4000) ** 0.5
    second = drawn.T @ drawn / 4000
    assert (second - 3 * torch.eye(3)).abs().max() < 4 * (9 / 4000) ** 0.5


def test_directions_are_a_matter_of_the_seed_and_their_number_alone():
    params = parameters()
    assert all(torch.equal(a, b) for a, b in zip(*(random_direction(params, 1, 2).values() for _ in "ab"), strict=True))
    turned = random_direction(dict(reversed(params.items())), 1, 2)
    assert all(torch.equal(leaf, turned[name]) for name, leaf in random_direction(params, 1, 2).items())
    for seed, number in ((2, 2), (1, 3)):
        assert not torch.equal(
            random_direction(params, seed, number)["matrix"], random_direction(params, 1, 2)["matrix"]
        )


def test_the_same_seed_gives_the_same_rises_and_more_directions_the_same_first_ones(classification):
    model, federation = classification(SIZES)
    here, shared = surface(model, federation), {"params": model.params}
    first = scattered(here, shared, [0.5, 1.0], number=3, seed=8)
    assert torch.equal(scattered(here, shared, [0.5, 1.0], number=3, seed=8).each, first.each)
    assert torch.equal(scattered(here, shared, [0.5, 1.0], number=5, seed=8).each[:3], first.each)
    assert not torch.equal(scattered(here, shared, [0.5, 1.0], number=3, seed=9).each, first.each)
    assert first.each.shape == (3, 2) and first.mean.shape == first.deviation.shape == (2,)


# The client.


@pytest.mark.parametrize("slope", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_keeps_the_promises_of_a_client(classification, slope, dtype):
    model, federation = classification(SIZES, dtype)
    check_client(MeanLoss(model=model, slope=slope, batch_size=4), {"params": model.params}, federation)


def test_dropout_is_off(classification):
    plain, federation = classification(SIZES)
    dropping, _ = classification(SIZES, dropout=0.5)
    names = dict(zip(dropping.params, plain.params, strict=True))
    assert all(torch.equal(dropping.params[name], plain.params[other]) for name, other in names.items())
    found = [surface(model, federation) for model in (plain, dropping)]
    assert found[0].loss({"params": plain.params}) == found[1].loss({"params": dropping.params})
    slopes = [
        list(here.gradient({"params": m.params}).values()) for here, m in zip(found, (plain, dropping), strict=True)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*slopes, strict=True))


def test_the_loss_is_that_of_the_part_that_is_asked_for(classification):
    model, _ = classification()
    columns = {"x": torch.randn(9, 5, generator=torch.Generator().manual_seed(0)), "y": torch.arange(9) % 3}
    federation = divide(Dataset("nine", columns), Partition(np.arange(9), np.array([0, 9])), test=1 / 3)
    rows = federation.examples(0, "test")
    expected = nn.functional.cross_entropy(model.module(rows["x"]), rows["y"])
    assert surface(model, federation, part="test").loss({"params": model.params}) == pytest.approx(expected.item())


# What goes wrong is told.


@dataclass(frozen=True, kw_only=True)
class Sulking(MeanLoss):
    def start(self, shared, personal, data):
        if len(data["y"]) == 7:
            raise OSError("seven is too many")
        return super().start(shared, personal, data)


def test_a_client_that_fails_is_named_rather_than_left_out(classification):
    model, federation = classification(SIZES)
    here = Surface(Sequential(federation, {"loss": Sulking(model=model)}, 3), Cohort(range(6)))
    with pytest.raises(RuntimeError, match=r"(?s)client 2 did not answer its loss: .*seven is too many"):
        here.loss({"params": model.params})


def test_without_any_example_there_is_no_loss(classification):
    model, federation = classification(SIZES)
    with pytest.raises(ValueError, match="none of the 1 clients has an example: there is no loss"):
        surface(model, federation, ids=[0]).loss({"params": model.params})
    with pytest.raises(ValueError, match="number must be >= 1, got 0"):
        scattered(surface(model, federation), {"params": model.params}, [0.1], number=0)


def test_a_negative_radius_is_refused_by_its_place_and_a_negative_step_is_another_direction():
    model, federation, _ = bowl()
    here = surface(model, federation)
    with pytest.raises(ValueError, match=r"radii\[1\] must be >= 0, got -0.1"):
        ascent(here, at(*POINT), [0.1, -0.1])
    there_and_back = scattered(here, at(*POINT), [-0.5, 0.0, 0.5], number=1).each[0]
    assert there_and_back[1] == 0 and there_and_back[0] != there_and_back[2]


@pytest.mark.parametrize("rises", [ascent, scattered])
def test_bare_parameters_are_told_from_what_clients_are_sent(rises):
    model, federation, _ = bowl()
    with pytest.raises(ValueError, match=r'shared must be {"params": the parameters, ...}, got the keys weight'):
        rises(surface(model, federation), at(*POINT)["params"], [0.1])


def test_what_is_sent_besides_the_parameters_stays_as_it_is(classification):
    model, federation = classification(SIZES)
    seen = []

    @dataclass(frozen=True, kw_only=True)
    class Looking(MeanLoss):
        def start(self, shared, personal, data):
            seen.append(shared["price"])
            return super().start(shared, personal, data)

    clients = {"loss": Looking(model=model), "gradient": Looking(model=model, slope=True)}
    here = Surface(Sequential(federation, clients, 3), Cohort([3]))
    price = torch.tensor([0.25])
    before = tree.clone(model.params)
    ascent(here, {"params": model.params, "price": price}, [0.5])
    assert len(seen) == 3 and all(torch.equal(one, price) for one in seen)
    assert all(torch.equal(leaf, before[name]) for name, leaf in model.params.items())
