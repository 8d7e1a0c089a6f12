"""Claims about gains before rounding: unbiased rows, the precision of many."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rdopt.codec.streams.gains import GAIN_PRECISIONS
from rdopt.encode.gain_fit import gain_precision, rounding_variance, unbiased_gains


def test_unbiased_gains_leave_an_error_that_is_uncorrelated_with_the_output():
    W, What, sigma = problem()
    a = unbiased_gains(W, What, sigma)
    inside = (a > 0.5) & (a < 2)
    assert inside.sum() > 10 and a.min() >= 0.5 and a.max() <= 2
    coherent = np.sum(((a[:, None] * What - W) @ sigma) * W, axis=1)
    scale = np.sum((W @ sigma) * W, axis=1)
    np.testing.assert_allclose(coherent[inside] / scale[inside], 0, atol=1e-12)
    np.testing.assert_array_equal(unbiased_gains(W, np.zeros_like(W), sigma), np.ones(20))


@given(gains=st.integers(1, 100), distortion=st.floats(0, 100))
def test_the_precision_of_many_gains_minimises_bits_and_distortion(gains, distortion):
    def cost(precision):
        return gains * np.log2(precision) / 50 + 3 * distortion * rounding_variance(precision)

    found = gain_precision(gains, 50, 3.0, distortion)
    assert cost(found) == min(map(cost, GAIN_PRECISIONS))


def problem(seed=0, out=20, n=12):
    """(W, What, sigma) with errors that rescaling can partly undo."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3 * n, n)) * np.exp(rng.standard_normal(n))
    W = rng.standard_normal((out, n))
    scaled = W * np.exp2(0.5 * rng.standard_normal((out, 1))) * np.exp2(0.5 * rng.standard_normal(n))
    return W, np.rint(scaled), x.T @ x / len(x)
