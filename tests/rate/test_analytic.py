"""Operational curves and the analytic proxy against sampled quantization and numeric integration."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from rdopt.config.schema import Density
from rdopt.rate.analytic import (
    analytic_distortion,
    analytic_rate,
    analytic_rate_distortion,
    feedback_steps,
    log2_ratios,
    spreads,
    step_constant,
)
from rdopt.rate.densities import DENSITIES, sample
from rdopt.rate.operational import exact_rate_distortion, high_rate, unit_curves, unit_distortion, unit_rate

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
    x = sample(np.random.default_rng(0), (400_000,), density)
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
    np.testing.assert_allclose(unit_rate(jnp.asarray(at), density), exact[:, 0], atol=5e-6)
    np.testing.assert_allclose(unit_distortion(jnp.asarray(at), density), exact[:, 1], rtol=5e-6)


@every_density
def test_the_slopes_of_the_curves_are_those_of_the_exact_ones(density):
    at = np.array([-9.0, -4.3, -0.51, 0.73, 1.9, 3.1])
    h = 1e-5
    up, down = (np.array([exact_rate_distortion(2.0 ** (t + e), density) for t in at]) for e in (h, -h))
    slope = ((up - down) / (2 * h)).T
    for curve, expected in zip((unit_rate, unit_distortion), slope, strict=True):
        got = jax.grad(lambda t, f=curve: f(t, density).sum())(jnp.asarray(at, jnp.float32))
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@every_density
def test_the_curves_fall_and_rise_and_reach_their_limits_with_finite_gradients(density):
    at = jnp.linspace(-40, 40, 4001)
    curves = unit_curves(at, density)
    assert bool(jnp.all(jnp.diff(curves.rate) <= 1e-6)) and bool(
        jnp.all(jnp.diff(curves.distortion) >= -1e-6)
    )
    fine = at < -6
    limits = high_rate(at, density)
    np.testing.assert_allclose(curves.rate[fine], limits.rate[fine], atol=1e-4)
    np.testing.assert_allclose(curves.distortion[fine], limits.distortion[fine], rtol=2e-3)
    assert float(curves.rate[-1]) == pytest.approx(0, abs=1e-6)
    assert float(curves.distortion[-1]) == pytest.approx(1, abs=1e-6)
    for output in range(2):
        gradient = jax.grad(lambda t, i=output: unit_curves(t, density)[i].sum())(at)
        assert bool(jnp.all(jnp.isfinite(gradient)))


def test_a_gaussian_at_high_rate_is_a_quarter_bit_above_shannon():
    rate, distortion = exact_rate_distortion(2.0**-6, "gaussian")
    assert rate + 0.5 * np.log2(distortion) == pytest.approx(0.5 * np.log2(np.pi * np.e / 6), abs=1e-4)


def rank_one(seed: int, rows: int, cols: int, density: Density) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    spread = np.outer(np.exp(rng.normal(size=rows) * 0.3), np.exp(rng.normal(size=cols) * 0.3))
    return spread * sample(rng, (rows, cols), density), spread


@every_density
def test_the_spreads_of_a_rank_one_model_are_found_and_keep_the_energy(density):
    W, spread = rank_one(0, 1000, 1200, density)
    row, col = spreads(jnp.asarray(W, jnp.float32))
    fitted = np.outer(row, col)
    assert np.mean(fitted**2) == pytest.approx(np.mean(W**2), rel=1e-5)
    assert np.median(np.abs(np.log(fitted / spread))) < 0.1


@every_density
@pytest.mark.parametrize("c", [0.3, 1.5])
def test_the_analytic_rate_and_distortion_are_those_of_rounding_each_entry(density, c):
    W, spread = rank_one(1, 600, 800, density)
    rng = np.random.default_rng(2)
    G, L = rng.uniform(0.5, 2, 600), rng.uniform(0.5, 2, 800)
    steps = feedback_steps(c, jnp.asarray(G, jnp.float32), jnp.asarray(L, jnp.float32))
    a = c / np.outer(np.sqrt(G), L)
    np.testing.assert_allclose(np.outer(*steps), a, rtol=1e-5)
    # brute force: the ideal code length of every index under its own entry's density, and the error it leaves
    codes = np.round(W / a)
    law = SCIPY[density]
    mass = law.cdf((codes + 0.5) * a / spread) - law.cdf((codes - 0.5) * a / spread)
    error = 0.5 * np.sum(np.outer(G, L**2) * (W - codes * a) ** 2)
    weights = jnp.asarray(W, jnp.float32)
    bits, D = analytic_rate_distortion(
        weights, steps, jnp.asarray(G, jnp.float32), jnp.asarray(L, jnp.float32), density
    )
    assert float(bits) / W.size == pytest.approx(-np.mean(np.log2(np.maximum(mass, 1e-30))), abs=0.02)
    assert float(D) == pytest.approx(error, rel=0.02)


def test_rate_and_distortion_agree_with_the_joint_call_and_batch_over_layers():
    W = jnp.asarray(np.random.default_rng(3).normal(size=(2, 6, 8)), jnp.float32)
    G, L = jnp.linspace(1, 2, 12).reshape(2, 6), jnp.linspace(1, 3, 16).reshape(2, 8)
    steps = feedback_steps(0.2, G, L)
    joint = jax.jit(analytic_rate_distortion)
    bits, D = joint(W, steps, G, L)
    np.testing.assert_allclose(jax.jit(analytic_rate)(W, steps), bits, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(analytic_distortion)(W, steps, G, L), D, rtol=1e-6)
    single = joint(W[1], feedback_steps(0.2, G[1], L[1]), G[1], L[1])
    np.testing.assert_allclose([bits[1], D[1]], single, rtol=1e-6)
    assert log2_ratios(W, steps).shape == W.shape


def test_at_high_rate_the_step_of_lambda_minimises_rate_plus_lambda_distortion():
    W = jnp.asarray(np.random.default_rng(4).normal(size=(64, 64)), jnp.float32)
    ones = jnp.ones(64)
    lam = 700.0

    @jax.jit
    def J(c):
        bits, D = analytic_rate_distortion(W, feedback_steps(c, ones, ones), ones, ones)
        return bits / W.size + lam * D

    c = step_constant(lam, W.size)
    values = [float(J(jnp.float32(c * 2.0**e))) for e in (-0.2, 0.0, 0.2)]
    assert values[1] < values[0] and values[1] < values[2]
    _, D = analytic_rate_distortion(W, feedback_steps(c, ones, ones), ones, ones)
    assert float(D) == pytest.approx(1 / (2 * np.log(2) * lam), rel=0.01)


def test_gradients_are_finite_for_dead_rows_tiny_and_huge_weights_and_steps():
    @jax.jit
    def gradients(W, c, share):
        def total(W, G, L):
            bits, D = analytic_rate_distortion(W, feedback_steps(c, G, L), G, L)
            return bits + D * share

        return jax.grad(total, argnums=(0, 1, 2))(W, jnp.ones(5), jnp.ones(6))

    base = np.random.default_rng(5).normal(size=(5, 6))
    base[2], base[:, 3] = 0, 0
    for scale in (0.0, 1e-30, 1e-12, 1.0, 1e12):
        for c in (1e-12, 1.0, 1e12):
            # the squares of huge weights leave float32 by themselves, so the distortion is scaled back
            found = gradients(
                jnp.asarray(base * scale, jnp.float32), jnp.float32(c), 1 / max(scale, 1.0) ** 2
            )
            assert all(bool(jnp.all(jnp.isfinite(gradient))) for gradient in found)
