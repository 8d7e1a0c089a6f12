"""`rdopt inspect`: what a file, a run or a model folder holds, as one JSON shape."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rdopt.checkpoint.families import MATRICES, Architecture, coded_weights
from rdopt.checkpoint.folder import Checkpoint, open_checkpoint
from rdopt.codec.decoder import Decoded, decode_file
from rdopt.codec.streams.container import VERSION
from rdopt.config.errors import UserError
from rdopt.config.load import load_config
from rdopt.study.figures import weight_statistics
from rdopt.transforms.files import load_alignment

PARTS = ("codes", "tables", "scales", "structured", "gains", "transforms", "headers", "embeddings", "uncoded")


def inspect(path: str) -> dict[str, Any]:
    """The figures of a file, a run folder or a model folder.

    Returns:
        {"version", "model_type", "weights_coded", "weights_all", "bytes", "bpw": {part: bits per coded weight},
        "tensors": [...]}. A folder has no parts but "uncoded"; its tensors carry their statistics. A run adds
        "run" with its transforms and last metrics.

    Raises:
        UserError: nothing of rdopt's there, or damaged.
    """
    here = Path(path)
    if here.is_file():
        return _of_file(here, decode_file(here))
    if (here / "run.json").is_file():
        return _of_run(here)
    return _of_folder(open_checkpoint(path))


def _of_file(path: Path, decoded: Decoded) -> dict[str, Any]:
    tensors = [
        {
            "name": decoded.arch.tensor_name(*key),
            "shape": list(z.shape),
            "bpw_codes": decoded.code_bits[key] / z.size,
            "zeros": float(np.mean(z == 0)),
            "largest": int(np.abs(z).max(initial=0)),
        }
        for key, z in decoded.indices.items()
    ]
    return _figures(decoded.arch, decoded.parameters, path.stat().st_size, decoded.bits, tensors)


def _of_folder(checkpoint: Checkpoint) -> dict[str, Any]:
    arch, tensors = checkpoint.arch, []
    for layer in range(arch.num_layers):
        for name in MATRICES:
            tensor = arch.tensor_name(layer, name)
            W = checkpoint.tensor(tensor)
            tensors.append({"name": tensor, "shape": list(W.shape), **weight_statistics(W)._asdict()})
    size = sum(p.stat().st_size for p in checkpoint.folder.glob("*.safetensors") if "transforms" not in p.name)
    return _figures(arch, checkpoint.num_parameters, size, {"uncoded": 8 * size}, tensors)


def _figures(
    arch: Architecture, parameters: int, size: int, bits: Mapping[str, int], tensors: list[dict[str, Any]]
) -> dict[str, Any]:
    weights = coded_weights(arch)
    return {
        "version": VERSION,
        "model_type": arch.model_type,
        "weights_coded": weights,
        "weights_all": parameters,
        "bytes": size,
        "bpw": {part: bits.get(part, 0) / weights for part in PARTS},
        "tensors": tensors,
    }


def _of_run(run: Path) -> dict[str, Any]:
    figures = _of_folder(open_checkpoint(load_config(run / "config.yaml").model))
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    last = json.loads(lines[-1]) if lines else {}
    sites = {}
    if (run / "transforms.json").is_file():
        records = load_alignment(run).records
        sites = {site: {"kind": r.kind, "shape": list(r.shape)} for site, r in records.items()}
    return {**figures, "run": {"finished": (run / "done").is_file(), "transforms": sites, "last": last}}


def describe(figures: dict[str, Any]) -> str:
    """The JSON of `inspect` as a short text."""
    if not figures["tensors"]:
        raise UserError("there are no coded matrices; name a file, a run or a model folder.")
    lines = [
        f"{figures['model_type']}, {figures['weights_all']} parameters, {figures['weights_coded']} in "
        f"{len(figures['tensors'])} coded matrices, {figures['bytes']} bytes",
        "bits per coded weight: " + "  ".join(f"{k} {v:.4f}" for k, v in figures["bpw"].items()),
    ]
    if "run" in figures:
        lines.append(f"run: {json.dumps(figures['run'])}")
    keys = [k for k in figures["tensors"][0] if k not in ("name", "shape")]
    lines.append(f"{'tensor':46s} {'shape':>12s} " + " ".join(f"{k:>17s}" for k in keys))
    for tensor in figures["tensors"]:
        shape = "x".join(map(str, tensor["shape"]))
        lines.append(f"{tensor['name']:46s} {shape:>12s} " + " ".join(f"{tensor[k]:17.4g}" for k in keys))
    return "\n".join(lines)
