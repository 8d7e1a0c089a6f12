"""Tables of indices on a uniform grid: which classes share one, and whether it is derived or described.

A class's table is derived from its spread and the shape of the file, or described where that takes fewer bits. Finer
spreads fit the tables better and cost more side information; wider classes need fewer tables. All choices are priced
in real bytes of side information plus ideal code length, and the cheapest is taken.
"""

from collections.abc import Sequence
from decimal import Decimal
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rdopt.codec.coders.bits import BitReader, BitWriter, unzigzag, zigzag
from rdopt.codec.coders.constriction import Tables
from rdopt.codec.tables.classes import (
    MAX_CLASS,
    RowsCols,
    Spreads,
    classes_of,
    log2_spread,
    pack_spreads,
    quantize_spreads,
    rank1_spreads,
)
from rdopt.codec.tables.derived import BLEND_UNIT, SCALE_UNIT, approximate_tails, derived_frequencies
from rdopt.codec.tables.frequencies import PRECISION, ideal_bits, normalize
from rdopt.config.errors import UserError

UNIFORM_BLENDS, UNIFORM_SCALES, MAX_DERIVED = 8, 9, 2048
MAX_SIZE = 1 << 16  # beyond it the counts of all classes outgrow the model
CHOICES = ((0, 1), (1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (8, 2))


class UniformShape(NamedTuple):
    """The shape of all derived tables of a file.

    Attributes:
        blend: the Laplace density has weight blend / BLEND_UNIT.
        scale: spreads are multiplied by 2^((scale - UNIFORM_SCALES // 2) / SCALE_UNIT).
    """

    blend: int
    scale: int


@cache
def derived_table(shape: UniformShape, spread: tuple[int, int], size: int) -> Int[np.ndarray, " size"]:
    """Frequencies of |z| = 0..size-1 of one class, summing to 2^PRECISION, each at least 1.

    Args:
        shape: of the file.
        spread: log2 of that of the class, as `log2_spread` gives it.
        size: 1 + the largest magnitude, at most MAX_DERIVED.
    """
    if not 1 <= size <= MAX_DERIVED:
        raise ValueError(f"a derived table of {size} symbols, the limit is {MAX_DERIVED}")
    bounds = [k + Decimal("0.5") for k in range(size)]
    return derived_frequencies(bounds, spread, shape.scale - UNIFORM_SCALES // 2, shape.blend, escape=False)


def approximate_bits(
    scale: int, spread: Float[np.ndarray, " classes"], counts: Float[np.ndarray, "classes size"]
) -> Float[np.ndarray, "blends classes"]:
    """Code length in bits of these counts of |z| under the derived tables of every blend, per class, without signs.

    In float64, for choosing a shape; never for coding. The masses of a blend are those of its densities, blended.
    """
    t = (np.arange(counts.shape[1]) + 0.5) / (spread[:, None] * 2.0 ** ((scale - UNIFORM_SCALES // 2) / SCALE_UNIT))
    where = np.nonzero(counts)
    laplace, gaussian = (-np.diff(tail, axis=1, prepend=1.0)[where] for tail in approximate_tails(t))
    weight = np.arange(UNIFORM_BLENDS)[:, None] / BLEND_UNIT
    mass = weight * laplace + (1 - weight) * gaussian
    bits = -counts[where] * np.log2(np.maximum(mass, 0) + 2.0**-PRECISION)
    return np.stack([np.bincount(where[0], each, len(spread)) for each in bits])


class UniformPlan(NamedTuple):
    """Everything the entropy coder needs beside the indices.

    Attributes:
        precision: spreads are multiples of 1/precision octave (0: one class per matrix).
        width: that many neighbouring spread sums share a table.
        shape: of the derived tables.
        spreads: per matrix.
        tables: class -> frequencies of |z|.
        explicit: classes whose table is described in the file; the others derive theirs from the shape.
        bits: ideal code length of all indices.
    """

    precision: int
    width: int
    shape: UniformShape
    spreads: list[Spreads]
    tables: Tables
    explicit: frozenset[int]
    bits: float


def table_classes(spreads: Spreads, width: int) -> Int[np.ndarray, "out in"]:
    """Table class of every entry of a matrix."""
    return np.floor_divide(classes_of(spreads), width)


def write_tables(plan: UniformPlan) -> bytes:
    """The tables as one bit string in Elias gamma codes.

    UniformShape (blend, scale), number of classes; then per class its key (difference), its number of symbols,
    whether it is explicit, and if so its frequencies but the last.
    """
    out = BitWriter()
    out.gammas((*plan.shape, len(plan.tables)))
    last = 0
    for key in sorted(plan.tables):
        freq = plan.tables[key]
        out.gammas((zigzag(key - last), len(freq), int(key in plan.explicit)))
        if key in plan.explicit:
            out.gammas(freq[:-1])
        last = key
    return out.bytes()


def read_tables(data: bytes, precision: int, width: int) -> Tables:
    """Inverse of `write_tables`: every class's frequencies; raises ValueError for damaged bytes."""
    source = BitReader(data)
    shape = UniformShape(*source.gammas(2))
    if shape.blend >= UNIFORM_BLENDS or shape.scale >= UNIFORM_SCALES:
        raise ValueError(f"the shape of the tables is {tuple(shape)}")
    tables, key = {}, 0
    for _ in range(source.gamma()):
        step, size, explicit = source.gammas(3)
        key += unzigzag(step)
        if abs(key) > MAX_CLASS:
            raise ValueError(f"class {key} is out of range")
        if explicit:
            freq = source.gammas(size - 1)
            rest = (1 << PRECISION) - sum(freq)
            if rest <= 0:
                raise ValueError(f"the table of class {key} exceeds its total")
            tables[key] = np.array([*freq, rest], np.int64)
        else:
            tables[key] = derived_table(shape, log2_spread(key, precision, width), size)
    return tables


def choose_plan(matrices: Sequence[Int[np.ndarray, "_ _"]], fits: Sequence[RowsCols] | None = None) -> UniformPlan:
    """The cheapest plan of `CHOICES` for these index matrices: codes (ideal) + tables + spreads (bytes).

    Args:
        matrices: indices.
        fits: row and column scales of each matrix; None: those of its indices.

    Raises:
        UserError: the indices are too large for any table.
    """
    fits = [rank1_spreads(z) for z in matrices] if fits is None else fits
    size = 1 + max(int(np.abs(z).max(initial=0)) for z in matrices)
    best, best_bits = None, np.inf
    for precision, width in CHOICES if size <= MAX_SIZE else ():
        try:
            spreads = [quantize_spreads(rho, kappa, precision) for rho, kappa in fits]
            counts = _class_counts(matrices, spreads, size, width)
            bits = _estimated_bits(counts, precision, width) + 8 * len(pack_spreads(spreads))
        except ValueError:  # more symbols than a table's total; classes of one spread may fit
            continue
        if bits < best_bits:
            best, best_bits = (counts, spreads, precision, width), bits
    if best is None:
        raise UserError(
            f"the steps are so fine that an index reaches {size - 1}, more than the tables hold; "
            "lower encode.lam or encode.target_bpw (about 12 bits/weight is the most)."
        )
    return _plan(*best)


def refit_plan(matrices: Sequence[Int[np.ndarray, "_ _"]], plan: UniformPlan) -> UniformPlan:
    """A plan with the tables of these matrices and another plan's classes."""
    size = 1 + max(int(np.abs(z).max(initial=0)) for z in matrices)
    counts = _class_counts(matrices, plan.spreads, size, plan.width)
    return _plan(counts, plan.spreads, plan.precision, plan.width)


def _plan(counts: dict[int, np.ndarray], spreads: list[Spreads], precision: int, width: int) -> UniformPlan:
    """The plan of these counts, its derived tables as the decoder forms them."""
    shape, _ = _best_shape(counts, precision, width)
    tables, explicit, bits = {}, set(), 0.0
    for key, row in counts.items():
        derived = None
        if len(row) <= MAX_DERIVED:
            derived = derived_table(shape, log2_spread(key, precision, width), len(row))
        own = normalize(row)
        own_bits = ideal_bits(row, own)
        if derived is None or own_bits + _described(own) < ideal_bits(row, derived):
            tables[key], bits = own, bits + own_bits
            explicit.add(key)
        else:
            tables[key], bits = derived, bits + ideal_bits(row, derived)
        bits += int(row[1:].sum())  # signs
    return UniformPlan(precision, width, shape, spreads, tables, frozenset(explicit), bits)


def _described(freq: Int[np.ndarray, " size"]) -> int:
    """Bits of an explicit table: its frequencies cost their gamma codes."""
    return sum(2 * int(f + 1).bit_length() - 1 for f in freq[:-1])


def _estimated_bits(counts: dict[int, np.ndarray], precision: int, width: int) -> float:
    """Codes and tables of a plan in bits, its derived tables in float64: forming them exactly takes most of the time.

    Raises:
        ValueError: more symbols than a table's total.
    """
    _, derived = _best_shape(counts, precision, width)
    bits = 0.0
    for key, row in counts.items():
        own = normalize(row)
        bits += min(ideal_bits(row, own) + _described(own), derived.get(key, np.inf)) + int(row[1:].sum())
    return bits


def _class_counts(matrices, spreads: Sequence[Spreads], size: int, width: int) -> dict[int, np.ndarray]:
    """Class -> how often each |z| occurs, up to the largest one."""
    counts: dict[int, np.ndarray] = {}
    for z, s in zip(matrices, spreads, strict=True):
        classes = table_classes(s, width)
        low = int(classes.min())
        joint = (classes - low).astype(np.int64) * size + np.abs(z)
        flat = np.bincount(joint.ravel(), minlength=(int(classes.max()) - low + 1) * size)
        for offset, row in enumerate(flat.reshape(-1, size)):
            if row.any():
                counts[low + offset] = counts.get(low + offset, 0) + row
    return {key: np.trim_zeros(row, "b") for key, row in counts.items()}


def _best_shape(counts: dict[int, np.ndarray], precision: int, width: int) -> tuple[UniformShape, dict[int, float]]:
    """The shape whose derived tables code all classes in the fewest bits, and those of each class it can have them for.

    Bits in float64, without signs.
    """
    rows = {key: row for key, row in counts.items() if len(row) <= MAX_DERIVED}
    if not rows:
        return UniformShape(0, UNIFORM_SCALES // 2), {}
    dense = np.zeros((len(rows), max(map(len, rows.values()))))
    for i, row in enumerate(rows.values()):
        dense[i, : len(row)] = row
    octaves = np.array([a / b for a, b in (log2_spread(key, precision, width) for key in rows)])
    bits_of = [approximate_bits(scale, 2.0**octaves, dense) for scale in range(UNIFORM_SCALES)]
    shapes = (UniformShape(*x) for x in product(range(UNIFORM_BLENDS), range(UNIFORM_SCALES)))
    bits = {shape: bits_of[shape.scale][shape.blend] for shape in shapes}
    best = min(bits, key=lambda shape: float(bits[shape].sum()))
    return best, dict(zip(rows, bits[best].tolist(), strict=True))
