"""The file: one safetensors container with one byte string per kind of stream and one binary index.

Layout (codec/FORMAT.md): the safetensors header's metadata are {"format": "rdopt", "version", "sha256" of the index};
the tensors are one-dimensional uint8. The index begins with a SHA-256 per other stream in the order of STREAMS,
then holds what `index.write_index` wrote. The bytes depend on the content only: header keys are sorted.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from operator import index as as_integer
from pathlib import Path

from rdopt.checkpoint.atomic import new_file
from rdopt.config.errors import UserError

VERSION = 4
STREAMS = ("codes", "tables", "scales", "structured", "gains", "transforms", "embeddings", "uncoded", "files")
_DIGEST = 32


def pack(streams: Mapping[str, bytes], index: bytes) -> bytes:
    """The container's bytes.

    Args:
        streams: kind (of STREAMS) -> bytes; empty ones are left out.
        index: what the decoder reads first.
    """
    present = {k: streams[k] for k in STREAMS if streams.get(k)}
    digests = b"".join(hashlib.sha256(streams.get(k, b"")).digest() for k in STREAMS)
    body = {"index": digests + index, **present}
    meta = {"format": "rdopt", "sha256": hashlib.sha256(body["index"]).hexdigest(), "version": str(VERSION)}
    header: dict[str, object] = {"__metadata__": meta}
    at = 0
    for name, data in body.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([struct.pack("<Q", len(text)), text, *body.values()])


def unpack(data: bytes, name: str = "the file") -> tuple[dict[str, bytes], bytes]:
    """The streams and the index of a container, every hash checked.

    Raises:
        UserError: not a container, another version, truncated, or altered.
    """
    try:
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + length])
        meta = header.pop("__metadata__")
        spans = {k: (as_integer(a), as_integer(b)) for k, v in header.items() for a, b in [v["data_offsets"]]}
        kind, version, digest = meta["format"], meta["version"], meta["sha256"]
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{name} is not an rdopt file or its header is damaged; encode it again.") from error
    if kind != "rdopt" or version != str(VERSION):
        raise UserError(f"{name} is of format {kind} version {version}; this rdopt reads rdopt version {VERSION}.")
    start = 8 + length
    size = max((end for _, end in spans.values()), default=0)
    if len(data) != start + size:
        raise UserError(f"{name} has {len(data)} bytes, its header says {start + size}: "
                        "it was truncated or extended; copy or encode it again.")
    streams = {k: data[start + a : start + b] for k, (a, b) in spans.items()}
    index = streams.pop("index", b"")
    if hashlib.sha256(index).hexdigest() != digest or set(streams) - set(STREAMS):
        raise UserError(f"the index of {name} does not match its SHA-256: the file was altered; copy it again.")
    for i, kind in enumerate(STREAMS):
        if hashlib.sha256(streams.get(kind, b"")).digest() != index[i * _DIGEST : (i + 1) * _DIGEST]:
            raise UserError(f"the {kind} of {name} do not match their SHA-256: the file was altered; copy it again.")
    return {k: streams.get(k, b"") for k in STREAMS}, index[len(STREAMS) * _DIGEST :]


def write_container(path: Path, data: bytes) -> None:
    """Writes the bytes under the final name only when they are complete; refuses an existing file."""
    with new_file(path) as part:
        Path(part).write_bytes(data)


def read_container(path: Path) -> tuple[dict[str, bytes], bytes]:
    """`unpack` of a file.

    Raises:
        UserError: the file is missing or damaged.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file; name one written by rdopt encode.")
    return unpack(path.read_bytes(), str(path))
