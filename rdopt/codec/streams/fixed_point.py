"""Stored rotations undone in integers: the same float32 bytes on every machine and for every split of the rows.

Each row is scaled by a power of two to integers of WEIGHT_BITS bits; sines are integers, too, and products are rounded
by shifts. The sums over signs of a Hadamard matrix are exact in float64, whatever the order of a BLAS.
"""

import numpy as np
from jaxtyping import Float, Int

from rdopt.transforms.matrices.givens import Pairs
from rdopt.transforms.matrices.hadamard import sign_hadamard
from rdopt.transforms.stored.angles import (
    SINE_BITS,
    check_bits,
    fixed_point_blocks,
    rounded_shift,
    sine_tables,
    split_blocks,
)
from rdopt.transforms.stored.rotations import StoredRotation, StoredRotations, angle_count

WEIGHT_BITS = 28
# |w| < 2^WEIGHT_BITS and unit columns of V: by Cauchy and Schwarz |w V^T| < 16 * 2^58 stays in an int64.
MAX_BLOCK = 256
MAX_WIDTH = 1 << 20
Fixed = Int[np.ndarray, "rows n"]


def undo_stored(
    stored: StoredRotations, layer: int, name: str, group: str, W: Float[np.ndarray, "out in"]
) -> Float[np.ndarray, "out in"]:
    """U W V^T of one matrix, float32."""
    V, U = stored.inputs.get((layer, group)), stored.outputs.get((layer, name))
    W = W if V is None else undo_rotation(W, stored, V)
    return W if U is None else np.ascontiguousarray(undo_rotation(np.ascontiguousarray(W.T), stored, U).T)


def undo_rotation(
    W: Float[np.ndarray, "rows n"], stored: StoredRotations, site: StoredRotation
) -> Float[np.ndarray, "rows n"]:
    """W V^T.

    Args:
        W: float32, finite.
        stored: the structure of V.
        site: its angles, and pairs if they are its own.

    Returns:
        float32: the exact product up to about 2^-24 of its row's largest weight, rounded to float32.

    Raises:
        ValueError: the number of angles does not fit, or a size is out of range.
    """
    check_bits(stored.bits)
    n = W.shape[1]
    blocks = stored.structure == "blocks"
    sane = n <= MAX_WIDTH and (not blocks or 1 <= stored.size <= MAX_BLOCK)
    if not sane or site.codes.size != angle_count(stored.structure, stored.size, n):
        raise ValueError(f"{site.codes.size} angles do not fit {stored.structure} of {stored.size} in width {n}")
    # A row's norm stays below 2^32 through all layers, so that its products with sines stay in an int64.
    bits = WEIGHT_BITS if blocks else min(WEIGHT_BITS, 32 - (n.bit_length() + 1) // 2)
    # frexp, ldexp and rint are exact or correctly rounded everywhere.
    exponent = np.frexp(np.abs(W).max(axis=1, initial=0, keepdims=True))[1] - bits
    fixed = np.rint(np.ldexp(W.astype(np.float64), -exponent)).astype(np.int64)
    if blocks:
        done = _undo_blocks(fixed, site.codes, stored.size, stored.bits)
    else:
        done = _undo_layers(fixed, site.codes, stored.layers(site, n), stored.bits)
    exact = done.astype(np.float64)
    if stored.hadamard:
        H = sign_hadamard(n).astype(np.float64)
        exact = np.rint((exact @ H.T) / np.sqrt(np.abs(H[0]).sum()))
    return np.ldexp(exact, exponent).astype(np.float32)


def _undo_blocks(fixed: Fixed, codes: Int[np.ndarray, " p"], block: int, bits: int) -> Fixed:
    done = np.zeros(fixed.shape, np.int64)
    for columns, part in split_blocks(codes, fixed.shape[1], block):
        V = fixed_point_blocks(part, bits)
        x = fixed[:, columns].reshape(len(fixed), *V.shape[:2]).swapaxes(0, 1)
        y = rounded_shift(x @ V.swapaxes(1, 2), SINE_BITS)
        done[:, columns] = y.swapaxes(0, 1).reshape(len(fixed), columns.stop - columns.start)
    return done


def _undo_layers(fixed: Fixed, codes: Int[np.ndarray, " p"], pairs: Pairs, bits: int) -> Fixed:
    x, end = fixed.T.copy(), len(codes)
    cos, sin = (table[codes & (2**bits - 1)][:, None] for table in sine_tables(bits))
    for layer in reversed(pairs):
        part = slice(end - len(layer), end)
        end = part.start
        i, j = layer[:, 0], layer[:, 1]
        up, down = cos[part] * x[i] + sin[part] * x[j], cos[part] * x[j] - sin[part] * x[i]
        x[i], x[j] = rounded_shift(up, SINE_BITS), rounded_shift(down, SINE_BITS)
    return x.T


