"""What the encoder starts from: a model in its final coordinates, with everything that no slope changes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from rdopt.calibration import Moments
from rdopt.checkpoint import Architecture, hf_name
from rdopt.codec.quantize import Grid, coded_matrices, estimated_distortion, make_grid
from rdopt.codec.stored import Stored
from rdopt.codec.uncoded import pack_files
from rdopt.config import EncodeConfig
from rdopt.config.errors import UserError
from rdopt.operator import Params


class Source(NamedTuple):
    """What is encoded: a model in its final coordinates.

    Attributes:
        params: weights, float32.
        arch: architecture.
        files: its config.json, tokenizer and generation files, packed.
        grid: steps of the coded matrices before the base step.
        weights: number of coded weights.
        parameters: number of parameters of the original model (the denominator of bpw_all).
        moments: second moments in the same coordinates.
        signal: 1/2 tr(G W sigma W^T) summed over the matrices, nats/token.
        tokens: calibration sequences, where the drift of the activations can be corrected.
        stored: the transforms that the decoder has to undo, if any.
    """

    params: Params
    arch: Architecture
    files: bytes
    grid: Grid
    weights: int
    parameters: int
    moments: Moments
    signal: float
    tokens: Int[np.ndarray, "n length"] | None = None
    stored: Stored | None = None


def make_source(
    params: Params,
    arch: Architecture,
    config: Mapping[str, Any],
    files: Mapping[str, bytes],
    moments: Moments,
    encode: EncodeConfig,
    parameters: int,
    *,
    tokens: Int[np.ndarray, "n length"] | None = None,
    stored: Stored | None = None,
) -> Source:
    """Prepares a model for encoding at any slope.

    With `stored`, params and moments are in its coordinates (see `stored.blockwise_pca`), in which the network
    cannot run: the drift of the activations is then left alone.

    Raises:
        UserError: weights or moments are not finite.
    """
    weights = 0
    for layer, name in coded_matrices(arch.num_layers):
        W = params["blocks"][name][layer]
        weights += W.size
        if not np.isfinite(W).all():
            raise UserError(f"{hf_name(layer, name)} holds NaN or infinity; mend the checkpoint.")
    grid = make_grid(moments, arch.num_layers, encode)
    if encode.drift == "none" or stored is not None:
        tokens = None
    used = None if tokens is None else tokens[: encode.drift_sequences]
    return Source(
        params=params,
        arch=arch,
        files=pack_files(config, files),
        grid=grid,
        weights=weights,
        parameters=parameters,
        moments=moments,
        signal=estimated_distortion(params, None, moments),
        tokens=used,
        stored=stored,
    )
