"""Claims about gains before rounding: unbiased rows, alternating least squares, the precision of many."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdopt.codec.streams.gains import PRECISIONS
from rdopt.encode.gain_fit import (
    _column_step,
    fit_gains,
    gain_precision,
    least_squares_gains,
    rounding_variance,
    unbiased_gains,
)


def test_unbiased_gains_leave_an_error_that_is_uncorrelated_with_the_output():
    W, What, sigma, _ = problem()
    a = unbiased_gains(W, What, sigma)
    inside = (a > 0.5) & (a < 2)
    assert inside.sum() > 10 and a.min() >= 0.5 and a.max() <= 2
    coherent = np.sum(((a[:, None] * What - W) @ sigma) * W, axis=1)
    scale = np.sum((W @ sigma) * W, axis=1)
    np.testing.assert_allclose(coherent[inside] / scale[inside], 0, atol=1e-12)
    np.testing.assert_array_equal(unbiased_gains(W, np.zeros_like(W), sigma), np.ones(20))


def test_least_squares_gains_have_the_smaller_error_and_both_sides():
    W, What, sigma, g = problem()
    errors = {}
    for kind in ("none", "unbiased", "least-squares"):
        rows, cols = (np.exp2(x) for x in fit_gains(kind, W, What, sigma, g))
        assert (rows.size, cols.size) == {"none": (0, 0), "unbiased": (20, 0), "least-squares": (20, 12)}[kind]
        a, b = rows if rows.size else np.ones(20), cols if cols.size else np.ones(12)
        errors[kind] = weighted_error(W, What, sigma, g, a, b)
    assert errors["least-squares"] < min(errors["none"], errors["unbiased"])


@given(gains=st.integers(1, 100), distortion=st.floats(0, 100))
def test_the_precision_of_many_gains_minimises_bits_and_distortion(gains, distortion):
    def cost(precision):
        return gains * np.log2(precision) / 50 + 3 * distortion * rounding_variance(precision)

    found = gain_precision(gains, 50, 3.0, distortion)
    assert cost(found) == min(map(cost, PRECISIONS))


def problem(seed=0, out=20, n=12):
    """(W, What, sigma, g) with errors that rescaling can partly undo."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3 * n, n)) * np.exp(rng.standard_normal(n))
    W = rng.standard_normal((out, n))
    scaled = W * np.exp2(0.5 * rng.standard_normal((out, 1))) * np.exp2(0.5 * rng.standard_normal(n))
    return W, np.rint(scaled), x.T @ x / len(x), rng.uniform(0.1, 3, out)


def weighted_error(W, What, sigma, g, a, b):
    E = W - a[:, None] * What * b
    return np.sum(g[:, None] * (E @ sigma) * E)


@given(seed=st.integers(0, 50), out=st.integers(1, 20), n=st.integers(1, 12))
def test_more_iterations_never_raise_the_weighted_error(seed, out, n):
    W, What, sigma, g = problem(seed, out, n)
    gains = [(np.ones(out), np.ones(n)), *(least_squares_gains(W, What, sigma, g, i) for i in (1, 2, 3, 6))]
    errors = [weighted_error(W, What, sigma, g, a, b) for a, b in gains]
    assert all(later <= earlier + 1e-9 * errors[0] for earlier, later in pairwise(errors))
    for a, b in gains:
        assert a.min() > 0 and b.min() > 0


def test_diagonal_rescalings_are_recovered():
    W, _, sigma, g = problem()
    rng = np.random.default_rng(1)
    a, b = np.exp2(rng.standard_normal(20)), np.exp2(rng.standard_normal(12))
    found_a, found_b = least_squares_gains(W, W / np.outer(a, b), sigma, g, iterations=200)
    np.testing.assert_allclose(np.outer(found_a, found_b), np.outer(a, b), rtol=1e-5)
    assert np.mean(np.log(found_b)) == pytest.approx(0, abs=1e-9)


def test_the_column_step_is_the_least_squares_solution():
    """By the design matrix of the stacked, whitened error in b."""
    W, What, sigma, g = problem()
    a = np.random.default_rng(2).uniform(0.5, 2, 20)
    L = np.linalg.cholesky(sigma)
    design = np.concatenate([np.sqrt(g[i]) * a[i] * (What[i] * L.T) for i in range(20)])
    target = np.concatenate([np.sqrt(g[i]) * L.T @ W[i] for i in range(20)])
    expected = np.linalg.lstsq(design, target, rcond=None)[0]
    assert expected.min() > 0.1
    found = _column_step(What, a, W @ sigma, sigma, g, np.ones(12))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_columns_of_zeros_and_rows_of_the_wrong_sign_keep_their_gains():
    W, What, sigma, g = problem()
    What[5] = -W[5]
    What[:, 3] = 0
    a, b = least_squares_gains(W, What, sigma, g)
    assert b[3] == 1 and np.isfinite(a).all() and np.isfinite(b).all()
    assert a.min() > 0 and b.min() > 0
    none = least_squares_gains(W, np.zeros_like(W), sigma, g)
    np.testing.assert_array_equal(none[0], np.ones(20))
    np.testing.assert_array_equal(none[1], np.ones(12))
