"""Claims about learned pairings: disjoint, never dearer, the best angle is the best, the count of pairings is right."""

from math import log2

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdopt.transforms.matrices.givens import as_pairs, butterfly
from rdopt.transforms.matrices.jacobi import joint_cost
from rdopt.transforms.stored.pairing import (
    fitted_angles,
    greedy_matching,
    learned_pairs,
    pair_gains,
    pairing_bits,
    turned_moments,
)


def moments(seed: int, count: int, n: int) -> np.ndarray:
    """Random positive definite matrices with unequal axes."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, 2 * n + 1, n)) * np.exp(rng.standard_normal((count, 1, n)))
    x = x + x[:, :, ::-1] * rng.standard_normal((count, 1, 1))
    return np.einsum("kti,ktj->kij", x, x) / x.shape[1]


@given(st.integers(0, 99), st.integers(1, 4), st.integers(2, 11), st.integers(0, 3))
def test_pairs_are_disjoint_and_every_layer_saves(seed, count, n, layers):
    C, weights = moments(seed, count, n), np.random.default_rng(seed).uniform(0.5, 4, count)
    pairs, angles = learned_pairs(C, weights, layers)
    as_pairs(pairs, n)  # raises where a layer uses an axis twice
    assert [len(layer) for layer in pairs] == [n // 2] * layers
    cost, at = joint_cost(C, weights), 0
    for layer in pairs:
        C = turned_moments(C, angles[at : at + len(layer)], (layer,))
        assert joint_cost(C, weights) <= cost + 1e-9
        cost, at = joint_cost(C, weights), at + len(layer)


@pytest.mark.slow
def test_the_gain_of_a_pair_is_what_a_fine_grid_of_angles_finds():
    C, weights = moments(1, 3, 6), np.array([1.0, 2.0, 5.0])
    gains, angles = pair_gains(C, weights)
    for i in range(6):
        for j in range(i + 1, 6):
            pair = (np.array([[i, j]]),)
            costs = [joint_cost(turned_moments(C, np.array([t]), pair), weights) for t in np.linspace(-0.8, 0.8, 2001)]
            saved = joint_cost(C, weights) - min(costs)
            reached = joint_cost(C, weights) - joint_cost(turned_moments(C, angles[i, [j]], pair), weights)
            assert gains[i, j] == pytest.approx(reached, abs=1e-9)
            assert gains[i, j] == pytest.approx(saved, abs=1e-3 * weights.sum())
            assert gains[j, i] == gains[i, j]


def test_diagonal_moments_have_nothing_to_save():
    C = np.exp(np.random.default_rng(0).standard_normal((2, 7)))[:, :, None] * np.eye(7)
    pairs, angles = learned_pairs(C, np.ones(2), 2)
    assert np.all(angles == 0) and [len(layer) for layer in pairs] == [3, 3]


def test_one_layer_undoes_disjoint_turns():
    n, rng = 8, np.random.default_rng(5)
    pairs = (rng.permutation(n).reshape(-1, 2),)
    spectrum = 2.0 ** rng.permutation(n)[None, :, None] * np.eye(n)
    C = turned_moments(spectrum, rng.uniform(0.2, 0.7, n // 2), pairs)
    found, angles = learned_pairs(C, np.ones(1), 1)
    turned = turned_moments(C, angles, found)
    np.testing.assert_allclose(turned[0], np.diag(np.diag(turned[0])), atol=1e-9 * 2**n)
    assert {frozenset(p) for p in found[0].tolist()} == {frozenset(p) for p in pairs[0].tolist()}


def test_the_largest_gain_is_matched_first():
    gains = np.zeros((4, 4))
    gains[0, 1], gains[1, 2], gains[2, 3] = 2.0, 3.0, 2.0
    assert greedy_matching(gains + gains.T).tolist() == [[0, 3], [1, 2]]


def test_a_butterfly_fitted_in_order_saves_and_has_an_angle_a_pair():
    C, weights, pairs = moments(2, 2, 12), np.ones(2), butterfly(12)
    angles = fitted_angles(C, weights, pairs)
    assert len(angles) == sum(map(len, pairs))
    assert joint_cost(turned_moments(C, angles, pairs), weights) < joint_cost(C, weights)


@pytest.mark.parametrize(("n", "ways"), [(2, 1), (4, 3), (6, 15), (5, 15), (7, 105)])
def test_pairings_are_counted(n, ways):
    assert pairing_bits(n, 2) == pytest.approx(2 * log2(ways), abs=1e-9)
