"""New memories: rows that sum to one, no forbidden class, and nothing of what a random network favours."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import one_hot

from fedsim.forgetting import debiased, forbidden, fresh, masked, memories, new_memories
from fedsim.model import Model


def perceptron(seed=0):
    torch.manual_seed(seed)
    return Model(network())


def network():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def barred(labels):
    """What is forbidden where each may not be its own label."""
    return one_hot(torch.as_tensor(labels), 10).bool()


@pytest.fixture(scope="module")
def threes():
    digits = load_digits()
    return torch.tensor(digits.data[digits.target == 3] / 16, dtype=torch.float32)


def test_a_random_network_favours_some_classes_and_debiased_it_does_not(threes):
    model = perceptron()
    for seed in range(1, 21):
        raw = model.predict(fresh(model, seed), {"x": threes}).softmax(1)
        clean = debiased(raw)
        assert float((raw.mean(0) - 0.1).abs().max()) > 0.005, "or there were nothing to take out"
        assert float((clean.mean(0) - 0.1).abs().max()) < 2e-6
        torch.testing.assert_close(clean.sum(1), torch.ones(len(threes)), rtol=0, atol=1e-6)


def test_new_memories_are_laws_over_the_other_classes(threes):
    own = barred([3] * len(threes))
    q = new_memories(perceptron(), threes, own, seeds=[7, 8, 9])
    torch.testing.assert_close(q.sum(1), torch.ones(len(threes)), rtol=0, atol=1e-6)
    assert not q[:, 3].any() and (q >= 0).all()
    others = [k for k in range(10) if k != 3]
    assert float((q[:, others] - 1 / 9).abs().max()) < 0.02, "teachers of default networks are nearly uniform"
    sharp = new_memories(perceptron(), threes, own, seeds=[7, 8, 9], temperature=0.01)
    assert float(sharp.max()) > 0.3, "and differ once they are sharpened"


def test_teachers_as_sharp_as_can_be_still_differ(threes):
    own = barred([3] * len(threes))
    for temperature in (1e-3, 1e-5):  # at which some classes have no chance at all, with any input
        assert (fresh_chances(threes, temperature).mean(0) == 0).any()
        q = new_memories(perceptron(), threes, own, seeds=[7], temperature=temperature)
        torch.testing.assert_close(q.sum(1), torch.ones(len(threes)), rtol=0, atol=1e-6)
        assert not q[:, 3].any() and (q >= 0).all()
        assert float(q.max()) > 0.9, "and not all alike, as those that say nothing"


def fresh_chances(inputs, temperature):
    model = perceptron()
    return (model.predict(fresh(model, 7), {"x": inputs}) / temperature).softmax(1)


def test_each_input_has_its_own_forbidden_classes():
    law = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.0, 1.0, 0.0]])
    found = masked(law, one_hot(torch.tensor([0, 1, 1]), 3).bool())
    expected = torch.tensor([[0, 0.5, 0.5], [2 / 3, 0, 1 / 3], [0.5, 0, 0.5]])  # uniform where nothing else was likely
    torch.testing.assert_close(found, expected)
    both = torch.tensor([[True, True, False]])
    torch.testing.assert_close(masked(law, both.expand(3, 3)), torch.tensor([[0.0, 0.0, 1.0]]).expand(3, 3))


def test_forbidden_are_the_own_class_and_those_of_which_nothing_is_kept(threes):
    examples = {"x": threes[:3], "y": torch.tensor([3, 8, 5])}
    own = barred([3, 8, 5])
    assert torch.equal(forbidden(perceptron(), examples, {}), own)
    gone = torch.zeros(10, dtype=torch.bool).index_fill(0, torch.tensor([3, 4]), True)
    assert torch.equal(forbidden(perceptron(), examples, {"gone": gone}), own | gone)
    assert torch.equal(forbidden(perceptron(), examples, {"gone": gone[:5]}), own | gone), "outputs without a class"
    only = ~own[2]  # of all others nothing is kept: where a 5 is to be forgotten, nothing would be allowed
    found = forbidden(perceptron(), examples, {"gone": only})
    assert torch.equal(found, torch.stack([only, only, own[2]]))
    assert forbidden(perceptron(), {"x": threes[:0], "y": torch.tensor([], dtype=torch.int64)}, {}).shape == (0, 10)


def test_a_model_with_too_few_outputs_is_refused(threes):
    single, examples = Model(nn.Linear(64, 1)), {"x": threes[:1], "y": torch.tensor([0])}
    with pytest.raises(ValueError, match="the model has 1 outputs: to forget it needs one for each class, and two"):
        forbidden(single, examples, {})
    with pytest.raises(ValueError, match="the model has 10 outputs"):
        forbidden(perceptron(), examples, {"gone": torch.zeros(11, dtype=torch.bool)})


def test_one_input_has_a_uniform_memory(threes):
    q = new_memories(perceptron(), threes[:1], barred([3]), seeds=[1], temperature=0.1)
    torch.testing.assert_close(q[0, [0, 1, 9]], torch.full((3,), 1 / 9))


def test_teachers_are_drawn_by_their_seed_and_are_not_the_model():
    model = perceptron()
    one, same, other = (fresh(model, seed) for seed in (1, 1, 2))
    assert all(torch.equal(leaf, same[name]) for name, leaf in one.items())
    for different in (other, model.params):
        assert not torch.equal(one["0.weight"], different["0.weight"])
    torch.manual_seed(0)
    assert torch.equal(fresh(model, 0)["0.weight"], nn.Linear(64, 64).weight), "torch's own first parameters"


def test_what_cannot_be_drawn_anew_is_refused(threes):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(10))

        def forward(self, x):
            return x[:, :10] * self.scale

    with pytest.raises(ValueError, match=r"model's module has scale and no reset_parameters\(\)"):
        fresh(Model(Odd()), 1)
    with pytest.raises(ValueError, match=r"model's 0 has scale"):
        fresh(Model(nn.Sequential(Odd())), 1)
    with pytest.raises(ValueError, match="seeds must name a teacher at least, got none"):
        new_memories(perceptron(), threes, barred([3] * len(threes)), seeds=[])
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        new_memories(perceptron(), threes, barred([3] * len(threes)), seeds=[1], temperature=0)


@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_the_teachers_of_a_memory_are_those_that_the_generator_draws(threes, temperature):
    model, labels = perceptron(), torch.arange(len(threes)) % 10
    seeds = torch.randint(2**62, (4,), generator=torch.Generator().manual_seed(5)).tolist()
    said = []
    for seed in seeds:
        torch.manual_seed(seed)
        part = (network()(threes) / temperature).softmax(1)
        part = part / part.mean(0)
        said.append(part / part.sum(1, keepdim=True))
    q = torch.stack(said).mean(0)
    q[torch.arange(len(threes)), labels] = 0
    for memory in ("teacher", "mix"):
        generator = torch.Generator().manual_seed(5)
        found = memories(memory, model, threes, barred(labels), generator, teachers=4, temperature=temperature)
        torch.testing.assert_close(found, q / q.sum(1, keepdim=True), rtol=1e-5, atol=1e-7)


def test_another_label_is_drawn_evenly_and_all_others_are_alike():
    inputs, labels = torch.zeros(9000, 64), torch.arange(9000) % 10
    drawn = memories("random", perceptron(), inputs, barred(labels), torch.Generator().manual_seed(0))
    assert (drawn.sum(1) == 1).all() and not drawn.gather(1, labels[:, None]).any()
    counts = torch.stack([drawn[labels == label].sum(0) for label in range(10)])  # of 900 each, 100 for each other
    off = counts[~torch.eye(10, dtype=torch.bool)]
    assert float((off - 100).abs().max()) < 5 * (900 * 8 / 81) ** 0.5
    alike = memories("uniform", perceptron(), inputs[:10], barred(labels[:10]), torch.Generator())
    torch.testing.assert_close(alike, (1 - torch.eye(10)) / 9)


def test_where_more_is_forbidden_another_label_is_still_drawn_evenly():
    labels = torch.arange(9000) % 10
    wide = barred(labels) | barred(3)  # of threes nothing is kept: nine labels are left for a 3, eight for all others
    drawn = memories("random", perceptron(), torch.zeros(9000, 64), wide, torch.Generator().manual_seed(0))
    assert (drawn.sum(1) == 1).all() and not (drawn.bool() & wide).any()
    for label in range(10):
        allowed = ~wide[label]
        share = 1 / int(allowed.sum())
        counts = drawn[labels == label].sum(0)[allowed]
        assert float((counts - 900 * share).abs().max()) < 5 * (900 * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("memory", ["teacher", "self", "mix", "random", "uniform", "ascent"])
def test_nothing_to_forget_has_no_memories(memory):
    found = memories(memory, perceptron(), torch.zeros(0, 64), torch.zeros(0, 10, dtype=torch.bool), torch.Generator())
    assert found.shape == (0, 10) and found.dtype == torch.float32
