"""Strategy: what the server does, as pure functions of an explicit state; and each of them a strategy of Flower's."""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import flwr.serverapp.strategy
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from fedsim.flower.session import Session
from fedsim.ranges import check_fields
from fedsim.task import Metrics, Params, Replies, Sampler, Task
from fedsim.tree import Tree


@dataclass(frozen=True)
class Strategy(flwr.serverapp.strategy.Strategy):
    """The server's side of a method: a first state, a task for each round, a new state out of the answers.

    A strategy is a frozen dataclass of hyper-parameters and nothing else; all that it must remember is in the state, a
    tree of tensors whose names and shapes stay the same. Hence a checkpoint is the state.

    In a ServerApp of Flower's it is used as any strategy there, `strategy.start(grid=grid, initial_arrays=...)`, and
    Flower's wrappers can wrap it. The client numbered k is then the k-th node in the order of node ids.
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

    @property
    def actions(self) -> tuple[str, ...]:
        """What it asks of clients in some later round, besides what it asks in the first; missed before any round."""
        return ()

    def shares(self, action: str) -> tuple[str, ...] | None:
        """What it shares in an action of a later round; None where that is not told before."""
        return None

    @property
    def overwrites(self) -> bool:
        """Whether `aggregate` writes the next state over the one it is given, for tables too large to be there twice.

        Such a state holds until the next step only; `init` must not give out the model's own parameters then.
        """
        return False

    def params(self, state: Tree) -> Params:
        """The model to evaluate and to hand out."""
        return cast(Params, state["params"])

    def shared(self, state: Tree) -> Tree:
        """What the clients that evaluate receive; more than the model where a method decides with more than that."""
        return {"params": self.params(state)}

    def done(self, state: Tree) -> bool:
        """Whether no further round would change anything that matters: a run ends then, before its last round."""
        return False

    # Flower's side, written once for all strategies.

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
        *,
        sample: Sampler | None = None,
        min_nodes: int = 1,
    ) -> Result:
        """Flower's own loop over the nodes of a grid.

        Args:
            grid: the nodes.
            initial_arrays: the model's first parameters by name, such as `ArrayRecord(module.state_dict())`.
            num_rounds: how many rounds.
            timeout: how long to wait for the answers of a round, in seconds.
            train_config: what the nodes are told when they train; "server-round" is added.
            evaluate_config: the same when they evaluate.
            evaluate_fn: evaluates the model at the server, before the first round (as round 0) and after each.
            sample: which of the nodes take part in a round, such as `fedsim.sampling.uniform(100, fraction=0.1)`;
                None: all of them.
            min_nodes: how many nodes to wait for.
        """
        kind = type(type(self).__name__, (Session,), {})  # Flower's log names the class
        session: Session = kind(self, sample, min_nodes)
        return session.start(grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages of this round to all nodes."""
        return self._session.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The new model, and the clients' metrics averaged by weight; nothing where nobody answered."""
        return self._session.aggregate_train(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages to all nodes, to evaluate the model."""
        return self._session.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The clients' measures, averaged by their numbers of examples."""
        return self._session.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """Logs what the strategy is."""
        self._session.summary()

    def __getstate__(self) -> dict[str, object]:
        """The hyper-parameters, and nothing of a run."""
        return {name: value for name, value in self.__dict__.items() if name != "_flower_session"}

    @property
    def _session(self) -> Session:
        """What Flower's phases must remember when they are called one by one, as Flower's wrappers do."""
        found = self.__dict__.get("_flower_session")
        if found is None:
            found = Session(self, wrapped=True)
            object.__setattr__(self, "_flower_session", found)
        return cast(Session, found)
