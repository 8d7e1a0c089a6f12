"""Reads a Hugging Face folder: config.json and single or sharded safetensors, one tensor at a time.

The headers are read here because the numpy front end of safetensors does not know bfloat16.
"""

from __future__ import annotations

import importlib.resources
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float

from rdopt.checkpoint.families import HEAD, Architecture, architecture_from_config, expected_tensors
from rdopt.config.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
NUMPY_TYPES = {"F32": np.dtype("<f4"), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype("<f2")}

_MAX_HEADER = 100_000_000  # the limit of the safetensors format
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where one tensor lies: file, stored type, shape and byte range."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint whose headers have been checked; tensors are read when asked for."""

    folder: Path
    config: dict[str, Any]
    arch: Architecture
    entries: dict[str, Entry]

    def names(self) -> list[str]:
        """The tensors of the network in file order of the architecture."""
        return list(expected_tensors(self.arch))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor."""
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        """The stored type of one tensor: "F32", "BF16" or "F16"."""
        return self._entry(name).dtype

    @property
    def num_parameters(self) -> int:
        """Parameters of the network; a tied head counts once."""
        return sum(math.prod(shape) for shape in expected_tensors(self.arch).values())

    def tensor(self, name: str) -> Float[np.ndarray, " ..."]:
        """One tensor as float32, upcast exactly.

        Raises:
            UserError: no such tensor, an unreadable file, or a NaN or infinite weight.
        """
        entry = self._entry(name)
        try:
            with entry.file.open("rb") as file:
                file.seek(entry.start)
                data = file.read(entry.end - entry.start)
        except OSError as error:
            raise UserError(f"{entry.file} cannot be read ({error.strerror}); restore the file.") from error
        if len(data) != entry.end - entry.start:
            raise UserError(f"{entry.file} ends inside tensor {name}: truncated; copy or download it again.")
        values = np.frombuffer(data, NUMPY_TYPES[entry.dtype]).astype(np.float32).reshape(entry.shape)
        finite = np.isfinite(values)
        if not finite.all():
            raise UserError(
                f"Tensor {name} in {entry.file} holds {int((~finite).sum())} NaN or infinite weights of "
                f"{values.size}; the checkpoint is damaged: copy, download or train it again."
            )
        return values

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise UserError(f"Tensor {name} is missing from {self.folder}; copy or download it again.")
        return self.entries[name]


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Opens "demo" (the model inside the package), a folder, or a model of the Hugging Face hub.

    Only config.json and the headers are read; names, shapes, types and file sizes are checked here.

    Raises:
        UserError: no such model, an unsupported one, or a damaged or incomplete checkpoint.
    """
    folder = _locate(model, _HUB_PATTERNS)
    config = read_json(folder / "config.json")
    arch = architecture_from_config(config)
    checkpoint = Checkpoint(folder=folder, config=config, arch=arch, entries=_entries(folder))
    for name, shape in expected_tensors(arch).items():
        if checkpoint.shape(name) != shape:
            raise UserError(
                f"Tensor {name} in {folder} has shape {checkpoint.shape(name)}, but config.json makes it "
                f"{shape}; mend config.json or take the weights that belong to it."
            )
    _refuse_strangers(checkpoint)
    return checkpoint


def read_config(model: str | Path) -> dict[str, Any]:
    """config.json of "demo", of a folder, with or without weights, or of a hub name, of which nothing else is fetched.

    Raises:
        UserError: there is none, or it is no JSON object.
    """
    return read_json(_locate(model, ["config.json"]) / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: the file is absent, unreadable or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; a Hugging Face checkpoint folder needs it.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); copy or download it again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; copy or download it again.")
    return value


def read_header(path: Path) -> dict[str, Entry]:
    """The entries of one safetensors file, checked against the size of the file.

    Raises:
        UserError: the file is absent, truncated, damaged, or stores a type other than F32, BF16, F16.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length <= min(_MAX_HEADER, size) else b""
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; copy or download the checkpoint again.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); restore the file.") from error
    damaged = UserError(f"{path} ({size} bytes) is truncated or damaged; copy or download it again.")
    if size < 8 or len(text) != length:
        raise damaged
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        raw = {name: _entry(path, value, 8 + length) for name, value in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged from error
    for name, entry in raw.items():
        _check_entry(name, entry, size)
    return raw


def _entry(path: Path, value: dict[str, Any], data: int) -> Entry:
    start, end = (data + int(offset) for offset in value["data_offsets"])
    shape = tuple(int(n) for n in value["shape"])
    return Entry(file=path, dtype=str(value["dtype"]), shape=shape, start=start, end=end)


def _check_entry(name: str, entry: Entry, size: int) -> None:
    if entry.dtype not in NUMPY_TYPES:
        raise UserError(
            f"Tensor {name} in {entry.file} is stored as {entry.dtype}; supported are {', '.join(NUMPY_TYPES)}: "
            "convert the checkpoint to one of them."
        )
    if entry.end > size:
        raise UserError(
            f"{entry.file} has {size} bytes but tensor {name} ends at byte {entry.end}: the file is "
            "truncated; copy or download it again."
        )
    fits = entry.end - entry.start == math.prod(entry.shape) * NUMPY_TYPES[entry.dtype].itemsize
    if not fits or entry.start < 8 or min(entry.shape, default=1) < 0:
        raise UserError(
            f"{entry.file} is damaged: the bytes of tensor {name} do not fit its shape; copy it again."
        )


def _entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of a single or sharded checkpoint."""
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    if not (folder / INDEX).exists():
        raise UserError(f"{folder} holds neither {SINGLE} nor {INDEX}; convert its weights to safetensors.")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{folder / INDEX} has no usable weight_map; copy or download it again.")
    shards = {name: read_header(folder / name) for name in sorted(set(weight_map.values()))}
    for tensor, shard in weight_map.items():
        if tensor not in shards[shard]:
            raise UserError(f"Tensor {tensor} is missing from {folder / shard}; copy or download it again.")
    return {tensor: shards[shard][tensor] for tensor, shard in weight_map.items()}


def _refuse_strangers(checkpoint: Checkpoint) -> None:
    """A tensor without a place in the network would be lost in silence and may change what it computes."""
    known = set(expected_tensors(checkpoint.arch)) | {HEAD}  # a tied checkpoint may repeat its embedding
    strange = [n for n in checkpoint.entries if n not in known and not n.endswith("rotary_emb.inv_freq")]
    if strange:
        raise UserError(
            f"{checkpoint.folder} holds tensor {strange[0]} ({len(strange)} such), which has no place in the "
            f"{checkpoint.arch.model_type} network of its config.json; remove it or mend config.json."
        )


def _locate(model: str | Path, patterns: list[str]) -> Path:
    if model == "demo":
        return Path(str(importlib.resources.files("rdopt") / "demo"))
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path} is a file; give the folder that holds config.json and the weights.")
    if isinstance(model, Path) or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise UserError(f"{path} does not exist; give an existing folder, a hub name (owner/model) or demo.")
    return _download(model, patterns)


def _download(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and rarely needed

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client raises a dozen unrelated types (HTTP, validation, offline)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name} is no existing folder and could not be fetched from the Hugging Face hub ({reason}); "
            "check the name and the connection, or give a local folder or demo."
        ) from error
