"""What the encoder starts from: a model in its final coordinates, with everything that no slope changes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rdopt.calibration.moments import Moments
from rdopt.checkpoint.families import INPUT_OF, Architecture, Key, coded_matrices, coded_weights
from rdopt.codec.streams.fixed_point import undo_stored
from rdopt.codec.streams.uncoded import pack_files
from rdopt.config.errors import UserError
from rdopt.config.schema import EncodeConfig
from rdopt.encode.quantize import Grid, estimated_distortion, make_grid
from rdopt.operator.params import Params
from rdopt.transforms.stored.fold import fold_stored, fold_stored_moments
from rdopt.transforms.stored.rotations import StoredRotations


class Source(NamedTuple):
    """What is encoded: a model in its final coordinates, from which the stored transforms turn its matrices.

    Attributes:
        params: weights, float32, in which the network runs.
        arch: architecture.
        files: its config.json, tokenizer and generation files, packed.
        grid: steps of the coded matrices before the base step.
        weights: number of coded weights.
        parameters: number of parameters of the original model (the denominator of bpw_all).
        moments: second moments in the same coordinates.
        coded: the moments in the coordinates of `stored`, where the matrices are quantized.
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
    coded: Moments
    signal: float
    tokens: Int[np.ndarray, "n length"] | None = None
    stored: StoredRotations | None = None

    def coded_params(self) -> Params:
        """The weights in the coordinates where they are quantized."""
        return self.params if self.stored is None else fold_stored(self.params, self.stored)

    def turned(self, key: Key, W: Float[np.ndarray, "out in"]) -> Float[np.ndarray, "out in"]:
        """One matrix of the network in those coordinates."""
        return W if self.stored is None else self.stored.sides(*key, W.shape).fold(np.asarray(W, np.float64))

    def undone(self, key: Key, W: Float[np.ndarray, "out in"]) -> Float[np.ndarray, "out in"]:
        """One decoded matrix in the network's coordinates, as a decoder forms it."""
        return W if self.stored is None else undo_stored(self.stored, *key, INPUT_OF[key[1]], W)


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
    stored: StoredRotations | None = None,
) -> Source:
    """Prepares a model for encoding at any slope.

    Raises:
        UserError: weights or moments are not finite.
    """
    for layer, name in coded_matrices(arch.num_layers):
        W = params["blocks"][name][layer]
        if not np.isfinite(W).all():
            raise UserError(f"{arch.tensor_name(layer, name)} holds NaN or infinity; mend the checkpoint.")
    coded = moments if stored is None else fold_stored_moments(moments, stored)
    used = None if tokens is None or encode.drift == "none" else tokens[: encode.drift_sequences]
    return Source(
        params=params,
        arch=arch,
        files=pack_files(config, files),
        grid=make_grid(coded, arch.num_layers, encode),
        weights=coded_weights(arch),
        parameters=parameters,
        moments=moments,
        coded=coded,
        signal=estimated_distortion(params, None, moments),
        tokens=used,
        stored=stored,
    )
