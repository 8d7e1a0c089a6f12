"""Orthogonal blocks as quantized Givens angles (Golub and Van Loan, 5.1.8), in floats and in integers.

A block is V = G_1 G_2 ... G_p, one plane rotation a pair. Angles are integer codes in units of
2 pi / 2^bits. The decoder forms V from integer sines with rounding shifts, since sines of a libm differ between
machines.
"""

from functools import lru_cache
from math import isqrt

import numpy as np
from jaxtyping import Float, Int

from rdopt.transforms.matrices.cayley import block_skew_size, skew_size

SINE_BITS = 30
MAX_BITS = 16
_GUARD = 96


def angle_pairs(b: int) -> list[tuple[int, int]]:
    """The b (b - 1) / 2 pairs (j, i) in the order of the factors: all rows below row 0, then below 1, ..."""
    return [(j, i) for j in range(b) for i in range(j + 1, b)]


def angle_codes(Q: Float[np.ndarray, "k b b"], bits: int) -> Int[np.ndarray, "k p"]:
    """Angles of orthogonal blocks by elimination, each rounded before the next one is found.

    Rows j and i turn so that Q_ij vanishes; what rounding an angle leaves there, the later ones take into
    account, so that errors add up to less than those of angles rounded at the end.

    Args:
        Q: orthogonal blocks.
        bits: an angle is a multiple of 2 pi / 2^bits.

    Returns:
        int32 codes in 1 - 2^(bits - 2) .. 2^(bits - 2) (half a turn: the sign of the pivot is free), with
        `blocks_of_angles(codes, bits)` close to Q but for the signs of its columns.

    Raises:
        ValueError: bits out of range.
    """
    check_bits(bits)
    rows = np.array(np.moveaxis(np.asarray(Q, np.float64), 0, -1))  # [row, column, block]
    step = 2 * np.pi / 2**bits
    pairs = angle_pairs(rows.shape[0])
    codes = np.zeros((rows.shape[2], len(pairs)), np.int32)
    for at, (j, i) in enumerate(pairs):
        angle = np.arctan2(rows[i, j], rows[j, j])
        angle -= np.where(np.abs(angle) > np.pi / 2, np.copysign(np.pi, angle), 0.0)
        code = np.rint(angle / step)
        # A quarter turn back and one forth differ by signs only.
        codes[:, at] = np.where(code == -(2 ** (bits - 2)), -code, code)
        c, s = np.cos(step * codes[:, at]), np.sin(step * codes[:, at])
        rows[j], rows[i] = c * rows[j] + s * rows[i], c * rows[i] - s * rows[j]
    return codes


def blocks_of_angles(codes: Int[np.ndarray, "k p"], bits: int) -> Float[np.ndarray, "k b b"]:
    """The float64 blocks V of quantized angles.

    Raises:
        ValueError: p is not b (b - 1) / 2 for a whole b.
    """
    angles = (2 * np.pi / 2**bits) * codes.T
    return _product(np.cos(angles), np.sin(angles), np.float64(1), 0)


def fixed_point_blocks(codes: Int[np.ndarray, "k p"], bits: int) -> Int[np.ndarray, "k b b"]:
    """`blocks_of_angles` in units of 2^-SINE_BITS, int64, from integers alone; every operation in a fixed order."""
    cos, sin = (table[codes.T & (2**bits - 1)] for table in sine_tables(bits))
    return _product(cos, sin, np.int64(1 << SINE_BITS), SINE_BITS)


def _product(cos: np.ndarray, sin: np.ndarray, one: np.generic, shift: int) -> np.ndarray:
    """G_1 ... G_p times `one`, of sines (p, k); products are over 2^shift, rounded, when shift > 0."""
    b = _block_of(len(cos))
    V = np.zeros((b, b, cos.shape[1]), cos.dtype)
    V[np.arange(b), np.arange(b)] = one
    for at, (j, i) in reversed(list(enumerate(angle_pairs(b)))):
        c, s = cos[at], sin[at]
        upper, lower = c * V[j] - s * V[i], s * V[j] + c * V[i]
        V[j], V[i] = (rounded_shift(upper, shift), rounded_shift(lower, shift)) if shift else (upper, lower)
    return np.ascontiguousarray(np.moveaxis(V, -1, 0))


def split_blocks(
    codes: Int[np.ndarray, " p"], n: int, block: int
) -> list[tuple[slice, Int[np.ndarray, "_ _"]]]:
    """(columns, angles of their k blocks) of the full blocks and of the smaller last one, if any."""
    cut, at = n - n % block, block_skew_size(n - n % block, block)
    full = (slice(0, cut), codes[:at].reshape(n // block, skew_size(block)))
    last = (slice(cut, n), codes[at:].reshape(1, -1))
    return [(columns, part) for columns, part in (full, last) if columns.start < columns.stop]


@lru_cache
def sine_tables(bits: int) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"]]:
    """round(2^SINE_BITS cos) and sin of 2 pi k / 2^bits for k = 0 .. 2^bits - 1, int64, without a libm.

    The first angle comes from a right angle by halving with integer square roots, the others by adding it,
    all in Python integers with enough guard bits that the rounding is right.
    """
    check_bits(bits)
    one = 1 << _GUARD
    c, s = 0, one
    for _ in range(bits - 2):
        c, s = isqrt((one + c) * one // 2), isqrt((one - c) * one // 2)
    cos, sin = [one], [0]
    for _ in range(2 ** (bits - 2) - 1):
        x, y = cos[-1], sin[-1]
        cos.append((c * x - s * y) >> _GUARD)
        sin.append((s * x + c * y) >> _GUARD)
    drop = _GUARD - SINE_BITS
    x, y = (np.array([(v + (1 << drop - 1)) >> drop for v in part], np.int64) for part in (cos, sin))
    return np.concatenate([x, -y, -x, y]), np.concatenate([y, x, -y, -x])


def rounded_shift(x: Int[np.ndarray, "*shape"], by: int) -> Int[np.ndarray, "*shape"]:
    """x / 2^by to the nearest integer, halves up."""
    return (x + (1 << by - 1)) >> by


def _block_of(angles: int) -> int:
    b = (1 + isqrt(1 + 8 * angles)) // 2
    if b * (b - 1) // 2 != angles:
        raise ValueError(f"{angles} is not the number of angles of a block")
    return b


def check_bits(bits: int) -> None:
    if not 2 <= bits <= MAX_BITS:
        raise ValueError(f"angles of {bits} bits; use 2 to {MAX_BITS}")
