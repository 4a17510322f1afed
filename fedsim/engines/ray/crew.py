"""Crew: worker processes that are replaced when they die, and what each of them is at."""

import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError, UnserializableException

START_SECONDS = 120.0  # for a worker to come up
STILLBORN = 3  # times the number of workers: so many in a row may fail to start in the place of others
AHEAD = 2  # pieces of work that a worker has been given: while it is at one, the next is on its way
LOOK_SECONDS = 0.5  # between two looks whether a worker hangs

Work = TypeVar("Work")


@dataclass(eq=False)
class Member(Generic[Work]):
    """One worker process."""

    handle: Any
    born: Any  # a reference to its process id, there once it is up
    up: bool = False
    given: deque[tuple[Work, Any]] = field(default_factory=deque)  # work and a reference to its result, in order
    since: float = 0.0  # when it began with the first of these


@dataclass(eq=False)  # not frozen: an exception is given notes and a traceback
class Lost(Exception):  # noqa: N818 - says what happened to the work
    """A worker ended before its work did.

    Attributes:
        reason: why.
        hung: it did not die, but took too long, and was ended.
    """

    reason: str
    hung: bool = False

    @property
    def told(self) -> str:
        """What happened, as a sentence without its end."""
        return f"a worker was ended: {self.reason}" if self.hung else f"a worker died: {self.reason.rstrip('.')}"


class Crew(Generic[Work]):
    """A number of workers. Those that die are replaced as soon as that is known.

    Args:
        hire: starts a worker process.
        size: how many.
    """

    def __init__(self, hire: Callable[[], Any], size: int) -> None:
        self.hire = hire
        self.stillborn = 0  # in a row
        self.members = [self._member() for _ in range(size)]
        born = [member.born for member in self.members]
        up, down = ray.wait(born, num_returns=len(born), timeout=START_SECONDS)
        if down:
            raise RuntimeError(f"{len(down)} of {len(born)} workers did not start within {START_SECONDS:g} s")
        try:
            ray.get(up)
        except RayError as error:
            raise _not_started(error) from error

    def _member(self) -> Member[Work]:
        handle = self.hire()
        return Member(handle, handle.ready.remote())

    def carry_out(
        self, waiting: deque[Work], submit: Callable[[Any, Work], Any], patience: Callable[[Work], float | None]
    ) -> Generator[tuple[Work, Any], None, None]:
        """Each piece of work and its result as it comes, or what went wrong: Lost, or what the worker raised.

        Args:
            waiting: the work, taken from the left; whoever takes the results may add to it.
            submit: gives a piece to a worker, and returns the reference to its result.
            patience: for how many seconds a worker may be at it; None: for ever.
        """
        try:
            while True:
                self._greet()
                self._hand_out(waiting, submit)
                busy = {member.given[0][1]: member for member in self.members if member.given}
                if not busy and not waiting:
                    return
                if not busy:
                    self._await_one()
                    continue
                for ref in ray.wait(list(busy), num_returns=1, timeout=LOOK_SECONDS)[0]:
                    yield self._collect(busy[ref], waiting)
                for member in list(self.members):
                    if late := self._late(member, patience):
                        yield self._bury(member, waiting, late)
        finally:  # whoever stops in the middle wants no more of it
            for member in [member for member in self.members if member.given]:
                self._bury(member, deque(), Lost("what it was at is not wanted any more"))

    def _greet(self) -> None:
        """Notes who has come up meanwhile, and replaces those that could not: work would only be lost on them."""
        for place, member in enumerate(self.members):
            if member.up or not ray.wait([member.born], timeout=0)[0]:
                continue
            try:
                ray.get(member.born)
            except RayError as error:
                self.stillborn += 1
                if self.stillborn > STILLBORN * len(self.members):
                    raise _not_started(error) from error
                ray.kill(member.handle, no_restart=True)
                self.members[place] = self._member()
            else:
                member.up, self.stillborn = True, 0

    def _await_one(self) -> None:
        """Waits for somebody who can work: all have died, and nobody has come up in their places yet."""
        born = [member.born for member in self.members]
        if not ray.wait(born, num_returns=1, timeout=START_SECONDS)[0]:
            raise RuntimeError(f"all workers died, and none could be started within {START_SECONDS:g} s")

    def _hand_out(self, waiting: deque[Work], submit: Callable[[Any, Work], Any]) -> None:
        """Gives each worker what it can be given, the one with least first; nothing to those that may never come up."""
        up = [member for member in self.members if member.up]
        while waiting and up and len((member := min(up, key=lambda member: len(member.given))).given) < AHEAD:
            work = waiting.popleft()
            if not member.given:
                member.since = time.monotonic()
            member.given.append((work, submit(member.handle, work)))

    def _collect(self, member: Member[Work], waiting: deque[Work]) -> tuple[Work, Any]:
        """The first thing that a worker was given, and what came of it."""
        work, ref = member.given[0]
        try:
            result = ray.get(ref)
        except RayTaskError as error:  # the worker lives
            result = error.cause
        except UnserializableException as error:  # it lives, too, but what it raised cannot be made here again
            result = RuntimeError(str(error))
        except RayError as error:
            return self._bury(member, waiting, Lost(str(error).strip().splitlines()[0]))
        member.given.popleft()
        member.since = time.monotonic()
        return work, result

    def _late(self, member: Member[Work], patience: Callable[[Work], float | None]) -> Lost | None:
        """Why a worker is given up, if it is."""
        limit = patience(member.given[0][0]) if member.given else None
        if limit is None or time.monotonic() - member.since <= limit:
            return None
        if ray.wait([member.given[0][1]], timeout=0)[0]:  # it is done, and nobody has come to take it
            return None
        return Lost(f"not done after {limit:g} s", hung=True)

    def _bury(self, member: Member[Work], waiting: deque[Work], why: Lost) -> tuple[Work, Lost]:
        """Puts a new process in the place of one that is dead or is to die; what it was not at yet is for others."""
        ray.kill(member.handle, no_restart=True)
        self.members[self.members.index(member)] = self._member()
        work, *untouched = (work for work, _ in member.given)
        waiting.extendleft(reversed(untouched))
        return work, why

    def dismiss(self) -> None:
        """Ends all of them."""
        for member in self.members:
            ray.kill(member.handle, no_restart=True)
        self.members = []


def _not_started(error: RayError) -> RuntimeError:
    """What went wrong when a worker was made is at the end of what Ray tells."""
    return RuntimeError(f"a worker could not be started: {str(error).strip().splitlines()[-1]}")
