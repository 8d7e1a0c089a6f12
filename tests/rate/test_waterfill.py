"""Reverse water-filling against bisection on the water level."""

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from rdopt.rate.operational import exact_rate_distortion
from rdopt.rate.waterfill import layer_variances, metric_spectrum, reverse_waterfill, waterfill_at_rate

VARIANCES = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30).map(np.array)


@settings(max_examples=60, deadline=None)
@given(VARIANCES, st.floats(0.001, 0.999))
def test_the_closed_form_level_is_the_bisected_one(v, share):
    D = share * v.sum()
    excess = lambda level: np.minimum(v, level).sum() - D  # noqa: E731
    level = scipy.optimize.brentq(excess, 0, v.max(), xtol=1e-300, rtol=np.float64(1e-13))
    point = reverse_waterfill(v, D)
    assert point.level == pytest.approx(level, rel=1e-9)
    assert point.bits == pytest.approx(0.5 * np.sum(np.log2(np.maximum(v / level, 1))), rel=1e-8, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(VARIANCES, st.floats(0.001, 0.999))
def test_distortion_at_a_rate_inverts_rate_at_a_distortion(v, share):
    point = reverse_waterfill(v, share * v.sum())
    back = waterfill_at_rate(v, point.bits)
    assert back.distortion == pytest.approx(point.distortion, rel=1e-7)
    assert back.level == pytest.approx(point.level, rel=1e-7)


def test_equal_variances_follow_the_gaussian_rate_distortion_function():
    assert reverse_waterfill(np.full(7, 4.0), 7.0).bits == pytest.approx(7 * 0.5 * np.log2(4))


def test_no_bits_are_spent_when_the_error_may_be_the_signal():
    assert reverse_waterfill(np.array([1.0, 2.0, 0.0]), 3.5).bits == 0
    assert waterfill_at_rate(np.array([1.0, 2.0, 0.0]), 0.0).distortion == 3


def test_dead_components_cost_nothing():
    assert reverse_waterfill(np.array([0.0, 1.0]), 0.25).bits == pytest.approx(1)
    assert waterfill_at_rate(np.array([0.0, 1.0]), 1.0).distortion == pytest.approx(0.25)


@pytest.mark.parametrize("distortion", [0.0, -1.0, float("nan")])
def test_an_impossible_distortion_is_refused(distortion):
    with pytest.raises(ValueError, match="positive"):
        reverse_waterfill(np.ones(3), distortion)


def test_negative_variances_and_rates_are_refused():
    with pytest.raises(ValueError, match="non-negative"):
        reverse_waterfill(np.array([1.0, -1.0]), 0.5)
    with pytest.raises(ValueError, match="negative"):
        waterfill_at_rate(np.ones(2), -1.0)


@pytest.mark.parametrize("step", [0.1, 1.0, 2.0, 4.0])
def test_scalar_quantization_stays_above_the_limit(step):
    rate, distortion = exact_rate_distortion(step, "gaussian")
    gap = rate - reverse_waterfill(np.ones(1), distortion).bits
    assert gap > 0
    if step < 0.2:
        assert gap == pytest.approx(0.5 * np.log2(np.pi * np.e / 6), abs=0.001)


def test_the_layer_components_are_the_spectrum_of_the_whole_weighted_covariance():
    rng = np.random.default_rng(0)
    A, B = rng.normal(size=(5, 9)), rng.normal(size=(4, 9))
    sigma, G = A @ A.T, B @ B.T
    rows, cols = rng.uniform(0.5, 2, 4), rng.uniform(0.5, 2, 5)
    # vec of W has covariance diag(rows) x diag(cols); the metric is (G x sigma) / 2
    root = np.sqrt(np.kron(rows, cols))
    expected = np.linalg.eigvalsh(root[:, None] * np.kron(G, sigma) / 2 * root[None, :])
    got = layer_variances(sigma, G, rows, cols)
    assert got.shape == (4, 5)
    np.testing.assert_allclose(np.sort(got.ravel()), expected, rtol=1e-9)
    # the total distortion of dropping W is its expected energy in the metric
    assert got.sum() == pytest.approx(0.5 * np.sum(rows * np.diag(G)) * np.sum(cols * np.diag(sigma)))
    diagonal = layer_variances(sigma, np.diag(G), 0.3)
    np.testing.assert_allclose(
        np.sort(diagonal.ravel()), np.sort(np.outer(np.diag(G), metric_spectrum(sigma)).ravel() * 0.15)
    )
