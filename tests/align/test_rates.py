"""The sampled and sparse rates of training: units, starting point, parameters."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from conftest import tiny_config

from rdopt.align.alignment import Alignment, Start, single_precision
from rdopt.align.coordinates import ErrorMetric, OutputDamping, diagonal_metric
from rdopt.align.objective import Settings, rate_bits
from rdopt.align.relaxation import analytic_distortion, relax
from rdopt.checkpoint.families import MATRICES, architecture_from_config, block_shapes
from rdopt.transforms.gauges.coordinates import Gauges

ARCH = architecture_from_config(tiny_config("llama"))
SETTINGS = Settings(
    arch=ARCH,
    rate="analytic",
    density="gaussian",
    curve="gaussian",
    distortion="matrix",
    feedback=False,
    damping=0.02,
    outputs=OutputDamping(0.02, None),
    weights=200 * 96,
)


@pytest.fixture(scope="module")
def relaxed():
    rng = np.random.default_rng(0)
    W = (rng.standard_normal((200, 96)) * np.exp(rng.standard_normal(96))).astype(np.float32)
    rows, cols = (diagonal_metric(jnp.ones(n), 0.0) for n in W.shape)
    return relax(jnp.asarray(W), rows, cols, jnp.float32(0.2), "gaussian")


SCIPY = {
    "gaussian": scipy.stats.norm(),
    "laplace": scipy.stats.laplace(scale=np.sqrt(0.5)),
    "logistic": scipy.stats.logistic(scale=np.sqrt(3) / np.pi),
}


@pytest.mark.parametrize("density", SCIPY)
@pytest.mark.parametrize("c", [0.3, 1.5])
def test_the_analytic_rate_and_distortion_are_those_of_rounding_each_entry(density, c):
    """The ideal code length of every index under its own entry's density, and the error that it leaves."""
    rng, law = np.random.default_rng(1), SCIPY[density]
    spread = np.outer(np.exp(0.3 * rng.normal(size=600)), np.exp(0.3 * rng.normal(size=800)))
    W = spread * law.rvs(spread.shape, random_state=rng)
    G, L = rng.uniform(0.5, 2, 600), rng.uniform(0.5, 2, 800)
    a = c / np.outer(np.sqrt(G), L)
    codes = np.round(W / a)
    mass = law.cdf((codes + 0.5) * a / spread) - law.cdf((codes - 0.5) * a / spread)
    rows, cols = (ErrorMetric(jnp.asarray(x, jnp.float32)) for x in (np.sqrt(G), L))
    relaxed = relax(jnp.asarray(W, jnp.float32), rows, cols, jnp.float32(c), density)
    assert float(jnp.mean(relaxed.rate)) == pytest.approx(-np.mean(np.log2(np.maximum(mass, 1e-30))), abs=0.02)
    error = 0.5 * np.sum(np.outer(G, L**2) * (W - codes * a) ** 2)
    assert float(analytic_distortion(relaxed, jnp.float32(c))) == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize("rate", ["noise", "ste"])
def test_sampled_rates_start_at_the_entropy_of_gaussian_columns(relaxed, rate):
    expected = float(rate_bits(relaxed, None, jax.random.key(0), 0.0, SETTINGS))
    found = rate_bits(relaxed, jnp.zeros(96), jax.random.key(0), 0.5, replace(SETTINGS, rate=rate))
    assert float(found) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("rate", ["noise", "ste"])
def test_a_wrong_spread_costs_bits(relaxed, rate):
    settings = replace(SETTINGS, rate=rate)
    right, wide, narrow = (
        float(rate_bits(relaxed, jnp.full(96, x), jax.random.key(0), 0.5, settings)) for x in (0.0, 1.0, -1.0)
    )
    assert right < wide and right < narrow


def test_sparse_rates_fall_when_weights_shrink(relaxed):
    small = relaxed._replace(codes=relaxed.codes / 2)
    for rate in ("l1", "log"):
        settings = replace(SETTINGS, rate=rate)
        key = jax.random.key(0)
        assert float(rate_bits(small, None, key, 0.5, settings)) < float(rate_bits(relaxed, None, key, 0.5, settings))


@pytest.mark.parametrize("rate", ["analytic", "noise", "ste", "l1", "log"])
def test_only_sampled_rates_learn_a_spread_per_column(rate):
    module = Alignment(arch=ARCH, sites=("residual", "value"), rate=rate)
    start = Start(single_precision(Gauges(), ARCH))
    params = module.init(jax.random.key(0), start)["params"]
    spreads = {k for k in params if k.startswith("log_scale_")}
    assert spreads == ({f"log_scale_{k}" for k in MATRICES} if rate in ("noise", "annealed", "ste") else set())
    out: Any = module.apply({"params": params}, start)
    found = out.log_scale
    shapes = block_shapes(ARCH)
    assert {k: v.shape for k, v in found.items()} == {
        k: (ARCH.num_layers, shapes[k][1]) for k in (MATRICES if spreads else ())
    }
