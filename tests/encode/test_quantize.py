"""Claims about grids, steps and feedback: textbook loops, closed forms and a minimiser as oracles."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tiny_sources import blocks_of, stacked_distortion

from rdopt.calibration.moments import Moments
from rdopt.checkpoint.families import INPUT_OF, MATRICES, coded_matrices
from rdopt.codec.grids.steps import damped_cholesky, damped_weights, dequantize, exp_steps
from rdopt.codec.grids.uniform import round_dead_zone
from rdopt.config.errors import UserError
from rdopt.config.schema import EncodeConfig
from rdopt.encode.feedback import BLOCK, quantize_feedback, quantize_rounding
from rdopt.encode.quantize import make_grid, metric_of, quantize_model
from rdopt.rate.steps import base_step, lam_of_base_step

WIDTHS = {"attn": 20, "o": 12, "mlp": 20, "down": 70}
FEEDBACK = EncodeConfig(grid="feedback")
HEIGHTS = {"q": 12, "k": 6, "v": 6, "o": 20, "gate": 70, "up": 70, "down": 20}


def second_moment(rng, n):
    """A full-rank second moment with a spread spectrum, as activations have."""
    x = rng.standard_normal((4 * n, n)) * np.exp(rng.standard_normal(n))
    x = x @ np.linalg.qr(rng.standard_normal((n, n)))[0]
    return x.T @ x / (4 * n)


def problem(rows, width, seed=0, c=0.3):
    """(W, L, row steps, column steps) with column steps c / L_jj."""
    rng = np.random.default_rng(seed)
    L = np.linalg.cholesky(second_moment(rng, width))
    W = rng.standard_normal((rows, width)).astype(np.float32)
    return W, L, np.exp(0.5 * rng.standard_normal(rows)), c / np.diagonal(L)


def textbook(W, L, row, col):
    """GPTQ in LDLQ form: column j is rounded after it took L_ij / L_jj of every later error i."""
    W = np.asarray(W, np.float64)
    z, E = np.zeros(W.shape), np.zeros(W.shape)
    for j in reversed(range(W.shape[1])):
        target = W[:, j] + sum(E[:, i] * L[i, j] / L[j, j] for i in range(j + 1, W.shape[1]))
        z[:, j] = np.rint(target / (row * col[j]))
        E[:, j] = W[:, j] - row * col[j] * z[:, j]
    return z


@given(width=st.sampled_from([1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3]), rows=st.integers(1, 6))
def test_blocked_feedback_is_the_textbook_loop_for_any_width(width, rows):
    W, L, row, col = problem(rows, width, seed=width + rows)
    z = quantize_feedback(W, L, row, col)
    assert z.dtype == np.int32
    np.testing.assert_array_equal(z, textbook(W, L, row, col))


@given(width=st.sampled_from([1, 7, BLOCK + 9]), dead_zone=st.sampled_from([0.0, 0.1, 0.3]))
def test_feedback_with_white_inputs_is_plain_rounding(width, dead_zone):
    W, _, row, col = problem(5, width)
    z = quantize_feedback(W, np.eye(width), row, col, dead_zone)
    np.testing.assert_array_equal(z, quantize_rounding(W, row, col, dead_zone))


def test_feedback_loses_to_rounding_on_weight_error_and_wins_on_output_error():
    W, L, row, col = problem(40, 96)
    errors = {
        kind: W - np.outer(row, col) * z
        for kind, z in (
            ("feedback", quantize_feedback(W, L, row, col)),
            ("rounding", quantize_rounding(W, row, col)),
        )
    }
    assert np.sum(errors["feedback"] ** 2) > 1.05 * np.sum(errors["rounding"] ** 2)
    assert np.sum((errors["feedback"] @ L) ** 2) < 0.7 * np.sum((errors["rounding"] @ L) ** 2)


def test_output_errors_of_feedback_are_uniform_within_half_a_step():
    c = 0.05
    W, L, row, col = problem(64, 2 * BLOCK, c=c)
    output = (W - np.outer(row, col) * quantize_feedback(W, L, row, col)) @ L / row[:, None]
    assert np.abs(output).max() <= c / 2 * (1 + 1e-6)
    assert output.var() == pytest.approx(c**2 / 12, rel=0.05)
    assert scipy.stats.kstest(output.ravel() / c + 0.5, "uniform").pvalue > 0.01
    covariance = output.T @ output / len(output)
    np.testing.assert_allclose(np.diagonal(covariance), c**2 / 12, rtol=0.6)
    assert np.abs(covariance - np.diag(np.diagonal(covariance))).mean() < 0.15 * c**2 / 12


@given(
    x=hnp.arrays(np.float64, st.integers(0, 20), elements=st.floats(-1e6, 1e6)),
    dead_zone=st.sampled_from([0.0, 0.1, 0.5]),
)
def test_the_dead_zone_empties_small_entries_and_rounds_the_others(x, dead_zone):
    z = round_dead_zone(x, dead_zone)
    assert z.dtype == np.int32
    for value, index in zip(x.tolist(), z.tolist(), strict=True):
        if abs(value) < 0.5 + dead_zone:
            assert index == 0
        else:
            assert index != 0 and index * value > 0
            assert abs(index - value) <= 0.5


def test_a_wider_dead_zone_makes_more_zeros():
    W, L, row, col = problem(30, 70)
    zeros = [np.mean(quantize_feedback(W, L, row, col, d) == 0) for d in (0.0, 0.15, 0.3, 0.5)]
    assert zeros == sorted(zeros) and zeros[-1] > 1.2 * zeros[0]


@given(lam=st.floats(1e-2, 1e5), weights=st.integers(1, 10**12))
def test_the_base_step_is_stationary_for_the_cost_at_high_rate(lam, weights):
    """R = -log2 c + const, D = N c^2 / 24: the derivative of R + lam D vanishes, and it is a float32."""
    c = base_step(lam, weights)
    assert np.float32(c) == c
    assert -1 / (c * np.log(2)) + lam * weights * c / 12 == pytest.approx(0, abs=2e-6 / c)
    assert lam_of_base_step(c, weights) == pytest.approx(lam, rel=1e-6)


def test_the_base_step_minimises_the_cost():
    lam, weights = 50.0, 10_000
    found = scipy.optimize.minimize_scalar(
        lambda log2_c: -log2_c + lam * weights * 4**log2_c / 24, bounds=(-20, 5), method="bounded"
    )
    assert base_step(lam, weights) == pytest.approx(2**found.x, rel=1e-4)
    assert weights * base_step(lam, weights) ** 2 / 24 == pytest.approx(1 / (2 * np.log(2) * lam))


@given(n=st.integers(1, 12), damping=st.floats(1e-4, 1.0))
def test_the_damped_factor_squares_to_the_moment_plus_a_share_of_its_mean_diagonal(n, damping):
    sigma = second_moment(np.random.default_rng(n), n)
    L = damped_cholesky(sigma, damping)
    expected = sigma + damping * np.mean(np.diagonal(sigma)) * np.eye(n)
    np.testing.assert_allclose(L @ L.T, expected, rtol=1e-10, atol=1e-12 * np.trace(sigma))
    np.testing.assert_array_equal(L, np.tril(L))


def test_empty_directions_without_damping_are_a_user_error():
    with pytest.raises(UserError, match=r"encode\.damping is 0; raise it"):
        damped_cholesky(np.diag([1.0, 0.0]), 0.0)
    with pytest.raises(UserError, match=r"encode\.damping is 0; raise it"):
        damped_weights(np.array([1.0, 0.0]), 0.0)


def test_moments_that_vanish_give_unit_steps():
    np.testing.assert_array_equal(damped_cholesky(np.zeros((3, 3)), 0.02), np.eye(3))
    np.testing.assert_array_equal(damped_weights(np.zeros(3), 0.02), np.ones(3))


sensitivities = hnp.arrays(np.float64, 5, elements=st.just(0.0) | st.floats(1e-12, 1e6)).filter(np.any)


@given(g=sensitivities, damping=st.floats(1e-3, 1.0))
def test_damped_sensitivities_keep_every_row_finite(g, damping):
    found = damped_weights(g, damping)
    np.testing.assert_allclose(found, g + damping * g.mean())
    assert np.isfinite(1 / np.sqrt(found)).all()


# models


def model_and_moments(seed=0, layers=2):
    rng = np.random.default_rng(seed)
    shapes = {name: (HEIGHTS[name], WIDTHS[INPUT_OF[name]]) for name in MATRICES}
    blocks = {k: rng.standard_normal((layers, *s)).astype(np.float32) for k, s in shapes.items()}
    sigma = {k: np.stack([second_moment(rng, n) for _ in range(layers)]) for k, n in WIDTHS.items()}
    G = {}
    for name, n in HEIGHTS.items():
        full = np.stack([second_moment(rng, n) for _ in range(layers)])
        G[name] = full if name != "gate" else np.stack([np.diagonal(x) for x in full])
    return {"blocks": blocks}, Moments(sigma, G, 100)


@pytest.mark.parametrize("grid", ["feedback", "round"])
def test_steps_are_the_inverse_root_weights_to_an_eighth_octave(grid):
    _, moments = model_and_moments()
    found = make_grid(blocks_of(moments), EncodeConfig(grid=grid))
    for layer, block in enumerate(blocks_of(moments)):
        for group, L in metric_of(block, EncodeConfig(grid=grid)).L.items():
            weight = np.diagonal(L) if grid == "feedback" else np.sqrt(np.diagonal(L @ L.T))
            octaves = np.log2(exp_steps(found.cols[layer, group]) * weight)
            assert np.abs(octaves).max() <= 0.125 + 1e-6
    for layer, name in coded_matrices(2):
        G = moments.G[name][layer]
        g = G if G.ndim == 1 else np.diagonal(G)
        octaves = np.log2(exp_steps(found.rows[layer, name]) * np.sqrt(g + 0.02 * g.mean()))
        assert np.abs(octaves).max() <= 0.125 + 1e-6


def test_steps_of_the_trellis_are_the_inverse_pivots_of_both_metrics_to_an_eighth_octave():
    _, moments = model_and_moments()
    encode = EncodeConfig(output_damping=0.1)
    found = make_grid(blocks_of(moments), encode)
    assert found.two_sided == {key for key in coded_matrices(2) if key[1] != "gate"}
    metrics = [metric_of(block, encode) for block in blocks_of(moments)]
    for layer, name in found.two_sided:
        G, M = moments.G[name][layer], metrics[layer].M[name]
        np.testing.assert_allclose(M @ M.T, G + 0.1 * np.mean(np.diagonal(G)) * np.eye(len(G)))
        octaves = np.log2(exp_steps(found.rows[layer, name]) * np.diagonal(M))
        assert np.abs(octaves).max() <= 0.125 + 1e-6
    diagonal = make_grid(blocks_of(moments), EncodeConfig(output="diagonal"))
    assert not diagonal.two_sided
    scalar = make_grid(blocks_of(moments), FEEDBACK)
    for key in coded_matrices(2):
        np.testing.assert_array_equal(diagonal.rows[key], scalar.rows[key])


@pytest.mark.parametrize("grid", ["feedback", "round"])
def test_the_indices_of_a_model_are_those_of_its_matrices_for_any_number_of_threads(grid):
    params, moments = model_and_moments()
    found = make_grid(blocks_of(moments), EncodeConfig(grid=grid))
    c, seen = 0.2, []
    blocks = blocks_of(moments, params)
    one = quantize_model(blocks, found, c, EncodeConfig(grid=grid, threads=1), lambda *x: seen.append(x))
    four = quantize_model(blocks, found, c, EncodeConfig(grid=grid, threads=4))
    assert list(one) == list(coded_matrices(2)) and seen[-1] == (14, 14)
    for (layer, name), z in one.items():
        np.testing.assert_array_equal(z, four[layer, name])
        row, col = exp_steps(found.rows[layer, name]), c * exp_steps(found.cols[layer, INPUT_OF[name]])
        W, L = params["blocks"][name][layer], metric_of(blocks[layer], EncodeConfig(grid=grid)).L[INPUT_OF[name]]
        expected = textbook(W, L, row.astype(float), col.astype(float)) if grid == "feedback" else None
        if expected is None:
            expected = np.rint(W / np.outer(row, col).astype(float))
        assert np.mean(z != expected) < 1e-3  # products of steps in float32 here


def test_indices_beyond_16_bit_are_kept():
    params, moments = model_and_moments()
    grid = make_grid(blocks_of(moments), EncodeConfig(grid="round"))
    c = 1e-6
    found = quantize_model(blocks_of(moments, params), grid, c, EncodeConfig(grid="round"))
    assert max(int(np.abs(z).max()) for z in found.values()) > 2**15
    for (layer, name), z in found.items():
        W = dequantize(z, grid.rows[layer, name], grid.cols[layer, INPUT_OF[name]], c)
        np.testing.assert_allclose(W, params["blocks"][name][layer], atol=1e-4)


def test_dequantized_weights_are_float32_products_in_a_fixed_order():
    rng = np.random.default_rng(0)
    z = rng.integers(-9, 9, (4, 3)).astype(np.int16)
    row, col = (rng.integers(-30, 30, n).astype(np.int32) for n in (4, 3))
    c = float(np.float32(0.01234))
    W = dequantize(z, row, col, c)
    assert W.dtype == np.float32
    for i in range(4):
        for j in range(3):
            column = exp_steps(col)[j] * np.float32(c)
            assert W[i, j] == np.float32(z[i, j]) * (exp_steps(row)[i] * column)


def decoded_weights(params, grid, indices, c):
    blocks = {name: np.empty_like(params["blocks"][name]) for name in MATRICES}
    for (layer, name), z in indices.items():
        blocks[name][layer] = dequantize(z, grid.rows[layer, name], grid.cols[layer, INPUT_OF[name]], c)
    return {"blocks": blocks}


def test_the_estimated_distortion_is_half_the_trace_summed_over_matrices():
    params, moments = model_and_moments()
    grid, c = make_grid(blocks_of(moments), FEEDBACK), 0.5
    decoded = decoded_weights(params, grid, quantize_model(blocks_of(moments, params), grid, c, FEEDBACK), c)
    expected = 0.0
    for layer, name in coded_matrices(2):
        E = params["blocks"][name][layer].astype(float) - decoded["blocks"][name][layer]
        G = moments.G[name][layer]
        G = np.diag(G) if G.ndim == 1 else G
        expected += np.trace(G @ E @ moments.sigma[INPUT_OF[name]][layer] @ E.T) / 2
    assert stacked_distortion(params, decoded, moments) == pytest.approx(expected)


def test_the_distortion_at_high_rate_is_a_24th_of_the_squared_base_step_per_weight():
    """Entries of sqrt(G) E L are uniform with variance c^2 / 12, up to the quarter octaves of the steps."""
    params, moments = model_and_moments()
    c, damping = 0.02, 1e-9
    G = {name: np.stack([moments.diag_G(name, i) for i in range(2)]) for name in MATRICES}
    diagonal = moments._replace(G=G)
    encode = replace(FEEDBACK, damping=damping)
    grid, metrics = make_grid(blocks_of(diagonal), encode), [metric_of(x, encode) for x in blocks_of(diagonal)]
    decoded = decoded_weights(params, grid, quantize_model(blocks_of(moments, params), grid, c, encode), c)
    weights = sum(W.size for W in params["blocks"].values())
    measured = stacked_distortion(params, decoded, diagonal)
    assert measured == pytest.approx(weights * c**2 / 24, rel=0.1)
    exact = 0.0
    for layer, name in coded_matrices(2):
        group = (layer, INPUT_OF[name])
        rows = exp_steps(grid.rows[layer, name]) ** 2 * diagonal.G[name][layer]
        cols = exp_steps(grid.cols[group]) ** 2 * np.diagonal(metrics[layer].L[INPUT_OF[name]]) ** 2
        exact += rows.sum() * cols.sum() * c**2 / 24
    assert measured == pytest.approx(exact, rel=0.02)
