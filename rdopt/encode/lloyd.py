"""All coded matrices of a model on entropy-constrained Lloyd-Max grids, with error feedback over the columns.

Chou, Lookabaugh and Gray 1989: the scalar quantizer of least error + mu bits for one marginal density. With levels r_k
of code length b_k = -log2 P(k), a coordinate moves from level k to k + 1 at the threshold where both cost the same, and
a level is the centroid of its cell:

    t_k = (r_k + r_k+1) / 2 + mu (b_k+1 - b_k) / (2 (r_k+1 - r_k)),    r_k = E[x | t_k-1 < x < t_k].

In units of the step, mu is the slope of D(R) of the uniform grid at high rate, 2 ln2 / 12, so the grid of a large
spread is the uniform one. Levels are symmetric; those from POOLED on keep distance one and share their offset.

A first pass on the uniform grid measures the rank-1 spread of every entry's coordinate; each quarter octave of spread
then has a grid of its own, and the second pass quantizes on it. The file holds the levels (`rdopt.codec.grids.lloyd`),
so a decoder needs no design.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple, no_type_check

import numpy as np
from jaxtyping import Float, Int
from scipy.special import ndtr

from rdopt.checkpoint.families import INPUT_OF, Key
from rdopt.codec.grids.lloyd import CELLS_PER_OCTAVE, FRACTIONS, POOLED, LloydLevels, cell_of
from rdopt.codec.grids.steps import exp_steps
from rdopt.codec.grids.uniform import UNIFORM_SLOPE
from rdopt.codec.tables.classes import rank1_spreads
from rdopt.codec.tables.derived import BLEND_UNIT
from rdopt.codec.tables.frequencies import PRECISION
from rdopt.codec.tables.uniform import UniformPlan, choose_plan, refit_plan
from rdopt.config.parallel import on_cores
from rdopt.config.progress import Tick
from rdopt.config.schema import EncodeConfig
from rdopt.encode.feedback import BLOCK
from rdopt.encode.quantize import Grid, metric_of, quantize_model
from rdopt.transforms.aligned import Block
from rdopt.transforms.kernels import kernel

THRESHOLDS = 16  # that many are tabulated; later ones keep the last one's distance to the uniform grid's
_FLAT = 4.0  # spread in steps from which the grid is uniform: the fixed point saves less than 0.004 bit there
_LATEST = 0.5  # no threshold lies further behind the uniform one: at low rate the conditions have t_0 run away
_ROUNDS, _STILL = 4000, 1e-9
_ROOT2 = np.sqrt(2.0)


class LloydMax(NamedTuple):
    """A symmetric grid in steps: levels 0 = r_0 < r_1 < ... and t_k, the threshold between r_k and r_k+1."""

    levels: Float[np.ndarray, " K"]
    thresholds: Float[np.ndarray, " K-1"]


class CellGrid(NamedTuple):
    """What quantizes the entries of one spread.

    Attributes:
        thresholds: t_0, t_1, ... in steps.
        offsets: (k - r_k) FRACTIONS of k = 0..POOLED, the last one of all further levels.
    """

    thresholds: Float[np.ndarray, " thresholds"]
    offsets: Int[np.ndarray, " levels"]


def partial_moments(
    t: Float[np.ndarray, " n"], laplace: float
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """P(x > t) and E[x; x > t], t >= 0, of a unit-variance blend with weight `laplace` on the Laplace density."""
    decay = np.exp(-_ROOT2 * t) / 2
    normal = np.exp(-t * t / 2) / np.sqrt(2 * np.pi)
    mass = laplace * decay + (1 - laplace) * ndtr(-t)
    return mass, laplace * (t + 1 / _ROOT2) * decay + (1 - laplace) * normal


def cells(
    thresholds: Float[np.ndarray, " n"], spread: float, laplace: float
) -> tuple[Float[np.ndarray, " n+1"], Float[np.ndarray, " n+1"]]:
    """Mass and first moment of x >= 0 between successive thresholds, the first cell from 0, the last unbounded."""
    mass, first = partial_moments(np.concatenate([[0.0], thresholds]) / spread, laplace)
    return mass - np.append(mass[1:], 0.0), spread * (first - np.append(first[1:], 0.0))


def code_lengths(mass: Float[np.ndarray, " K"]) -> Float[np.ndarray, " K"]:
    """Bits of every level, sign included; the zero level's cell has two halves. A table's least entry bounds them."""
    both = np.concatenate([2 * mass[:1], mass[1:]])
    return -np.log2(np.maximum(both, 0) + 2.0**-PRECISION)


@cache
def fixed_point(spread: float, laplace: float = 0.0, mu: float = UNIFORM_SLOPE) -> LloydMax:
    """The grid on which thresholds and levels satisfy both conditions for a density of this spread.

    Args:
        spread: standard deviation in steps.
        laplace: share of the Laplace density, the rest is Gaussian.
        mu: price of a bit in squared steps.
    """
    uniform = np.arange(POOLED + THRESHOLDS + int(8 * spread), dtype=np.float64)
    levels, thresholds = uniform, uniform[:-1] + 0.5
    for _ in range(_ROUNDS):
        mass, first = cells(thresholds, spread, laplace)
        levels = _centroids(mass, first)
        gap, rate = np.diff(levels), np.diff(code_lengths(mass))
        new = (levels[:-1] + levels[1:]) / 2 + mu * rate / (2 * gap)
        new = np.maximum.accumulate(np.clip(new, uniform[:-1], uniform[:-1] + 0.5 + _LATEST))
        change, thresholds = np.abs(new - thresholds).max(), new
        if change < _STILL:
            break
    return LloydMax(levels, thresholds)


def _centroids(mass: Float[np.ndarray, " K"], first: Float[np.ndarray, " K"]) -> Float[np.ndarray, " K"]:
    """Centroids of the cells with the last ones' offset pooled; cells without mass keep the uniform level."""
    k = np.arange(len(mass), dtype=np.float64)
    offset = np.divide(k * mass - first, mass, out=np.zeros_like(mass), where=mass > 2.0**-PRECISION)
    offset[0] = 0.0
    tail = mass[POOLED:].sum()
    offset[POOLED:] = np.sum(k[POOLED:] * mass[POOLED:] - first[POOLED:]) / tail if tail > 2.0**-PRECISION else 0.0
    return k - offset


@cache
def design(spread: float, laplace: float, weight: float) -> CellGrid:
    """The grid `weight` of the way from the uniform one (0) to the fixed point (1), with levels as they are stored.

    A fixed point for another mu is the same grid for another step, so the weight, not mu, sets how far the decisions
    favour cheap indices.
    """
    k = np.arange(THRESHOLDS, dtype=np.float64)
    if spread >= _FLAT:
        return CellGrid(k + 0.5, np.zeros(POOLED + 1, np.int32))
    best = fixed_point(spread, laplace)
    thresholds = k + 0.5 + weight * (best.thresholds[:THRESHOLDS] - k - 0.5)
    offsets = weight * (k[: POOLED + 1] - best.levels[: POOLED + 1])
    return CellGrid(np.maximum.accumulate(thresholds), np.rint(FRACTIONS * offsets).astype(np.int32))


class LloydModel(NamedTuple):
    """Indices, tables and levels of every coded matrix."""

    indices: dict[Key, Int[np.ndarray, "out in"]]
    plan: UniformPlan
    levels: LloydLevels


def quantize_lloyd(
    blocks: Iterable[Block], grid: Grid, c: float, encode: EncodeConfig, progress: Tick | None = None
) -> LloydModel:
    """Both passes over all matrices at the base step c.

    Args:
        blocks: of the model in the coordinates of the grid, in order.
        grid: of `make_grid`.
        c: base step.
        encode: rdo (the weight of `lloyd.design`), threads.
        progress: called with (matrices done, of how many) over both passes.
    """
    held = list(blocks)
    metrics = [metric_of(block, encode) for block in held]
    first = quantize_model(held, grid, c, encode, lambda done, of: progress(done, 2 * of) if progress else None)
    keys = list(first)

    def inputs(key: Key):
        """(W, L, row, col) of one matrix, float64 steps."""
        layer, group = key[0], INPUT_OF[key[1]]
        col = exp_steps(grid.cols[layer, group]).astype(np.float64) * c
        return held[layer].params[key[1]], metrics[layer].L[group], exp_steps(grid.rows[key]).astype(np.float64), col

    with on_cores(encode.threads) as threads:
        fits = list(threads.map(lambda key: rank1_spreads(coordinates(first[key], *inputs(key))), keys))
        plan = choose_plan(list(first.values()), fits)
        low, cells = _design(plan, encode.rdo)

        def one(i: int) -> Int[np.ndarray, "out in"]:
            cell = cell_of(plan.spreads[i], plan.precision) - low
            return quantize_on_cells(*inputs(keys[i]), cell, cells)

        indices = {}
        for i, z in enumerate(threads.map(one, range(len(keys)))):
            indices[keys[i]] = z
            if progress:
                progress(len(keys) + i + 1, 2 * len(keys))
    levels = LloydLevels(low, np.stack([x.offsets for x in cells]))
    return LloydModel(indices, refit_plan(list(indices.values()), plan), levels)


def coordinates(
    z: Int[np.ndarray, "out in"],
    W: Float[np.ndarray, "out in"],
    L: Float[np.ndarray, "in in"],
    row: Float[np.ndarray, " out"],
    col: Float[np.ndarray, " in"],
) -> Float[np.ndarray, "out in"]:
    """What the feedback rounded to z, in steps: what is left of W L with all later columns taken off."""
    return z + ((np.asarray(W, np.float64) / row[:, None] - z * col) @ L) / (np.diagonal(L) * col)


def _design(plan: UniformPlan, weight: float) -> tuple[int, list[CellGrid]]:
    """The first cell and the grids of all cells of a plan."""
    bounds = [f(cell_of(s, plan.precision)) for s in plan.spreads for f in (np.min, np.max)]
    low, laplace = int(min(bounds)), plan.shape.blend / BLEND_UNIT
    return low, [design(2.0 ** (k / CELLS_PER_OCTAVE), laplace, weight) for k in range(low, int(max(bounds)) + 1)]


@kernel()
@no_type_check
def _block_of_columns(Y, M, low, high, cell, thresholds, levels, z, values):
    """Quantizes columns high-1 .. low of Y (in, out), feeding errors back inside the block."""
    last = thresholds.shape[1] - 1
    pooled = levels.shape[1] - 1
    for j in range(high - 1, low - 1, -1):
        for i in range(Y.shape[1]):
            x, t = abs(Y[j, i] / M[j, j]), thresholds[cell[j, i]]
            k = 0
            while k <= last and x >= t[k]:
                k += 1
            if k > last:
                k = max(k, int(np.floor(x - t[last] + last + 1)))
            value = k - levels[cell[j, i], min(k, pooled)]
            z[j, i], values[j, i] = (k, value) if Y[j, i] > 0 else (-k, -value)
        for before in range(low, j):
            factor = M[j, before]
            for i in range(Y.shape[1]):
                Y[before, i] -= factor * values[j, i]


def quantize_on_cells(
    W: Float[np.ndarray, "out in"],
    L: Float[np.ndarray, "in in"],
    row: Float[np.ndarray, " out"],
    col: Float[np.ndarray, " in"],
    cell: Int[np.ndarray, "out in"],
    cells: Sequence[CellGrid],
) -> Int[np.ndarray, "out in"]:
    """`feedback.quantize_feedback` with thresholds and levels that depend on the entry.

    Args:
        W: weights.
        L: lower Cholesky factor of the damped second moments of the input.
        row, col: positive step factors.
        cell: position in `cells` of every entry's grid.
        cells: grids.

    Returns:
        int16 indices, int32 where one needs it. Computed in float64.
    """
    Y = np.ascontiguousarray(((np.asarray(W, np.float64) / row[:, None]) @ L).T)
    M = col[:, None] * L
    thresholds, levels = np.stack([x.thresholds for x in cells]), np.stack([x.offsets for x in cells]) / FRACTIONS
    z, values, places = np.empty(Y.shape, np.int32), np.empty(Y.shape), np.ascontiguousarray(cell.T)
    for high in range(len(Y), 0, -BLOCK):
        low = max(high - BLOCK, 0)
        _block_of_columns(Y, M, low, high, places, thresholds, levels, z, values)
        Y[:low] -= M[low:high, :low].T @ values[low:high]
    small = np.abs(z).max(initial=0) < 2**15
    return np.ascontiguousarray(z.T, np.int16 if small else np.int32)
