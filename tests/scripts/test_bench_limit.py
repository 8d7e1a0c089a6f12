"""Claims about the limit that the table of gaps is measured from: against bisection on the water level."""

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import load_script

from rdopt.rate.operational import exact_rate_distortion

reverse_waterfill = load_script("bench_limit").reverse_waterfill


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


def test_equal_variances_follow_the_gaussian_rate_distortion_function():
    assert reverse_waterfill(np.full(7, 4.0), 7.0).bits == pytest.approx(7 * 0.5 * np.log2(4))


def test_no_bits_are_spent_when_the_error_may_be_the_signal():
    assert reverse_waterfill(np.array([1.0, 2.0, 0.0]), 3.5).bits == 0


def test_dead_components_cost_nothing():
    assert reverse_waterfill(np.array([0.0, 1.0]), 0.25).bits == pytest.approx(1)


@pytest.mark.parametrize("distortion", [0.0, -1.0, float("nan")])
def test_an_impossible_distortion_is_refused(distortion):
    with pytest.raises(ValueError, match="positive"):
        reverse_waterfill(np.ones(3), distortion)


def test_negative_variances_are_refused():
    with pytest.raises(ValueError, match="non-negative"):
        reverse_waterfill(np.array([1.0, -1.0]), 0.5)


@pytest.mark.parametrize("step", [0.1, 1.0, 2.0, 4.0])
def test_scalar_quantization_stays_above_the_limit(step):
    rate, distortion = exact_rate_distortion(step, "gaussian")
    gap = rate - reverse_waterfill(np.ones(1), distortion).bits
    assert gap > 0
    if step < 0.2:
        assert gap == pytest.approx(0.5 * np.log2(np.pi * np.e / 6), abs=0.001)
