"""The optimisers are those of torch, as pure functions."""

import copy

import pytest
import torch

from fedsim import tree
from fedsim.optim import PIECE, adam, overwrite, sgd
from fedsim.tree import Rows

STEPS = 60


def start(dtype):
    torch.manual_seed(0)
    return {"weight": torch.randn(4, 3).to(dtype), "bias": torch.randn(3).to(dtype)}


def slopes(dtype):
    """One gradient a step, of very different sizes; that of the bias is zero at first."""
    torch.manual_seed(1)
    return [
        {
            "weight": (10.0 ** (step % 5 - 2) * torch.randn(4, 3)).to(dtype),
            "bias": (step > 3) * torch.randn(3).to(dtype),
        }
        for step in range(STEPS)
    ]


def ours(optimiser, dtype):
    params = start(dtype)
    state = optimiser.init(params)
    for gradient in slopes(dtype):
        params, state = optimiser.update(gradient, state, params)
    return params


def torchs(kind, dtype, **arguments):
    params = {name: leaf.requires_grad_() for name, leaf in start(dtype).items()}
    optimiser = kind(params.values(), **arguments)
    for gradient in slopes(dtype):
        for name, leaf in params.items():
            leaf.grad = gradient[name].clone()
        optimiser.step()
    return {name: leaf.detach() for name, leaf in params.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_sgd_is_torchs_to_the_bit(dtype, momentum, weight_decay):
    mine = ours(sgd(0.1, momentum, weight_decay), dtype)
    reference = torchs(torch.optim.SGD, dtype, lr=0.1, momentum=momentum, weight_decay=weight_decay)
    assert all(torch.equal(mine[name], leaf) for name, leaf in reference.items())


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("arguments", [{}, {"weight_decay": 0.1}, {"beta1": 0.0, "beta2": 0.9}, {"epsilon": 1e-2}])
def test_adam_is_torchs_to_rounding(dtype, near, arguments):
    mine = ours(adam(0.01, **arguments), dtype)
    theirs = {
        "betas": (arguments.get("beta1", 0.9), arguments.get("beta2", 0.999)),
        "eps": arguments.get("epsilon", 1e-8),
        "weight_decay": arguments.get("weight_decay", 0.0),
    }
    reference = torchs(torch.optim.Adam, dtype, lr=0.01, **theirs)
    for name, leaf in reference.items():
        assert (mine[name] - leaf).abs().max() < near


def test_adams_first_step_is_the_learning_rate_against_the_sign_of_the_gradient():
    params = {"w": torch.zeros(4, dtype=torch.float64)}
    gradient = {"w": torch.tensor([1e-3, -5.0, 700.0, -1e5], dtype=torch.float64)}
    optimiser = adam(0.01, epsilon=1e-30)
    stepped, _ = optimiser.update(gradient, optimiser.init(params), params)
    assert torch.allclose(stepped["w"], -0.01 * gradient["w"].sign(), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adam_goes_on_counting_in_every_precision(dtype):
    params, optimiser = {"w": torch.zeros(1, dtype=dtype)}, adam(0.01)
    state = optimiser.init(params)
    for _ in range(300):
        params, state = optimiser.update({"w": torch.ones(1, dtype=dtype)}, state, params)
    assert int(state["steps"]) == 300
    assert params["w"].dtype == state["mean"]["w"].dtype == dtype


def test_plain_sgd_keeps_no_state():
    optimiser, params = sgd(0.5), start(torch.float32)
    assert optimiser.init(params) == {}
    stepped, state = optimiser.update(params, {}, params)
    assert state == {} and torch.equal(stepped["bias"], params["bias"] - 0.5 * params["bias"])


OPTIMISERS = {"sgd": sgd(0.1), "momentum": sgd(0.1, 0.9, 0.01), "adam": adam(0.1, weight_decay=0.01)}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_an_update_changes_none_of_its_arguments_and_gives_the_same_again(name):
    optimiser, params, gradient = OPTIMISERS[name], start(torch.float32), slopes(torch.float32)[9]
    state = optimiser.update(gradient, optimiser.init(params), params)[1]
    arguments = {"gradient": gradient, "state": state, "params": params}
    before = copy.deepcopy(tree.flatten(arguments))
    first, again = (optimiser.update(gradient, state, params) for _ in range(2))
    assert all(torch.equal(leaf, before[part]) for part, leaf in tree.flatten(arguments).items())
    results = [tree.flatten({"params": result[0], "state": result[1]}) for result in (first, again)]
    assert all(torch.equal(leaf, results[1][part]) for part, leaf in results[0].items())


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_state_keeps_its_names_shapes_and_types(name):
    optimiser, params = OPTIMISERS[name], start(torch.bfloat16) | {"scalar": torch.ones((), dtype=torch.bfloat16)}
    before = tree.flatten(optimiser.init(params))
    after = tree.flatten(optimiser.update(params, optimiser.init(params), params)[1])
    assert {part: (leaf.shape, leaf.dtype) for part, leaf in before.items()} == {
        part: (leaf.shape, leaf.dtype) for part, leaf in after.items()
    }


@pytest.mark.parametrize("name", OPTIMISERS)
def test_inside_vmap_each_client_steps_as_it_does_alone(name):
    def three_steps(params, gradient):
        state = OPTIMISERS[name].init(params)
        for _ in range(3):
            params, state = OPTIMISERS[name].update(gradient, state, params)
        return params

    clients = [(start(torch.float64), gradient) for gradient in slopes(torch.float64)[4:9]]
    together = torch.func.vmap(three_steps)(*(tree.stack(part) for part in zip(*clients, strict=True)))
    for client, (params, gradient) in enumerate(clients):
        alone = three_steps(params, gradient)
        assert all(torch.allclose(together[part][client], leaf, rtol=1e-13) for part, leaf in alone.items())


@pytest.mark.parametrize(
    ("build", "complaint"),
    [
        (lambda: sgd(0.0), "lr must be > 0, got 0.0"),
        (lambda: sgd(0.1, momentum=1.5), "momentum must be >= 0 and <= 1, got 1.5"),
        (lambda: sgd(0.1, weight_decay=-1), "weight_decay must be >= 0, got -1"),
        (lambda: adam(-0.1), "lr must be > 0, got -0.1"),
        (lambda: adam(0.1, beta1=1.0), "beta1 must be >= 0 and < 1, got 1.0"),
        (lambda: adam(0.1, beta2=1), "beta2 must be >= 0 and < 1, got 1"),
        (lambda: adam(0.1, epsilon=0), "epsilon must be > 0, got 0"),
    ],
)
def test_what_would_give_no_numbers_is_refused(build, complaint):
    with pytest.raises(ValueError, match=complaint):
        build()


# Writing over what is there.


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_written_over_the_numbers_are_the_same_to_the_bit_in_the_same_memory(name, dtype):
    torch.manual_seed(0)
    wide = PIECE // 3  # two rows at a time, and one that is left
    shapes = {"table": (5, wide), "vector": (7,), "scalar": (), "none": (0, 3)}
    params = {part: torch.randn(shape, dtype=dtype) for part, shape in shapes.items()}
    optimiser = OPTIMISERS[name]
    mine, state = tree.clone(params), optimiser.init(tree.clone(params))
    expected, kept = params, optimiser.init(params)
    places = {part: leaf.data_ptr() for part, leaf in mine.items()}
    for _ in range(3):
        gradient = {part: torch.randn(shape, dtype=dtype) for part, shape in shapes.items()}
        before = tree.clone(mine)
        state, moved = overwrite(optimiser, gradient, state, mine)
        expected, kept = optimiser.update(gradient, kept, expected)
        for part, leaf in tree.flatten({"params": expected, "state": kept}).items():
            assert torch.equal(tree.flatten({"params": mine, "state": state})[part], leaf), part
        for part, leaf in before.items():
            assert moved[part] == pytest.approx(float((mine[part] - leaf).double().norm()), rel=1e-5)
    assert {part: leaf.data_ptr() for part, leaf in mine.items()} == places


def test_written_over_with_rows_the_numbers_are_those_of_the_dense_gradient():
    torch.manual_seed(0)
    optimiser, wide = adam(0.1), PIECE // 2
    table = {"table": torch.randn(5, wide)}
    rows = Rows(torch.tensor([0, 2, 3]), torch.randn(3, wide), 5)
    found, expected = tree.clone(table), tree.clone(table)
    overwrite(optimiser, {"table": rows}, optimiser.init(found), found)
    overwrite(optimiser, {"table": rows.dense()}, optimiser.init(expected), expected)
    assert torch.equal(found["table"], expected["table"]) and not torch.equal(found["table"], table["table"])
    assert torch.equal(found["table"][[1, 4]], table["table"][[1, 4]])


@pytest.mark.parametrize(
    "index", [[2, 0, 3], [0, 2, 2], [-1, 0, 2], [0, 2, 5]], ids=["out of order", "twice", "padding", "beyond"]
)
def test_rows_that_are_not_merged_are_refused_before_anything_is_written(index):
    optimiser, params = adam(0.1), {"first": torch.ones(2), "table": torch.ones(5, 2)}
    gradient = {"first": torch.ones(2), "table": Rows(torch.tensor(index), torch.ones(3, 2), 5)}
    with pytest.raises(ValueError, match="table: the rows of a gradient must be merged, and of 5 there are"):
        overwrite(optimiser, gradient, optimiser.init(params), params)
    assert torch.equal(params["first"], torch.ones(2))
