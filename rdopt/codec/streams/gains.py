"""Fine row and column gains of coded matrices: diag(a) W diag(b), kept as integer logarithms.

A gain is exp2(k / precision) with k an integer, one precision a file, so that a gain costs a few entropy-coded
bits and every decoder forms the same float32 number.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rdopt.checkpoint.families import Key, MatrixShapes
from rdopt.codec.coders.constriction import pack_lists, unpack_lists
from rdopt.codec.grids.steps import exact_exp2

GAIN_PRECISIONS = (8, 16, 32, 64)
MAX_OCTAVES = 32
_CODINGS = ("one table", "a table each for rows and columns", "a table a kind of matrix")

LogGains = Mapping[Key, Float[np.ndarray, " _"]]


class Gains(NamedTuple):
    """Gains of the coded matrices.

    Attributes:
        precision: steps in an octave, one of GAIN_PRECISIONS.
        rows: (layer, matrix) -> integer log gains of the rows, (out,); a matrix without has none or zeros.
        cols: (layer, matrix) -> integer log gains of the columns, (in,).
    """

    precision: int
    rows: dict[Key, Int[np.ndarray, " out"]]
    cols: dict[Key, Int[np.ndarray, " in"]]

    def apply(self, key: Key, W: Float[np.ndarray, "out in"]) -> Float[np.ndarray, "out in"]:
        """W_ij (a_i b_j) of one matrix in float32, products in this order; a side that has none has gains of one."""
        a, b = (
            np.ones(n, np.float32) if (k := part.get(key)) is None else exact_exp2(k, self.precision)
            for part, n in zip((self.rows, self.cols), W.shape, strict=True)
        )
        return np.asarray(W, np.float32) * (a[:, None] * b[None, :])


def quantize_gains(rows: LogGains, cols: LogGains, precision: int) -> Gains:
    """The nearest integer logarithms of gains given as float log2."""

    def rounded(logs: LogGains) -> dict[Key, Int[np.ndarray, " _"]]:
        clipped = {key: np.clip(x, -MAX_OCTAVES, MAX_OCTAVES) for key, x in logs.items()}
        return {key: np.rint(precision * x).astype(np.int32) for key, x in clipped.items()}

    return Gains(precision, rounded(rows), rounded(cols))


def choose_precision(
    rows: LogGains, cols: LogGains, shapes: MatrixShapes, lam: float, distortion: Callable[[Gains], float]
) -> Gains:
    """The gains rounded to the precision with the smallest J = bits / N + lam D.

    Args:
        rows: float log2 of the row gains.
        cols: float log2 of the column gains.
        shapes: of every coded matrix; N is the sum of their sizes.
        lam: bits/weight per nat/token.
        distortion: D in nats/token of rounded gains; a constant may be missing.
    """
    weights = sum(out * n for out, n in shapes.values())

    def cost(gains: Gains) -> float:
        return 8 * len(pack_gains(gains, shapes)) / weights + lam * distortion(gains)

    return min((quantize_gains(rows, cols, p) for p in GAIN_PRECISIONS), key=cost)


def pack_gains(gains: Gains | None, shapes: MatrixShapes) -> bytes:
    """Gains as bytes, none for None.

    One byte of precision and coding, a bit for each list that is not all zero, then these lists in the
    shortest of _CODINGS.

    Args:
        gains: integer log gains.
        shapes: of every coded matrix, in the order of the file.
    """
    if gains is None:
        return b""
    lists = [part.get(key, np.zeros(0, np.int32)) for part in (gains.rows, gains.cols) for key in shapes]
    present = [bool(np.any(x)) for x in lists]
    groups = [_groups(_sides(shapes), present, coding) for coding in range(len(_CODINGS))]
    bodies = [b"".join(pack_lists([lists[i] for i in group]) for group in some) for some in groups]
    best = min(range(len(bodies)), key=lambda i: len(bodies[i]))
    head = GAIN_PRECISIONS.index(gains.precision) * len(_CODINGS) + best
    return bytes([head]) + np.packbits(present).tobytes() + bodies[best]


def unpack_gains(data: bytes, shapes: MatrixShapes) -> Gains | None:
    """Inverse of `pack_gains`; lists of zeros are left out; raises ValueError, OverflowError for damaged bytes."""
    if not data:
        return None
    precision, coding = divmod(data[0], len(_CODINGS))
    sides = _sides(shapes)
    behind_flags = 1 + (len(sides) + 7) // 8
    if precision >= len(GAIN_PRECISIONS) or len(data) < behind_flags:
        raise ValueError("the gains end before their flags, or have no precision")
    present = np.unpackbits(np.frombuffer(data[1:behind_flags], np.uint8))[: len(sides)].astype(bool).tolist()
    data, exponents = data[behind_flags:], {}
    for group in _groups(sides, present, coding):
        lists, data = unpack_lists(data, [sides[i].length for i in group])
        if any(np.abs(x.astype(np.int64)).max(initial=0) > MAX_OCTAVES * GAIN_PRECISIONS[precision] for x in lists):
            raise ValueError(f"a gain lies beyond {MAX_OCTAVES} octaves")
        exponents |= dict(zip(group, lists, strict=True))
    if data:
        raise ValueError("the gains do not end with their last value")
    gains = Gains(GAIN_PRECISIONS[precision], {}, {})
    for i in sorted(exponents):
        getattr(gains, sides[i].part)[sides[i].key] = exponents[i]
    return gains


class _Side(NamedTuple):
    part: str
    key: Key
    length: int


def _sides(shapes: MatrixShapes) -> list[_Side]:
    """Every list that a file may hold: the rows of all matrices, then the columns."""
    return [_Side(part, key, shape[i]) for i, part in enumerate(("rows", "cols")) for key, shape in shapes.items()]


def _groups(sides: Sequence[_Side], present: Sequence[bool], coding: int) -> list[list[int]]:
    """The lists that share a table, of those present."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, side in enumerate(sides):
        if present[i]:
            groups.setdefault(((), (side.part,), (side.part, side.key[1]))[coding], []).append(i)
    return list(groups.values())
