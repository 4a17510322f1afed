"""Networks have the sizes that their federation asks for, and parameters that their seed decides."""

import numpy as np
import pytest
import torch
from torch import nn

from fedsim.data.federation import Federation
from fedsim.networks import cnn, logistic, mlp, seeded

CLASSES = ("a", "b", "c", "d")


def federation(*shape, names=None):
    columns = {"x": torch.randn(6, *shape), "y": torch.arange(6) % 4}
    names = {"y": CLASSES} if names is None else names
    return Federation(columns, np.arange(6), np.array([[0, 6, 6, 6]]), names=names, name="toy")


def count(model):
    return sum(leaf.numel() for leaf in model.params.values())


@pytest.mark.parametrize("shape", [(5,), (1, 8, 8), (3, 4)])
def test_logistic_regression_starts_at_zero_so_every_class_is_as_likely(shape):
    data = federation(*shape)
    model = logistic(data)
    assert count(model) == (np.prod(shape) + 1) * len(CLASSES)
    outputs = model.predict(model.params, data.columns)
    assert torch.equal(outputs, torch.zeros(6, len(CLASSES)))
    loss = model.loss(model.params, data.columns | {"mask": torch.ones(6, dtype=torch.bool)})
    assert float(loss) == pytest.approx(np.log(len(CLASSES)))


@pytest.mark.parametrize("hidden", [(), (7,), [7, 3], (200, 200)])
def test_a_perceptron_has_the_widths_that_it_is_given(hidden):
    data = federation(2, 5)
    model = mlp(data, hidden=hidden)
    widths = [10, *hidden, len(CLASSES)]
    shapes = [tuple(leaf.shape) for name, leaf in model.params.items() if name.endswith("weight")]
    assert shapes == [(out, into) for into, out in zip(widths[:-1], widths[1:], strict=True)]
    assert model.predict(model.params, data.columns).shape == (6, len(CLASSES))
    assert sum(isinstance(part, nn.ReLU) for part in model.module) == len(hidden)


def test_dropout_stands_behind_every_hidden_layer_or_nowhere():
    with_it = mlp(federation(5), hidden=(4, 4), dropout=0.3)
    assert [part.p for part in with_it.module if isinstance(part, nn.Dropout)] == [0.3, 0.3]
    assert with_it.stochastic and not mlp(federation(5), hidden=(4, 4)).stochastic


@pytest.mark.parametrize(
    ("shape", "channels", "inner"),
    [
        ((1, 28, 28), (16, 32), 32 * 7 * 7),
        ((3, 9, 5), (4, 2), 2 * 2 * 1),
        ((2, 4, 4), [3], 3 * 2 * 2),
        ((2, 3, 3), (), 18),
    ],
)
def test_a_cnn_halves_the_image_at_each_entry_of_channels(shape, channels, inner):
    data = federation(*shape)
    model = cnn(data, channels=channels, hidden=6)
    depths = [shape[0], *channels]
    convolutions = sum(9 * into * out + out for into, out in zip(depths[:-1], depths[1:], strict=True))
    assert count(model) == convolutions + (inner + 1) * 6 + (6 + 1) * len(CLASSES)
    assert model.predict(model.params, data.columns).shape == (6, len(CLASSES))


@pytest.mark.parametrize("build", [mlp, cnn])
def test_the_seed_alone_decides_the_first_parameters(build):
    data = federation(1, 8, 8)
    torch.manual_seed(1)
    first = build(data, seed=4).params
    torch.manual_seed(2)
    again, other = build(data, seed=4).params, build(data, seed=5).params
    assert all(torch.equal(leaf, again[name]) for name, leaf in first.items())
    assert not any(torch.equal(leaf, other[name]) for name, leaf in first.items())


def test_building_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    seeded(7, lambda: nn.Linear(3, 3))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("build", "complaint"),
    [
        (lambda: logistic(federation(5, names={})), "toy names no classes"),
        (
            lambda: cnn(federation(28, 28)),
            r"a cnn needs images \(channels, height, width\), toy has x of shape \(28, 28\)",
        ),
        (lambda: cnn(federation(1, 8, 8), channels=(1, 1, 1, 1)), r"4 halvings leave nothing of \(8, 8\) images"),
        (lambda: mlp(federation(5), hidden=(4, 0)), r"hidden\[1\] must be >= 1, got 0"),
        (lambda: cnn(federation(1, 8, 8), channels=[0]), r"channels\[0\] must be >= 1, got 0"),
        (lambda: mlp(federation(5), dropout=1.5), "dropout must be >= 0 and <= 1, got 1.5"),
        (lambda: mlp(federation(5), seed=-1), "seed must be >= 0, got -1"),
        (lambda: cnn(federation(1, 8, 8), hidden=0), "hidden must be >= 1, got 0"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_reason(build, complaint):
    with pytest.raises(ValueError, match=complaint):
        build()


def test_a_federation_without_features_is_refused_with_the_columns_that_there_are():
    ratings = {"user": torch.arange(6), "rating": torch.ones(6)}
    with pytest.raises(ValueError, match="toy has no column x, only user, rating"):
        mlp(Federation(ratings, np.arange(6), np.array([[0, 6, 6, 6]]), names={"y": CLASSES}, name="toy"))


@pytest.mark.parametrize("make", [logistic, lambda data, **told: mlp(data, hidden=(4,), **told)])
def test_another_column_can_be_what_is_learnt(make):
    data = federation(5, names={"y": CLASSES, "ay": tuple("abcdefgh")})
    data.columns["ay"] = torch.arange(6)
    model = make(data, target="ay")
    assert model.target == "ay" and model.predict(model.params, data.columns).shape == (6, 8)
    with pytest.raises(ValueError, match="names of the values of colour"):
        make(data, target="colour")
