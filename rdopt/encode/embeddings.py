"""The embedding and the head through the trellis, in a metric of their own.

An error e_v in the row of token v costs, in nats/token,

    D = 1/2 sum_v e_v (f_v G + h_v S) e_v^T,

the first part in an embedding, the second in a head (see calibration.EmbeddingMoments), both where the two are tied.
One metric M = sum_v f_v G + h_v S for the columns and one weight a row, w_v = tr(f_v G + h_v S) / tr M, stand for it:
the same D, unless they are tied, where a row takes the mean metric instead of its own. The base step is that of the
whole model, so that embeddings lie on the same slope.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rdopt.codec.coders.order import Order
from rdopt.codec.grids.steps import damped_cholesky, exp_steps, log_steps
from rdopt.codec.grids.trellis import TRELLIS_SLOPE, TRELLIS_STEP, RateTerm
from rdopt.codec.streams.embeddings import NAMES, embedding_shapes, pack_embeddings
from rdopt.codec.tables.classes import rank1_spreads
from rdopt.codec.tables.trellis import TrellisPlan, fit_plan, rates_of
from rdopt.config.errors import UserError
from rdopt.config.parallel import on_cores
from rdopt.config.schema import EncodeConfig
from rdopt.encode.columns import quantize_columns
from rdopt.encode.trellis_matrix import narrowed, sample_matrix, sampled_plan
from rdopt.operator.params import Params
from rdopt.transforms.aligned import Aligned

_BISECTIONS = 60
_AT_ONCE = 4096  # rows in float64 at once, a multiple of the rows after which a lane starts anew
_LEAST = 1e-30  # a token that is never predicted: no row is free
# Text comes in clumps: what 65 536 tokens hold a few times, another part of the same text held three times more often
# (measured on docstrings). All tokens together get at most a tenth of the text.
_UNSEEN_COUNT, _UNSEEN_SHARE = 3.0, 0.1
_LARGEST = 50.0  # half a variance of a logit's error; far beyond it every row has gone to zero


class TokenMatrix(NamedTuple):
    """One matrix of tokens and the grid it is coded on.

    Attributes:
        W: (vocab, d) weights.
        L: lower Cholesky factor of the damped metric M.
        rows, cols: integer log steps, from 1 / sqrt(w_v) and 1 / L_jj.
    """

    W: Float[np.ndarray, "vocab d"]
    L: Float[np.ndarray, "d d"]
    rows: Int[np.ndarray, " vocab"]
    cols: Int[np.ndarray, " d"]


def code_embeddings(aligned: Aligned, c: float, encode: EncodeConfig) -> bytes:
    """The stream of the embedding and of an untied head at the base step c.

    Raises:
        UserError: weights that are not finite, or moments without those of the embedding.
    """
    matrices = [_token_matrix(name, aligned, c, encode.damping) for name in embedding_shapes(aligned.arch)]
    indices, plan = _quantize(matrices, c, encode)
    rows, cols = [x.rows for x in matrices], [x.cols for x in matrices]
    return pack_embeddings(indices, rows, cols, plan, encode.states, encode.threads, encode.coder)


def embedding_distortion(aligned: Aligned, decoded: Params) -> float:
    """D of the errors of the embedding and the head on other text, nats/token, computed in float64.

    Args:
        aligned: the model before quantization; 0 where its moments hold nothing about the embedding.
        decoded: the weights of the file, in the same coordinates.
    """
    moments, total = aligned.end_moments, 0.0
    if moments is None:
        return 0.0
    f = smoothed(moments.frequency, aligned.moments.tokens)
    for name, rows, metric in (("embed", f, moments.G), ("head", moments.fisher, moments.S)):
        original, rounded = (x.get(name, x["embed"]) for x in (aligned.ends, decoded))
        for some in (slice(i, i + _AT_ONCE) for i in range(0, len(rows), _AT_ONCE)):
            E = np.asarray(original[some], np.float64) - rounded[some]
            total += float(rows[some] @ np.sum((E @ metric) * E, axis=1))
    return total / 2


def row_weights(
    f: Float[np.ndarray, " vocab"], h: Float[np.ndarray, " vocab"], error: float
) -> Float[np.ndarray, " vocab"]:
    """w with w = f + h exp(x), x = error / (2 w): half the variance of a logit's error, at the step w asks for.

    A logit with a Gaussian error of variance 2 x makes a token of small probability p exp(x) times as probable, which
    costs p (exp(x) - 1) nats. Taken as p x, as the Fisher information has it, a token that is hardly ever predicted
    would go without bits and be predicted everywhere. Minimising sum_v f_v x_v + h_v (exp(x_v) - 1) at a given
    rate, half a log2 of x_v a row, gives the weights above: Lambert's W function where f is zero.

    Args:
        f: weights of the rows as embeddings.
        h: weights of the rows as a head, positive where f is zero.
        error: variance of a logit's error times w.
    """
    low, high = np.zeros(len(h)), np.minimum(error / 2 / (f + h), _LARGEST)
    for _ in range(_BISECTIONS):
        x = (low + high) / 2
        above = x * (f + h * np.exp(x)) > error / 2
        low, high = np.where(above, low, x), np.where(above, x, high)
    return f + h * np.exp(low)


def smoothed(frequency: Float[np.ndarray, " vocab"], tokens: int) -> Float[np.ndarray, " vocab"]:
    """What a token's share of other text is taken for: rare and unseen tokens keep some weight."""
    return frequency + min(_UNSEEN_COUNT / tokens, _UNSEEN_SHARE / len(frequency))


def _token_matrix(name: str, aligned: Aligned, c: float, damping: float) -> TokenMatrix:
    """One matrix with its steps before the base step."""
    W, moments = aligned.ends[name], aligned.end_moments
    if moments is None:
        raise UserError("the second moments hold nothing about the embedding; measure them again or keep 16bit.")
    if not np.isfinite(W).all():
        raise UserError(f"{NAMES[name]} holds NaN or infinity; mend the checkpoint.")
    none = np.zeros(len(W))
    f = smoothed(moments.frequency, aligned.moments.tokens) if name == "embed" else none
    h = np.maximum(moments.fisher, _LEAST) if name == "head" or aligned.arch.tied else none
    G, S = np.trace(moments.G), np.trace(moments.S)
    M = f.sum() * moments.G + h.sum() * moments.S
    total = np.trace(M)
    if total <= 0:
        return TokenMatrix(W, damped_cholesky(M, damping), np.zeros(len(W), np.int32), np.zeros(W.shape[1], np.int32))
    # In the metric, every entry's error has the variance c^2 / (12 w) (see steps.base_step).
    error = W.shape[1] * c**2 / 12 * S / total
    L = damped_cholesky(M, damping)
    rows = log_steps(1.0 / np.sqrt(row_weights(f * (G / total), h * (S / total), error)))
    return TokenMatrix(W, L, rows, log_steps(1.0 / np.diagonal(L)))


def _quantize(
    matrices: list[TokenMatrix], c: float, encode: EncodeConfig
) -> tuple[list[Int[np.ndarray, "vocab d"]], TrellisPlan]:
    """Indices and tables, as for the matrices of the blocks, some rows at a time: rows do not see one another."""
    steps = [(exp_steps(x.rows).astype(np.float64), exp_steps(x.cols) * (c * TRELLIS_STEP)) for x in matrices]
    orders: list[Order] = ["columns"] * len(matrices)
    samples = [sample_matrix(x.W, x.L, None, *step, encode) for x, step in zip(matrices, steps, strict=True)]
    rates = rates_of(sampled_plan(samples, orders, encode.states), TRELLIS_SLOPE * encode.rdo)
    indices, fits = [], []
    with on_cores(encode.threads) as threads:
        for x, step, rate in zip(matrices, steps, rates, strict=True):
            cuts = [slice(i, i + _AT_ONCE) for i in range(0, len(x.W), _AT_ONCE)]
            k, coordinates = zip(*threads.map(partial(_rows, x, *step, rate, encode.states), cuts), strict=True)
            indices.append(np.concatenate(k))
            fits.append(rank1_spreads(np.concatenate(coordinates)))
    return indices, fit_plan(indices, orders, encode.states, fits)


def _rows(
    x: TokenMatrix,
    row: Float[np.ndarray, " vocab"],
    col: Float[np.ndarray, " d"],
    rates: RateTerm,
    states: int,
    some: slice,
) -> tuple[Int[np.ndarray, "some d"], Float[np.ndarray, "some d"]]:
    """Indices of some rows, and what was rounded to them."""
    W, row = np.asarray(x.W[some], np.float64), row[some]
    path = quantize_columns(W, x.L, row, col, rates._replace(rows=rates.rows[some]), states)
    return narrowed(path.k), path.targets
