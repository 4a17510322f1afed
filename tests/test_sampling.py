"""Every client is drawn as often as its sampler says, never one that is not there, and a round decides alone."""

from itertools import combinations

import numpy as np
import pytest
import torch

from fedsim.data.federation import Federation
from fedsim.randomness import rng
from fedsim.sampling import Draw, available, dropout, everyone, read_trace, uniform, weighted

ROUNDS = range(1, 4001)


def federation(*sizes):
    """Clients with so many training examples; each has two more for testing, which must not count."""
    ends = np.cumsum(np.array(sizes) + 2)
    starts = ends - np.array(sizes) - 2
    bounds = np.stack([starts, ends - 2, ends - 2, ends], axis=1)
    return Federation({"x": torch.zeros(int(ends[-1]))}, np.arange(ends[-1]), bounds)


def trace(folder, *lines, header="client,first,last"):
    path = folder / "trace.csv"
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


def frequency(sample, clients):
    """The share of the rounds in which each client is drawn, (N,)."""
    counts = np.zeros(clients)
    for round in ROUNDS:
        counts[sample(round).ids] += 1
    return counts / len(ROUNDS)


def near(share):
    """Five standard deviations of a share counted over the rounds."""
    return 5 * np.sqrt(np.asarray(share) * (1 - np.asarray(share)) / len(ROUNDS))


SAMPLERS = {
    "uniform": lambda seed: uniform(30, seed, count=7),
    "weighted": lambda seed: weighted(federation(*range(1, 31)), seed, fraction=0.2),
    "dropout": lambda seed: dropout(uniform(30, seed, count=20), 0.4, seed),
    "available": lambda seed: available(uniform(30, seed, count=7), 30, seed, probability=0.6),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_draw_is_a_function_of_seed_and_round_alone(name):
    sample, again, other = (SAMPLERS[name](seed) for seed in (1, 1, 2))
    forwards = [sample(round) for round in range(1, 9)]
    assert forwards[::-1] == [again(round) for round in range(8, 0, -1)]
    assert forwards == [sample(round) for round in range(1, 9)]
    assert forwards != [other(round) for round in range(1, 9)]
    assert len({tuple(draw.ids) for draw in forwards}) > 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_ids_ascend_without_repetition_and_are_plain_integers(name):
    for round in range(1, 50):
        draw = SAMPLERS[name](0)(round)
        for ids in draw:
            assert ids == sorted(set(ids)) and all(type(client) is int for client in ids)
        assert not set(draw.ids) & set(draw.dropped)


# Uniform


@pytest.mark.parametrize(("fraction", "size"), [(0.1, 3), (0.5, 15), (1.0, 30), (1e-9, 1)])
def test_a_fraction_is_rounded_and_at_least_one(fraction, size):
    assert len(uniform(30, 0, fraction=fraction)(1).ids) == size


def test_every_client_and_every_pair_of_clients_is_as_likely_as_every_other():
    draws = [tuple(uniform(6, 0, count=2)(round).ids) for round in ROUNDS]
    pairs = list(combinations(range(6), 2))
    shares = np.array([draws.count(pair) for pair in pairs]) / len(ROUNDS)
    assert shares.sum() == pytest.approx(1)
    assert (np.abs(shares - 1 / len(pairs)) < near(1 / len(pairs))).all()
    assert (np.abs(frequency(uniform(6, 0, count=2), 6) - 2 / 6) < near(2 / 6)).all()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({}, "give either fraction or count, got fraction = None and count = None"),
        ({"fraction": 0.5, "count": 3}, "give either fraction or count, got fraction = 0.5 and count = 3"),
        ({"count": 31}, "count must be at most the number of clients, 30, got 31"),
        ({"count": 0}, "count must be >= 1, got 0"),
        ({"fraction": 0.0}, "fraction must be > 0 and <= 1, got 0.0"),
        ({"fraction": 1.5}, "fraction must be > 0 and <= 1, got 1.5"),
        ({"count": 3, "seed": -1}, "seed must be >= 0, got -1"),
    ],
)
def test_sizes_out_of_range_are_refused(arguments, complaint):
    for build in (lambda: uniform(30, **arguments), lambda: weighted(federation(*[1] * 30), **arguments)):
        with pytest.raises(ValueError, match=complaint):
            build()


# Weighted


def test_a_single_draw_is_in_proportion_to_the_training_examples():
    sizes = np.array([1, 2, 3, 10, 4])
    shares = frequency(weighted(federation(*sizes), 0, count=1), 5)
    assert (np.abs(shares - sizes / sizes.sum()) < near(sizes / sizes.sum())).all()


def test_several_are_drawn_one_after_the_other_in_proportion_to_what_is_left():
    sizes = np.array([1.0, 2.0, 5.0, 4.0])
    share = sizes / sizes.sum()
    expected = np.array(
        [share[i] + sum(share[j] * share[i] / (1 - share[j]) for j in range(4) if j != i) for i in range(4)]
    )
    assert expected.sum() == pytest.approx(2)
    shares = frequency(weighted(federation(1, 2, 5, 4), 0, count=2), 4)
    assert (np.abs(shares - expected) < near(expected)).all()


def test_equal_sizes_are_drawn_uniformly():
    assert (np.abs(frequency(weighted(federation(*[3] * 5), 0, count=2), 5) - 2 / 5) < near(2 / 5)).all()


def test_a_client_without_training_examples_is_never_drawn_even_if_too_few_are_left():
    sample = weighted(federation(0, 3, 0, 1), 0, count=3)
    assert all(sample(round).ids == [1, 3] for round in range(1, 20))
    assert sample(1, np.array([0, 2, 3])).ids == [3]
    assert sample(1, np.array([0, 2])).ids == sample(1, np.array([], dtype=np.int64)).ids == []


def test_those_are_drawn_that_a_full_sort_puts_first():
    sizes = np.random.default_rng(0).integers(0, 50, 1000)
    inhabited = np.flatnonzero(sizes)
    for round in range(1, 20):
        waiting = rng(3, "weighted", round).exponential(size=1000)[inhabited] / sizes[inhabited]
        expected = np.sort(inhabited[np.argsort(waiting)[:40]]).tolist()
        assert weighted(federation(*sizes), 3, count=40)(round).ids == expected


# Everyone, and who is there


def test_everyone_is_everyone_that_is_there():
    assert everyone(5)(1) == everyone(5)(99) == Draw([0, 1, 2, 3, 4], [])
    assert everyone(5)(1, np.array([1, 4])).ids == [1, 4]


@pytest.mark.parametrize("name", SAMPLERS)
def test_only_those_are_drawn_who_are_among_those_named(name):
    among = np.array([2, 3, 5, 7, 11, 13, 17, 19, 23, 29])
    drawn = [SAMPLERS[name](0)(round, among) for round in range(1, 40)]
    assert {client for draw in drawn for ids in draw for client in ids} == set(among.tolist())


def test_fewer_are_drawn_where_fewer_are_there():
    sample = uniform(30, 0, count=7)
    assert sample(1, np.array([4, 9])).ids == [4, 9]
    assert sample(1, np.array([], dtype=np.int64)).ids == []


def test_each_client_is_there_with_the_given_probability():
    shares = frequency(available(everyone(20), 20, 0, probability=0.3), 20)
    assert (np.abs(shares - 0.3) < near(0.3)).all()
    assert available(everyone(20), 20, 0, probability=1.0)(1).ids == list(range(20))
    assert available(uniform(20, 0, count=3), 20, 0, probability=0.0)(1) == Draw([], [])


def test_a_client_is_there_whoever_else_might_be():
    sample = available(everyone(30), 30, 0, probability=0.5)
    few = np.array([3, 8, 9, 20, 29])
    for round in range(1, 30):
        assert sample(round, few).ids == [client for client in sample(round).ids if client in few]


def test_clients_come_and_go_independently():
    there = np.zeros((len(ROUNDS), 10))
    for row, round in zip(there, ROUNDS, strict=True):
        row[available(everyone(10), 10, 0, probability=0.5)(round).ids] = 1
    off_diagonal = np.corrcoef(there.T)[~np.eye(10, dtype=bool)]
    assert np.abs(off_diagonal).max() < 5 / np.sqrt(len(ROUNDS))


# Dropping out


def test_dropout_divides_those_drawn_and_loses_nobody():
    whole = uniform(30, 0, count=20)
    for round in range(1, 50):
        draw = dropout(whole, 0.4, 0)(round)
        assert sorted(draw.ids + draw.dropped) == whole(round).ids


def test_clients_drop_out_with_the_given_probability():
    shares = frequency(dropout(everyone(20), 0.3, 0), 20)
    assert (np.abs(shares - 0.7) < near(0.3)).all()
    assert dropout(everyone(5), 0.0)(1) == Draw([0, 1, 2, 3, 4], [])
    assert dropout(everyone(5), 1.0)(1) == Draw([], [0, 1, 2, 3, 4])


def test_a_client_drops_out_whoever_else_was_drawn():
    few, many = dropout(uniform(30, 1, count=5), 0.5, 0), dropout(everyone(30), 0.5, 0)
    for round in range(1, 30):
        assert set(few(round).dropped) == set(many(round).dropped) & set(sum(few(round), []))


def test_wrappers_go_around_each_other():
    for round in range(1, 50):
        there = set(available(everyone(30), 30, 0, probability=0.5)(round).ids)
        asked = available(uniform(30, 0, count=8), 30, 0, probability=0.5)(round).ids
        assert set(asked) <= there and len(asked) == min(8, len(there))
        outside = dropout(available(uniform(30, 0, count=8), 30, 0, probability=0.5), 0.4, 0)(round)
        inside = available(dropout(uniform(30, 0, count=8), 0.4, 0), 30, 0, probability=0.5)(round)
        assert outside == inside
        assert sorted(outside.ids + outside.dropped) == asked


def test_those_lost_in_an_inner_wrapper_stay_lost():
    inner, outer = dropout(everyone(30), 0.3, 0), dropout(dropout(everyone(30), 0.3, 0), 0.3, 1)
    assert set(inner(1).dropped) < set(outer(1).dropped)
    assert sorted(sum(outer(1), [])) == list(range(30))


@pytest.mark.parametrize("probability", [-0.1, 1.1])
def test_a_probability_is_between_zero_and_one(probability):
    with pytest.raises(ValueError, match=f"probability must be >= 0 and <= 1, got {probability}"):
        dropout(everyone(5), probability)
    with pytest.raises(ValueError, match=f"probability must be >= 0 and <= 1, got {probability}"):
        available(everyone(5), 5, probability=probability)


def test_availability_is_either_by_chance_or_by_trace():
    for arguments in ({}, {"probability": 0.5, "trace": "trace.csv"}):
        with pytest.raises(ValueError, match="give either probability or trace, got probability = .* and trace = "):
            available(everyone(5), 5, **arguments)


# Traces


def test_a_trace_says_in_which_rounds_a_client_is_there_both_ends_included(tmp_path):
    path = trace(tmp_path, "0,1,3", "3,2,2", "0,5,6", "1,1,1000000", "1,3,4")
    spans = {0: [(1, 3), (5, 6)], 1: [(1, 10**6)], 3: [(2, 2)]}
    sample = available(everyone(5), 5, trace=path)
    for round in range(1, 9):
        expected = [client for client, when in spans.items() if any(first <= round <= last for first, last in when)]
        assert sample(round).ids == expected
    assert sample(2, np.array([3, 4])).ids == [3]


def test_spans_are_as_written_with_blank_lines_and_spaces_passed_over(tmp_path):
    spans = read_trace(trace(tmp_path, "0,1,3", "", " 2, 4 ,4"), 3)
    assert spans.tolist() == [[0, 1, 3], [2, 4, 4]] and spans.dtype == np.int64


def test_a_trace_without_spans_has_nobody_there(tmp_path):
    path = trace(tmp_path)
    assert read_trace(path, 3).shape == (0, 3)
    assert available(everyone(3), 3, trace=str(path))(1).ids == []


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("one,1,3", "not three integers"),
        ("1,1", "not three integers"),
        ("1,1,2,3", "not three integers"),
        ("1,,3", "not three integers"),
        ("1,1.5,3", "not three integers"),
        ("\ufffd,1,3", "not three integers"),
        ("5,1,3", r"client must be in 0..4 and 0 <= first <= last < 2\*\*63, got 5, 1, 3"),
        ("-1,1,3", "client must be in 0..4 .* got -1, 1, 3"),
        ("1,4,3", "got 1, 4, 3"),
        ("1,-4,3", "got 1, -4, 3"),
        ("1,1,9999999999999999999", "got 1, 1, 9999999999999999999"),
    ],
)
def test_a_damaged_line_is_named_with_its_file_and_number(tmp_path, line, complaint):
    path = trace(tmp_path, "0,1,3", "", line, "2,1,3")
    with pytest.raises(ValueError, match=complaint) as caught:
        read_trace(path, 5)
    assert f"trace {path}, line 4: " in str(caught.value)


def test_bytes_that_are_no_text_are_a_damaged_line_too(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_bytes(b"client,first,last\n0,1,2\n\xff\x00\x80,1,2\n")
    with pytest.raises(ValueError, match=r"trace\.csv, line 3: not three integers"):
        read_trace(path, 5)


@pytest.mark.parametrize("header", ["client,first", "first,last,client", "Client,first,last", "0,1,3", ""])
def test_a_trace_with_other_columns_is_refused_with_those_it_has(tmp_path, header):
    path = trace(tmp_path, "0,1,3", header=header)
    with pytest.raises(ValueError, match=r"trace\.csv must have the columns client, first, last, got "):
        read_trace(path, 5)


def test_an_empty_and_an_absent_file_are_named(tmp_path):
    (tmp_path / "empty.csv").touch()
    with pytest.raises(ValueError, match=r"empty\.csv must have the columns client, first, last, got None"):
        read_trace(tmp_path / "empty.csv", 5)
    with pytest.raises(FileNotFoundError, match=r"trace .*nowhere\.csv does not exist"):
        available(everyone(5), 5, trace=str(tmp_path / "nowhere.csv"))
