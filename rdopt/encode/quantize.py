"""All coded matrices of a model to integer indices on the grids that lambda and the moments fix.

Row steps follow the damped output sensitivities, column steps the Cholesky factor of the damped input moments:
a_ij = c / (sqrt(G_ii) L_jj) with both factors rounded to a quarter octave (WaterSIC 2026 for the columns).
"""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rdopt.calibration.moments import Moments
from rdopt.checkpoint.families import INPUT_OF, Key, coded_matrices, input_groups
from rdopt.codec.grids.steps import damped_cholesky, damped_weights, dequantize, exp_steps, log_steps
from rdopt.codec.tables.classes import coordinate_spreads, rank1_spreads
from rdopt.config.progress import Tick
from rdopt.config.schema import EncodeConfig
from rdopt.encode.feedback import quantize_feedback, quantize_rounding
from rdopt.operator.params import Params


class Grid(NamedTuple):
    """The part of a model's grids that lambda does not change.

    Attributes:
        factors: (layer, group) -> L, lower Cholesky factor of the damped input moment.
        outputs: (layer, matrix) -> M, lower Cholesky factor of the damped moment of the output's gradient, where
            errors are fed back over the rows too.
        rows: (layer, matrix) -> integer log steps of the rows, from 1 / M_ii or 1 / sqrt(G_ii).
        cols: (layer, group) -> integer log steps of the columns, from 1 / L_jj.
    """

    factors: dict[Key, Float[np.ndarray, "in in"]]
    outputs: dict[Key, Float[np.ndarray, "out out"]]
    rows: dict[Key, Int[np.ndarray, " out"]]
    cols: dict[Key, Int[np.ndarray, " in"]]


def column_weights(L: Float[np.ndarray, "n n"], grid: str) -> Float[np.ndarray, " n"]:
    """What a squared error in a column costs, as a square root: L_jj with feedback, sqrt(S_jj) without."""
    return np.sqrt(np.sum(L**2, axis=1)) if grid == "round" else np.diagonal(L)


def make_grid(moments: Moments, layers: int, encode: EncodeConfig) -> Grid:
    """The grids of every coded matrix before the base step; float64."""
    groups = input_groups(layers)
    factors = {(i, group): damped_cholesky(moments.sigma[group][i], encode.damping) for i, group in groups}
    cols = {key: log_steps(1.0 / column_weights(L, encode.grid)) for key, L in factors.items()}
    outputs, rows = {}, {}
    for key in coded_matrices(layers):
        G = moments.G[key[1]][key[0]]
        if encode.grid == "trellis" and encode.output == "full" and G.ndim == 2 and np.trace(G) > 0:
            outputs[key] = damped_cholesky(G, encode.output_damping)
            weights = np.diagonal(outputs[key])
        else:
            weights = np.sqrt(damped_weights(moments.diag_G(key[1], key[0]), encode.damping))
        rows[key] = log_steps(1.0 / weights)
    return Grid(factors, outputs, rows, cols)


def quantize_model(
    params: Params,
    grid: Grid,
    c: float,
    encode: EncodeConfig,
    progress: Tick | None = None,
) -> dict[Key, Int[np.ndarray, "out in"]]:
    """Indices of every coded matrix at the base step c.

    Args:
        params: the model in the coordinates that the grid was made for.
        grid: of `make_grid`.
        c: base step.
        encode: grid kind, dead zone, threads.
        progress: called with (matrices done, of how many).

    Returns:
        (layer, matrix) -> int16 or int32 indices.
    """
    keys = list(coded_matrices(len(params["blocks"]["q"])))

    def one(key: Key) -> Int[np.ndarray, "out in"]:
        layer, name = key
        group = (layer, INPUT_OF[name])
        row = exp_steps(grid.rows[key]).astype(np.float64)
        col = exp_steps(grid.cols[group]).astype(np.float64) * c
        W = params["blocks"][name][layer]
        if encode.grid == "round":
            z = quantize_rounding(W, row, col, encode.dead_zone)
        else:
            z = quantize_feedback(W, grid.factors[group], row, col, encode.dead_zone)
        return z.astype(np.int16) if np.abs(z).max(initial=0) < 2**15 else z

    indices = {}
    with ThreadPoolExecutor(encode.threads or None) as threads:
        for done, (key, z) in enumerate(zip(keys, threads.map(one, keys), strict=True), 1):
            indices[key] = z
            if progress is not None:
                progress(done, len(keys))
    return indices


def index_spreads(
    params: Params,
    grid: Grid,
    key: Key,
    z: Int[np.ndarray, "out in"],
    c: float,
    kind: str,
) -> tuple[Float[np.ndarray, " out"], Float[np.ndarray, " in"]]:
    """Row and column spreads that predict the indices of a matrix: those of the coordinates before rounding."""
    layer, name = key
    group = (layer, INPUT_OF[name])
    W = np.asarray(params["blocks"][name][layer], np.float64)
    row, col = exp_steps(grid.rows[key]).astype(np.float64), exp_steps(grid.cols[group]).astype(np.float64) * c
    if kind == "round":
        return rank1_spreads(W / np.outer(row, col))
    decoded = dequantize(z, grid.rows[key], grid.cols[group], c)
    return coordinate_spreads(z, W - decoded, grid.factors[group], None, row, col)


def estimated_distortion(params: Params, decoded: Params | None, moments: Moments) -> float:
    """D = 1/2 sum_k tr(G_k E_k sigma_k E_k^T) of the real quantization errors, in nats/token.

    Args:
        params: the weights before quantization.
        decoded: the weights of the file, in the same coordinates; None: all zeros, the power of the signal.
        moments: in these coordinates; off-diagonal entries of G count where they are held.

    Returns:
        D, computed in float64.
    """
    total = 0.0
    for layer, name in coded_matrices(len(params["blocks"]["q"])):
        E = np.asarray(params["blocks"][name][layer], np.float64)
        if decoded is not None:
            E = E - decoded["blocks"][name][layer]
        G, weighted = moments.G[name][layer], E @ moments.sigma[INPUT_OF[name]][layer]
        total += float(np.sum((G @ E if G.ndim == 2 else G[:, None] * E) * weighted))
    return total / 2
