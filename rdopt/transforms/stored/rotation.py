"""Structured rotations without their dense matrix: rows x -> x V, V = H B G_1 ... G_L, in numpy or JAX.

H is a Hadamard matrix, B block-diagonal, each G_l turns disjoint pairs of coordinates; what is absent is the identity.
Unlike `givens`, which coordinates meet is data, so that every layer of a network may pair its own.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rdopt.transforms.arrays import AnyArray, matmul, namespace
from rdopt.transforms.matrices.givens import Pairs


class Rotation(NamedTuple):
    """One orthogonal V of width n.

    Attributes:
        hadamard: H.
        blocks: the blocks of B: k of width b, then a smaller last one (possibly of width 0).
        partner: whom every coordinate meets in each G_l; itself where it meets nobody.
        angle: by how much, radians: x_i -> cos(a_i) x_i + sin(a_i) x_partner, a_partner = -a_i.
    """

    hadamard: Float[AnyArray, "n n"] | None = None
    blocks: tuple[Float[AnyArray, "k b b"], Float[AnyArray, "1 r r"]] | None = None
    partner: Int[AnyArray, "L n"] | None = None
    angle: Float[AnyArray, "L n"] | None = None

    def apply(self, x: Float[AnyArray, "rows n"]) -> Float[AnyArray, "rows n"]:
        """x V."""
        x = x if self.hadamard is None else matmul(x, self.hadamard)
        x = x if self.blocks is None else _blockwise(x, self.blocks)
        for cos, sin, partner in self._layers():
            x = cos * x + sin * x[:, partner]
        return x

    def undo(self, x: Float[AnyArray, "rows n"]) -> Float[AnyArray, "rows n"]:
        """x V^T."""
        for cos, sin, partner in reversed(self._layers()):
            x = cos * x - sin * x[:, partner]
        if self.blocks is not None:
            first, last = self.blocks
            x = _blockwise(x, (first.swapaxes(1, 2), last.swapaxes(1, 2)))
        return x if self.hadamard is None else matmul(x, self.hadamard.T)

    def moment(self, S: Float[AnyArray, "n n"]) -> Float[AnyArray, "n n"]:
        """V^T S V, symmetric."""
        turned = self.apply(self.apply(S).T)
        return (turned + turned.T) / 2

    def _layers(self) -> list[tuple[AnyArray, AnyArray, AnyArray]]:
        if self.partner is None or self.angle is None:
            return []
        xp = namespace(self.angle)
        return list(zip(xp.cos(self.angle), xp.sin(self.angle), self.partner, strict=True))


class RotatedSides(NamedTuple):
    """What stored rotations make of one matrix: W' = U^T W V."""

    outputs: Rotation | None
    inputs: Rotation | None

    def fold(self, W: Float[AnyArray, "out in"]) -> Float[AnyArray, "out in"]:
        """U^T W V."""
        W = W if self.inputs is None else self.inputs.apply(W)
        return W if self.outputs is None else self.outputs.apply(W.T).T

    def unfold(self, W: Float[AnyArray, "out in"]) -> Float[AnyArray, "out in"]:
        """U W V^T."""
        W = W if self.inputs is None else self.inputs.undo(W)
        return W if self.outputs is None else self.outputs.undo(W.T).T


class PairGathers(NamedTuple):
    """Layers of disjoint pairs as gathers: a_i = sign_i angles[index_i], 0 where i meets nobody."""

    partner: Int[np.ndarray, "L n"]
    index: Int[np.ndarray, "L n"]
    sign: Int[np.ndarray, "L n"]

    def spread(self, angles: Float[AnyArray, " p"]) -> Float[AnyArray, "L n"]:
        """The angle of every coordinate in every layer from those of the pairs."""
        return angles[self.index] * self.sign


def pair_gathers(pairs: Pairs, n: int) -> PairGathers:
    """The gathers of layers of pairs (i, j), which `apply_givens` turns alike."""
    partner = np.tile(np.arange(n), (len(pairs), 1))
    index, sign = np.zeros(partner.shape, np.int64), np.zeros(partner.shape, np.int64)
    start = 0
    for l, layer in enumerate(pairs):
        i, j = layer[:, 0], layer[:, 1]
        partner[l, i], partner[l, j] = j, i
        index[l, i] = index[l, j] = start + np.arange(len(layer))
        sign[l, i], sign[l, j] = -1, 1
        start += len(layer)
    return PairGathers(partner, index, sign)


def _blockwise(
    x: Float[AnyArray, "rows n"], blocks: tuple[Float[AnyArray, "k b b"], Float[AnyArray, "1 r r"]]
) -> Float[AnyArray, "rows n"]:
    k, b, _ = blocks[0].shape
    split = x[:, : k * b].reshape(len(x), k, b).swapaxes(0, 1)
    turned = matmul(split, blocks[0]).swapaxes(0, 1).reshape(len(x), k * b)
    return namespace(x).concatenate([turned, matmul(x[:, k * b :], blocks[1][0])], axis=1)
