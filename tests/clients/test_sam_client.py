"""SAM and ASAM: at radius zero plain gradients, else those at a known place, and a client made of either."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch

from clients.prox import Prox
from clients.sam import Sam, asam, sam
from clients.sgd import Sgd
from fedsim import tree
from fedsim.engines.local import Sequential, Vectorised
from fedsim.model import gradient
from fedsim.ranges import NonNegative
from fedsim.task import Cohort, Task
from fedsim.testing import check_client

SIZES = (0, 1, 7, 20, 33, 2)
ENGINES = [Sequential, Vectorised]
KINDS = {"sam": sam, "asam": asam, "asam, eta = 0": partial(asam, eta=0.0)}


@dataclass(frozen=True)
class SharpProx(Prox):
    """Prox on sharpness-aware gradients of all that it minimises: what a user would write."""

    rho: NonNegative = 0.05

    def step(self, state, batch):
        def slope(params):
            loss, gradient = self.model.gradient(params, batch)
            return loss, tree.map(lambda g, w, a: g + self.mu * (w - a), gradient, params, state["anchor"])

        loss, gradient = sam(slope, self.rho)(state["params"])
        params, _ = self.optimiser.update(gradient, {}, state["params"])
        return state | {"params": params, "loss": state["loss"] + loss * batch["mask"].sum()}


def train(model, federation, client, engine=Sequential, start=None):
    task = Task("train", {"params": start or model.params}, round=1)
    replies = engine(federation, {"train": client}).execute(task, Cohort(range(federation.num_clients)))
    assert not replies.failed
    return replies


def climb(kind, slope, params, rho):
    """(where the second gradient is taken, what is given)."""
    asked = []

    def listening(at):
        asked.append(at)
        return slope(at)

    given = kind(listening, rho)(params)
    assert len(asked) == 2 and asked[0] is params
    return asked[1], given


def sizes(kind, params):
    """What a parameter's distance is measured in: T_w."""
    eta = {"sam": None, "asam": 0.01, "asam, eta = 0": 0.0}[kind]
    return tree.map(lambda w: torch.ones_like(w) if eta is None else w.abs() + eta, params)


def dot(one, other):
    return float(sum((a * b).sum() for a, b in zip(tree.leaves(one), tree.leaves(other), strict=True)))


@pytest.fixture
def point(classification):
    """The gradient function of a perceptron on a batch, and its parameters, in float64."""
    model, federation = classification(SIZES, torch.float64)
    batch = {name: column[:20] for name, column in federation.columns.items()} | {"mask": torch.arange(20) < 17}
    return partial(model.gradient, batch=batch), model.params


@pytest.fixture
def rectifier():
    """(loss, gradient function, parameters) of a perceptron with ReLUs, whose neurons may be rescaled at no loss."""
    generator = torch.Generator().manual_seed(1)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    x, y = draw(30, 4), draw(30)
    params = {"into": draw(6, 4), "bias": draw(6), "out": draw(6)}

    def loss(w):
        return ((x @ w["into"].T + w["bias"]).relu() @ w["out"] - y).square().mean()

    return loss, partial(gradient, loss), params


# The transformations


@pytest.mark.parametrize("rho", [1e-6, 0.05, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_taken_at_a_distance_of_rho_in_the_direction_of_steepest_ascent(point, kind, rho):
    slope, params = point
    before = tree.clone(params)
    climbed, (loss, sharp) = climb(KINDS[kind], slope, params, rho)
    moved = tree.map(torch.sub, climbed, params)
    measured = tree.map(torch.div, moved, sizes(kind, params))  # eps / T_w
    assert float(tree.norm(measured)) == pytest.approx(rho, rel=1e-8)
    plain_loss, plain = slope(params)
    scaled = tree.map(torch.mul, plain, sizes(kind, params))
    # <g, eps> = <T_w g, eps / T_w>, at most |T_w g| rho: no other perturbation of this size climbs more at first.
    assert dot(plain, moved) == pytest.approx(rho * float(tree.norm(scaled)), rel=1e-8)
    assert torch.equal(loss, plain_loss) and loss < slope(climbed)[0]
    assert all(torch.equal(leaf, sharp[name]) for name, leaf in slope(climbed)[1].items())
    assert all(torch.equal(leaf, params[name]) for name, leaf in before.items())
    if kind != "sam":  # measured as the other one does, it went another way
        assert abs(float(tree.norm(moved)) / rho - 1) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_to_first_order_it_adds_the_curvature_in_the_direction_that_is_climbed(point, kind):
    slope, params = point
    plain, size = slope(params)[1], sizes(kind, params)
    norm = tree.norm(tree.map(torch.mul, size, plain))
    ascent = tree.map(lambda g, t: t * t * g / norm, plain, size)  # for SAM g / |g|
    ahead, behind = (slope(tree.map(lambda w, d, h=h: w + h * d, params, ascent))[1] for h in (1e-5, -1e-5))
    curved = tree.map(lambda a, b: (a - b) / 2e-5, ahead, behind)  # H ascent, with an error of 1e-10
    errors = []
    for rho in (1e-2, 1e-3, 1e-4):
        sharp = KINDS[kind](slope, rho)(params)[1]
        error = tree.map(lambda s, g, c, rho=rho: (s - g) / rho - c, sharp, plain, curved)
        errors.append(float(tree.norm(error) / tree.norm(curved)))
    assert errors[2] < 1e-3
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.01)


def rescaled(params, by):
    """The same function: what goes into a neuron is multiplied by a number, what comes out divided."""
    return {"into": params["into"] * by[:, None], "bias": params["bias"] * by, "out": params["out"] / by}


@pytest.mark.parametrize(("kind", "invariant"), [("asam, eta = 0", True), ("sam", False), ("asam", False)])
def test_only_asam_climbs_to_the_same_function_whatever_the_scale_of_the_neurons(rectifier, kind, invariant):
    loss, slope, params = rectifier
    by = torch.tensor([0.01, 0.3, 1.0, 2.0, 5.0, 30.0]).double()
    torch.testing.assert_close(loss(rescaled(params, by)), loss(params), rtol=1e-12, atol=0)
    here, (_, sharp) = climb(KINDS[kind], slope, params, 0.5)
    there, (_, other) = climb(KINDS[kind], slope, rescaled(params, by), 0.5)
    # L(A w) = L(w), so gradients are those divided by A, and eps(A w) = A eps(w).
    same_place = all(torch.allclose(there[name], leaf, rtol=1e-10) for name, leaf in rescaled(here, by).items())
    same_loss = torch.allclose(loss(there), loss(here), rtol=1e-10)
    same_slope = all(torch.allclose(leaf, sharp[name], rtol=1e-9) for name, leaf in rescaled(other, by).items())
    assert (same_place, same_loss, same_slope) == (invariant, invariant, invariant)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_without_a_gradient_it_is_the_plain_one_and_a_small_one_has_a_direction_too(kind, dtype):
    curvature, optimum = torch.tensor([2.0, 5.0], dtype=dtype), torch.tensor([1.0, 0.0], dtype=dtype)
    away = torch.tensor([[0.0, 0.0], [1e-30, 0.0], [0.5, -0.5]], dtype=dtype)  # from the optimum, of three clients

    def slope(params):
        return (curvature * params["away"].square()).sum() / 2, {"away": curvature * params["away"]}

    def shifted(params):
        loss, slopes = slope({"away": params["w"] - optimum})
        return loss, {"w": slopes["away"]}

    still = KINDS[kind](shifted, 0.25)({"w": optimum})
    assert still[0] == 0 and torch.equal(still[1]["w"], torch.zeros(2, dtype=dtype))
    together = torch.func.vmap(KINDS[kind](slope, 0.25))({"away": away})
    assert torch.equal(together[1]["away"][0], torch.zeros(2, dtype=dtype))
    for client, row in enumerate(away):
        _, alone = KINDS[kind](slope, 0.25)({"away": row})
        torch.testing.assert_close(together[1]["away"][client], alone["away"])
        assert alone["away"].dtype == dtype and alone["away"].isfinite().all()
    if kind == "sam":
        torch.testing.assert_close(together[1]["away"][1], torch.tensor([2.0 * 0.25, 0.0], dtype=dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_may_be_a_tree(point, kind):
    slope, params = point

    def nested(held):
        loss, slopes = slope(held["first"] | held["second"])
        return loss, {part: {name: slopes[name] for name in held[part]} for part in held}

    names = sorted(params)
    held = {"first": {name: params[name] for name in names[:2]}, "second": {name: params[name] for name in names[2:]}}
    parts = KINDS[kind](nested, 0.3)(held)[1]
    for name, leaf in KINDS[kind](slope, 0.3)(params)[1].items():
        torch.testing.assert_close((parts["first"] | parts["second"])[name], leaf, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("settings", [{"rho": -1.0}, {"rho": 1.0, "eta": -0.5}])
def test_a_radius_or_a_size_below_zero_is_refused_by_name(point, settings):
    name, value = list(settings.items())[-1]
    with pytest.raises(ValueError, match=f"{name} must be >= 0, got {value}"):
        asam(point[0], **settings)
    with pytest.raises(ValueError, match=f"{name} must be >= 0, got {value}"):
        Sam(model=None, lr=0.1, **settings)


# The client


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("adaptive", [False, True])
def test_without_rho_it_is_sgd_to_the_bit(classification, engine, adaptive):
    model, federation = classification(SIZES)
    settings = {"model": model, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "epochs": 2, "batch_size": 8}
    plain = train(model, federation, Sgd(**settings), engine)
    found = train(model, federation, Sam(rho=0.0, adaptive=adaptive, **settings), engine)
    assert all(torch.equal(leaf, found.update["params"][name]) for name, leaf in plain.update["params"].items())
    assert torch.equal(found.metrics["loss"], plain.metrics["loss"]) and torch.equal(found.weight, plain.weight)
    sharp = train(model, federation, Sam(rho=0.5, adaptive=adaptive, **settings), engine)
    assert not torch.equal(sharp.update["params"]["0.weight"], plain.update["params"]["0.weight"])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_on_a_quadratic_it_follows_the_closed_form(quadratics, engine, steps):
    h, o = torch.tensor([[1.0], [2.0]]).double(), torch.tensor([[1.0], [0.5]]).double()
    model, federation = quadratics(h, o)
    start, rho, eta, lr = torch.tensor([[4.0]]).double(), 0.3, 0.2, 0.1
    # In one dimension, above zero and the optimum, the gradient is taken at w + rho, or at w + rho (w + eta).
    for adaptive, slope, rest in ((False, h, o - rho), (True, h * (1 + rho), (o - rho * eta) / (1 + rho))):
        client = Sam(model=model, lr=lr, rho=rho, adaptive=adaptive, eta=eta, epochs=steps, batch_size=1)
        found = train(model, federation, client, engine, {"weight": start}).update["params"]["weight"][:, 0]
        expected = rest + (1 - lr * slope) ** steps * (start - rest)
        assert (expected > o).all()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("adaptive", [False, True])
def test_in_more_dimensions_the_distance_is_shared_among_them(quadratics, engine, adaptive):
    h, o = torch.tensor([[1.0, 4.0], [2.0, 0.5]]).double(), torch.tensor([[2.0, -3.0], [-1.0, 1.0]]).double()
    model, federation = quadratics(h, o)
    w, rho, lr = torch.tensor([[0.5, 1.0]]).double(), 0.3, 0.1
    client = Sam(model=model, lr=lr, rho=rho, adaptive=adaptive, eta=0.0, weight_decay=0.2, batch_size=2)
    replies = train(model, federation, client, engine, {"weight": w})
    plain, size = h * (w - o), w.abs() if adaptive else torch.ones(1, 2).double()
    moved = rho * size**2 * plain / (size * plain).square().sum(1, keepdim=True).sqrt()
    found = replies.update["params"]["weight"][:, 0]
    torch.testing.assert_close(found, w - lr * (h * (w + moved - o) + 0.2 * w), rtol=1e-12, atol=1e-14)
    # What it tells is the loss of the model, not of the one that was climbed to.
    torch.testing.assert_close(replies.metrics["loss"], (h * (w - o) ** 2 / 2).sum(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("adaptive", [False, True])
def test_who_stands_at_the_optimum_stays_there_while_others_move(quadratics, engine, adaptive):
    o = torch.tensor([[0.0, 0.0], [2.0, -3.0]]).double()
    model, federation = quadratics(torch.ones(2, 2), o)
    client = Sam(model=model, lr=0.1, rho=0.5, adaptive=adaptive, epochs=3, batch_size=2)
    found = train(model, federation, client, engine).update["params"]["weight"][:, 0]
    assert torch.equal(found[0], o[0])
    assert ((found[1] - o[1]).abs() < o[1].abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_clients_keep_the_promises_and_answer_together_what_they_answer_alone(classification, dtype):
    model, federation = classification(SIZES, dtype)
    settings = {"model": model, "lr": 0.2, "epochs": 2, "batch_size": 8}
    for client in (
        Sam(rho=0.2, momentum=0.5, weight_decay=0.01, **settings),
        Sam(rho=0.5, adaptive=True, **settings),
        Sam(rho=0.5, adaptive=True, eta=0.0, **settings),
        SharpProx(mu=0.5, rho=0.2, **settings),
    ):
        check_client(client, {"params": model.params}, federation)
        alone, together = (train(model, federation, client, engine).update["params"] for engine in ENGINES)
        for name, leaf in alone.items():
            torch.testing.assert_close(together[name], leaf, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-10)


def test_a_model_that_draws_is_trained_the_same_way_twice(classification):
    model, federation = classification(SIZES, dropout=0.5)
    client = Sam(model=model, lr=0.1, rho=0.1, batch_size=8)
    assert client.stochastic
    for engine in ENGINES:
        leaves = [train(model, federation, client, engine).update["params"]["0.weight"] for _ in range(2)]
        assert torch.equal(*leaves) and leaves[0].isfinite().all()


# Another client out of the same


@pytest.mark.parametrize("engine", ENGINES)
def test_a_sharp_prox_is_prox_without_rho_and_sam_without_mu(classification, engine):
    model, federation = classification(SIZES)
    settings = {"model": model, "lr": 0.1, "epochs": 2, "batch_size": 8}
    for one, other in (
        (SharpProx(mu=0.5, rho=0.0, **settings), Prox(mu=0.5, **settings)),
        (SharpProx(mu=0.0, rho=0.3, **settings), Sam(rho=0.3, **settings)),
    ):
        found, expected = (train(model, federation, client, engine).update["params"] for client in (one, other))
        for name, leaf in expected.items():
            torch.testing.assert_close(found[name], leaf, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_sharp_prox_on_a_quadratic_follows_the_closed_form(quadratics, engine):
    h, o = torch.tensor([[1.0], [2.0]]).double(), torch.tensor([[1.0], [-0.5]]).double()
    model, federation = quadratics(h, o)
    anchor, mu, rho, lr = torch.tensor([[4.0]]).double(), 1.5, 0.3, 0.1
    client = SharpProx(model=model, lr=lr, mu=mu, rho=rho, epochs=5, batch_size=1)
    found = train(model, federation, client, engine, {"weight": anchor}).update["params"]["weight"][:, 0]
    rest = (h * o + mu * anchor) / (h + mu) - rho  # where the gradient at w + rho is zero
    expected = rest + (1 - lr * (h + mu)) ** 5 * (anchor - rest)
    assert (expected > rest + rho).all()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
