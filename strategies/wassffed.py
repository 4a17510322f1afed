"""WassFFed: outputs that do not tell the groups apart, by transport to their Wasserstein barycenter.

Li, Zheng, Chen, Chen, Han, Zhang, "WassFFed: Wasserstein Fair Federated Learning", IEEE TKDE 2025,
https://arxiv.org/abs/2411.06881. With mu_a the law of the scores f(X) of group a, pooled over clients, p_a the groups'
shares, nu the barycenter of the mu_a, and T_a = Q_nu o F_a the monotone transport of mu_a to nu:

    min  sum_k n_k / n E_k[alpha CE(f, y) + (1 - alpha) |f(x) - T_a(f(x))|],

of which the second part is sum_a p_a W_1(mu_a, nu).

1. "train", `warm_up` times: federated averaging.
2. "measure": clients get the model and send a histogram of its scores for each group, integers. Their sum is the
   histogram of the pooled scores, of which follow F_a, nu and T_a.
3. "train": clients get the model and T_a at each point of the grid, and train on both parts; T_a stays as it is.

After the warm-up, 2 and 3 take turns, so that a transport step takes two rounds. Where cohorts are drawn, the laws are
those of the clients that counted, and a group that none of them has keeps its scores. The server moves to the mean:

    theta <- theta + lr (sum_k n_k theta_k / sum_k n_k - theta)

The local side is `clients.wassffed`: `CountScores` and `TransportAdam`.

Symbols: `lr` is one minus the weight of the old model in the authors' code.

Differs from the paper: it has two groups and two classes. Here there may be any number of groups, and of K > 2 classes
the probability of each is transported by itself. The barycenter is that of W2; what the authors' code calls so is a
mixture of the laws, "cdf". Clients send histograms, there their scores. `descent` lets alpha fall from 1; there it is
constant.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from fedsim import tree
from fedsim.ranges import Count, Natural, Positive, Probability
from fedsim.strategy import Strategy
from fedsim.task import Metrics, Params, Replies, Task
from fedsim.transport import Barycenter, farthest, grid, score_width, transport_maps
from fedsim.tree import Tree


@dataclass(frozen=True)
class WassFFed(Strategy):
    """Averages the clients' models, and finds the maps that carry the scores of all groups to the same law.

    Attributes:
        num_classes: K.
        num_groups: G.
        alpha: weight of accuracy against fairness; 1 is FedAvg.
        barycenter: the law that scores are carried to.
        bins: points of the grid on which scores are counted.
        warm_up: rounds of federated averaging before; an even number of rounds after it ends with a transport step.
        descent: transport steps in which alpha falls from 1 to `alpha`, linearly; 0: it is `alpha` from the first on.
        lr: how far the server goes from its model to the clients' mean.
    """

    num_classes: Count
    num_groups: Count
    alpha: Probability = 0.5
    barycenter: Barycenter = "quantile"
    bins: Annotated[int, Ge(2)] = 101
    warm_up: Natural = 20
    descent: Natural = 0
    lr: Positive = 0.95

    @property
    def actions(self) -> tuple[str, ...]:
        """What follows upon the warm-up."""
        return ("train", "measure") if self.alpha < 1 else ("train",)

    def init(self, params: Params) -> Tree:
        """The model; nothing is counted yet."""
        return {
            "params": params,
            "counts": torch.zeros((self.num_groups, score_width(self.num_classes), self.bins), dtype=torch.int64),
            "transported": torch.zeros((), dtype=torch.int64),  # how often clients were sent maps
            "measured": torch.zeros((), dtype=torch.bool),  # whether the counts are those of this model
        }

    def configure(self, state: Tree, round: int) -> Task:
        """To train for accuracy alone, to count scores, or to train for both."""
        if round <= self.warm_up or self.alpha == 1:
            return Task("train", {"params": state["params"]}, reduce="mean")
        if not state["measured"]:
            return Task("measure", {"params": state["params"]}, reduce="sum")
        like = next(iter(state["params"].values()))
        alpha = max(self.alpha, 1 - (1 - self.alpha) * (int(state["transported"]) + 1) / (self.descent + 1))
        maps = transport_maps(state["counts"], self.barycenter).to(like.dtype)
        return Task("train", {"params": state["params"], "maps": maps, "alpha": like.new_tensor(alpha)}, reduce="mean")

    def aggregate(self, state: Tree, task: Task, replies: Replies) -> tuple[Tree, Metrics]:
        """The pooled histograms, or the model moved towards the mean."""
        if task.action == "measure":
            counts, expected = replies.update["counts"], tuple(state["counts"].shape)
            if counts.shape != expected:
                raise ValueError(
                    f"clients count scores as {tuple(counts.shape)}, the strategy as {expected}, groups, scores and "
                    "bins: num_groups, num_classes and bins must be the same on both sides"
                )
            told = distances(counts, transport_maps(counts, self.barycenter))
            return state | {"counts": counts, "measured": torch.ones_like(state["measured"])}, told
        params = tree.map(lambda old, mean: torch.lerp(old, mean, self.lr), state["params"], replies.update["params"])
        step = torch.tensor("maps" in task.shared)
        state = state | {"params": params, "transported": state["transported"] + step}
        return state | {"measured": torch.zeros_like(state["measured"])}, {}


def distances(counts: Tensor, maps: Tensor) -> Metrics:
    """How far the groups' scores are from the barycenter, sum_a p_a W_1, and those of two groups from one another.

    Of several scores, and of all pairs of groups, it is the largest.

    Args:
        counts: (G, S, bins).
        maps: T_a at each point of the grid, (G, S, bins).
    """
    moved = (counts * (maps - grid(counts.shape[-1])).abs()).sum((0, 2)) / counts.sum((0, 2)).clamp(min=1)  # (S,)
    return {"distance/barycenter": float(moved.max()), "distance/groups": farthest(counts)}
