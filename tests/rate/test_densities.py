"""Bin masses and the relaxed proxies: right against scipy in float64, finite at every extreme in float32."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats

from rdopt.rate.densities import DENSITIES, log_bin_mass, lower_bound
from rdopt.rate.relaxed import (
    add_noise,
    bits,
    l1_proxy,
    log_proxy,
    noise_rate,
    round_straight_through,
    straight_through_rate,
)

SCIPY: dict[str, Any] = {
    "gaussian": scipy.stats.norm(),
    "laplace": scipy.stats.laplace(scale=np.sqrt(0.5)),
    "logistic": scipy.stats.logistic(scale=np.sqrt(3) / np.pi),
}
every_density = pytest.mark.parametrize("density", DENSITIES)


def log_mass_float64(x: np.ndarray, step: np.ndarray, density: str) -> np.ndarray:
    """The better-conditioned of a difference of upper tails and a second-order expansion."""
    c, h = np.abs(x), step / 2
    high, low = SCIPY[density].logsf(c + h), SCIPY[density].logsf(c - h)
    with np.errstate(divide="ignore"):
        difference = low + np.log(-np.expm1(high - low))
    smooth = SCIPY[density].logpdf(c) + np.log(step) + h * h * (c * c - 1) / 6
    narrow = (h * (1 + c) < 1e-3) & (c > h) if density != "gaussian" else h * (1 + c) < 1e-3
    return np.where(narrow, smooth, difference)


def bin_mass(x, step, scale, density):
    """The probability of the bin around x."""
    return jnp.exp(log_bin_mass(x, step, scale, density))


def draws(seed, shape, density):
    """Of the density, float64."""
    return SCIPY[density].rvs(shape, random_state=np.random.default_rng(seed))


@every_density
def test_the_upper_tail_is_scipys_and_of_unit_variance(density):
    t = np.linspace(0, 9, 40)
    mass, moment = DENSITIES[density].tail(t)
    np.testing.assert_allclose(mass, SCIPY[density].sf(t), rtol=1e-9)
    np.testing.assert_allclose(moment[::8], [scipy.integrate.quad(lambda x: x * SCIPY[density].pdf(x), u, np.inf)[0]
                                             for u in t[::8]], rtol=1e-6)  # fmt: skip
    assert SCIPY[density].var() == pytest.approx(1)


@every_density
def test_the_bin_mass_is_scipys_in_float64_from_the_peak_to_the_tails(density):
    rng = np.random.default_rng(1)
    x = np.r_[0, 10.0 ** rng.uniform(-3, 2, 20000)].astype(np.float32)
    step = (10.0 ** rng.uniform(-3, 1.5, x.size)).astype(np.float32)
    got = jax.jit(log_bin_mass, static_argnums=3)(jnp.asarray(x), jnp.asarray(step), 1.0, density)
    expected = log_mass_float64(x.astype(np.float64), step.astype(np.float64), density)
    np.testing.assert_allclose(got, expected, rtol=3e-6, atol=1e-5)


@every_density
def test_the_bin_mass_is_the_integral_of_the_density(density):
    x, step, scale = np.array([[0.3, -1.7, 0.0], [0.5, 1.1, 3.0], [2.0, 0.8, 1.0]])
    pdf = SCIPY[density].pdf
    mass = [
        scipy.integrate.quad(lambda t, s=s: pdf(t / s) / s, a - d / 2, a + d / 2)[0]
        for a, d, s in zip(x, step, scale, strict=True)
    ]
    np.testing.assert_allclose(bin_mass(jnp.asarray(x, jnp.float32), step, scale, density), mass, rtol=1e-5)


@every_density
def test_the_bin_masses_of_a_grid_sum_to_one(density):
    grid = jnp.arange(-300, 301, dtype=jnp.float32) * 0.25
    assert float(bin_mass(grid, 0.25, 1.3, density).sum()) == pytest.approx(1, abs=1e-5)


@every_density
def test_gradients_of_the_bits_match_finite_differences_in_float64(density):
    x, scale, h = np.array([0.05, 0.4, 1.3, 2.6, 7.0]), 0.7, 1e-5
    step = 0.45

    def exact(x, step, scale):
        return -log_mass_float64(x / scale, np.full_like(x, step / scale), density) / np.log(2)

    def total(x, step, scale):
        return bits(x[None], step, scale, density, floor=1e-37).sum()

    grads = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(
        jnp.asarray(x, jnp.float32), jnp.float32(step), jnp.float32(scale)
    )
    dx = (exact(x + h, step, scale) - exact(x - h, step, scale)) / (2 * h)
    np.testing.assert_allclose(grads[0], dx, rtol=1e-3, atol=1e-4)
    dstep = np.sum(exact(x, step + h, scale) - exact(x, step - h, scale)) / (2 * h)
    dscale = np.sum(exact(x, step, scale + h) - exact(x, step, scale - h)) / (2 * h)
    np.testing.assert_allclose([grads[1], grads[2]], [dstep, dscale], rtol=1e-3)


@every_density
def test_bits_and_gradients_are_finite_at_every_extreme_of_float32(density):
    points = np.meshgrid(
        [0, 1e-20, -1e-3, 0.5, -30, 1e6, 1e30], 10.0 ** np.arange(-12, 13, 4), 10.0 ** np.arange(-30, 13, 6)
    )
    x, step, scale = (jnp.asarray(p.reshape(1, -1), jnp.float32) for p in points)
    total = lambda x, step, scale: bits(x, step, scale, density).sum()  # noqa: E731
    values = jax.jit(bits, static_argnums=3)(x, step, scale, density)
    gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(x, step, scale)
    assert bool(jnp.all((values >= 0) & (values <= 30)))
    for gradient in gradients:
        assert bool(jnp.all(jnp.isfinite(gradient)))


@every_density
def test_an_outlier_at_the_floor_still_pulls_its_scale_up(density):
    slope = jax.jit(jax.grad(lambda scale: bits(jnp.full((1, 1), 5e4), 1.0, scale, density)[0, 0]))
    assert float(slope(jnp.float32(1.0))) < 0


def test_lower_bound_passes_the_gradient_that_leads_back_and_stops_the_other():
    x, sign = jnp.array([0.5, 0.5, 2.0, 2.0]), jnp.array([-1.0, 1.0, -1.0, 1.0])
    slope: Any = jax.grad(lambda x: jnp.sum(sign * lower_bound(x, jnp.ones(4))))
    assert slope(x).tolist() == [-1, 0, -1, 1]


@every_density
def test_noise_and_rounding_cost_the_entropy_of_the_quantized_weights(density):
    W = draws(2, (400, 500), density)
    step = 0.5
    _, counts = np.unique(np.round(W / step), return_counts=True)
    p = counts / counts.sum()
    empirical = -np.sum(p * np.log2(p))
    weights = jnp.asarray(W, jnp.float32)
    hard = straight_through_rate(weights, step, jnp.ones((1, 500)), density).mean()
    soft = noise_rate(weights, step, jnp.ones((1, 500)), jax.random.key(0), density).mean()
    assert float(hard) == pytest.approx(empirical, abs=0.005)
    assert float(soft) == pytest.approx(empirical, abs=0.03)


@every_density
def test_the_learned_scale_of_a_column_is_least_at_its_standard_deviation(density):
    true = np.array([[0.2, 1.0, 5.0]])
    W = jnp.asarray(true * draws(3, (20000, 3), density), jnp.float32)
    slope = jax.jit(
        jax.grad(lambda log_scale: noise_rate(W, 0.02, jnp.exp(log_scale), jax.random.key(1), density).mean())
    )
    low = slope(jnp.log(jnp.asarray(true * 0.9, jnp.float32)))
    high = slope(jnp.log(jnp.asarray(true * 1.1, jnp.float32)))
    assert bool(jnp.all(low < 0)) and bool(jnp.all(high > 0))


def test_rounding_is_exact_forward_and_the_identity_backward():
    W = jnp.asarray(np.random.default_rng(4).normal(size=(3, 7)) * 10, jnp.float32)
    step = jnp.float32(0.3)
    np.testing.assert_allclose(
        round_straight_through(W, step), 0.3 * np.round(np.asarray(W) / 0.3), atol=1e-5
    )
    np.testing.assert_array_equal(jax.grad(lambda W: round_straight_through(W, step).sum())(W), 1.0)
    assert float(round_straight_through(jnp.full((1, 1), 1e30), 1e-30)[0, 0]) == pytest.approx(1e30)


def test_noise_fills_the_bin_uniformly():
    noise = np.asarray(add_noise(jnp.zeros((100, 100)), 0.4, jax.random.key(0))).ravel()
    assert scipy.stats.kstest(noise, "uniform", (-0.2, 0.4)).pvalue > 1e-3


def test_the_l1_proxy_is_the_laplace_code_length_at_high_rate():
    W = jnp.asarray(draws(5, (300, 300), "laplace"), jnp.float32)
    step = 2.0**-5
    assert float(l1_proxy(W, step, 1.0).mean()) == pytest.approx(np.log2(np.e * np.sqrt(2)) + 5, abs=0.02)
    gradient = np.asarray(jax.grad(lambda W: l1_proxy(W, step, 1.0).sum())(W))
    np.testing.assert_allclose(gradient, np.sign(W) * np.abs(gradient).max(), rtol=1e-5)


def test_the_log_proxy_counts_the_binary_digits_of_the_index_and_has_finite_gradients():
    W = jnp.asarray([[0.0, 1.0, 3.0, 7.0, -7.0]])
    np.testing.assert_allclose(log_proxy(W, 1.0), [[0, 1, 2, 3, 3]], atol=1e-6)
    for proxy in (partial(l1_proxy, scale=1.0), log_proxy):
        values = jnp.asarray([[0.0, 1e-30, 1e30, -5.0]])
        for step in (1e-20, 1.0, 1e20):
            assert bool(jnp.all(jnp.isfinite(jax.grad(lambda W, f=proxy, s=step: f(W, s).sum())(values))))
            assert bool(jnp.all(proxy(values, step) >= 0))
