"""What a file carries as it is: tensors in 16 bit, config.json and the tokenizer's files."""

import io
import json
import lzma
import tarfile
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float

from rdopt.checkpoint.families import Architecture, expected_tensors

_HALF_LIMIT = 6e4
_CONFIG = "config.json"


def sixteen_bit(x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """x as the file gives it back, float32."""
    return x.astype(_sixteen_bit_type(x)).astype(np.float32)


def _sixteen_bit_type(x: Float[np.ndarray, "*shape"]) -> Any:
    """float16 where its rounding error is no larger than bfloat16's and nothing overflows, else bfloat16."""
    if np.abs(x).max(initial=0) >= _HALF_LIMIT:
        return ml_dtypes.bfloat16
    half, brain = (
        np.sum((x.astype(kind).astype(np.float32) - x) ** 2, dtype=np.float64)
        for kind in (np.float16, ml_dtypes.bfloat16)
    )
    return np.float16 if half <= brain else ml_dtypes.bfloat16


def pack_uncoded(tensors: Iterable[tuple[str, Float[np.ndarray, "..."]]], coded: Container[str]) -> bytes:
    """Every tensor but those named in `coded`: a type byte and its 16-bit values, little-endian.

    Args:
        tensors: checkpoint name and values, in the order of `expected_tensors`.
        coded: names of those that are elsewhere.
    """
    out = []
    for name, value in tensors:
        if name not in coded:
            x = np.asarray(value, np.float32)
            kind = _sixteen_bit_type(x)
            out.append(bytes([kind == np.float16]) + x.astype(kind).view(np.uint16).astype("<u2").tobytes())
    return b"".join(out)


def unpack_uncoded(
    data: bytes, arch: Architecture, coded: Container[str]
) -> Iterator[tuple[str, Float[np.ndarray, "..."]]]:
    """Inverse of `pack_uncoded`: checkpoint name, float32 values; raises ValueError for damaged bytes."""
    at = 0
    for name, shape in expected_tensors(arch).items():
        if name in coded:
            continue
        size = int(np.prod(shape))
        values = np.frombuffer(data, "<u2", size, at + 1)
        kind = np.float16 if data[at] == 1 else ml_dtypes.bfloat16
        yield name, values.astype(np.uint16).view(kind).astype(np.float32).reshape(shape)
        at += 1 + 2 * size
    if at != len(data):
        raise ValueError("the uncoded tensors do not end with their last value")


def pack_files(config: Mapping[str, Any], files: Mapping[str, bytes]) -> bytes:
    """config.json and the tokenizer's files as a compressed archive without dates or owners."""
    members = {_CONFIG: json.dumps(config, indent=2, sort_keys=True).encode(), **files}
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name in sorted(members):
            entry = tarfile.TarInfo(name)
            entry.size = len(members[name])
            archive.addfile(entry, io.BytesIO(members[name]))
    return lzma.compress(raw.getvalue())


def unpack_files(data: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Inverse of `pack_files`; raises ValueError, KeyError, lzma.LZMAError, tarfile.TarError for damaged bytes."""
    files = {}
    with tarfile.open(fileobj=io.BytesIO(lzma.decompress(data))) as archive:
        for entry in archive:
            stream = archive.extractfile(entry)
            # Names come from a file that anyone may have made: nothing outside the output folder.
            if stream is None or entry.name != entry.name.replace("\\", "/").rsplit("/", 1)[-1]:
                raise ValueError(f"the carried file {entry.name!r} is not a plain file name")
            files[entry.name] = stream.read()
    return json.loads(files.pop(_CONFIG)), files
