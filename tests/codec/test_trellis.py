"""Claims about the trellis: the standard's machine, Viterbi against all paths, granular gains."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdopt.codec.grids.trellis import (
    STATES,
    next_states,
    predecessors,
    subset_index,
    viterbi,
    walk,
    walk_lanes,
)

# Granular gains in dB over the uniform grid (Marcellin and Fischer 1990, table I; 1.53 is the limit).
GAINS = {1: 0.0, 4: 0.99, 8: 1.09, 16: 1.16, 32: 1.22, 64: 1.27}
NO_BITS = np.zeros((1, 2, 1), np.float32)
every_trellis = pytest.mark.parametrize("states", STATES)


def run_viterbi(x, states, bits=NO_BITS, classes=None, mu=0.0, start=0):
    """(indices, last state) of one sequence."""
    k = np.empty(len(x), np.int32)
    classes = np.zeros(len(x), np.int64) if classes is None else classes
    return k, viterbi(np.asarray(x, np.float64), classes, bits, mu, next_states(states), start, k)


def run_walk(k, states, start=0):
    """(values, grids, last state) of one sequence."""
    values, grids = np.empty(len(k), np.int32), np.empty(len(k), np.uint8)
    end = walk(np.asarray(k, np.int32), next_states(states), start, values, grids)
    return values, grids, end


def growing_bits(rng, classes=3, size=40):
    """Code lengths that grow with |k|, as those of any one-sided table do."""
    return np.cumsum(0.1 + rng.random((classes, 2, size)), axis=2).astype(np.float32)


# the machine


def test_eight_states_are_the_machine_of_the_standard():
    expected = [[0, 2], [7, 5], [1, 3], [6, 4], [2, 0], [5, 7], [3, 1], [4, 6]]
    np.testing.assert_array_equal(next_states(8), expected)


@every_trellis
def test_every_state_is_reachable_and_has_two_predecessors(states):
    step = next_states(states)
    assert step.shape == (states, 2)
    np.testing.assert_array_equal(np.bincount(step.ravel(), minlength=states), 2)
    reached = {0}
    for _ in range(states):
        reached |= {int(s) for s in step[sorted(reached)].ravel()}
    assert reached == set(range(states))


@pytest.mark.parametrize("states", [s for s in STATES if s > 1])
def test_the_two_ways_into_a_state_use_different_subsets_of_one_grid_pair(states):
    """Ungerboeck's rule: merging (and diverging) branches lie 4 steps apart, in subsets of equal parity class."""
    subset = 2 * (np.arange(states)[:, None] & 1) + np.arange(2)
    step = next_states(states)
    for s in range(states):
        into = subset[step == s]
        assert len(set(into.tolist())) == 2 and len({int(x) >> 1 for x in into}) == 1
        assert step[s, 0] != step[s, 1]


@every_trellis
def test_the_predecessors_are_the_transposed_machine(states):
    before, subset = predecessors(next_states(states))
    step = next_states(states)
    assert np.all(np.diff(before * 2 + (subset & 1), axis=1) > 0)  # the lower state first: ties fall to it
    for s in range(states):
        for b, u in zip(before[s], subset[s], strict=True):
            assert step[b, u & 1] == s and u >> 1 == b & 1


@pytest.mark.parametrize("states", [0, 2, 3, 7, 128])
def test_a_trellis_without_a_code_is_a_value_error(states):
    with pytest.raises(ValueError, match="use one of 1, 4, 8, 16, 32, 64"):
        next_states(states)


def value_table(size):
    """Values of k = 0..size-1 on both grids."""
    k = np.arange(size)
    return np.stack([2 * k, 2 * k - (k > 0)])


@given(a=st.floats(0, 1000))
def test_the_index_of_a_subset_is_the_nearest_of_all(a):
    values = value_table(600)
    for subset in range(4):
        grid, parity = subset >> 1, subset & 1
        allowed = np.arange(parity, 600, 2)
        error = np.abs(values[grid, allowed] - a)
        assert abs(values[grid, subset_index(a, subset)] - a) == error.min()
        assert subset_index(a, subset) % 2 == parity


# walking


@given(k=st.lists(st.integers(-50, 50), min_size=1, max_size=40), states=st.sampled_from(STATES), start=st.integers(0))
def test_indices_follow_from_values_and_values_are_their_own_quantization(k, states, start):
    start %= states
    values, grids, end = run_walk(k, states, start)
    np.testing.assert_array_equal((values + grids * np.sign(values)) // 2, k)
    np.testing.assert_array_equal(np.abs(values), value_table(51)[grids, np.abs(k)])
    again, last = run_viterbi(values, states, start=start)
    np.testing.assert_array_equal(again, k)
    assert last == end


@given(
    lanes=st.integers(1, 4),
    length=st.integers(1, 30),
    segment=st.integers(1, 12),
    states=st.sampled_from(STATES),
)
def test_lanes_are_walks_that_start_anew_after_every_segment(lanes, length, segment, states):
    k = np.random.default_rng(length).integers(-9, 10, (lanes, length)).astype(np.int32)
    values, grids = walk_lanes(k, states, segment)
    for lane in range(lanes):
        for low in range(0, length, segment):
            part = slice(low, low + segment)
            expected = run_walk(k[lane, part], states)
            np.testing.assert_array_equal(values[lane, part], expected[0])
            np.testing.assert_array_equal(grids[lane, part], expected[1])


# Viterbi


@every_trellis
@pytest.mark.parametrize("mu", [0.0, 0.1, 1.0])
def test_viterbi_finds_the_best_of_all_paths(states, mu):
    rng = np.random.default_rng(states)
    step, bits = next_states(states), growing_bits(rng)
    length, start = 4, states - 1
    x = rng.uniform(-4.5, 4.5, (8, length))
    classes = rng.integers(0, len(bits), (8, length))
    least = np.full(8, np.inf)
    best = np.zeros((8, length), np.int32)
    for k in product(range(-4, 5), repeat=length):
        s, cost = start, np.zeros(8)
        for t in range(length):
            grid, m = s & 1, abs(k[t])
            cost += (x[:, t] - (2 * k[t] - grid * np.sign(k[t]))) ** 2 + mu * bits[classes[:, t], grid, m]
            s = step[s, m & 1]
        best[cost < least] = k
        least = np.minimum(least, cost)
    for i in range(8):
        found, _ = run_viterbi(x[i], states, bits, classes[i], mu, start)
        np.testing.assert_array_equal(found, best[i])


@every_trellis
def test_a_dearer_bit_buys_shorter_codes_for_more_error(states):
    rng = np.random.default_rng(0)
    x, bits = 3 * rng.standard_normal(2000), growing_bits(rng, 1)
    errors, rates = [], []
    for mu in (0.0, 0.3, 1.0, 4.0):
        k, _ = run_viterbi(x, states, bits, mu=mu)
        values, grids, _ = run_walk(k, states)
        errors.append(np.sum((x - values) ** 2))
        rates.append(np.sum(bits[0, grids, np.abs(k)]))
    assert errors == sorted(errors) and rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.95 * rates[0]


@every_trellis
@pytest.mark.parametrize("source", ["uniform", "gaussian"])
def test_the_granular_gain_is_the_published_one(states, source):
    """Against the uniform grid of step two, which has the same rate where the density is flat over a step."""
    rng = np.random.default_rng(1)
    x = 300 * (rng.uniform(-1, 1, 30_000) if source == "uniform" else rng.standard_normal(30_000))
    k, _ = run_viterbi(x, states)
    values, _, _ = run_walk(k, states)
    gain = 10 * np.log10((2**2 / 12) / np.mean((x - values) ** 2))
    assert gain == pytest.approx(GAINS[states], abs=0.05)
