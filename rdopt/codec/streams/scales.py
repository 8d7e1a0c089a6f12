"""The stream of steps and spreads: families of smooth lists over the layers (see `smooth_lists`).

Row steps, column steps, row spreads and column spreads follow each other, so that a spread is predicted from the
steps of its channel and a matrix from those that share its input.
"""

from collections.abc import Mapping
from itertools import chain

from rdopt.checkpoint.families import Key, MatrixShapes
from rdopt.codec.coders.constriction import pack_lists
from rdopt.codec.streams.smooth_lists import Ints, pack_families, unpack_families
from rdopt.codec.tables.classes import Spreads


def pack_scales(rows: Mapping[Key, Ints], cols: Mapping[Key, Ints], spreads: Mapping[Key, Spreads]) -> bytes:
    """Row steps and spreads per (layer, matrix), column steps per (layer, group) as one string."""
    return pack_families(_all_families(rows, cols, spreads))


def plain_size(rows: Mapping[Key, Ints], cols: Mapping[Key, Ints], spreads: Mapping[Key, Spreads]) -> int:
    """Bytes of the same lists without any prediction, a table for each family."""
    return sum(len(pack_lists(family)) for family in _all_families(rows, cols, spreads))


def _all_families(
    rows: Mapping[Key, Ints], cols: Mapping[Key, Ints], spreads: Mapping[Key, Spreads]
) -> list[list[Ints]]:
    parts = (rows, cols, {k: s.row for k, s in spreads.items()}, {k: s.col for k, s in spreads.items()})
    return [[part[key] for key in family] for part in parts for family in _families(part)]


def unpack_scales(
    data: bytes, shapes: MatrixShapes, widths: Mapping[Key, int]
) -> tuple[dict[Key, Ints], dict[Key, Ints], dict[Key, Spreads]]:
    """Inverse of `pack_scales`: (rows, cols, spreads).

    Args:
        data: its bytes, and nothing behind.
        shapes: (layer, matrix) -> (out, in), in the order of packing.
        widths: (layer, group) -> length of its column steps, in the order of packing.

    Raises:
        ValueError: damaged bytes.
    """
    heights, ins = ({key: shape[i] for key, shape in shapes.items()} for i in range(2))
    parts = heights, widths, heights, ins
    unpacked, rest = unpack_families(data, [(len(f), part[f[0]]) for part in parts for f in _families(part)])
    if rest:
        raise ValueError("the scales do not end with their last value")
    lists = chain.from_iterable(unpacked)
    found = [{key: next(lists) for family in _families(part) for key in family} for part in parts]
    rows, cols, row_spreads, col_spreads = (
        {key: values[key] for key in part} for part, values in zip(parts, found, strict=True)
    )
    return rows, cols, {key: Spreads(row_spreads[key], col_spreads[key]) for key in shapes}


def _families(part: Mapping[Key, object]) -> list[list[Key]]:
    """Keys of one name, layer by layer, in the order in which the names first occur."""
    names: dict[str, list[Key]] = {}
    for key in part:
        names.setdefault(key[1], []).append(key)
    return list(names.values())
