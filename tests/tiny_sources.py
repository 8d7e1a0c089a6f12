"""Tiny models as the values that the rooms pass on: subjects, models in coordinates, what the encoder starts from."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from conftest import synthetic_moments

from rdopt.calibration.moments import Moments
from rdopt.calibration.subject import Subject
from rdopt.checkpoint.families import Architecture
from rdopt.checkpoint.folder import Checkpoint, open_checkpoint
from rdopt.config.schema import EncodeConfig
from rdopt.encode.source import Source, make_source
from rdopt.operator.params import Params, load_params
from rdopt.transforms.aligned import UNMEASURED, Aligned, Block, distortion
from rdopt.transforms.gauges.coordinates import Gauges

FILES = {"tokenizer.json": b'{"version": "1.0"}', "special_tokens_map.json": b"{}"}


def subject_of(
    params: Params, arch: Architecture, config: Mapping[str, Any] | None = None, files: Mapping[str, bytes] = FILES
) -> Subject:
    """A model in memory as one that was read from a folder, which holds the files alone."""
    folder = Path(tempfile.mkdtemp(prefix="rdopt-subject-"))
    for name, data in files.items():
        (folder / name).write_bytes(data)
    checkpoint = Checkpoint(folder=folder, config=dict(config or {}), arch=arch, entries={})
    return Subject(checkpoint=checkpoint, params=params, fingerprint="")


def aligned_of(
    params: Params, arch: Architecture, moments: Moments = UNMEASURED, config: Mapping[str, Any] | None = None, **more
) -> Aligned:
    """A model in its own coordinates, unless `more` says otherwise."""
    return Aligned(subject=subject_of(params, arch, config), moments=moments, **more)


def source_of(folder: Path, encode: EncodeConfig = EncodeConfig()) -> Source:  # noqa: B008 - frozen
    """The encoder's input for a folder, with made-up moments."""
    checkpoint = open_checkpoint(folder)
    moments = synthetic_moments(checkpoint.arch)
    return make_source(aligned_of(load_params(checkpoint), checkpoint.arch, moments, checkpoint.config), encode)


def blocks_of(moments: Moments, params: Params | None = None) -> list[Block]:
    """The blocks of stacked arrays as they are, without weights where there are none."""
    weights = {} if params is None else params["blocks"]
    parts = (weights, moments.sigma, moments.G)
    layers = len(next(iter(moments.sigma.values())))
    return [Block(*({k: np.asarray(x[i]) for k, x in part.items()} for part in parts)) for i in range(layers)]


def fold_moments(moments: Moments, params: Params, arch: Architecture, gauges: Gauges) -> Moments:
    """The moments of the folded model, all blocks stacked."""
    aligned = aligned_of(params, arch, moments, gauges=gauges)
    blocks = [*aligned.blocks()]
    sigma = {k: np.stack([block.sigma[k] for block in blocks]) for k in moments.sigma}
    G = {k: np.stack([block.G[k] for block in blocks]) for k in moments.G}
    return Moments(sigma, G, moments.tokens, aligned.end_moments)


def stacked_distortion(params: Params, decoded: Params | None, moments: Moments) -> float:
    """D of the errors between two sets of stacked weights, nats/token."""
    if decoded is None:
        return distortion(blocks_of(moments, params), None)
    return distortion(blocks_of(moments, params), lambda layer, name: decoded["blocks"][name][layer])
