"""Entropy-constrained Lloyd-Max grids: the scalar quantizer of least error + mu bits for one marginal density.

Chou, Lookabaugh and Gray 1989. With levels r_k of code length b_k = -log2 P(k), a coordinate moves from level k to
k + 1 at the threshold where both cost the same, and a level is the centroid of its cell:

    t_k = (r_k + r_k+1) / 2 + mu (b_k+1 - b_k) / (2 (r_k+1 - r_k)),    r_k = E[x | t_k-1 < x < t_k].

In units of the step, mu is the slope of D(R) of the uniform grid at high rate, 2 ln2 / 12, so the grid of a large
spread is the uniform one. Levels are symmetric; those from POOLED on keep distance one and share their offset.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.special import ndtr

from rdopt.codec.tables.frequencies import PRECISION

SLOPE = 2 * np.log(2) / 12  # squared steps per bit
FRACTIONS = 32  # levels are stored as multiples of 1/FRACTIONS step
POOLED = 4
THRESHOLDS = 16  # that many are tabulated; later ones keep the last one's distance to the uniform grid's
_FLAT = 4.0  # spread in steps from which the grid is uniform: the fixed point saves less than 0.004 bit there
_LATEST = 0.5  # no threshold lies further behind the uniform one: at low rate the conditions have t_0 run away
_ROUNDS, _STILL = 4000, 1e-9
_ROOT2 = np.sqrt(2.0)


class Levels(NamedTuple):
    """A symmetric grid in steps: levels 0 = r_0 < r_1 < ... and t_k, the threshold between r_k and r_k+1."""

    levels: Float[np.ndarray, " K"]
    thresholds: Float[np.ndarray, " K-1"]


class Cell(NamedTuple):
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
def fixed_point(spread: float, laplace: float = 0.0, mu: float = SLOPE) -> Levels:
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
    return Levels(levels, thresholds)


def _centroids(mass: Float[np.ndarray, " K"], first: Float[np.ndarray, " K"]) -> Float[np.ndarray, " K"]:
    """Centroids of the cells with the last ones' offset pooled; cells without mass keep the uniform level."""
    k = np.arange(len(mass), dtype=np.float64)
    offset = np.divide(k * mass - first, mass, out=np.zeros_like(mass), where=mass > 2.0**-PRECISION)
    offset[0] = 0.0
    tail = mass[POOLED:].sum()
    offset[POOLED:] = np.sum(k[POOLED:] * mass[POOLED:] - first[POOLED:]) / tail if tail > 2.0**-PRECISION else 0.0
    return k - offset


@cache
def design(spread: float, laplace: float, weight: float) -> Cell:
    """The grid `weight` of the way from the uniform one (0) to the fixed point (1), with levels as they are stored.

    A fixed point for another mu is the same grid for another step, so the weight, not mu, sets how far the decisions
    favour cheap indices.
    """
    k = np.arange(THRESHOLDS, dtype=np.float64)
    if spread >= _FLAT:
        return Cell(k + 0.5, np.zeros(POOLED + 1, np.int32))
    best = fixed_point(spread, laplace)
    thresholds = k + 0.5 + weight * (best.thresholds[:THRESHOLDS] - k - 0.5)
    offsets = weight * (k[: POOLED + 1] - best.levels[: POOLED + 1])
    return Cell(np.maximum.accumulate(thresholds), np.rint(FRACTIONS * offsets).astype(np.int32))


def values_of(
    z: Int[np.ndarray, "out in"], cell: Int[np.ndarray, "out in"], offsets: Int[np.ndarray, "cells levels"]
) -> Int[np.ndarray, "out in"]:
    """Reconstructions in 1/FRACTIONS step: FRACTIONS z - sign(z) offset, from integers alone.

    Args:
        z: indices.
        cell: row of `offsets` of every entry.
        offsets: of `Cell`, stacked.
    """
    k = z.astype(np.int32)
    return FRACTIONS * k - np.sign(k) * offsets[cell, np.minimum(np.abs(k), POOLED)]
