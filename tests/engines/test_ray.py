"""Ray: the bits of the inner engine, on any number of workers, whatever becomes of them."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
import torch

import fedsim
from clients.scaffold import ControlledSgd
from clients.sgd import Sgd
from fedsim import Cohort, Sequential, Task, Vectorised, begin, rounds
from fedsim.engines.ray import Ray
from fedsim.engines.ray.carry import freeze, thaw
from fedsim.sampling import uniform
from fedsim.tree import Rows, flatten
from strategies.fedavg import FedAvg
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


@pytest.mark.parametrize("inner", [Sequential, Vectorised])
@pytest.mark.parametrize("method", ["fedavg", "scaffold", "stack"])
def test_any_number_of_workers_gives_the_bits_of_the_inner_engine(classification, inner, method):
    model, federation = classification(SIZES)
    strategy = {"fedavg": FedAvg(), "scaffold": Scaffold(num_clients=8), "stack": Stacking()}[method]
    make = ControlledSgd if method == "scaffold" else Sgd
    clients = {"train": make(model=model, lr=0.1, batch_size=4)}
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
        "rows": Rows(torch.tensor([1, -1]), torch.randn(2, 3), 7),
    }
    found = thaw(ray.get(ray.put(freeze(leaves))), copy)
    assert same(flatten(leaves), flatten(found))
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
import time
from dataclasses import dataclass
from clients.scaffold import ControlledSgd

@dataclass(frozen=True)
class Slow(ControlledSgd):
    def prepare(self, examples, rng):
        time.sleep(0.02)
        return examples
"""


def test_a_driver_killed_and_resumed_ends_with_the_bits_of_the_run_in_one_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plugin.py").write_text(PLUGIN)  # it reaches the workers by value
    (tmp_path / "slow.toml").write_text(EXPERIMENT)
    code = "import fedsim; fedsim.run('slow.toml')"
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
    alone = fedsim.run("slow.toml", changes=["engine={use='fedsim.engines.local:auto'}"])
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
assert "cost no client its reply" in (there.path / "report.html").read_text()
print("the same, on", len([node for node in cluster.list_all_nodes() if node.all_processes]), "nodes")
cluster.shutdown()
"""


def test_losing_one_of_two_nodes_in_the_middle_of_a_round_changes_nothing(tmp_path):
    (tmp_path / "plugin.py").write_text(PLUGIN)
    (tmp_path / "slow.toml").write_text(EXPERIMENT)
    run = [sys.executable, "-c", TWO_NODES]
    ran = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert "the same, on 2 nodes" in ran.stdout, ran.stderr[-3000:]  # the head, and the one that is left
