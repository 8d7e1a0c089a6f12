"""All coded matrices of a model to integer indices on the uniform grids that lambda and the moments fix.

Row steps follow the damped output sensitivities, column steps the Cholesky factor of the damped input moments:
a_ij = c / (sqrt(G_ii) L_jj) with both factors rounded to a quarter octave (WaterSIC 2026 for the columns).
"""

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rdopt.checkpoint.families import INPUT_OF, MATRICES, MATRICES_OF, Key
from rdopt.codec.grids.steps import damped_cholesky, damped_weights, dequantize, exp_steps, log_steps
from rdopt.codec.tables.classes import rank1_spreads
from rdopt.config.parallel import on_cores
from rdopt.config.progress import Tick
from rdopt.config.schema import EncodeConfig, GridName
from rdopt.encode.feedback import coordinate_spreads, quantize_feedback, quantize_rounding
from rdopt.rate.grids import GRIDS
from rdopt.transforms.aligned import Block


class Grid(NamedTuple):
    """The part of a model's grids that lambda does not change.

    Attributes:
        rows: (layer, matrix) -> integer log steps of the rows, from 1 / M_ii or 1 / sqrt(G_ii).
        cols: (layer, group) -> integer log steps of the columns, from 1 / L_jj.
        two_sided: the matrices whose errors are fed back over the rows too.
    """

    rows: dict[Key, Int[np.ndarray, " out"]]
    cols: dict[Key, Int[np.ndarray, " in"]]
    two_sided: set[Key]


class Metric(NamedTuple):
    """What errors cost in a block, factored; float64.

    Attributes:
        L: input group -> lower Cholesky factor of the damped second moment of the input.
        M: matrix -> lower Cholesky factor of the damped moment of the output's gradient, where errors are fed back
            over the rows too.
    """

    L: dict[str, Float[np.ndarray, "in in"]]
    M: dict[str, Float[np.ndarray, "out out"]]


def metric_of(block: Block, encode: EncodeConfig) -> Metric:
    """Factors the moments of a block.

    Args:
        block: as its matrices are quantized.
        encode: grid kind, damping, metric of the output.

    Raises:
        UserError: a moment is singular.
    """
    two_sided = GRIDS[encode.grid].feeds_rows and encode.output == "full"
    full = [name for name in MATRICES if two_sided and block.G[name].ndim == 2 and np.trace(block.G[name]) > 0]
    return Metric(
        {group: damped_cholesky(block.sigma[group], encode.damping) for group in MATRICES_OF},
        {name: damped_cholesky(block.G[name], encode.output_damping) for name in full},
    )


def column_weights(L: Float[np.ndarray, "n n"], grid: GridName) -> Float[np.ndarray, " n"]:
    """What a squared error in a column costs, as a square root: L_jj with feedback, sqrt(S_jj) without."""
    return np.diagonal(L) if GRIDS[grid].feeds_columns else np.sqrt(np.sum(L**2, axis=1))


def make_grid(blocks: Iterable[Block], encode: EncodeConfig) -> Grid:
    """The grids of every coded matrix before the base step; float64.

    Args:
        blocks: of the model as its matrices are quantized, in order.
        encode: grid kind, damping, metric of the output.
    """
    grid = Grid({}, {}, set())
    for layer, block in enumerate(blocks):
        metric = metric_of(block, encode)
        for group, L in metric.L.items():
            grid.cols[layer, group] = log_steps(1.0 / column_weights(L, encode.grid))
        for name in MATRICES:
            if name in metric.M:
                grid.two_sided.add((layer, name))
                weights = np.diagonal(metric.M[name])
            else:
                weights = np.sqrt(damped_weights(block.diag_G(name), encode.damping))
            grid.rows[layer, name] = log_steps(1.0 / weights)
    return grid


def quantize_model(
    blocks: Iterable[Block],
    grid: Grid,
    c: float,
    encode: EncodeConfig,
    progress: Tick | None = None,
) -> dict[Key, Int[np.ndarray, "out in"]]:
    """Indices of every coded matrix at the base step c.

    Args:
        blocks: of the model in the coordinates that the grid was made for, in order.
        grid: of `make_grid`.
        c: base step.
        encode: grid kind, dead zone, threads.
        progress: called with (matrices done, of how many).

    Returns:
        (layer, matrix) -> int16 or int32 indices.
    """
    total = len(MATRICES) * (1 + max(layer for layer, _ in grid.rows))
    indices = {}
    with on_cores(encode.threads) as threads:
        for layer, block in enumerate(blocks):
            one = partial(_quantized, block, metric_of(block, encode), grid, layer, c, encode)
            for name, z in zip(MATRICES, threads.map(one, MATRICES), strict=True):
                indices[layer, name] = z
                if progress is not None:
                    progress(len(indices), total)
    return indices


def _quantized(
    block: Block, metric: Metric, grid: Grid, layer: int, c: float, encode: EncodeConfig, name: str
) -> Int[np.ndarray, "out in"]:
    """Indices of one matrix."""
    group = INPUT_OF[name]
    row = exp_steps(grid.rows[layer, name]).astype(np.float64)
    col = exp_steps(grid.cols[layer, group]).astype(np.float64) * c
    W = block.params[name]
    if GRIDS[encode.grid].feeds_columns:
        z = quantize_feedback(W, metric.L[group], row, col, encode.dead_zone)
    else:
        z = quantize_rounding(W, row, col, encode.dead_zone)
    return z.astype(np.int16) if np.abs(z).max(initial=0) < 2**15 else z


def index_spreads(
    W: Float[np.ndarray, "out in"],
    L: Float[np.ndarray, "in in"],
    grid: Grid,
    key: Key,
    z: Int[np.ndarray, "out in"],
    c: float,
    kind: GridName,
) -> tuple[Float[np.ndarray, " out"], Float[np.ndarray, " in"]]:
    """Row and column spreads that predict the indices of a matrix: those of the coordinates before rounding."""
    layer, name = key
    group = (layer, INPUT_OF[name])
    W = np.asarray(W, np.float64)
    row, col = exp_steps(grid.rows[key]).astype(np.float64), exp_steps(grid.cols[group]).astype(np.float64) * c
    if not GRIDS[kind].feeds_columns:
        return rank1_spreads(W / np.outer(row, col))
    decoded = dequantize(z, grid.rows[key], grid.cols[group], c)
    return coordinate_spreads(z, W - decoded, L, row, col)


