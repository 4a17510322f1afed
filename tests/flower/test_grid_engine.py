"""The nodes of a Flower Grid as an engine: the same as our own loop, whoever fails, comes late or answers nonsense."""

import logging
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from clients.scaffold import ControlledSgd
from clients.sgd import Sgd
from fedsim import tree
from fedsim.engines.engine import Engine
from fedsim.engines.local import Sequential
from fedsim.evaluation import Evaluate, evaluate
from fedsim.flower import GridEngine, SimulationGrid, client_app, engine, run
from fedsim.flower.app import AppNodes
from fedsim.flower.codec import decode_task
from fedsim.flower.compat import Error
from fedsim.flower.node import KEPT, WHO
from fedsim.personal import Personal
from fedsim.sampling import everyone, uniform
from fedsim.simulation import begin, rounds
from fedsim.task import Cohort, Task
from strategies.fedavg import FedAvg
from strategies.scaffold import Scaffold

SIZES = (0, 1, 7, 20, 33, 2, 5)
N = len(SIZES)
SEED = 3


@dataclass(frozen=True)
class Picky(Sgd):
    """Refuses clients with two examples."""

    def prepare(self, examples, rng):
        if len(examples["y"]) == 2:
            raise OSError("nobody is there")
        return examples


class Wire(SimulationGrid):
    """A grid that keeps what was sent, shows some of its nodes, and changes, withholds or doubles replies."""

    def __init__(self, nodes, num_nodes, seed=SEED):
        super().__init__(nodes, num_nodes, seed)
        self.sent: list[Message] = []
        self.shown = list(self.node_ids)
        self.polls = 0
        self.change: Any = lambda node, reply: reply
        self.late: Any = lambda node: 0  # how often a reply is looked for in vain
        self.doubled = False
        self.waited: Counter[str] = Counter()

    def get_node_ids(self):
        return list(self.shown)

    def push_messages(self, messages):
        messages = list(messages)
        self.sent += messages
        return super().push_messages(messages)

    def pull_messages(self, message_ids):
        self.polls += 1
        places = {message.metadata.message_id: message.metadata.dst_node_id for message in self.sent}
        here = []
        for ident in message_ids:
            self.waited[ident] += 1
            if self.waited[ident] > self.late(places[ident]):
                here.append(ident)
        replies = [self.change(reply.metadata.src_node_id, reply) for reply in super().pull_messages(here)]
        return replies * 2 if self.doubled else replies

    def asked(self, kind=WHO):
        """The nodes that were sent messages of this type."""
        return [message.metadata.dst_node_id for message in self.sent if message.metadata.message_type == kind]


class Land:
    """Nodes of fedsim's own that hold the clients of a federation, and the same clients here."""

    def __init__(self, classification, num_nodes=N, client=Sgd, order=None, app=None, wire=Wire):
        self.model, self.federation = classification(SIZES)
        self.clients = {
            "train": client(model=self.model, lr=0.1, epochs=2, batch_size=8),
            "evaluate": Evaluate(model=self.model, num_classes=3, part="train", batch_size=16),
        }
        self.here = Sequential(self.federation, self.clients, SEED)
        self.app = app or client_app(self.federation, self.clients, SEED)
        self.nodes = Shuffled(AppNodes(self.app, num_nodes, {}, self.here, SEED), order or list(range(num_nodes)))
        self.wire = wire(self.nodes, num_nodes)
        self.there = GridEngine(self.wire, N, timeout=20.0, wait=20.0)

    def task(self, action="train", reduce="stack", number=1, **shared):
        return Task(action, {"params": self.model.params, **shared}, round=number, reduce=reduce)

    def node(self, partition):
        """The node of a partition."""
        return self.wire.node_ids[self.nodes.order.index(partition)]


class Shuffled:
    """Nodes of which that in place k has not the partition k, but another."""

    def __init__(self, nodes, order):
        self.nodes, self.order = nodes, order

    def answer(self, batch):
        return self.nodes.answer([(self.order[number], message) for number, message in batch])


@pytest.fixture
def land(classification, monkeypatch):
    monkeypatch.setattr(engine, "POLL_SECONDS", (0.001, 0.01))
    return lambda *args, **options: Land(classification, *args, **options)


def assert_equal(found, expected):
    found, expected = tree.flatten(found), tree.flatten(expected)
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        assert found[name].dtype == leaf.dtype
        assert torch.equal(found[name], leaf), name


def assert_near(found, expected, near=1e-6):
    found, expected = tree.flatten(found), tree.flatten(expected)
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        torch.testing.assert_close(found[name], leaf, rtol=near, atol=near)


def assert_same(found, expected, reduce="stack"):
    """What the nodes answered is what the clients here do; of sums the last bits depend on the order."""
    assert found.ids == expected.ids
    assert found.failed.keys() == expected.failed.keys()
    (assert_equal if reduce == "stack" else assert_near)(found.update, expected.update)
    assert torch.equal(found.weight, expected.weight)
    assert_equal(found.metrics, expected.metrics)


# The same as here.


every_number = pytest.mark.parametrize("num_nodes", [1, 2, 3, N - 1, N])
every_reduction = pytest.mark.parametrize("reduce", ["stack", "mean", "sum"])


@every_reduction
@every_number
def test_nodes_do_what_clients_do_here_however_many_there_are(land, num_nodes, reduce):
    one = land(num_nodes)
    for ids in (range(N), [5, 0, 3], [6]):
        task = one.task(reduce=reduce)
        found, expected = one.there.execute(task, Cohort(ids)), one.here.execute(task, Cohort(ids))
        assert_same(found, expected, reduce)
        assert found.traffic == expected.traffic
        moved = tree.map(lambda new, old: new - old, found.update["params"], one.model.params)
        assert float(tree.norm(moved)) > 0.01


def test_with_as_many_nodes_as_clients_a_mean_is_the_same_to_the_bit(land):
    one = land()
    task = one.task(reduce="mean")
    found, expected = (part.execute(task, Cohort(range(N))) for part in (one.there, one.here))
    assert_equal(found.update, expected.update)


@every_number
def test_client_k_runs_on_node_k_mod_n_and_nowhere_else(land, num_nodes):
    one = land(num_nodes)
    one.there.execute(one.task(), Cohort([5, 0, 3]))
    sent = [message for message in one.wire.sent if message.metadata.message_type == "train"]
    asked = {message.metadata.dst_node_id: decode_task(message.content, "train").ids for message in sent}
    expected = {}
    for client in (5, 0, 3):
        expected.setdefault(one.node(client % num_nodes), []).append(client)
    assert asked == expected


def test_all_nodes_are_sent_one_and_the_same_model(land):
    one = land(3)
    one.there.execute(one.task(), Cohort(range(N)))
    sent = [message.content["arrays"] for message in one.wire.sent if message.metadata.message_type == "train"]
    assert len(sent) == 3 and all(part is sent[0] for part in sent)


@every_number
def test_what_nodes_measure_is_what_is_measured_here(land, num_nodes):
    one = land(num_nodes)
    shared = {"params": one.model.params}
    found, expected = (evaluate(part, shared, Cohort(range(N)), 1) for part in (one.there, one.here))
    assert found.pooled == expected.pooled and found.pooled["examples"] == sum(SIZES)
    assert torch.equal(found.confusion, expected.confusion)
    assert {name: values.tolist()[1:] for name, values in found.clients.items()} == {
        name: values.tolist()[1:] for name, values in expected.clients.items()
    }


@pytest.mark.parametrize("order", [[3, 0, 6, 2, 5, 1, 4], [6, 5, 4, 3, 2, 1, 0]], ids=str)
def test_a_client_is_the_same_client_whatever_the_order_of_the_nodes_ids(land, order):
    one = land(order=order)
    found = one.there.execute(one.task(), Cohort(range(N)))
    assert_same(found, one.here.execute(one.task(), Cohort(range(N))))
    weights = dict(zip(found.ids, found.weight.tolist(), strict=True))
    assert weights == {client: float(size) for client, size in enumerate(SIZES)}
    assert one.there.places == {node: order[place] for place, node in enumerate(one.wire.node_ids)}


def loop(where, strategy, clients, model, sample=None, number=3):
    first = begin(strategy, model.params, clients, N, SEED)
    return list(islice(rounds(strategy, where, sample or everyone(N), first), number))


@every_number
@pytest.mark.parametrize("kind", ["fedavg", "scaffold"])
def test_rounds_over_nodes_are_those_of_our_own_loop(land, kind, num_nodes):
    one = land(num_nodes, client=Sgd if kind == "fedavg" else ControlledSgd)
    strategy = FedAvg(lr=0.9) if kind == "fedavg" else Scaffold(N)
    sample = uniform(N, SEED, count=4)
    found, expected = (loop(part, strategy, one.clients, one.model, sample, number=4) for part in (one.there, one.here))
    for step, ours in zip(found, expected, strict=True):
        assert_near(step.snapshot.state, ours.snapshot.state)
        assert step.metrics == pytest.approx(ours.metrics, rel=1e-6)
        assert step.answered == ours.answered == 4 and step.failed == {}
    assert float(tree.norm(found[0].snapshot.state["params"])) != float(tree.norm(found[3].snapshot.state["params"]))


@pytest.mark.parametrize("num_nodes", [3, N])
def test_what_clients_keep_stays_in_the_state_of_their_nodes(land, num_nodes):
    one = land(num_nodes, client=ControlledSgd)
    strategy = Scaffold(N)
    found, expected = (loop(part, strategy, one.clients, one.model) for part in (one.there, one.here))
    server, ours = found[-1].snapshot.personal, expected[-1].snapshot.personal
    assert server.flat() == {}, "nothing of it came to the server"
    assert not any("personal" in name for message in one.wire.sent for name in message.content)
    kept = {}
    for partition, context in one.nodes.nodes.contexts.items():
        assert set(context.state) == {KEPT}
        theirs = Personal(one.clients, N, SEED)
        record = context.state.array_records[KEPT]
        theirs.load({name: torch.from_numpy(array.numpy()) for name, array in record.items()})
        assert set(theirs.flat()["ids"].tolist()) == set(range(partition, N, num_nodes))
        kept |= {client: theirs.gather([client]) for client in range(partition, N, num_nodes)}
    for client in range(N):
        assert_near(kept[client], ours.gather([client]))
    assert float(tree.norm(kept[4])) > 0.01


def test_without_what_clients_keep_the_rounds_would_have_been_others(land):
    one = land(client=ControlledSgd)
    strategy = Scaffold(N)

    class Forgetful(Engine):
        def execute(self, task, cohort):
            for context in one.nodes.nodes.contexts.values():
                context.state = RecordDict()
            return one.there.execute(task, cohort)

    found, expected = (loop(part, strategy, one.clients, one.model) for part in (Forgetful(), one.here))
    apart = tree.map(torch.sub, found[-1].snapshot.state["params"], expected[-1].snapshot.state["params"])
    assert float(tree.norm(apart)) > 1e-3


@pytest.mark.parametrize("num_nodes", [2, N])
def test_it_is_an_engine_within_somebodys_server(land, num_nodes):
    one, got = land(num_nodes), []
    server = ServerApp()

    @server.main()
    def main(grid, context):
        with GridEngine(grid, N) as there:
            got.extend(loop(there, FedAvg(), one.clients, one.model))

    outcome = run(server, one.app, num_nodes=num_nodes, seed=SEED)
    assert outcome.failed == []
    expected = loop(one.here, FedAvg(), one.clients, one.model)
    assert_near(got[-1].snapshot.state, expected[-1].snapshot.state)


# Who the nodes are.


def test_each_node_is_asked_once_which_partition_it_is(land):
    one = land(3)
    for number in (1, 2, 3):
        one.there.execute(one.task(number=number), Cohort([number]))
    assert sorted(one.wire.asked()) == one.wire.node_ids
    assert len(one.wire.asked("train")) == 3


def test_nobody_is_asked_before_the_first_task(land):
    one = land(3)
    assert one.wire.sent == []
    assert repr(one.there) == "GridEngine()"


@pytest.mark.parametrize(("number", "timeout", "wait"), [(0, 1.0, 1.0), (3, 0.0, 1.0), (3, 1.0, 0.0), (3, -1.0, 1.0)])
def test_numbers_that_make_no_sense_are_refused(land, number, timeout, wait):
    with pytest.raises(ValueError, match=r"must be >=? [01]"):
        GridEngine(land(1).wire, number, timeout, wait)


def answers(node, place=None, **told):
    """Has a node say something else of itself."""

    def change(asked, reply):
        if asked != node or reply.metadata.message_type != WHO:
            return reply
        record = dict(reply.content["node"]) | told
        reply.content["node"] = MetricRecord({name: value for name, value in record.items() if value is not None})
        return reply

    return change


CONFUSED = {
    "two of one partition": ({"partition-id": 0}, r"nodes \d+ and \d+ both have the partition-id 0"),
    "another number of partitions": ({"num-partitions": 9}, "says that there are .* partitions, others say"),
    "more clients": ({"num-clients": N + 1}, f"knows {N + 1} clients, the server {N}"),
    "fewer clients": ({"num-clients": N - 1}, f"knows {N - 1} clients, the server {N}"),
    "clients unknown": ({"num-clients": None}, f"knows None clients, the server {N}"),
}


@pytest.mark.parametrize(("told", "reason"), CONFUSED.values(), ids=CONFUSED)
@pytest.mark.parametrize("partition", [1, 2])
def test_nodes_that_do_not_fit_together_end_the_run_with_a_clear_error(land, told, reason, partition):
    one = land(3)
    one.wire.change = answers(one.node(partition), **told)
    with pytest.raises(RuntimeError, match=reason):
        one.there.execute(one.task(), Cohort(range(N)))
    assert one.wire.asked("train") == []


MUTE = {
    "nothing": {"partition-id": None},
    "not of how many": {"num-partitions": None},
    "half a partition": {"partition-id": 0.5},
    "below zero": {"partition-id": -1},
    "beyond the last": {"partition-id": 3},
    "a list": {"partition-id": [1]},
}


@pytest.mark.parametrize("told", MUTE.values(), ids=MUTE)
def test_a_node_that_does_not_say_which_partition_it_is_takes_no_part(land, told, caplog):
    one = land(3)
    one.there.wait = 0.05
    one.wire.change = answers(one.node(1), **told)
    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match=r"partitions \[1\] are missing of 3"):
        one.there.execute(one.task(), Cohort(range(N)))
    assert f"node {one.node(1)} takes no part" in caplog.text
    assert len(one.wire.asked()) == 3, "it is not asked again"


def test_a_node_that_has_another_app_takes_no_part_and_says_why(land, caplog):
    app = ClientApp()
    one = land(2, app=app)
    one.there.wait = 0.05
    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match=r"waited 0\.05 s .*there are none"):
        one.there.execute(one.task(), Cohort(range(N)))
    assert "No query function registered with name 'fedsim'" in caplog.text


def test_where_there_are_no_nodes_the_run_ends_after_a_while(land):
    one = land(3)
    one.wire.shown, one.there.wait = [], 0.05
    with pytest.raises(RuntimeError, match=r"waited 0\.05 s for the nodes: there are none"):
        one.there.execute(one.task(), Cohort(range(N)))


class Arriving(Wire):
    """A grid whose nodes come one by one."""

    def get_node_ids(self):
        self.polls += 1
        return self.node_ids[: self.polls // 3]


def test_nodes_that_come_later_are_waited_for(land):
    one = land(3, wire=Arriving)
    found = one.there.execute(one.task(), Cohort(range(N)))
    assert_same(found, one.here.execute(one.task(), Cohort(range(N))))
    assert sorted(one.wire.asked()) == one.wire.node_ids


def test_nodes_that_come_too_late_are_named(land):
    one = land(3)
    one.there.wait = 0.05
    one.wire.shown = [one.node(0), one.node(2)]
    with pytest.raises(RuntimeError, match=r"partitions \[1\] are missing of 3"):
        one.there.execute(one.task(), Cohort(range(N)))


def test_a_node_that_goes_costs_its_clients_until_it_comes_back(land):
    one = land(3)
    task, everybody = one.task(), Cohort(range(N))
    one.there.execute(task, everybody)
    one.wire.shown = [one.node(0), one.node(2)]
    found = one.there.execute(task, everybody)
    lost = [client for client in range(N) if client % 3 == 1]
    assert found.failed == dict.fromkeys(lost, "the node of partition 1 is gone")
    rest = [client for client in range(N) if client % 3 != 1]
    assert_equal(found.update, one.here.execute(task, Cohort(rest)).update)
    one.wire.shown = list(one.wire.node_ids)
    assert_same(one.there.execute(task, everybody), one.here.execute(task, everybody))
    assert len(one.wire.asked()) == 3


def test_a_node_that_comes_back_under_another_id_is_found_again(land):
    one = land(4, order=[0, 1, 2, 1])  # the last is the second one, as it comes back
    one.nodes.nodes.num_nodes = 3
    task, everybody = one.task(), Cohort(range(N))
    one.wire.shown = one.wire.node_ids[:3]
    one.there.execute(task, everybody)
    one.wire.shown = [one.wire.node_ids[place] for place in (0, 2)]
    assert len(one.there.execute(task, everybody).failed) == 2
    one.wire.shown = [one.wire.node_ids[place] for place in (0, 2, 3)]
    assert_same(one.there.execute(task, everybody), one.here.execute(task, everybody))
    assert one.wire.asked() == [one.wire.node_ids[place] for place in (0, 1, 2, 3)]


def test_a_node_that_never_says_who_it_is_holds_up_the_run_once(land):
    one = land(4, order=[0, 1, 2, 1])
    one.nodes.nodes.num_nodes = 3
    one.there.wait = 0.2
    stranger = one.wire.node_ids[3]
    one.wire.late = lambda node: 10**9 if node == stranger else 0
    for number in (1, 2, 3):
        task = one.task(number=number)
        assert_same(one.there.execute(task, Cohort(range(N))), one.here.execute(task, Cohort(range(N))))
    assert one.wire.asked().count(stranger) == 1


def test_a_node_that_never_says_who_it_is_keeps_no_other_from_being_met(land):
    one = land(3, order=[0, 1, 0])
    one.nodes.nodes.num_nodes = 2
    first, second, stranger = one.wire.node_ids
    one.there.wait = 1.0
    one.wire.late = lambda node: 10**9 if node == stranger else 0
    looks = []

    def shown():
        looks.append(len(one.wire.sent))
        return [first, stranger] if len(looks) < 3 else [first, stranger, second]

    one.wire.get_node_ids = shown
    assert one.there.execute(one.task(), Cohort(range(N))).failed == {}


# Who fails.


@every_number
@every_reduction
def test_a_client_that_raises_costs_itself_alone(land, num_nodes, reduce):
    one = land(num_nodes, client=Picky)
    task = one.task(reduce=reduce)
    found, expected = (part.execute(task, Cohort(range(N))) for part in (one.there, one.here))
    assert_same(found, expected, reduce)
    assert list(found.failed) == [SIZES.index(2)]
    assert "OSError: nobody is there" in found.failed[SIZES.index(2)]


def spoiling(node, spoil, kind="train"):
    """Spoils the content of a node's replies of this type."""

    def change(asked, reply):
        if asked == node and reply.metadata.message_type == kind:
            spoil(reply.content)
        return reply

    return change


def test_a_node_that_fails_costs_its_clients_and_no_others(land):
    one = land(3)
    node = one.node(1)

    def burning(asked, reply):
        if asked != node or reply.metadata.message_type != "train":
            return reply
        sent = next(message for message in one.wire.sent[::-1] if message.metadata.dst_node_id == node)
        return Message(Error(12, "it caught fire"), reply_to=sent)

    one.wire.change = burning
    found = one.there.execute(one.task(), Cohort(range(N)))
    assert found.failed == {client: "partition 1: error 12: it caught fire" for client in (1, 4)}
    rest = [client for client in range(N) if client % 3 != 1]
    assert_equal(found.update, one.here.execute(one.task(), Cohort(rest)).update)


def array(values):
    return Array(torch.as_tensor(values).numpy())


def put(name, change):
    """Changes one of the arrays."""

    def spoil(content):
        content["replies"][name] = array(change(torch.from_numpy(content["replies"][name].numpy().copy())))

    return spoil


WEIGHT = "update/params/0.weight"
HOSTILE = {
    "nothing at all": (lambda content: [content.pop(name) for name in list(content)], "no reply of fedsim's"),
    "another app's": (lambda content: content.pop("fedsim"), "no reply of fedsim's"),
    "no replies": (lambda content: content.pop("replies"), "no reply of fedsim's"),
    "numbers for arrays": (
        lambda content: content.__setitem__("replies", MetricRecord({"x": 1})),
        "no reply of fedsim's",
    ),
    "another version": (lambda content: content["fedsim"].__setitem__("version", 99), "of version 99"),
    "somebody else's clients": (lambda content: content["fedsim"].__setitem__("ids", [0, 3]), "answers for clients"),
    "clients that nobody has": (lambda content: content["fedsim"].__setitem__("ids", [1, 400]), "answers for clients"),
    "a client twice": (lambda content: content["fedsim"].__setitem__("ids", [1, 1]), "answers for clients"),
    "one client too few": (lambda content: content["fedsim"].__setitem__("ids", [1]), "answers for clients"),
    "one client too many": (lambda content: content["fedsim"].__setitem__("ids", [1, 4, 5]), "answers for clients"),
    "clients that are no numbers": (
        lambda content: content["fedsim"].__setitem__("ids", ["1", "4"]),
        "must be a list of int",
    ),
    "too few rows": (put(WEIGHT, lambda leaf: leaf[:1]), "with leaves of"),
    "another shape": (put(WEIGHT, lambda leaf: leaf[:, :2]), "has shape"),
    "transposed": (put(WEIGHT, lambda leaf: leaf.transpose(1, 2).contiguous()), "has shape"),
    "a weight below zero": (put("weight", lambda leaf: -leaf), "weights must be numbers >= 0"),
    "an infinite weight": (put("weight", lambda leaf: leaf + torch.inf), "weights must be numbers >= 0"),
    "a weight that is no number": (put("weight", lambda leaf: leaf * torch.nan), "weights must be numbers >= 0"),
    "weights in a table": (put("weight", lambda leaf: leaf[:, None]), "weight"),
    "no weight": (lambda content: content["replies"].pop("weight"), "must hold weight"),
    "poisoned numbers": (put(WEIGHT, lambda leaf: leaf * torch.nan), "NaN or infinity"),
    "infinite numbers": (put(WEIGHT, lambda leaf: leaf + torch.inf), "NaN or infinity"),
    "no .npy": (
        lambda content: content["replies"].__setitem__("weight", Array("float64", (2,), "numpy.ndarray", b"ouch")),
        "not in .npy format",
    ),
    "a pickle": (
        lambda content: content["replies"].__setitem__("weight", Array("float64", (2,), "pickle", b"cos\nsystem\n.")),
        "npy",
    ),
    "a name that is no path": (
        lambda content: content["replies"].__setitem__("update/../x", array(torch.zeros(2))),
        "",
    ),
}


@every_reduction
@pytest.mark.parametrize(("spoil", "reason"), HOSTILE.values(), ids=HOSTILE)
def test_a_reply_that_is_wrong_costs_its_node_alone(land, spoil, reason, reduce):
    one = land(3)
    one.wire.change = spoiling(one.node(1), spoil)
    task = one.task(reduce=reduce)
    found = one.there.execute(task, Cohort(range(N)))
    rest = [client for client in range(N) if client % 3 != 1]
    assert found.ids == rest and sorted(found.failed) == [1, 4]
    assert all(reason in why and why for why in found.failed.values()), found.failed
    expected = one.here.execute(task, Cohort(rest))
    (assert_equal if reduce == "stack" else assert_near)(found.update, expected.update)
    one.wire.change = lambda node, reply: reply
    assert_same(one.there.execute(task, Cohort(range(N))), one.here.execute(task, Cohort(range(N))), reduce)


@pytest.mark.parametrize(("spoil", "reason"), HOSTILE.values(), ids=HOSTILE)
def test_a_reply_that_is_wrong_costs_its_node_alone_also_where_it_is_the_first(land, spoil, reason):
    one = land(3)

    def renamed(content):
        """As it is for node 1, with the clients of node 0."""
        spoil(content)
        about = content.get("fedsim", ConfigRecord())
        if "ids" in about and about["ids"] not in ([0, 3, 6], ["1", "4"]):
            about["ids"] = [client + 1 for client in about["ids"]]

    one.wire.change = spoiling(one.node(0), renamed)
    found = one.there.execute(one.task(), Cohort(range(N)))
    rest = [client for client in range(N) if client % 3]
    assert found.ids == rest, found.failed
    assert sorted(found.failed) == [0, 3, 6]


FORMS = {
    "a parameter too many": lambda content: content["replies"].__setitem__(
        "update/params/more", content["replies"]["update/params/0.bias"]
    ),
    "a parameter too few": lambda content: content["replies"].pop(WEIGHT),
    "a metric too many": lambda content: content["replies"].__setitem__("metrics/more", content["replies"]["weight"]),
}


@every_reduction
@pytest.mark.parametrize("spoil", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("partition", [1, 2])
def test_a_reply_in_a_form_of_its_own_costs_its_node_alone(land, spoil, reduce, partition):
    one = land(3)
    one.wire.change = spoiling(one.node(partition), spoil)
    task = one.task(reduce=reduce)
    found = one.there.execute(task, Cohort(range(N)))
    rest = [client for client in range(N) if client % 3 != partition]
    assert found.ids == rest, found.failed
    assert all("another form" in why for why in found.failed.values())
    (assert_equal if reduce == "stack" else assert_near)(found.update, one.here.execute(task, Cohort(rest)).update)


@pytest.mark.parametrize("spoil", FORMS.values(), ids=FORMS)
def test_a_reply_in_a_form_of_its_own_costs_its_node_alone_also_where_it_is_the_first(land, spoil):
    one = land(3)
    one.wire.change = spoiling(one.node(0), spoil)
    found = one.there.execute(one.task(), Cohort(range(N)))
    assert found.ids == [client for client in range(N) if client % 3], found.failed


# Who is late.


@every_reduction
def test_replies_that_come_one_after_the_other_give_the_same(land, reduce):
    one = land()
    task, everybody = one.task(reduce=reduce), Cohort(range(N))
    expected = one.here.execute(task, everybody)
    one.there.execute(task, everybody)
    for delays in ([0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0], [2, 0, 2, 0, 2, 0, 2]):
        one.wire.waited.clear()
        polls = one.wire.polls
        one.wire.late = lambda node, delays=delays: delays[one.wire.node_ids.index(node)]
        assert_same(one.there.execute(task, everybody), expected, reduce)
        assert one.wire.polls - polls == max(delays) + 1


def test_a_mean_is_folded_while_others_are_still_waited_for(land, monkeypatch):
    one = land()
    one.there.execute(one.task(), Cohort(range(N)))
    folded = []

    class Watching(engine.Gathering):
        def add_block(self, ids, replies):
            folded.append((one.wire.polls - polls, list(ids)))
            super().add_block(ids, replies)

    monkeypatch.setattr(engine, "Gathering", Watching)
    polls = one.wire.polls
    one.wire.late = lambda node: one.wire.node_ids.index(node) % 3
    one.there.execute(one.task(reduce="mean"), Cohort(range(N)))
    assert folded == [(1 + late, [client]) for late in range(3) for client in range(N) if client % 3 == late]


@every_reduction
def test_a_node_that_is_silent_costs_its_clients_when_the_time_is_up(land, reduce):
    one = land(3)
    task = one.task(reduce=reduce)
    one.there.execute(task, Cohort(range(N)))
    one.there.timeout = 0.1
    one.wire.late = lambda node: 10**9 if node == one.node(1) else 0
    found = one.there.execute(task, Cohort(range(N)))
    assert found.failed == dict.fromkeys([1, 4], "partition 1 did not answer within 0.1 s")
    rest = [client for client in range(N) if client % 3 != 1]
    expected = one.here.execute(task, Cohort(rest))
    assert found.ids == rest
    (assert_equal if reduce == "stack" else assert_near)(found.update, expected.update)
    one.wire.late = lambda node: 0
    assert one.there.execute(task, Cohort(range(N))).failed == {}, "it is asked again in the next round"


def test_an_answer_that_comes_in_the_next_round_is_not_taken_for_that_rounds(land):
    one = land(3)
    one.there.execute(one.task(), Cohort(range(N)))
    one.there.timeout = 0.05
    one.wire.late = lambda node: 10**9 if node == one.node(1) else 0
    one.there.execute(one.task(), Cohort(range(N)))
    one.wire.late = lambda node: 0
    one.there.timeout = 20.0
    moved = Task("train", {"params": tree.map(lambda leaf: leaf + 1, one.model.params)}, round=2)
    assert_same(one.there.execute(moved, Cohort(range(N))), one.here.execute(moved, Cohort(range(N))))


def test_where_all_are_silent_all_have_failed(land):
    one = land(3)
    one.there.execute(one.task(), Cohort(range(N)))
    one.there.timeout = 0.05
    one.wire.late = lambda node: 10**9
    found = one.there.execute(one.task(reduce="mean"), Cohort(range(N)))
    assert found.ids == [] and found.update == {} and sorted(found.failed) == list(range(N))


def test_a_message_is_not_worth_more_than_the_time_there_is_for_its_answer(land):
    one = land(3)
    one.there.execute(one.task(), Cohort(range(N)))
    ttl = {message.metadata.message_type: message.metadata.ttl for message in one.wire.sent}
    assert ttl == {WHO: one.there.wait, "train": one.there.timeout}


def test_a_reply_that_the_grid_gives_twice_counts_once(land):
    one = land(3)
    one.wire.doubled = True
    assert_same(one.there.execute(one.task(), Cohort(range(N))), one.here.execute(one.task(), Cohort(range(N))))


class Lossy(Wire):
    """A grid that does not take messages to one of its nodes, which has just gone."""

    lost = -1

    def push_messages(self, messages):
        messages = list(messages)
        taken = iter(super().push_messages([m for m in messages if m.metadata.dst_node_id != self.lost]))
        return [ident for m in messages if m.metadata.dst_node_id != self.lost for ident in [next(taken)]]


def test_a_node_that_is_gone_when_it_is_sent_a_task_costs_its_clients_and_is_not_waited_for(land):
    one = land(3, wire=Lossy)
    one.there.execute(one.task(), Cohort(range(N)))
    one.wire.lost = one.node(1)
    polls = one.wire.polls
    found = one.there.execute(one.task(), Cohort(range(N)))
    assert sorted(found.failed) == [1, 4]
    assert one.wire.polls - polls == 1


def test_nobody_is_asked_for_nothing(land):
    one = land(3)
    one.there.execute(one.task(), Cohort([0]))
    assert len(one.wire.asked("train")) == 1
    found = one.there.execute(one.task(), Cohort([]))
    assert found.ids == [] and found.failed == {} and len(one.wire.asked("train")) == 1


def test_the_grid_is_left_open_for_its_owner(land):
    one = land(2)
    with one.there as there:
        there.execute(one.task(), Cohort(range(N)))
    assert len(list(one.wire.send_and_receive([]))) == 0
    assert_same(one.there.execute(one.task(), Cohort([3])), one.here.execute(one.task(), Cohort([3])))


def test_an_array_record_holds_what_a_node_keeps_as_flower_knows_it(land):
    one = land(2, client=ControlledSgd)
    loop(one.there, Scaffold(N), one.clients, one.model, number=1)
    for context in one.nodes.nodes.contexts.values():
        assert isinstance(context.state[KEPT], ArrayRecord)
        assert sorted(context.state[KEPT]["ids"].numpy().tolist()) == sorted(
            range(context.node_config["partition-id"], N, 2)
        )
