"""Claims about two-sided feedback and the order of its lanes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdopt.codec.coders.order import from_lanes, restart, sums_in_lanes, to_lanes, walked_lanes
from rdopt.codec.grids.trellis import STATES, RateTerm, next_states, viterbi, walk, walk_lanes
from rdopt.encode.columns import quantize_columns
from rdopt.encode.feedback import quantize_feedback
from rdopt.encode.wavefront import quantize_wavefront

SHAPES = [(1, 1), (1, 9), (9, 1), (13, 8), (8, 13), (20, 20), (70, 131), (131, 70)]


def factor(rng, n):
    x = rng.standard_normal((3 * n, n)) * np.exp(0.7 * rng.standard_normal(n)) + rng.standard_normal((3 * n, 1))
    return np.linalg.cholesky(x.T @ x / len(x))


def problem(out, width, c=0.3, seed=0):
    """(W, L, M, row steps, column steps) whose pivots are all c."""
    rng = np.random.default_rng(seed)
    L, M = factor(rng, width), factor(rng, out)
    W = rng.standard_normal((out, width)).astype(np.float32)
    return W, L, M, 1 / np.diagonal(M), c / np.diagonal(L)


def some_rates(out, width, mu):
    rng = np.random.default_rng(5)
    bits = np.cumsum(0.1 + rng.random((5, 2, 60)), axis=2).astype(np.float32)
    return RateTerm(rng.integers(0, 3, out), rng.integers(0, 3, width), bits, mu)


def residual(W, L, M, row, col, values):
    """M^T (W - W^) L in steps: by the triangular shape of both factors the error of every entry's target."""
    pivots = np.outer(row * np.diagonal(M), col * np.diagonal(L))
    return M.T @ (W.astype(np.float64) - np.outer(row, col) * values) @ L / pivots


@pytest.mark.parametrize("two_sided", [False, True])
def test_targets_are_the_values_and_what_the_triangular_metric_leaves_over(two_sided):
    W, L, M, row, col = problem(300, 90)
    if two_sided:
        path = quantize_wavefront(W, L, M, row, col, some_rates(300, 90, 0.1), 8)
    else:
        M, row = np.eye(300), np.ones(300)
        path = quantize_columns(W, L, row, col, some_rates(300, 90, 0.1), 8)
    np.testing.assert_allclose(path.targets, path.values + residual(W, L, M, row, col, path.values), atol=1e-4)


# lanes


@given(m=st.integers(1, 12), n=st.integers(1, 12), order=st.sampled_from(["columns", "diagonals"]))
def test_lanes_give_the_matrix_back(m, n, order):
    x = np.arange(m * n).reshape(m, n)
    lanes = to_lanes(x, order)
    assert lanes.shape == (n, m) and lanes.flags.c_contiguous
    np.testing.assert_array_equal(from_lanes(lanes, order), x)


@given(
    m=st.integers(1, 300),
    n=st.integers(1, 12),
    first=st.integers(0, 12),
    order=st.sampled_from(["columns", "diagonals"]),
)
def test_some_lanes_are_those_of_the_whole_matrix(m, n, first, order):
    rng, some = np.random.default_rng(m), slice(first, first + 3)
    k, row, col = rng.integers(-9, 9, (m, n)).astype(np.int8), rng.integers(0, 9, m), rng.integers(0, 9, n)
    np.testing.assert_array_equal(to_lanes(k, order, some), to_lanes(k, order)[some])
    np.testing.assert_array_equal(sums_in_lanes(row, col, order, some), to_lanes(np.add.outer(row, col), order)[some])
    lanes, grids = walked_lanes(k, order, 8, some)
    np.testing.assert_array_equal(lanes, to_lanes(k, order)[some])
    np.testing.assert_array_equal(grids, walk_lanes(lanes, 8, restart(order))[1])


@given(m=st.integers(1, 12), n=st.integers(1, 12))
def test_a_lane_is_a_column_or_the_diagonals_of_one_remainder_from_the_bottom_row_up(m, n):
    i, j = np.indices((m, n))
    np.testing.assert_array_equal(to_lanes(j, "columns"), np.arange(n)[:, None] * np.ones((1, m), int))
    np.testing.assert_array_equal(to_lanes(i, "columns")[0], np.arange(m))
    np.testing.assert_array_equal(to_lanes((i + j) % n, "diagonals") - np.arange(n)[:, None], 0)
    rows = to_lanes(i, "diagonals")
    np.testing.assert_array_equal(rows, np.arange(m)[::-1] * np.ones((n, 1), int))


# feedback


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("states", [1, 8, 64])
@pytest.mark.parametrize("mu", [0.0, 0.2])
def test_every_entry_is_its_target_quantized_along_its_lane(shape, states, mu):
    """The targets are recomputed from the final residual by dense products, then every diagonal is run again."""
    m, n = shape
    W, L, M, row, col = problem(m, n)
    rates = some_rates(m, n, mu)
    path = quantize_wavefront(W, L, M, row, col, rates, states)
    targets = residual(W, L, M, row, col, path.values) + path.values
    step, machine = next_states(states), np.zeros(n, np.int64)
    for total in range(m + n - 2, -1, -1):
        i = np.arange(min(m - 1, total), max(0, total - n + 1) - 1, -1)
        j, lane = total - i, total % n
        k, values, grids = np.empty(len(i), np.int32), np.empty(len(i), np.int32), np.empty(len(i), np.uint8)
        classes = rates.rows[i] + rates.cols[j]
        viterbi(targets[i, j], classes, rates.bits, mu, step, machine[lane], k)
        machine[lane] = walk(k, step, machine[lane], values, grids)
        np.testing.assert_array_equal(path.k[i, j], k)
        np.testing.assert_array_equal(path.values[i, j], values)
        np.testing.assert_array_equal(path.grids[i, j], grids)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("states", STATES)
def test_values_and_grids_are_the_walk_of_the_lanes(shape, states):
    W, L, M, row, col = problem(*shape)
    path = quantize_wavefront(W, L, M, row, col, some_rates(shape[0], shape[1], 0.1), states)
    values, grids = walk_lanes(to_lanes(path.k, "diagonals"), states, 1 << 30)
    np.testing.assert_array_equal(to_lanes(path.values, "diagonals"), values)
    np.testing.assert_array_equal(to_lanes(path.grids, "diagonals"), grids)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_state_gives_the_lattice_point_of_babai(shape):
    """The error of every target lies within half a step of the scalar grid, one step of the trellis."""
    W, L, M, row, col = problem(*shape)
    values = quantize_wavefront(W, L, M, row, col, some_rates(shape[0], shape[1], 0.0), 1).values
    assert np.abs(residual(W, L, M, row, col, values)).max() <= 1 + 1e-9


def test_one_state_with_white_outputs_is_the_scalar_feedback_quantizer():
    W, L, _, _, col = problem(14, 20)
    row = np.exp(0.1 * np.random.default_rng(0).standard_normal(14))
    path = quantize_wavefront(W, L, np.diag(1 / row), row, col, some_rates(14, 20, 0.0), 1)
    np.testing.assert_array_equal(path.k, quantize_feedback(W, L, row, 2 * col))


def test_feedback_over_the_rows_lowers_the_two_sided_error_and_raises_the_one_sided():
    W, L, M, row, col = problem(40, 50, c=0.01)
    rates = some_rates(40, 50, 0.0)
    errors = []
    for path in (quantize_wavefront(W, L, M, row, col, rates, 8), quantize_columns(W, L, row, col, rates, 8)):
        E = W - np.outer(row, col) * path.values
        errors.append((np.sum((M.T @ E @ L) ** 2), np.sum((E @ L / row[:, None]) ** 2)))
    (both, right), (both_columns, right_columns) = errors
    assert both < 0.7 * both_columns and right > right_columns
    # At one step's granular error an entry, 1.09 dB below 1/3.
    assert both / W.size / 0.01**2 == pytest.approx(10**-0.109 / 3, rel=0.08)
