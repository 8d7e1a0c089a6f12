"""All coded matrices of a model on entropy-constrained Lloyd-Max grids, with error feedback over the columns.

A first pass on the uniform grid measures the rank-1 spread of every entry's coordinate; each quarter octave of
spread then has a grid of its own (see `lloyd`), and the second pass quantizes on it. The file describes the levels
by a few small integers, so a decoder needs no design.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, no_type_check

import numpy as np
from jaxtyping import Float, Int

from rdopt.checkpoint.families import INPUT_OF
from rdopt.codec.coders.bits import BitReader, unzigzag, zigzag
from rdopt.codec.grids.lloyd import FRACTIONS, POOLED, Cell, design, values_of
from rdopt.codec.grids.steps import exp_steps
from rdopt.codec.tables.allocation import MAX_CLASS, Plan, choose_plan, refit_plan
from rdopt.codec.tables.classes import Spreads, classes_of, rank1_spreads
from rdopt.codec.tables.families import BLENDS
from rdopt.config.progress import Tick
from rdopt.config.schema import EncodeConfig
from rdopt.encode.feedback import BLOCK
from rdopt.encode.quantize import Grid, Key, quantize_model
from rdopt.operator.params import Params
from rdopt.transforms.kernels import kernel

CELLS_PER_OCTAVE = 4


class Levels(NamedTuple):
    """The levels of all cells as a file holds them.

    Attributes:
        low: the first cell, in quarter octaves of spread.
        offsets: (cells, POOLED + 1), see `lloyd.Cell`.
    """

    low: int
    offsets: Int[np.ndarray, "cells levels"]


class LloydModel(NamedTuple):
    """Indices, tables and levels of every coded matrix."""

    indices: dict[Key, Int[np.ndarray, "out in"]]
    plan: Plan
    levels: Levels


def quantize_lloyd(
    params: Params, grid: Grid, c: float, encode: EncodeConfig, progress: Tick | None = None
) -> LloydModel:
    """Both passes over all matrices at the base step c.

    Args:
        params: weights in the coordinates of the grid.
        grid: of `make_grid`.
        c: base step.
        encode: rdo (the weight of `lloyd.design`), threads.
        progress: called with (matrices done, of how many) over both passes.
    """
    first, _ = quantize_model(params, grid, c, encode, lambda done, of: progress(done, 2 * of) if progress else None)
    keys = list(first)
    with ThreadPoolExecutor(encode.threads or None) as threads:
        fits = list(threads.map(lambda key: rank1_spreads(_coordinates(params, grid, c, key, first[key])), keys))
        plan = choose_plan(list(first.values()), fits)
        low, cells = _design(plan, encode.rdo)

        def one(i: int) -> Int[np.ndarray, "out in"]:
            cell = cell_of(plan.spreads[i], plan.precision) - low
            return quantize_on_cells(*_problem(params, grid, c, keys[i]), cell, cells)

        found = {}
        for i, z in enumerate(threads.map(one, range(len(keys)))):
            found[keys[i]] = z
            if progress:
                progress(len(keys) + i + 1, 2 * len(keys))
    return LloydModel(found, refit_plan(list(found.values()), plan), Levels(low, np.stack([x.offsets for x in cells])))


def _problem(params: Params, grid: Grid, c: float, key: Key):
    """(W, L, row, col) of one matrix, float64 steps."""
    group = (key[0], INPUT_OF[key[1]])
    col = exp_steps(grid.cols[group]).astype(np.float64) * c
    return params["blocks"][key[1]][key[0]], grid.factors[group], exp_steps(grid.rows[key]).astype(np.float64), col


def _coordinates(
    params: Params, grid: Grid, c: float, key: Key, z: Int[np.ndarray, "out in"]
) -> Float[np.ndarray, "out in"]:
    """What the feedback rounded to z, in steps: what is left of W L with all later columns taken off."""
    W, L, row, col = _problem(params, grid, c, key)
    return z + ((np.asarray(W, np.float64) / row[:, None] - z * col) @ L) / (np.diagonal(L) * col)


def cell_of(spreads: Spreads, precision: int) -> Int[np.ndarray, "out in"]:
    """The cell of every entry: the quarter octave of its class's spread."""
    return np.floor_divide(CELLS_PER_OCTAVE * classes_of(spreads), max(precision, 1))


def _design(plan: Plan, weight: float) -> tuple[int, list[Cell]]:
    """The first cell and the grids of all cells of a plan."""
    bounds = [f(cell_of(s, plan.precision)) for s in plan.spreads for f in (np.min, np.max)]
    low, laplace = int(min(bounds)), plan.shape.blend / BLENDS
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
    cells: Sequence[Cell],
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


def write_levels(levels: Levels) -> tuple[int, ...]:
    """Levels as numbers for gamma codes: first cell, number of cells, the offsets of k >= 1 of each."""
    return zigzag(levels.low), len(levels.offsets), *(zigzag(int(x)) for x in levels.offsets[:, 1:].ravel())


def read_levels(source: BitReader) -> Levels:
    """Inverse of `write_levels`.

    Raises:
        ValueError: damaged numbers.
    """
    low, count = source.gammas(2)
    if count > 2 * CELLS_PER_OCTAVE * MAX_CLASS:
        raise ValueError(f"{count} cells of levels")
    offsets = np.zeros((count, POOLED + 1), np.int32)
    for i in range(count):
        offsets[i, 1:] = [_bounded(unzigzag(x)) for x in source.gammas(POOLED)]
    return Levels(unzigzag(low), offsets)


def _bounded(offset: int) -> int:
    """An offset; a level more than two steps from its place is damage."""
    if abs(offset) > 2 * FRACTIONS:
        raise ValueError(f"an offset of {offset} / {FRACTIONS} steps")
    return offset


def lloyd_values(
    z: Int[np.ndarray, "out in"], spreads: Spreads, precision: int, levels: Levels
) -> Int[np.ndarray, "out in"]:
    """Reconstructions in 1/FRACTIONS step of one matrix, from integers alone.

    Raises:
        ValueError: an entry's spread has no levels.
    """
    cell = cell_of(spreads, precision) - levels.low
    if cell.min() < 0 or cell.max() >= len(levels.offsets):
        raise ValueError("an entry has a spread without levels")
    return values_of(z, cell, levels.offsets)


def lloyd_step(c: float) -> float:
    """The base step of stored values as the float32 number that decoders multiply with, c / FRACTIONS exactly."""
    return float(np.float32(c) / np.float32(FRACTIONS))
