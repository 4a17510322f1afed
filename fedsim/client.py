"""Client: what one does locally, as pure functions that every engine composes in the same way."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim import tree
from fedsim.ranges import Count, check_fields
from fedsim.task import Batch, Reply
from fedsim.tree import Tree


@dataclass(frozen=True, kw_only=True)
class Client(ABC):
    """One client's work in one round: start, a step per batch, finish.

    A client is a frozen dataclass of hyper-parameters and nothing else. Its functions are pure: they change none of
    their arguments and keep nothing on `self`, so one object serves all clients, one after another or all at once
    under `torch.func.vmap`. There, a step may not branch on the value of a tensor.
    """

    epochs: Count = 1
    batch_size: Count = 32

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def split(self) -> str:
        """Which part of a client's examples this is run on."""
        return "train"

    @property
    def needs(self) -> tuple[str, ...]:
        """Columns without which it cannot run, of which an experiment is told before it starts."""
        return ()

    @property
    def expects(self) -> Mapping[str, str]:
        """What a server must share besides its model -> what to set so that it does; missed before a run starts."""
        return {}

    @property
    def stochastic(self) -> bool:
        """Whether `start`, `step` or `finish` draw from torch's generator, which is seeded: as its model does."""
        return bool(getattr(getattr(self, "model", None), "stochastic", False))

    @property
    def ordered(self) -> bool:
        """Whether the column "step" that `prepare` makes says at which step each example is visited, from 0 on.

        Else every epoch visits all examples in a fresh order, `batch_size` at a time.
        """
        return False

    def footprint(self, shared: Tree, examples: int) -> int:
        """Bytes that one client with so many examples takes up while it runs; on a CPU it decides how many run at once.

        Unless told otherwise four times what it receives: parameters before and after a step, gradients, and the
        optimiser's.
        """
        return 4 * tree.count_bytes(tree.leaves(shared))

    @property
    def keeper(self) -> "Client":
        """Whose `personal` it is, of which what is drawn depends: its own, unless it stands around another client."""
        return self

    def personal(self, rng: torch.Generator) -> Tree:
        """What a client keeps to itself, as it is before its first round."""
        return {}

    def select(self, examples: Batch, shared: Tree) -> Batch:
        """Those of a client's examples that this round is about, by what the server says. Runs outside vmap."""
        return examples

    def prepare(self, examples: Batch, rng: torch.Generator) -> Batch:
        """The selected examples made ready, leaves (n', ...): negatives drawn, images augmented. Runs outside vmap."""
        return examples

    @abstractmethod
    def start(self, shared: Tree, personal: Tree, data: Batch) -> Tree:
        """The state before the first step. `data` is the whole prepared table, with "mask" (n,)."""

    @abstractmethod
    def step(self, state: Tree, batch: Batch) -> Tree:
        """The state after one batch, leaves (B, ...), of which those count where "mask" (B,) holds."""

    @abstractmethod
    def finish(self, shared: Tree, state: Tree, data: Batch) -> Reply:
        """What is sent, and what is kept."""

    def run(self, shared: Tree, personal: Tree, data: Batch, rows: Sequence[Tensor]) -> Reply:
        """One client alone; `rows` names the examples of each of the T steps, none of them padding."""
        state = self.start(shared, personal, data)
        for step in rows:
            state = self.step(state, tree.take(data, step))
        return self.finish(shared, state, data)

    def run_cohort(self, shared: Tree, personal: Tree, data: Batch, rows: Tensor) -> Reply:
        """C clients at once, as one vectorised program: what `run` gives for each, stacked, leaves (C, ...).

        Clients may differ in length: `data` is padded to the longest, `rows` (C, T, B) is -1 where there is nothing.
        A client that has no batch left steps on, and its new state is thrown away.
        """
        real = rows >= 0
        certain = int(real.any(-1).all(0).sum())  # the steps that all of them have need no such care

        def one(personal: Tree, data: Batch, rows: Tensor, real: Tensor) -> dict[str, Tensor]:
            state = self.start(shared, personal, data)
            examples = {name: column for name, column in data.items() if name != "mask"}
            for index, (step, mask) in enumerate(zip(rows.unbind(0), real.unbind(0), strict=True)):
                after = self.step(state, tree.take(examples, step) | {"mask": mask})
                state = after if index < certain else tree.where(mask.any(), after, state)
            return tree.flatten(self.finish(shared, state, data)._asdict())

        randomness = "different" if self.stochastic else "error"
        flat = torch.func.vmap(one, randomness=randomness)(personal, data, rows.clamp(min=0), real)
        whole = tree.unflatten(flat)
        return Reply(whole.get("update", {}), whole["weight"], whole.get("personal", {}), whole.get("metrics", {}))
