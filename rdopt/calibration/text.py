"""Text files to documents, and documents to calibration, selection and test parts that never mix.

A document's part is decided by a fixed-salt SHA-256 of its own characters, so it is the same in every run,
for every order and choice of files. The builtin text is the docstrings of the running Python's standard
library, parsed and never imported.
"""

import ast
import gzip
import hashlib
import json
import re
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from rdopt.config.errors import UserError

BUILTIN = "builtin"
SALT = b"rdopt text split 1\0"
# Shares of calibration and selection in percent; the rest is test.
CALIBRATION_SHARE, SELECTION_SHARE = 45, 10

_TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".jsonl")
# Files of records whose columns are not known here; taken as plain text they would calibrate on their markup.
_RECORD_SUFFIXES = (".parquet", ".arrow", ".csv", ".tsv", ".json")
_SEPARATORS = {"line": r"\n", "blank": r"\n(?:[ \t]*\n)+", "blank2": r"\n(?:[ \t]*\n){2,}"}
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_SHORTEST_DOCSTRING = 20


@dataclass(frozen=True, kw_only=True)
class Split:
    """Documents of the three parts; no document is in two of them."""

    calibration: tuple[str, ...]
    selection: tuple[str, ...]
    test: tuple[str, ...]


def read_documents(
    sources: Sequence[str | Path], split_on: Literal["line", "blank", "blank2", "file"] = "file"
) -> list[str]:
    """The documents of the sources, in the sources' order.

    Args:
        sources: UTF-8 text files, .jsonl files with a `text` field (each record one document), .gz of either,
            folders (searched for such files, sorted), or "builtin".
        split_on: what ends a document of a text file: every line end, one or more blank lines, two or more
            blank lines, or the end of the file.

    Raises:
        UserError: a source is missing, unreadable, not UTF-8, a damaged .gz or a table such as .csv or .parquet; a
            .jsonl record has no text; nothing but white space was found.
    """
    if not sources:
        raise UserError("No text was named: give files or folders, or builtin.")
    documents: list[str] = []
    for source in sources:
        if str(source) == BUILTIN:
            documents += builtin_documents()
            continue
        for path in _text_files(Path(source)):
            content = _read(path)
            is_records = _plain_suffix(path) == ".jsonl"
            documents += _records(path, content) if is_records else _cut(content, split_on)
    if not documents:
        raise UserError(f"The text {_listed(sources)} holds no words: give files with text in them.")
    return documents


def split_documents(documents: Iterable[str]) -> Split:
    """Sorts documents into calibration (45 %), selection (10 %) and test (45 %).

    The part follows from SHA-256(salt + document) alone. Copies of a document are dropped, the first kept.
    """
    parts: dict[str, list[str]] = {"calibration": [], "selection": [], "test": []}
    for document in dict.fromkeys(documents):
        parts[_part(document)].append(document)
    return Split(**{name: tuple(members) for name, members in parts.items()})


@lru_cache(maxsize=1)
def builtin_documents() -> tuple[str, ...]:
    """Docstrings of 20 characters and more in the running Python's standard library, files in sorted order.

    Raises:
        UserError: this Python has no library sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    docstrings: list[str] = []
    for path in sorted(root.rglob("*.py")):
        if _NOT_LIBRARY.isdisjoint(path.relative_to(root).parts):
            docstrings += _docstrings(path)
    if not docstrings:
        raise UserError(f"The builtin text needs Python's library sources, but {root} has none: "
                        "name text files instead.")
    return tuple(docstrings)


def _part(document: str) -> str:
    digest = hashlib.sha256(SALT + document.encode()).digest()
    share = int.from_bytes(digest[:8], "big") * 100 >> 64
    if share < CALIBRATION_SHARE:
        return "calibration"
    return "selection" if share < CALIBRATION_SHARE + SELECTION_SHARE else "test"


def _docstrings(path: Path) -> Iterator[str]:
    """Docstrings of one source file, in the order they stand; none when it does not parse."""
    with warnings.catch_warnings():
        # Invalid escapes in old library files are no concern of the user's.
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            return
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node) or ""
            if len(text) >= _SHORTEST_DOCSTRING and _is_encodable(text):
                yield text
        # Definitions hang on statements and handlers only; expressions, the bulk of the tree, are passed by.
        inner = (n for n in ast.iter_child_nodes(node) if isinstance(n, (ast.stmt, ast.ExceptHandler)))
        pending += reversed(list(inner))


def _text_files(path: Path) -> list[Path]:
    """The file itself, or the text files below a folder, sorted."""
    if path.is_file():
        if _plain_suffix(path) in _RECORD_SUFFIXES:
            raise UserError(f"The text {path} holds records of a kind that is not read: write them as .jsonl, an "
                            "object with a text field a line.")
        return [path]
    if not path.is_dir():
        raise UserError(f"The text {path} does not exist: name a file, a folder, or {BUILTIN}.")
    files = sorted(p for p in path.rglob("*") if _plain_suffix(p) in _TEXT_SUFFIXES and p.is_file())
    if not files:
        raise UserError(f"The folder {path} holds no text: files ending in {', '.join(_TEXT_SUFFIXES)} "
                        "are read, each also as .gz.")
    return files


def _plain_suffix(path: Path) -> str:
    """The suffix without .gz: .jsonl for a.jsonl.gz."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def _read(path: Path) -> str:
    """The characters of a file, un-gzipped, with \\n as the only line end."""
    try:
        raw = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            raw = gzip.decompress(raw)
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"The text {path} is not UTF-8 (byte {error.start}): convert it to UTF-8.") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UserError(f"The text {path} is not a whole gzip file: compress or fetch it again.") from None
    except OSError as error:
        raise UserError(f"The text {path} cannot be read ({error.strerror}): mend its rights.") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _cut(text: str, split_on: str) -> Iterator[str]:
    """The pieces of a text file that hold more than white space, without blank lines around them."""
    pieces = [text] if split_on == "file" else re.split(_SEPARATORS[split_on], text)
    yield from (piece.strip("\n") for piece in pieces if piece.strip())


def _records(path: Path, content: str) -> Iterator[str]:
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"Line {number} of {path} is not JSON: each must be one object.") from None
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UserError(f"Line {number} of {path} has no text: each record needs a text field.")
        if not _is_encodable(text):
            raise UserError(f"Line {number} of {path} holds half a surrogate pair, such as \\ud800 alone: "
                            "that is no character; remove it.")
        if text.strip():
            yield text


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _listed(sources: Sequence[str | Path]) -> str:
    shown = ", ".join(map(str, sources[:3]))
    return shown if len(sources) <= 3 else f"{shown} and {len(sources) - 3} more"
