"""transforms.json and transforms.safetensors: the transforms of an aligned model, beside its weights.

The JSON file holds one record per site, the tensor names of the folded norm gains and facts about the
original; the safetensors file holds the arrays that both refer to.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from safetensors.numpy import load_file, save

from rdopt.checkpoint.families import Architecture
from rdopt.checkpoint.folder import Checkpoint
from rdopt.config.errors import UserError
from rdopt.operator.params import Params
from rdopt.transforms.gauges.registry import OWNERS
from rdopt.transforms.records import RECORD_VERSION, TransformRecord, record_from_dict, record_to_dict
from rdopt.transforms.stored.rotations import StoredRotation, StoredRotations

JSON_NAME, TENSOR_NAME = "transforms.json", "transforms.safetensors"
GAINS = ("attn_norm", "mlp_norm", "final_norm")


class AlignmentFiles(NamedTuple):
    """What the two files hold.

    Attributes:
        records: field of `Gauges` -> its transform.
        gains: the original's norm gains by name; empty when none were folded.
        original: facts about the original: fingerprint, parameters, tied.
        stored: rotations that a file of these weights keeps and its decoder undoes; the weights do not have them.
    """

    records: dict[str, TransformRecord]
    gains: dict[str, Float[np.ndarray, "..."]]
    original: dict[str, Any]
    stored: StoredRotations | None = None


def alignment_of(
    records: Mapping[str, TransformRecord],
    params: Params,
    checkpoint: Checkpoint,
    fingerprint: str,
    stored: StoredRotations | None = None,
) -> AlignmentFiles:
    """The files' contents for transforms of this original model; gains are kept when they are folded."""
    gains = {}
    if any(OWNERS[field].unties for field in records):
        gains = {k: np.asarray(params["blocks"][k]) for k in GAINS[:2]} | {"final_norm": params["final_norm"]}
    original = {
        "fingerprint": fingerprint,
        "parameters": checkpoint.num_parameters,
        "tied": checkpoint.arch.tied,
    }
    return AlignmentFiles(dict(records), gains, original, stored)


def save_alignment(folder: Path, alignment: AlignmentFiles) -> None:
    """Writes both files into an existing folder."""
    sites, tensors = {}, {}
    for site, record in alignment.records.items():
        sites[site], arrays = record_to_dict(record, site)
        tensors |= arrays
    tensors |= {f"gain.{k}": np.asarray(v, np.float32) for k, v in alignment.gains.items()}
    plain = {
        "version": RECORD_VERSION,
        "sites": sites,
        "gains": sorted(alignment.gains),
        "original": alignment.original,
    }
    if alignment.stored is not None:
        plain["stored"], arrays = _stored_to_dict(alignment.stored)
        tensors |= arrays
    (folder / TENSOR_NAME).write_bytes(save({k: np.ascontiguousarray(v) for k, v in tensors.items()}))
    (folder / JSON_NAME).write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


def load_alignment(folder: Path) -> AlignmentFiles:
    """Reads what `save_alignment` wrote.

    Raises:
        UserError: the files are missing, damaged, or of another version.
    """
    path = folder / JSON_NAME
    if not path.is_file():
        raise UserError(f"{folder} has no {JSON_NAME}; name a folder written by rdopt train or rdopt export.")
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        tensors = load_file(str(folder / TENSOR_NAME))
    except Exception as error:
        raise UserError(f"the transforms in {folder} cannot be read ({error}); export the model again.") from error
    if plain.get("version") != RECORD_VERSION:
        raise UserError(f"{path} has version {plain.get('version')!r}; this rdopt reads {RECORD_VERSION}.")
    records = {site: record_from_dict(entry, tensors) for site, entry in plain["sites"].items()}
    gains = {name: tensors[f"gain.{name}"] for name in plain["gains"]}
    stored = _stored_from_dict(plain["stored"], tensors) if "stored" in plain else None
    return AlignmentFiles(records, gains, plain["original"], stored)


def _stored_to_dict(stored: StoredRotations) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    sites = [("inputs", *key, x) for key, x in stored.inputs.items()]
    sites += [("outputs", *key, x) for key, x in stored.outputs.items()]
    tensors = {f"stored.{i}.codes": site.codes.astype(np.int32) for i, (*_, site) in enumerate(sites)}
    tensors |= {
        f"stored.{i}.pairs": np.stack(site.pairs).astype(np.int32)
        for i, (*_, site) in enumerate(sites)
        if site.pairs is not None
    }
    facts = {"structure": stored.structure, "size": stored.size, "hadamard": stored.hadamard, "bits": stored.bits}
    return {**facts, "sites": [list(where) for *where, _ in sites]}, tensors


def _stored_from_dict(plain: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> StoredRotations:
    held: dict[str, dict[tuple[int, str], StoredRotation]] = {"inputs": {}, "outputs": {}}
    for i, (side, layer, name) in enumerate(plain["sites"]):
        pairs = tensors.get(f"stored.{i}.pairs")
        layers = None if pairs is None else tuple(pairs.astype(np.int64))
        held[side][layer, name] = StoredRotation(tensors[f"stored.{i}.codes"], layers)
    facts = plain["structure"], plain["size"], plain["hadamard"], plain["bits"]
    return StoredRotations(*facts, held["inputs"], held["outputs"])


def architecture_of_original(arch: Architecture, original: Mapping[str, Any]) -> Architecture:
    """The original's architecture from the aligned one: a head that was untied is tied again."""
    return replace(arch, tied=bool(original["tied"]))
