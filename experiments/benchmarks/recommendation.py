"""What a round of FedRecGEL costs on MovieLens-100K, beside a plain PyTorch loop over the users.

94 of 943 users, both radii 0.02. The plain loop is what one writes first: each user gets a copy of the whole model with
both tables, draws its negatives by numpy, calls backward three times over pieces of 128 rows, and its dense gradients
are added up. Before anything is timed both are told the same rows, in float64: their mean gradients must be equal to
1e-9 of the largest number, or the benchmark is void. Prints CPU time of whole rounds, drawing and the server's step
included, taken in turns.
"""

import copy
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from clients.fedrecgel import DualSam
from clients.ncf import OWN, scorer
from experiments.benchmarks.measuring import spread
from fedsim import tree
from fedsim.data.datasets import movielens_100k
from fedsim.data.federation import Federation
from fedsim.data.partition import by_column
from fedsim.engines.local import auto
from fedsim.engines.sequential import prepare
from fedsim.ranking import leave_one_out
from fedsim.sampling import uniform
from fedsim.simulation import begin, rounds
from fedsim.task import Cohort, Params, Task
from strategies.fedrecgel import FedRecGel

RHO, FRACTION, NEGATIVES, PIECE, REPEATS = 0.02, 0.1, 4, 128, 7
EPSILON = 1e-12

Loss = Callable[[nn.Module], Tensor]


class PlainNcf(nn.Module):
    """Neural collaborative filtering as one would write it for one user."""

    def __init__(self, items: int, dim: int = 32, layers: int = 3) -> None:
        super().__init__()
        wide = dim * 2 ** (layers - 1)
        self.user_gmf, self.user_mlp = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(wide))
        self.item_gmf, self.item_mlp = nn.Embedding(items, dim), nn.Embedding(items, wide)
        self.mlp = nn.ModuleList(nn.Linear(2 * wide // 2**layer, wide // 2**layer) for layer in range(layers))
        self.predict = nn.Linear(2 * dim, 1)

    def forward(self, items: Tensor) -> Tensor:
        wide = self.item_mlp(items)
        hidden = torch.cat([self.user_mlp.expand_as(wide), wide], -1)
        for layer in self.mlp:
            hidden = layer(hidden).relu()
        return self.predict(torch.cat([self.user_gmf * self.item_gmf(items), hidden], -1))[:, 0]


def load(server: PlainNcf, params: Params) -> None:
    """Takes over fedsim's parameters, whose tables are called otherwise."""
    own = {name if name in params else name.removesuffix(".weight"): leaf for name, leaf in server.named_parameters()}
    with torch.no_grad():
        for name, leaf in params.items():
            own[name].copy_(leaf)


def slopes(model: PlainNcf, loss: Loss) -> dict[str, Tensor]:
    """The dense gradients of all parameters."""
    model.zero_grad()
    loss(model).backward()
    return {name: leaf.grad.clone() for name, leaf in model.named_parameters() if leaf.grad is not None}


def user(server: PlainNcf, own: Params, loss: Loss) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What one user sends and what it moves its embedding by: a copy of all, and three backward passes."""
    model = copy.deepcopy(server)
    parts = dict(model.named_parameters())
    with torch.no_grad():
        for name, leaf in own.items():
            parts[name].copy_(leaf)
    plain = slopes(model, loss)
    found = {}
    for mine in (False, True):
        block = {name: slope for name, slope in plain.items() if name.startswith(OWN) == mine}
        factor = RHO / (torch.sqrt(sum((slope**2).sum() for slope in block.values())) + EPSILON)  # type: ignore[arg-type]
        with torch.no_grad():
            for name, slope in block.items():
                parts[name].add_(factor * slope)
        after = slopes(model, loss)
        found[mine] = {name: after[name] for name in block}
        with torch.no_grad():
            for name, slope in block.items():
                parts[name].sub_(factor * slope)
    return found[False], found[True]


def pieces(items: Tensor, y: Tensor) -> Loss:
    """The sum of the pieces' mean losses."""

    def loss(model: nn.Module) -> Tensor:
        each = zip(items.split(PIECE), y.split(PIECE), strict=True)
        return torch.stack([binary_cross_entropy_with_logits(model(rows), labels) for rows, labels in each]).sum()

    return loss


class Plain:
    """The plain loop's rounds."""

    def __init__(self, data: Federation, model: Params, own: Params) -> None:
        self.data, self.items, self.rng = data, len(data.names["item"]), np.random.default_rng(0)
        self.server = PlainNcf(self.items)
        load(self.server, {name: leaf for name, leaf in model.items() if not name.startswith(OWN)})
        shared = [leaf for name, leaf in self.server.named_parameters() if not name.startswith(OWN)]
        self.step = torch.optim.Adam(shared, lr=0.001)
        self.own = {name: nn.Parameter(leaf.clone()) for name, leaf in own.items()}  # (N, ...)
        self.steps: dict[int, torch.optim.Adam] = {}
        self.mine: dict[int, Params] = {}

    def draw(self, ident: int) -> Loss:
        """This round's rows of a user."""
        has = self.data.examples(ident)["item"].numpy()
        others = np.setdiff1d(np.arange(self.items), has)
        rows = [[item, *self.rng.choice(others, NEGATIVES, replace=False)] for item in self.rng.permutation(has)]
        y = torch.zeros(len(has), 1 + NEGATIVES)
        y[:, 0] = 1
        return pieces(torch.tensor(np.array(rows)).flatten(), y.flatten())

    def round(self, ids: list[int]) -> None:
        """One round."""
        total: dict[str, Tensor] = {}
        for ident in ids:
            if ident not in self.mine:
                self.mine[ident] = {name: nn.Parameter(leaf[ident].clone()) for name, leaf in self.own.items()}
                self.steps[ident] = torch.optim.Adam(self.mine[ident].values(), lr=0.1)
            sent, moved = user(self.server, self.mine[ident], self.draw(ident))
            total = {name: total.get(name, 0) + leaf for name, leaf in sent.items()}
            for name, leaf in self.mine[ident].items():
                leaf.grad = moved[name]
            self.steps[ident].step()
        for name, leaf in self.server.named_parameters():
            if name in total:
                leaf.grad = total[name] / len(ids)
        self.step.step()


def check(data: Federation, ids: list[int]) -> float:
    """The largest difference of the two mean gradients on the same rows, as a part of the largest number."""
    model = scorer(len(data.names["item"]))
    model.module.double()
    clients = {"train": DualSam(model=model, lr=0.1, rho_shared=RHO, rho_own=RHO)}
    engine = auto(data, clients, 1)
    snapshot = begin(FedRecGel(), model.params, clients, data.num_clients, 1)
    server = PlainNcf(len(data.names["item"])).double()
    load(server, snapshot.state["params"])
    task = Task("train", {"params": snapshot.state["params"]}, ids, 1, "mean")
    kept = snapshot.personal.gather(ids)
    found = engine.execute(task, Cohort(ids, kept)).update["params"]
    expected: dict[str, Tensor] = {}
    for place, ident in enumerate(ids):
        rows = prepare(engine, task, ident)

        def loss(model: nn.Module, rows: Params = rows) -> Tensor:
            each = binary_cross_entropy_with_logits(model(rows["item"]), rows["y"].double(), reduction="none")
            return (rows["weight"] * each).sum()

        sent, _ = user(server, tree.take(kept["own"], place), loss)
        expected = {name: expected.get(name, 0) + leaf / len(ids) for name, leaf in sent.items()}
    far = 0.0
    for name, leaf in expected.items():
        mine = found[name] if name in found else found[name.removesuffix(".weight")]
        mine = mine.dense() if isinstance(mine, tree.Rows) else mine
        far = max(far, float((mine - leaf).abs().max() / leaf.abs().max()))
    return far


def main() -> None:
    """Measures and prints, on one thread."""
    torch.set_num_threads(1)
    dataset = movielens_100k()
    data = leave_one_out(dataset, by_column(dataset.columns, column="user"))
    model = scorer(len(data.names["item"]))
    clients = {"train": DualSam(model=model, lr=0.1, rho_shared=RHO, rho_own=RHO)}
    strategy, engine = FedRecGel(), auto(data, clients, 1)
    snapshot = begin(strategy, model.params, clients, data.num_clients, 1)
    sample = uniform(data.num_clients, 1, fraction=FRACTION)
    plain = Plain(data, model.params, snapshot.personal.gather(range(data.num_clients))["own"])
    if (far := check(data, list(sample(1).ids))) > 1e-9:
        raise RuntimeError(f"the mean gradients differ by {far:.1e} of the largest number: void")
    times: dict[str, list[float]] = {"plain": [], "fedsim": []}
    run = rounds(strategy, engine, sample, snapshot)
    for number in range(1, REPEATS + 2):
        start = time.process_time()
        next(run)
        middle = time.process_time()
        plain.round(list(sample(number).ids))
        end = time.process_time()
        if number > 1:  # the first warms up
            times["fedsim"].append(middle - start)
            times["plain"].append(end - middle)
    ratios = [slow / fast for fast, slow in zip(times["fedsim"], times["plain"], strict=True)]
    print(f"mean gradients equal to {far:.1e} of the largest number")
    for name, values in times.items():
        print(f"{name:<7} {statistics.median(values) * 1000:.0f} ms a round")
    print(f"plain / fedsim: {spread(ratios)}")


if __name__ == "__main__":
    main()
