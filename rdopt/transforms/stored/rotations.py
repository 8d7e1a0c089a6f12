"""Stored transforms: structured rotations of inputs and outputs that no symmetry of the network absorbs.

W' = U^T W V is what is coded; the decoder undoes U and V, whose angles are multiples of 2 pi / 2^bits and take their
place in the file. V belongs to an input group (q, k, v read one input), U to a matrix.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rdopt.checkpoint.families import INPUT_OF, Key
from rdopt.transforms.matrices.cayley import block_skew_size
from rdopt.transforms.matrices.givens import Pairs, butterfly, pair_count
from rdopt.transforms.matrices.hadamard import sign_hadamard
from rdopt.transforms.stored.angles import blocks_of_angles, split_blocks
from rdopt.transforms.stored.rotation import RotatedSides, Rotation, pair_gathers

Structure = Literal["blocks", "butterfly", "pairs"]
STRUCTURES: tuple[Structure, ...] = ("blocks", "butterfly", "pairs")


class StoredRotation(NamedTuple):
    """One rotation.

    Attributes:
        codes: its angles in steps, in the order of the structure.
        pairs: of learned pairings, layer by layer; else None.
    """

    codes: Int[np.ndarray, " p"]
    pairs: Pairs | None = None


class StoredRotations(NamedTuple):
    """All stored rotations of a model; sites that are absent stay as they are.

    Attributes:
        structure: blocks along the diagonal, a Givens butterfly, or layers of learned disjoint pairs.
        size: width of a block (the last one of a width may be smaller), or number of layers of pairs.
        hadamard: whether a Hadamard matrix comes first.
        bits: angles are multiples of 2 pi / 2^bits.
        inputs: (layer, group) -> V.
        outputs: (layer, matrix) -> U.
    """

    structure: Structure
    size: int
    hadamard: bool
    bits: int
    inputs: Mapping[Key, StoredRotation]
    outputs: Mapping[Key, StoredRotation]

    def rotation(self, site: StoredRotation, n: int) -> Rotation:
        """A rotation of width n, float64, of its rounded angles."""
        H = flattening(n) if self.hadamard else None
        if self.structure == "blocks":
            full, last = np.zeros((0, self.size, self.size)), np.zeros((1, 0, 0))
            for columns, part in split_blocks(site.codes, n, self.size):
                if columns.stop - columns.start >= self.size:
                    full = blocks_of_angles(part, self.bits)
                else:
                    last = blocks_of_angles(part, self.bits)
            return Rotation(H, (full, last))
        gathers = pair_gathers(self.layers(site, n), n)
        return Rotation(H, None, gathers.partner, gathers.spread((2 * np.pi / 2**self.bits) * site.codes))

    def layers(self, site: StoredRotation, n: int) -> Pairs:
        """The pairs that a rotation turns, layer by layer."""
        return butterfly(n) if site.pairs is None else site.pairs

    def sides(self, layer: int, name: str, shape: tuple[int, ...]) -> RotatedSides:
        """What becomes of one matrix of shape (out, in)."""
        U, V = self.outputs.get((layer, name)), self.inputs.get((layer, INPUT_OF[name]))
        return RotatedSides(
            None if U is None else self.rotation(U, shape[0]), None if V is None else self.rotation(V, shape[1])
        )


def flattening(n: int) -> Float[np.ndarray, "n n"]:
    """The orthogonal matrix of signs that comes first where a Hadamard is asked for."""
    H = sign_hadamard(n)
    return H / np.sqrt(np.abs(H[0]).sum())


def angle_count(structure: Structure, size: int, n: int) -> int:
    """Number of angles of a rotation of width n."""
    if structure == "blocks":
        return block_skew_size(n, size)
    return pair_count(butterfly(n)) if structure == "butterfly" else size * (n // 2)
