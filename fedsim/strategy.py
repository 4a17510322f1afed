"""Strategy: what the server does, as pure functions of an explicit state."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import cast

from fedsim.ranges import check_fields
from fedsim.task import Metrics, Params, Replies, Task
from fedsim.tree import Tree


@dataclass(frozen=True)
class Strategy(ABC):
    """The server's side of a method: a first state, a task for each round, a new state out of the answers.

    A strategy is a frozen dataclass of hyper-parameters and nothing else; all that it must remember is in the state, a
    tree of tensors whose names and shapes stay the same. Hence a checkpoint is the state.
    """

    def __post_init__(self) -> None:
        check_fields(self)

    def init(self, params: Params) -> Tree:
        """The state before the first round, for a model's first parameters."""
        return {"params": params}

    def configure(self, state: Tree, round: int) -> Task:
        """What is asked of the clients in this round (counted from 1): to train, and to send what can be averaged."""
        return Task("train", {"params": state["params"]}, reduce="mean")

    @abstractmethod
    def aggregate(self, state: Tree, task: Task, replies: Replies) -> tuple[Tree, Metrics]:
        """The next state, and what is worth writing down about this step. At least one client answered."""

    def params(self, state: Tree) -> Params:
        """The model to evaluate and to hand out."""
        return cast(Params, state["params"])

    def shared(self, state: Tree) -> Tree:
        """What the clients that evaluate receive; more than the model where a method decides with more than that."""
        return {"params": self.params(state)}
