"""Vectorised: many clients at once, as one program over tensors with a leading axis of clients."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import nn

from fedsim import tree
from fedsim.client import Client
from fedsim.data.federation import Federation
from fedsim.engines.device import find, fitting, free, on, peak
from fedsim.engines.engine import Answer, Item, Local, Shared, client_for, pick
from fedsim.engines.gathering import Gathering, Part
from fedsim.engines.sequential import alone, length, prepare, untouched, visits
from fedsim.randomness import generator, reseed, seeding
from fedsim.ranges import Count, Natural, check_fields
from fedsim.task import Batch, Cohort, Reply, Task
from fedsim.tree import Tree

# What one block may occupy on a CPU: in small blocks the cost of a step is shared by few, and in large ones a single
# tensor is larger than what `keep_memory` keeps. Perceptrons with 20,000 to 400,000 parameters were at their best, or
# within a tenth of it, at 128 MiB.
BLOCK_BYTES = 128 * 2**20

# (task, examples of a block's largest client, its id) -> how many such clients a block may have
Width = Callable[[Task, int, int], int]


@dataclass(frozen=True, eq=False)
class Vectorised(Local):
    """Clients in blocks, each block as one vectorised program.

    Clients are sorted by their number of examples, and a block ends where a client has less than a quarter of its
    first one's, so that blocks pad little. A block's composition depends on the cohort alone, and a block of one runs
    without vmap. A block that does not fit into memory runs as two halves, and no later one is larger.

    Attributes:
        federation: the data by client.
        clients: action -> client.
        seed: of all that is drawn.
        block: the most clients in a block; None: on a CPU as many as fit into BLOCK_BYTES, on a GPU as many as fit into
            the memory that is free, as measured with a few of them.
        device: "cpu", "cuda", "cuda:1".
    """

    federation: Federation
    clients: Mapping[str, Client]
    seed: Natural = 0
    block: Count | None = None
    device: str = "cpu"
    limits: dict[str, int] = field(default_factory=dict, init=False)  # action -> most in a block, where memory ran out
    widths: dict[tuple[str, int], int] = field(default_factory=dict, init=False)  # measured, by action and size

    def __post_init__(self) -> None:
        check_fields(self)
        find(self.device)
        for action, client in self.clients.items():
            if type(client).run is not Client.run and type(client).run_cohort is Client.run_cohort:
                raise ValueError(
                    f"clients.{action}: {type(client).__name__} overrides run, so it cannot be vectorised: "
                    "use fedsim.engines.local:Sequential, or write its run_cohort too"
                )

    def __repr__(self) -> str:
        return f"Vectorised(block={self.block})"

    def map(
        self, function: Callable[[Shared, Item], Answer], shared: Shared, items: Iterable[Item]
    ) -> Iterator[Answer | Exception]:
        """Refused: a function that is no client's cannot be vectorised."""
        raise TypeError("Vectorised runs fedsim's clients only: for anything else use fedsim.engines.local:Sequential")

    def blocks(self, task: Task, ids: Sequence[int], width: Width | None = None) -> Iterator[Sequence[int]]:
        """The largest clients first; with another rule for the number of clients, if one is given."""
        client = client_for(task, self.clients)
        sizes = self.federation.sizes(client.split, ids)
        order = np.argsort(-sizes, kind="stable")
        start = 0
        while start < len(order):
            first = order[start]
            alike = start + int(np.count_nonzero(4 * sizes[order[start:]] >= sizes[first]))
            most = self.block or (width or self.width)(task, int(sizes[first]), ids[first])
            most = min(most, self.limits.get(task.action, most))
            equal = -(-(alike - start) // -(-(alike - start) // most))  # rather than a small one behind large ones
            yield order[start : start + equal].tolist()
            start += equal

    def width(self, task: Task, longest: int, ident: int) -> int:
        """How many clients like this one, with so many examples, a block may have."""
        if self.place.type != "cpu":
            return self._measured(task, longest, ident)
        client = client_for(task, self.clients)
        row = sum(column[:1].numel() * column.element_size() for column in self.federation.columns.values())
        return max(1, BLOCK_BYTES // max(1, client.footprint(task.shared, longest) + longest * row))

    def limit(self, action: str, most: int) -> None:
        """From now on no block of this action has more clients."""
        self.limits[action] = min(most, self.limits.get(action, most))

    def run_block(self, task: Task, cohort: Cohort) -> Part:
        """What comes of one block, as two halves, and halves of these, if it does not fit into memory."""
        try:
            return super().run_block(task, cohort)
        except torch.OutOfMemoryError as error:
            if len(cohort.ids) == 1:
                raise RuntimeError(f"not even client {cohort.ids[0]} alone fits into memory") from error
            told = str(error).strip().splitlines()[0]
        if self.place.type == "cuda":
            torch.cuda.empty_cache()
        half = -(-len(cohort.ids) // 2)
        self.limit(task.action, half)
        whole = Gathering(type(client_for(task, self.clients)).__name__, task, cohort, {})
        whole.incidents.append(
            f"a block of {len(cohort.ids)} clients did not fit into memory ({told}): "
            f"from now on {task.action!r} runs at most {half} at once"
        )
        for places in (range(half), range(half, len(cohort.ids))):
            whole.join(self.run_block(task, pick(cohort, places)))
        return whole.part()._replace(fits=self.limits[task.action])

    def answer(self, task: Task, cohort: Cohort, gathering: Gathering) -> None:
        """Runs one block; if it raises, its clients one by one, so that only the culprit fails."""
        with seeding(self.seed, "execute", task.round):
            self._answer(client_for(task, self.residents), task, cohort, gathering)

    def _answer(self, client: Client, task: Task, cohort: Cohort, gathering: Gathering) -> None:
        tables = self._prepare(client, task, cohort.ids, gathering)
        places = [place for place, ident in enumerate(cohort.ids) if ident not in gathering.failed]
        ids = [cohort.ids[place] for place in places]
        if not ids:
            return
        personal = cohort.personal if len(ids) == len(cohort.ids) else tree.take(cohort.personal, torch.tensor(places))
        error = None
        if len(ids) > 1:
            try:
                reseed(self.seed, "draw", task.round, ids[0])
                gathering.add(ids, self._run(client, task, Cohort(ids, personal), tables))
                return
            except torch.OutOfMemoryError:  # is no client's fault
                raise
            except Exception as raised:  # whatever it is, it is looked into below
                error = raised
        for place, ident in enumerate(ids):
            data = tables[ident] if tables else self.tables.examples(ident, client.split)
            reseed(self.seed, "draw", task.round, ident)
            try:
                reply = alone(self, task, tree.take(personal, place), data, ident)
            except Exception as own:  # the same failure, told without the words of vmap
                gathering.fail(ident, own)
            else:
                gathering.add([ident], reply)
        if error is not None and not any(ident in gathering.failed for ident in ids):
            random = "random" in str(error)
            remedy = "say that it is `stochastic`" if random else "use fedsim.engines.local:Sequential"
            raise TypeError(f"{type(client).__name__} cannot be vectorised, {remedy}: {error}") from error

    def _prepare(self, client: Client, task: Task, ids: Sequence[int], gathering: Gathering) -> dict[int, Batch]:
        """The prepared examples by client; {} for a client that takes them as they are."""
        if untouched(client):
            return {}
        tables = {}
        for ident in ids:
            reseed(self.seed, "draw", task.round, ident)
            try:
                tables[ident] = prepare(self, task, ident)
            except Exception as error:  # whatever a client raises costs that client, and is told
                gathering.fail(ident, error)
        return tables

    def _run(self, client: Client, task: Task, cohort: Cohort, tables: dict[int, Batch]) -> Reply:
        padded = _pad([tables[ident] for ident in cohort.ids]) if tables else None
        data = padded or self.tables.table(cohort.ids, client.split)
        sizes = data["mask"].sum(1).cpu().numpy()
        rows = visits(self, client, data, sizes, task.round, cohort.ids)
        return client.run_cohort(task.shared, cohort.personal, data, torch.from_numpy(rows).to(self.place))

    def _measured(self, task: Task, longest: int, ident: int) -> int:
        """How many clients like this one fit into the memory that is free, as two and four of it at once tell."""
        key = task.action, longest.bit_length()
        if key not in self.widths:
            _ = self.tables  # on the GPU before one looks how much is free there
            try:
                # The first time, what is kept for good is taken as well: models, the workspaces of libraries.
                _, two, four = (peak(self.place, partial(self._trial, task, ident, count)) for count in (2, 2, 4))
                self.widths[key] = fitting(free(self.place), two, four)
            except torch.OutOfMemoryError:
                self.widths[key] = 1
            except Exception:  # whatever it raises is told when it runs, and not on record for others like it
                return 2
        return self.widths[key]

    def _trial(self, task: Task, ident: int, count: int) -> None:
        """Runs so many copies of a client at once, for nothing but the memory that they need."""
        client = client_for(task, self.residents)
        own: Tree = {}
        for other in self.clients.values():  # a client may read what another one keeps
            own = other.personal(generator(self.seed, "measure")) | own
        rows = tree.to(tree.stack([own] * count), self.place) if own else {}
        tables = {} if untouched(client) else {ident: prepare(self, task, ident)}
        with on(self.place), seeding(self.seed, "measure"):
            self._run(client, self.receive(task), Cohort([ident] * count, rows), tables)


def _pad(tables: Sequence[Batch]) -> Batch:
    """Tables of several clients, padded with zeros to the longest: leaves (C, n, ...), with "mask" (C, n)."""
    padded = {
        name: nn.utils.rnn.pad_sequence([table[name] for table in tables], batch_first=True) for name in tables[0]
    }
    sizes = torch.tensor([length(table) for table in tables])
    return padded | {"mask": torch.arange(int(sizes.max())) < sizes[:, None]}
