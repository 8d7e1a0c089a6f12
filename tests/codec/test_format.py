"""Claims about FORMAT.md: it ships with the package and speaks of the container that the code writes."""

import json
import re
from importlib.resources import files

import numpy as np
import pytest

from rdopt.codec.grids.trellis import STATES, next_states
from rdopt.codec.streams.container import STREAMS, pack

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
