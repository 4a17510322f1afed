"""Tasks and replies come out of Flower's messages as they went in, to the bit, and what is wrong in one is refused.

Every message is sent as it is, as protocol buffers, and in the pieces that a SuperLink hands on.
"""

import json
import struct

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.app.metadata import validate_message_type
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fedsim import tree
from fedsim.flower.arrays import MalformedMessage, pack, to_array
from fedsim.flower.codec import (
    VERSION,
    action_of,
    decode_replies,
    decode_reply,
    decode_task,
    encode_replies,
    encode_reply,
    encode_task,
    message_type,
)
from fedsim.task import Replies, Reply, Task
from fedsim.tree import Rows

search = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow],
)

INTEGERS = [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DTYPES = [torch.bool, *INTEGERS, *FLOATS, torch.complex64]


def direct(content):
    return content


def as_protobuf(content):
    """The content after a journey in one piece."""
    return recorddict_from_proto(ProtoRecordDict.FromString(recorddict_to_proto(content).SerializeToString()))


def as_objects(content):
    """The content after a journey in pieces, as a SuperLink hands them on."""
    pieces = {ident: piece.deflate() for ident, piece in get_all_nested_objects(content).items()}
    return inflate_object_from_contents(content.object_id, pieces)


@pytest.fixture(params=[direct, as_protobuf, as_objects], ids=lambda journey: journey.__name__)
def journey(request):
    return request.param


def bits(tensor):
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    return flat.clone(memory_format=torch.contiguous_format).view(torch.uint8).tolist() if len(flat) else []


def assert_same(one, other):
    """Same branches, same leaves to the bit."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name, leaf in one.items():
            assert_same(leaf, other[name])
    elif isinstance(one, Rows):
        assert one.size == other.size
        assert_same(one.index, other.index)
        assert_same(one.values, other.values)
    else:
        assert one.dtype == other.dtype and one.shape == other.shape and bits(one) == bits(other)


def noise(dtype, *shape, seed=0):
    """Any bits at all, NaN of every kind among them; a bool has only two values."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(2, shape, generator=generator).bool()
    size = torch.empty(0, dtype=dtype).element_size()
    count = torch.Size(shape).numel() * size
    return torch.randint(256, (count,), generator=generator, dtype=torch.uint8).view(dtype).reshape(shape)


def rows(index, size=9, seed=1):
    index = torch.tensor(index, dtype=torch.int64)
    return Rows(index, noise(torch.float32, *index.shape, 2, seed=seed), size)


TABLE = torch.arange(6.0).reshape(2, 3)
TREES = {
    "nothing": {},
    "a model of nothing": {"params": {}},
    "no model": {"control": {"a": torch.ones(2)}, "step": torch.tensor(3)},
    "a model of nothing, and more": {"params": {}, "control": {"a": torch.ones(2)}},
    "a model that is one tensor": {"params": torch.ones(2), "more": torch.zeros(1)},
    "a model that is rows": {"params": rows([1, 2])},
    "empty branches": {"params": {"a": {}, "b": {"c": {}}}, "d": {}, "e": {"f": {"g": {}}, "h": torch.ones(1)}},
    "every type": {"params": {f"{dtype}": noise(dtype, 2, 3) for dtype in DTYPES}},
    "every type outside": {f"{dtype}": noise(dtype, 2, 3) for dtype in DTYPES},
    "every type, one number": {"params": {f"{dtype}": noise(dtype) for dtype in DTYPES}},
    "every type, one number, outside": {f"{dtype}": noise(dtype) for dtype in DTYPES},
    "sizes of zero": {"params": {"a": torch.empty(0), "b": torch.empty(2, 0, 3).int()}, "c": torch.empty(0, 4)},
    "a type of two numbers that safetensors lacks": {"params": {"a": noise(torch.complex128, 3)}},
    "views": {
        "params": {"a": TABLE.T, "b": TABLE[:, ::2], "c": torch.ones(2, 1).expand(2, 3), "d": TABLE},
        "rest": {"a": TABLE.T, "b": TABLE[:, ::2], "c": torch.ones(2, 1).expand(2, 3), "d": TABLE},
        "again": TABLE,
    },
    "gradients": {"params": {"a": torch.nn.Parameter(TABLE)}, "b": TABLE.clone().requires_grad_() * 2},
    "conjugated": {
        "params": {"a": torch.tensor([1 + 2j]).conj(), "b": torch.tensor([1 + 2j]).conj().imag},
        "c": {"a": torch.tensor([1 + 2j]).conj(), "b": torch.tensor([1 + 2j]).conj().imag},
    },
    "rows": {"params": {"emb.weight": rows([4, 1, 4]), "bias": torch.ones(1)}, "seen": rows([0])},
    "rows of nothing": {"params": {"emb": rows([])}, "seen": {"a": rows([]), "b": rows([], size=0)}},
    "rows stacked and padded": {"params": {"emb": rows([[4, -1], [3, 8]])}, "seen": rows([[-1], [0]])},
    "names": {"params": {"0.weight": TABLE, "Größe": TABLE, "λ": {"大": TABLE}, " ": TABLE}, "🌸.a": {"b.c": TABLE}},
    "names that are other's words": {"arrays": TABLE, "fedsim": {"rest": TABLE}, "version": TABLE, "rest": TABLE},
}


def trees(names=TREES):
    return pytest.mark.parametrize("name", names)


# There and back


@trees()
def test_a_task_comes_back_as_it_was(name, journey):
    sent = Task("train", TREES[name], [3, 1, 2], 7, "mean")
    received = decode_task(journey(encode_task(sent)), "train")
    assert_same(sent.shared, received.shared)
    assert received._replace(shared={}) == sent._replace(shared={})


@trees()
def test_a_reply_comes_back_as_it_was(name, journey):
    metrics = {"loss": noise(torch.float32, seed=4).nan_to_num(), "examples": torch.tensor(2**62 + 1)}
    sent = Reply(TREES[name], torch.tensor(5), {"kept": torch.ones(1)}, metrics)
    received = decode_reply(journey(encode_reply(sent)))
    assert_same(sent.update, received.update)
    assert_same(sent.weight, received.weight)
    assert_same(metrics, received.metrics)
    assert list(received.metrics) == list(metrics) and received.personal == {}


def stacked(branch, count=2):
    """What clients with this answer make together."""
    return tree.stack([branch] * count) if branch else {}


@trees([name for name in TREES if "stacked" not in name])
def test_replies_of_several_come_back_as_they_were(name, journey):
    sent = Replies([4, 2], torch.tensor([1.0, 0.0]), stacked(TREES[name]), {}, {"loss": torch.ones(2)}, {9: "it fell"})
    received = decode_replies(journey(encode_replies(sent)), [2, 4, 9], {})
    assert_same(sent.update, received.update)
    assert_same(sent.weight, received.weight)
    assert_same(sent.metrics, received.metrics)
    assert (received.ids, received.failed, received.personal) == (sent.ids, sent.failed, {})


def test_rows_of_several_keep_their_padding(journey):
    sent = tree.stack([{"a": rows([1, 2, 3])}, {"a": rows([5])}, {"a": rows([])}])
    assert sent["a"].index.tolist() == [[1, 2, 3], [5, -1, -1], [-1, -1, -1]]
    replies = Replies([0, 1, 2], torch.ones(3), sent)
    received = decode_replies(journey(encode_replies(replies)), [0, 1, 2], {"a": torch.zeros(9, 2)})
    assert_same(sent, received.update)


def test_nobody_s_replies_come_back_as_such(journey):
    sent = Replies([], torch.zeros(0), {}, failed={3: "out of memory", 1: ""})
    received = decode_replies(journey(encode_replies(sent)), [1, 3], {"params": {"a": torch.ones(1)}})
    assert received.ids == [] and received.update == {} and received.failed == sent.failed
    assert_same(sent.weight, received.weight)


@pytest.mark.parametrize("dtype", [*INTEGERS, *FLOATS], ids=str)
def test_types_of_weights_and_metrics_are_kept(dtype, journey):
    top = torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max
    low = torch.finfo(dtype).tiny if dtype.is_floating_point else torch.iinfo(dtype).min
    values = [torch.tensor(value, dtype=dtype) for value in (top, low, 1)]
    metrics = dict(zip(("top", "low", "one"), values, strict=True))
    for weight in (values[0], values[2]):
        received = decode_reply(journey(encode_reply(Reply({}, weight, {}, metrics))))
        assert_same(weight, received.weight)
        assert_same(metrics, received.metrics)
    several = Replies([0, 1], torch.stack(values[::2]), {}, {}, {"both": torch.stack(values[1:])})
    received = decode_replies(journey(encode_replies(several)), [0, 1], {})
    assert_same(several.weight, received.weight)
    assert_same(several.metrics, received.metrics)


def test_metrics_may_be_no_numbers_but_they_may_be_of_any_type(journey):
    metrics = {name: torch.tensor(float(name)) for name in ("nan", "inf", "-inf", "-0.0")} | {"yes": torch.tensor(True)}
    received = decode_reply(journey(encode_reply(Reply({}, torch.tensor(1), {}, metrics)))).metrics
    assert_same(metrics, received)
    several = Replies([7], torch.ones(1), {}, {}, {name: value[None] for name, value in metrics.items()})
    assert_same(several.metrics, decode_replies(journey(encode_replies(several)), [7], {}).metrics)


def test_parameters_keep_their_order(journey):
    params = {name: torch.ones(1) for name in ("z", "a", "0.weight", "0.bias", "m")}
    assert list(params) != sorted(params)
    content = journey(encode_task(Task("train", {"params": params, "control": {"a": torch.ones(1)}})))
    assert list(decode_task(content, "train").shared["params"]) == list(params)
    assert list(content["arrays"]) == list(params)  # as Flower's strategies and wrappers see them


def test_what_is_received_shares_its_memory_with_nobody():
    shared = {"params": {"a": TABLE, "b": TABLE}, "rest": {"a": TABLE, "b": TABLE[0]}}
    content = encode_task(Task("train", shared))
    before = as_objects(content)
    first, second = (decode_task(content, "train").shared for _ in range(2))
    for leaf in tree.leaves(first):
        leaf.fill_(-1)
    assert_same(second, shared)
    assert_same(decode_task(content, "train").shared, shared)
    assert content == before and TABLE.tolist() == [[0, 1, 2], [3, 4, 5]]
    second["rest"]["a"].fill_(-2)
    assert second["rest"]["b"].tolist() == [0, 1, 2] and second["params"]["a"].tolist() == TABLE.tolist()


def test_whom_a_task_is_for_comes_back(journey):
    for ids in (None, [], [0], [2**40, 3]):
        assert decode_task(journey(encode_task(Task("train", {}, ids))), "train").ids == ids


@pytest.mark.parametrize("reduce", ["stack", "mean", "sum"])
def test_what_becomes_of_updates_comes_back(reduce, journey):
    assert decode_task(journey(encode_task(Task("train", {}, reduce=reduce))), "train").reduce == reduce


@pytest.mark.parametrize("action", ["train", "evaluate", "forget", "query", "system"])
def test_an_action_travels_under_a_type_that_flower_takes(action, journey):
    kind = message_type(action)
    assert validate_message_type(kind) and action_of(kind) == action
    assert decode_task(journey(encode_task(Task(action, {}))), kind).action == action


@pytest.mark.parametrize("action", ["", "two words", "a.b", "train.forget", "1st"])
def test_an_action_that_flower_cannot_carry_is_refused(action):
    assert not validate_message_type(f"train.{action}")
    with pytest.raises(ValueError, match="identifier"):
        message_type(action)


def test_clients_are_told_what_the_user_says_and_which_round_it_is(journey):
    content = journey(encode_task(Task("train", {}, round=4), {"lr": 0.5, "server-round": 9, "words": ["a", "b"]}))
    told = {name: value for name, value in content["config"].items() if not name.startswith("fedsim.")}
    assert told == {"lr": 0.5, "server-round": 4, "words": ["a", "b"]}


def test_a_task_holds_one_record_of_each_kind_as_mods_of_flowers_want_it(journey):
    content = journey(
        encode_task(Task("train", {"params": {"a": TABLE}, "more": TABLE}, ids=[1, 2], round=4), {"lr": 0.5})
    )
    assert len(content.array_records) == len(content.config_records) == 1


def test_flowers_strategies_find_what_they_look_for(journey):
    metrics = {"loss": torch.tensor(0.5)}
    content = journey(encode_reply(Reply({"params": {"a": TABLE}, "more": TABLE}, torch.tensor(3), {}, metrics)))
    assert len(content.array_records) == len(content.metric_records) == 1
    assert content["arrays"].to_torch_state_dict()["a"].tolist() == TABLE.tolist()
    assert dict(content["metrics"]) == {"num-examples": 3, "loss": 0.5}


# Messages of other people's apps


def test_a_task_of_another_app_is_read(journey):
    content = RecordDict({"model": ArrayRecord({"a.weight": TABLE}), "config": ConfigRecord({"server-round": 3})})
    received = decode_task(journey(content), "train")
    assert_same(received.shared, {"params": {"a.weight": TABLE}})
    assert received._replace(shared={}) == Task("train", {}, None, 3, "stack")
    bare = decode_task(journey(RecordDict({"arrays": ArrayRecord()})), "evaluate")
    assert bare == Task("evaluate", {"params": {}}, None, 0, "stack")


def test_a_reply_of_another_app_is_read(journey):
    told = MetricRecord({"num-examples": 3, "loss": 0.25, "count": 4, "of-class": [0.5, 1.0], "counts": [1, 2]})
    content = RecordDict({"model": ArrayRecord({"a": TABLE}), "numbers": told, "more": ConfigRecord({"x": 1})})
    received = decode_reply(journey(content), {"params": {"a": torch.zeros(2, 3)}})
    assert_same(received.update, {"params": {"a": TABLE}})
    assert_same(received.weight, torch.tensor(3))
    assert list(received.metrics) == ["loss", "count", "of-class", "counts"]
    assert {name: value.tolist() for name, value in received.metrics.items()} == {
        name: value for name, value in told.items() if name != "num-examples"
    }


def test_an_evaluation_of_another_app_is_read(journey):
    content = RecordDict({"metrics": MetricRecord({"num-examples": 3.5, "loss": 0.25})})
    received = decode_reply(journey(content), {"params": {"a": TABLE}})
    assert received.update == {}
    assert_same(received.weight, torch.tensor(3.5, dtype=torch.float64))


# What cannot be sent


@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex32], ids=str)
def test_what_safetensors_cannot_hold_is_refused_outside_the_model_by_its_name(dtype):
    encode_task(Task("train", {"control": {"a": torch.ones(2)}}))
    part = torch.ones(2, 2, dtype=torch.float64 if dtype == torch.complex128 else torch.float16)
    with pytest.raises((TypeError, ValueError), match="control/a.*complex"):
        encode_task(Task("train", {"control": {"a": torch.view_as_complex(part)}}))


@pytest.mark.parametrize("name", ["__metadata__", "", "a/b", "a@b"])
def test_names_that_cannot_be_read_again_are_refused_or_arrive(name):
    for shared in (
        {name: TABLE},
        {name: {}},
        {"a": {name: TABLE}},
        {"a": {name: {}}},
        {"params": {"a": {name: TABLE}}},
    ):
        try:
            content = encode_task(Task("train", shared))
        except ValueError as error:
            assert repr(name)[1:-1] in str(error)
        else:
            assert name == "__metadata__"
            assert_same({"params": {}} | decode_task(content, "train").shared, {"params": {}} | shared)


def test_a_metric_may_not_take_the_weight_s_name():
    with pytest.raises(ValueError, match="num-examples"):
        encode_reply(Reply({}, torch.tensor(1), {}, {"num-examples": torch.tensor(1)}))


def test_metrics_of_any_name_arrive(journey):
    metrics = {"hr@10": torch.tensor(0.5), "loss/of group 1": torch.tensor(1.0), "Größe": torch.tensor(2)}
    assert_same(decode_reply(journey(encode_reply(Reply({}, torch.tensor(1), {}, metrics)))).metrics, metrics)
    several = Replies([0], torch.ones(1), {}, {}, {name: value[None] for name, value in metrics.items()})
    assert_same(decode_replies(journey(encode_replies(several)), [0], {}).metrics, several.metrics)


# What is refused

LIKE = {"params": {"a": torch.zeros(2, 3), "emb": torch.zeros(9, 2)}}
UPDATE = {"params": {"a": TABLE, "emb": rows([1, 2])}, "control": {"c": torch.ones(2)}, "bare": {}}


def task():
    return encode_task(Task("train", UPDATE, [0, 1], 3), {"lr": 0.5})


def reply():
    return encode_reply(Reply(UPDATE, torch.tensor(4), {}, {"loss": torch.tensor(0.5)}))


def replies():
    update = tree.stack([{"a": TABLE, "emb": rows([1, 2]), "more": torch.ones(2)}] * 2)
    loss = {"loss": torch.tensor([0.5, 0.25])}
    return encode_replies(Replies([0, 2], torch.tensor([1.0, 3.0]), {"params": update}, {}, loss, {1: "it fell"}))


def read_task(content):
    return decode_task(content, "train", "the word of Eve")


def read_reply(content):
    return decode_reply(content, LIKE, "the word of Eve")


def read_replies(content):
    return decode_replies(content, [0, 1, 2], LIKE, "the word of Eve")


READ = {task: read_task, reply: read_reply, replies: read_replies}


def spot(content, record, name):
    """Record and key of what is called so: what is fedsim's own is in a task's "config", under "fedsim."."""
    if record == "fedsim" and "fedsim" not in content:
        return content["config"], f"fedsim.{name}"
    return content[record], name.replace("_", "-") if record == "metrics" else name


def put(record, **values):
    """Gives values to keys of a record."""

    def damage(content):
        for name, value in values.items():
            place, key = spot(content, record, name)
            place[key] = value

    return damage


def drop(record, *names):
    """Takes keys out of a record, or all of it out of the message."""

    def damage(content):
        for name in names:
            place, key = spot(content, record, name)
            del place[key]
        if not names:
            del content[record]

    return damage


def swap(record, other):
    """Has another record, of another kind perhaps, stand where one stood."""

    def damage(content):
        content.pop(record, None)
        content[record] = other

    return damage


def hold(record, **leaves):
    """Puts tensors among the arrays; "__" is a slash in their names, "_at_" an at."""

    def damage(content):
        for name, leaf in leaves.items():
            content[record][name.replace("__", "/").replace("_at_", "@")] = to_array(leaf)

    return damage


def both(*damages):
    def damage(content):
        for one in damages:
            one(content)

    return damage


def safetensors(told, data=b""):
    """Data that begins like safetensors and says this."""
    header = json.dumps(told).encode()
    return struct.pack("<Q", len(header)) + header + data


def leaf(shape, size, dtype="F32"):
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}


ARRAYS, METRICS, CONFIG = ArrayRecord({"a": Array(TABLE.numpy())}), MetricRecord({"ids": 1}), ConfigRecord({"a": 1})
GOOD_REST = save({"control/c": torch.ones(2)})
HUGE = 10**12

# of tasks and of replies
TREE_DAMAGES = {
    "another version": (put("fedsim", version=VERSION + 1), f"version {VERSION + 1}"),
    "a version of letters": (put("fedsim", version="1"), "version '1'"),
    "a version that is a list": (put("fedsim", version=[VERSION]), "version"),
    "no version": (drop("fedsim", "version"), "version"),
    "no arrays": (drop("arrays"), "ArrayRecord"),
    "'arrays' of words": (swap("arrays", CONFIG), "ArrayRecord"),
    "'arrays' of metrics": (swap("arrays", METRICS), "ArrayRecord|MetricRecord"),
    "two records of arrays": (swap("more", ARRAYS), "ArrayRecord.*'arrays', 'more'"),
    "arrays, and there should be none": (put("fedsim", params=False), "arrays"),
    "a model that is there by a word": (put("fedsim", params="no"), "params"),
    "a model twice": (put("fedsim", rest=save({"params/a": TABLE})), "params"),
    "a model twice, the second empty": (put("fedsim", rest=save({"params/": torch.empty(0)})), "params"),
    "a model twice, the second a leaf": (put("fedsim", rest=save({"params": TABLE})), "params"),
    "an array that is none": (swap("arrays", ArrayRecord({"a": Array("float32", (1,), "numpy.ndarray", b"x")})), "'a'"),
    "a name of slashes": (hold("arrays", a____b=TABLE), "'a//b'"),
    "rows without values": (drop("arrays", "emb@values"), "'emb'"),
    "rows beyond the table": (hold("arrays", emb_at_index=torch.tensor([1, 9])), "'emb'"),
    "rest of text": (put("fedsim", rest="abc"), "rest"),
    "rest of a list": (put("fedsim", rest=[b"abc"]), "rest"),
    "rest of a number": (put("fedsim", rest=3), "rest"),
    "rest of nothing known": (put("fedsim", rest=b"what is this?"), "rest"),
    "rest of one byte": (put("fedsim", rest=b"\0"), "rest"),
    "rest cut short": (put("fedsim", rest=GOOD_REST[:-1]), "rest"),
    "rest cut in its header": (put("fedsim", rest=GOOD_REST[:20]), "rest"),
    "rest too long": (put("fedsim", rest=GOOD_REST + b"\0"), "rest"),
    "rest with a header of a million million": (put("fedsim", rest=struct.pack("<Q", HUGE) + b"{}"), "rest"),
    "rest of a million million numbers": (put("fedsim", rest=safetensors(leaf([HUGE], 4 * HUGE))), "rest"),
    "rest of a million million in none": (put("fedsim", rest=safetensors(leaf([HUGE], 0))), "rest"),
    "rest of none of very many": (put("fedsim", rest=safetensors(leaf([0, 2**62, 2**62], 0))), "rest"),
    "rest of a type unknown": (put("fedsim", rest=safetensors(leaf([1], 4, "X32"), bytes(4))), "rest"),
    "rest of a type that torch lacks": (put("fedsim", rest=safetensors(leaf([8], 6, "F6_E2M3"), bytes(6))), "rest"),
    "rest of a size below zero": (put("fedsim", rest=safetensors(leaf([-1], 4), bytes(4))), "rest"),
    "rest with a name of slashes": (put("fedsim", rest=save({"a//b": TABLE})), "'a//b'"),
    "rest with a leaf that is a branch": (put("fedsim", rest=save({"a": TABLE, "a/b": torch.ones(1)})), "'a'"),
    "rest with half of rows": (put("fedsim", rest=save({"a@index": torch.tensor([0])})), "'a'"),
}

TASK_DAMAGES = {
    "'config' of metrics": (swap("config", METRICS), "config"),
    "'config' of arrays": (swap("config", ARRAYS), "config"),
    "one id": (put("fedsim", ids=3), "ids"),
    "ids of letters": (put("fedsim", ids=["0", "1"]), "ids"),
    "ids of fractions": (put("fedsim", ids=[0.0, 1.0]), "ids"),
    "ids of truths": (put("fedsim", ids=[True, False]), "ids"),
    "ids of bytes": (put("fedsim", ids=b"\0\1"), "ids"),
    "ids below zero": (put("fedsim", ids=[0, -1]), "ids"),
    "a round of letters": (put("fedsim", round="3"), "round"),
    "a round of a fraction": (put("fedsim", round=3.0), "round"),
    "a round of several": (put("fedsim", round=[3]), "round"),
    "a round of a truth": (put("fedsim", round=True), "round"),
    "a way to reduce that there is not": (put("fedsim", reduce="median"), "reduce.*'median'"),
    "a way to reduce that is a list": (put("fedsim", reduce=["mean"]), "reduce"),
    "another action": (put("fedsim", action="forget"), "'forget'"),
    "an action of a number": (put("fedsim", action=1), "action"),
}

REPLY_DAMAGES = {
    "'fedsim' of arrays": (swap("fedsim", ARRAYS), "fedsim"),
    "'fedsim' of metrics": (swap("fedsim", METRICS), "fedsim"),
    "no metrics": (drop("metrics"), "MetricRecord"),
    "'metrics' of words": (swap("metrics", CONFIG), "MetricRecord"),
    "'metrics' of arrays": (swap("metrics", ARRAYS), "ArrayRecord|MetricRecord"),
    "two records of metrics": (swap("more", METRICS), "MetricRecord.*'metrics', 'more'"),
    "no weight": (drop("metrics", "num-examples"), "num-examples"),
    "a weight below zero": (put("metrics", num_examples=-1), "num-examples"),
    "a weight a little below zero": (put("metrics", num_examples=-1e-300), "num-examples"),
    "a weight that is no number": (put("metrics", num_examples=float("nan")), "num-examples"),
    "an infinite weight": (put("metrics", num_examples=float("inf")), "num-examples"),
    "a weight of several": (put("metrics", num_examples=[1, 2]), "num-examples"),
    "a weight of none": (put("metrics", num_examples=[]), "num-examples"),
    "a weight that no float holds": (put("metrics", num_examples=10**400), "num-examples"),
    "a weight that no integer holds": (put("metrics", num_examples=2**64 - 1), "num-examples"),
    "a metric that no integer holds": (put("metrics", loss=2**64 - 1), "loss"),
    "types of a number": (put("fedsim", dtypes=3), "dtypes"),
    "types of a word": (put("fedsim", dtypes="ab"), "dtypes|type 'a'"),
    "types of bytes": (put("fedsim", dtypes=b"ab"), "dtypes|type 97"),
    "types too few": (put("fedsim", dtypes=["int64"]), "dtypes"),
    "types too many": (put("fedsim", dtypes=["int64", "float32", "float32"]), "dtypes"),
    "a type of a number": (put("fedsim", dtypes=[1, 2]), "dtypes|num-examples"),
    "a type for the weight that is not real": (put("fedsim", dtypes=["complex64", "float32"]), "num-examples"),
    "a type for the weight that is true": (put("fedsim", dtypes=["bool", "float32"]), "num-examples"),
    "a leaf of another shape": (hold("arrays", a=TABLE.T), r"params/a.*\(3, 2\).*\(2, 3\)"),
    "a leaf with an axis more": (hold("arrays", a=TABLE[None]), r"params/a.*\(1, 2, 3\)"),
    "a leaf with an axis less": (hold("arrays", a=TABLE[0]), r"params/a.*\(3,\)"),
    "rows of another table": (hold("arrays", emb_at_size=torch.tensor(10)), r"params/emb.*\(10, 2\).*\(9, 2\)"),
    "rows of another width": (hold("arrays", emb_at_values=torch.ones(2, 3)), r"params/emb.*\(9, 3\)"),
    "rows of a number": (hold("arrays", emb_at_values=torch.ones(2)), r"params/emb.*\(9,\)"),
    "rows of several": (
        hold("arrays", emb_at_index=torch.tensor([[1, 2]]), emb_at_values=torch.ones(1, 2, 2)),
        "params/emb",
    ),
} | {
    f"the type {name!r}": (put("fedsim", dtypes=["int64", name]), "loss")
    for name in (
        "",
        "Tensor",
        "load",
        "float33",
        "qint8",
        "quint4x2",
        "bits8",
        "int4",
        "has_mps",
        "_dynamo",
        "__dict__",
    )
}

INDEX = {"replies": ["update/params/emb@index", "update/params/emb@values", "update/params/emb@size"]}
REPLIES_DAMAGES = {
    "another version": (put("fedsim", version=VERSION + 1), f"version {VERSION + 1}"),
    "of another app": (drop("fedsim"), "fedsim"),
    "'fedsim' of arrays": (swap("fedsim", ARRAYS), "fedsim"),
    "no replies": (drop("replies"), "repl"),
    "'replies' of words": (swap("replies", CONFIG), "repl"),
    "'replies' of metrics": (swap("replies", METRICS), "repl"),
    "one id": (put("fedsim", ids=3), "ids|clients"),
    "ids of letters": (put("fedsim", ids=["0", "2"]), "ids|clients"),
    "ids of fractions": (put("fedsim", ids=[0.0, 2.0]), "ids|clients"),
    "ids of bytes": (put("fedsim", ids=b"\x00\x02"), "ids|clients"),
    "ids of truths": (both(put("fedsim", ids=[False, True]), put("fedsim", failed=[2])), "ids|clients|failed"),
    "an id that was not asked": (put("fedsim", ids=[0, 5]), "clients"),
    "an id more than was asked": (put("fedsim", ids=[0, 2, 5]), "clients"),
    "an id twice": (put("fedsim", ids=[0, 0]), "clients"),
    "an id that answered and failed": (put("fedsim", failed=[2]), "clients"),
    "an id missing": (put("fedsim", ids=[0]), "clients"),
    "no ids": (drop("fedsim", "ids"), "clients"),
    "failures of letters": (put("fedsim", failed=["1"]), "failed|clients"),
    "one failure": (put("fedsim", failed=1), "failed|clients"),
    "fewer reasons than failures": (drop("fedsim", "reasons"), "reasons|clients"),
    "more reasons than failures": (put("fedsim", reasons=["a", "b"]), "reasons|clients"),
    "reasons of numbers": (put("fedsim", reasons=[1]), "reasons|clients"),
    "one reason": (put("fedsim", reasons="x"), "reasons|clients"),
    "no weight": (drop("replies", "weight"), "weight"),
    "a weight below zero": (hold("replies", weight=torch.tensor([1.0, -1.0])), "weight"),
    "a weight that is no number": (hold("replies", weight=torch.tensor([1.0, torch.nan])), "weight"),
    "an infinite weight": (hold("replies", weight=torch.tensor([1.0, torch.inf])), "weight"),
    "weights of two axes": (hold("replies", weight=torch.ones(2, 1)), "weight"),
    "weights that are not real": (hold("replies", weight=torch.ones(2, dtype=torch.complex64)), "weight"),
    "weights that are true": (hold("replies", weight=torch.ones(2).bool()), "weight"),
    "weights in a branch": (both(drop("replies", "weight"), hold("replies", weight__a=torch.ones(2))), "weight"),
    "one weight": (hold("replies", weight=torch.tensor(1.0)), "leaves|weight"),
    "a weight more": (hold("replies", weight=torch.ones(3)), "leaves|weight"),
    "a leaf of one number": (hold("replies", update__params__more=torch.tensor(1.0)), "leaves|more"),
    "a leaf of three": (hold("replies", update__params__more=torch.ones(3)), "leaves|more"),
    "a leaf of none": (hold("replies", update__params__more=torch.ones(0, 2)), "leaves|more"),
    "a leaf of another shape": (hold("replies", update__params__a=torch.ones(2, 3, 2)), r"params/a.*\(3, 2\)"),
    "a leaf that is not stacked": (hold("replies", update__params__a=TABLE), r"params/a.*\(3,\).*\(2, 3\)"),
    "rows that are not stacked": (
        hold("replies", update__params__emb_at_index=torch.tensor([1, 2]), update__params__emb_at_values=TABLE[:, :2]),
        "emb",
    ),
    "rows of a table too large": (hold("replies", update__params__emb_at_size=torch.tensor(HUGE)), "params/emb"),
    "an update that is a leaf": (
        both(swap("replies", pack({"weight": torch.ones(2), "update": torch.ones(2)}))),
        "update",
    ),
    "an update that is rows": (
        swap("replies", pack({"weight": torch.ones(2), "update": rows([[0], [1]])})),
        "update",
    ),
    "metrics that are a leaf": (
        swap("replies", pack({"weight": torch.ones(2), "metrics": torch.ones(2)})),
        "metrics",
    ),
    "metrics that are rows": (
        swap("replies", pack({"weight": torch.ones(2), "metrics": {"a": rows([[0], [1]])}})),
        "metrics",
    ),
    "metrics in branches": (hold("replies", metrics__a__b=torch.ones(2)), "metrics"),
    "metrics of several numbers": (hold("replies", metrics__loss=torch.ones(2, 3)), "metrics|loss"),
    "metrics that are not real": (hold("replies", metrics__loss=torch.ones(2, dtype=torch.complex64)), "metrics|loss"),
    "something else": (hold("replies", personal__a=torch.ones(2)), "personal"),
    "a name of very many branches": (
        lambda content: content["replies"].update({"update" + "/a" * 2000: to_array(torch.ones(2))}),
        "update",
    ),
    "leaves of nobody": (
        both(drop("fedsim", "ids"), put("fedsim", failed=[0, 1, 2]), put("fedsim", reasons=["a", "b", "c"])),
        "leaves|clients|weight",
    ),
}

DAMAGES = {
    f"{base.__name__}: {name}": (base, *damage)
    for base, table in {
        task: TREE_DAMAGES | TASK_DAMAGES,
        reply: TREE_DAMAGES | REPLY_DAMAGES,
        replies: REPLIES_DAMAGES,
    }.items()
    for name, damage in table.items()
}


@pytest.mark.parametrize("base", READ, ids=lambda base: base.__name__)
def test_messages_like_those_that_are_refused_are_read(base, journey):
    """What the tables above damage is sound before."""
    received = READ[base](journey(base()))
    if base is replies:
        assert (received.ids, received.failed) == ([0, 2], {1: "it fell"})
    else:
        assert_same(received.shared if base is task else received.update, UPDATE)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_message_that_is_not_what_it_must_be_is_refused_and_what_is_wrong_is_said(name):
    base, damage, words = DAMAGES[name]
    content = base()
    READ[base](content)
    damage(content)
    with pytest.raises(MalformedMessage, match=f"(?s)the word of Eve.*(?:{words})") as refused:
        READ[base](content)
    assert len(str(refused.value)) < 10_000


SOUND = {
    "a weight of zero": (reply, put("metrics", num_examples=0)),
    "a weight that is a fraction": (reply, both(put("metrics", num_examples=0.5), drop("fedsim", "dtypes"))),
    "no types": (reply, drop("fedsim", "dtypes")),
    "another leaf, not of those sent": (reply, hold("arrays", other=TABLE.T)),
    "no rest": (reply, drop("fedsim", "rest")),
    "rest without anything": (reply, put("fedsim", rest=b"")),
    "a model told by nobody": (task, drop("fedsim", "params")),
    "no config": (task, drop("config")),
    "no clients": (task, drop("fedsim", "ids")),
    "a record of words that nobody knows": (task, swap("more", CONFIG)),
    "weights of zero": (replies, hold("replies", weight=torch.zeros(2))),
    "weights that count": (replies, hold("replies", weight=torch.tensor([3, 4]))),
    "ids in another order": (replies, put("fedsim", ids=[2, 0])),
    "no metrics": (replies, drop("replies", "metrics/loss")),
    "one metric more": (replies, hold("replies", metrics__more=torch.tensor([1, 2]))),
    "a leaf more, not of those sent": (replies, hold("replies", update__control=torch.ones(2, 7))),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_message_that_is_only_unusual_is_read(name):
    base, change = SOUND[name]
    content = base()
    change(content)
    READ[base](content)


# What nobody thought of


def read_or_refuse(base, content):
    """Whether a message is read, or refused; whatever else is raised, is raised."""
    try:
        READ[base](content)
    except MalformedMessage:
        return "refused"
    return "read"


def outcomes(*strategies):
    """Runs a function on what hypothesis thinks of; gives all that it gave."""

    def run(function):
        found = set()

        @search
        @given(st.tuples(*strategies))
        def attempt(arguments):
            found.add(function(*arguments))

        attempt()
        return found

    return run


edits = st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), min_size=1, max_size=4)


def edited(data, changes, longer):
    data = bytearray(data)
    for place, byte in changes:
        data[place % len(data)] = byte
    return bytes(data[:longer] if longer < 0 else data + bytes(longer))


@pytest.mark.parametrize("base", READ, ids=lambda base: base.__name__)
def test_arrays_with_wrong_bytes_are_read_or_refused(base):
    @outcomes(st.integers(0, 20), edits, st.sampled_from([0, 0, 0, -1, 1]))
    def found(which, changes, longer):
        content = base()
        record = content["replies" if base is replies else "arrays"]
        name = list(record)[which % len(record)]
        array = record[name]
        record[name] = Array(array.dtype, array.shape, array.stype, edited(array.data, changes, longer))
        return read_or_refuse(base, content)

    assert found == {"read", "refused"}


@pytest.mark.parametrize("base", [task, reply], ids=lambda base: base.__name__)
def test_a_rest_with_wrong_bytes_is_read_or_refused(base):
    @outcomes(edits, st.sampled_from([0, 0, 0, -1, 1]))
    def found(changes, longer):
        content = base()
        record, key = spot(content, "fedsim", "rest")
        record[key] = edited(record[key], changes, longer)
        return read_or_refuse(base, content)

    assert found == {"read", "refused"}


words = st.sampled_from(
    [
        "version",
        "params",
        "rest",
        "action",
        "round",
        "reduce",
        "dtypes",
        "ids",
        "failed",
        "reasons",
        "server-round",
        "a",
    ]
)
scalars = (
    st.integers(-(2**63), 2**64 - 1)
    | st.integers(-1, 3)
    | st.floats()
    | st.booleans()
    | st.binary(max_size=9)
    | st.text(max_size=4)
    | st.sampled_from(["train", "mean", "int64", "bool", "qint8", "complex64", "float16"])
)
lists = st.one_of(
    *(
        st.lists(one, max_size=3)
        for one in (
            st.integers(-1, 3),
            st.floats(),
            st.booleans(),
            st.binary(max_size=3),
            st.sampled_from(["int64", "float32", "bool", "qint8", "complex64", "a"]),
        )
    )
)
numbers = st.integers(-(2**63), 2**64 - 1) | st.integers(-1, 3) | st.floats() | st.lists(st.floats(), max_size=3)
arrays = st.sampled_from(
    [torch.tensor(1), torch.ones(2), TABLE, torch.ones(2, 2, 3), torch.tensor([[1, 2]]), torch.ones(2).bool()]
).map(to_array)
labels = st.builds(
    str.__add__,
    st.sampled_from(["", "a", "emb", "weight", "update/", "update/a", "update/params/emb", "metrics/loss", "metrics"]),
    st.sampled_from(["", "@index", "@values", "@size", "/", "/b"]),
)
records = st.one_of(
    st.dictionaries(words, scalars | lists, max_size=3).map(ConfigRecord),
    st.dictionaries(words | st.just("num-examples"), numbers, max_size=3).map(MetricRecord),
    st.dictionaries(labels, arrays, max_size=3).map(ArrayRecord),
)
mutations = st.one_of(
    st.builds(lambda name, value: ("put", "fedsim", name, value), words, scalars | lists),
    st.builds(
        lambda record, name, value: ("put", record, name, value),
        st.sampled_from(["config", "clients"]),
        words,
        scalars | lists,
    ),
    st.builds(
        lambda name, value: ("put", "metrics", name, value), st.sampled_from(["num-examples", "loss", "a"]), numbers
    ),
    st.builds(
        lambda record, name, value: ("put", record, name, value), st.sampled_from(["arrays", "replies"]), labels, arrays
    ),
    st.builds(lambda record, index: ("drop", record, index, None), st.integers(0, 9), st.integers(0, 9)),
    st.builds(
        lambda record, other: ("swap", record, None, other),
        st.sampled_from(["arrays", "metrics", "config", "fedsim", "clients", "replies", "more"]),
        records,
    ),
)


def mutate(content, change):
    what, record, name, value = change
    if what == "put" and record in content:
        content[record][name] = value
    elif what == "drop" and content:
        found = list(content)[record % len(content)]
        keys = [None, *content[found]]
        key = keys[name % len(keys)]
        drop(found, *([] if key is None else [key]))(content)
    elif what == "swap":
        swap(record, value)(content)


@pytest.mark.parametrize("base", READ, ids=lambda base: base.__name__)
def test_a_message_with_anything_changed_is_read_or_refused(base):
    @outcomes(st.lists(mutations, min_size=1, max_size=3))
    def found(changes):
        content = base()
        for change in changes:
            try:
                mutate(content, change)
            except TypeError:  # Flower's records take no such value
                continue
        return read_or_refuse(base, content)

    assert found == {"read", "refused"}
