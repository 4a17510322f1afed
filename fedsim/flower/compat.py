"""What fedsim needs of Flower that Flower does not promise to keep, in one place.

Where a new version of Flower moves something of this, tests/flower/test_compat.py says what, and this file alone
changes.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import numpy as np
from flwr.app import Array, Error, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.server import server as older
from flwr.serverapp import server_app
from flwr.serverapp.strategy import Strategy
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray

from fedsim.flower import npy

__all__ = [
    "Error",
    "ErrorCode",
    "Run",
    "captured",
    "ensure_identity",
    "ordered",
    "private_message",
    "quiet",
    "stamp",
    "swift_arrays",
]

T = TypeVar("T")


def ensure_identity(run_id: int = 1) -> None:
    """Lets this process make messages: a Message bears the identity of a process-wide task, which must be known.

    Within a run of Flower's own it is, and is left as it is.
    """
    for name, value in {"task_id": 1, "run_id": run_id, "node_id": SUPERLINK_NODE_ID}.items():
        try:
            getattr(TaskIdentity, name)
        except RuntimeError:  # not set
            setattr(TaskIdentity, name, value)


def stamp(message: Message, ident: str) -> None:
    """Gives a message its id, as a grid does before it sends it: the reply names it."""
    message.metadata.__dict__["_message_id"] = ident


def private_message(metadata: Metadata, content: RecordDict) -> Message:
    """A message for one of many receivers of the same content: what is done to its records reaches no other's.

    The arrays' bytes, which cannot be changed, are not copied.
    """
    own = content.copy()
    # What is in it has been checked before.
    own.__dict__["_data"] = {name: _private(record) for name, record in content.items()}
    return make_message(metadata=_twin(metadata), content=own)


def _private(record: Any) -> Any:
    """A record of one's own, with lists and arrays of its own."""
    own = record.copy()
    own.__dict__["_data"] = {
        name: _twin(value) if isinstance(value, Array) else list(value) if isinstance(value, list) else value
        for name, value in record.items()
    }
    return own


def _twin(thing: T) -> T:
    """As `copy.copy`, of which this is the fast case: an object with nothing but a dict."""
    twin = object.__new__(type(thing))
    twin.__dict__.update(thing.__dict__)
    return twin


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, Flower's log tells only of what is wrong: fedsim's own display tells of rounds."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def swift_arrays() -> Iterator[None]:
    """Inside, Flower's arrays are made of numpy's and back as `npy` does it, to the same bytes: several times faster.

    Messages carry nothing else, so in a simulation this is where Flower itself spends most of its time.
    """
    to_numpy, from_numpy = Array.numpy, Array.__dict__["from_numpy_ndarray"]

    def numpy(self: Array) -> NDArray[Any]:
        try:
            values = npy.view(self.data) if self.stype == "numpy.ndarray" else None
        except ValueError:
            values = None
        return to_numpy(self) if values is None or not values.flags.c_contiguous else values.copy()

    def from_numpy_ndarray(cls: type[Array], ndarray: NDArray[Any]) -> Array:
        usual = isinstance(ndarray, np.ndarray) and ndarray.dtype.str[1:] in npy.KINDS and ndarray.flags.c_contiguous
        if not usual:
            return cast(Array, from_numpy.__get__(None, cls)(ndarray))
        array = Array.__new__(cls)
        named = {"dtype": str(ndarray.dtype), "shape": ndarray.shape, "stype": "numpy.ndarray"}
        array.__dict__.update(named, data=npy.dump(ndarray), _is_dirty=True)
        return array

    Array.numpy, Array.from_numpy_ndarray = numpy, classmethod(from_numpy_ndarray)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Array.numpy, Array.from_numpy_ndarray = to_numpy, from_numpy  # type: ignore[method-assign]


@contextmanager
def captured() -> Iterator[list[Any]]:
    """Collects what Flower's loops return inside: a ServerApp's main has no way to hand its Result on.

    These are the Results of `Strategy.start`, and the Histories of older apps.
    """
    found: list[Any] = []
    start, start_grid = Strategy.start, server_app.start_grid  # type: ignore[attr-defined]

    def keeping(function: Any) -> Any:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            found.append(function(*args, **kwargs))
            return found[-1]

        return call

    Strategy.start = keeping(start)  # type: ignore[method-assign]
    server_app.start_grid = keeping(start_grid)  # type: ignore[attr-defined]
    try:
        yield found
    finally:
        Strategy.start = start  # type: ignore[method-assign]
        server_app.start_grid = start_grid  # type: ignore[attr-defined]


@contextmanager
def ordered() -> Iterator[None]:
    """Inside, the loop of older apps has its results in the order of the nodes: it takes them out of a set."""
    fit, evaluate = older.fit_clients, older.evaluate_clients

    def sorting(function: Any) -> Any:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            results, failures = function(*args, **kwargs)
            return sorted(results, key=lambda result: int(getattr(result[0], "node_id", 0))), failures

        return call

    older.fit_clients, older.evaluate_clients = sorting(fit), sorting(evaluate)
    try:
        yield
    finally:
        older.fit_clients, older.evaluate_clients = fit, evaluate
