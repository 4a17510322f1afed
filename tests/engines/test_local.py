"""The engines of this process: what they do when clients fail, what they count and refuse, and which `auto` picks."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from clients.prox import Prox
from clients.qfedavg import LossThenSgd
from clients.sgd import Sgd
from fedsim import tree
from fedsim.client import Client
from fedsim.engines import local, vectorised
from fedsim.engines.local import Sequential, Vectorised, auto
from fedsim.evaluation import Evaluate
from fedsim.model import Model
from fedsim.task import Cohort, Reply, Task, Traffic
from fedsim.tree import Rows

ENGINES = [Sequential, Vectorised]
SIZES = (0, 1, 7, 20, 33, 2)
IDS = list(range(len(SIZES)))


@dataclass(frozen=True)
class Summing(Client):
    """Adds its examples up; the least that a client can be."""

    def start(self, shared, personal, data):
        return {"sum": shared["w"]}

    def step(self, state, batch):
        return {"sum": state["sum"] + torch.where(batch["mask"][:, None], batch["x"], 0.0).sum(0)}

    def finish(self, shared, state, data):
        return Reply({"sum": state["sum"]}, data["mask"].sum().double())


def execute(engine, client, federation, ids=IDS, reduce="stack", **settings):
    task = Task("train", {"w": torch.zeros(5)}, round=1, reduce=reduce)
    return engine(federation, {"train": client}, **settings).execute(task, Cohort(ids))


def expected(federation, ident):
    return federation.examples(ident)["x"].sum(0)


# Failures


@dataclass(frozen=True)
class FailsInPrepare(Summing):
    culprits: tuple[int, ...] = (20,)

    def prepare(self, examples, rng):
        if len(examples["x"]) in self.culprits:
            raise LookupError(f"no negatives for {len(examples['x'])} examples")
        return examples


@dataclass(frozen=True)
class FailsInStep(Summing):
    """Only a client with more than 30 examples fails; padded to its length, so does its whole block."""

    def start(self, shared, personal, data):
        return {"sum": shared["w"], "size": torch.zeros(len(data["x"]))}

    def step(self, state, batch):
        if len(state["size"]) > 30:
            raise LookupError(f"{len(state['size'])} examples are too many")
        return state | super().step(state, batch)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "client, culprit, where, said",
    [
        (FailsInPrepare(), 3, "in prepare", "LookupError: no negatives for 20 examples"),
        (FailsInStep(), 4, "in step", "LookupError: 33 examples are too many"),
    ],
)
def test_a_client_that_raises_costs_itself_alone_and_its_traceback_is_told(
    classification, engine, client, culprit, where, said
):
    federation = classification(SIZES)[1]
    for reduce in ("stack", "sum"):
        replies = execute(engine, client, federation, reduce=reduce)
        assert list(replies.failed) == [culprit]
        assert replies.ids == [ident for ident in IDS if ident != culprit]
        reason = replies.failed[culprit]
        assert reason.startswith("Traceback") and where in reason and reason.endswith(said)
    others = sum(expected(federation, ident) for ident in replies.ids)
    torch.testing.assert_close(replies.update["sum"], others)


@dataclass(frozen=True)
class Asking(Sgd):
    """Looks for something that it was not sent."""

    def start(self, shared, personal, data):
        return {"params": shared["params"], "found": shared["nowhere"]}


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
def test_what_a_client_misses_and_what_it_was_sent_stand_on_the_last_line_that_is_told(classification, engine):
    model, federation = classification()
    sent = {"params": {"0.weight": model.params["0.weight"]}}
    found = engine(federation, {"train": Asking(model, 0.1)}).execute(Task("train", sent), Cohort([1, 4]))
    assert list(found.failed) == [1, 4]
    for told in found.failed.values():
        assert told.splitlines()[-1] == "KeyError: 'nowhere' (it was sent params/0.weight)"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("client", [FailsInPrepare(culprits=SIZES), FailsInPrepare(culprits=(0, 1))])
def test_clients_that_all_fail_leave_an_empty_answer_that_says_why(classification, engine, client):
    federation = classification(SIZES)[1]
    ids = IDS if len(client.culprits) > 2 else [0, 1]
    replies = execute(engine, client, federation, ids)
    assert (replies.ids, replies.update, list(replies.failed)) == ([], {}, ids)
    assert replies.weight.shape == (0,)
    assert replies.traffic == Traffic(down=len(ids) * 5 * 4, up=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_nobody_asked_is_nobody_answering(classification, engine):
    replies = execute(engine, Summing(), classification(SIZES)[1], [])
    assert (replies.ids, replies.failed, replies.traffic) == ([], {}, Traffic(0, 0))


@dataclass(frozen=True)
class Spoilt(Summing):
    """Client 3 (20 examples) answers with `value` in one place."""

    value: float = 0.0
    place: str = "update"

    def finish(self, shared, state, data):
        wrong = torch.where(data["mask"].sum() == 20, self.value, 0.0)
        weight, personal = data["mask"].sum().double(), {"p": wrong} if self.place == "personal" else {}
        first = torch.arange(5) == 0  # one number of five
        spoilt = torch.where(first, wrong, 0.0) if self.place == "update" else torch.zeros(5)
        return Reply({"sum": state["sum"] + spoilt}, weight + (wrong if self.place == "weight" else 0), personal)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("place", ["update", "weight", "personal"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("reduce", ["stack", "sum"])
def test_an_answer_that_is_not_finite_is_refused_and_the_others_are_unharmed(
    classification, engine, place, value, reduce
):
    federation = classification(SIZES)[1]
    replies = execute(engine, Spoilt(value=value, place=place), federation, reduce=reduce)
    assert replies.failed == {3: "its update holds NaN or infinity"}
    assert replies.ids == [0, 1, 2, 4, 5]
    found = replies.update["sum"] if reduce == "sum" else replies.update["sum"].sum(0)
    torch.testing.assert_close(found, sum(expected(federation, ident) for ident in replies.ids))


@dataclass(frozen=True)
class Huge(Summing):
    def finish(self, shared, state, data):
        return Reply({"sum": torch.full((5,), 3e38) + 0 * state["sum"]}, data["mask"].sum().double())


@pytest.mark.parametrize("engine", ENGINES)
def test_finite_numbers_whose_sum_overflows_are_accepted(classification, engine):
    assert torch.isinf(torch.full((5,), 3e38).sum()), "else this would prove nothing"
    replies = execute(engine, Huge(), classification(SIZES)[1])
    assert replies.ids == IDS and not replies.failed
    assert torch.isfinite(replies.update["sum"]).all()


@dataclass(frozen=True)
class Malformed(Summing):
    def finish(self, shared, state, data):
        return Reply({"sum": state["sum"]}, 1.0)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_answer_that_is_no_tensor_fails_by_name_on_every_engine(classification, engine):
    replies = execute(engine, Malformed(), classification(SIZES)[1])
    assert set(replies.failed) == set(IDS)
    assert all("weight: a leaf must be a tensor or Rows, got float" in reason for reason in replies.failed.values())


@pytest.mark.parametrize("engine", ENGINES)
def test_an_action_without_a_client_is_refused_with_those_that_have_one(classification, engine):
    client, federation = Summing(), classification(SIZES)[1]
    running = engine(federation, {"train": client, "repair": client})
    with pytest.raises(ValueError, match="no client is bound to the action 'forget': there are train, repair"):
        running.execute(Task("forget", {}), Cohort([0]))


@dataclass(frozen=True)
class Coarse(Summing):
    """Updates in float64, weights in float32."""

    def finish(self, shared, state, data):
        return Reply({"sum": 1 / 3 + state["sum"].double()}, data["mask"].sum().float())


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_in_float32_do_not_coarsen_the_mean_of_updates_in_float64(classification, engine):
    federation = classification(SIZES)[1]
    each, mean = (execute(engine, Coarse(), federation, reduce=reduce).update["sum"] for reduce in ("stack", "mean"))
    share = torch.tensor(SIZES, dtype=torch.float64) / sum(SIZES)
    torch.testing.assert_close(mean, share @ each, rtol=1e-14, atol=1e-14)
    assert not torch.allclose(mean, share.float().double() @ each, rtol=1e-14, atol=1e-14), "float32 would show"


# What vmap cannot run


@dataclass(frozen=True)
class Branching(Summing):
    def step(self, state, batch):
        return super().step(state, batch) if batch["x"].sum() > 0 else state


@dataclass(frozen=True)
class Mutating(Summing):
    """Adds to a tensor of its own, in place."""

    def step(self, state, batch):
        total = torch.zeros(5)
        total += batch["x"].sum(0)
        return {"sum": state["sum"] + total}


@dataclass(frozen=True)
class MutatingWhatItWasSent(Summing):
    def step(self, state, batch):
        state["sum"].add_(batch["x"].sum())
        return state


@dataclass(frozen=True)
class Drawing(Summing):
    """Draws without saying that it is stochastic."""

    def step(self, state, batch):
        return {"sum": state["sum"] + torch.rand(5)}


@dataclass(frozen=True)
class LeavingTorch(Summing):
    def step(self, state, batch):
        return {"sum": state["sum"] + torch.from_numpy(batch["x"].numpy().sum(0))}


IMPOSSIBLE = {
    Branching: "Branching cannot be vectorised, use fedsim.engines.local:Sequential",
    Mutating: "Mutating cannot be vectorised, use fedsim.engines.local:Sequential",
    Drawing: "Drawing cannot be vectorised, say that it is `stochastic`",
    LeavingTorch: "LeavingTorch cannot be vectorised, use fedsim.engines.local:Sequential",
}


@pytest.mark.parametrize("kind", IMPOSSIBLE)
@pytest.mark.parametrize("block", [2, None])
def test_a_client_that_vmap_cannot_run_is_one_error_that_says_what_to_do(classification, kind, block):
    with pytest.raises(TypeError, match=IMPOSSIBLE[kind]):
        execute(Vectorised, kind(), classification(SIZES)[1], block=block)


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_the_same_client_runs_one_by_one_and_twice_alike(classification, kind):
    federation = classification(SIZES)[1]
    one, other = (execute(Sequential, kind(), federation) for _ in range(2))
    assert not one.failed
    assert torch.equal(one.update["sum"], other.update["sum"]) if "sum" in one.update else True


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
def test_a_client_that_changes_what_others_are_sent_ends_the_round(classification, engine):
    with pytest.raises(TypeError, match="MutatingWhatItWasSent changes shared/w in place, which other clients"):
        execute(engine, MutatingWhatItWasSent(), classification(SIZES)[1])


@dataclass(frozen=True)
class SpeaksOfVmap(Summing):
    def step(self, state, batch):
        raise LookupError("this text says vmap and means nothing by it")


def test_a_failure_that_only_mentions_vmap_is_a_failure_and_no_verdict_on_the_client(classification):
    replies = execute(Vectorised, SpeaksOfVmap(), classification(SIZES)[1])
    assert set(replies.failed) == {1, 2, 3, 4, 5}, "client 0 has no examples, so no step"


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.InstanceNorm1d(4, track_running_stats=True)]
)
def test_batch_norm_is_refused_and_what_to_use_is_said(layer):
    with pytest.raises(ValueError, match="module 1 is .* use GroupNorm or LayerNorm"):
        Model(nn.Sequential(nn.Linear(4, 4), layer))
    Model(nn.Sequential(nn.Linear(4, 4), nn.GroupNorm(2, 4), nn.LayerNorm(4)))


@dataclass(frozen=True)
class RunsItsOwnWay(Summing):
    def run(self, shared, personal, data, rows):
        return Reply({"sum": data["x"].sum(0)}, torch.tensor(1.0))


def test_a_client_that_overrides_run_is_refused_by_vectorised_before_anything_starts(classification):
    federation = classification(SIZES)[1]
    with pytest.raises(ValueError, match="clients.train: RunsItsOwnWay overrides run"):
        Vectorised(federation, {"train": RunsItsOwnWay()})
    torch.testing.assert_close(
        execute(Sequential, RunsItsOwnWay(), federation).update["sum"][4], expected(federation, 4)
    )


# Traffic


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reduce", ["stack", "mean", "sum"])
def test_traffic_is_what_a_network_would_carry(classification, engine, reduce):
    model, federation = classification(SIZES)
    parameters = 5 * 8 + 8 + 8 * 3 + 3
    clients = {"train": Sgd(model=model, lr=0.1)}
    task = Task("train", {"params": model.params}, round=1, reduce=reduce)
    traffic = engine(federation, clients).execute(task, Cohort([1, 3, 4])).traffic
    assert traffic.down == 3 * 4 * parameters
    assert traffic.up == 3 * (4 * parameters + 8 + 8), "a model, a weight and a loss (both float64) from each"


@dataclass(frozen=True)
class SendsRows(Client):
    def start(self, shared, personal, data):
        return {}

    def step(self, state, batch):
        return state

    def finish(self, shared, state, data):
        index = torch.where(data["mask"], data["item"], -1)
        values = torch.where(data["mask"][:, None], data["x"], 0.0)
        return Reply({"table": tree.Rows(index, values, 9)}, data["mask"].sum().double(), {"kept": data["x"].sum()})


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reduce", ["stack", "mean", "sum"])
def test_of_rows_only_those_that_are_there_travel_and_what_is_kept_does_not(classification, engine, reduce):
    replies = execute(engine, SendsRows(), classification(SIZES)[1], reduce=reduce)
    assert replies.traffic.down == 6 * 5 * 4
    assert replies.traffic.up == sum(SIZES) * (8 + 5 * 4) + 6 * 8, "an int64 index and five float32 a row; a weight"


# Random numbers


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", [Sgd, Prox, LossThenSgd])
def test_a_model_with_dropout_gives_the_same_bits_for_a_seed_and_others_for_another(classification, engine, kind):
    model, federation = classification(SIZES, dropout=0.5)
    clients, task = {"train": kind(model=model, lr=0.1, batch_size=8)}, Task("train", {"params": model.params}, round=1)
    before = torch.random.get_rng_state()
    first, again, other = (engine(federation, clients, seed).execute(task, Cohort(IDS)) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before), "torch's own generator is left alone"
    one, two, three = (tree.flatten(replies.update["params"]) for replies in (first, again, other))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["0.weight"][4], three["0.weight"][4])


@pytest.mark.parametrize("engine", ENGINES)
def test_dropout_does_not_depend_on_what_torchs_generator_was_seeded_with(classification, engine):
    model, federation = classification(SIZES, dropout=0.5)
    clients, task = {"train": Sgd(model=model, lr=0.1)}, Task("train", {"params": model.params}, round=1)
    found = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found.append(engine(federation, clients, 7).execute(task, Cohort([4])).update["params"]["0.weight"])
    assert torch.equal(*found)


def test_dropout_is_at_work_and_differs_between_clients_of_a_block(classification):
    model, federation = classification((33, 33), dropout=0.5)
    same = type(federation)(federation.columns, np.tile(np.arange(33), 2), federation.bounds)
    task, kind = Task("train", {"params": model.params}, round=1), {"lr": 0.1, "batch_size": 64}
    update = Vectorised(same, {"train": Sgd(model=model, **kind)}).execute(task, Cohort([0, 1])).update["params"]
    assert not torch.allclose(update["0.weight"][0], update["0.weight"][1], atol=1e-4)


# Blocks, and the engine that auto picks


def test_blocks_are_bounded_by_memory_and_hold_at_least_one_client(classification):
    model, federation = classification(SIZES)
    engine = Vectorised(federation, {"train": Sgd(model=model, lr=0.1)})
    task = Task("train", {"params": model.params})
    row, shared = 5 * 4 + 3 * 8, 4 * (5 * 8 + 8 + 8 * 3 + 3)
    assert engine.width(task, 33, 0) == vectorised.BLOCK_BYTES // (4 * shared + 33 * row)
    enormous = Task("train", {"w": torch.empty(vectorised.BLOCK_BYTES, device="meta")})
    assert engine.width(enormous, 33, 0) == 1


def test_a_client_may_tell_how_much_memory_it_takes(classification):
    @dataclass(frozen=True)
    class Frugal(Sgd):
        def footprint(self, shared, examples):
            return 1000 * examples

    model, federation = classification(SIZES)
    engine = Vectorised(federation, {"train": Frugal(model=model, lr=0.1)})
    row = 5 * 4 + 3 * 8
    assert engine.width(Task("train", {"params": model.params}), 33, 0) == vectorised.BLOCK_BYTES // (33 * (1000 + row))


def test_auto_vectorises_a_large_model_whose_client_runs_a_cohort_in_its_own_way(classification):
    @dataclass(frozen=True)
    class Own(Sgd):
        def run_cohort(self, shared, personal, data, rows):
            return super().run_cohort(shared, personal, data, rows)

    large = Model(torch.nn.Linear(1000, 1000))
    federation = classification(SIZES)[1]
    assert isinstance(auto(federation, {"train": Own(model=large, lr=0.1)}), Vectorised)
    assert isinstance(auto(federation, {"train": Sgd(model=large, lr=0.1)}), Sequential)


@pytest.mark.parametrize("settings", [{"block": 0}, {"seed": -1}])
def test_an_engines_setting_out_of_range_is_refused_by_name(classification, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Vectorised(classification(SIZES)[1], {}, **settings)


def test_auto_takes_vectorised_for_a_small_model_without_convolutions(classification):
    model, federation = classification(SIZES)
    clients = {"train": Sgd(model=model, lr=0.1), "evaluate": Evaluate(model=model)}
    engine = auto(federation, clients, 3)
    assert isinstance(engine, Vectorised) and engine.seed == 3
    assert isinstance(auto(federation, {"train": Summing()}), Vectorised), "a client without a model, too"


def test_auto_takes_sequential_for_convolutions_large_models_and_clients_of_their_own_way(classification):
    model, federation = classification(SIZES)
    convolution = Model(nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten()))
    limit = local.VECTORISED_PARAMETERS
    fits, large = (Model(nn.Linear(size, 1, bias=False)) for size in (limit, limit + 1))
    assert isinstance(auto(federation, {"train": Sgd(model=fits, lr=0.1)}), Vectorised)
    for client in (Sgd(model=convolution, lr=0.1), Sgd(model=large, lr=0.1), RunsItsOwnWay()):
        small = Sgd(model=model, lr=0.1)
        assert isinstance(auto(federation, {"train": small, "other": client}), Sequential), "one is enough"


def test_an_engine_is_a_context_that_says_what_it_is(classification):
    with Vectorised(classification(SIZES)[1], {}, block=4) as engine:
        assert repr(engine) == "Vectorised(block=4)"
    assert repr(Sequential(classification(SIZES)[1], {})) == "Sequential()"


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
def test_a_task_that_makes_no_sense_is_refused(engine, classification):
    model, federation = classification((3, 4))
    run = engine(federation, {"train": Sgd(model=model, lr=0.1)})
    with pytest.raises(ValueError, match="task.reduce must be one of stack, mean, sum, got 'average'"):
        run.execute(Task("train", {"params": model.params}, reduce="average"), Cohort([0, 1]))
    with pytest.raises(ValueError, match=r"once in a round, got the ids \[0, 1, 0\]"):
        run.execute(Task("train", {"params": model.params}), Cohort([0, 1, 0]))


class Secret(nn.Module):
    """A model that drops out without a layer that says so."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x):
        return self.inner(nn.functional.dropout(x, 0.5, self.training))


def test_what_a_client_draws_without_saying_so_does_not_differ_from_run_to_run(classification):
    _, federation = classification(SIZES)
    width = federation.columns["x"].shape[1]
    module = Secret()
    module.inner = nn.Linear(width, 3)
    client = Sgd(model=Model(module), lr=0.1)
    runs = []
    for noise in range(2):
        torch.manual_seed(noise)
        task = Task("train", {"params": client.model.params}, round=1)
        runs.append(Sequential(federation, {"train": client}).execute(task, Cohort(IDS)))
    assert torch.equal(runs[0].update["params"]["inner.weight"], runs[1].update["params"]["inner.weight"])


def test_a_block_ends_where_clients_become_much_smaller(classification):
    _, federation = classification((100, 90, 26, 24, 7, 6, 1, 0))
    ids, clients = range(8), {"train": Summing()}
    blocks = list(Vectorised(federation, clients).blocks(Task("train", {}), ids))
    assert blocks == [[0, 1, 2], [3, 4, 5], [6], [7]]
    narrow = Vectorised(federation, clients, block=2)
    assert [len(places) for places in narrow.blocks(Task("train", {}), ids)] == [2, 2, 2, 1, 1]


@dataclass(frozen=True)
class OddReply(Summing):
    """The client with 20 examples sends more than the others."""

    def finish(self, shared, state, data):
        reply = super().finish(shared, state, data)
        return reply._replace(metrics={"extra": torch.tensor(1.0)}) if len(data["mask"]) == 20 else reply


def test_a_client_that_answers_in_another_form_costs_itself_only(classification):
    _, federation = classification((7, 20, 5))
    found = execute(Sequential, OddReply(), federation, [0, 1, 2])
    assert found.ids == [0, 2] and list(found.failed) == [1]
    assert "another form than client 0: metrics/extra is" in found.failed[1]


@dataclass(frozen=True)
class OddRows(Summing):
    """Of a table that is longer, or wider, at a client of 20 examples."""

    wider: bool = False

    def finish(self, shared, state, data):
        odd = len(data["mask"]) == 20
        size, width = 5 + (odd and not self.wider), 2 + (odd and self.wider)
        rows = Rows(torch.tensor([size - 1]), torch.ones(1, width), size)
        return Reply({"table": rows}, data["mask"].sum().double())


@pytest.mark.parametrize("reduce", ["stack", "mean"])
@pytest.mark.parametrize(("wider", "told"), [(False, "(6, 2), not (5, 2)"), (True, "(5, 3), not (5, 2)")])
def test_rows_of_another_table_cost_the_client_that_sends_them_only(classification, reduce, wider, told):
    _, federation = classification((7, 20, 5))
    found = execute(Sequential, OddRows(wider=wider), federation, [0, 1, 2], reduce)
    assert found.ids == [0, 2], found.failed
    assert f"update/table is {told}" in found.failed[1]


@dataclass(frozen=True)
class Forgets(Summing):
    def finish(self, shared, state, data):
        super().finish(shared, state, data)


def test_a_finish_without_a_return_is_told_so(classification):
    found = execute(Sequential, Forgets(), classification((3, 4))[1], [0, 1])
    assert all("finish must return a Reply, got NoneType" in why for why in found.failed.values())
