"""On a GPU: the same batches and draws as on the CPU, memory within bounds, blocks as large as fit."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from clients.activations import MeasureActivations
from clients.forget import ForgetWhileTraining
from clients.forget_alone import ForgetAlone
from clients.scaffold import ControlledSgd
from clients.sgd import Sgd
from clients.weigh import Weigh
from fedsim import Cohort, Sequential, Task, Vectorised, begin, rounds, tree
from fedsim.data.dataset import Dataset
from fedsim.data.federation import divide
from fedsim.data.partition import iid
from fedsim.engines.device import confine, find, free, peak
from fedsim.engines.local import auto
from fedsim.evaluation import Evaluate
from fedsim.forgetting import at_hand
from fedsim.model import Model
from fedsim.personal import Personal
from fedsim.sampling import uniform
from strategies.fedavg import FedAvg

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
SIZES = (5, 1, 9, 20, 33, 2, 12, 7)


@pytest.fixture(autouse=True)
def exact():
    """Sums in full precision: what is compared is what is computed, not how roughly."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def run(engine, client, model, reduce):
    ids = list(range(8))
    zeros = tree.map(torch.zeros_like, model.params)
    task = Task("train", {"params": model.params, "control": zeros}, round=2, reduce=reduce)
    replies = engine.execute(task, Cohort(ids, Personal({"train": client}, 8, 0).gather(ids)))
    assert not replies.failed
    return tree.flatten({"update": replies.update, "personal": replies.personal, "metrics": replies.metrics})


@pytest.mark.parametrize("reduce", ["mean", "stack"])
@pytest.mark.parametrize("make", [Sequential, Vectorised])
def test_a_gpu_gives_what_the_cpu_gives(classification, make, reduce):
    model, federation = classification(SIZES)
    client = ControlledSgd(model=model, lr=0.1, batch_size=4, epochs=2)
    here = run(make(federation, {"train": client}, 1), client, model, reduce)
    there = run(make(federation, {"train": client}, 1, device="cuda"), client, model, reduce)
    assert here.keys() == there.keys()
    for name, leaf in here.items():
        assert there[name].device == torch.device("cpu")
        torch.testing.assert_close(there[name], leaf, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [Sequential, Vectorised])
@pytest.mark.parametrize("client", [ForgetWhileTraining, ForgetAlone, Weigh, MeasureActivations])
def test_a_gpu_forgets_what_the_cpu_forgets(classification, make, client):
    model, federation = classification(SIZES)
    labels = federation.columns["y"]
    federation = replace(federation, columns=federation.columns | {"target": (labels == 0).long()})
    classes = model.predict(model.params, {"x": federation.columns["x"][:1]}).shape[1]
    settings = {} if client in (Weigh, MeasureActivations) else {"lr": 0.1, "batch_size": 4, "memory": "mix"}
    shared = {"params": model.params, "before": model.params} | at_hand(1, 0)
    task = Task("forget", shared | {"gone": torch.arange(classes) == 0}, round=1, reduce="mean")
    found = []
    for device in ("cpu", "cuda"):
        engine = make(federation, {"forget": client(model=model, **settings)}, 1, device=device)
        replies = engine.execute(task, Cohort(range(8)))
        assert not replies.failed
        found.append(tree.flatten(replies.update))
    for name, leaf in found[0].items():
        torch.testing.assert_close(found[1][name], leaf, rtol=1e-4, atol=1e-5)


def images(clients, each):
    """A federation of random images."""
    generator = torch.Generator().manual_seed(0)
    size = clients * each
    x = torch.randn(size, 3, 12, 12, generator=generator)
    y = torch.randint(4, (size,), generator=generator)
    return divide(Dataset("images", {"x": x, "y": y}, names={"y": ("a", "b", "c", "d")}), iid({"x": x}, 0, clients))


def network(dropout=0.0):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(dropout), nn.Flatten(), nn.Linear(200, 4)]
    return Model(nn.Sequential(*layers))


@pytest.mark.parametrize("make", [Sequential, auto])
def test_a_convolution_is_trained_and_evaluated_as_on_the_cpu(make):
    federation, model = images(6, 20), network()
    clients = {
        "train": Sgd(model=model, lr=0.1, batch_size=5),
        "evaluate": Evaluate(model=model, num_classes=4, part="train"),
    }
    found = []
    for device in ("cpu", "cuda"):
        engine = make(federation, clients, 1, device=device)
        strategy = FedAvg()
        steps = rounds(strategy, engine, uniform(6, 1, count=4), begin(strategy, model.params, clients, 6, 1))
        for _ in range(3):
            step = next(steps)
        counts = engine.execute(Task("evaluate", step.snapshot.state, None, 3, "sum"), Cohort(list(range(6))))
        found.append((strategy.params(step.snapshot.state), counts.metrics["accuracy"].sum()))
    for name, leaf in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], leaf, rtol=1e-3, atol=1e-4)
    assert abs(int(found[0][1]) - int(found[1][1])) <= 2


def test_dropout_on_a_gpu_draws_the_same_in_every_run():
    federation, model = images(4, 10), network(0.5)
    task = Task("train", {"params": model.params}, round=1, reduce="mean")
    client = Sgd(model=model, lr=0.1, batch_size=5)
    for make in (Sequential, Vectorised):
        one, again = (
            make(federation, {"train": client}, 1, device="cuda").execute(task, Cohort([0, 1, 2])).update["params"]
            for _ in range(2)
        )
        other = make(federation, {"train": client}, 2, device="cuda").execute(task, Cohort([0, 1, 2])).update["params"]
        for name, leaf in one.items():
            torch.testing.assert_close(again[name], leaf, rtol=1e-5, atol=1e-6)
        assert any(not torch.allclose(leaf, other[name]) for name, leaf in one.items())


def test_memory_is_measured():
    device = find("cuda")
    assert peak(device, lambda: torch.empty(2**20, dtype=torch.uint8, device=device)) >= 2**20
    assert peak(device, lambda: None) == 0
    before = free(device)
    held = torch.empty(2**28, dtype=torch.uint8, device=device)
    assert before - free(device) >= 2**28
    del held


def test_a_process_is_bound_to_its_share():
    device = find("cuda")
    total = torch.cuda.mem_get_info(device)[1]
    confine(device, 0.1)
    try:
        assert free(device) <= 0.1 * total
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(int(0.2 * total), dtype=torch.uint8, device=device)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def test_a_block_is_as_large_as_what_was_measured_allows():
    federation, model = images(64, 20), network()
    task = Task("train", {"params": model.params}, round=1, reduce="mean")
    engine = Vectorised(federation, {"train": Sgd(model=model, lr=0.1, batch_size=5)}, device="cuda")
    device = find("cuda")
    plenty = engine.width(engine.receive(task), 20, 0)
    assert plenty > 64  # a GPU has gigabytes, and a client takes some hundred kilobytes
    own = peak(device, lambda: engine._trial(task, 0, 16))
    try:
        torch.cuda.set_per_process_memory_fraction(
            (torch.cuda.memory_allocated(device) + 1.5 * own) / torch.cuda.mem_get_info(device)[1], device
        )
        tight = Vectorised(federation, {"train": Sgd(model=model, lr=0.1, batch_size=5)}, device="cuda")
        assert 4 <= tight.width(tight.receive(task), 20, 0) <= 32
        replies = tight.execute(task, Cohort(list(range(64))))
        assert len(replies.ids) == 64 and not replies.failed
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
@pytest.mark.filterwarnings("ignore:unclosed file .*/dev/null:ResourceWarning")
@pytest.mark.parametrize("inner", ["sequential", "vectorised"])
def test_workers_with_shares_of_a_gpu_give_the_same_bits_however_many_they_are(inner):
    ray = pytest.importorskip("ray")
    from fedsim.engines.ray import Ray

    federation, model = images(8, 20), network()
    task = Task("train", {"params": model.params}, round=1, reduce="mean")
    found = []
    for workers in (1, 2, 4):
        client = Sgd(model=model, lr=0.1, batch_size=5)
        with Ray(federation, {"train": client}, 1, workers=workers, gpus=0.25, inner=inner) as engine:
            replies = engine.execute(task, Cohort(list(range(8))))
            assert not replies.failed and not replies.incidents
            found.append(replies.update["params"])
    assert not ray.is_initialized()
    for other in found[1:]:
        assert all(torch.equal(leaf, other[name]) for name, leaf in found[0].items())
