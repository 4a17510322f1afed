"""The engines of this process: clients one by one, clients all at once, and the rule that picks one of the two."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fedsim import tree
from fedsim.client import Client
from fedsim.data.federation import Federation, schedule
from fedsim.engines.engine import Engine, Gathering, client_for, drawing
from fedsim.randomness import generator
from fedsim.ranges import Count, Natural, check_fields
from fedsim.task import Batch, Cohort, Replies, Reply, Task
from fedsim.tree import Tree

# What one vectorised block may occupy. Beyond the processor's cache a block costs more than its clients one by one;
# measured with experiments/benchmarks.
BLOCK_BYTES = 32 * 2**20
# Above this size, and for convolutions, vmap on a CPU is slower than a loop.
VECTORISED_PARAMETERS = 500_000


def prepare(client: Client, federation: Federation, task: Task, seed: int, ident: int) -> Batch:
    """What one client works on in this round: its prepared examples, leaves (n, ...)."""
    examples = federation.examples(ident, client.split)
    if type(client).prepare is Client.prepare:
        return examples
    return client.prepare(examples, generator(seed, "prepare", task.round, ident))


def _length(table: Batch) -> int:
    return len(next(iter(table.values()))) if table else 0


@dataclass(frozen=True, eq=False)
class Sequential(Engine):
    """Clients one after another."""

    federation: Federation
    clients: Mapping[str, Client]
    seed: Natural = 0

    def __post_init__(self) -> None:
        check_fields(self)

    def __repr__(self) -> str:
        return "Sequential()"

    def execute(self, task: Task, cohort: Cohort) -> Replies:
        """What the clients of the cohort answer to the task."""
        client = client_for(task, self.clients)
        gathering = Gathering(task, cohort)
        for position, ident in enumerate(cohort.ids):
            try:
                data = prepare(client, self.federation, task, self.seed, ident)
                reply = _alone(client, task, tree.take(cohort.personal, position), data, self.seed, ident)
            except Exception as error:  # whatever a client raises costs that client, and is told
                gathering.fail(ident, error)
            else:
                gathering.add([ident], reply)
        return gathering.replies()


def _alone(client: Client, task: Task, personal: Tree, data: Batch, seed: int, ident: int) -> Reply:
    """What one client answers without vmap, leaves (1, ...)."""
    size = _length(data)
    data = data | {"mask": torch.ones(size, dtype=torch.bool)}
    sizes = np.array([size])
    plan = schedule(sizes, client.epochs, client.batch_size, seed, task.round, [ident])[0]  # (T, B)
    rows = [torch.from_numpy(step[step >= 0]) for step in plan]
    with drawing(client, seed, "draw", task.round, ident):
        reply = client.run(task.shared, personal, data, rows)._asdict()
    tree.leaves(reply)  # raises where something in it is no tensor
    return Reply(**tree.map(_one, reply))


def _one(leaf: torch.Tensor | tree.Rows) -> torch.Tensor | tree.Rows:
    return tree.Rows(leaf.index[None], leaf.values[None], leaf.size) if isinstance(leaf, tree.Rows) else leaf[None]


@dataclass(frozen=True, eq=False)
class Vectorised(Engine):
    """Clients in blocks, each block as one vectorised program.

    Clients are sorted by their number of examples, so that blocks pad little. A block's composition depends on the
    cohort alone. `block` None: as many clients as fit into BLOCK_BYTES.
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

    def execute(self, task: Task, cohort: Cohort) -> Replies:
        """What the clients of the cohort answer to the task."""
        client = client_for(task, self.clients)
        gathering = Gathering(task, cohort)
        prepared = self._prepare(client, task, cohort, gathering)
        ids = [ident for ident in cohort.ids if ident not in gathering.failed]
        position = {ident: place for place, ident in enumerate(cohort.ids)}
        if prepared:
            sizes = np.array([_length(prepared[ident]) for ident in ids], dtype=np.int64)
        else:
            sizes = self.federation.sizes(client.split, ids)
        order = np.argsort(-sizes, kind="stable")
        width = self.block or self.width(task, int(sizes.max(initial=1)))
        for start in range(0, len(ids), width):
            chosen = [ids[place] for place in order[start : start + width]]
            personal = tree.take(cohort.personal, torch.tensor([position[ident] for ident in chosen]))
            self._block(client, task, Cohort(chosen, personal), prepared, gathering)
        return gathering.replies()

    def _prepare(self, client: Client, task: Task, cohort: Cohort, gathering: Gathering) -> dict[int, Batch]:
        """The prepared examples by client; {} for a client that takes them as they are."""
        if type(client).prepare is Client.prepare:
            return {}
        prepared = {}
        for ident in cohort.ids:
            try:
                prepared[ident] = prepare(client, self.federation, task, self.seed, ident)
            except Exception as error:  # whatever a client raises costs that client, and is told
                gathering.fail(ident, error)
        return prepared

    def width(self, task: Task, longest: int) -> int:
        """Clients in a block: a client needs its parameters, their gradient and two temporary copies, and its table."""
        row = sum(column[:1].numel() * column.element_size() for column in self.federation.columns.values())
        shared = tree.count_bytes(tree.leaves(task.shared))
        return max(1, BLOCK_BYTES // max(1, 4 * shared + longest * row))

    def _block(
        self, client: Client, task: Task, cohort: Cohort, prepared: dict[int, Batch], gathering: Gathering
    ) -> None:
        """Runs one block; if it raises, its clients one by one, so that only the culprit fails."""
        ids = list(cohort.ids)
        try:
            with drawing(client, self.seed, "draw", task.round, ids[0]):
                replies = self._run(client, task, cohort, prepared)
        except Exception as error:
            if len(ids) == 1:
                self._blame(client, task, cohort, prepared, gathering, error)
                return
            for place in range(len(ids)):
                alone = Cohort(ids[place : place + 1], tree.take(cohort.personal, slice(place, place + 1)))
                self._block(client, task, alone, prepared, gathering)
        else:
            gathering.add(ids, replies)

    def _blame(
        self,
        client: Client,
        task: Task,
        cohort: Cohort,
        prepared: dict[int, Batch],
        gathering: Gathering,
        error: Exception,
    ) -> None:
        """A client that raises without vmap too has failed; one that does not cannot be vectorised."""
        ident = cohort.ids[0]
        data = prepared[ident] if prepared else self.federation.examples(ident, client.split)
        try:
            _alone(client, task, tree.take(cohort.personal, 0), data, self.seed, ident)
        except Exception as own:  # the same failure, told without the words of vmap
            gathering.fail(ident, own)
        else:
            raise TypeError(
                f"{type(client).__name__} cannot be vectorised, use fedsim.engines.local:Sequential for it: {error}"
            ) from error

    def _run(self, client: Client, task: Task, cohort: Cohort, prepared: dict[int, Batch]) -> Reply:
        if prepared:
            data = _pad([prepared[ident] for ident in cohort.ids])
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


def auto(federation: Federation, clients: Mapping[str, Client], seed: Natural = 0) -> Engine:
    """`Vectorised` where that is cheaper on a CPU, else `Sequential`.

    The rule reads the clients' models (layers, number of parameters) and no clock, so an experiment runs the same way
    on every machine: vectorised unless a client overrides `run`, a model has a convolution, or it has more than
    VECTORISED_PARAMETERS parameters.
    """
    modules = [module for client in clients.values() if (module := _module(client)) is not None]
    slow = any(isinstance(part, nn.modules.conv._ConvNd) for module in modules for part in module.modules())
    large = any(sum(p.numel() for p in module.parameters()) > VECTORISED_PARAMETERS for module in modules)
    alone = any(type(client).run is not Client.run for client in clients.values())
    return (Sequential if slow or large or alone else Vectorised)(federation, clients, seed)


def _module(client: Client) -> nn.Module | None:
    return getattr(getattr(client, "model", None), "module", None)
