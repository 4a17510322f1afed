"""Arrays in .npy format are written and read as numpy does it; to refuse what is not in that format costs nothing."""

import io
import struct
import time
import tracemalloc

import numpy as np
import pytest

from fedsim.flower import npy

KINDS = [np.dtype(name) for name in npy.KINDS.values()]
SHAPES = [(), (0,), (1,), (7,), (3, 0, 2), (2, 3), (1, 4, 1), (2, 3, 4, 5), (1,) * 64]
ORDERS = ["<", ">"]


def some(dtype, shape):
    """An array in which no two elements are alike, as far as the type has so many."""
    numbers = np.arange(int(np.prod(shape, dtype=np.int64))) % 2 if dtype.kind == "b" else np.arange(np.prod(shape))
    values = numbers.astype(dtype).reshape(shape)
    return values - np.asarray(3.5j, dtype) if dtype.kind == "c" else values


def saved(values, **options):
    """What numpy writes."""
    buffer = io.BytesIO()
    np.save(buffer, values, **options)
    return buffer.getvalue()


def loaded(data):
    """What numpy reads."""
    return np.load(io.BytesIO(data), allow_pickle=False)


def forged(header, body=b"", version=(1, 0)):
    """Data with a header of one's own, padded as numpy pads it."""
    told = header.encode("latin1")
    told += b" " * (-(10 + len(told) + 1) % 64) + b"\n"
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H", len(told)) + told + body


def described(descr="'<f4'", fortran="False", shape="(2,)"):
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}"


def assert_same(found, expected):
    assert found.dtype == expected.dtype and found.dtype.str == expected.dtype.str
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


every_kind = pytest.mark.parametrize("dtype", KINDS, ids=str)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
both_orders = pytest.mark.parametrize("order", ORDERS)


def test_these_are_all_types_of_numbers_that_torch_and_numpy_share():
    kinds = {dtype.kind for dtype in KINDS}
    assert kinds == set("biufc")
    assert {dtype.str[1:] for dtype in KINDS} == npy.KINDS.keys()


@both_orders
@every_shape
@every_kind
def test_what_is_written_is_what_numpy_writes(dtype, shape, order):
    values = some(dtype.newbyteorder(order), shape)
    assert npy.dump(values) == saved(values)


@both_orders
@every_shape
@every_kind
def test_what_is_read_is_what_numpy_reads(dtype, shape, order):
    data = saved(some(dtype.newbyteorder(order), shape))
    assert_same(npy.view(data), loaded(data))


@every_kind
def test_columns_before_rows_are_read_as_numpy_reads_them(dtype):
    data = saved(np.asfortranarray(some(dtype, (3, 4, 2))))
    assert b"'fortran_order': True" in data
    found = npy.view(data)
    assert_same(found, loaded(data))
    assert found.flags.f_contiguous and not found.flags.c_contiguous


@pytest.mark.parametrize(
    "part",
    [
        lambda values: values.T,
        lambda values: values[::2],
        lambda values: values[:, ::-1],
        lambda values: values[:, 1],
        lambda values: np.broadcast_to(values[0], (3, values.shape[1])),
    ],
    ids=["transposed", "every second", "backwards", "column", "broadcast"],
)
def test_what_does_not_lie_in_order_is_put_in_order(part):
    values = part(some(np.dtype("float32"), (5, 6)))
    assert npy.dump(values) == saved(np.array(values, order="C"))
    np.testing.assert_array_equal(npy.view(npy.dump(values)), values)


def test_strange_numbers_keep_their_bits():
    bits = np.array([0x7FC00001, 0xFFC12345, 0x7F800000, 0x80000000, 1], np.uint32)  # NaNs, infinity, -0, the smallest
    found = npy.view(npy.dump(bits.view(np.float32)))
    np.testing.assert_array_equal(found.view(np.uint32), bits)


def test_a_view_shares_the_bytes_and_cannot_be_written_to():
    data = npy.dump(np.arange(6.0))
    found = npy.view(data)
    assert not found.flags.writeable and not found.flags.owndata
    assert np.shares_memory(found, np.frombuffer(data, np.uint8))


def test_an_array_of_objects_is_never_written():
    with pytest.raises((TypeError, ValueError)):
        npy.dump(np.array([object()]))


REFUSED = {
    "nothing": b"",
    "a few bytes": b"\x93NUM",
    "only the magic": b"\x93NUMPY\x01\x00",
    "another magic": b"\x93NUMPX" + saved(np.zeros(2))[6:],
    "a zip archive": b"PK\x03\x04" + bytes(100),
    "a pickle": b"\x80\x04K\x01.",
    "version 2": forged(described(), bytes(8), (2, 0)),
    "version 3": forged(described(), bytes(8), (3, 0)),
    "version 1.1": forged(described(), bytes(8), (1, 1)),
    "objects": forged(described("'|O'"), bytes(16)),
    "pickled objects": saved(np.array([None, 1]), allow_pickle=True),
    "text": saved(np.array(["ab", "c"])),
    "bytes": saved(np.array([b"ab", b"c"])),
    "dates": saved(np.array(["2020-01-01"], "M8[D]")),
    "raw memory": saved(np.zeros(2, "V4")),
    "fields": saved(np.zeros(2, [("a", "<f4"), ("b", "<i4")])),
    "fields of objects": forged(described("[('a', '|O')]"), bytes(16)),
    "long doubles": forged(described("'<f16'"), bytes(32)),
    "a type that is not there": forged(described("'<f5'"), bytes(10)),
    "code for a type": forged(described("__import__('os').getcwd()"), bytes(8)),
    "code for a shape": forged(described(shape="(2 * 1,)"), bytes(8)),
    "another key": forged("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), 'more': 1, }", bytes(8)),
    "no shape": forged("{'descr': '<f4', 'fortran_order': False, }", bytes(8)),
    "a negative size": forged(described(shape="(-2,)"), bytes(8)),
    "a size that is no number": forged(described(shape="(2.0,)"), bytes(8)),
    "an order that is none": forged(described(fortran="1"), bytes(8)),
    "more axes than numpy has": forged(described(shape=f"({'1, ' * 65})"), bytes(4)),
    "more bytes than a number can count": forged(described(shape="(9999999999999999999, 0)")),
    "words after the header": forged(described() + " # so it is", bytes(8)),
    "a header that does not end": saved(np.zeros(2, "f4")).replace(b"\n", b" ", 1),
    "a header that is cut off": saved(np.zeros(2, "f4"))[:60],
    "a byte too few": saved(np.zeros(2, "f4"))[:-1],
    "a byte too many": saved(np.zeros(2, "f4")) + b"\0",
    "no numbers": saved(np.zeros(2, "f4"))[:-8],
    "numbers where there are none": saved(np.zeros((0, 3), "f4")) + bytes(12),
}


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED)
def test_what_is_no_array_in_this_format_is_refused(data):
    with pytest.raises(ValueError, match="it begins with|it says"):
        npy.view(data)


def test_data_of_the_same_making_that_is_sound_is_read():
    data = forged(described(), np.array([1.5, -2], "<f4").tobytes())
    assert_same(npy.view(data), np.array([1.5, -2], "<f4"))
    assert_same(npy.view(data), loaded(data))


@pytest.mark.parametrize("size", [10**9, 10**12, 2**61 - 1, 2**61, 10**18, 10**19 - 1])
@pytest.mark.parametrize("fortran", ["False", "True"])
def test_a_header_that_promises_the_world_costs_no_memory(size, fortran):
    data = forged(described("'<f4'", fortran, f"({size},)"), bytes(8))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            npy.view(data)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "header",
    [
        described(shape="(" + "1, " * 20000 + ")"),
        described(shape="(" + "9" * 60000 + ",)"),
        described(shape="(" * 60000),
        described() + " " * 60000 + "x",
        "{" * 60000,
    ],
    ids=["axes", "digits", "brackets", "spaces", "braces"],
)
def test_a_header_as_long_as_it_may_be_is_refused_at_once(header):
    started = time.perf_counter()
    with pytest.raises(ValueError, match="it begins with|it says") as refused:
        npy.view(forged(header, bytes(8)))
    assert time.perf_counter() - started < 1
    assert len(str(refused.value)) < 1000


def test_an_empty_array_with_other_sizes_beyond_measure_is_read_as_numpy_reads_it_or_refused():
    data = forged(described("'|u1'", shape="(0, 4611686018427387904)"))
    assert npy.view(data).shape == loaded(data).shape == (0, 2**62)
    with pytest.raises(ValueError, match="it says"):
        npy.view(forged(described("'<f8'", shape="(0, 4611686018427387904)")))
