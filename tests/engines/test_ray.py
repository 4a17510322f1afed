"""Ray: the bits of the inner engine, on any number of workers, whatever becomes of them."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import flwr
import numpy as np
import pytest
import ray
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

import fedsim
import fedsim.flower
from clients.forget import ForgetWhileTraining
from clients.retained import Retained
from clients.scaffold import ControlledSgd
from clients.sgd import Sgd
from clients.weigh import Weigh
from fedsim import Cohort, Sequential, Task, Vectorised, begin, rounds
from fedsim.engines.ray import Ray
from fedsim.engines.ray.carry import freeze, thaw
from fedsim.engines.ray.crew import Lost
from fedsim.evaluation import Evaluate
from fedsim.sampling import uniform
from fedsim.tree import Rows, flatten
from strategies.fedavg import FedAvg
from strategies.forget import Forget
from strategies.scaffold import Scaffold

pytestmark = [
    pytest.mark.slow,  # a Ray takes seconds to start
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),  # Ray's daemons, till the end
    pytest.mark.filterwarnings("ignore:unclosed file .*/dev/null:ResourceWarning"),  # theirs, too
]
SIZES = (5, 1, 9, 20, 33, 2, 12, 7)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One Ray for all of these tests; engines use it as it is."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def final(strategy, engine, clients, federation, model, number=4, kill=None):
    """State and personal trees after some rounds; `kill` is called before each."""
    start = begin(strategy, model.params, clients, federation.num_clients, 3)
    with engine:
        for step in rounds(strategy, engine, uniform(federation.num_clients, 3, fraction=0.75), start):
            if kill:
                kill(engine, step.snapshot.round)
            assert not step.failed
            if step.snapshot.round == number:
                return flatten(step.snapshot.state) | step.snapshot.personal.flat()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(leaf, other[name]) for name, leaf in one.items())


@pytest.mark.parametrize(
    ("method", "inner"),
    [
        ("fedavg", Sequential),
        ("scaffold", Sequential),
        ("stack", Sequential),
        ("scaffold", Vectorised),
        ("forget", Sequential),
        ("forget", Vectorised),
    ],
)
def test_any_number_of_workers_gives_the_bits_of_the_inner_engine(classification, method, inner):
    model, federation = classification(SIZES)
    forget = Forget(num_clients=8, training=1, forgetting=1, repairing=1, remember="importance")
    made = {"fedavg": FedAvg(), "scaffold": Scaffold(num_clients=8), "stack": Stacking(), "forget": forget}
    strategy, make = made[method], ControlledSgd if method == "scaffold" else Sgd
    clients = {"train": make(model=model, lr=0.1, batch_size=4), "weigh": Weigh(model=model)}
    clients["forget"] = ForgetWhileTraining(model=model, lr=0.1, batch_size=4, memory="mix", strength=1.0)
    clients["repair"] = Retained(client=clients["train"])
    federation = replace(federation, columns=federation.columns | {"target": federation.columns["a"]})
    here = final(strategy, inner(federation, clients, 3), clients, federation, model)
    for workers in (1, 2, 3):
        engine = Ray(federation, clients, 3, workers=workers, cpus=0.5, inner=inner.__name__.lower())
        assert same(here, final(strategy, engine, clients, federation, model)), workers
    other = final(strategy, inner(federation, clients, 4), clients, federation, model)
    assert not same(here, other)


class Stacking(FedAvg):
    """FedAvg that is given every client's model."""

    def configure(self, state, round):
        return super().configure(state, round)._replace(reduce="stack")

    def aggregate(self, state, task, replies):
        share = replies.weight.float() / replies.weight.float().sum()
        return {"params": {n: torch.tensordot(share, p, 1) for n, p in replies.update["params"].items()}}, {}


def test_a_worker_killed_in_every_round_changes_nothing(classification):
    model, federation = classification(SIZES)
    clients = {"train": ControlledSgd(model=model, lr=0.1, batch_size=4)}
    strategy = Scaffold(num_clients=8)
    here = final(strategy, Sequential(federation, clients, 3), clients, federation, model, 10)
    killed = []

    def kill(engine, number):
        process = ray.get(engine.crew.members[number % 2].handle.ready.remote())
        os.kill(process, signal.SIGKILL)
        killed.append(process)

    engine = Ray(federation, clients, 3, workers=2, inner="sequential")
    assert same(here, final(strategy, engine, clients, federation, model, 10, kill))
    assert len(set(killed)) == 10


@dataclass(frozen=True, kw_only=True)
class Odd(Sgd):
    """Does something odd on the clients with 20 and 33 examples."""

    deed: str = "die"

    def finish(self, shared, state, data):
        reply = super().finish(shared, state, data)
        if self.deed == "nan" and len(data["mask"]) == 20:
            return reply._replace(update={"params": {n: p * float("nan") for n, p in reply.update["params"].items()}})
        if len(data["mask"]) == 20:
            if self.deed == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.deed == "hang":
                time.sleep(3600)
            if self.deed == "raise":
                raise ArithmeticError("client 3 cannot")
        return reply


@pytest.mark.parametrize(
    ("deed", "reason"),
    [("die", "3 workers died of it"), ("hang", "not done after 2 s"), ("raise", "client 3 cannot"), ("nan", "NaN")],
)
def test_a_client_that_ends_its_worker_costs_itself_alone(classification, deed, reason):
    model, federation = classification(SIZES)
    deadline = 2.0 if deed == "hang" else None
    with Ray(federation, {"train": Odd(model=model, lr=0.1, deed=deed)}, 3, inner="sequential", deadline=deadline) as e:
        found = e.execute(Task("train", {"params": model.params}, round=1, reduce="mean"), Cohort(list(range(8))))
    assert found.failed.keys() == {3} and reason in found.failed[3]
    others = [client for client in range(8) if client != 3]
    here = Sequential(federation, {"train": Sgd(model=model, lr=0.1)}, 3)
    expected = here.execute(Task("train", {"params": model.params}, round=1, reduce="mean"), Cohort(others))
    assert found.ids == others
    for name, leaf in expected.update["params"].items():
        torch.testing.assert_close(found.update["params"][name], leaf, rtol=1e-5, atol=1e-6)


def test_work_of_others_is_spread_over_the_workers(classification):
    _, federation = classification(SIZES)
    with Ray(federation, {}, 3, workers=2) as engine:
        found = list(engine.map(square, 10, range(7)))
    assert found[:3] == [10, 11, 14] and isinstance(found[3], ValueError) and found[4:] == [26, 35, 46]


def square(shared, item):
    if item == 3:
        raise ValueError("three")
    return shared + item * item


def test_too_many_workers_are_refused_with_what_there_is(classification):
    _, federation = classification(SIZES)
    with pytest.raises(RuntimeError, match="no room for 3 workers with 4 CPUs and 0 GPUs each.*enough for 2"):
        Ray(federation, {}, workers=3, cpus=4).start()
    with pytest.raises(RuntimeError, match="0.25 GPUs each.*0 GPUs"):
        Ray(federation, {}, workers=1, gpus=0.25).start()


@pytest.mark.parametrize("copy", [True, False])
def test_tensors_arrive_as_they_were(copy):
    leaves = {
        "a": torch.randn(3, 2).to(torch.bfloat16),
        "b": {"c": torch.tensor(True), "d": torch.zeros(0, 3, dtype=torch.int64)},
        "bare": {"twig": {}},
        "rows": Rows(torch.tensor([1, -1]), torch.randn(2, 3), 7),
    }
    found = thaw(ray.get(ray.put(freeze(leaves))), copy)
    assert same(flatten(leaves), flatten(found))
    assert found["bare"] == {"twig": {}} and thaw(freeze({})) == {}
    assert all(leaf.dtype == flatten(found)[name].dtype for name, leaf in flatten(leaves).items())


EXPERIMENT = """
name = "scaffold"
seed = 3
rounds = 12
evaluate_every = 0
checkpoint_every = 1
[data]
use = "fedsim.data.datasets:digits"
[partition]
use = "fedsim.data.partition:iid"
clients = 12
[model]
use = "fedsim.networks:mlp"
hidden = [8]
[strategy]
use = "strategies.scaffold:Scaffold"
[clients.train]
use = "plugin.py:Slow"
lr = 0.1
[sample]
use = "fedsim.sampling:uniform"
fraction = 0.5
[engine]
use = "fedsim.engines.ray:Ray"
workers = 2
"""
PLUGIN = """
from dataclasses import dataclass
import torch
from clients.scaffold import ControlledSgd
from clients.sgd import Sgd
from strategies.fedavg import FedAvg
import pausing

class Pausing:
    def prepare(self, examples, rng):
        pausing.pause()
        return examples

@dataclass(frozen=True)
class Slow(Pausing, ControlledSgd):
    pass

@dataclass(frozen=True)
class SlowSgd(Pausing, Sgd):
    pass

class Stacking(FedAvg):
    def configure(self, state, round):
        return super().configure(state, round)._replace(reduce="stack")

    def aggregate(self, state, task, replies):
        share = replies.weight.float() / replies.weight.float().sum()
        return {"params": {n: torch.tensordot(share, p, 1) for n, p in replies.update["params"].items()}}, {}
"""
OTHERS = {
    "scaffold": [],
    "fedavg": ["strategy={use='strategies.fedavg:FedAvg'}", "clients.train.use='plugin.py:SlowSgd'"],
    "stack": ["strategy={use='plugin.py:Stacking'}", "clients.train.use='plugin.py:SlowSgd'"],
}
BESIDE = """
import time

def pause():
    time.sleep(0.02)
"""


def write(folder):
    """An experiment, a plug-in, and what that imports; both reach the workers by value."""
    for name, text in {"slow.toml": EXPERIMENT, "plugin.py": PLUGIN, "pausing.py": BESIDE}.items():
        (folder / name).write_text(text)


@pytest.mark.parametrize("method", OTHERS)
def test_a_driver_killed_and_resumed_ends_with_the_bits_of_the_run_in_one_process(tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    code = f"import fedsim; fedsim.run('slow.toml', changes={OTHERS[method]!r})"
    driver = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    metrics = tmp_path / "runs" / "scaffold"
    deadline = time.monotonic() + 120
    while sum(len(path.read_text().splitlines()) for path in metrics.glob("*/metrics.jsonl")) < 4:
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    (path,) = metrics.iterdir()
    resumed = fedsim.resume(path)
    alone = fedsim.run("slow.toml", changes=[*OTHERS[method], "engine={use='fedsim.engines.local:auto'}"])
    assert [line["round"] for line in resumed.metrics] == list(range(1, 13))
    assert same(resumed.params, alone.params)
    assert {line["train/loss"] for line in resumed.metrics} == {line["train/loss"] for line in alone.metrics}


def marked(mark):
    """The processes that have this in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            found += [path.parent.name] if mark.encode() in path.read_bytes() else []
        except OSError:  # it has just ended
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_an_engine_of_its_own_cluster_leaves_no_process_behind(tmp_path):
    code = (
        "import sys, torch\n"
        "from fedsim.engines.ray import Ray\n"
        "from fedsim.testing import ragged\n"
        "with Ray(ragged({'x': torch.ones(70)}), {}, workers=1) as engine:\n"
        "    print(list(engine.map(max, 3, [1, 5])), flush=True)\n"
        "    sys.stdin.readline()\n"
        "print(engine.crew, flush=True)\n"
        "sys.stdin.readline()\n"
    )
    mark = f"FEDSIM_TEST_MARK={tmp_path}"
    settings = dict(os.environ) | dict([mark.split("=", 1)])
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], text=True, stdin=pipe, stdout=pipe, env=settings) as driver:
        assert driver.stdout.readline() == "[3, 5]\n"
        assert len(marked(mark)) > 3  # the driver, the worker, Ray's own
        driver.stdin.write("\n")
        driver.stdin.flush()
        assert driver.stdout.readline() == "None\n"
        deadline = time.monotonic() + 20
        while len(marked(mark)) > 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert marked(mark) == [str(driver.pid)]
        driver.stdin.write("\n")


TWO_NODES = """
import os, threading
for key, value in {"initial_delay_ms": 500, "period_ms": 300, "timeout_ms": 500, "failure_threshold": 3}.items():
    os.environ[f"RAY_health_check_{key}"] = str(value)
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
import torch
from ray.cluster_utils import Cluster
import fedsim
from fedsim.engines.ray import Ray
from fedsim.progress import Silent

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]

warned = []

class LosesANode(Silent):
    def __init__(self, *plan):
        pass
    def warn(self, told):
        warned.append(told)
    def show(self, metrics):
        assert metrics["failed"] == 0
        if metrics["round"] == 2:
            threading.Timer(0.05, cluster.remove_node, (nodes[1],), {"allow_graceful": False}).start()

def engine(federation, clients, seed):
    return Ray(federation, clients, seed, workers=2, address=cluster.address, inner="sequential")

there = fedsim.run("slow.toml", engine=engine, display=LosesANode)
here = fedsim.run("slow.toml", changes=["engine={use='fedsim.engines.local:Sequential'}"])
assert all(torch.equal(leaf, there.params[name]) for name, leaf in here.params.items())
assert any("a worker died" in told and "was replaced" in told for told in warned), warned
assert "a worker died" in (there.path / "failures.jsonl").read_text()
assert "cost no client its reply" in (there.path / "report" / "index.html").read_text()
print("the same, on", len([node for node in cluster.list_all_nodes() if node.all_processes]), "nodes")
cluster.shutdown()
"""


def test_losing_one_of_two_nodes_in_the_middle_of_a_round_changes_nothing(tmp_path):
    write(tmp_path)
    run = [sys.executable, "-c", TWO_NODES]
    ran = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert "the same, on 2 nodes" in ran.stdout, ran.stderr[-3000:]  # the head, and the one that is left


def meet(shared, item):
    """Notes how many are here at once; leaves when as many have come as are to meet."""
    folder, wanted = shared
    (folder / f"here-{item}").touch()
    deadline = time.monotonic() + 60
    while len(list(folder.glob("met-*"))) < wanted and time.monotonic() < deadline:
        here = len(list(folder.glob("here-*")))
        if here >= wanted:
            (folder / f"met-{item}").touch()
        time.sleep(0.01)
    most = len(list(folder.glob("here-*")))
    time.sleep(0.05)
    (folder / f"here-{item}").unlink()
    return most


@pytest.mark.parametrize("workers", [1, 3])
def test_as_many_run_at_once_as_there_are_workers(classification, tmp_path, workers):
    _, federation = classification(SIZES)
    with Ray(federation, {}, 3, workers=workers, cpus=0.5) as engine:
        found = list(engine.map(meet, (tmp_path, workers), range(9)))
    assert max(found) == workers


def test_two_tasks_of_one_round_are_told_apart(classification):
    model, federation = classification(SIZES)
    clients = {"train": Sgd(model=model, lr=0.1)}
    other = {name: leaf + 1 for name, leaf in model.params.items()}
    with Ray(federation, clients, 3, workers=1) as engine:
        for params in (model.params, other, model.params):
            task = Task("train", {"params": params}, reduce="mean")
            there, here = (each.execute(task, Cohort([1, 2])) for each in (engine, Vectorised(federation, clients, 3)))
            assert same(flatten(there.update), flatten(here.update))


def test_other_data_is_worked_on_by_the_same_workers(classification):
    model, federation = classification(SIZES)
    _, other = classification((700, 700, 3))
    client = Evaluate(model=model, num_classes=3, part="train")
    task = Task("evaluate", {"params": model.params}, round=1, reduce="sum")
    with Ray(federation, {"train": Sgd(model=model, lr=0.1)}, 3, workers=2, cpus=0.5) as engine:
        beside = engine.beside(other, {"evaluate": client}, 3)
        found = beside.execute(task, Cohort([0, 1, 2]))
        train = Task("train", {"params": model.params}, round=1, reduce="mean")
        assert len(engine.execute(train, Cohort(list(range(8)))).ids) == 8
        again = beside.execute(task, Cohort([0, 1, 2]))
    here = Sequential(other, {"evaluate": client}, 3).execute(task, Cohort([0, 1, 2]))
    for there in (found, again):
        assert same(flatten(there.update | there.metrics), flatten(here.update | here.metrics))
    assert int(here.metrics["examples"].sum()) == 1403


def test_what_a_worker_did_not_do_is_told(classification):
    model, federation = classification(SIZES)
    task = Task("train", {"params": model.params}, round=1, reduce="mean")
    with Ray(federation, {"train": Sgd(model=model, lr=0.1)}, 3, workers=1, inner="sequential") as engine:
        assert not engine.execute(task, Cohort(list(range(8)))).incidents
        os.kill(ray.get(engine.crew.members[0].handle.ready.remote()), signal.SIGKILL)
        found = engine.execute(task, Cohort(list(range(8))))
    assert len(found.ids) == 8 and not found.failed
    assert len(found.incidents) == 1 and "a worker died" in found.incidents[0] and "replaced" in found.incidents[0]


def test_a_cohort_is_cut_into_blocks_as_large_as_was_asked_for(classification):
    model, federation = classification(SIZES)
    clients, task = {"train": Sgd(model=model, lr=0.1)}, Task("train", {"params": model.params}, round=1, reduce="mean")
    engine = Ray(federation, clients, 3, workers=2, cpus=0.5, inner="vectorised", block=2)
    assert [len(places) for places in engine.main.local.blocks(task, range(8))] == [2, 2, 2, 2]
    with engine:
        there = engine.execute(task, Cohort(list(range(8))))
    here = Vectorised(federation, clients, 3, 2).execute(task, Cohort(list(range(8))))
    assert same(flatten(there.update), flatten(here.update))


def test_workers_are_asked_how_many_fit_where_they_have_gpus(classification):
    model, federation = classification(SIZES)
    task = Task("train", {"params": model.params}, round=1, reduce="mean")
    with Ray(federation, {"train": Sgd(model=model, lr=0.1)}, 3, workers=1, cpus=0.5, inner="vectorised") as engine:
        engine.main.policy = engine.main.policy._replace(gpus=0.5)  # they have none, and answer all the same
        os.kill(ray.get(engine.start().members[0].handle.ready.remote()), signal.SIGKILL)  # one dies meanwhile
        replies = engine.execute(task, Cohort(list(range(8))))
        assert replies.ids == list(range(8)) and engine.main.local.widths


def test_what_is_done_is_not_late_because_nobody_has_come_to_take_it(classification):
    _, federation = classification(SIZES)
    found = []
    with Ray(federation, {}, 3, workers=2, cpus=0.5) as engine:
        assert len(list(engine.map(square, 10, range(3)))) == 3  # modules are imported now
        engine.deadline = 1.0
        for answer in engine.map(square, 10, range(3)):
            found.append(answer)
            time.sleep(1.5)
    assert found == [10, 11, 14]


def test_a_task_after_one_that_raised_is_not_told_its_errors(classification):
    model, federation = classification(SIZES)
    clients = {"train": Sgd(model=model, lr=0.1), "wrong": Branching(model=model, lr=0.1)}
    shared = {"params": model.params}
    with Ray(federation, clients, 3, workers=2, cpus=0.5, inner="vectorised", block=2) as engine:
        with pytest.raises(TypeError, match="cannot be vectorised") as kept:
            engine.execute(Task("wrong", shared, round=1, reduce="mean"), Cohort(list(range(8))))
        replies = engine.execute(Task("train", shared, round=1, reduce="mean"), Cohort(list(range(8))))
    assert replies.ids == list(range(8)) and kept.tb is not None  # which holds what was under way


class Branching(Sgd):
    def step(self, state, batch):
        return super().step(state, batch) if batch["x"].sum() > 0 else state


def test_what_became_of_a_worker_takes_notes_as_any_exception_does():
    lost = Lost("it is gone")
    lost.add_note("The run is elsewhere.")
    assert str(lost) == "it is gone" and lost.__notes__ == ["The run is elsewhere."]


def test_a_worker_without_the_gpu_that_it_is_to_have_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    code = (
        "import ray, torch\n"
        "from fedsim.engines.ray import Ray\n"
        "from fedsim.testing import ragged\n"
        "ray.init(address='local', num_cpus=1, num_gpus=1, include_dashboard=False, log_to_driver=False)\n"
        "with Ray(ragged({'x': torch.ones(70)}), {}, workers=2, gpus=0.5, cpus=0.5) as engine:\n"
        "    try:\n"
        "        engine.start()\n"
        "    except RuntimeError as error:\n"
        "        print(error)\n"
        "assert ray.is_initialized()\n"  # it was not the engine's
        "ray.shutdown()\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert "a worker could not be started: ValueError: device = 'cuda': torch" in ran.stdout, ran.stderr[-2000:]


def held():
    """Resident memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_many_runs_in_one_process_leave_nothing_behind(classification):
    model, federation = classification(SIZES)
    clients = {"train": Sgd(model=model, lr=0.1)}
    params = {"params": model.params, "ballast": torch.zeros(2**20)}  # 4 MiB that every run puts
    sizes = []
    for _ in range(6):
        with Ray(federation, clients, 3, workers=1, cpus=0.5) as engine:
            for number in (1, 2):
                engine.execute(Task("train", params, round=number, reduce="mean"), Cohort(list(range(8))))
        deadline = time.monotonic() + 20
        while ray.available_resources().get("CPU") != 8 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert ray.available_resources()["CPU"] == 8  # no worker is left
        sizes.append(held())
    assert sizes[-1] - sizes[1] < 2 * 2**22  # less than one of the four runs had put


app = ClientApp()


@app.train()
def train(message, context):
    arrays = message.content["arrays"]
    number = context.node_config["partition-id"]
    moved = ArrayRecord([array.numpy() + number for array in arrays.values()])
    metrics = MetricRecord({"num-examples": 1 + number, "process": os.getpid()})
    return Message(RecordDict({"arrays": moved, "metrics": metrics}), reply_to=message)


def test_a_flower_app_runs_on_workers_with_the_same_bits():
    processes = set()

    def note(replies, weighted_by):
        processes.update(int(reply["metrics"]["process"]) for reply in replies)
        return MetricRecord({"replies": len(replies)})

    server = ServerApp()

    @server.main()
    def main(grid, context):
        strategy = flwr.serverapp.strategy.FedAvg(fraction_train=0.5, fraction_evaluate=0.0, train_metrics_aggr_fn=note)
        arrays = ArrayRecord([np.zeros(5, dtype=np.float32)])
        result = strategy.start(grid, initial_arrays=arrays, num_rounds=3)
        context.state["arrays"] = result.arrays

    def model(**settings):
        outcome = fedsim.flower.run(server, app, num_nodes=10, seed=3, **settings)
        assert not outcome.failed
        return outcome.context.state["arrays"].to_numpy_ndarrays()[0]

    here = model()
    assert processes == {os.getpid()}
    processes.clear()
    assert np.array_equal(here, model(engine=partial(Ray, workers=2, cpus=0.5)))
    assert len(processes) == 2 and os.getpid() not in processes
    assert here.any()
