"""Blockwise covariance axes (Transform Quantization, 2009.01174): stored rotations of blocks of input channels.

Input channels in blocks, the principal axes of the weights' covariance in each block, a uniform grid in these axes.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Float, Int

from rdopt.checkpoint.families import INPUT_OF, MATRICES, MATRICES_OF, Architecture, Key, group_widths
from rdopt.codec.streams.fixed_point import MAX_BLOCK
from rdopt.codec.streams.stored import pack_stored
from rdopt.operator.params import Params
from rdopt.transforms.matrices.pca import near_identity, pca
from rdopt.transforms.stored.angles import angle_codes
from rdopt.transforms.stored.rotations import StoredRotation, StoredRotations

BITS = (4, 5, 6, 7, 8)
# (columns, blocks): all full blocks, then the smaller last one; each has its own shape.
Blocks = list[tuple[slice, Float[np.ndarray, "_ _ _"]]]


def blockwise_pca(params: Params, arch: Architecture, block: int = 32, bits: int | None = None) -> StoredRotations:
    """The principal axes of a model's weights, block by block of input channels.

    Args:
        params: the weights.
        arch: their architecture.
        block: channels in a block.
        bits: of an angle; None takes the cheapest of BITS: bits of the angles plus the weights' bits at high
            rate, half a log2 of the variance of its column a weight.

    Raises:
        ValueError: block out of range.
    """
    if not 1 <= block <= MAX_BLOCK:
        raise ValueError(f"blocks of {block} channels; use 1 to {MAX_BLOCK}")
    covariances = _covariances(params, arch, block)
    axes = {key: _principal_axes(key, covariances) for key in group_widths(arch)}
    choices = [
        StoredRotations("blocks", block, False, b, _angles(axes, b), {}) for b in (BITS if bits is None else (bits,))
    ]

    def total(stored: StoredRotations) -> float:
        return 8 * len(pack_stored(stored, arch)) + _high_rate_bits(params, covariances, stored)

    return min(choices, key=total)


def _covariances(params: Params, arch: Architecture, block: int) -> dict[Key, Blocks]:
    """(layer, matrix) -> diagonal blocks of W^T W over the mean square of W."""
    covariances = {}
    for layer in range(arch.num_layers):
        for name in MATRICES:
            W = np.asarray(params["blocks"][name][layer], np.float64)
            power = max(float(np.mean(W**2)), np.finfo(np.float64).tiny)
            covariances[layer, name] = []
            for columns, width in _columns(W.shape[1], block):
                x = W[:, columns].reshape(len(W), -1, width).swapaxes(0, 1)
                covariances[layer, name].append((columns, x.swapaxes(1, 2) @ x / power))
    return covariances


def _columns(n: int, block: int) -> Iterator[tuple[slice, int]]:
    cut = n - n % block
    if cut:
        yield slice(0, cut), block
    if cut < n:
        yield slice(cut, n), n - cut


def _principal_axes(key: Key, covariances: Mapping[Key, Blocks]) -> Blocks:
    """Eigenvectors of the summed covariances of the matrices that share an input, in the cheapest order."""
    layer, group = key
    members = [covariances[layer, name] for name in MATRICES_OF[group]]
    return [
        (parts[0][0], near_identity(pca(np.sum([C for _, C in parts], axis=0))))
        for parts in zip(*members, strict=True)
    ]


def _angles(axes: Mapping[Key, Blocks], bits: int) -> dict[Key, StoredRotation]:
    """Angles of all axes; the signs of the columns are as free as their order and are dropped."""
    codes: dict[Key, list[Int[np.ndarray, " p"]]] = {
        key: [angle_codes(V, bits).ravel() for _, V in blocks] for key, blocks in axes.items()
    }
    return {key: StoredRotation(np.concatenate(parts)) for key, parts in codes.items()}


def _high_rate_bits(params: Params, covariances: Mapping[Key, Blocks], stored: StoredRotations) -> float:
    """Half a log2 of the variance of its rotated column, summed over all weights."""
    total = 0.0
    for (layer, name), blocks in covariances.items():
        rows, n = params["blocks"][name][layer].shape
        turns = stored.rotation(stored.inputs[layer, INPUT_OF[name]], n).blocks
        assert turns is not None
        for (_, C), V in zip(blocks, [V for V in turns if V.size], strict=True):
            power = np.einsum("kij,kil,klj->kj", V, C, V, optimize=True)
            total += rows / 2 * float(np.sum(np.log2(np.maximum(power, 1e-12))))
    return total
