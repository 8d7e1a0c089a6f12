"""Claims about the measured curve of the trellis: it is what the quantizer does, with the limits of any quantizer."""


import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import load_script

from rdopt.rate.operational import unit_curves
from rdopt.rate.trellis_curve import LOG2_SPREADS, measured_rate_distortion


@pytest.fixture(scope="module")
def tabulate():
    return load_script("tabulate_trellis")


@pytest.mark.parametrize("log2_spread", [-1.0, 0.5, 3.0])
def test_the_table_is_what_the_quantizer_does(tabulate, log2_spread):
    bits, error = tabulate.measure(log2_spread, 8, rows=1 << 13, columns=8)
    expected = measured_rate_distortion(2.0**-log2_spread)
    assert bits == pytest.approx(expected[0], rel=0.02)
    assert error / 4.0**log2_spread == pytest.approx(expected[1], rel=0.03)


def test_the_curve_lies_between_the_limit_and_scalar_quantization():
    """Above R(D) of a Gaussian everywhere; from two bits on a tenth of a bit better than the scalar grid's 0.254."""
    for log2_spread in LOG2_SPREADS:
        rate, distortion = measured_rate_distortion(2.0**-log2_spread)
        limit = -0.5 * np.log2(distortion)
        assert rate >= limit - 1e-3
        if rate > 2:
            assert rate - limit < 0.154


def test_far_steps_cost_a_bit_an_octave_or_nothing():
    fine, finer = (measured_rate_distortion(2.0**-x) for x in (6.0, 7.0))
    assert finer[0] - fine[0] == pytest.approx(1.0) and finer[1] / fine[1] == pytest.approx(0.25)
    rate, distortion = measured_rate_distortion(64.0)
    assert rate < 1e-3 and distortion == pytest.approx(1.0)


def test_the_smooth_curves_go_through_the_table():
    found = unit_curves(jnp.asarray(-LOG2_SPREADS, jnp.float32), "trellis")
    expected = np.array([measured_rate_distortion(2.0**-x) for x in LOG2_SPREADS])
    np.testing.assert_allclose(found.rate, expected[:, 0], atol=2e-3)
    np.testing.assert_allclose(found.distortion, expected[:, 1], rtol=1e-2)
