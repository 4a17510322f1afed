"""Simulated nodes behind a Flower Grid: who they are, what becomes of messages, and fedsim's clients as such nodes."""

import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from clients.scaffold import ControlledSgd
from clients.sgd import Sgd
from fedsim import tree
from fedsim.engines.engine import Engine
from fedsim.engines.local import Sequential
from fedsim.evaluation import Evaluate
from fedsim.flower import ClientNodes, SimulationGrid, grid
from fedsim.flower.codec import OURS, decode_reply, encode_task
from fedsim.flower.compat import ErrorCode, ensure_identity
from fedsim.personal import Personal
from fedsim.task import Cohort, Task

SIZES = (0, 1, 7, 20, 33, 2)
N = len(SIZES)


class Echo:
    """Nodes that answer what they are asked, and keep by whom and in which batches they were."""

    def __init__(self, seconds=0.0):
        self.seconds = seconds
        self.batches = []
        self.done = []

    def answer(self, batch):
        self.batches.append([number for number, _ in batch])
        for number, message in batch:
            time.sleep(self.seconds)
            self.done.append((number, message.content["config"]["word"]))
            told = {"word": message.content["config"]["word"], "node": number}
            yield Message(RecordDict({"config": ConfigRecord(told)}), reply_to=message)


def said(word):
    return RecordDict({"config": ConfigRecord({"word": word})})


def messages(grid, word="hello", kind="query"):
    """One message to every node."""
    return [Message(said(word), node, kind) for node in grid.get_node_ids()]


def words(replies):
    return [(reply.content["config"]["node"], reply.content["config"]["word"]) for reply in replies]


# Who is there.


@pytest.mark.parametrize("number", [1, 2, 5, 1000])
def test_nodes_have_ids_of_their_own_in_ascending_order(number):
    found = list(SimulationGrid(Echo(), number, seed=3).get_node_ids())
    assert len(set(found)) == number
    assert found == sorted(found)
    assert all(type(node) is int and 0 < node < 2**63 for node in found), "Flower sends them as signed integers"


def test_no_id_could_be_taken_for_a_partition_id():
    assert min(SimulationGrid(Echo(), 1000, seed=3).get_node_ids()) > 1000


def test_the_same_seed_gives_the_same_ids_and_another_seed_others():
    one, same, other = (set(SimulationGrid(Echo(), 20, seed).get_node_ids()) for seed in (3, 3, 4))
    assert one == same
    assert not one & other


def test_the_ids_do_not_depend_on_what_was_drawn_before_nor_on_who_asks():
    grid = SimulationGrid(Echo(), 20, seed=3)
    first = grid.get_node_ids()
    torch.manual_seed(5)
    np.random.seed(5)
    assert grid.get_node_ids() == first == SimulationGrid(Echo(), 20, seed=3).get_node_ids()


def test_who_changes_the_list_of_nodes_changes_it_for_nobody_else():
    grid = SimulationGrid(Echo(), 3)
    grid.get_node_ids().clear()
    assert len(grid.get_node_ids()) == 3


@pytest.mark.parametrize(("number", "seed", "named"), [(0, 0, "num_nodes"), (-1, 0, "num_nodes"), (3, -1, "seed")])
def test_numbers_that_make_no_sense_are_refused(number, seed, named):
    with pytest.raises(ValueError, match=f"{named} must be >="):
        SimulationGrid(Echo(), number, seed)


def test_it_is_a_grid_of_flowers_with_a_run():
    grid = SimulationGrid(Echo(), 2, run_id=1)
    assert isinstance(grid, Grid)
    assert grid.run.run_id == 1
    other = grid.run
    other.run_id = 9
    assert grid.run.run_id == 1, "a copy is given"
    grid.set_run(other)
    assert grid.run.run_id == 9


# What becomes of messages.


def test_every_node_answers_what_it_was_asked_in_the_order_of_the_messages():
    grid = SimulationGrid(Echo(), 4)
    sent = [Message(said(f"word {place}"), node, "query") for place, node in enumerate(grid.get_node_ids())][::-1]
    replies = list(grid.send_and_receive(sent))
    assert words(replies) == [(number, f"word {number}") for number in (3, 2, 1, 0)]
    for message, reply in zip(sent, replies, strict=True):
        assert reply.metadata.reply_to_message_id == message.metadata.message_id
        assert reply.metadata.src_node_id == message.metadata.dst_node_id
        assert reply.metadata.dst_node_id == message.metadata.src_node_id


def test_every_message_and_every_reply_has_an_id_of_its_own():
    grid = SimulationGrid(Echo(), 3)
    sent = [messages(grid) for _ in range(3)]
    idents = [ident for part in sent for ident in grid.push_messages(part)]
    replies = list(grid.pull_messages(idents))
    everything = [message.metadata.message_id for message in [*sent[0], *sent[1], *sent[2], *replies]]
    assert len(set(everything)) == 18 and all(everything)


def test_a_message_is_carried_out_when_its_reply_is_asked_for_and_not_before():
    nodes = Echo()
    grid = SimulationGrid(nodes, 3)
    first, second, third = grid.push_messages(messages(grid))
    assert nodes.done == []
    assert words(grid.pull_messages([second])) == [(1, "hello")]
    assert nodes.done == [(1, "hello")]
    assert words(grid.pull_messages([third, first])) == [(2, "hello"), (0, "hello")]


def test_every_reply_is_given_once():
    grid = SimulationGrid(Echo(), 3)
    idents = list(grid.push_messages(messages(grid)))
    assert len(list(grid.pull_messages(idents))) == 3
    assert list(grid.pull_messages(idents)) == []


def test_a_reply_that_is_asked_for_twice_at_once_is_given_once():
    nodes = Echo()
    grid = SimulationGrid(nodes, 3)
    ident, *_ = grid.push_messages(messages(grid))
    assert words(grid.pull_messages([ident, ident])) == [(0, "hello")]
    assert nodes.done == [(0, "hello")]


def test_the_same_message_object_can_be_sent_again_once_it_is_answered():
    grid = SimulationGrid(Echo(), 1)
    message = messages(grid)[0]
    assert [words(grid.send_and_receive([message])) for _ in range(2)] == [[(0, "hello")]] * 2


def test_a_message_object_that_is_in_a_batch_twice_is_refused_or_answered_twice():
    nodes = Echo()
    grid = SimulationGrid(nodes, 1)
    message = messages(grid)[0]
    try:
        replies = list(grid.send_and_receive([message, message]))
    except ValueError:
        assert nodes.done == []
    else:
        assert words(replies) == [(0, "hello")] * 2
    grid.close()


def test_generators_of_messages_and_of_ids_are_taken():
    grid = SimulationGrid(Echo(), 3)
    idents = grid.push_messages(message for message in messages(grid))
    assert len(list(grid.pull_messages(ident for ident in idents))) == 3
    assert len(list(grid.send_and_receive(message for message in messages(grid)))) == 3


def test_nothing_to_send_is_answered_by_nothing():
    grid = SimulationGrid(Echo(), 3)
    assert list(grid.push_messages([])) == list(grid.pull_messages([])) == list(grid.send_and_receive([])) == []


def to_nobody(grid):
    return Message(said("lost"), max(grid.get_node_ids()) + 2, "query")


def to_a_partition_id(grid):
    return Message(said("lost"), 0, "query")


def a_reply(grid):
    asking = messages(grid)[0]
    asking.metadata.__dict__["_message_id"] = "message-1"
    reply = Message(said("lost"), reply_to=asking)
    reply.metadata.dst_node_id = asking.metadata.dst_node_id
    return reply


def an_empty_one(grid):
    message = messages(grid)[0]
    message.__dict__["_content"] = None
    return message


@pytest.mark.parametrize("wrong", [to_nobody, to_a_partition_id, a_reply, an_empty_one])
def test_a_message_to_nobody_or_that_is_none_is_refused_and_the_rest_of_its_batch_with_it(wrong):
    nodes = Echo()
    grid = SimulationGrid(nodes, 3)
    with pytest.raises(ValueError, match="there is no node|a message to a node has content and is no reply"):
        grid.push_messages([*messages(grid), wrong(grid)])
    with pytest.raises(ValueError, match="message-1"):
        grid.pull_messages(["message-1"])
    grid.close()
    assert nodes.done == []


def test_replies_to_messages_that_were_never_pushed_are_refused_and_cost_nobody_theirs():
    nodes = Echo()
    grid = SimulationGrid(nodes, 3)
    idents = list(grid.push_messages(messages(grid)))
    with pytest.raises(ValueError, match="no messages with the ids .*nonsense.* were pushed"):
        grid.pull_messages([*idents, "nonsense"])
    assert nodes.done == []
    assert len(list(grid.pull_messages(idents))) == 3


def test_what_nobody_pulls_is_carried_out_when_the_grid_is_closed():
    nodes = Echo()
    grid = SimulationGrid(nodes, 3)
    idents = list(grid.push_messages(messages(grid, "first")))
    grid.push_messages(messages(grid, "second"))
    grid.pull_messages(idents[1:2])
    grid.close()
    first, second = ([(number, word) for number in range(3)] for word in ("first", "second"))
    assert sorted(nodes.done) == sorted(first + second)
    assert [done for done in nodes.done if done[1] == "second"] == second
    grid.close()
    assert len(nodes.done) == 6, "once"


def test_what_was_carried_out_by_closing_can_still_be_pulled():
    grid = SimulationGrid(Echo(), 2)
    idents = list(grid.push_messages(messages(grid)))
    grid.close()
    assert len(list(grid.pull_messages(idents))) == 2


def test_messages_of_older_apps_are_made_by_the_grid():
    grid = SimulationGrid(Echo(), 2)
    node = grid.get_node_ids()[1]
    message = grid.create_message(said("hello"), "query", node, "5", ttl=3.0)
    assert (message.metadata.group_id, message.metadata.ttl, message.metadata.dst_node_id) == ("5", 3.0, node)
    assert words(grid.send_and_receive([message])) == [(1, "hello")]


# Time.


class Clock:
    """A clock that stands still until somebody works."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(grid.time, "monotonic", lambda: self.now)


class Working(Echo):
    """Nodes for which an answer takes three seconds."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def answer(self, batch):
        for reply in super().answer(batch):
            self.clock.now += 3
            yield reply


@pytest.mark.parametrize(("timeout", "answered"), [(0.0, 0), (1.0, 1), (3.0, 1), (3.1, 2), (8.0, 3), (100.0, 4)])
def test_those_answers_come_for_which_there_is_time_and_the_others_can_be_pulled_later(monkeypatch, timeout, answered):
    nodes = Working(Clock(monkeypatch))
    grid = SimulationGrid(nodes, 4)
    sent = messages(grid)
    early = words(grid.send_and_receive(sent, timeout=timeout))
    assert early == [(number, "hello") for number in range(answered)]
    assert len(nodes.done) == answered
    late = words(grid.pull_messages([message.metadata.message_id for message in sent]))
    assert late == [(number, "hello") for number in range(answered, 4)]
    assert len(nodes.done) == 4, "each of them once"


def test_without_a_timeout_everybody_is_waited_for(monkeypatch):
    grid = SimulationGrid(Working(Clock(monkeypatch)), 50)
    assert len(list(grid.send_and_receive(messages(grid)))) == 50


def test_what_there_was_no_time_for_is_not_carried_out_by_closing_as_what_nobody_asked_for_is(monkeypatch):
    nodes = Working(Clock(monkeypatch))
    grid = SimulationGrid(nodes, 4)
    grid.send_and_receive(messages(grid), timeout=1)
    grid.push_messages(messages(grid)[3:])
    grid.close()
    assert [number for number, _ in nodes.done] == [0, 3]


def test_a_timeout_counts_real_seconds():
    grid = SimulationGrid(Echo(seconds=0.1), 4)
    assert 1 <= len(list(grid.send_and_receive(messages(grid), timeout=0.25))) <= 3


# Several at once.


def in_threads(number, work):
    """Does the work in so many threads; what went wrong in one."""
    errors = []
    barrier = threading.Barrier(number)

    def guarded(place):
        try:
            barrier.wait(10)
            work(place)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(place,)) for place in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return errors


def test_threads_that_send_at_the_same_time_each_get_their_own_replies():
    nodes = Echo(seconds=0.001)
    grid = SimulationGrid(nodes, 8)
    got = {}

    def work(place):
        node = grid.node_ids[place % 8]
        for turn in range(5):
            message = Message(said(f"{place}, {turn}"), node, "query")
            got[place, turn] = words(grid.send_and_receive([message], timeout=None))

    assert in_threads(16, work) == []
    assert got == {(place, turn): [(place % 8, f"{place}, {turn}")] for place in range(16) for turn in range(5)}
    assert len(nodes.done) == len(set(nodes.done)) == 80


def test_threads_that_pull_the_same_messages_get_each_reply_once():
    nodes = Echo(seconds=0.001)
    grid = SimulationGrid(nodes, 20)
    idents = list(grid.push_messages(messages(grid)))
    got = []
    assert in_threads(6, lambda place: got.extend(grid.pull_messages(idents))) == []
    assert sorted(words(got)) == [(number, "hello") for number in range(20)]
    assert len(nodes.done) == 20


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(grid, "PATIENCE_CALLS", 3)
    monkeypatch.setattr(grid, "PATIENCE_SECONDS", 5.0)
    return Clock(monkeypatch)


def wait_for_nodes(here, clock, calls=20):
    for _ in range(calls):
        here.get_node_ids()
        clock.now += 1


def test_who_waits_for_more_nodes_than_there_are_is_told_so(impatient):
    here = SimulationGrid(Echo(), 3)
    with pytest.raises(RuntimeError, match="waits for more than the 3 nodes that there are: lower .*min_avail"):
        wait_for_nodes(here, impatient)
    assert impatient.now == 105, "five seconds after it was first asked"


def test_who_asks_often_in_a_short_time_does_not_wait(impatient):
    here = SimulationGrid(Echo(), 3)
    for _ in range(1000):
        here.get_node_ids()


def test_who_asks_seldom_does_not_wait(impatient):
    here = SimulationGrid(Echo(), 3)
    for _ in range(2):
        here.get_node_ids()
        impatient.now += 1000


def test_nobody_waits_as_long_as_messages_flow(impatient):
    here = SimulationGrid(Echo(), 3)
    for _ in range(20):
        wait_for_nodes(here, impatient, calls=3)
        here.send_and_receive(messages(here)[:1])
        impatient.now += 1000


def test_another_thread_that_watches_the_nodes_does_not_wait_for_more(impatient):
    here = SimulationGrid(Echo(), 3)
    assert in_threads(1, lambda place: wait_for_nodes(here, impatient)) == []
    assert impatient.now == 120


# Messages that are carried out together.


def test_messages_are_carried_out_together_where_content_and_type_are_the_same_and_no_node_has_two():
    ensure_identity()
    one, other = said("one"), said("other")

    def batch(*parts):
        return [(number, Message(content, number + 1, kind)) for number, content, kind in parts]

    def numbers(*parts):
        return [[number for number, _ in part] for part in grid.alike(batch(*parts))]

    assert numbers() == []
    assert numbers((0, one, "train"), (1, one, "train"), (2, one, "train")) == [[0, 1, 2]]
    assert numbers((0, one, "train"), (1, other, "train"), (2, one, "train")) == [[0], [1], [2]]
    assert numbers((0, one, "train"), (1, one, "evaluate"), (2, one, "evaluate")) == [[0], [1, 2]]
    assert numbers((0, one, "train"), (1, one, "train"), (0, one, "train"), (2, one, "train")) == [[0, 1], [0, 2]]
    assert numbers((0, one, "train"), (1, said("one"), "train")) == [[0], [1]], "equal, and yet not the same"


# Fedsim's clients as nodes.


class Counted(Engine):
    """An engine that keeps what it was asked to do."""

    def __init__(self, engine):
        self.engine = engine
        self.asked = []

    def execute(self, task, cohort):
        self.asked.append((task.action, task.round, list(cohort.ids)))
        return self.engine.execute(task, cohort)


@dataclass(frozen=True)
class Picky(Sgd):
    """Refuses clients with two examples."""

    def prepare(self, examples, rng):
        if len(examples["y"]) == 2:
            raise OSError("nobody is there")
        return examples


class Town:
    """Fedsim's clients behind a grid."""

    def __init__(self, classification, client=Sgd, **clients):
        self.model, self.federation = classification(SIZES)
        self.clients = {
            "train": client(model=self.model, lr=0.1, epochs=2, batch_size=8),
            "evaluate": Evaluate(model=self.model, num_classes=3, batch_size=16),
        }
        self.engine = Counted(Sequential(self.federation, self.clients, 3))
        self.personal = Personal(self.clients, N, 3)
        self.grid = SimulationGrid(ClientNodes(self.engine, self.personal), N, 3)

    def task(self, action="train", number=1, **shared):
        return Task(action, {"params": self.model.params, **shared}, round=number)

    def ask(self, task, numbers=range(N), kind=None):
        content = encode_task(task)
        return list(
            self.grid.send_and_receive(
                [Message(content, self.grid.node_ids[number], kind or task.action) for number in numbers]
            )
        )


def assert_equal(found, expected):
    found, expected = tree.flatten(found), tree.flatten(expected)
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        assert torch.equal(found[name], leaf), name


def test_messages_with_the_same_content_are_one_task(classification):
    town = Town(classification)
    town.ask(town.task(), [4, 2, 3])
    town.ask(town.task(number=2))
    assert town.engine.asked == [("train", 1, [4, 2, 3]), ("train", 2, list(range(N)))]


def test_every_content_is_a_task_of_its_own(classification):
    town = Town(classification)
    sent = [Message(encode_task(town.task(number=n)), town.grid.node_ids[n], "train") for n in (2, 3)]
    shared = encode_task(town.task(number=7))
    sent += [Message(shared, town.grid.node_ids[n], "train") for n in (4, 5)]
    assert not any(reply.has_error() for reply in town.grid.send_and_receive(sent))
    assert town.engine.asked == [("train", 2, [2]), ("train", 3, [3]), ("train", 7, [4, 5])]


def test_a_node_answers_what_its_client_does(classification):
    town = Town(classification)
    expected = town.engine.engine.execute(town.task(), Cohort([4, 2, 3]))
    replies = [decode_reply(reply.content) for reply in town.ask(town.task(), [4, 2, 3])]
    assert_equal(tree.stack([reply.update for reply in replies]), expected.update)
    assert torch.equal(torch.stack([reply.weight for reply in replies]), expected.weight)
    assert [float(reply.metrics["loss"]) for reply in replies] == expected.metrics["loss"].tolist()


def test_what_clients_keep_is_kept_between_rounds_and_is_in_no_message(classification):
    town = Town(classification, ControlledSgd)
    control = tree.map(torch.zeros_like, town.model.params)
    kept = Personal(town.clients, N, 3)
    for number, ids in enumerate(([2, 3, 4], [3, 5], [2, 3, 4]), 1):
        task = town.task(number=number, control=control)
        expected = town.engine.engine.execute(task, Cohort(ids, kept.gather(ids)))
        kept.scatter(expected.ids, expected.personal)
        replies = [decode_reply(reply.content) for reply in town.ask(task, ids)]
        assert_equal(tree.stack([reply.update for reply in replies]), expected.update)
        assert all(reply.update.keys() == {"params", "control"} and not reply.personal for reply in replies)
    assert_equal(town.personal.gather(range(N)), kept.gather(range(N)))
    assert float(tree.norm(town.personal.gather([3]))) > 0.01
    fresh = [decode_reply(reply.content) for reply in Town(classification, ControlledSgd).ask(task, ids)]
    forgetful = tree.stack([reply.update for reply in fresh])
    assert not torch.equal(forgetful["params"]["0.weight"], expected.update["params"]["0.weight"])


def test_a_client_that_raises_costs_its_own_node_and_the_reason_is_told(classification):
    town = Town(classification, Picky)
    replies = town.ask(town.task())
    assert [reply.has_error() for reply in replies] == [size == 2 for size in SIZES]
    wrong = replies[SIZES.index(2)]
    assert wrong.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert "OSError: nobody is there" in wrong.error.reason and "Traceback" in wrong.error.reason
    assert wrong.metadata.src_node_id == town.grid.node_ids[SIZES.index(2)]
    sound = decode_reply(replies[3].content)
    expected = town.engine.engine.execute(town.task(), Cohort([3]))
    assert_equal(tree.stack([sound.update]), expected.update)


UNANSWERABLE = {
    "an action that nobody is bound to": ("train.dance", lambda content: None, "no client is bound to the action"),
    "no model": ("train", lambda content: content.pop("arrays"), "must hold one ArrayRecord"),
    "no parameters": (
        "train",
        lambda content: content.__setitem__("arrays", ArrayRecord([np.zeros(3)])),
        "the model needs 0.bias",
    ),
    "another version": ("train", lambda content: content["config"].__setitem__(f"{OURS}version", 99), "version 99"),
}


@pytest.mark.parametrize(("kind", "spoil", "reason"), UNANSWERABLE.values(), ids=UNANSWERABLE)
def test_a_message_that_no_client_can_answer_is_answered_with_errors(classification, kind, spoil, reason):
    town = Town(classification)
    content = encode_task(town.task())
    if kind == "train.dance":
        del content["config"][f"{OURS}action"]
    spoil(content)
    sent = [Message(content, node, kind) for node in town.grid.node_ids[1:4]]
    replies = list(town.grid.send_and_receive(sent))
    assert [reply.has_error() for reply in replies] == [True] * 3
    for reply in replies:
        assert reason in reply.error.reason
    assert not any(reply.has_error() for reply in town.ask(town.task(), [1, 2, 3])), "the nodes are well afterwards"


def examined(classification):
    """A town whose clients have examples to test on, but for the first two."""
    town = Town(classification)
    counting = Evaluate(model=town.model, num_classes=3, part="train", batch_size=16)
    town.clients["evaluate"] = counting
    return town


def test_what_evaluating_clients_measure_becomes_means_that_are_weighted_by_examples(classification):
    town = examined(classification)
    numbers = [number for number, size in enumerate(SIZES) if size]
    sums = town.engine.engine.execute(town.task("evaluate"), Cohort(numbers)).metrics
    replies = [decode_reply(reply.content) for reply in town.ask(town.task("evaluate"), numbers)]
    for place, (number, reply) in enumerate(zip(numbers, replies, strict=True)):
        assert float(reply.weight) == SIZES[number]
        assert reply.metrics.keys() == {"loss", "accuracy"} and reply.update == {}
        for name in ("loss", "accuracy"):
            assert float(reply.metrics[name]) == pytest.approx(float(sums[name][place]) / SIZES[number], rel=1e-12)
    pooled = sum(float(reply.weight * reply.metrics["accuracy"]) for reply in replies) / sum(SIZES)
    assert pooled == pytest.approx(float(sums["accuracy"].sum()) / sum(SIZES))
    assert 0 < pooled < 1


def test_a_client_without_examples_to_test_on_answers_with_an_error_and_the_others_do_not(classification):
    town = examined(classification)
    replies = town.ask(town.task("evaluate"))
    assert [reply.has_error() for reply in replies] == [size == 0 for size in SIZES]
    assert "client 0 has no examples to evaluate on" in replies[0].error.reason
