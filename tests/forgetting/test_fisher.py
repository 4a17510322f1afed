"""Fisher information in closed form, over clients as over all examples, and the pull that it gives."""

import pytest
import torch
from torch import nn

from fedsim import tree
from fedsim.forgetting import Evidence, empirical_fisher, fisher, importance, pulled, true_fisher
from fedsim.model import Model


@pytest.fixture
def setting():
    """A softmax-linear model in float64, its parameters, and some examples."""
    torch.manual_seed(0)
    model = Model(nn.Linear(5, 3, dtype=torch.float64))
    x, y = torch.randn(40, 5, dtype=torch.float64), torch.randint(3, (40,))
    return model, model.params, x, y


def test_the_true_one_is_what_a_linear_model_has_in_closed_form(setting):
    model, params, x, _ = setting
    p = model.predict(params, {"x": x}).softmax(1)
    found = true_fisher(model, params, x)
    variance = p - p**2  # (diag p - p p^T)_yy
    torch.testing.assert_close(found.mean["weight"], variance.T @ x.square() / len(x), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.mean["bias"], variance.mean(0), rtol=1e-6, atol=0)
    assert all((leaf >= 0).all() for leaf in found.sums.values()) and found.examples == 40


def test_the_empirical_one_has_the_squares_at_the_labels(setting):
    model, params, x, y = setting
    p = model.predict(params, {"x": x}).softmax(1)
    slope = nn.functional.one_hot(y, 3) - p  # of log p_y by the logits
    found = empirical_fisher(model, params, x, y)
    torch.testing.assert_close(found.sums["weight"], slope.square().T @ x.square(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("at_once", [1, 100, 2**24])
def test_clients_together_have_what_all_examples_have(setting, at_once, monkeypatch):
    monkeypatch.setattr(fisher, "AT_ONCE", at_once)
    model, params, x, y = setting
    for whole, parts in (
        (true_fisher(model, params, x), [true_fisher(model, params, part) for part in (x[:7], x[7:8], x[8:])]),
        (
            empirical_fisher(model, params, x, y),
            [empirical_fisher(model, params, x[part], y[part]) for part in (slice(0, 7), slice(7, 40))],
        ),
    ):
        total = parts[0]
        for part in parts[1:]:
            total = total.plus(part)
        assert total.examples == whole.examples
        for name, leaf in whole.mean.items():
            torch.testing.assert_close(total.mean[name], leaf, rtol=1e-9, atol=1e-15)


def test_padding_counts_nowhere(setting):
    model, params, x, y = setting
    mask = torch.arange(40) < 25
    for masked, plain in (
        (true_fisher(model, params, x, mask), true_fisher(model, params, x[:25])),
        (empirical_fisher(model, params, x, y, mask), empirical_fisher(model, params, x[:25], y[:25])),
    ):
        assert masked.examples == 25
        for name, leaf in plain.sums.items():
            torch.testing.assert_close(masked.sums[name], leaf, rtol=1e-9, atol=1e-12)


def test_what_matters_for_the_forgotten_alone_is_free():
    def told(values):
        return Evidence({"w": torch.tensor(values, dtype=torch.float64)}, torch.tensor(2.0, dtype=torch.float64))

    # Of what is forgotten the true sums and the empirical ones are (0, 6, 1) and (0, 2, 1), over two examples.
    omega = importance(told([4.0, 0.0, 2.0]), told([0.0, 8.0, 2.0]))["w"]
    ratio = torch.tensor([2 / (2 + 1e-8), 0, 1 / (1 + 0.5 + 0.5 + 1e-8)], dtype=torch.float64)
    torch.testing.assert_close(omega, ratio / ratio.mean(), rtol=1e-9, atol=0)
    assert omega.mean() == pytest.approx(1) and omega[1] == 0
    nobody = Evidence({"w": torch.zeros(3, dtype=torch.float64)}, torch.zeros((), dtype=torch.float64))
    assert not importance(nobody, nobody)["w"].isnan().any()


def test_a_strength_of_zero_pulls_nowhere_and_an_enormous_one_all_the_way_back():
    before = {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    after, omega = tree.map(lambda leaf: leaf + 0.5, before), {"w": torch.tensor([1.0, 3.0], dtype=torch.float64)}
    assert torch.equal(pulled(after, before, omega, 0.1, 0.0)["w"], after["w"])
    torch.testing.assert_close(pulled(after, before, omega, 0.1, 1e15)["w"], before["w"], rtol=0, atol=1e-12)
    # The implicit step solves theta = theta_0 - lr strength omega (theta - theta*).
    solved = pulled(after, before, omega, 0.1, 7.0)["w"]
    torch.testing.assert_close(solved, after["w"] - 0.1 * 7.0 * omega["w"] * (solved - before["w"]))
