"""Structured component plus residual: W = f + r, f of low rank and coded finely, r coded as any matrix.

f is a truncated singular value decomposition of W in steps of its grid, the metric in which an error costs the same
in every entry. Its factors are small integers, so that f is an integer matrix product over a power of two and adds to
the integers of r exactly: every decoder forms the same weights. The factors' rounding errors end up in r and cost
bits, not distortion.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rdopt.checkpoint.families import Key, MatrixShapes
from rdopt.codec.coders.bits import BitReader, BitWriter
from rdopt.codec.grids.steps import dequantize
from rdopt.codec.streams.smooth_lists import pack_families, unpack_families

SHIFTS = (0, 1, 2, 3, 4)
MAX_FACTOR = 1 << 15


class Structured(NamedTuple):
    """f_ij = sum_k left_ik right_jk / 2^shift, in steps.

    Attributes:
        left: (out, rank) integers.
        right: (in, rank) integers.
        shift: the power of two.
    """

    left: Int[np.ndarray, "out rank"]
    right: Int[np.ndarray, "in rank"]
    shift: int

    @property
    def rank(self) -> int:
        """Number of components."""
        return self.left.shape[1]


def product(f: Structured) -> Int[np.ndarray, "out in"]:
    """f in 2^-shift steps, int64, exact."""
    return f.left.astype(np.int64) @ f.right.astype(np.int64).T


def component(
    f: Structured, row: Int[np.ndarray, " out"], col: Int[np.ndarray, " in"], step: float
) -> Float[np.ndarray, "out in"]:
    """f as float32 weights on a grid of log steps row, col and base step `step`; what is left of W is quantized."""
    return dequantize(product(f), row, col, finer(step, f))


def combine(values: Int[np.ndarray, "out in"], f: Structured) -> Int[np.ndarray, "out in"]:
    """The values of r plus f, in 2^-shift steps, int64: to be dequantized with the base step `finer(step, f)`."""
    return (values.astype(np.int64) << f.shift) + product(f)


def dequantize_structured(
    values: Int[np.ndarray, "out in"],
    f: Structured | None,
    row: Int[np.ndarray, " out"],
    col: Int[np.ndarray, " in"],
    step: float,
) -> Float[np.ndarray, "out in"]:
    """float32 weights from the values of r and the component, if there is one."""
    if f is None:
        return dequantize(values, row, col, step)
    return dequantize(combine(values, f), row, col, finer(step, f))


def finer(step: float, f: Structured) -> float:
    """The base step over 2^shift; exact in float32."""
    return float(np.ldexp(np.float32(step), -f.shift))


def pack_structured(structured: Mapping[Key, Structured], shapes: MatrixShapes) -> bytes:
    """The components of all matrices: per matrix rank and shift (no component: rank 0), then the factors' lists.

    Returns:
        no bytes where there are no components.
    """
    if not structured:
        return b""
    head, bodies = BitWriter(), []
    for key in shapes:
        f = structured.get(key)
        head.gamma(f.rank if f else 0)
        if f:
            head.gamma(f.shift)
            bodies.append(pack_families([[z] for part in (f.left, f.right) for z in part.T]))
    return head.bytes() + b"".join(bodies)


def unpack_structured(data: bytes, shapes: MatrixShapes) -> dict[Key, Structured]:
    """Inverse of `pack_structured`; raises ValueError for damaged bytes."""
    if not data:
        return {}
    source, sizes = BitReader(data), {}
    for key in shapes:
        rank = source.gamma()
        if rank > min(shapes[key]):
            raise ValueError(f"a component of rank {rank}")
        if rank:
            sizes[key] = (rank, source.gamma())
            if sizes[key][1] > max(SHIFTS):
                raise ValueError(f"a component in 2^-{sizes[key][1]} steps")
    rest, structured = data[source.bytes_read :], {}
    for key, (rank, shift) in sizes.items():
        lists, rest = unpack_families(rest, [(1, n) for n in shapes[key] for _ in range(rank)])
        halves = lists[:rank], lists[rank:]
        left, right = (np.stack([x for (x,) in half], axis=1).astype(np.int64) for half in halves)
        if max(np.abs(left).max(), np.abs(right).max()) > MAX_FACTOR:
            raise ValueError("a factor is out of range")
        structured[key] = Structured(left, right, shift)
    if rest:
        raise ValueError("the components do not end with their last factor")
    return structured
