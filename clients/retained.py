"""Any client, on what is kept: the examples that a request at hand names, or one before it, are left out.

For plain rounds after something was forgotten, and to compare with: training on without the examples, which forgets
little.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedsim.client import Client
from fedsim.forgetting import AT_HAND, kept
from fedsim.task import Batch, Reply
from fedsim.tree import Tree


@dataclass(frozen=True, kw_only=True)
class Retained(Client):
    """Does what another client does, with fewer examples.

    Attributes:
        client: the other; what it says of epochs, batch size and everything else holds.
    """

    client: Client
    epochs: int = field(init=False)
    batch_size: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "epochs", self.client.epochs)
        object.__setattr__(self, "batch_size", self.client.batch_size)
        super().__post_init__()
        if type(self.client).run is not Client.run:
            raise ValueError(f"client: {type(self.client).__name__} overrides run, of which Retained knows nothing")

    @property
    def split(self) -> str:
        """The other's."""
        return self.client.split

    @property
    def needs(self) -> tuple[str, ...]:
        """What the other needs, and what is to be forgotten."""
        return (*self.client.needs, "target")

    @property
    def expects(self) -> dict[str, str]:
        """What the other expects, and which request is at hand."""
        return AT_HAND | dict(self.client.expects)

    @property
    def stochastic(self) -> bool:
        """Whether the other is."""
        return self.client.stochastic

    @property
    def ordered(self) -> bool:
        """Whether the other is."""
        return self.client.ordered

    def footprint(self, shared: Tree, examples: int) -> int:
        """What the other takes up."""
        return self.client.footprint(shared, examples)

    @property
    def keeper(self) -> Client:
        """The other."""
        return self.client.keeper

    def personal(self, rng: torch.Generator) -> Tree:
        """What the other keeps."""
        return self.client.personal(rng)

    def select(self, examples: Batch, shared: Tree) -> Batch:
        """Those that are kept, of which the other selects."""
        return self.client.select(kept(examples, shared), shared)

    def prepare(self, examples: Batch, rng: torch.Generator) -> Batch:
        """As the other."""
        return self.client.prepare(examples, rng)

    def start(self, shared: Tree, personal: Tree, data: Batch) -> Tree:
        """As the other."""
        return self.client.start(shared, personal, data)

    def step(self, state: Tree, batch: Batch) -> Tree:
        """As the other."""
        return self.client.step(state, batch)

    def finish(self, shared: Tree, state: Tree, data: Batch) -> Reply:
        """As the other."""
        return self.client.finish(shared, state, data)

    def run_cohort(self, shared: Tree, personal: Tree, data: Batch, rows: Tensor) -> Reply:
        """As the other, which may have its own way."""
        return self.client.run_cohort(shared, personal, data, rows)
