"""Claims about FORMAT.md: it ships with the package and speaks of the container that the code writes."""

import json
import re
from collections.abc import Iterable
from importlib.resources import files

import numpy as np
import pytest

from rdopt.codec.coders.adaptive import starting_contexts
from rdopt.codec.coders.bits import BitWriter
from rdopt.codec.coders.huffman import code_sizes
from rdopt.codec.coders.logistic import laws
from rdopt.codec.coders.rans import make_coder
from rdopt.codec.grids.steps import exp_steps
from rdopt.codec.grids.trellis import STATES, next_states
from rdopt.codec.streams.container import STREAMS, pack
from rdopt.codec.tables.trellis import TrellisShape, table
from rdopt.codec.tables.uniform import UniformShape, derived_table
from rdopt.transforms.stored.angles import sine_tables

TEXT = (files("rdopt") / "codec" / "FORMAT.md").read_text(encoding="utf-8")


def test_the_document_is_of_the_version_that_files_say():
    data = pack({}, b"")
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert TEXT.startswith(f"# The file format, version {header['__metadata__']['version']}\n")


def test_the_document_names_the_streams_in_their_order():
    assert "\n    " + "  ".join(STREAMS) + "\n" in TEXT


def row(name: str) -> list[str]:
    """The cells of a row of its table of codes."""
    found = re.search(rf"^\| {re.escape(name)} \|(.*)\|$", TEXT, re.MULTILINE)
    assert found is not None
    return [cell.strip() for cell in found[1].split("|")]


@pytest.mark.parametrize("states", [s for s in STATES if s > 1])
def test_its_table_of_codes_gives_the_machine(states):
    column = row("S").index(str(states))
    h0, h1 = (int(row(f"{name} (octal)")[column], 8) for name in ("h0", "h1"))
    step = [
        [(s >> 1) ^ (h1 >> 1 if (parity + s) % 2 else 0) ^ (h0 >> 1 if s % 2 else 0) for parity in (0, 1)]
        for s in range(states)
    ]
    assert np.array_equal(step, next_states(states))


def spelled(values: Iterable[int]) -> str:
    """Numbers as the document writes them."""
    return " ".join(str(int(x)) for x in values)


def test_its_check_values_are_those_of_the_code():
    cos, sin = sine_tables(14)
    start, reach = laws()
    law = np.diff(start[32, 5, : 2 * int(reach[32]) + 4].astype(np.int64))
    tables = [table(TrellisShape(15, 6, 1), grid, (0, 1)) for grid in (0, 1)]
    coder = make_coder(tables, [0, 0])
    out = BitWriter()
    out.gammas((0, 1, 2, 7))
    gammas = "".join(f"{byte:08b}" for byte in out.bytes())
    expected = (
        ("gamma codes of 0, 1, 2, 7", f"{gammas[0]} {gammas[1:4]} {gammas[4:7]} {gammas[7:14]}"),
        ("M_0 .. M_3 for P = 4", spelled(exp_steps(np.arange(4)) * 2.0**23)),
        ("cos_14 and sin_14 at 1", spelled((cos[1], sin[1]))),
        ("section 6, row 32, fraction 5", spelled(law)),
        ("section 8, s0", spelled(tables[0])),
        ("section 8, s0 on grid 1", spelled(tables[1])),
        ("section 9, next of 8 states", ", ".join(spelled(pair) for pair in next_states(8))),
        ("section 10, Huffman lengths of s0", spelled(code_sizes(tables[0]))),
        ("section 10, first contexts of s0", spelled(starting_contexts(coder)[0][:8])),
        (
            "section 11, blend 1, scale 4, (a, b) = (0, 8), size 6",
            spelled(derived_table(UniformShape(1, 4), (0, 8), 6)),
        ),
    )
    for what, value in expected:
        assert f"| {what} | {value} |" in TEXT
