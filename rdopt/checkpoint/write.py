"""Writes a Hugging Face folder: config.json, single or sharded safetensors, tokenizer files carried along.

The layout follows from config.json, so tensors may come in any order and only one is in memory at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float

from rdopt.checkpoint.atomic import new_folder
from rdopt.checkpoint.families import architecture_from_config, expected_tensors
from rdopt.checkpoint.folder import INDEX, NUMPY_TYPES, SINGLE
from rdopt.config.errors import UserError

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
CARRIED = (
    "tokenizer*",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One safetensors file to be: its name and its tensors with their shapes, in order."""

    name: str
    shapes: dict[str, tuple[int, ...]]


def write_checkpoint(
    out: str | Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, Float[np.ndarray, " ..."]]],
    *,
    dtype: str,
    files: Mapping[str, bytes] | None = None,
    shard_bytes: int | float = 5e9,
) -> None:
    """Writes the folder `out` that transformers loads; it appears complete or not at all.

    Args:
        out: a folder that does not exist yet.
        config: the contents of config.json; its dtype is replaced.
        tensors: (checkpoint name, array) pairs, each name of the architecture once, in any order.
        dtype: "float32", "bfloat16" or "float16"; values are rounded to nearest even.
        files: further files of the folder by name, such as those of `carried_files`.
        shard_bytes: the most bytes of weights in one file.

    Raises:
        UserError: `out` exists, the disk is full, or a tensor is missing, unknown, misshapen or not finite.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not supported; supported are {', '.join(DTYPES)}.")
    shapes = expected_tensors(architecture_from_config(config))
    itemsize = NUMPY_TYPES[DTYPES[dtype]].itemsize
    shards = plan_shards(shapes, itemsize, shard_bytes)
    with new_folder(out) as folder:
        _write_json(folder / "config.json", _with_dtype(config, dtype))
        if len(shards) > 1:
            _write_json(folder / INDEX, _index(shards, itemsize))
        _write_shards(folder, shards, tensors, dtype)
        for name, content in (files or {}).items():
            (folder / name).write_bytes(content)


def plan_shards(shapes: Mapping[str, tuple[int, ...]], itemsize: int, shard_bytes: int | float) -> list[Shard]:
    """Fills files in order, each up to `shard_bytes`; a tensor larger than that gets a file of its own."""
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * itemsize
        if groups[-1] and used + size > shard_bytes:
            groups.append({})
            used = 0
        groups[-1][name] = shape
        used += size
    if len(groups) == 1:
        return [Shard(name=SINGLE, shapes=groups[0])]
    total = len(groups)
    return [
        Shard(name=f"model-{number:05d}-of-{total:05d}.safetensors", shapes=group)
        for number, group in enumerate(groups, 1)
    ]


def carried_files(source: Path) -> dict[str, bytes]:
    """Tokenizer, generation and chat template files of a checkpoint folder by name."""
    entries = {entry for pattern in CARRIED for entry in source.glob(pattern)}
    return {
        entry.name: entry.read_bytes()
        for entry in sorted(entries)
        if entry.is_file() and not entry.name.endswith(".safetensors")
    }


def tensor_bytes(name: str, values: Float[np.ndarray, " ..."], dtype: str) -> bytes:
    """The little-endian bytes of a tensor in a stored type.

    Raises:
        UserError: a value is NaN or infinite, or becomes so in the stored type.
    """
    # An overflow is reported below, as a sentence.
    with np.errstate(over="ignore", invalid="ignore"):
        stored = np.ascontiguousarray(values).astype(NUMPY_TYPES[DTYPES[dtype]])
    if not np.isfinite(stored.astype(np.float32)).all():
        if np.isfinite(values).all():
            raise UserError(
                f"Tensor {name} has a weight of size {np.abs(values).max():.3g}, too large for {dtype}; "
                "write bfloat16 or float32."
            )
        raise UserError(f"Tensor {name} holds NaN or infinite weights; check the run that made it.")
    return stored.tobytes()


def _write_shards(
    folder: Path, shards: list[Shard], tensors: Iterable[tuple[str, np.ndarray]], dtype: str
) -> None:
    """Headers first; then each tensor goes straight to its place."""
    missing = {name: shape for shard in shards for name, shape in shard.shapes.items()}
    with ExitStack() as stack:
        places: dict[str, tuple[BinaryIO, int]] = {}
        for shard in shards:
            file = stack.enter_context((folder / shard.name).open("wb"))
            places |= {name: (file, offset) for name, offset in _write_header(file, shard, dtype).items()}
        for name, values in tensors:
            _check_tensor(name, np.shape(values), missing)
            file, offset = places[name]
            file.seek(offset)
            file.write(tensor_bytes(name, np.asarray(values), dtype))
            del missing[name]
    if missing:
        raise UserError(
            f"Tensor {next(iter(missing))} was not given ({len(missing)} missing); give every tensor."
        )


def _check_tensor(name: str, shape: tuple[int, ...], missing: Mapping[str, tuple[int, ...]]) -> None:
    if name not in missing:
        raise UserError(f"Tensor {name} has no place in the network of config.json, or was given twice.")
    if shape != missing[name]:
        raise UserError(
            f"Tensor {name} has shape {shape}, but config.json makes it {missing[name]}; mend one."
        )


def _write_header(file: BinaryIO, shard: Shard, dtype: str) -> dict[str, int]:
    """Writes a safetensors header; returns where each tensor's bytes begin in the file."""
    code = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for name, shape in shard.shapes.items():
        starts[name], end = end, end + math.prod(shape) * NUMPY_TYPES[code].itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    file.write(len(text).to_bytes(8, "little") + text)
    return {name: 8 + len(text) + start for name, start in starts.items()}


def _index(shards: list[Shard], itemsize: int) -> dict[str, Any]:
    weights = sum(math.prod(shape) for shard in shards for shape in shard.shapes.values())
    return {
        "metadata": {"total_parameters": weights, "total_size": weights * itemsize},
        "weight_map": {name: shard.name for shard in shards for name in shard.shapes},
    }


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """transformers 4 wrote torch_dtype; two keys that disagree would be worse than one."""
    return {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": dtype}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
