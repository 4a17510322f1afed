"""Tensors and trees come back from Flower's arrays to the bit, and arrays that are not what they say are refused."""

import os
import pickle
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from flwr.common.serde import array_record_from_proto, array_record_to_proto
from flwr.proto.recorddict_pb2 import ArrayRecord as ProtoArrayRecord
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsim import tree
from fedsim.flower.arrays import MalformedMessage, flatten, pack, to_array, to_tensor, unflatten, unpack
from fedsim.tree import Rows

search = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.too_slow],
)

INTEGERS = [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64]
NUMPY = [torch.bool, *INTEGERS, torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128]
OWN = [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]  # numpy has none of them
SHAPES = [(), (1,), (5,), (2, 3, 4), (0,), (3, 0, 2)]
NAN = {  # not those that arithmetic makes: one that signals, and one of negative sign with something in it
    torch.float16: (torch.int16, [0x7D01, 0xFEAB - 2**16]),
    torch.bfloat16: (torch.int16, [0x7F81, 0xFFAB - 2**16]),
    torch.float32: (torch.int32, [0x7F800001, 0xFFC12345 - 2**32]),
    torch.float64: (torch.int64, [0x7FF0000000000001, 0xFFF8123456789ABC - 2**64]),
}


def as_protobuf(record):
    """The record after a journey in one piece."""
    data = array_record_to_proto(record).SerializeToString()
    return array_record_from_proto(ProtoArrayRecord.FromString(data))


def as_objects(record):
    """The record after a journey in pieces, as a SuperLink hands them on."""
    pieces = {ident: piece.deflate() for ident, piece in get_all_nested_objects(record).items()}
    return inflate_object_from_contents(record.object_id, pieces)


@pytest.fixture(params=[lambda record: record, as_protobuf, as_objects], ids=["direct", "protobuf", "objects"])
def journey(request):
    return request.param


def bits(tensor):
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    return flat.clone(memory_format=torch.contiguous_format).view(torch.uint8).tolist() if len(flat) else []


def assert_same(one, other):
    assert one.dtype == other.dtype and one.shape == other.shape and bits(one) == bits(other)


def assert_same_tree(one, other):
    assert one.keys() == other.keys()
    for name, leaf in one.items():
        if isinstance(leaf, dict):
            assert_same_tree(leaf, other[name])
        elif isinstance(leaf, Rows):
            assert_same(leaf.index, other[name].index)
            assert_same(leaf.values, other[name].values)
            assert leaf.size == other[name].size and type(other[name].size) is int
        else:
            assert_same(leaf, other[name])


def noise(dtype, shape, seed=0):
    """Any bits at all, NaN of every kind among them; a bool has only two values."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel()
    if dtype == torch.bool:
        return torch.randint(2, shape, generator=generator).bool()
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.randint(256, (count * size,), generator=generator, dtype=torch.uint8).view(dtype).reshape(shape)


# There and back


@pytest.mark.parametrize("dtype", [*NUMPY, *OWN], ids=str)
def test_a_tensor_of_any_type_and_shape_comes_back_to_the_bit(dtype, journey):
    sent = {f"{shape}": noise(dtype, shape) for shape in SHAPES}
    received = unpack(journey(pack(sent)))
    assert list(received) == list(sent)
    for name, tensor in sent.items():
        assert_same(tensor, received[name])


@pytest.mark.parametrize("dtype", NAN, ids=str)
def test_what_a_nan_carries_arrives(dtype, journey):
    integers, patterns = NAN[dtype]
    sent = torch.tensor(patterns, dtype=integers).view(dtype)
    assert sent.isnan().all()
    received = unpack(journey(pack({"a": sent})))["a"]
    assert received.dtype == dtype and received.view(integers).tolist() == patterns


def views():
    table = torch.arange(24.0).reshape(4, 6)
    turned = torch.tensor([[1 + 2j, -3 - 4j]]).conj()
    return {
        "transposed": table.T,
        "permuted": torch.arange(24).reshape(2, 3, 4).permute(2, 0, 1),
        "every second": table[::2, 1::2],
        "a column": table[:, 3],
        "one number": table[2, 3],
        "expanded": torch.tensor([1.0, 2.0])[:, None].expand(2, 5),
        "a number expanded": torch.tensor(7).expand(3, 2),
        "expanded in half": torch.tensor([1.5], dtype=torch.bfloat16).expand(4),
        "transposed in half": table.bfloat16().T,
        "with a gradient": table.clone().requires_grad_() * 2,
        "a parameter": torch.nn.Parameter(table.clone()),
        "conjugated": turned,
        "imaginary part of a conjugated one": turned.imag,
    }


@pytest.mark.parametrize("name", views())
def test_a_view_of_something_else_comes_back_as_the_numbers_that_it_shows(name, journey):
    sent = views()[name]
    received = unpack(journey(pack({"a": sent})))["a"]
    assert_same(sent, received)
    assert received.is_contiguous() and not received.requires_grad


def test_tensors_that_share_memory_come_back_as_tensors_that_do_not(journey):
    whole = torch.arange(6.0)
    received = unpack(journey(pack({"whole": whole, "half": whole[3:], "again": whole})))
    received["whole"].fill_(-1)
    assert received["half"].tolist() == [3, 4, 5] and received["again"].tolist() == whole.tolist()
    assert whole.tolist() == list(range(6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_written_into_a_received_tensor_reaches_neither_the_message_nor_the_next_who_reads_it(dtype):
    sent = torch.arange(4).to(dtype)
    record = pack({"a": sent})
    before = record["a"].data
    received = to_tensor(record["a"])
    received.add_(1)
    assert record["a"].data == before and sent.tolist() == [0, 1, 2, 3]
    assert to_tensor(record["a"]).tolist() == [0, 1, 2, 3] and received.tolist() == [1, 2, 3, 4]


def test_a_type_that_cannot_travel_is_refused_where_it_is_sent():
    to_array(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match="ComplexHalf|complex32"):
        to_array(torch.view_as_complex(torch.zeros(2, 2, dtype=torch.float16)))


# As Flower does it


@pytest.mark.parametrize("dtype", NUMPY, ids=str)
def test_an_array_is_byte_for_byte_what_flower_makes(dtype):
    for shape in SHAPES:
        tensor = noise(dtype, shape)
        ours, flowers = to_array(tensor), Array(tensor.numpy())
        assert (ours.dtype, ours.shape, ours.stype) == (flowers.dtype, flowers.shape, flowers.stype)
        assert type(ours.shape) is tuple and ours.data == flowers.data
        assert ours.object_id == flowers.object_id


@pytest.mark.parametrize("dtype", NUMPY, ids=str)
def test_flower_reads_what_we_write(dtype):
    sent = {f"{shape}": noise(dtype, shape) for shape in SHAPES}
    for name, tensor in pack(sent).to_torch_state_dict().items():
        assert_same(sent[name], tensor)


@pytest.mark.parametrize("dtype", OWN, ids=str)
def test_flower_refuses_what_numpy_has_no_type_for_and_does_not_take_its_bits_for_numbers(dtype):
    with pytest.raises(TypeError, match="Unsupported serialization type"):
        to_array(torch.ones(2, dtype=dtype)).numpy()


@pytest.mark.parametrize("dtype", NUMPY, ids=str)
def test_we_read_what_flower_writes_in_either_order_of_axes_and_of_bytes(dtype, journey):
    for shape in SHAPES:
        tensor = noise(dtype, shape)
        values = tensor.numpy()
        swapped = values.dtype.newbyteorder(">")
        written = {
            "as it is": values,
            "columns first": np.array(values, order="F"),
            "every second": np.stack((values, values), -1)[..., 1],
            "highest byte first": np.array(values.byteswap()).view(swapped),
            "highest byte first, columns first": np.array(values.byteswap(), order="F").view(swapped),
        }
        received = journey(ArrayRecord({name: Array(array) for name, array in written.items()}))
        for name, array in received.items():
            assert_same(tensor, to_tensor(array, name))
        # these are what they are called
        assert (b"'fortran_order': True" in received["columns first"].data) == (tensor.numel() > 1 and len(shape) > 1)
        assert (b"'descr': '>" in received["highest byte first"].data) == (values.itemsize > 1)


def test_a_models_state_comes_back_in_its_order_to_flower_and_to_us(journey):
    state = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).state_dict()
    assert [name for name, leaf in state.items() if not leaf.ndim] == ["1.num_batches_tracked"]
    ours, flowers = journey(pack(dict(state))), journey(ArrayRecord(state))
    assert ours == flowers and list(ours) == list(state)
    for received in (unpack(flowers), unpack(ours), ours.to_torch_state_dict()):
        assert list(received) == list(state)
        assert_same_tree(dict(received), dict(state))


# Trees


def rows(index, size=9, seed=1):
    index = torch.tensor(index, dtype=torch.int64)
    return Rows(index, noise(torch.float32, (*index.shape, 2), seed), size)


TREES = {
    "nothing": {},
    "one empty branch": {"a": {}},
    "empty branches in branches": {"a": {"b": {"c": {}}, "d": {}}, "e": {}},
    "empty beside full": {"a": {"full": torch.ones(2), "empty": {}}},
    "names with dots and spaces": {"0.weight": torch.ones(1), "a.b": {"c.d": torch.ones(2)}, " ": torch.ones(3)},
    "names of other alphabets": {"Größe": torch.ones(1), "λ": {"大小": torch.ones(2)}, "🌸": torch.ones(3)},
    "names like those of others": {"a": {"b": torch.ones(1)}, "a.b": torch.ones(2), "b": torch.ones(3)},
    "rows": {"items": rows([4, 1, 4])},
    "rows in a branch": {"a": {"items.weight": rows([0]), "bias": torch.ones(1)}},
    "rows of nothing": {"items": rows([]), "table": Rows(torch.empty(0).long(), torch.empty(0, 3), 0)},
    "rows stacked": {"items": rows([[4, -1], [3, 8]])},
    "rows of nothing stacked": {"items": rows([[], [], []])},
    "rows of numbers": {"items": Rows(torch.tensor([1, 0]), torch.tensor([2, 3], dtype=torch.uint8), 2)},
    "rows that share a table's memory": {
        "a": Rows(torch.arange(3), torch.arange(6.0).reshape(2, 3).T, 3),
        "b": Rows(torch.arange(6)[::2], torch.tensor([1.0]).expand(3), 5),
    },
}


@pytest.mark.parametrize("name", TREES)
def test_a_tree_comes_back_as_it_was(name, journey):
    assert_same_tree(unpack(journey(pack(TREES[name]))), TREES[name])


def test_no_two_of_these_trees_look_the_same_on_their_way():
    assert len({tuple(pack(branch).items().__repr__()) for branch in TREES.values()}) == len(TREES)


@pytest.mark.parametrize("name", ["", "a/b", "a@b", "@"])
def test_a_key_that_a_name_cannot_hold_is_refused_where_it_is_sent(name):
    pack({"a": {"a": torch.ones(1)}, "a.b": torch.ones(1)})
    for branch in ({name: torch.ones(1)}, {"a": {name: torch.ones(1)}}, {name: {}}, {"a": {name: {}}}):
        with pytest.raises(ValueError, match="key"):
            pack(branch)


names = st.text(st.characters(exclude_characters="/@", exclude_categories=["Cs"]), min_size=1, max_size=6)
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
tensors = st.builds(noise, st.sampled_from([*NUMPY, *OWN]), shapes, st.integers(0, 99))
sparse = st.builds(rows, st.lists(st.integers(-1, 8), max_size=4), st.just(9), st.integers(0, 99))
trees = st.recursive(
    st.dictionaries(names, tensors | sparse, max_size=3),
    lambda inner: st.dictionaries(names, inner | tensors | sparse, max_size=3),
    max_leaves=6,
)


@settings(search, max_examples=100)
@given(trees)
def test_any_tree_comes_back(branch):
    assert_same_tree(unpack(as_objects(pack(branch))), branch)
    assert_same_tree(unpack(as_protobuf(pack(branch))), branch)


# What is refused


def header(text, body=bytes(8)):
    """Data that begins like .npy and says this."""
    told = text.encode("latin1") + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(told)) + told + body


def says(shape="(2,)", descr="'<f4'", fortran="False"):
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}"


GOOD = to_array(torch.tensor([1.0, 2.0]))
HUGE = 10**12


def changed(**fields):
    return Array(**{"dtype": GOOD.dtype, "shape": GOOD.shape, "stype": GOOD.stype, "data": GOOD.data, **fields})


def spoken(text, shape=(2,), body=bytes(8), dtype="float32"):
    return changed(data=header(text, body), shape=shape, dtype=dtype)


BAD_ARRAYS = {
    "no data": changed(data=b""),
    "fewer bytes than a header's length needs": changed(data=GOOD.data[:9]),
    "half a header": changed(data=GOOD.data[:40]),
    "a header and nothing": changed(data=GOOD.data[:-8]),
    "a byte less": changed(data=GOOD.data[:-1]),
    "a byte more": changed(data=GOOD.data + b"\0"),
    "not .npy": changed(data=b"GIF89a" + GOOD.data[6:]),
    "a pickle": changed(data=pickle.dumps([1.0, 2.0])),
    "another version": changed(data=GOOD.data[:6] + b"\x02\x00" + GOOD.data[8:]),
    "header of no dictionary": spoken("[1, 2]"),
    "header of no Python": spoken("{("),
    "header badly indented": spoken("  {\n x"),
    "header of many signs": spoken("-" * 9000 + "1"),
    "header of many brackets": spoken("[" * 9000),
    "header with a key missing": spoken("{'descr': '<f4', 'shape': (2,), }"),
    "header with a key too many": spoken(says().replace("}", "'more': 1, }")),
    "shape of no tuple": spoken(says("2")),
    "shape of a name": spoken(says("('a',)")),
    "shape of a truth": spoken(says("(True,)"), (1,), bytes(4)),
    "shape of a fraction": spoken(says("(2.0,)")),
    "shape below zero": spoken(says("(-2,)"), (-2,)),
    "shape below zero twice": spoken(says("(-1, -2)"), (-1, -2)),
    "a million million elements": spoken(says(f"({HUGE},)"), (HUGE,)),
    "a million million by a million million": spoken(says(f"({HUGE}, {HUGE})"), (HUGE, HUGE)),
    "more elements than can be counted": spoken(says(f"(0x1{'0' * 5000},)")),
    "none of very many": spoken(says(f"(0, {2**62}, {2**62})"), (0, 2**62, 2**62), b""),
    "none of more than can be counted": spoken(says(f"(0, {10**30})"), (0, 10**30), b""),
    "more axes than there may be": spoken(says(f"{(1,) * 65}"), (1,) * 65, bytes(4)),
    "type of nothing": spoken(says(descr="()")),
    "type of an empty list": spoken(says(descr="[]")),
    "type of a number": spoken(says(descr="3")),
    "type that nobody knows": spoken(says(descr="'<x9'")),
    "type of fields": spoken(says(descr="[('a', '<f4')]")),
    "type with a shape": spoken(says(descr="('<f4', (1,))")),
    "type of objects": spoken(says(descr="'|O'"), dtype="object"),
    "type of text": Array(np.array(["ab"])),
    "type of dates": Array(np.array(["2020-01-01"], dtype="M8[D]")),
    "type of raw bytes": Array(np.zeros(2, "V4")),
    "type of 80 bits": Array(np.zeros(2, np.longdouble)),
    "order of axes unknown": spoken(says(fortran="3")),
    "another type said": changed(dtype="float64"),
    "a type said that there is not": changed(dtype="Tensor"),
    "another shape said": changed(shape=(1, 2)),
    "no shape said": changed(shape=()),
    "serialised in a way unknown": changed(stype="torch.save"),
    "serialised in our way, of a type of numpy's": changed(stype="fedsim.bits"),
    "serialised in our way, of other bits": changed(stype="fedsim.bits", dtype="bfloat16"),
    "serialised in numpy's way, of a type of ours": changed(dtype="bfloat16"),
}


def test_arrays_like_those_that_are_refused_are_read():
    """What the table below changes is sound before."""
    assert_same(to_tensor(GOOD), torch.tensor([1.0, 2.0]))
    body = struct.pack("<2f", 1, 2)
    assert_same(to_tensor(spoken(says(), body=body)), torch.tensor([1.0, 2.0]))
    assert_same(to_tensor(spoken(says("()"), (), body[:4])), torch.tensor(1.0))
    assert_same(to_tensor(spoken(says("(0, 5)"), (0, 5), b"")), torch.empty(0, 5))
    assert_same(to_tensor(spoken(says(f"{(1,) * 32}"), (1,) * 32, body[:4])), torch.ones((1,) * 32))
    half = to_array(torch.ones(2, dtype=torch.bfloat16))
    assert_same(to_tensor(half), torch.ones(2, dtype=torch.bfloat16))


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_an_array_that_is_not_what_it_says_is_refused_by_its_name(name):
    with pytest.raises(MalformedMessage, match="the array of Eve"):
        to_tensor(BAD_ARRAYS[name], "the array of Eve")
    with pytest.raises(MalformedMessage, match=r"arrays: '0\.weight'"):
        unpack(ArrayRecord({"good": GOOD, "0.weight": BAD_ARRAYS[name]}))


def peak_bytes(function):  # of what numpy and Python take
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_header_that_asks_for_a_million_million_numbers_gets_no_memory():
    def refuse():
        for name in ("a million million elements", "a million million by a million million", "none of very many"):
            with pytest.raises(MalformedMessage):
                to_tensor(BAD_ARRAYS[name])

    large = to_array(torch.zeros(2**18))
    assert peak_bytes(lambda: to_tensor(large)) > 2**20  # what numpy takes is counted
    assert peak_bytes(refuse) < 2**20


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_objects_are_refused_and_not_run(tmp_path):
    for position, data in enumerate((pickle.dumps(Evil(tmp_path / "0")), b"")):
        folder = tmp_path / str(position)
        body = data or pickle.dumps(np.array([Evil(folder)], dtype=object))
        array = spoken(says("(1,)", "'|O'"), (1,), body, "object")
        with pytest.raises(MalformedMessage, match="the array of Eve"):
            to_tensor(array, "the array of Eve")
        assert not folder.exists()
        pickle.loads(body)  # it would have
        assert folder.exists()


ONE = torch.ones(1)
TABLE = {"t@index": torch.tensor([0, 2]), "t@values": torch.ones(2, 3), "t@size": torch.tensor(4)}
STACKED = TABLE | {"t@index": torch.tensor([[0], [-1]]), "t@values": torch.ones(2, 1, 3)}


def without(name):
    return {other: leaf for other, leaf in TABLE.items() if other != f"t@{name}"}


BAD_TREES = {
    "no name": ({"": ONE}, "''"),
    "a slash": ({"/": ONE}, "'/'"),
    "a slash first": ({"/a": ONE}, "'/a'"),
    "two slashes": ({"a//b": ONE}, "'a//b'"),
    "two slashes last": ({"a//": ONE}, "'a//'"),
    "a leaf that is a branch": ({"a": ONE, "a/b": ONE}, "'a'"),
    "a branch that is a leaf": ({"a/b": ONE, "a": ONE}, "'a'"),
    "a leaf deep in a leaf": ({"a": ONE, "a/b/c": ONE}, "'a'"),
    "a leaf that is an empty branch": ({"a": ONE, "a/": torch.empty(0)}, "'a'"),
    "an empty branch in a leaf": ({"a": ONE, "a/b/": torch.empty(0)}, "'a'"),
    "an empty branch with something in it": ({"a/": torch.empty(0), "a/b": ONE}, "'a/'"),
    "an empty branch with an empty branch in it": ({"a/": torch.empty(0), "a/b/": torch.empty(0)}, "'a/'"),
    "an empty branch with an empty branch in it, said after": ({"a/b/": torch.empty(0), "a/": torch.empty(0)}, "'a/'"),
    "an empty branch of numbers": ({"a/": torch.ones(5)}, "'a/'"),
    "a branch with an at": ({"a@b/c": ONE}, "'a"),
    "a name with an at": ({"a@b": ONE}, "'a'"),
    "rows of no name": ({name.removeprefix("t"): leaf for name, leaf in TABLE.items()}, "''|'@"),
    "rows of no name in a branch": ({f"a/{name.removeprefix('t')}": leaf for name, leaf in TABLE.items()}, "'a/"),
    "rows of a name with an at": ({f"t@{name}": leaf for name, leaf in TABLE.items()}, "'t@"),
    "rows without index": (without("index"), "'t'"),
    "rows without values": (without("values"), "'t'"),
    "rows without size": (without("size"), "'t'"),
    "rows with something else": (TABLE | {"t@more": ONE}, "'t'"),
    "rows that are a leaf": (TABLE | {"t": ONE}, "'t'"),
    "rows that are an empty branch": (TABLE | {"t/": torch.empty(0)}, "'t"),
    "rows with a leaf in them": (TABLE | {"t/a": ONE}, "'t"),
    "rows with a leaf in them, said before": ({"t/a": ONE} | TABLE, "'t"),
    "rows with an empty branch in them": (TABLE | {"t/a/": torch.empty(0)}, "'t"),
    "an index too large": (TABLE | {"t@index": torch.tensor([0, 4])}, "'t'"),
    "an index too small": (TABLE | {"t@index": torch.tensor([0, -2])}, "'t'"),
    "an index of fractions": (TABLE | {"t@index": torch.tensor([0.0, 1.0])}, "'t'"),
    "an index of bytes": (TABLE | {"t@index": torch.tensor([0, 1], dtype=torch.uint8)}, "'t'"),
    "an index of one number": (TABLE | {"t@index": torch.tensor(0)}, "'t'"),
    "an index of three axes": (
        TABLE | {"t@index": torch.zeros(1, 1, 1).long(), "t@values": torch.ones(1, 1, 1, 3)},
        "'t'",
    ),
    "fewer indices than values": (TABLE | {"t@index": torch.tensor([0])}, "'t'"),
    "stacked indices for values that are not": (TABLE | {"t@index": torch.tensor([[0], [1]])}, "'t'"),
    "values of one number": (TABLE | {"t@values": torch.tensor(1.0)}, "'t'"),
    "a size below zero": (TABLE | {"t@size": torch.tensor(-1), "t@index": torch.empty(0).long()}, "'t'"),
    "a size of zero": (TABLE | {"t@size": torch.tensor(0)}, "'t'"),
    "a size of two": (TABLE | {"t@size": torch.tensor([4, 4])}, "'t'"),
    "a size of none": (TABLE | {"t@size": torch.empty(0).long()}, "'t'"),
    "a size of a fraction": (TABLE | {"t@size": torch.tensor(4.0)}, "'t'"),
}


def test_trees_like_those_that_are_refused_are_read():
    """What the table above changes is sound before, and so are its neighbours."""
    for flat in (TABLE, STACKED, TABLE | {"a/": torch.empty(0), "b/c": ONE, "b/d/": torch.empty(0)}):
        assert flatten(unflatten(flat)).keys() == flat.keys()
    edge = TABLE | {"t@index": torch.tensor([-1, 3])}
    assert unflatten(edge)["t"].index.tolist() == [-1, 3]


@pytest.mark.parametrize("name", BAD_TREES)
def test_names_and_rows_that_no_tree_has_are_refused(name):
    flat, named = BAD_TREES[name]
    with pytest.raises(MalformedMessage, match=f"the tree of Eve.*(?:{named})"):
        unflatten(flat, "the tree of Eve")
    with pytest.raises(MalformedMessage, match=named):
        unpack(ArrayRecord({name: to_array(leaf) for name, leaf in flat.items()}))


def test_a_name_of_very_many_branches_is_refused_before_anybody_walks_them():
    deep = "/".join("a" * 8)
    assert tree.leaves(unflatten({deep: ONE})) == [ONE]
    for depth in (2_000, 100_000):
        with pytest.raises(MalformedMessage, match="the tree of Eve") as refused:
            unflatten({"/".join("a" * depth): ONE}, "the tree of Eve")
        assert len(str(refused.value)) < 10_000


# What nobody thought of


def read_or_refuse(function, *arguments):
    """What a reader gives; nothing where it refuses. Whatever else it raises, it raises."""
    try:
        return function(*arguments)
    except MalformedMessage:
        return None


edits = st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), min_size=1, max_size=4)


def edited(data, changes):
    data = bytearray(data)
    for place, byte in changes:
        data[place % len(data)] = byte
    return bytes(data)


def test_an_array_with_wrong_bytes_is_read_or_refused():
    outcomes = set()

    @search
    @given(st.sampled_from([torch.float32, torch.bfloat16, torch.bool, torch.int64]), edits, st.integers(-2, 2))
    def attempt(dtype, changes, longer):
        array = to_array(noise(dtype, (3, 4)))
        data = edited(array.data, changes)
        data = data[:longer] if longer < 0 else data + bytes(longer)
        found = read_or_refuse(to_tensor, Array(array.dtype, array.shape, array.stype, data))
        assert found is None or (found.shape == (3, 4) and found.dtype == dtype)
        outcomes.add(found is None)

    attempt()
    assert outcomes == {True, False}


written = st.one_of(
    st.text(st.characters(max_codepoint=255), max_size=40),
    st.lists(st.sampled_from(["{", "}", "(", ")", "[", "]", "'", "\\", "-", ",", ":", "0", "9" * 30, "x", " "])).map(
        "".join
    ),
    st.builds(
        says,
        st.lists(st.integers(-1, 2**64) | st.integers(0, 2), max_size=4).map(lambda sizes: f"{tuple(sizes)}"),
        st.sampled_from(["'<f4'", "'>f4'", "'|O'", "'f'", "()", "[]", "None", "('<f4', 2)", "'|b1'", "'<c8'", "'|V0'"]),
        st.sampled_from(["True", "False", "0", "None"]),
    ),
)


def test_an_array_with_any_header_is_read_or_refused():
    outcomes = set()

    @search
    @given(written | st.just(says()), st.lists(st.integers(0, 2**64) | st.integers(0, 2), max_size=4) | st.just([2]))
    def attempt(text, shape):
        found = read_or_refuse(to_tensor, spoken(text, tuple(shape)))
        assert found is None or found.shape == tuple(shape)
        outcomes.add(found is None)

    attempt()
    assert outcomes == {True, False}


parts = st.sampled_from(["", "a", "b", "a/b", "a/", "/", "t", "t/a", "a/t"])
flats = st.dictionaries(
    st.builds(str.__add__, parts, st.sampled_from(["", "@index", "@values", "@size", "@", "/", "/a"])),
    st.sampled_from([ONE, torch.tensor(3), torch.tensor([0, 2]), torch.empty(0), torch.ones(2, 3), torch.tensor(-1)]),
    max_size=5,
)


def test_any_arrays_by_any_names_are_read_to_the_last_or_refused():
    outcomes = set()

    @search
    @given(flats, st.booleans(), st.sampled_from(["t", "a", "a/t"]))
    def attempt(flat, whole, base):
        if whole:
            flat = flat | {f"{base}{name.removeprefix('t')}": leaf for name, leaf in TABLE.items()}
        found = read_or_refuse(unflatten, flat)
        if found is not None:
            assert flatten(found).keys() == flat.keys()  # nothing is lost, and it can be sent on
        outcomes.add(found is None)

    attempt()
    assert outcomes == {True, False}
