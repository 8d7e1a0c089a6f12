"""The rotation of the residual stream (QuaRot 2404.00456, SliceGPT 2401.15024): R, whose columns are the new axes.

Norm gains are folded into the consumers first, W <- W diag(gain) R; producers become R^T W.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from rdopt.checkpoint.families import INPUT_OF, MATRICES, Architecture
from rdopt.operator.params import Params
from rdopt.transforms.arrays import AnyArray
from rdopt.transforms.gauges.site import NormGain, RotatedSite
from rdopt.transforms.maps import Map
from rdopt.transforms.matrices.frequency import dct, fourier
from rdopt.transforms.matrices.hadamard import hadamard
from rdopt.transforms.matrices.joint import joint_axes
from rdopt.transforms.matrices.pca import pca
from rdopt.transforms.matrices.random import random_orthogonal

JOINT_BYTES = 2**30  # of moments that are diagonalised together, float64


class Residual(RotatedSite):
    """R (d, d), orthogonal, one for the network."""

    name = field = "residual"
    outputs_changed, inputs_changed = frozenset({"o", "down"}), frozenset({"attn", "mlp"})
    unties = shared = True

    def start(
        self, basis: str, params: Params, arch: Architecture, sigma: Mapping[str, Any], seed: int
    ) -> Float[np.ndarray, "d d"] | None:
        """The basis over the channels, or what diagonalises moments of weights or activations."""
        d = arch.hidden_size
        if basis == "hadamard":
            # Random signs first, so that a constant direction of the stream does not land on one axis.
            signs = np.random.default_rng(seed).choice([-1.0, 1.0], d)
            return signs[:, None] * hadamard(d)
        if basis == "random":
            return random_orthogonal(seed, d)
        if basis in ("dct", "fourier"):
            return dct(d) if basis == "dct" else fourier(d)
        if basis == "pca":
            return pca(residual_gram(params, arch))
        if basis == "pca-act":
            return pca(residual_activation(params, sigma))
        return joint_axes(stream_rows(params, arch)) if basis == "joint" else None

    def shape(self, arch: Architecture) -> tuple[int, ...]:
        """(d, d)."""
        return arch.hidden_size, arch.hidden_size

    def block(self, gauge: Float[AnyArray, "d d"], layer: int, arch: Architecture) -> Float[AnyArray, "d d"]:
        """R."""
        return gauge

    def outputs(self, name: str, gauge: Float[AnyArray, "d d"], arch: Architecture) -> Map:
        """The stream: R^T x."""
        return Map(dense=(gauge.T, gauge))

    def inputs(self, group: str, gauge: Float[AnyArray, "d d"], gain: NormGain, arch: Architecture) -> Map:
        """The normalised stream: R^T (x / gain)."""
        return _normalised(gauge, gain)

    def gain(self, gain: Float[np.ndarray, " d"], gauge: Float[np.ndarray, "d d"], at: int) -> Float[np.ndarray, " d"]:
        """One: the consumers have it."""
        return np.ones_like(gain)

    def embedding(self, gauge: Float[AnyArray, "d d"]) -> Map:
        """The stream."""
        return Map(dense=(gauge.T, gauge))

    def head(self, gauge: Float[AnyArray, "d d"], gain: Float[AnyArray, " d"]) -> Map:
        """The normalised stream."""
        return _normalised(gauge, gain)


def _normalised(R: Float[AnyArray, "d d"], gain: NormGain) -> Map:
    return Map(before=None if gain is None else 1 / gain, dense=(R.T, R))


def stream_rows(params: Params, arch: Architecture) -> Iterator[Iterator[Float[np.ndarray, "_ d"]]]:
    """Every matrix that touches the stream with the stream's channels as columns, gains folded, float64.

    Where the moments of all of them would take more than JOINT_BYTES, those of one name in neighbouring layers are one
    pool: Jacobi sweeps take memory and time in proportion to the number of moments.
    """
    d, depth = arch.hidden_size, arch.num_layers
    pool = min(depth, math.ceil(depth * len(MATRICES) * 8 * d * d / JOINT_BYTES))
    for first in range(0, depth, pool):
        for name in MATRICES:
            yield (_stream_row(params, layer, name) for layer in range(first, min(first + pool, depth)))


def _stream_row(params: Params, layer: int, name: str) -> Float[np.ndarray, "_ d"]:
    W, norm = np.asarray(params["blocks"][name][layer], np.float64), f"{INPUT_OF[name]}_norm"
    return W.T if norm not in params["blocks"] else W * params["blocks"][norm][layer]


def residual_gram(params: Params, arch: Architecture) -> Float[np.ndarray, "d d"]:
    """Sum of W^T W of the consumers (gains folded) and W W^T of the producers, each divided by its trace."""
    total = np.zeros((arch.hidden_size, arch.hidden_size))
    for layer in range(arch.num_layers):
        for name in ("q", "k", "v", "gate", "up", "o", "down"):
            X = _stream_row(params, layer, name)
            gram = X.T @ X
            total += gram / np.trace(gram)
    return total


def residual_activation(params: Params, sigma: Mapping[str, Any]) -> Float[np.ndarray, "d d"]:
    """Sum over norm sites of the second moment of the normalised stream before the gain, each over its trace."""
    total = np.zeros(sigma["attn"].shape[1:])
    for group in ("attn", "mlp"):
        for S, gain in zip(sigma[group], params["blocks"][group + "_norm"], strict=True):
            moment = S / np.outer(gain, gain).astype(np.float64)
            total += moment / np.trace(moment)
    return total
