"""Coordinates U^T W V of single matrices: a Hadamard that costs nothing, axes for free, and axes stored as angles.

A rotation between the layers of a ReLU network is no symmetry of it, so every one is undone after decoding. U and V
are orthogonal: white errors stay white, and equal steps cost equal distortion in all coordinates.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rdopt.codec.coders.constriction import pack_integers
from rdopt.transforms.matrices.hadamard import hadamard
from rdopt.transforms.matrices.pca import near_identity, pca
from rdopt.transforms.stored.angles import angle_codes, blocks_of_angles

ANGLE_BITS = (4, 5, 6, 7, 8)
Matrix = Float[np.ndarray, "out in"]


class TurnPair(NamedTuple):
    """What one matrix is turned by, float64; None for the identity."""

    U: Float[np.ndarray, "out out"] | None = None
    V: Float[np.ndarray, "in in"] | None = None

    def turn(self, W: Matrix) -> Matrix:
        """U^T W V."""
        W = W if self.U is None else self.U.T @ W
        return W if self.V is None else W @ self.V

    def undo(self, W: Matrix) -> Matrix:
        """U W V^T."""
        W = W if self.U is None else self.U @ W
        return W if self.V is None else W @ self.V.T


class Turns(NamedTuple):
    """Turns of all matrices, and the bytes that rebuild them."""

    pairs: list[TurnPair]
    data: bytes = b""


def hidden(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """Which matrices have more than one row and more than one column."""
    return [at for at, shape in enumerate(shapes) if min(shape) > 1]


def no_turns(count: int) -> Turns:
    """All coordinates as they are."""
    return Turns([TurnPair()] * count)


def hadamard_turns(shapes: Sequence[tuple[int, int]], rng: np.random.Generator) -> Turns:
    """A Hadamard matrix with random signs on every side longer than one; the seed rebuilds it, so it costs nothing."""

    def flat(n: int) -> Float[np.ndarray, "n n"] | None:
        return rng.choice((-1.0, 1.0), n)[:, None] * hadamard(n) if n > 1 else None

    return Turns([TurnPair(flat(m), flat(n)) for m, n in shapes])


def principal_axes(W: Matrix) -> Float[np.ndarray, "in in"]:
    """Eigenvectors of W^T W, in the order nearest to the identity."""
    return near_identity(pca(np.asarray(W, np.float64).T @ W)[None])[0]


def free_turns(count: int, places: Sequence[int], axes: Sequence[Float[np.ndarray, "n n"]]) -> Turns:
    """Turns of the inputs of some of `count` matrices by exact axes, whose price is left out."""
    pairs = no_turns(count).pairs
    for at, V in zip(places, axes, strict=True):
        pairs[at] = TurnPair(V=V)
    return Turns(pairs)


def stored_turns(
    arrays: Sequence[Matrix], axes: Sequence[Float[np.ndarray, "n n"]], steps: Float[np.ndarray, " k"]
) -> Turns:
    """Turns of the inputs of the `hidden` matrices, their angles rounded and coded.

    The width of an angle is the one of ANGLE_BITS that takes the fewest bits in all: the angles as coded, plus the
    weights at high rate.

    Args:
        arrays: all matrices.
        axes: V of every hidden one.
        steps: of all matrices, in their units.
    """
    places = hidden([W.shape for W in arrays])
    best, least = no_turns(len(arrays)), np.inf
    for bits in ANGLE_BITS:
        codes, pairs, rate = [], list(best.pairs), 0.0
        for at, V in zip(places, axes, strict=True):
            code = angle_codes(V[None], bits)[0]
            pairs[at] = TurnPair(V=blocks_of_angles(code, bits)[0])
            rate += high_rate_bits(pairs[at].turn(arrays[at]), float(steps[at]))
            codes.append(code.ravel())
        data = pack_angles(codes, bits)
        if rate + 8 * len(data) < least:
            best, least = Turns(pairs, data), rate + 8 * len(data)
    return best


def pack_angles(codes: Sequence[Int[np.ndarray, " p"]], bits: int) -> bytes:
    """The width of an angle in a byte, then all angles with one table."""
    return bytes([bits]) + pack_integers(np.concatenate([*codes, np.zeros(0, np.int32)]).astype(np.int32))


def high_rate_bits(W: Matrix, step: float) -> float:
    """Half a log2 of the variance of its column a weight, none below that of the grid's own error."""
    power = np.mean(W**2, axis=0) / (step**2 / 12)
    return len(W) / 2 * float(np.sum(np.log2(np.maximum(power, 1.0))))
