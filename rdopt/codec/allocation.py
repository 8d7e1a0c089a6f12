"""Which classes share a table: the precision of the spreads and the width of a class, by total bits.

Finer spreads fit the tables better and cost more side information; wider classes need fewer tables. All
choices are priced in real bytes of side information plus ideal code length, and the cheapest is taken.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from rdopt.codec.bits import BitReader, BitWriter, unzigzag, zigzag
from rdopt.codec.classes import Spreads, classes_of, quantize_spreads, rank1_spreads
from rdopt.codec.entropy import Tables, pack_lists
from rdopt.codec.tables import PRECISION, ideal_bits, normalize
from rdopt.config.errors import UserError

MAX_SIZE = 1 << 16  # beyond it the counts of all classes outgrow the model
CHOICES = ((0, 1), (1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (8, 2))


class Plan(NamedTuple):
    """Everything the entropy coder needs beside the indices.

    Attributes:
        precision: spreads are multiples of 1/precision octave (0: one class per matrix).
        width: that many neighbouring spread sums share a table.
        spreads: per matrix.
        tables: class -> frequencies of |z|.
        bits: ideal code length of all indices.
    """

    precision: int
    width: int
    spreads: list[Spreads]
    tables: Tables
    bits: float


def table_classes(spreads: Spreads, width: int) -> Int[np.ndarray, "out in"]:
    """Table class of every entry of a matrix."""
    return np.floor_divide(classes_of(spreads), width)


def write_tables(tables: Tables) -> bytes:
    """All tables as one bit string: count, then class (delta), symbols, frequencies in Elias gamma codes."""
    out = BitWriter()
    out.gamma(len(tables))
    last = 0
    for key in sorted(tables):
        out.gamma(zigzag(key - last))
        out.gamma(len(tables[key]))
        # The last frequency follows from the total.
        out.gammas(tables[key][:-1])
        last = key
    return out.bytes()


def read_tables(data: bytes) -> Tables:
    """Inverse of `write_tables`.

    Raises:
        ValueError: damaged bytes.
    """
    source = BitReader(data)
    tables, key = {}, 0
    for _ in range(source.gamma()):
        key += unzigzag(source.gamma())
        freq = source.gammas(source.gamma() - 1)
        rest = (1 << PRECISION) - sum(freq)
        if rest <= 0:
            raise ValueError(f"the table of class {key} exceeds its total")
        tables[key] = np.array([*freq, rest], np.int64)
    return tables


def choose_plan(matrices: Sequence[Int[np.ndarray, "_ _"]]) -> Plan:
    """The cheapest plan of `CHOICES` for these index matrices: codes (ideal) + tables + spreads (bytes).

    Raises:
        UserError: the indices are too large for any table.
    """
    fits = [rank1_spreads(z) for z in matrices]
    size = 1 + max(int(np.abs(z).max(initial=0)) for z in matrices)
    best, best_bits = None, np.inf
    for precision, width in CHOICES if size <= MAX_SIZE else ():
        try:
            plan = _plan(matrices, fits, size, precision, width)
        except ValueError:  # more symbols than a table's total; classes of one spread may fit
            continue
        side = len(write_tables(plan.tables)) + len(pack_spreads(plan.spreads))
        if plan.bits + 8 * side < best_bits:
            best, best_bits = plan, plan.bits + 8 * side
    if best is None:
        raise UserError(
            f"the steps are so fine that an index reaches {size - 1}, more than the tables hold; "
            "lower encode.lam or encode.target_bpw (about 12 bits/weight is the most)."
        )
    return best


def _plan(matrices, fits, size: int, precision: int, width: int) -> Plan:
    spreads = [quantize_spreads(rho, kappa, precision) for rho, kappa in fits]
    counts: dict[int, np.ndarray] = {}
    for z, s in zip(matrices, spreads, strict=True):
        classes = table_classes(s, width)
        low = int(classes.min())
        joint = (classes - low).astype(np.int64) * size + np.abs(z)
        found = np.bincount(joint.ravel(), minlength=(int(classes.max()) - low + 1) * size)
        for offset, row in enumerate(found.reshape(-1, size)):
            if row.any():
                counts[low + offset] = counts.get(low + offset, 0) + row
    tables = {key: normalize(np.trim_zeros(row, "b")) for key, row in counts.items()}
    signs = sum(int(row[1:].sum()) for row in counts.values())
    bits = sum(ideal_bits(np.trim_zeros(row, "b"), tables[key]) for key, row in counts.items())
    return Plan(precision, width, spreads, tables, bits + signs)


def pack_spreads(spreads: Sequence[Spreads]) -> bytes:
    """Row spreads, then column spreads, of all matrices as one entropy-coded string."""
    return pack_lists([s.row for s in spreads]) + pack_lists([s.col for s in spreads])
