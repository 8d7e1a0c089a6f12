"""Givens rotations in layers of disjoint pairs: the butterfly for any width, and pairings of one's choice.

Rows are turned, x -> x G with G = G_1 G_2 ... G_L; a layer G_l turns each of its pairs (i, j) by its own
angle, (x_i, x_j) -> (c x_i - s x_j, s x_i + c x_j), in O(n). Numpy in, numpy out; jax in, jax out.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from rdopt.transforms.arrays import AnyArray, eye_like, namespace

Pairs = tuple[np.ndarray, ...]  # one (pairs, 2) integer array a layer


class _Layer(NamedTuple):
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


def _layers(pairs: Pairs, n: int) -> list[_Layer]:
    layers, start = [], 0
    for layer in pairs:
        alone = np.ones(n, bool)
        alone[layer] = False
        order = np.concatenate([layer[:, 0], layer[:, 1], np.flatnonzero(alone)])
        layers.append(_Layer(order, slice(start, start + len(layer))))
        start += len(layer)
    return layers


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
    if angles.shape[-1] != pair_count(pairs):
        raise ValueError(f"{pair_count(pairs)} pairs take as many angles, got {angles.shape[-1]}")
    batch, n, layers = angles.shape[:-1], x.shape[-1], _layers(pairs, x.shape[-1])
    rows = math.prod(x.shape[len(batch) : -1])
    # Coordinates before rows: a gather of coordinates then moves whole rows of memory.
    z = x.reshape(*batch, rows, n).swapaxes(-1, -2)
    turn = _turn if isinstance(angles, np.ndarray) else cast(Callable[..., AnyArray], _trained_turn)
    z = turn(z, -angles, layers[::-1]) if inverse else turn(z, angles, layers)
    return z.swapaxes(-1, -2).reshape(x.shape)


def _turn(z: Float[AnyArray, "*batch n rows"], angles: Float[AnyArray, "*batch p"], layers: list[_Layer]) -> AnyArray:
    """G^T z, layer after layer."""
    xp = namespace(angles)
    cos, sin = xp.cos(angles)[..., None], xp.sin(angles)[..., None]
    order = np.arange(z.shape[-2])
    for layer in layers:
        x_i, x_j, alone = _split(z, order, layer)
        c, s = cos[..., layer.angles, :], sin[..., layer.angles, :]
        z = xp.concatenate([c * x_i - s * x_j, s * x_i + c * x_j, alone], axis=-2)
        order = layer.order
    return xp.take(z, np.argsort(order), axis=-2, mode="clip")


def _split(
    z: Float[AnyArray, "*batch n rows"], order: Int[np.ndarray, " n"], layer: _Layer
) -> tuple[AnyArray, AnyArray, AnyArray]:
    """(x_i, x_j, those alone) of a layer from coordinates that stand in some order."""
    pairs = layer.angles.stop - layer.angles.start
    z = namespace(z).take(z, np.argsort(order)[layer.order], axis=-2, mode="clip")
    return z[..., :pairs, :], z[..., pairs : 2 * pairs, :], z[..., 2 * pairs :, :]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _trained_turn(
    z: Float[jax.Array, "*batch n rows"], angles: Float[jax.Array, "*batch p"], layers: list[_Layer]
) -> Float[jax.Array, "*batch n rows"]:
    return _turn(z, angles, layers)


def _turn_forward(z: AnyArray, angles: AnyArray, layers: list[_Layer]) -> tuple[AnyArray, tuple[AnyArray, AnyArray]]:
    y = _turn(z, angles, layers)
    return y, (y, angles)


def _turn_backward(
    layers: list[_Layer], saved: tuple[AnyArray, AnyArray], g: Float[jax.Array, "*batch n rows"]
) -> tuple[AnyArray, AnyArray]:
    """The result is turned back beside its cotangent, so that no layer is kept and no gradient scatters.

    With y_i = c x_i - s x_j and y_j = s x_i + c x_j the derivative of an angle is sum_rows g_j y_i - g_i y_j.
    """
    y, angles = saved
    cos, sin = jnp.cos(angles)[..., None], jnp.sin(angles)[..., None]
    both, order = jnp.stack([y, g]), np.arange(y.shape[-2])
    slopes = jnp.zeros_like(angles)
    for layer in reversed(layers):
        i, j, alone = _split(both, order, layer)
        slopes = slopes.at[..., layer.angles].set(jnp.sum(j[1] * i[0] - i[1] * j[0], axis=-1))
        c, s = cos[None, ..., layer.angles, :], sin[None, ..., layer.angles, :]
        both = jnp.concatenate([c * i + s * j, c * j - s * i, alone], axis=-2)
        order = layer.order
    return jnp.take(both[1], np.argsort(order), axis=-2, mode="clip"), slopes


_trained_turn.defvjp(_turn_forward, _turn_backward)


def givens_matrix(angles: Float[AnyArray, "*batch p"], pairs: Pairs, n: int) -> Float[AnyArray, "*batch n n"]:
    """The dense orthogonal G with x G = apply_givens(x, angles, pairs)."""
    return apply_givens(eye_like(angles, angles.shape[:-1], n), angles, pairs)
