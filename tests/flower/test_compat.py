"""What fedsim needs of Flower that Flower does not promise to keep, one thing at a time.

Where one of these fails with a new version of Flower, its message says what has moved; fedsim/flower/compat.py is the
place to follow it.
"""

import copy
import dataclasses
import inspect
import logging
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import numpy as np
import pytest
import torch


@contextmanager
def relying_on(what: str) -> Iterator[None]:
    """Whatever goes wrong inside says that this has moved."""
    try:
        yield
    except BaseException as error:
        pytest.fail(f"Flower's {what} is not as it was, see fedsim/flower/compat.py: {type(error).__name__}: {error}")


def named(place):
    """What stands at "module:name.name"."""
    module, _, path = place.partition(":")
    found = import_module(module)
    for name in path.split(".") if path else []:
        found = getattr(found, name)
    return found


PLACES = {
    "flwr.supercore.task_identity:TaskIdentity": type,
    "flwr.app:Array": type,
    "flwr.app:Error": type,
    "flwr.app:Message": type,
    "flwr.app:Metadata": type,
    "flwr.app:RecordDict": type,
    "flwr.app.message:make_message": types.FunctionType,
    "flwr.common.constant:SUPERLINK_NODE_ID": int,
    "flwr.common.constant:ErrorCode": type,
    "flwr.supercore.run:Run": type,
    "flwr.supercore.run:Run.create_empty": types.MethodType,
    "flwr.serverapp.server_app:start_grid": types.FunctionType,
    "flwr.serverapp.strategy:Strategy.start": types.FunctionType,
    "flwr.app:Array.numpy": types.FunctionType,
    "flwr.app:Array.from_numpy_ndarray": types.MethodType,
    "flwr.app.typing:MetricRecordValues": object,
    "flwr.clientapp.typing:ClientAppCallable": object,
    "flwr.clientapp.typing:Mod": object,
}


@pytest.mark.parametrize("place", PLACES)
def test_it_is_where_it_was(place):
    with relying_on(place):
        assert isinstance(named(place), PLACES[place])


def test_a_name_that_has_moved_is_told_with_the_place_that_must_follow():
    with pytest.raises(pytest.fail.Exception, match=r"nowhere:Thing is not as it was, see fedsim/flower/compat\.py"):
        named_or_told("nowhere:Thing")
    with pytest.raises(pytest.fail.Exception, match=r"flwr.app:Arrow is not as it was, see fedsim/flower/compat\.py"):
        named_or_told("flwr.app:Arrow")


def named_or_told(place):
    with relying_on(place):
        named(place)


@pytest.fixture
def nobody(monkeypatch):
    """A process that has no task."""
    identity = named("flwr.supercore.task_identity:TaskIdentity")
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(identity, name, None)
    return identity


@pytest.mark.parametrize("name", ["task_id", "run_id", "node_id"])
def test_a_process_without_a_task_is_told_by_a_runtime_error(nobody, name):
    with relying_on(f"TaskIdentity.{name}"):
        with pytest.raises(RuntimeError, match=f"TaskIdentity.{name} is not set"):
            getattr(nobody, name)
        setattr(nobody, name, 12)
        assert getattr(nobody, name) == 12


def test_a_message_bears_the_identity_of_the_process(nobody):
    from flwr.app import Message, RecordDict

    from fedsim.flower.compat import ensure_identity

    with relying_on("Message, which reads TaskIdentity"):
        with pytest.raises(RuntimeError, match=r"TaskIdentity\.\w+ is not set"):
            Message(RecordDict(), 3, "train")
        ensure_identity(7)
        metadata = Message(RecordDict(), 3, "train").metadata
        assert (metadata.run_id, metadata.src_node_id) == (7, named("flwr.common.constant:SUPERLINK_NODE_ID"))


def test_an_identity_that_flower_has_set_is_left_as_it_is(nobody):
    from fedsim.flower.compat import ensure_identity

    nobody.task_id, nobody.run_id, nobody.node_id = 5, 6, 8
    ensure_identity(7)
    assert (nobody.task_id, nobody.run_id, nobody.node_id) == (5, 6, 8)


@pytest.fixture
def message():
    from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

    from fedsim.flower.compat import ensure_identity

    ensure_identity()
    content = RecordDict({"arrays": ArrayRecord([np.arange(3.0)]), "config": ConfigRecord({"lr": 0.5, "names": ["a"]})})
    return Message(content, 3, "train.more", ttl=5.0, group_id="2")


def test_the_id_of_a_message_can_be_set_and_a_reply_names_it(message):
    from flwr.app import Message, RecordDict

    from fedsim.flower.compat import stamp

    with relying_on('Metadata.__dict__["_message_id"]'):
        assert message.metadata.message_id == ""
        stamp(message, "message-9")
        assert message.metadata.message_id == "message-9"
        assert set(vars(message.metadata)) >= {"_message_id"}, "another name would have been added beside it"
        reply = Message(RecordDict(), reply_to=message)
        assert reply.metadata.reply_to_message_id == "message-9"
        assert reply.metadata.src_node_id == 3 and reply.metadata.message_type == "train.more"


def test_an_id_is_not_accepted_in_another_way(message):
    with relying_on("Metadata.message_id, which has no setter"), pytest.raises(AttributeError):
        message.metadata.message_id = "message-9"


def test_an_empty_run_can_be_made_and_copied_by_its_fields():
    with relying_on("Run.create_empty"):
        run = named("flwr.supercore.run:Run").create_empty(5)
        assert run.run_id == 5
        assert type(run)(**vars(run)) == run
        assert {field.name for field in dataclasses.fields(run)} == vars(run).keys()


def test_a_message_is_made_of_metadata_and_content(message):
    with relying_on("make_message"):
        made = named("flwr.app.message:make_message")(metadata=message.metadata, content=message.content)
        assert made.metadata is message.metadata and made.content is message.content
        assert made.has_content() and not made.has_error()


def test_the_records_of_a_message_lie_in_data(message):
    with relying_on('TypedDict.__dict__["_data"]'):
        data = message.content.__dict__["_data"]
        assert isinstance(data, dict)
        assert list(data.items()) == list(message.content.items())
        for record in message.content.values():
            assert list(record.__dict__["_data"].items()) == list(record.items())


def test_a_private_message_is_like_the_other_and_shares_only_what_cannot_be_changed(message):
    from fedsim.flower.compat import private_message

    with relying_on("RecordDict.copy"):
        kept = copy.deepcopy(message.content)
        own = private_message(message.metadata, message.content)
        assert type(own.content) is type(message.content) and own.content == message.content
        assert own.content.object_id == message.content.object_id
        assert own.content["arrays"]["0"].data is message.content["arrays"]["0"].data
        own.content["arrays"].pop("0")
        own.content["config"]["lr"] = 9.0
        own.content["more"] = own.content["config"]
        del own.content["arrays"]
        assert message.content == kept


def test_a_private_message_still_checks_what_is_put_into_it(message):
    from fedsim.flower.compat import private_message

    with relying_on("TypedDict.copy, which keeps the checks"):
        own = private_message(message.metadata, message.content)
        for wrong in ({"x": 1}, 3, np.zeros(2)):
            with pytest.raises(TypeError):
                own.content["wrong"] = wrong
        with pytest.raises(TypeError):
            own.content["config"]["wrong"] = object()


@pytest.mark.parametrize("name", ["CLIENT_APP_RAISED_EXCEPTION", "CLIENT_APP_CRASHED"])
def test_there_is_an_error_of_this_name(message, name):
    from flwr.app import Error, Message

    with relying_on(f"ErrorCode.{name}"):
        code = getattr(named("flwr.common.constant:ErrorCode"), name)
        reply = Message(Error(code, "it is so"), reply_to=message)
        assert reply.has_error() and not reply.has_content()
        assert (reply.error.code, reply.error.reason) == (code, "it is so")


def test_a_grid_needs_no_more_than_ours_has():
    from fedsim.flower import SimulationGrid

    with relying_on("Grid"):
        assert not getattr(SimulationGrid, "__abstractmethods__", None)
        grid = named("flwr.serverapp:Grid")
        assert issubclass(SimulationGrid, grid)
        for name in ("get_node_ids", "push_messages", "pull_messages", "send_and_receive", "set_run", "run"):
            assert hasattr(grid, name)
        for name in ("push_messages", "pull_messages", "send_and_receive"):
            theirs, ours = (inspect.signature(getattr(kind, name)).parameters for kind in (grid, SimulationGrid))
            assert {key: value.kind for key, value in theirs.items()} == {
                key: value.kind for key, value in ours.items()
            }


def test_a_client_app_has_its_lifespan_as_a_context_manager():
    with relying_on("ClientApp._lifespan (used in fedsim/flower/node.py)"):
        with named("flwr.clientapp:ClientApp")()._lifespan(None):
            pass
        assert callable(named("flwr.clientapp:ClientApp").__call__)


# Results of Flower's loops.


def test_what_start_returns_is_captured_and_start_is_as_it_was_afterwards():
    from flwr.app import ArrayRecord
    from flwr.serverapp.strategy import FedAvg, Result, Strategy

    from fedsim.flower import SimulationGrid
    from fedsim.flower.compat import captured

    with relying_on("Strategy.start"):
        before = Strategy.__dict__["start"]
        with captured() as found:
            assert Strategy.__dict__["start"] is not before
            strategy = FedAvg(fraction_train=0, fraction_evaluate=0, min_available_nodes=1)
            result = strategy.start(SimulationGrid(Nobody(), 2), ArrayRecord([np.zeros(2)]), num_rounds=1)
            assert isinstance(result, Result)
        assert found == [result] and found[0] is result
        assert Strategy.__dict__["start"] is before


def test_the_function_of_older_apps_is_looked_up_where_it_is_replaced():
    from flwr.server import History, ServerAppComponents, ServerConfig
    from flwr.serverapp import ServerApp, server_app

    from fedsim.flower import SimulationGrid
    from fedsim.flower.compat import captured

    with relying_on("flwr.serverapp.server_app.start_grid"):
        before = server_app.start_grid
        app = ServerApp(server_fn=lambda context: ServerAppComponents(strategy=Idle(), config=ServerConfig(0)))
        with captured() as found:
            app(SimulationGrid(Nobody(), 1), None)
        assert [type(result) for result in found] == [History]
        assert server_app.start_grid is before


class Nobody:
    """Nodes that are never asked anything."""

    def answer(self, batch):
        assert not batch
        return iter(())


class Idle:
    """A strategy of the older kind that does nothing."""

    def initialize_parameters(self, client_manager):
        return named("flwr.common:ndarrays_to_parameters")([])

    def evaluate(self, server_round, parameters):
        return None


def test_what_was_replaced_comes_back_when_something_is_raised():
    from flwr.app import Array
    from flwr.serverapp import server_app
    from flwr.serverapp.strategy import Strategy

    from fedsim.flower.compat import captured, swift_arrays

    def replaced():
        names = "numpy", "from_numpy_ndarray"
        return [Array.__dict__[name] for name in names] + [Strategy.__dict__["start"], server_app.start_grid]

    before = replaced()
    with pytest.raises(ZeroDivisionError), captured(), swift_arrays():
        assert all(now is not then for now, then in zip(replaced(), before, strict=True))
        raise ZeroDivisionError
    assert all(now is then for now, then in zip(replaced(), before, strict=True))


# Arrays.


def arrays():
    """Arrays of all kinds that somebody may make a Flower Array of."""
    some = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    yield from ((str(np.dtype(kind)), some.astype(kind)) for kind in ("?", "u1", "i2", "u4", "i8", "f2", "f4", "f8"))
    yield "complex", some.astype(np.complex64) + 1j
    yield "one number", np.array(2.5)
    yield "empty", np.zeros((0, 3))
    yield "columns first", np.asfortranarray(some)
    yield "strided", some[:, ::2]
    yield "big endian", some.astype(">f4")
    yield "text", np.array(["ab", "c"])
    yield "dates", np.array(["2020-01-01"], "M8[D]")
    yield "fields", np.zeros(2, [("a", "<f4")])
    yield "a subclass", np.ma.masked_array([1.0, 2.0], [0, 1])
    yield "matrix", np.zeros((2, 2)).view(np.matrix)
    yield "not writeable", np.broadcast_to(np.float64(3), (2, 2))


ARRAYS = dict(arrays())
every_array = pytest.mark.parametrize("values", ARRAYS.values(), ids=ARRAYS)


@every_array
def test_a_swift_array_is_in_everything_what_flower_makes(values):
    from flwr.app import Array

    from fedsim.flower.compat import swift_arrays

    with relying_on("Array.from_numpy_ndarray"):
        expected = Array(values)
        with swift_arrays():
            found = Array(values)
        assert vars(found) == vars(expected)
        assert all(type(vars(found)[name]) is type(value) for name, value in vars(expected).items())
        assert type(found) is Array and found == expected
        assert found.deflate() == expected.deflate()
        assert found.object_id == expected.object_id
        assert found.children.keys() == expected.children.keys()


@every_array
def test_a_swift_array_gives_back_what_flowers_does(values):
    from flwr.app import Array

    from fedsim.flower.compat import swift_arrays

    with relying_on("Array.numpy"):
        array = Array(values)
        expected = array.numpy()
        with swift_arrays():
            found = array.numpy()
        assert type(found) is type(expected) and found.dtype == expected.dtype and found.shape == expected.shape
        assert found.tobytes() == expected.tobytes()
        assert found.flags.c_contiguous == expected.flags.c_contiguous
        assert found.flags.writeable, "who trains on it in place must not be told that it cannot be changed"
        assert not np.shares_memory(found, np.frombuffer(array.data, np.uint8))


@pytest.mark.parametrize(
    "tensor", [torch.arange(6.0).reshape(2, 3), torch.arange(6).reshape(2, 3).t(), torch.tensor(1)]
)
def test_tensors_go_the_same_way(tensor):
    from flwr.app import Array, ArrayRecord

    from fedsim.flower.compat import swift_arrays

    expected = ArrayRecord({"w": Array(tensor)})
    with swift_arrays():
        found = ArrayRecord({"w": tensor.clone()})
        assert torch.equal(found.to_torch_state_dict()["w"], tensor)
        back = found.to_numpy_ndarrays()[0]
    assert found == expected and found.object_id == expected.object_id
    np.testing.assert_array_equal(back, tensor.numpy())


def test_a_swift_array_that_is_changed_afterwards_has_another_id():
    from flwr.app import Array

    from fedsim.flower.compat import swift_arrays

    with relying_on('Array.__dict__["_is_dirty"]'):
        with swift_arrays():
            array = Array(np.zeros(3))
        before = array.object_id
        array.data = Array(np.ones(3)).data
        assert array.object_id != before
        assert array.object_id == Array(np.ones(3)).object_id


@pytest.mark.parametrize("data", [b"", b"no array", b"\x93NUMPY\x01\x00"])
def test_what_is_no_array_is_refused_by_a_swift_one_as_by_flowers(data):
    from flwr.app import Array

    from fedsim.flower.compat import swift_arrays

    array = Array("float32", (2,), "numpy.ndarray", data)
    with pytest.raises(Exception) as theirs:  # noqa: B017, PT011
        array.numpy()
    with swift_arrays(), pytest.raises(type(theirs.value)) as ours:
        array.numpy()
    assert str(ours.value) == str(theirs.value)


def test_an_array_serialised_in_another_way_is_refused_by_a_swift_one_as_by_flowers():
    from flwr.app import Array

    from fedsim.flower.compat import swift_arrays

    array = Array("float32", (2,), "somehow", Array(np.zeros(2, np.float32)).data)
    with swift_arrays(), pytest.raises(TypeError, match="Unsupported serialization type"):
        array.numpy()


def test_an_array_of_objects_is_refused_by_a_swift_one_as_by_flowers():
    from flwr.app import Array

    from fedsim.flower.compat import swift_arrays

    values = np.array([object()])
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        Array(values)
    with swift_arrays(), pytest.raises(ValueError, match="Object arrays cannot be saved"):
        Array(values)


def test_flowers_log_is_quiet_inside_and_as_it_was_afterwards():
    from fedsim.flower.compat import quiet

    logger = logging.getLogger("flwr")
    with relying_on("logger, which is called flwr"):
        assert sys.modules["flwr"] and import_module("flwr.supercore").log.__self__ is logger
    level = logger.level
    with pytest.raises(ZeroDivisionError), quiet():
        assert not logger.isEnabledFor(logging.INFO) and logger.isEnabledFor(logging.WARNING)
        raise ZeroDivisionError
    assert logger.level == level
