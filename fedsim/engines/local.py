"""The engines of this process: clients one by one, clients all at once, and the rule that picks one of the two."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fedsim import tree
from fedsim.client import Client
from fedsim.data.federation import Federation, schedule
from fedsim.engines.engine import Answer, Item, Local, Shared, client_for
from fedsim.engines.gathering import Gathering, Part
from fedsim.randomness import generator, reseed, seeding
from fedsim.ranges import Count, Natural, check_fields
from fedsim.task import Batch, Cohort, Reply, Task
from fedsim.tree import Tree

# What one vectorised block may occupy. Beyond the processor's cache a block costs more than its clients one by one;
# measured with experiments/benchmarks.
BLOCK_BYTES = 32 * 2**20
# Into so many blocks a cohort is cut that runs one by one: enough to keep workers busy, and few enough that the
# partial sums of a large model stay cheap.
BLOCKS = 32
# Above this size, and for convolutions, vmap on a CPU is slower than a loop.
VECTORISED_PARAMETERS = 500_000


def prepare(client: Client, federation: Federation, task: Task, seed: int, ident: int) -> Batch:
    """What one client works on in this round: its prepared examples, leaves (n, ...)."""
    examples = federation.examples(ident, client.split)
    if type(client).prepare is Client.prepare:
        return examples
    return client.prepare(examples, generator(seed, "prepare", task.round, ident))


def alone(client: Client, task: Task, personal: Tree, data: Batch, seed: int, ident: int) -> Reply:
    """What one client answers without vmap, leaves (1, ...)."""
    sizes = np.array([_length(data)])
    data = data | {"mask": torch.ones(int(sizes[0]), dtype=torch.bool)}
    plan = schedule(sizes, client.epochs, client.batch_size, seed, task.round, [ident])[0]  # (T, B)
    rows = [torch.from_numpy(step[step >= 0]) for step in plan]
    reply = client.run(task.shared, personal, data, rows)
    if not isinstance(reply, Reply):
        raise TypeError(f"finish must return a Reply, got {type(reply).__name__}")
    tree.leaves(reply._asdict())  # raises where something in it is no tensor
    return Reply(**tree.map(_one, reply._asdict()))


def _one(leaf: torch.Tensor | tree.Rows) -> torch.Tensor | tree.Rows:
    return tree.Rows(leaf.index[None], leaf.values[None], leaf.size) if isinstance(leaf, tree.Rows) else leaf[None]


def _length(table: Batch) -> int:
    return len(next(iter(table.values()))) if table else 0


@dataclass(frozen=True, eq=False)
class Sequential(Local):
    """Clients one after another.

    A cohort is cut into BLOCKS blocks at most, of which each is folded by itself.
    """

    federation: Federation
    clients: Mapping[str, Client]
    seed: Natural = 0

    def __post_init__(self) -> None:
        check_fields(self)

    def __repr__(self) -> str:
        return "Sequential()"

    def blocks(self, task: Task, ids: Sequence[int]) -> Iterator[Sequence[int]]:
        """Neighbours in the cohort, equally many in all blocks but the last."""
        width = -(-len(ids) // BLOCKS)
        return (range(start, min(start + width, len(ids))) for start in range(0, len(ids), max(1, width)))

    def run_block(self, task: Task, cohort: Cohort) -> Part:
        """What the clients of one block answer."""
        client = client_for(task, self.clients)
        gathering = Gathering(type(client).__name__, task, cohort, {"examples": self.federation.columns})
        with seeding(self.seed, "execute", task.round):
            for position, ident in enumerate(cohort.ids):
                # Whether it says that it is stochastic or not: what it draws must not differ from run to run.
                reseed(self.seed, "draw", task.round, ident)
                try:
                    data = prepare(client, self.federation, task, self.seed, ident)
                    reply = alone(client, task, tree.take(cohort.personal, position), data, self.seed, ident)
                except Exception as error:  # whatever a client raises costs that client, and is told
                    gathering.fail(ident, error)
                else:
                    gathering.add([ident], reply)
        return gathering.part()


@dataclass(frozen=True, eq=False)
class Vectorised(Local):
    """Clients in blocks, each block as one vectorised program.

    Clients are sorted by their number of examples, and a block ends where a client has less than a quarter of its
    first one's, so that blocks pad little. A block's composition depends on the cohort alone, and a block of one runs
    without vmap.

    Attributes:
        federation: the data by client.
        clients: action -> client.
        seed: of all that is drawn.
        block: the most clients in a block; None: as many as fit into BLOCK_BYTES. A number switches that bound off.
    """

    federation: Federation
    clients: Mapping[str, Client]
    seed: Natural = 0
    block: Count | None = None

    def __post_init__(self) -> None:
        check_fields(self)
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

    def blocks(self, task: Task, ids: Sequence[int]) -> Iterator[Sequence[int]]:
        """The largest clients first."""
        client = client_for(task, self.clients)
        sizes = self.federation.sizes(client.split, ids)
        order = np.argsort(-sizes, kind="stable")
        start = 0
        while start < len(order):
            longest = int(sizes[order[start]])
            alike = start + int(np.count_nonzero(4 * sizes[order[start:]] >= longest))
            end = min(alike, start + (self.block or self.width(task, longest)))
            yield order[start:end].tolist()
            start = end

    def run_block(self, task: Task, cohort: Cohort) -> Part:
        """What the clients of one block answer."""
        client = client_for(task, self.clients)
        gathering = Gathering(type(client).__name__, task, cohort, {"examples": self.federation.columns})
        with seeding(self.seed, "execute", task.round):
            self._block(client, task, cohort, gathering)
        return gathering.part()

    def width(self, task: Task, longest: int) -> int:
        """How many clients of this size fit into BLOCK_BYTES, counting four times what they receive, and tables."""
        row = sum(column[:1].numel() * column.element_size() for column in self.federation.columns.values())
        shared = tree.count_bytes(tree.leaves(task.shared))
        return max(1, BLOCK_BYTES // max(1, 4 * shared + longest * row))

    def _block(self, client: Client, task: Task, cohort: Cohort, gathering: Gathering) -> None:
        """Runs one block; if it raises, its clients one by one, so that only the culprit fails."""
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
            except Exception as raised:  # whatever it is, it is looked into below
                error = raised
        for place, ident in enumerate(ids):
            data = tables[ident] if tables else self.federation.examples(ident, client.split)
            reseed(self.seed, "draw", task.round, ident)
            try:
                reply = alone(client, task, tree.take(personal, place), data, self.seed, ident)
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
        if type(client).prepare is Client.prepare:
            return {}
        tables = {}
        for ident in ids:
            reseed(self.seed, "draw", task.round, ident)
            try:
                tables[ident] = prepare(client, self.federation, task, self.seed, ident)
            except Exception as error:  # whatever a client raises costs that client, and is told
                gathering.fail(ident, error)
        return tables

    def _run(self, client: Client, task: Task, cohort: Cohort, tables: dict[int, Batch]) -> Reply:
        if tables:
            data = _pad([tables[ident] for ident in cohort.ids])
        else:
            data = self.federation.table(cohort.ids, client.split)
        sizes = data["mask"].sum(1).numpy()
        rows = schedule(sizes, client.epochs, client.batch_size, self.seed, task.round, cohort.ids)
        return client.run_cohort(task.shared, cohort.personal, data, torch.from_numpy(rows))


def _pad(tables: Sequence[Batch]) -> Batch:
    """Tables of several clients, padded with zeros to the longest: leaves (C, n, ...), with "mask" (C, n)."""
    padded = {
        name: nn.utils.rnn.pad_sequence([table[name] for table in tables], batch_first=True) for name in tables[0]
    }
    sizes = torch.tensor([_length(table) for table in tables])
    return padded | {"mask": torch.arange(int(sizes.max())) < sizes[:, None]}


def auto(federation: Federation, clients: Mapping[str, Client], seed: Natural = 0) -> Local:
    """`Vectorised` where that is cheaper on a CPU, else `Sequential`.

    The rule reads the clients' models (layers, number of parameters) and no clock, so an experiment runs the same way
    on every machine: vectorised unless a client overrides `run`, a model has a convolution, or it has more than
    VECTORISED_PARAMETERS parameters. Without any client there is nothing to vectorise.
    """
    modules = [module for client in clients.values() if (module := _module(client)) is not None]
    slow = any(isinstance(part, nn.modules.conv._ConvNd) for module in modules for part in module.modules())
    large = any(sum(p.numel() for p in module.parameters()) > VECTORISED_PARAMETERS for module in modules)
    alone = any(type(client).run is not Client.run for client in clients.values())
    return (Sequential if slow or large or alone or not clients else Vectorised)(federation, clients, seed)


def _module(client: Client) -> nn.Module | None:
    return getattr(getattr(client, "model", None), "module", None)
