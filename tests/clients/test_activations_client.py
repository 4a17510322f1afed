"""Activations by class: what hooks on the network would count, over what is left of a client's examples."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from clients.activations import MeasureActivations
from fedsim import tree
from fedsim.data.federation import Federation
from fedsim.engines.local import Sequential, Vectorised
from fedsim.layers import chain, hidden_outputs
from fedsim.method import averages
from fedsim.model import Model
from fedsim.networks import seeded
from fedsim.task import Cohort, Task
from fedsim.testing import check_client

SIZES = (20, 0, 1, 13)


class Written(nn.Module):
    """A network with a forward of its own, its parts made in another order than they are used in."""

    def __init__(self):
        super().__init__()
        self.out, self.inner = nn.Linear(9, 3), nn.ModuleDict({"second": nn.Linear(4 * 2 * 2, 9)})
        self.first = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, x):
        x = functional.max_pool2d(functional.gelu(self.first(x)), 2)
        x = functional.dropout(torch.flatten(x, 1), 0.5, self.training)
        return self.out(torch.tanh(self.inner["second"](x)))


def convolutional():
    return nn.Sequential(
        *(nn.Conv2d(1, 5, 3, padding=1), nn.GroupNorm(1, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(5, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5)),
        *(nn.Linear(24, 7), nn.ReLU(), nn.Linear(7, 3)),
    )


def perceptron():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 5), nn.Sigmoid(), nn.Linear(5, 3))


NETWORKS = {
    "a perceptron": (perceptron, ["1", "3"]),
    "convolutions": (convolutional, ["0", "4", "8"]),
    "a forward of its own": (Written, ["first", "inner.second"]),
}
every_network = pytest.mark.parametrize(("build", "hidden"), NETWORKS.values(), ids=NETWORKS)


def made(build, dtype=torch.float64):
    return Model(seeded(1, build).to(dtype))


def federation(dtype=torch.float64):
    """Clients with images of three labels, some of which two requests name."""
    generator = torch.Generator().manual_seed(0)
    size = sum(SIZES)
    columns = {
        "x": torch.randn(size, 1, 4, 4, generator=generator, dtype=dtype),
        "y": torch.randint(3, (size,), generator=generator),
        "target": torch.randint(3, (size,), generator=generator),
    }
    ends = np.cumsum(SIZES)
    return Federation(columns, np.arange(size), np.stack([ends - SIZES, ends, ends, ends], 1))


def shared(model, request=1, deleted=0):
    return {"params": model.params, "request": torch.tensor(request), "deleted": torch.tensor(deleted)}


def seen(module, hidden, x):
    """What the hidden layers give for one example, by hooks on the network: averaged over the image, by channel."""
    found = {}

    def keep(name):
        return lambda part, inputs, output: found.update({f"{name}.weight": output})

    handles = [module.get_submodule(name).register_forward_hook(keep(name)) for name in hidden]
    with torch.no_grad():
        module.eval()(x[None])
    for handle in handles:
        handle.remove()
    return {
        name: [float(np.mean([max(0.0, v) for v in channel.flatten().tolist()])) for channel in output[0]]
        for name, output in found.items()
    }


@every_network
@pytest.mark.parametrize("engine", [Sequential, Vectorised])
@pytest.mark.parametrize(("request_", "deleted"), [(1, 0), (2, 1), (2, 0), (2, 2)])
def test_the_sums_are_those_of_hooks_over_what_is_left_of_the_examples(build, hidden, engine, request_, deleted):
    model, fed = made(build), federation()
    client = MeasureActivations(model=model, batch_size=6)
    task = Task("measure", shared(model, request_, deleted), round=1, reduce="sum")
    replies = engine(fed, {"measure": client}, 3).execute(task, Cohort(range(len(SIZES))))
    assert not replies.failed
    expected = {f"{name}.weight": np.zeros((3, 0)) for name in hidden}
    examples, forgotten = np.zeros(3), np.zeros(3)
    for x, y, target in zip(*(fed.columns[name] for name in ("x", "y", "target")), strict=True):
        if 0 < target <= deleted:
            continue
        examples[y] += 1
        forgotten[y] += target > 0 and target <= request_
        for name, active in seen(model.module, hidden, x).items():
            if not expected[name].size:
                expected[name] = np.zeros((3, len(active)))
            expected[name][y] += active
    assert replies.update["examples"].tolist() == examples.tolist()
    assert replies.update["forgotten"].tolist() == forgotten.tolist()
    assert averages(replies)["forgotten"] == pytest.approx(forgotten.sum() / examples.sum())
    assert list(replies.update["sums"]) == list(expected)
    for name, sums in expected.items():
        np.testing.assert_allclose(replies.update["sums"][name], sums, rtol=1e-10, atol=1e-12)


@every_network
def test_clients_together_tell_what_one_that_had_all_their_examples_would_tell(build, hidden):
    model, fed = made(build), federation()
    client = MeasureActivations(model=model)
    whole = Federation(fed.columns, fed.rows, np.array([[0, *[sum(SIZES)] * 3]]))
    task = Task("measure", shared(model), round=1, reduce="sum")
    one = Sequential(whole, {"measure": client}, 3).execute(task, Cohort([0])).update
    several = Sequential(fed, {"measure": client}, 3).execute(task, Cohort(range(len(SIZES)))).update
    for name, leaf in tree.flatten(one).items():
        torch.testing.assert_close(leaf, tree.flatten(several)[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("build", [perceptron, convolutional, Written])
def test_it_keeps_the_promises_of_a_client(build):
    model = made(build, torch.float32)
    check_client(MeasureActivations(model=model, batch_size=6), shared(model), federation(torch.float32))


@every_network
def test_the_inner_network_has_the_parameters_of_the_whole_and_leaves_it_as_it_was(build, hidden):
    network = seeded(1, build)
    before = (str(network), network.training, {id(leaf) for leaf in network.parameters()})
    inner = hidden_outputs(network)
    assert (str(network), network.training, {id(leaf) for leaf in network.parameters()}) == before
    assert dict(inner.named_parameters()).keys() == dict(network.named_parameters()).keys()
    assert {id(leaf) for leaf in inner.parameters()} == before[2]
    names = [f"{name}.weight" for name in hidden]
    assert [layer.weight for layer in chain(network) if layer.hidden] == names
    outputs = inner(torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert [output.shape[1] for output in outputs] == [layer.neurons for layer in chain(network) if layer.hidden]


def test_a_network_that_is_no_chain_is_refused():
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x):
            x = x.flatten(1)
            return self.b(self.a(x) + x)

    model = Model(Skipping())
    engine = Sequential(federation(torch.float32), {"measure": MeasureActivations(model=model)}, 3)
    failed = engine.execute(Task("measure", shared(model), round=1), Cohort([0])).failed
    assert "the network is no chain of layers" in failed[0]
