"""Claims about the trellis with feedback over the columns: textbook loops, the scalar quantizer, single columns."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdopt.codec.grids.trellis import SEGMENT, STATES, RateTerm, next_states, viterbi, walk_lanes
from rdopt.encode.columns import quantize_columns
from rdopt.encode.feedback import BLOCK, quantize_feedback


def problem(out, width, c=0.3, seed=0):
    """(W, L, row steps, column steps) with correlated inputs and pivots row_i c."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3 * width, width)) * np.exp(rng.standard_normal(width))
    x += rng.standard_normal((3 * width, 1))
    L = np.linalg.cholesky(x.T @ x / len(x))
    W = rng.standard_normal((out, width)).astype(np.float32)
    return W, L, np.exp(0.5 * rng.standard_normal(out)), c / np.diagonal(L)


def no_rates(out, width):
    return RateTerm(np.zeros(out, np.int64), np.zeros(width, np.int64), np.zeros((1, 2, 1), np.float32), 0.0)


def some_rates(out, width, mu, seed=0):
    rng = np.random.default_rng(seed)
    bits = np.cumsum(0.1 + rng.random((5, 2, 60)), axis=2).astype(np.float32)
    return RateTerm(rng.integers(0, 3, out), rng.integers(0, 3, width), bits, mu)


def path_of(x, classes, rates, states):
    """The indices of one column, segment by segment."""
    k = np.empty(len(x), np.int32)
    for low in range(0, len(x), SEGMENT):
        part = slice(low, low + SEGMENT)
        viterbi(x[part], classes[part], rates.bits, rates.mu, next_states(states), 0, k[part])
    return k


def values_of(k, states):
    return walk_lanes(np.ascontiguousarray(k.T), states, SEGMENT)[0].T


def textbook(W, L, row, col, rates, states):
    """Column j is quantized after it took L_ij / L_jj of every later error i."""
    W = np.asarray(W, np.float64)
    k, E = np.zeros(W.shape, np.int32), np.zeros(W.shape)
    for j in reversed(range(W.shape[1])):
        target = W[:, j] + E[:, j + 1 :] @ L[j + 1 :, j] / L[j, j]
        k[:, j] = path_of(target / (row * col[j]), rates.rows + rates.cols[j], rates, states)
        E[:, j] = W[:, j] - row * col[j] * values_of(k[:, j : j + 1], states)[:, 0]
    return k


@given(
    width=st.sampled_from([1, BLOCK - 1, BLOCK, 2 * BLOCK + 3]),
    out=st.integers(1, 7),
    states=st.sampled_from(STATES),
    mu=st.sampled_from([0.0, 0.2]),
)
def test_blocked_feedback_is_the_textbook_loop_for_any_width(width, out, states, mu):
    case, rates = problem(out, width, seed=width + out), some_rates(out, width, mu)
    path = quantize_columns(*case, rates, states)
    np.testing.assert_array_equal(path.k, textbook(*case, rates, states))
    assert [x.dtype for x in path] == [np.int32, np.int32, np.uint8, np.float32]


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("mu", [0.0, 0.2])
def test_with_white_inputs_every_column_is_quantized_alone(states, mu):
    W, _, row, _ = problem(30, 70)
    scale = np.exp(np.random.default_rng(1).standard_normal(70))
    col, rates = 0.3 / scale, some_rates(30, 70, mu)
    path = quantize_columns(W, np.diag(scale), row, col, rates, states)
    for j in range(70):
        x = (W[:, j] / row * scale[j]) / (col[j] * scale[j])
        np.testing.assert_array_equal(path.k[:, j], path_of(x, rates.rows + rates.cols[j], rates, states))


@pytest.mark.parametrize("shape", [(1, 1), (7, BLOCK + 9), (SEGMENT + 20, 30)])
def test_one_state_without_a_rate_is_the_scalar_grid_of_twice_the_step(shape):
    W, L, row, col = problem(*shape)
    path = quantize_columns(W, L, row, col, no_rates(*shape), 1)
    np.testing.assert_array_equal(path.k, quantize_feedback(W, L, row, 2 * col))
    np.testing.assert_array_equal(path.values, 2 * path.k)
    assert not path.grids.any()


@pytest.mark.parametrize("states", STATES)
def test_values_and_grids_are_the_walk_of_the_indices(states):
    out = SEGMENT + 9
    path = quantize_columns(*problem(out, 20), some_rates(out, 20, 0.1), states)
    values, grids = walk_lanes(np.ascontiguousarray(path.k.T), states, SEGMENT)
    np.testing.assert_array_equal(path.values, values.T)
    np.testing.assert_array_equal(path.grids, grids.T)


@pytest.mark.parametrize("states", [1, 8])
def test_segments_of_rows_are_independent(states):
    W, L, row, col = problem(2 * SEGMENT + 7, 12)
    rates = some_rates(len(W), 12, 0.1)
    whole = quantize_columns(W, L, row, col, rates, states).k
    for low in range(0, len(W), SEGMENT):
        part = slice(low, low + SEGMENT)
        alone = quantize_columns(W[part], L, row[part], col, rates._replace(rows=rates.rows[part]), states)
        np.testing.assert_array_equal(whole[part], alone.k)


def test_output_errors_of_one_state_lie_within_a_step_and_more_states_make_them_smaller():
    c = 0.003
    W, L, row, col = problem(200, BLOCK + 30, c=c)
    power = []
    for states in (1, 8, 64):
        values = quantize_columns(W, L, row, col, no_rates(*W.shape), states).values
        error = ((W - np.outer(row, col) * values) @ L) / row[:, None] / c
        if states == 1:  # the lattice point of Babai's nearest plane
            assert np.abs(error).max() <= 1 + 1e-9
        power.append(np.mean(error**2))
    gains = 10 * np.log10((1 / 3) / np.array(power))
    np.testing.assert_allclose(gains, [0.0, 1.09, 1.27], atol=0.08)


@pytest.mark.parametrize("states", [1, 8, 64])
def test_a_rate_term_shortens_the_codes_and_raises_the_error(states):
    W, L, row, col = problem(60, 70, c=0.5)
    seen = []
    for mu in (0.0, 0.5, 2.0):
        rates = some_rates(60, 70, mu)
        path = quantize_columns(W, L, row, col, rates, states)
        classes = rates.rows[:, None] + rates.cols
        bits = rates.bits[classes, path.grids, np.abs(path.k)].sum()
        error = np.sum((((W - np.outer(row, col) * path.values) @ L) / row[:, None]) ** 2)
        seen.append((float(bits), -float(error)))
    assert seen == sorted(seen, reverse=True)
    assert [x for _, x in seen] == sorted((x for _, x in seen), reverse=True)
