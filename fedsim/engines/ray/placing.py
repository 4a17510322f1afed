"""Placing: which blocks go to workers together, what is expected of them, and the order in which they are taken in."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedsim.client import Client
from fedsim.data.federation import Federation
from fedsim.engines.folding import pieces
from fedsim.engines.gathering import Gathering, Part
from fedsim.task import Cohort, Task


class Pace:
    """How long clients take: by their steps, each as long as it took before. It decides where they run, no more."""

    def __init__(self, federation: Federation, clients: Mapping[str, Client]) -> None:
        self.federation, self.clients = federation, clients
        self.measured: dict[str, NDArray[np.float64]] = {}  # action -> seconds a step by client, (N,); NaN: not known
        self.total: dict[str, tuple[float, float]] = {}  # action -> seconds and steps of all so far

    def steps(self, action: str, ids: Sequence[int]) -> NDArray[np.float64]:
        """Local steps of each client, (C,)."""
        client = self.clients[action]
        sizes = self.federation.sizes(client.split, ids)
        steps: NDArray[np.float64] = np.maximum(1.0, client.epochs * np.ceil(sizes / client.batch_size))
        return steps

    def expect(self, action: str, ids: Sequence[int]) -> NDArray[np.float64]:
        """Seconds that each client will take, (C,); in steps where nothing was measured yet."""
        if action not in self.measured:
            return self.steps(action, ids)
        seconds, steps = self.total[action]
        each = self.measured[action][np.asarray(ids, dtype=np.int64)]
        return self.steps(action, ids) * np.where(np.isnan(each), seconds / steps, each)

    def learn(self, action: str, ids: Sequence[int], seconds: float) -> None:
        """Takes in how long some clients took together."""
        if action not in self.measured:
            self.measured[action] = np.full(self.federation.num_clients, np.nan)
        steps = float(self.steps(action, ids).sum())
        self.measured[action][np.asarray(ids, dtype=np.int64)] = seconds / steps
        before = self.total.get(action, (0.0, 0.0))
        self.total[action] = before[0] + seconds, before[1] + steps


class Piece:
    """Neighbouring blocks that one worker runs, or one client of a block that is suspected to kill its workers."""

    def __init__(self, blocks: list[list[int]], length: float, deaths: int = 0) -> None:
        self.blocks = blocks  # places in the cohort
        self.length = length  # seconds, as expected
        self.deaths = deaths  # of workers that were at it

    @property
    def places(self) -> list[int]:
        """In the cohort, of all its clients."""
        return [place for block in self.blocks for place in block]


class Line:
    """What is to come of a cohort, in the order of its blocks.

    Args:
        task: what was asked.
        cohort: of whom.
        blocks: places in the cohort, of each block.
        lengths: seconds that each client is expected to take, (C,).
        workers: among how many the blocks are to be divided; infinity: each block is a piece.
    """

    def __init__(
        self,
        task: Task,
        cohort: Cohort,
        blocks: Sequence[Sequence[int]],
        lengths: NDArray[np.float64],
        workers: float,
    ) -> None:
        self.task, self.cohort, self.lengths = task, cohort, lengths
        expected = [float(lengths[list(block)].sum()) for block in blocks]
        # A slot is one piece, or the several into which one block has fallen.
        self.slots = [
            [Piece([list(blocks[number]) for number in some], sum(expected[number] for number in some))]
            for some in pieces(expected, workers)
        ]
        self.found: dict[Piece, list[Part]] = {}

    @property
    def pieces(self) -> list[Piece]:
        """All of them, the longest first."""
        every = [piece for slot in self.slots for piece in slot]
        return sorted(every, key=lambda piece: piece.length, reverse=True)

    def divide(self, piece: Piece) -> list[Piece]:
        """What a piece falls into that cannot be run as it is: blocks, or the clients of its only block."""
        number = next(number for number, slot in enumerate(self.slots) if piece in slot)
        if len(piece.blocks) > 1:
            parts = [self._piece([block], piece.deaths) for block in piece.blocks]
            self.slots[number : number + 1] = [[part] for part in parts]
        else:
            parts = [self._piece([[place]]) for place in piece.places]
            self.slots[number] = parts
        return parts

    def _piece(self, blocks: list[list[int]], deaths: int = 0) -> Piece:
        return Piece(blocks, float(sum(self.lengths[block].sum() for block in blocks)), deaths)

    def note(self, piece: Piece, parts: list[Part]) -> Iterator[Part]:
        """Takes in what came of a piece; gives those parts whose turn it is."""
        self.found[piece] = parts
        while self.slots and all(piece in self.found for piece in self.slots[0]):
            slot = self.slots.pop(0)
            if len(slot) == 1:
                yield from self.found.pop(slot[0])
                continue
            block = Gathering("", self.task, self.cohort, {})
            for piece in slot:
                for part in self.found.pop(piece):
                    block.join(part)
            yield block.part()
