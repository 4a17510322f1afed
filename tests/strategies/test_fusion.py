"""Fusion undoes what no network can tell, the order of hidden neurons, and is FedAvg where there is nothing to undo."""

from itertools import islice

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from clients.sgd import Sgd
from fedsim import tree
from fedsim.config import assemble, read
from fedsim.engines.local import Sequential
from fedsim.layers import chain
from fedsim.model import Model
from fedsim.networks import seeded
from fedsim.sampling import everyone
from fedsim.simulation import begin, rounds
from fedsim.task import Replies, Task
from fedsim.testing import check_strategy
from strategies.fedavg import FedAvg
from strategies.fusion import Fusion


class Written(nn.Module):
    """A network with a forward of its own, its parts made in another order than they are used in."""

    def __init__(self):
        super().__init__()
        self.out, self.hidden = nn.Linear(9, 3), nn.Linear(6 * 4, 9)
        self.second, self.first = nn.Conv2d(5, 6, 3, padding=1), nn.Conv2d(1, 5, 3, padding=1, bias=False)

    def forward(self, x):
        x = functional.max_pool2d(functional.relu(self.first(x)), 2)
        x = torch.tanh(self.second(x))
        x = torch.flatten(functional.avg_pool2d(x, 2), 1)
        return self.out(self.hidden(x).relu())


def convolutional(groups=1):
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3, padding=1), nn.GroupNorm(groups, 6), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 8, 3, padding=1), nn.LayerNorm((8, 4, 4)), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        *(nn.LayerNorm(32), nn.Linear(32, 10), nn.ReLU(), nn.Dropout(0.3), nn.Linear(10, 3)),
    )


def perceptron():
    hidden = [nn.Linear(64, 12), nn.LayerNorm(12), nn.ReLU(), nn.Linear(12, 7, bias=False), nn.Tanh()]
    return nn.Sequential(nn.Flatten(), nn.LayerNorm(64), *hidden, nn.Linear(7, 3))


# Each with the order of its hidden layers, and the parameters that a layer's neurons have rows of: written down here.
NETWORKS = {
    "two hidden layers": (
        perceptron,
        {
            "2.weight": (12, ["2.weight", "2.bias", "3.weight", "3.bias"], "5.weight"),
            "5.weight": (7, ["5.weight"], "7.weight"),
        },
    ),
    "convolutions and norms": (
        convolutional,
        {
            "0.weight": (6, ["0.weight", "0.bias", "1.weight", "1.bias"], "4.weight"),
            "4.weight": (8, ["4.weight", "4.bias", "5.weight", "5.bias", "9.weight", "9.bias"], "10.weight"),
            "10.weight": (10, ["10.weight", "10.bias"], "13.weight"),
        },
    ),
    "a forward of its own": (
        Written,
        {
            "first.weight": (5, ["first.weight"], "second.weight"),
            "second.weight": (6, ["second.weight", "second.bias"], "hidden.weight"),
            "hidden.weight": (9, ["hidden.weight", "hidden.bias"], "out.weight"),
        },
    ),
}
every_network = pytest.mark.parametrize(("build", "hidden"), NETWORKS.values(), ids=NETWORKS)
IMAGES = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def made(build, seed=0, dtype=torch.float32):
    """A model with norms that scale and shift, each neuron otherwise."""
    module = seeded(seed, build).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    return Model(module)


def permuted(params, hidden, seed):
    """The same network with its hidden neurons in another order, one slice after another."""
    result, generator = {name: leaf.clone() for name, leaf in params.items()}, torch.Generator().manual_seed(seed)
    for size, names, behind in hidden.values():
        order = torch.randperm(size, generator=generator).tolist()
        for name in names:
            step = len(result[name]) // size
            old = result[name].clone()
            for place, neuron in enumerate(order):
                result[name][place * step : (place + 1) * step] = old[neuron * step : (neuron + 1) * step]
        step = result[behind].shape[1] // size
        old = result[behind].clone()
        for place, neuron in enumerate(order):
            result[behind][:, place * step : (place + 1) * step] = old[:, neuron * step : (neuron + 1) * step]
    return result


def outputs(model, params):
    return functional_call(model.module.eval(), params, (IMAGES.to(next(iter(params.values())).dtype),))


def fuse(model, server, clients, weight):
    replies = Replies(list(range(len(clients))), torch.tensor(weight), {"params": tree.stack(clients)})
    strategy = Fusion(model)
    state, metrics = strategy.aggregate(strategy.init(server), Task("train", {"params": server}), replies)
    return state["params"], metrics


def assert_near(found, expected, near=1e-5):
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        torch.testing.assert_close(found[name], leaf, rtol=0, atol=near, msg=lambda text, name=name: name + text)


def distance(found, expected):
    return max(float((found[name] - leaf).abs().max()) for name, leaf in expected.items())


@every_network
def test_permuted_copies_of_the_network_give_the_network_and_their_plain_mean_does_not(build, hidden):
    model = made(build)
    server = model.params
    copies = [permuted(server, hidden, seed) for seed in (1, 2, 3)]
    assert all(distance(copy, server) > 0.1 for copy in copies)
    for copy in copies:
        torch.testing.assert_close(outputs(model, copy), outputs(model, server), rtol=0, atol=1e-5)
    for clients, weight in (([server, copies[0]], [1.0, 1.0]), (copies, [1.0, 5.0, 2.5])):
        fused, metrics = fuse(model, server, clients, weight)
        assert_near(fused, server)
        assert metrics["moved"] > 0.3
        mean = tree.weighted_mean(tree.stack(clients), torch.tensor(weight))
        assert distance(mean, server) > 0.05
        assert (outputs(model, mean) - outputs(model, server)).abs().max() > 0.01


@every_network
def test_what_a_client_computes_is_kept_whatever_the_server_has(build, hidden):
    model, other = made(build), made(build, seed=7)
    fused, _ = fuse(model, model.params, [other.params], [3.0])
    torch.testing.assert_close(outputs(model, fused), outputs(model, other.params), rtol=0, atol=1e-5)
    assert distance(fused, other.params) > 0.1
    for name, leaf in fused.items():  # the same numbers, in other places
        assert torch.equal(leaf.flatten().sort().values, other.params[name].flatten().sort().values)


@every_network
def test_it_is_fedavg_of_the_permuted_models(build, hidden):
    model = made(build, dtype=torch.float64)
    server, generator = model.params, torch.Generator().manual_seed(5)
    near = [
        tree.map(lambda p: p + 1e-3 * torch.randn(p.shape, generator=generator, dtype=p.dtype), server)
        for _ in range(3)
    ]
    weight = [1.0, 2.0, 4.0]
    expected = tree.weighted_mean(tree.stack(near), torch.tensor(weight, dtype=torch.float64))
    assert fuse(model, server, near, weight)[1] == {"moved": 0.0}
    assert_near(fuse(model, server, near, weight)[0], expected, 1e-15)
    moved = [permuted(client, hidden, seed) for seed, client in enumerate(near)]
    assert_near(fuse(model, server, moved, weight)[0], expected, 1e-15)
    back = fuse(model, server, moved[::-1], weight[::-1])[0]
    assert_near(back, expected, 1e-15)


def test_channels_stay_within_their_group():
    model = made(lambda: convolutional(groups=3))
    server = model.params
    within, across = [1, 0, 3, 2, 5, 4], [2, 1, 0, 3, 4, 5]
    for order, undone in ((within, True), (across, False)):
        client = dict(server)
        for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
            client[name] = client[name][order]
        client["4.weight"] = client["4.weight"][:, order]
        fused, _ = fuse(model, server, [client], [1.0])
        assert (distance(fused, server) < 1e-6) == undone
        torch.testing.assert_close(outputs(model, fused), outputs(model, client), rtol=0, atol=1e-5)


def test_who_has_no_examples_does_not_count_and_without_any_the_model_stays():
    model, other = made(perceptron), made(perceptron, seed=3)
    server = model.params
    assert_near(fuse(model, server, [server, other.params], [2.0, 0.0])[0], server, 0)
    assert_near(fuse(model, server, [other.params], [0.0])[0], server, 0)


@pytest.mark.parametrize("changes", [[], ["model={use='fedsim.networks:cnn', channels=[4, 6], hidden=16}"]])
def test_on_digits_clients_that_stay_near_give_fedavgs_model(changes):
    few = ["partition.clients=20", "clients.train.lr=0.02", "model.hidden=[32]", *changes]
    parts = assemble(*read("fedavg/digits", few))
    ends = []
    for strategy in (FedAvg(), Fusion(parts.model)):
        start = begin(strategy, parts.model.params, parts.clients, 20, 1)
        steps = list(islice(rounds(strategy, parts.engine, parts.sample, start), 4))
        ends.append(steps[-1].snapshot.state["params"])
    assert {step.metrics["moved"] for step in steps} == {0.0}
    assert distance(ends[0], parts.model.params) > 1e-2
    assert_near(ends[1], ends[0], 1e-6)


def test_it_keeps_the_promises_of_strategies(classification):
    model, federation = classification()
    client = {"train": Sgd(model=model, lr=0.1)}
    engine = Sequential(federation, client)
    snapshot = begin(Fusion(model), model.params, client, 6)
    assert next(rounds(Fusion(model), engine, everyone(6), snapshot)).answered == 6
    generator = torch.Generator().manual_seed(2)
    clients = [tree.map(lambda p: p + torch.randn(p.shape, generator=generator), model.params) for _ in range(2)]
    check_strategy(
        Fusion(model), model.params, Replies([0, 1], torch.tensor([1.0, 2.0]), {"params": tree.stack(clients)})
    )


# Networks that are no chain.


class Wired(nn.Module):
    """Two layers of 4 neurons, and a forward that is given."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b, self.run = nn.Linear(4, 4), nn.Linear(4, 4), forward

    def forward(self, x):
        return self.run(self, x)


def parametrized():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))


def tied():
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    network[2].weight = network[0].weight
    return network


def frozen():
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    network[0].bias.requires_grad_(False)
    return network


def behind(*parts):
    return lambda: nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *parts)


REFUSED = {
    "a connection that skips a layer": (lambda: Wired(lambda net, x: net.b(h := net.a(x)) + h), "add.* reads b, a"),
    "a layer that is used twice": (lambda: Wired(lambda net, x: net.a(net.a(x))), "a.weight is used twice"),
    "a layer that is not used": (lambda: Wired(lambda net, x: net.a(x)), "b.bias belongs to no layer"),
    "a branch": (lambda: Wired(lambda net, x: net.a(x) if x.sum() > 0 else net.b(x)), "cannot be traced"),
    "the network's own parameters": (lambda: nn.Linear(4, 2), "weight reads nothing before it"),
    "tied weights": (tied, "2.weight is not among the parameters to train"),
    "frozen parameters": (frozen, "0.bias is not among the parameters to train"),
    "a weight made of others": (parametrized, "0.parametrizations.weight.original0"),
    "a recurrent layer": (lambda: nn.Sequential(nn.LSTM(4, 4)), "0 holds 0.weight_ih_l0, and is neither"),
    "a slope for each neuron": (lambda: nn.Sequential(nn.Linear(4, 4), nn.PReLU(4)), "1 holds 1.weight"),
    "halves that gate each other": (lambda: nn.Sequential(nn.Linear(4, 4), nn.GLU()), r"1 \(glu\) may mix neurons"),
    "pooling over neurons": (lambda: nn.Sequential(nn.Linear(4, 4), nn.MaxPool1d(2)), r"1 \(maxpool1d\) may mix"),
    "another shape": (lambda: Wired(lambda net, x: net.b(net.a(x).view(-1, 2, 2))), r"view \(view\) may mix"),
    "flattened in part": (behind(nn.Flatten(2), nn.Linear(64, 3)), r"1 \(flatten\) may mix"),
    "not flattened": (behind(nn.Linear(8, 3)), r"1 has a 1.weight of shape \(3, 8\).* 4 neurons of 0.weight"),
    "groups of channels": (behind(nn.Conv2d(4, 4, 3, groups=2)), "1 is a convolution of 2 groups, whose 1.weight"),
    "a norm along rows": (behind(nn.LayerNorm(8)), r"1 norms \(8,\), not all 4 neurons of 0.weight"),
    "a norm of other channels": (
        behind(nn.Flatten(), nn.GroupNorm(1, 256)),
        "2 norms 256 channels, and 0.weight",
    ),
}


@pytest.mark.parametrize("which", REFUSED)
def test_a_network_that_is_no_chain_of_layers_is_refused(which):
    build, told = REFUSED[which]
    model = Model(build())
    with pytest.raises(ValueError, match=told):
        Fusion(model).init(model.params)


def test_a_parameter_of_another_network_is_named():
    model = made(perceptron)
    with pytest.raises(ValueError, match="running_mean belongs to no layer of its network"):
        Fusion(model).init(model.params | {"running_mean": torch.zeros(3)})


def test_one_layer_alone_has_nothing_to_match():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    assert [layer.hidden for layer in chain(network)] == [False, False]
    model = Model(network)
    other = tree.map(lambda leaf: leaf.flip(0), model.params)
    assert_near(fuse(model, model.params, [other], [1.0])[0], other, 0)
