"""One matrix through the trellis, and what is known of it before: spreads by a closed form, indices of some rows."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.linalg import solve_triangular

from rdopt.codec.coders.order import Order
from rdopt.codec.grids.trellis import TRELLIS_NOISE, TRELLIS_SLOPE, RateTerm, TrellisPath
from rdopt.codec.tables.classes import RowsCols, rank1_spreads
from rdopt.codec.tables.trellis import SPREAD_PRECISIONS, TrellisPlan, fit_plan, rates_of, starting_plan
from rdopt.config.schema import EncodeConfig
from rdopt.encode.columns import quantize_columns
from rdopt.encode.wavefront import quantize_wavefront

_SAMPLE = 64  # rows of a matrix that the tables of the rate term are fitted to
_AT_ONCE = 4096  # rows that are in float64 at once


class Sample(NamedTuple):
    """What is known of a matrix before it is quantized.

    Attributes:
        spread: of its coordinates, expected.
        indices: of some rows, quantized as if there were no others.
        expected: of the coordinates of these.
    """

    spread: RowsCols
    indices: Int[np.ndarray, "some in"]
    expected: RowsCols


def quantize_matrix(
    W: Float[np.ndarray, "out in"],
    L: Float[np.ndarray, "in in"],
    M: Float[np.ndarray, "out out"] | None,
    row: Float[np.ndarray, " out"],
    col: Float[np.ndarray, " in"],
    rates: RateTerm,
    states: int,
) -> TrellisPath:
    """The path of a matrix, with feedback over the rows too where there is a metric of the outputs."""
    if M is None:
        return quantize_columns(W, L, row, col, rates, states)
    return quantize_wavefront(W, L, M, row, col, rates, states)


def narrowed(k: Int[np.ndarray, "out in"]) -> Int[np.ndarray, "out in"]:
    """Indices in the shortest signed type that holds them."""
    largest = np.abs(k).max(initial=0)
    shortest = next(kind for kind in (np.int8, np.int16, np.int32) if largest <= np.iinfo(kind).max)
    return np.ascontiguousarray(k, shortest)


def sample_matrix(
    W: Float[np.ndarray, "out in"],
    L: Float[np.ndarray, "in in"],
    M: Float[np.ndarray, "out out"] | None,
    row: Float[np.ndarray, " out"],
    col: Float[np.ndarray, " in"],
    encode: EncodeConfig,
) -> Sample:
    """Looks at a matrix.

    Args:
        W: weights.
        L, M: lower Cholesky factors of input and output moment; no M without feedback over the rows.
        row, col: step factors.
        encode: states, rdo.
    """
    some = np.unique(np.linspace(0, len(W) - 1, _SAMPLE).astype(int))
    part, factor, steps = np.asarray(W[some], np.float64), None, row[some]
    if M is not None:  # without the rows between, errors are fed back less: the same steps in the metric are smaller
        factor = np.linalg.cholesky(M[some] @ M[some].T)
        steps = steps * np.diagonal(M)[some] / np.diagonal(factor)
    expected = expected_spreads(part, L, factor, steps, col)
    (rates,) = rates_of(starting_plan([expected]), TRELLIS_SLOPE * encode.rdo)
    path = quantize_matrix(part, L, factor, steps, col, rates, encode.states)
    return Sample(expected_spreads(W, L, M, row, col), narrowed(path.k), expected)


def sampled_plan(samples: Sequence[Sample], orders: Sequence[Order], states: int) -> TrellisPlan:
    """Tables of the rate term: expected classes, and the shapes that fit the sampled rows."""
    plan = starting_plan([x.spread for x in samples])
    indices, expected = [x.indices for x in samples], [x.expected for x in samples]
    fitted = fit_plan(indices, orders, states, expected, SPREAD_PRECISIONS[:1]).shapes
    return plan._replace(shapes={k: fitted.get(k, shape) for k, shape in plan.shapes.items()})


def expected_spreads(
    W: Float[np.ndarray, "out in"],
    L: Float[np.ndarray, "in in"],
    M: Float[np.ndarray, "out out"] | None,
    row: Float[np.ndarray, " out"],
    col: Float[np.ndarray, " in"],
) -> RowsCols:
    """`rank1_spreads` of the coordinates that feedback will round, before anything is rounded.

    An entry takes back the errors of others, so that it has the variance of its weight and a share of theirs. Errors
    e of variance TRELLIS_NOISE, independent of one another, are M^-T e L^-1 in the weights, of variance TRELLIS_NOISE
    (G^-1)_ii (S^-1)_jj; the coordinate's own part of it comes after it was rounded.

    Args:
        W: weights.
        L, M: lower Cholesky factors of input and output moment; no M without feedback over the rows.
        row, col: step factors.
    """
    rows = np.ones(len(W)) if M is None else _amplified(M)
    cols, expected = _amplified(L), np.empty(W.shape, np.float32)
    for some in (slice(i, i + _AT_ONCE) for i in range(0, len(W), _AT_ONCE)):
        power = np.square(W[some] / np.outer(row[some], col), dtype=np.float64)
        expected[some] = np.sqrt(power + TRELLIS_NOISE * (np.outer(rows[some], cols) - 1))
    return rank1_spreads(expected)


def _amplified(F: Float[np.ndarray, "n n"]) -> Float[np.ndarray, " n"]:
    """((F F^T)^-1)_ii F_ii^2: a weight's error, where every coordinate's is one."""
    inverse = solve_triangular(F, np.eye(len(F)), lower=True, overwrite_b=True, check_finite=False)
    return np.maximum(np.sum(inverse**2, axis=0) * np.diagonal(F) ** 2, 1)  # above 1 but for rounding
