"""Givens rotations in layers of disjoint pairs: the butterfly for any width, and pairings of one's choice.

Rows are turned, x -> x G with G = G_1 G_2 ... G_L; a layer G_l turns each of its pairs (i, j) by its own
angle, (x_i, x_j) -> (c x_i - s x_j, s x_i + c x_j), in O(n). Numpy in, numpy out; jax in, jax out.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rdopt.transforms.arrays import AnyArray, eye_like, namespace

Pairs = tuple[np.ndarray, ...]  # one (pairs, 2) integer array a layer


class _Plan(NamedTuple):
    """A layer as gathers: y_i = cos(a_i) x_i + sin(a_i) x[partner_i], a_i = sign_i angles[index_i]."""

    partner: Int[np.ndarray, " n"]
    index: Int[np.ndarray, " n"]
    sign: Int[np.ndarray, " n"]


def butterfly(n: int) -> Pairs:
    """Layers (i, i + stride) through which every coordinate reaches every other, for any n.

    Strides 1, 2, 4, ... < n, then back down to the largest power of two that divides n: clearing bits upwards
    and setting them downwards never leaves 0 .. n - 1. A power of two needs no way back and gives the usual
    log2(n) layers; any n has O(n log n) angles.
    """
    up = [2**k for k in range(max(n - 1, 0).bit_length())]
    down = [stride for stride in reversed(up[:-1]) if n % (2 * stride)]
    return tuple(_stride_pairs(n, stride) for stride in up + down)


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


def angle_count(pairs: Pairs) -> int:
    """Number of angles, one a pair, over all layers."""
    return sum(len(layer) for layer in pairs)


def _plans(pairs: Pairs, n: int) -> list[_Plan]:
    plans, start = [], 0
    for layer in pairs:
        i, j = layer[:, 0], layer[:, 1]
        partner, index, sign = np.arange(n), np.zeros(n, np.int64), np.zeros(n, np.int64)
        partner[i], partner[j] = j, i
        index[i] = index[j] = start + np.arange(len(layer))
        sign[i], sign[j] = -1, 1
        plans.append(_Plan(partner, index, sign))
        start += len(layer)
    return plans


def apply_givens(
    x: Float[AnyArray, "*batch_rows n"],
    angles: Float[AnyArray, "*batch p"],
    pairs: Pairs,
    *,
    inverse: bool = False,
) -> Float[AnyArray, "*batch_rows n"]:
    """x G, or x G^T when ``inverse``, without the dense G: O(n) a layer and row.

    The leading axes of ``angles`` are the first axes of ``x``: each batch entry has its own angles (radians).

    Raises:
        ValueError: when there is not one angle a pair.
    """
    if angles.shape[-1] != angle_count(pairs):
        raise ValueError(f"{angle_count(pairs)} pairs take as many angles, got {angles.shape[-1]}")
    n, xp = x.shape[-1], namespace(angles)
    shape = (*angles.shape[:-1], *(1,) * (x.ndim - angles.ndim), n)
    plans = _plans(pairs, n)
    for plan in reversed(plans) if inverse else plans:
        turn = plan.sign.astype(angles.dtype) * (-1 if inverse else 1)
        a = (angles[..., plan.index] * turn.reshape((1,) * (angles.ndim - 1) + (n,))).reshape(shape)
        x = xp.cos(a) * x + xp.sin(a) * x[..., plan.partner]
    return x


def givens_matrix(angles: Float[AnyArray, "*batch p"], pairs: Pairs, n: int) -> Float[AnyArray, "*batch n n"]:
    """The dense orthogonal G with x G = apply_givens(x, angles, pairs)."""
    return apply_givens(eye_like(angles, angles.shape[:-1], n), angles, pairs)
