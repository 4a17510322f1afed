"""Method: what a strategy is made of, and what every loop does with it, fedsim's and Flower's."""

from typing import Protocol

from fedsim import tree
from fedsim.task import Metrics, Params, Replies, Task
from fedsim.tree import Tree


class Method(Protocol):
    """The functions of a `fedsim.Strategy` in which its mathematics is."""

    def init(self, params: Params) -> Tree: ...  # noqa: D102 - see Strategy
    def configure(self, state: Tree, round: int) -> Task: ...  # noqa: D102
    def aggregate(self, state: Tree, task: Task, replies: Replies) -> tuple[Tree, Metrics]: ...  # noqa: D102
    def params(self, state: Tree) -> Params: ...  # noqa: D102
    def shared(self, state: Tree) -> Tree: ...  # noqa: D102


def step(method: Method, state: Tree, task: Task, replies: Replies) -> tuple[Tree, Metrics]:
    """What the method makes of the replies.

    Raises:
        ValueError: the new state has other names or shapes than the old one, so no checkpoint of it could be read.
    """
    try:
        after, metrics = method.aggregate(state, task, replies)
    except Exception as error:
        sent = ", ".join(name for name, _ in tree.items(replies.update))
        rows = ", ".join(name for name, leaf in tree.items(replies.update) if isinstance(leaf, tree.Rows))
        told = f"; of these, as rows of a table, {rows}" if rows else ""
        error.add_note(f"{type(method).__name__} was to aggregate {sent}, with reduce = {task.reduce!r}{told}.")
        raise
    tree.restore(tree.flatten(after), state, f"the state that {type(method).__name__} made in round {task.round}")
    return after, metrics


def averages(replies: Replies) -> Metrics:
    """The clients' metrics, averaged by the weight of their replies."""
    weight = replies.weight.double()
    total = float(weight.sum())
    if not total:
        return {}
    some = weight > 0  # what weighs nothing counts for nothing, were it NaN
    return {
        name: float((values[some].double() * weight[some]).sum()) / total for name, values in replies.metrics.items()
    }
