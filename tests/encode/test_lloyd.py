"""Claims about entropy-constrained Lloyd-Max grids: both conditions, the gain over the uniform grid, the file."""

from itertools import pairwise

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from tiny_sources import source_of

from rdopt.checkpoint.families import INPUT_OF
from rdopt.codec.coders.bits import BitReader, BitWriter
from rdopt.codec.decoder import decode_model
from rdopt.codec.grids.lloyd import (
    FRACTIONS,
    POOLED,
    LloydLevels,
    lloyd_step,
    lloyd_values,
    read_levels,
    values_of,
    write_levels,
)
from rdopt.codec.grids.steps import dequantize
from rdopt.codec.grids.uniform import UNIFORM_SLOPE
from rdopt.codec.tables.classes import Spreads
from rdopt.codec.tables.frequencies import PRECISION
from rdopt.config.schema import EncodeConfig
from rdopt.encode.feedback import BLOCK, quantize_feedback
from rdopt.encode.lloyd import THRESHOLDS, CellGrid, design, fixed_point, quantize_lloyd, quantize_on_cells
from rdopt.encode.model import encode_at_step
from rdopt.encode.quantize import quantize_model

SPREADS = (0.6, 1.0, 2.0, 5.0)


def density(spread, laplace):
    """The unit-variance blend at a spread, from another library."""
    normal, double = scipy.stats.norm.pdf, scipy.stats.laplace.pdf
    return lambda x: laplace * double(x, scale=spread / np.sqrt(2)) + (1 - laplace) * normal(x, scale=spread)


def integral(f, low, high):
    return scipy.integrate.quad(f, low, high, epsabs=1e-13, epsrel=1e-12)[0]


def rate_and_error(levels, thresholds, spread):
    """Entropy in bits and squared error of a symmetric grid on a Gaussian, by integration of every cell."""
    p, edges = density(spread, 0.0), [0.0, *thresholds, max(20 * spread, thresholds[-1] + 1)]
    mass = np.array([integral(p, a, b) for a, b in pairwise(edges)])
    error = [
        integral(lambda x, r=r: p(x) * (x - r) ** 2, a, b)
        for r, (a, b) in zip(levels, pairwise(edges), strict=True)
    ]
    both = np.concatenate([2 * mass[:1], mass[1:], mass[1:]])
    return -np.sum(both * np.log2(np.maximum(both, 1e-300))), 2 * np.sum(error)


def uniform(size):
    k = np.arange(size, dtype=np.float64)
    return k, k[:-1] + 0.5


# the design


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("laplace", [0.0, 0.25])
def test_levels_are_centroids_of_their_cells(spread, laplace):
    grid, p = fixed_point(spread, laplace), density(spread, laplace)
    edges = [0.0, *grid.thresholds]
    for k in range(1, POOLED):
        mass = integral(p, edges[k], edges[k + 1])
        if mass > 2.0**-PRECISION:
            centroid = integral(lambda x: x * p(x), edges[k], edges[k + 1]) / mass
            np.testing.assert_allclose(grid.levels[k], centroid, atol=1e-6)
    assert grid.levels[0] == 0
    np.testing.assert_allclose(np.diff(grid.levels[POOLED:]), 1.0, atol=1e-12)


@pytest.mark.parametrize("spread", SPREADS)
def test_at_a_threshold_both_levels_cost_the_same(spread):
    (levels, thresholds), p = fixed_point(spread), density(spread, 0.0)
    edges = [0.0, *thresholds]
    mass = np.array([(1 + (k == 0)) * integral(p, edges[k], edges[k + 1]) for k in range(POOLED + 2)])
    bits = -np.log2(mass + 2.0**-PRECISION)
    for k, t in enumerate(thresholds[: POOLED + 1]):
        if k < t < k + 0.999:
            cost = [(t - levels[i]) ** 2 + UNIFORM_SLOPE * bits[i] for i in (k, k + 1)]
            np.testing.assert_allclose(*cost, atol=1e-6)


@pytest.mark.parametrize("spread", SPREADS)
def test_the_fixed_point_has_less_error_and_rate_than_the_uniform_grid(spread):
    grid = fixed_point(spread)
    ours, plain = rate_and_error(*grid, spread), rate_and_error(*uniform(len(grid.levels)), spread)
    assert ours[0] + ours[1] / UNIFORM_SLOPE < plain[0] + plain[1] / UNIFORM_SLOPE


@pytest.mark.parametrize("spread", [0.6, 1.0, 2.0])
def test_at_equal_entropy_the_error_is_below_the_uniform_grids(spread):
    rate, error = rate_and_error(*fixed_point(spread), spread)

    k, t = uniform(40)
    steps = np.linspace(0.9, 1.8, 10)
    rates, errors = zip(*(rate_and_error(s * k, s * t, spread) for s in steps), strict=True)
    assert rates[0] > rate > rates[-1]
    assert error < np.interp(-rate, -np.array(rates), errors)


def test_the_grid_becomes_uniform_as_the_spread_grows():
    far = [np.abs(fixed_point(s).levels[1:6] - np.arange(1, 6)).max() for s in (0.7, 1.4, 4.0)]
    assert far[0] > far[1] > far[2] and far[2] < 0.03
    assert not design(8.0, 0.0, 1.0).offsets.any()


@given(st.floats(0.05, 20.0), st.integers(0, 7), st.floats(0.0, 2.0))
def test_thresholds_ascend_and_levels_stay_near_their_place(spread, blend, weight):
    cell = design(spread, blend / 8, weight)
    assert np.all(np.diff(cell.thresholds) >= 0) and cell.thresholds[0] > 0
    assert cell.offsets[0] == 0 and np.abs(cell.offsets).max() <= 2 * FRACTIONS


@given(st.floats(0.05, 20.0), st.integers(0, 7))
def test_without_weight_the_grid_is_uniform(spread, blend):
    cell = design(spread, blend / 8, 0.0)
    np.testing.assert_array_equal(cell.thresholds, np.arange(THRESHOLDS) + 0.5)
    assert not cell.offsets.any()


# quantization


def problem(rows, width, seed=0, c=0.3, spread=1.0):
    """(W, L, row steps, column steps)."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4 * width, width)) @ rng.standard_normal((width, width))
    L = np.linalg.cholesky(x.T @ x / (4 * width) + 0.1 * np.eye(width))
    W = (spread * rng.standard_normal((rows, width))).astype(np.float32)
    return W, L, np.exp(0.5 * rng.standard_normal(rows)), c / np.diagonal(L)


@given(width=st.sampled_from([1, 2, BLOCK - 1, BLOCK + 1, 2 * BLOCK + 3]), rows=st.integers(1, 6))
def test_on_uniform_cells_it_is_plain_feedback(width, rows):
    args = problem(rows, width, seed=width + rows)
    flat = [design(1.0, 0.0, 0.0), design(9.0, 0.0, 1.0)]
    cell = np.random.default_rng(0).integers(0, 2, (rows, width))
    np.testing.assert_array_equal(quantize_on_cells(*args, cell, flat), quantize_feedback(*args))


@given(width=st.sampled_from([1, 5, BLOCK + 1]), seed=st.integers(0, 9))
def test_blocked_feedback_is_the_textbook_loop_with_these_levels(width, seed):
    W, L, row, col = problem(4, width, seed, c=3.0, spread=0.5)
    cells = [design(s, 0.0, 1.0) for s in (0.5, 1.0, 2.0)]
    cell = np.random.default_rng(seed).integers(0, 3, W.shape)
    offsets = np.stack([x.offsets for x in cells])
    z, E = np.zeros(W.shape, np.int64), np.zeros(W.shape)
    for j in reversed(range(width)):
        target = W[:, j] + sum(E[:, i] * L[i, j] / L[j, j] for i in range(j + 1, width))
        x = target / (row * col[j])
        steps = [np.searchsorted(cells[a].thresholds, abs(v), side="right") for a, v in zip(cell[:, j], x, strict=True)]
        z[:, j] = np.sign(x) * steps
        values = values_of(z[:, j : j + 1], cell[:, j : j + 1], offsets)[:, 0] / FRACTIONS
        E[:, j] = W[:, j] - row * col[j] * values
    assert np.abs(z).max() < THRESHOLDS  # the tail's rule has a test of its own
    np.testing.assert_array_equal(quantize_on_cells(W, L, row, col, cell, cells), z)


def test_beyond_the_tabulated_thresholds_indices_continue_without_a_jump():
    cell = CellGrid(np.arange(THRESHOLDS) + 0.75, np.zeros(POOLED + 1, np.int32))
    W = np.linspace(10, 40, 301, dtype=np.float32)[:, None] + np.float32(0.01)
    one = np.ones(1)
    z = quantize_on_cells(W, np.eye(1), np.ones(301), one, np.zeros(W.shape, np.int64), [cell])
    np.testing.assert_array_equal(z, np.floor(W + 0.25))


# the file


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("c", [0.005, 0.05])
def test_a_decoded_model_is_the_one_that_was_quantized(tiny_llama, family, c):
    encode = EncodeConfig(grid="lloyd", rdo=1.0)
    source = source_of(tiny_llama(family), encode)
    model = quantize_lloyd(source.blocks(), source.grid, c, encode)
    encoded = encode_at_step(source, c, encode)
    decoded = decode_model(encoded.data)
    estimated, real = (encoded.bpw_estimated, encoded.bpw)
    assert abs(estimated / real - 1) < 0.05  # a tiny model: whole words of every matrix weigh
    assert np.any(model.levels.offsets)
    for (key, z), spreads in zip(model.indices.items(), model.plan.spreads, strict=True):
        np.testing.assert_array_equal(decoded.indices[key], z)
        values = lloyd_values(z, spreads, model.plan.precision, model.levels)
        rows, cols = source.grid.rows[key], source.grid.cols[key[0], INPUT_OF[key[1]]]
        W = decoded.tensors[source.arch.tensor_name(*key)]
        np.testing.assert_array_equal(W, dequantize(values, rows, cols, lloyd_step(c)))


def test_a_weight_of_zero_gives_the_feedback_grids_model(tiny_llama):
    encode = EncodeConfig(grid="lloyd", rdo=0.0)
    source = source_of(tiny_llama(), encode)
    decoded = decode_model(encode_at_step(source, 0.02, encode).data)
    for key, z in quantize_model(source.blocks(), source.grid, 0.02, EncodeConfig(grid="feedback")).items():
        np.testing.assert_array_equal(decoded.indices[key], z)
        rows, cols = source.grid.rows[key], source.grid.cols[key[0], INPUT_OF[key[1]]]
        np.testing.assert_array_equal(decoded.tensors[decoded.arch.tensor_name(*key)], dequantize(z, rows, cols, 0.02))


def test_the_bytes_do_not_depend_on_the_threads_and_progress_counts_both_passes(tiny_llama):
    source = source_of(tiny_llama(), EncodeConfig(grid="lloyd"))
    ticks = []
    found = [
        encode_at_step(source, 0.02, EncodeConfig(grid="lloyd", threads=n), lambda *x: ticks.append(x)).data
        for n in (1, 3)
    ]
    assert found[0] == found[1]
    total = 2 * len(source.grid.rows)
    assert ticks == [(i, total) for i in range(1, total + 1)] * 2


def gammas(values):
    out = BitWriter()
    out.gammas(values)
    return BitReader(out.bytes())


@given(st.integers(-40, 40), st.lists(st.lists(st.integers(-64, 64), min_size=POOLED, max_size=POOLED), max_size=5))
def test_levels_survive_the_file(low, offsets):
    table = np.zeros((len(offsets), POOLED + 1), np.int32)
    table[:, 1:] = np.reshape(offsets, (-1, POOLED))
    found = read_levels(gammas(write_levels(LloydLevels(low, table))))
    assert found.low == low
    np.testing.assert_array_equal(found.offsets, table)


@pytest.mark.parametrize("numbers", [(0, 1 << 20), (0, 2, 1, 1, 1, 1), (0, 1, 1000, 0, 0, 0)])
def test_damaged_levels_are_refused(numbers):
    with pytest.raises(ValueError, match=r"cells of levels|before its last|an offset of"):
        read_levels(gammas(numbers))


def test_a_spread_without_levels_is_refused():
    z, spreads = np.zeros((1, 1), np.int32), Spreads(np.full(1, 3, np.int32), np.zeros(1, np.int32))
    with pytest.raises(ValueError, match="without levels"):
        lloyd_values(z, spreads, 4, LloydLevels(0, np.zeros((2, POOLED + 1), np.int32)))
