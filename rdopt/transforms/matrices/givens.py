"""Givens rotations in layers of disjoint pairs: the butterfly for any width, and pairings of one's choice.

Rows are turned, x -> x G with G = G_1 G_2 ... G_L; a layer G_l turns each of its pairs (i, j) by its own
angle, (x_i, x_j) -> (c x_i - s x_j, s x_i + c x_j), in O(n). Numpy in, numpy out; jax in, jax out.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rdopt.transforms.arrays import AnyArray, eye_like, namespace

Pairs = tuple[np.ndarray, ...]  # one (pairs, 2) integer array a layer


class PairLayer(NamedTuple):
    """A layer with its coordinates put in order: first members of all pairs, second members, those without a pair."""

    order: Int[np.ndarray, " n"]
    angles: slice


def butterfly(n: int) -> Pairs:
    """Layers (i, i + stride) through which every coordinate reaches every other, for any n.

    Strides 1, 2, 4, ... < n, then back down to the largest power of two that divides n: clearing bits upwards
    and setting them downwards never leaves 0 .. n - 1. A power of two needs no way back and gives the usual
    log2(n) layers; any n has O(n log n) angles.
    """
    up = [2**k for k in range(max(n - 1, 0).bit_length())]
    down = [stride for stride in reversed(up[:-1]) if n % (2 * stride)]
    return tuple(_stride_pairs(n, stride) for stride in up + down)


def stacked_butterflies(n: int, stack: int) -> Pairs:
    """Several butterflies in a row, each over axes put in another order, so that more pairs of axes meet directly.

    The k-th one takes axis i for axis m i mod n, m the k-th odd number without a divisor in common with n: its strides
    are m, 2 m, 4 m, ... around the circle of axes. One butterfly has n/2 log2(n) of the n (n - 1) / 2
    dimensions of SO(n); from zero angles each of its pairs that is new adds one that a gradient can move along.
    """
    units = [m for m in range(1, 2 * n * stack + 1) if math.gcd(m, 2 * n) == 1][:stack]
    return tuple(np.sort(layer * m % n, axis=1) for m in units for layer in butterfly(n))


def _stride_pairs(n: int, stride: int) -> Int[np.ndarray, "pairs 2"]:
    first = np.arange(n - stride)
    first = first[(first // stride) % 2 == 0]
    return np.stack([first, first + stride], axis=1)


def round_robin(n: int, layers: int) -> Pairs:
    """The first ``layers`` rounds of a tournament (circle method): no pair meets twice in n - 1 rounds."""
    players = n + n % 2
    rounds = []
    for turn in range(layers):
        circle = np.r_[0, 1 + (np.arange(players - 1) + turn) % (players - 1)]
        pairs = np.sort(np.stack([circle[: players // 2], circle[::-1][: players // 2]], axis=1), axis=1)
        rounds.append(pairs[pairs[:, 1] < n])  # an odd width leaves out whoever meets the absent player
    return tuple(rounds)


def as_pairs(layers: Sequence[Sequence[tuple[int, int]] | np.ndarray], n: int) -> Pairs:
    """Pairings of one's choice as layers.

    Raises:
        ValueError: when a layer's pairs are not disjoint or leave 0 .. n - 1.
    """
    pairs = tuple(np.asarray(layer, dtype=np.int64).reshape(-1, 2) for layer in layers)
    for number, layer in enumerate(pairs):
        if layer.size and (layer.min() < 0 or layer.max() >= n):
            raise ValueError(f"layer {number} names a coordinate outside 0 .. {n - 1}")
        if np.unique(layer).size != layer.size:
            raise ValueError(f"layer {number} uses a coordinate twice; the pairs of a layer must be disjoint")
    return pairs


def pair_count(pairs: Pairs) -> int:
    """Number of angles, one a pair, over all layers."""
    return sum(len(layer) for layer in pairs)


def _layers(pairs: Pairs, n: int) -> list[PairLayer]:
    layers, start = [], 0
    for layer in pairs:
        alone = np.ones(n, bool)
        alone[layer] = False
        order = np.concatenate([layer[:, 0], layer[:, 1], np.flatnonzero(alone)])
        layers.append(PairLayer(order, slice(start, start + len(layer))))
        start += len(layer)
    return layers


def apply_givens(
    x: Float[AnyArray, "*batch_rows n"], angles: Float[AnyArray, "*batch p"], pairs: Pairs
) -> Float[AnyArray, "*batch_rows n"]:
    """x G without the dense G: O(n) a layer and row.

    The leading axes of ``angles`` are the first axes of ``x``: each batch entry has its own angles (radians).

    Raises:
        ValueError: when there is not one angle a pair.
    """
    if angles.shape[-1] != pair_count(pairs):
        raise ValueError(f"{pair_count(pairs)} pairs take as many angles, got {angles.shape[-1]}")
    batch, n, layers = angles.shape[:-1], x.shape[-1], _layers(pairs, x.shape[-1])
    rows = math.prod(x.shape[len(batch) : -1])
    # Coordinates before rows: a gather of coordinates then moves whole rows of memory.
    z = x.reshape(*batch, rows, n).swapaxes(-1, -2)
    if isinstance(angles, np.ndarray):
        turned: AnyArray = turn(z, angles, layers)
    else:
        from rdopt.transforms.matrices.gradients import trained_turn

        turned = trained_turn(z, angles, layers)
    return turned.swapaxes(-1, -2).reshape(x.shape)


def turn(z: Float[AnyArray, "*batch n rows"], angles: Float[AnyArray, "*batch p"], layers: list[PairLayer]) -> AnyArray:
    """G^T z, layer after layer."""
    xp = namespace(angles)
    cos, sin = xp.cos(angles)[..., None], xp.sin(angles)[..., None]
    order = np.arange(z.shape[-2])
    for layer in layers:
        x_i, x_j, alone = split_layer(z, order, layer)
        c, s = cos[..., layer.angles, :], sin[..., layer.angles, :]
        z = xp.concatenate([c * x_i - s * x_j, s * x_i + c * x_j, alone], axis=-2)
        order = layer.order
    return xp.take(z, np.argsort(order), axis=-2, mode="clip")


def split_layer(
    z: Float[AnyArray, "*batch n rows"], order: Int[np.ndarray, " n"], layer: PairLayer
) -> tuple[AnyArray, AnyArray, AnyArray]:
    """(x_i, x_j, those alone) of a layer from coordinates that stand in some order."""
    pairs = layer.angles.stop - layer.angles.start
    z = namespace(z).take(z, np.argsort(order)[layer.order], axis=-2, mode="clip")
    return z[..., :pairs, :], z[..., pairs : 2 * pairs, :], z[..., 2 * pairs :, :]


def givens_matrix(angles: Float[AnyArray, "*batch p"], pairs: Pairs, n: int) -> Float[AnyArray, "*batch n n"]:
    """The dense orthogonal G with x G = apply_givens(x, angles, pairs)."""
    return apply_givens(eye_like(angles, angles.shape[:-1], n), angles, pairs)
