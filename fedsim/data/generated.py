"""Generated data of which the truth is known: joint distributions as tables, and samples of any size.

A joint distribution is an array P(client, group, x, label) of shape (N, G, X, K) that sums to 1.
"""

from dataclasses import replace
from typing import Annotated

import numpy as np
import torch
from annotated_types import Interval
from numpy.typing import NDArray

from fedsim.data.dataset import Dataset
from fedsim.randomness import rng
from fedsim.ranges import Count, Natural, NonNegative, checked

Floats = NDArray[np.float64]


@checked
def gaussians(
    examples: Count = 10_000,
    classes: Count = 10,
    features: Count = 20,
    separation: NonNegative = 4.0,
    test: Annotated[float, Interval(ge=0, lt=1)] = 0.2,
    seed: Natural = 0,
) -> Dataset:
    """Classes that are Gaussian clouds with standard deviation 1: "x" (E, F), "y".

    Args:
        examples: how many, those of the common test set included.
        classes: equally likely.
        features: F.
        separation: the root mean square distance between the centres of two classes.
        test: the share of the examples in the common test set.
        seed: of centres and examples.
    """
    random = rng(seed, "gaussians")
    centres = random.standard_normal((classes, features))
    centres *= separation / np.sqrt(2) / np.linalg.norm(centres, axis=1, keepdims=True)
    y = random.integers(classes, size=examples)
    x = random.standard_normal((examples, features), dtype=np.float32)
    for start in range(0, examples, 2**20):  # in pieces, so that no second table as large as x is needed
        x[start : start + 2**20] += centres.astype(np.float32)[y[start : start + 2**20]]
    columns = {"x": torch.from_numpy(x), "y": torch.from_numpy(y)}
    cut = examples - round(test * examples)
    return Dataset(
        "gaussians",
        {name: column[:cut] for name, column in columns.items()},
        {name: column[cut:] for name, column in columns.items()} if cut < examples else {},
        {"y": tuple(str(label) for label in range(classes))},
    )


@checked
def gaussian_task(examples: Count = 9000, seed: Natural = 0, shift: float = 1.0) -> Dataset:
    """Three clients, two groups and three classes in the plane: "x" (E, 2), "y", "a", "client".

    Clients differ in how large the groups are and in P(y | client, group); `shift` moves the groups apart.
    """
    p_client_group = np.array([[0.22, 0.10], [0.12, 0.22], [0.17, 0.17]])
    p_label = np.array(
        [
            [[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]],
            [[0.45, 0.35, 0.2], [0.25, 0.3, 0.45]],
            [[0.4, 0.35, 0.25], [0.2, 0.45, 0.35]],
        ]
    )
    class_mean = np.array([[-1.2, 0.0], [0.0, 1.2], [1.2, 0.0]])
    group_shift = shift * np.array([[0.3, 0.2], [-0.3, -0.1]])
    random = np.random.default_rng(seed)
    cell = random.choice(6, size=examples, p=p_client_group.ravel())
    client, a = cell // 2, cell % 2
    y = (random.random(examples)[:, None] > p_label[client, a].cumsum(1)).sum(1).clip(0, 2)
    x = class_mean[y] + group_shift[a] + 0.9 * random.normal(size=(examples, 2))
    return _dataset("gaussian_task", x, y, a, client)


@checked
def group_shift(examples: Count = 8000, test: Natural = 20_000, seed: Natural = 0) -> Dataset:
    """Two groups of different size, base rate and place in space; two classes: "x" (E, 4), "y", "a".

    The fourth feature is noise, the third tells the group and nothing else. The common test set is the same for all
    seeds.
    """
    sets = [_shifted(number, chosen) for number, chosen in ((examples, seed), (test, 100))]
    return Dataset("group_shift", sets[0], sets[1] if test else {}, {"y": ("0", "1"), "a": ("0", "1")})


def _shifted(examples: int, seed: int) -> dict[str, torch.Tensor]:
    random = np.random.default_rng(seed)
    a = (random.random(examples) < 0.35).astype(np.int64)
    y = (random.random(examples) < np.where(a == 1, 0.35, 0.6)).astype(np.int64)
    centre = _shifted_centres()[a, y]
    # One feature after the other, so that a seed is the same data as where the figures of the experiments come from.
    x = np.stack([centre[:, feature] + random.normal(size=examples) for feature in range(4)], axis=1)
    return {"x": torch.from_numpy(x.astype(np.float32)), "y": torch.from_numpy(y), "a": torch.from_numpy(a)}


def _shifted_centres() -> Floats:
    """The mean of x by group and label, (2, 2, 4)."""
    side, sign = np.array([1.0, -1.0])[:, None], np.array([-1.0, 1.0])
    still = np.zeros((2, 2))
    return np.stack([1.1 * sign + 0.5 * side, 0.8 * sign + still, 0.9 * side + still, still], axis=-1)


def group_shift_posterior(x: Floats) -> Floats:
    """P(group, label | x) in `group_shift`, (n, 2, 2), for x (n, 4)."""
    prior = np.array([0.65, 0.35])[:, None] * np.array([[0.4, 0.6], [0.65, 0.35]])
    distance = np.square(x[:, None, None] - _shifted_centres()).sum(-1)
    joint = prior * np.exp(-distance / 2)
    return np.asarray(joint / joint.sum((1, 2), keepdims=True))


def canonical_table() -> Floats:
    """A joint distribution of two clients, two groups, four x and three labels in multiples of 1/4000, (2, 2, 4, 3)."""
    p_client_group = np.array([[6, 4], [3, 7]])  # of 20
    p_x = np.array([[[4, 3, 2, 1], [1, 2, 3, 4]], [[5, 2, 2, 1], [1, 1, 3, 5]]])  # of 10
    p_label = np.array([[14, 4, 2], [8, 8, 4], [4, 10, 6], [2, 4, 14]])  # of 20
    tilt = np.array([[1, -1], [2, -2]])[..., None, None] * np.array([1, 0, -1])  # of 20: (client, group, 1, label)
    counts = p_client_group[..., None, None] * p_x[..., None] * (p_label + tilt)
    return np.asarray(counts / 4000)


@checked
def canonical_joint(copies: Count = 1, cells: bool = False) -> Dataset:
    """`canonical_table` as 4000 * `copies` examples that have exactly its frequencies; "x" (E, 4) is one-hot.

    With `cells`, "x" (E, 16) is one-hot of client, group and x together: even a linear model can then be the best one.
    """
    counts = np.rint(canonical_table() * 4000).astype(np.int64)
    client, a, x, y = np.repeat(np.indices(counts.shape).reshape(4, -1), copies * counts.ravel(), axis=1)
    features = np.eye(16)[(client * 2 + a) * 4 + x] if cells else np.eye(4)[x]
    dataset = _dataset("canonical_joint", features, y, a, client)
    return replace(dataset, names={"y": ("0", "1", "2"), "a": ("0", "1")})


@checked
def random_joint(clients: Count, groups: Count, values: Count, classes: Count, seed: Natural) -> Floats:
    """A joint distribution drawn at random, (N, G, X, K)."""
    random = np.random.default_rng(seed)
    p_client_group = random.dirichlet(np.ones(clients * groups) * 3).reshape(clients, groups)
    common_x = random.dirichlet(np.ones(values) * 0.6, size=groups)
    own_x = random.dirichlet(np.ones(values) * 0.6, size=(clients, groups))
    common_label = random.dirichlet(np.ones(classes) * 0.7, size=values)
    own_label = random.dirichlet(np.ones(classes), size=(clients, groups, values))
    p_x = 0.5 * common_x + 0.5 * own_x
    p_label = 0.7 * common_label + 0.3 * own_label
    joint = np.maximum(p_client_group[..., None, None] * p_x[..., None] * p_label, 1e-9)
    return np.asarray(joint / joint.sum())


@checked
def latent_factor_ratings(users: Count = 300, items: Count = 400, factors: Count = 8, seed: Natural = 0) -> Dataset:
    """Users who choose 8 to 41 items each, by taste and popularity: "user", "item", "rating" (always 1), "time".

    Taste is the inner product of latent factors. A user's times are 0, 1, ... in random order of the items.
    """
    random = np.random.default_rng(seed)
    taste = random.normal(size=(users, factors))
    appeal = random.normal(size=(items, factors))
    popularity = random.normal(size=items) * 0.8
    chosen = []
    for user in range(users):
        score = 1.5 * taste[user] @ appeal.T + popularity + random.gumbel(size=items)
        top = np.argsort(-score)[: int(random.integers(8, 42))]
        random.shuffle(top)
        chosen.append(top)
    sizes = [len(top) for top in chosen]
    columns = {
        "user": torch.from_numpy(np.repeat(np.arange(users), sizes)),
        "item": torch.from_numpy(np.concatenate(chosen)),
        "rating": torch.ones(sum(sizes)),
        "time": torch.from_numpy(np.concatenate([np.arange(size) for size in sizes])),
    }
    return Dataset("latent_factor_ratings", columns, names={"item": tuple(str(item) for item in range(items))})


def _dataset(name: str, x: Floats, y: NDArray[np.int64], a: NDArray[np.int64], client: NDArray[np.int64]) -> Dataset:
    columns = {"x": x.astype(np.float32), "y": y, "a": a, "client": client}
    return Dataset(name, {column: torch.from_numpy(np.ascontiguousarray(values)) for column, values in columns.items()})
