"""Operational curves and rank-1 spreads against sampled quantization, numeric integration and the real trellis."""

from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from tiny_runs import load_script

from rdopt.config.schema import Density
from rdopt.rate.densities import DENSITIES
from rdopt.rate.operational import (
    LOG2_SPREADS,
    exact_rate_distortion,
    trellis_rate_distortion,
    unit_curves,
)
from rdopt.rate.spreads import marginal_spreads, rank1_power

SCIPY: dict[str, Any] = {
    "gaussian": scipy.stats.norm(),
    "laplace": scipy.stats.laplace(scale=np.sqrt(0.5)),
    "logistic": scipy.stats.logistic(scale=np.sqrt(3) / np.pi),
}
every_density = pytest.mark.parametrize("density", DENSITIES)


def empirical_bits(codes: np.ndarray) -> float:
    _, counts = np.unique(codes, return_counts=True)
    p = counts / counts.sum()
    return float(-np.sum(p * np.log2(p)))


@every_density
@pytest.mark.parametrize("step", [0.3, 1.0, 2.7])
def test_the_exact_curves_are_the_integrals_over_the_bins(density, step):
    law = SCIPY[density]
    k = np.arange(-int(30 / step), int(30 / step) + 1)
    p = law.cdf((k + 0.5) * step) - law.cdf((k - 0.5) * step)
    p = p[p > 0]
    errors = [
        scipy.integrate.quad(lambda x, c=c: (x - c) ** 2 * law.pdf(x), c - step / 2, c + step / 2)[0]
        for c in k * step
    ]
    rate, distortion = exact_rate_distortion(step, density)
    assert rate == pytest.approx(-np.sum(p * np.log2(p)), rel=1e-9)
    assert distortion == pytest.approx(sum(errors), rel=1e-6)


@every_density
def test_the_curves_are_sampled_quantization(density):
    x = SCIPY[density].rvs(400_000, random_state=np.random.default_rng(0))
    at = np.array([-3.0, -1.0, 0.0, 0.7, 1.5, 2.5])
    curves = unit_curves(jnp.asarray(at, jnp.float32), density)
    for step, rate, distortion in zip(2.0**at, curves.rate, curves.distortion, strict=True):
        codes = np.round(x / step)
        assert float(rate) == pytest.approx(empirical_bits(codes), abs=0.004)
        assert float(distortion) == pytest.approx(np.mean((x - codes * step) ** 2), rel=0.01)


@every_density
def test_interpolation_between_the_knots_is_exact_to_float32(density):
    at = np.random.default_rng(1).uniform(-8, 6, 300).astype(np.float32)
    exact = np.array([exact_rate_distortion(2.0 ** float(t), density) for t in at])
    np.testing.assert_allclose(unit_curves(jnp.asarray(at), density).rate, exact[:, 0], atol=5e-6)
    np.testing.assert_allclose(unit_curves(jnp.asarray(at), density).distortion, exact[:, 1], rtol=5e-6)


@every_density
def test_the_slopes_of_the_curves_are_those_of_the_exact_ones(density):
    at = np.array([-9.0, -4.3, -0.51, 0.73, 1.9, 3.1])
    h = 1e-5
    up, down = (np.array([exact_rate_distortion(2.0 ** (t + e), density) for t in at]) for e in (h, -h))
    slope = ((up - down) / (2 * h)).T
    for i, expected in enumerate(slope):
        got = jax.grad(lambda t, i=i: unit_curves(t, density)[i].sum())(jnp.asarray(at, jnp.float32))
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@every_density
def test_the_curves_fall_and_rise_and_reach_their_limits_with_finite_gradients(density):
    at = jnp.linspace(-40, 40, 4001)
    curves = unit_curves(at, density)
    assert bool(jnp.all(jnp.diff(curves.rate) <= 1e-6)) and bool(
        jnp.all(jnp.diff(curves.distortion) >= -1e-6)
    )
    fine = at < -6
    entropy = SCIPY[density].entropy() / np.log(2)
    np.testing.assert_allclose(curves.rate[fine], entropy - at[fine], atol=1e-4)
    np.testing.assert_allclose(curves.distortion[fine], 4.0 ** at[fine] / 12, rtol=2e-3)
    assert float(curves.rate[-1]) == pytest.approx(0, abs=1e-6)
    assert float(curves.distortion[-1]) == pytest.approx(1, abs=1e-6)
    for output in range(2):
        gradient = jax.grad(lambda t, i=output: unit_curves(t, density)[i].sum())(at)
        assert bool(jnp.all(jnp.isfinite(gradient)))


def test_a_gaussian_at_high_rate_is_a_quarter_bit_above_shannon():
    rate, distortion = exact_rate_distortion(2.0**-6, "gaussian")
    assert rate + 0.5 * np.log2(distortion) == pytest.approx(0.5 * np.log2(np.pi * np.e / 6), abs=1e-4)


def test_every_density_of_the_configuration_is_there():
    assert set(DENSITIES) == set(get_args(Density))


# rank-1 spreads


def rank_one(seed, rows, cols, density):
    """(a matrix of independent entries, their spreads)."""
    rng = np.random.default_rng(seed)
    spread = np.outer(np.exp(rng.normal(size=rows) * 0.3), np.exp(rng.normal(size=cols) * 0.3))
    return spread * SCIPY[density].rvs((rows, cols), random_state=rng), spread


@every_density
def test_the_spreads_of_a_rank_one_model_are_found(density):
    W, spread = rank_one(0, 1000, 1200, density)
    fits = np.outer(*marginal_spreads(jnp.asarray(W, jnp.float32))), np.sqrt(rank1_power(jnp.asarray(W, jnp.float32)))
    assert np.mean(fits[0] ** 2) == pytest.approx(np.mean(W**2), rel=1e-5)
    for fitted in fits:
        assert np.median(np.abs(np.log(fitted / spread))) < 0.1


def test_spreads_and_their_gradients_are_finite_for_dead_rows_tiny_and_huge_weights():
    slope = jax.jit(jax.grad(lambda W: sum(jnp.sum(jnp.log2(x)) for x in marginal_spreads(W))))
    base = np.random.default_rng(5).normal(size=(5, 6))
    base[2], base[:, 3] = 0, 0
    for scale in (0.0, 1e-12, 1.0, 1e12):
        W = jnp.asarray(base * scale, jnp.float32)
        assert all(bool(jnp.all(jnp.isfinite(x))) for x in (*marginal_spreads(W), slope(W)))


# the trellis


@pytest.fixture(scope="module")
def tabulate():
    return load_script("tabulate_trellis")


@pytest.mark.parametrize("log2_spread", [-1.0, 0.5, 3.0])
def test_the_table_is_what_the_quantizer_does(tabulate, log2_spread):
    bits, error = tabulate.operational_point(log2_spread, 8, rows=1 << 13, columns=8)
    expected = trellis_rate_distortion(2.0**-log2_spread)
    assert bits == pytest.approx(expected[0], rel=0.02)
    assert error / 4.0**log2_spread == pytest.approx(expected[1], rel=0.03)


def test_the_curve_lies_between_the_limit_and_scalar_quantization():
    """Above R(D) of a Gaussian everywhere; from two bits on a tenth of a bit better than the scalar grid's 0.254."""
    for log2_spread in LOG2_SPREADS:
        rate, distortion = trellis_rate_distortion(2.0**-log2_spread)
        limit = -0.5 * np.log2(distortion)
        assert rate >= limit - 1e-3
        if rate > 2:
            assert rate - limit < 0.154


def test_far_steps_cost_a_bit_an_octave_or_nothing():
    fine, finer = (trellis_rate_distortion(2.0**-x) for x in (6.0, 7.0))
    assert finer[0] - fine[0] == pytest.approx(1.0) and finer[1] / fine[1] == pytest.approx(0.25)
    rate, distortion = trellis_rate_distortion(64.0)
    assert rate < 1e-3 and distortion == pytest.approx(1.0)


def test_the_smooth_curves_go_through_the_table():
    found = unit_curves(jnp.asarray(-LOG2_SPREADS, jnp.float32), "trellis")
    expected = np.array([trellis_rate_distortion(2.0**-x) for x in LOG2_SPREADS])
    np.testing.assert_allclose(found.rate, expected[:, 0], atol=2e-3)
    np.testing.assert_allclose(found.distortion, expected[:, 1], rtol=1e-2)
