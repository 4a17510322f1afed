"""FedFACT's local side, in training: a cost-sensitive loss whose costs are what unfairness is charged.

Wang et al., "FedFACT: A Provable Framework for Controllable Group-Fairness Calibration in Federated Learning", NeurIPS
2025, https://arxiv.org/abs/2506.03777, Algorithm 1. Client k receives the model theta and the prices of the server's
constraints, and keeps a model phi of its own, the weight w of theta against it, and multipliers mu for its local
constraints |D_u| <= tolerance. In a round it

1. decides by its ensemble      f = w softmax(s_theta(x)) + (1 - w) softmax(s_phi(x)),  h(x) = argmax f;
2. makes its cost matrix        M(a) = I - sum_v (price_v + own price_v) on the rows of E_v, column y_v;
3. shifts its weight            w <- 1 / (1 + W),  W = (1 - w) / w exp(-eta (L(phi) - L(theta)));
4. moves its multipliers        mu <- Pi_B(mu + step [D(h) - tolerance; -D(h) - tolerance]);
5. trains theta and phi on      l(y, s(x), a) = - sum_i (M + kappa)[a, y, i] log softmax_i(s(x));
6. sends theta, and how much of each group and event h took for the event's class.

Symbols: `weight_rate` is the paper's eta_w, `dual_step` its eta_d, `bound` its B_d; L is the mean loss on all examples.
phi, w and mu are never sent. `Ensemble` is the classifier that comes out.

Differs from the paper: the printed sign of the local term in M is wrong (it rewards local unfairness), and the printed
update of mu forgets what mu was; both are mended. mu stands for the paper's mu_k / p_k, p_k the client's share of all
examples, so that one step size serves all clients; the bound is on it. kappa is the least that makes all costs
positive, and costs are divided by 1 + K kappa for training, which changes no decision and keeps the step size in place.
Prices travel instead of multipliers: half as many numbers, of which M is made directly.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedsim import tree
from fedsim.client import Client
from fedsim.evaluation import Classifier
from fedsim.fairness import Events, Notion, ascend, costs, count, deviations, events, known, prices
from fedsim.model import Model, gradient, mean
from fedsim.optim import Optimiser, sgd
from fedsim.ranges import Count, NonNegative, Positive, Probability
from fedsim.task import Batch, Params, Reply
from fedsim.tree import Tree


@dataclass(frozen=True)
class FairSgd(Client):
    """Trains the server's model, and one of its own, to be fair. The weight is the number of examples.

    Attributes:
        model: what is trained; its outputs are scores of the K classes, its criterion is not used.
        num_classes: K.
        num_groups: G, of the column "a".
        lr: of both models.
        notion: which rates are to be the same for all groups; the strategy's.
        local_tolerance: how far a group's rate at this client may be from the pooled one; None: as far as it likes.
        personalised: whether the client keeps a model of its own.
        dual_step: of the local multipliers.
        bound: of their sum.
        weight_rate: how fast the weight follows the losses.
        average: of how many rounds' classifiers, the last ones, `Ensemble` draws one at random.
    """

    model: Model
    num_classes: Count
    num_groups: Count
    lr: Positive
    momentum: Probability = 0.0
    weight_decay: NonNegative = 0.0
    notion: Notion = "demographic parity"
    local_tolerance: NonNegative | None = None
    personalised: bool = True
    dual_step: Positive = 0.1
    bound: Positive = 5.0
    weight_rate: NonNegative = 0.3
    average: Count = 1

    @cached_property
    def optimiser(self) -> Optimiser:
        """The rule of a step."""
        return sgd(self.lr, self.momentum, self.weight_decay)

    @cached_property
    def events(self) -> Events:
        """What the constraints are about: V rates."""
        return events(self.notion, self.num_classes)

    def personal(self, rng: torch.Generator) -> Tree:
        """mu, phi and w, and what decided in the last rounds."""
        params = self.model.params
        like = next(iter(params.values()))
        kept: Tree = {
            "rounds": torch.zeros((), dtype=torch.int64),
            "dual": like.new_zeros((2, self.num_groups, len(self.events.classes))),
        }
        if self.personalised:
            kept |= {"own": params, "weight": like.new_full((), 0.5)}
        if self.average > 1:
            past = mixture({"params": params}, kept)
            kept["recent"] = tree.map(lambda leaf: leaf.new_zeros((self.average - 1, *leaf.shape)), past)
        return kept

    @property
    def expects(self) -> dict[str, str]:
        """What the bound on all clients costs."""
        return {"price": 'set strategy.use = "fedfact"'}

    def start(self, shared: Tree, personal: Tree, data: Batch) -> Tree:
        """Steps 1 to 4, on all examples."""
        mixed = mixture(shared, personal)
        outputs = {name: self.model.predict(params, data) for name, params in models(mixed).items()}  # (n, K) each
        labels = known(data, self.num_groups, self.num_classes, outputs["shared"].dtype)
        size = data["mask"].sum().clamp(min=1)
        taken, among = (part / size for part in count(self.events, labels, decide(outputs, mixed)))
        charged = shared["price"] + prices(personal["dual"][0] - personal["dual"][1], among)
        cost, scale = cost_matrix(self.events, charged, among)
        kept = {"rounds": personal["rounds"] + 1}
        if self.local_tolerance is not None:
            apart = deviations(taken, among)
            kept["dual"] = ascend(personal["dual"], apart, self.local_tolerance, self.dual_step, self.bound)
        if self.personalised:
            loss = {name: mean(cost_sensitive(each, data, cost), data["mask"]) for name, each in outputs.items()}
            odds = (1 - mixed["weight"]) / mixed["weight"]
            odds = odds * torch.exp(-self.weight_rate * (loss["own"] - loss["shared"]))
            kept["weight"] = (1 / (1 + odds)).clamp(1e-3, 1 - 1e-3)
        if self.average > 1:
            kept["recent"] = tree.map(lambda old, new: torch.cat([old[1:], new[None]]), personal["recent"], mixed)
        return {
            "models": models(mixed),
            "optimisers": {name: self.optimiser.init(params) for name, params in models(mixed).items()},
            "cost": cost / scale,
            "loss": torch.zeros((), dtype=torch.float64),
            "sent": {"taken": taken, "among": among},
            "kept": kept,
        }

    def step(self, state: Tree, batch: Batch) -> Tree:
        """Step 5: each model goes one step of its own."""

        def loss(params: Params) -> Tensor:
            return mean(cost_sensitive(self.model.outputs(params, batch), batch, state["cost"]), batch["mask"])

        trained, optimisers = {}, {}
        for name, params in state["models"].items():
            value, slope = gradient(loss, params)
            trained[name], optimisers[name] = self.optimiser.update(slope, state["optimisers"][name], params)
            if name == "shared":
                total = state["loss"] + value * batch["mask"].sum()
        return state | {"models": trained, "optimisers": optimisers, "loss": total}

    def finish(self, shared: Tree, state: Tree, data: Batch) -> Reply:
        """Step 6: theta and the two counts; the rest stays here."""
        kept = state["kept"] | ({"own": state["models"]["own"]} if self.personalised else {})
        examples = data["mask"].sum()
        loss = state["loss"] / (examples * self.epochs).clamp(min=1)
        update = {"params": state["models"]["shared"]} | state["sent"]
        return Reply(update, examples.to(loss.dtype), kept, {"loss": loss})


@dataclass(frozen=True)
class Ensemble(Classifier):
    """What FedFACT predicts: the class that a mixture of the server's model and the client's own likes most.

    Where clients keep what decided in the last rounds, one of these classifiers is drawn at random, this one included.
    """

    model: Model

    def __call__(self, shared: Tree, personal: Tree, batch: Batch) -> Tensor:
        """P(predicted | example), (B, K)."""

        def decision(mixed: Tree) -> Tensor:
            return decide({name: self.model.predict(params, batch) for name, params in models(mixed).items()}, mixed)

        latest = decision(mixture(shared, personal))
        if "recent" not in personal:
            return latest
        past = torch.func.vmap(decision)(personal["recent"])  # (H - 1, B, K), the latest last
        age = torch.arange(len(past), 0, -1)
        there = (age <= personal["rounds"]).to(past.dtype)
        drawn: Tensor = (torch.einsum("h,hbk->bk", there, past) + latest) / (there.sum() + 1)
        return drawn


def mixture(shared: Tree, personal: Tree) -> Tree:
    """The server's model, the client's own, which before its first round is a copy, and the weight of the former."""
    if "own" not in personal:
        return {"shared": shared["params"]}
    own = tree.where(personal["rounds"] > 0, personal["own"], shared["params"])
    return {"shared": shared["params"], "own": own, "weight": personal["weight"]}


def models(mixed: Tree) -> dict[str, Params]:
    """The models of a mixture, without their weight."""
    return {name: part for name, part in mixed.items() if name != "weight"}


def decide(outputs: dict[str, Tensor], mixed: Tree) -> Tensor:
    """The class that a mixture of models with these outputs likes most, one-hot, (B, K)."""
    scores = outputs["shared"].softmax(-1)
    if "own" in outputs:
        scores = mixed["weight"] * scores + (1 - mixed["weight"]) * outputs["own"].softmax(-1)
    return (scores.argmax(-1)[:, None] == torch.arange(scores.shape[-1])).to(scores.dtype)


def cost_matrix(found: Events, price: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """M + kappa, (G, K, K), all above zero, and 1 + K kappa, by which a loss is divided to stay at its size."""
    here = (among.sum(1) > 0)[:, None, None]  # a group that is not at the client needs no kappa
    reward = torch.eye(found.labels.shape[1], dtype=price.dtype) - torch.where(here, costs(found, price), 0)
    kappa = (1e-3 - reward.min()).clamp(min=0)
    return reward + kappa, 1 + found.labels.shape[1] * kappa


def cost_sensitive(outputs: Tensor, batch: Batch, cost: Tensor) -> Tensor:
    """- sum_i cost[a, y, i] log softmax_i(outputs) for each example, (B,)."""
    weight: Tensor = cost[batch["a"], batch["y"]]  # (B, K)
    return -(weight * outputs.log_softmax(-1)).sum(-1)
