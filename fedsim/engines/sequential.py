"""Sequential: clients one by one."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim import tree
from fedsim.client import Client
from fedsim.data.federation import Federation, planned, schedule
from fedsim.engines.device import CPU, find
from fedsim.engines.engine import Local, client_for
from fedsim.engines.gathering import Gathering
from fedsim.randomness import generator, reseed, seeding
from fedsim.ranges import Natural, check_fields
from fedsim.task import Batch, Cohort, Reply, Task
from fedsim.tree import Tree

# Into so many blocks a cohort is cut: enough to keep workers busy, and few enough that the partial sums of a large
# model stay cheap.
BLOCKS = 64


def prepare(engine: Local, task: Task, ident: int) -> Batch:
    """What one client works on in this round: its prepared examples, leaves (n, ...), on the engine's device."""
    client = client_for(task, engine.clients)
    if untouched(client):
        return engine.tables.examples(ident, client.split)
    with nullcontext() if engine.place == CPU else CPU:  # a generator of the CPU draws nothing elsewhere
        examples = client.select(engine.federation.examples(ident, client.split), task.shared)
        prepared = client.prepare(examples, generator(engine.seed, "prepare", task.round, ident))
    return prepared if engine.place == CPU else tree.to(prepared, engine.place)


def untouched(client: Client) -> bool:
    """Whether it takes its examples as they are."""
    return type(client).prepare is Client.prepare and type(client).select is Client.select


def alone(engine: Local, task: Task, personal: Tree, data: Batch, ident: int) -> Reply:
    """What one client answers without vmap, leaves (1, ...)."""
    client = client_for(task, engine.residents)
    sizes = np.array([length(data)])
    data = data | {"mask": torch.ones(int(sizes[0]), dtype=torch.bool)}
    plan = visits(engine, client, data, sizes, task.round, [ident])[0]  # (T, B)
    rows = [torch.from_numpy(step[step >= 0]).to(engine.place) for step in plan]
    reply = client.run(task.shared, personal, data, rows)
    if not isinstance(reply, Reply):
        raise TypeError(f"finish must return a Reply, got {type(reply).__name__}")
    tree.leaves(reply._asdict())  # raises where something in it is no tensor
    return Reply(**tree.map(_one, reply._asdict()))


def visits(
    engine: Local, client: Client, data: Batch, sizes: NDArray[np.int64], round: int, ids: Sequence[int]
) -> NDArray[np.int64]:
    """Which example each client visits at which step, (C, T, B), -1 where none."""
    if not client.ordered:
        return schedule(sizes, client.epochs, client.batch_size, engine.seed, round, ids)
    if "step" not in data:
        raise ValueError(f"{type(client).__name__} is `ordered`, so its `prepare` must make a column step")
    return planned(data["step"].cpu().numpy().reshape(len(sizes), -1), sizes)


def _one(leaf: torch.Tensor | tree.Rows) -> torch.Tensor | tree.Rows:
    return tree.Rows(leaf.index[None], leaf.values[None], leaf.size) if isinstance(leaf, tree.Rows) else leaf[None]


def length(table: Batch) -> int:
    """How many examples are in a table."""
    return len(next(iter(table.values()))) if table else 0


@dataclass(frozen=True, eq=False)
class Sequential(Local):
    """Clients one after another.

    A cohort is cut into BLOCKS blocks at most, of which each is folded by itself.

    Attributes:
        federation: the data by client.
        clients: action -> client.
        seed: of all that is drawn.
        device: "cpu", "cuda", "cuda:1".
    """

    federation: Federation
    clients: Mapping[str, Client]
    seed: Natural = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_fields(self)
        find(self.device)

    def __repr__(self) -> str:
        return "Sequential()"

    def blocks(self, task: Task, ids: Sequence[int]) -> Iterator[Sequence[int]]:
        """Neighbours in the cohort, equally many in all blocks but the last."""
        width = -(-len(ids) // BLOCKS)
        return (range(start, min(start + width, len(ids))) for start in range(0, len(ids), max(1, width)))

    def answer(self, task: Task, cohort: Cohort, gathering: Gathering) -> None:
        """Runs the clients of one block."""
        with seeding(self.seed, "execute", task.round):
            for position, ident in enumerate(cohort.ids):
                # Whether it says that it is stochastic or not: what it draws must not differ from run to run.
                reseed(self.seed, "draw", task.round, ident)
                try:
                    reply = alone(self, task, tree.take(cohort.personal, position), prepare(self, task, ident), ident)
                except Exception as error:  # whatever a client raises costs that client, and is told
                    gathering.fail(ident, error)
                else:
                    gathering.add([ident], reply)
