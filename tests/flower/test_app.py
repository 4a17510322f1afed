"""Whole Flower apps on fedsim's engines: what their nodes may rely on, what a failing one costs, and the same bits."""

import copy
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, arrays_size_mod, fixedclipping_mod, message_size_mod
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping
from flwr.serverapp.strategy import FedAvg as FlowersFedAvg
from ray import cloudpickle

from clients.scaffold import ControlledSgd
from clients.sgd import Sgd
from fedsim.engines.engine import Engine
from fedsim.engines.local import Sequential, Vectorised
from fedsim.evaluation import Evaluate
from fedsim.flower import ClientAppsFailed, client_app, run
from fedsim.sampling import everyone
from fedsim.simulation import begin, rounds
from strategies.fedavg import FedAvg
from strategies.scaffold import Scaffold


def serving(main):
    """A ServerApp with this main."""
    app = ServerApp()
    app.main()(main)
    return app


def answering(function, kind="query"):
    """A ClientApp that answers one kind of message with what the function makes of message and context."""
    app = ClientApp()
    getattr(app, kind)()(function)
    return app


def asking(*rounds_, kind="query", got=None):
    """A ServerApp that asks all nodes, with one content after the other, and keeps the replies."""

    def main(grid, context):
        for content in rounds_ or [RecordDict()]:
            replies = list(grid.send_and_receive([Message(content, node, kind) for node in grid.get_node_ids()]))
            if got is not None:
                got.append(replies)

    return serving(main)


def ask(function, num_nodes=3, *contents, kind="query", **options):
    """What all nodes answer, round by round, and the outcome."""
    got = []
    app = function if isinstance(function, ClientApp) else answering(function, kind)
    outcome = run(asking(*contents, kind=kind, got=got), app, num_nodes=num_nodes, **options)
    return got, outcome


def reply(message, **words):
    return Message(RecordDict({"config": ConfigRecord(words)}), reply_to=message)


def told(replies):
    return [dict(reply.content["config"]) for reply in replies]


# What nodes may rely on.


def test_each_node_has_a_context_of_its_own():
    def where(message, context):
        return reply(message, id=context.node_id, run=context.run_id, **context.node_config, **context.run_config)

    got, outcome = ask(where, 4, run_config={"lr": 0.5, "name": "x", "deep.on": True})
    found = told(got[0])
    assert [words["partition-id"] for words in found] == [0, 1, 2, 3]
    assert {words["num-partitions"] for words in found} == {4}
    assert [words["id"] for words in found] == [reply.metadata.src_node_id for reply in got[0]]
    assert len({words["id"] for words in found}) == 4
    assert all((words["lr"], words["name"], words["deep.on"]) == (0.5, "x", True) for words in found)
    assert outcome.context.run_config == {"lr": 0.5, "name": "x", "deep.on": True}
    assert {words["run"] for words in found} == {outcome.context.run_id}


def test_what_a_node_does_to_its_configuration_reaches_no_other_nor_the_server():
    def edit(message, context):
        seen = dict(context.run_config)
        context.run_config["lr"] = 9.0
        context.run_config["more"] = "x"
        return reply(message, **seen)

    config = {"lr": 0.5}
    got, outcome = ask(edit, 3, run_config=config)
    assert told(got[0]) == [{"lr": 0.5}] * 3
    assert outcome.context.run_config == config == {"lr": 0.5}


def test_the_context_reaches_back_to_who_called_as_the_server_left_it():
    def main(grid, context):
        context.state["note"] = ConfigRecord({"nodes": len(list(grid.get_node_ids()))})

    outcome = run(serving(main), ClientApp(), num_nodes=5)
    assert dict(outcome.context.state["note"]) == {"nodes": 5}
    assert outcome.result is None and outcome.failed == []


def count(message, context):
    """Counts its messages in the node's state."""
    state = context.state.config_records.setdefault("count", ConfigRecord({"messages": 0}))
    state["messages"] += 1
    context.state["count"] = state
    return reply(message, messages=state["messages"])


def test_what_a_node_keeps_in_its_state_is_there_in_the_next_round_and_only_there():
    def main(grid, context):
        first, second, third = list(grid.get_node_ids())
        for nodes in ([first, second], [second], [first, second, third]):
            got.append(told(grid.send_and_receive([Message(RecordDict(), node, "query") for node in nodes])))

    got = []
    run(serving(main), answering(count), num_nodes=3)
    assert [[words["messages"] for words in part] for part in got] == [[1, 1], [2], [2, 3, 1]]


def test_nothing_is_left_from_one_run_to_the_next():
    app = answering(count)
    assert told(ask(app, 2)[0][0]) == told(ask(app, 2)[0][0]) == [{"messages": 1}] * 2


@pytest.mark.parametrize("how", ["changed", "replaced", "removed", "deep"])
def test_a_node_whose_app_raises_has_the_state_that_it_had_before(how):
    def stumble(message, context):
        if "stumble" in message.content and context.node_config["partition-id"] == 1:
            if how == "changed":
                context.state["count"]["messages"] = 100
            elif how == "replaced":
                context.state = RecordDict({"count": ConfigRecord({"messages": 100})})
            elif how == "removed":
                del context.state["count"]
            else:
                context.state["count"]["list"].append(5)
            raise OSError("it stumbled")
        if "count" not in context.state:
            context.state["count"] = ConfigRecord({"messages": 0, "list": [1]})
        context.state["count"]["messages"] += 1
        return reply(message, **context.state["count"])

    stumbling = RecordDict({"stumble": ConfigRecord()})
    got, outcome = ask(stumble, 2, RecordDict(), stumbling, RecordDict())
    assert [reply.has_error() for reply in got[1]] == [False, True]
    assert told(got[2]) == [{"messages": 3, "list": [1]}, {"messages": 2, "list": [1]}]


def test_a_node_whose_first_message_fails_begins_with_an_empty_state():
    def stumble(message, context):
        before = len(context.state)
        context.state["kept"] = ConfigRecord({"x": 1})
        if "stumble" in message.content:
            raise OSError
        return reply(message, before=before)

    got, _ = ask(stumble, 2, RecordDict({"stumble": ConfigRecord()}), RecordDict(), RecordDict())
    assert [told(part) for part in got[1:]] == [[{"before": 0}] * 2, [{"before": 1}] * 2]


def test_messages_find_their_function_by_type_and_action():
    app = ClientApp()
    for kind in ("train", "evaluate", "query"):
        for action in ("default", "more"):

            def answer(message, context, name=f"{kind}.{action}"):
                return reply(message, function=name)

            getattr(app, kind)(action)(answer)
    kinds = ["train", "train.more", "evaluate", "evaluate.more", "query", "query.more"]

    def main(grid, context):
        for kind in kinds:
            got.extend(told(grid.send_and_receive([Message(RecordDict(), next(iter(grid.get_node_ids())), kind)])))

    got = []
    run(serving(main), app, num_nodes=2)
    assert [words["function"].removesuffix(".default") for words in got] == kinds


def test_an_action_that_the_app_does_not_have_is_an_error_of_every_node():
    with pytest.raises(
        ClientAppsFailed, match=r"train\.dance .* of partition 0: Traceback[\s\S]*No train function .*dance"
    ):
        ask(answering(count), 2, kind="train.dance")


def test_the_lifespan_of_an_app_is_around_every_message():
    app, heard = ClientApp(), []

    @app.lifespan()
    def lifespan(context):
        heard.append(("begins", context.node_config["partition-id"]))
        yield
        heard.append(("ends", context.node_config["partition-id"]))

    @app.query()
    def query(message, context):
        heard.append(("works", context.node_config["partition-id"]))
        return reply(message)

    ask(app, 2)
    assert heard == [(what, node) for node in range(2) for what in ("begins", "works", "ends")]


def test_the_lifespan_of_a_server_is_around_its_main():
    heard = []

    def main(grid, context):
        heard.append("works")

    app = serving(main)

    @app.lifespan()
    def lifespan(context):
        heard.append("begins")
        yield
        heard.append("ends")

    run(app, ClientApp(), num_nodes=1)
    assert heard == ["begins", "works", "ends"]


def test_a_server_may_push_now_and_pull_later():
    def main(grid, context):
        nodes = list(grid.get_node_ids())
        idents = list(grid.push_messages([Message(RecordDict(), node, "query") for node in nodes]))
        got.append(told(grid.pull_messages(idents[2:])))
        got.append(told(grid.pull_messages(idents)))
        got.append(told(grid.pull_messages(idents)))

    got = []
    run(serving(main), answering(lambda m, c: reply(m, node=c.node_config["partition-id"])), num_nodes=4)
    assert [[words["node"] for words in part] for part in got] == [[2, 3], [0, 1], []]


def test_messages_that_no_server_waits_for_are_carried_out_too():
    def main(grid, context):
        grid.push_messages([Message(RecordDict(), node, "query") for node in grid.get_node_ids()])

    heard = []
    app = answering(lambda m, c: heard.append(c.node_config["partition-id"]) or reply(m))
    outcome = run(serving(main), app, num_nodes=3)
    assert heard == [0, 1, 2] and outcome.failed == []


# What a failing node costs.


def failing(error, on=(1,)):
    """An app of which the nodes of these partitions raise."""

    def answer(message, context):
        if context.node_config["partition-id"] in on:
            raise error
        return reply(message)

    return answer


@pytest.mark.parametrize(
    "error", [OSError("nobody is there"), KeyError("x"), SystemExit(3), RecursionError(), EOFError()]
)
def test_a_node_that_raises_costs_itself_and_says_why(error):
    content = RecordDict({"config": ConfigRecord({"server-round": 7})})
    got, outcome = ask(failing(error), 3, content)
    assert [reply.has_error() for reply in got[0]] == [False, True, False]
    assert type(error).__name__ in got[0][1].error.reason and str(error) in got[0][1].error.reason
    assert len(outcome.failed) == 1
    failure = outcome.failed[0]
    assert (failure.partition, failure.message_type, failure.round) == (1, "query", 7)
    assert failure.reason.startswith("Traceback")
    assert "raise error" in failure.reason and failure.reason.splitlines()[-1].startswith(type(error).__name__)


def test_a_node_that_calls_exit_costs_itself():
    def leave(message, context):
        if context.node_config["partition-id"] == 0:
            sys.exit("I leave")
        return reply(message)

    got, outcome = ask(leave, 2)
    assert [reply.has_error() for reply in got[0]] == [True, False]
    assert "SystemExit: I leave" in outcome.failed[0].reason
    assert outcome.failed[0].round == 0, "the server told none"


def test_who_interrupts_the_run_interrupts_it_wherever_it_is():
    with pytest.raises(KeyboardInterrupt):
        ask(failing(KeyboardInterrupt()), 3)


@pytest.mark.parametrize("answer", [None, 5, {"arrays": 1}, RecordDict()], ids=["None", "number", "dict", "content"])
def test_what_is_no_message_is_no_reply(answer):
    got, outcome = ask(lambda m, c: answer if c.node_config["partition-id"] == 2 else reply(m), 3)
    assert [reply.has_error() for reply in got[0]] == [False, False, True]
    assert f"the ClientApp returned a {type(answer).__name__}, it must return a Message" in outcome.failed[0].reason


def same(message, context):
    return message


def another(message, context):
    return Message(RecordDict(), 12, "query")


def to_another(message, context):
    message.metadata.__dict__["_message_id"] = "message-99"
    return reply(message)


@pytest.mark.parametrize("wrong", [same, another, to_another])
def test_a_message_that_is_no_reply_to_what_was_asked_is_an_error_and_costs_no_other(wrong):
    got, outcome = ask(lambda m, c: wrong(m, c) if c.node_config["partition-id"] == 1 else reply(m), 3)
    assert [reply.has_error() for reply in got[0]] == [False, True, False]
    assert [failure.partition for failure in outcome.failed] == [1]


def test_an_error_that_the_app_itself_replies_is_told():
    from fedsim.flower.compat import Error

    def refuse(message, context):
        if context.node_config["partition-id"] == 0:
            return Message(Error(77, "I refuse"), reply_to=message)
        return reply(message)

    got, outcome = ask(refuse, 2)
    assert got[0][0].error.code == 77
    assert [(failure.partition, failure.reason) for failure in outcome.failed] == [(0, "I refuse")]


def test_where_all_fail_the_run_fails_and_says_why_the_first_did():
    content = RecordDict({"config": ConfigRecord({"server-round": 1})})
    with pytest.raises(
        ClientAppsFailed, match=r"all 3 messages of type query .* of partition 0: Traceback[\s\S]*OSError: nobody"
    ):
        ask(failing(OSError("nobody"), on=range(3)), 3, content)


def test_a_run_in_which_nobody_trained_has_failed_though_all_evaluated():
    def evaluates_only(message, context):
        if message.metadata.message_type == "train":
            raise OSError("no training here")
        return reply(message)

    app = ClientApp()
    app.train()(evaluates_only)
    app.evaluate()(evaluates_only)
    server = ServerApp()

    @server.main()
    def main(grid, context):
        for kind in ("train", "evaluate"):
            grid.send_and_receive([Message(RecordDict(), node, kind) for node in grid.get_node_ids()])

    with pytest.raises(ClientAppsFailed, match=r"(?s)all 3 messages of type train .*no training here"):
        run(server, app, num_nodes=3)


def test_an_app_cannot_be_run_inside_another_and_one_after_another_they_can():
    inner, outer = ServerApp(), ServerApp()
    inner.main()(lambda grid, context: None)

    @outer.main()
    def main(grid, context):
        with pytest.raises(RuntimeError, match="inside another"):
            run(inner, ClientApp(), num_nodes=1)

    run(outer, ClientApp(), num_nodes=1)
    run(inner, ClientApp(), num_nodes=1)


def test_one_answer_in_the_whole_run_is_enough_that_it_has_not_failed():
    def first_only(message, context):
        if "fail" in message.content or context.node_config["partition-id"]:
            raise OSError
        return reply(message)

    _, outcome = ask(first_only, 3, RecordDict(), RecordDict({"fail": ConfigRecord()}))
    assert len(outcome.failed) == 5


def test_a_run_without_a_message_has_not_failed():
    assert run(serving(lambda grid, context: None), ClientApp(), num_nodes=2).failed == []


@pytest.mark.parametrize("error", [ZeroDivisionError("the server"), SystemExit(4)])
def test_what_a_server_raises_reaches_who_called(error):
    def main(grid, context):
        raise error

    with pytest.raises(type(error)) as raised:
        run(serving(main), ClientApp(), num_nodes=2)
    assert raised.value is error


def test_a_server_that_waits_for_nodes_that_never_come_is_told_so(monkeypatch):
    monkeypatch.setattr("fedsim.flower.grid.PATIENCE_CALLS", 3)
    monkeypatch.setattr("fedsim.flower.grid.PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr("flwr.serverapp.strategy.strategy_utils.sleep", lambda seconds: None)

    def main(grid, context):
        FlowersFedAvg(min_available_nodes=9).start(grid, ArrayRecord([np.zeros(1)]), num_rounds=1)

    with pytest.raises(RuntimeError, match="waits for more than the 2 nodes"):
        run(serving(main), ClientApp(), num_nodes=2)


# Nodes share no content.


def model():
    return ArrayRecord({"w": Array(np.arange(4.0)), "b": Array(np.ones(2))})


def content():
    return RecordDict(
        {"arrays": model(), "config": ConfigRecord({"lr": 0.5, "list": [1, 2]}), "m": MetricRecord({"x": 1})}
    )


def pops(content):
    content["arrays"].pop("w")


def consumes(content):
    content["arrays"].to_numpy_ndarrays(keep_input=False)


def consumes_as_torch(content):
    content["arrays"].to_torch_state_dict()
    content["arrays"].clear()


def edits(content):
    content["config"]["lr"] = 99.0
    content["m"]["x"] = 99


def edits_a_list(content):
    content["config"]["list"].append(99)


def removes(content):
    for name in list(content):
        del content[name]


def adds(content):
    content["more"] = ConfigRecord({"x": 1})


def overwrites(content):
    content["arrays"]["w"] = Array(np.full(4, 99.0))


def edits_an_array(content):
    array = content["arrays"]["w"]
    array.data = Array(np.full(4, 99.0)).data


def trains_in_place(content):
    content["arrays"]["w"].numpy()[:] = 99
    for array in content["arrays"].to_numpy_ndarrays():
        array += 99


DOINGS = [
    pops,
    consumes,
    consumes_as_torch,
    edits,
    edits_a_list,
    removes,
    adds,
    overwrites,
    edits_an_array,
    trains_in_place,
]


@pytest.mark.parametrize("do", DOINGS)
def test_what_a_node_does_to_its_message_reaches_no_other_nor_the_server(do):
    def answer(message, context):
        intact = message.content == content()
        do(message.content)
        return reply(message, intact=intact)

    sent = content()
    got, _ = ask(answer, 3, sent, sent)
    assert [words["intact"] for part in got for words in told(part)] == [True] * 6
    assert sent == content()


def test_a_message_that_was_spoilt_would_have_been_noticed():
    spoilt = []
    for do in DOINGS:
        mine = content()
        do(mine)
        spoilt.append(mine != content())
    assert spoilt == [do is not trains_in_place for do in DOINGS], "a node trains on copies anyway"


def test_nodes_that_echo_their_content_answer_each_with_its_own():
    def echo(message, context):
        message.content["config"]["lr"] = float(context.node_config["partition-id"])
        return Message(message.content, reply_to=message)

    sent = content()
    got, _ = ask(echo, 3, sent)
    assert [reply.content["config"]["lr"] for reply in got[0]] == [0.0, 1.0, 2.0]
    got[0][0].content["arrays"].clear()
    assert got[0][1].content["arrays"] == sent["arrays"] == model()


def test_what_a_server_does_to_a_reply_does_not_reach_the_nodes_state():
    def keep(message, context):
        if "kept" not in context.state:
            context.state["kept"] = ConfigRecord({"x": 1})
        return Message(RecordDict({"config": ConfigRecord(dict(context.state["kept"]))}), reply_to=message)

    def main(grid, context):
        for _ in range(2):
            replies = list(
                grid.send_and_receive([Message(RecordDict(), node, "query") for node in grid.get_node_ids()])
            )
            got.append([dict(part.content["config"]) for part in replies])
            for part in replies:
                part.content["config"]["x"] = 99

    got = []
    run(serving(main), answering(keep), num_nodes=2)
    assert got == [[{"x": 1}] * 2] * 2


def test_what_a_node_does_to_the_metadata_of_its_message_does_not_reach_the_server():
    def edit(message, context):
        answer = reply(message)
        message.metadata.group_id, message.metadata.ttl = "spoilt", 0.5
        message.metadata.message_type = "evaluate"
        return answer

    def main(grid, context):
        sent = [Message(RecordDict(), node, "query", group_id="5", ttl=60.0) for node in grid.get_node_ids()]
        list(grid.send_and_receive(sent))
        got.extend((part.metadata.group_id, part.metadata.ttl, part.metadata.message_type) for part in sent)

    got = []
    run(serving(main), answering(edit), num_nodes=2)
    assert got == [("5", 60.0, "query")] * 2


# Mods.


def test_a_mod_of_ones_own_is_around_the_function():
    heard = []

    def listening(name):
        def mod(message, context, call_next):
            heard.append(f"{name} before")
            message.content["config"] = ConfigRecord({"by": name})
            answer = call_next(message, context)
            heard.append(f"{name} after")
            answer.content["config"][name] = True
            return answer

        return mod

    app = ClientApp(mods=[listening("app")])

    @app.query(mods=[listening("function")])
    def query(message, context):
        heard.append("works")
        return reply(message, by=message.content["config"]["by"])

    got, _ = ask(app, 1)
    assert heard == ["app before", "function before", "works", "function after", "app after"]
    assert told(got[0]) == [{"by": "function", "function": True, "app": True}]


def step(message, context):
    """Adds 3 to every number: four of them are 6 away from where they were."""
    arrays = ArrayRecord({name: Array(a.numpy() + 3) for name, a in message.content["arrays"].items()})
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def trained(mods, strategy=None, **options):
    """The numbers of a model of four zeros after one round."""
    app = ClientApp()
    app.train(mods=mods)(step)

    def main(grid, context):
        wrapped = strategy or FlowersFedAvg(fraction_evaluate=0)
        wrapped.start(grid, ArrayRecord({"w": Array(np.zeros(4))}), num_rounds=1)

    outcome = run(serving(main), app, num_nodes=3, **options)
    assert outcome.failed == []
    return outcome.result.arrays["w"].numpy()


def test_mods_that_only_count_change_nothing():
    np.testing.assert_array_equal(trained([message_size_mod, arrays_size_mod]), np.full(4, 3.0))


def test_flowers_mod_clips_what_nodes_send_to_the_norm_that_the_server_tells():
    strategy = DifferentialPrivacyClientSideFixedClipping(
        FlowersFedAvg(fraction_evaluate=0), noise_multiplier=0.0, clipping_norm=1.0, num_sampled_clients=3
    )
    np.testing.assert_allclose(trained([fixedclipping_mod], strategy), np.full(4, 0.5))  # of norm 1


def test_flowers_mod_adds_noise_that_depends_on_the_seed_alone():
    def noisy(seed):
        return trained([LocalDpMod(1.0, 0.1, 1.0, 1e-5)], seed=seed)

    one, same, other = noisy(1), noisy(1), noisy(2)
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-3
    assert np.abs(one - 0.5).max() > 1e-3


# The same seed, the same bits.


def draws():
    """One number of each of the global generators."""
    return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002


def drawing(message, context):
    return reply(message, drawn=list(draws()))


def sampling(rounds_=4, fraction=0.5):
    """Flower's own strategy over nodes that train at random, and numbers that the server draws."""

    def train(message, context):
        heard.append(context.node_config["partition-id"])
        noise = np.random.randn(4) + torch.randn(4).numpy() + random.gauss(0, 1)  # noqa: NPY002
        arrays = ArrayRecord({"w": Array(message.content["arrays"]["w"].numpy() + noise)})
        metrics = MetricRecord({"num-examples": 1 + context.node_config["partition-id"], "drawn": random.random()})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    def main(grid, context):
        context.state["drawn"] = ConfigRecord({"before": list(draws())})
        strategy = FlowersFedAvg(fraction_train=fraction, fraction_evaluate=0)
        strategy.start(grid, ArrayRecord({"w": Array(torch.randn(4).numpy())}), num_rounds=rounds_)
        context.state["drawn"]["after"] = list(draws())

    heard = []
    return serving(main), answering(train, "train"), heard


def played(seed, engine=Sequential, num_nodes=8):
    server, client, heard = sampling()
    outcome = run(server, client, num_nodes=num_nodes, seed=seed, engine=engine)
    metrics = {number: dict(record) for number, record in outcome.result.train_metrics_clientapp.items()}
    return heard, outcome.result.arrays["w"].data, metrics, dict(outcome.context.state["drawn"])


def test_the_same_seed_asks_the_same_nodes_and_gives_the_same_bits_whatever_was_drawn_before():
    torch.manual_seed(1)
    random.seed(1)
    first = played(seed=5)
    draws()
    second = played(seed=5)
    assert first == second
    assert len(first[0]) == 16


def test_another_seed_asks_other_nodes_and_gives_other_bits():
    one, other = played(seed=5), played(seed=6)
    assert all(here != there for here, there in zip(one, other, strict=True))


def test_the_global_generators_are_afterwards_as_they_were_before():
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    played(seed=5)
    with pytest.raises(ClientAppsFailed):
        ask(failing(OSError(), on=range(3)), 3)
    with pytest.raises(KeyboardInterrupt):
        ask(failing(KeyboardInterrupt()), 3)
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002


def test_what_the_server_draws_does_not_depend_on_what_nodes_draw_nor_on_how_many_there_are():
    def server(number):
        def main(grid, context):
            for _ in range(3):
                list(grid.send_and_receive([Message(RecordDict(), n, "query") for n in grid.get_node_ids()][:number]))
                got.append(draws())

        return serving(main)

    found = []
    for client, number in ((drawing, 3), (lambda m, c: reply(m), 3), (drawing, 1), (failing(OSError()), 3)):
        got = []
        run(server(number), answering(client), num_nodes=3, seed=2)
        found.append(got)
    assert found == [found[0]] * 4
    assert len(set(found[0])) == 3


def test_what_the_server_draws_does_not_depend_on_whether_there_was_time_for_all_answers():
    def slowly(message, context):
        time.sleep(0.02)
        return drawing(message, context)

    def server(timeout):
        def main(grid, context):
            sent = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
            answered.append(len(list(grid.send_and_receive(sent, timeout=timeout))))
            drawn.append(draws())

        return serving(main)

    answered, drawn = [], []
    for timeout in (None, 0.05, 0.0):
        run(server(timeout), answering(slowly), num_nodes=8, seed=2)
    assert drawn == [drawn[0]] * 3
    assert answered[0] == 8 and 0 < answered[1] < 8 and answered[2] == 0


def test_what_a_node_draws_depends_on_how_many_messages_it_had_and_not_on_the_order_in_which_nodes_are_asked():
    def server(orders):
        def main(grid, context):
            nodes = list(grid.get_node_ids())
            for order in orders:
                sent = [Message(RecordDict(), nodes[number], "query") for number in order]
                for number, part in zip(order, grid.send_and_receive(sent), strict=True):
                    got.setdefault(number, []).append(part.content["config"]["drawn"])

        return serving(main)

    found = []
    for orders in ([(0, 1, 2), (0, 1, 2)], [(2, 0, 1), (1, 2, 0)], [(0,), (0,), (2, 1), (1, 2)], [(1, 0, 1, 2, 0, 2)]):
        got = {}
        run(server(orders), answering(drawing), num_nodes=3, seed=2)
        found.append(got)
    assert found == [found[0]] * 4
    everything = [tuple(numbers) for node in found[0].values() for numbers in node]
    assert len(everything) == len(set(everything)) == 6


def test_a_node_that_fails_does_not_change_what_the_others_draw():
    def some(message, context):
        if context.node_config["partition-id"] == 0 and "fail" in message.content:
            draws()
            raise OSError
        return drawing(message, context)

    bad, good = RecordDict({"fail": ConfigRecord()}), RecordDict({"fine": ConfigRecord()})
    (one, again), _ = ask(some, 3, bad, good, seed=2)
    (other, once_more), _ = ask(some, 3, good, good, seed=2)
    assert told(one[1:]) == told(other[1:])
    assert told(again) == told(once_more), "it had as many messages, answered or not"


def test_a_whole_model_is_made_alike_by_torch_in_server_and_nodes():
    def main(grid, context):
        layer = torch.nn.Linear(3, 2)
        sent = RecordDict({"arrays": ArrayRecord(layer.state_dict())})
        replies = grid.send_and_receive([Message(sent, node, "query") for node in grid.get_node_ids()])
        got.append([part.content["arrays"].object_id for part in replies])

    def train(message, context):
        layer = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout(0.5))
        layer[0].load_state_dict(message.content["arrays"].to_torch_state_dict())
        return Message(RecordDict({"arrays": ArrayRecord([layer(torch.ones(3)).detach().numpy()])}), reply_to=message)

    got = []
    for seed in (1, 1, 2):
        run(serving(main), answering(train), num_nodes=8, seed=seed)
    assert got[0] == got[1] != got[2]
    assert len(set(got[0])) > 1, "each node drops others"


# Engines.


class Backwards(Sequential):
    """Carries the last item out first."""

    def map(self, function, shared, items):
        items = list(items)
        answers = [*super().map(function, shared, reversed(items))]
        return iter(answers[::-1])


class Copying(Sequential):
    """Hands out copies, as one that sends them to other processes does."""

    def map(self, function, shared, items):
        for item in items:
            yield copy.deepcopy(next(iter(super().map(function, copy.deepcopy(shared), [copy.deepcopy(item)]))))


class Pickling(Sequential):
    """Hands everything over as bytes, as one does that has processes to work in."""

    def map(self, function, shared, items):
        once = cloudpickle.dumps((function, shared))
        for item in items:
            function, shared = cloudpickle.loads(once)
            answer = next(iter(super().map(function, shared, [cloudpickle.loads(cloudpickle.dumps(item))])))
            yield cloudpickle.loads(cloudpickle.dumps(answer))


class Dying(Sequential):
    """Loses the worker of every third item."""

    def map(self, function, shared, items):
        for place, answer in enumerate(super().map(function, shared, items)):
            yield answer if place % 3 < 2 else ConnectionError("the worker died")


@pytest.mark.parametrize("engine", [Backwards, Copying, Pickling])
def test_another_engine_gives_the_same_bits(engine):
    assert played(5, engine)[1:] == played(5)[1:]


@pytest.mark.parametrize("engine", [Backwards, Copying, Pickling])
def test_on_another_engine_a_nodes_state_is_kept_as_well(engine):
    got, _ = ask(count, 3, RecordDict(), RecordDict(), engine=engine)
    assert [[words["messages"] for words in told(part)] for part in got] == [[1] * 3, [2] * 3]


def test_a_worker_that_dies_costs_its_item_and_its_node_keeps_its_state():
    got, outcome = ask(count, 3, RecordDict(), RecordDict(), engine=Dying)
    assert [[reply.has_error() for reply in part] for part in got] == [[False, False, True]] * 2
    assert [(failure.partition, failure.reason) for failure in outcome.failed] == [
        (2, "ConnectionError: the worker died")
    ] * 2
    from fedsim.flower.compat import ErrorCode

    assert got[0][2].error.code == ErrorCode.CLIENT_APP_CRASHED
    assert told(got[1][:2]) == [{"messages": 2}] * 2


def test_the_engine_is_closed_whatever_happens():
    closed = []

    class Closing(Sequential):
        def close(self):
            closed.append(True)

    ask(count, 2, engine=Closing)
    with pytest.raises(ClientAppsFailed):
        ask(failing(OSError(), on=range(3)), 3, engine=Closing)
    with pytest.raises(ZeroDivisionError):
        run(serving(lambda grid, context: 1 / 0), ClientApp(), num_nodes=1, engine=Closing)
    assert closed == [True] * 3


def test_the_engine_that_vectorises_cannot_run_an_app_and_says_so():
    with pytest.raises(TypeError, match="Vectorised runs fedsim's clients only: .*Sequential"):
        ask(count, 2, engine=Vectorised)


def test_an_engine_is_made_for_the_number_of_nodes_and_the_seed():
    made = []

    def engine(federation, clients, seed):
        made.append((federation.num_clients, dict(clients), seed))
        found = Sequential(federation, clients, seed)
        assert isinstance(found, Engine)
        return found

    ask(count, 5, seed=7, engine=engine)
    assert made == [(5, {}, 7)]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_nodes": 0}, "num_nodes"),
        ({"num_nodes": -3}, "num_nodes"),
        ({"num_nodes": 2, "seed": -1}, "seed"),
        ({"num_nodes": True}, "num_nodes"),
        ({"num_nodes": 2, "seed": True}, "seed"),
    ],
    ids=str,
)
def test_numbers_that_make_no_sense_are_refused(options, named):
    with pytest.raises((ValueError, TypeError), match=named):
        run(asking(), answering(count), **options)


def machinery():
    from flwr.serverapp import server_app
    from flwr.serverapp.strategy import Strategy

    return [Array.__dict__["numpy"], Array.__dict__["from_numpy_ndarray"], Strategy.start, server_app.start_grid]


def test_flower_is_afterwards_as_it_was_before_whatever_happens():
    before, inside = machinery(), []

    def main(grid, context):
        inside.append(machinery())
        raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            run(serving(main), ClientApp(), num_nodes=1)
        assert machinery() == before
    ask(count, 2)
    assert machinery() == before
    assert all(now is not then for now, then in zip(inside[0], before, strict=True))


def test_runs_at_the_same_time_wait_for_each_other():
    with ThreadPoolExecutor(3) as threads:
        running = [threads.submit(played, seed) for seed in (5, 6, 5)]
        found = [each.result(60) for each in running]
    assert found == [played(5), played(6), played(5)]


# Apps of the older kind.


def older(num_nodes=6):
    """An app of the older kind: its server, its client, who trained, and in which order the server averaged."""
    from flwr.client import NumPyClient
    from flwr.common import ndarrays_to_parameters
    from flwr.server import ServerAppComponents, ServerConfig
    from flwr.server.strategy import FedAvg as OlderFedAvg

    class Adding(NumPyClient):
        def __init__(self, number):
            self.number = number

        def get_parameters(self, config):
            return [np.zeros(3, np.float32)]

        def fit(self, parameters, config):
            heard.append(self.number)
            noise = np.random.rand(3).astype(np.float32)  # noqa: NPY002
            return [parameters[0] + noise + self.number], 1 + self.number, {}

        def evaluate(self, parameters, config):
            return float(parameters[0].sum()), 1 + self.number, {"seen": self.number}

    class Listening(OlderFedAvg):
        def aggregate_fit(self, server_round, results, failures):
            averaged.append([result.num_examples - 1 for _, result in results])
            return super().aggregate_fit(server_round, results, failures)

    def server_fn(context):
        strategy = Listening(
            fraction_fit=0.5,
            fraction_evaluate=1.0,
            min_available_clients=num_nodes,
            evaluate_metrics_aggregation_fn=lambda parts: {"clients": len(parts)},
            initial_parameters=ndarrays_to_parameters([np.zeros(3, np.float32)]),
        )
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=3))

    heard, averaged = [], []
    client = ClientApp(client_fn=lambda context: Adding(context.node_config["partition-id"]).to_client())
    return ServerApp(server_fn=server_fn), client, heard, averaged


def test_an_app_of_the_older_kind_runs_and_its_history_is_the_result():
    from flwr.server import History

    server, client, heard, _ = older()
    outcome = run(server, client, num_nodes=6)
    assert isinstance(outcome.result, History) and outcome.failed == []
    assert [number for number, _ in outcome.result.losses_distributed] == [1, 2, 3]
    assert outcome.result.metrics_distributed["clients"] == [(1, 6), (2, 6), (3, 6)]
    assert len(heard) == 9, "half of six, three times"
    losses = [loss for _, loss in outcome.result.losses_distributed]
    assert 0 < losses[0] < losses[1] < losses[2]


def test_an_app_of_the_older_kind_gives_the_same_bits_for_the_same_seed():
    found = []
    for seed in (1, 1, 1, 2):
        server, client, heard, averaged = older(12)
        history = run(server, client, num_nodes=12, seed=seed).result
        drawn = [sorted(islice(heard, start, start + 6)) for start in (0, 6, 12)]
        assert [sorted(part) for part in averaged] == drawn
        found.append((drawn, averaged, history.losses_distributed))
    one, same, again, other = found
    assert one[0] == same[0] == again[0] != other[0]
    assert one[1] == same[1] == again[1], "sums of floats depend on the order"
    assert one[2] == same[2] == again[2] != other[2]


# Fedsim's own strategies and clients as an app.


@pytest.mark.parametrize("kind", ["fedavg", "scaffold"])
@pytest.mark.parametrize("engine", [Sequential, Backwards, Pickling])
def test_our_strategy_over_our_nodes_does_what_it_does_in_our_loop(classification, kind, engine):
    sizes = (4, 1, 7, 20)
    net, federation = classification(sizes)
    strategy = FedAvg(lr=0.9) if kind == "fedavg" else Scaffold(len(sizes))
    train = Sgd if kind == "fedavg" else ControlledSgd
    clients = {"train": train(model=net, lr=0.1, epochs=2, batch_size=8)}
    clients["evaluate"] = Evaluate(model=net, num_classes=3, part="train", batch_size=16)

    def main(grid, context):
        strategy.start(grid, ArrayRecord(net.module.state_dict()), num_rounds=3)

    outcome = run(serving(main), client_app(federation, clients, 3), num_nodes=len(sizes), engine=engine)
    first = begin(strategy, net.params, clients, len(sizes), 3)
    ours = list(islice(rounds(strategy, Sequential(federation, clients, 3), everyone(len(sizes)), first), 3))
    for name, leaf in strategy.params(ours[-1].snapshot.state).items():
        found = torch.from_numpy(outcome.result.arrays[name].numpy())
        torch.testing.assert_close(found, leaf, rtol=1e-6, atol=1e-6)
        assert (found - net.params[name]).abs().max() > 1e-3
    assert outcome.failed == []
    assert sorted(outcome.result.evaluate_metrics_clientapp) == [1, 2, 3]
