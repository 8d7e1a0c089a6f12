"""Stored transforms: a block-diagonal rotation per input group, counted in the file, undone by the decoder.

Blockwise covariance axes (Transform Quantization, 2009.01174): input channels in blocks, the principal axes
of the weights' covariance in each block, a uniform grid in these axes. W' = W V, x' = V^T x.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment

from rdopt.calibration import INPUT_OF, MATRICES_OF, Moments
from rdopt.checkpoint import MATRICES, Architecture
from rdopt.codec.bits import BitReader, BitWriter
from rdopt.codec.entropy import pack_integers, unpack_integers
from rdopt.codec.quantize import group_widths
from rdopt.codec.rotations import (
    MAX_BITS,
    MAX_BLOCK,
    angle_codes,
    angle_count,
    angle_pairs,
    rebuild,
    split_blocks,
    undo_fixed_point,
)
from rdopt.operator import Params
from rdopt.transforms import pca

BITS = (4, 5, 6, 7, 8)
_CODINGS = ("plain", "one table", "a table per octave")
Key = tuple[int, str]
# (columns, blocks): all full blocks, then the smaller last one; each has its own shape.
Blocks = list[tuple[slice, Float[np.ndarray, "_ _ _"]]]


class Stored(NamedTuple):
    """Block-diagonal rotations of the inputs of all coded matrices.

    Attributes:
        block: width of a block; the last one of a width may be smaller.
        bits: angles are multiples of 2 pi / 2^bits.
        codes: (layer, group) -> angles, full blocks in order, then the last one.
    """

    block: int
    bits: int
    codes: dict[Key, Int[np.ndarray, " p"]]

    def undo(self, layer: int, name: str, W: Float[np.ndarray, "out in"]) -> Float[np.ndarray, "out in"]:
        """One matrix in the original coordinates, by integers alone; float32."""
        return undo_fixed_point(W, self.codes[layer, INPUT_OF[name]], self.block, self.bits)


def blockwise_pca(
    params: Params, arch: Architecture, moments: Moments, block: int = 32, bits: int | None = None
) -> tuple[Params, Moments, Stored]:
    """The model in the principal axes of its weights, block by block of input channels.

    Args:
        params: the weights.
        arch: their architecture.
        moments: their second moments.
        block: channels in a block.
        bits: of an angle; None takes the cheapest of BITS: bits of the angles plus the weights' bits at high
            rate, half a log2 of the variance of its column a weight.

    Returns:
        (params', moments', stored): W' = W V float32, sigma' = V^T sigma V float64, G as it was. V is the
        rotation of the rounded angles, so that only the decoder's fixed-point rounding is left.

    Raises:
        ValueError: block or bits out of range.
    """
    if not 1 <= block <= MAX_BLOCK:
        raise ValueError(f"blocks of {block} channels; use 1 to {MAX_BLOCK}")
    covariances = _covariances(params, arch, block)
    axes = {key: _principal_axes(key, covariances) for key in group_widths(arch)}
    choices = [Stored(block, b, _angles(axes, b)) for b in (BITS if bits is None else (bits,))]
    stored = min(choices, key=lambda s: 8 * len(pack_stored(s)) + _high_rate_bits(params, covariances, s))
    turns = {key: rotation(stored, key, n) for key, n in group_widths(arch).items()}
    blocks = dict(params["blocks"])
    for name in MATRICES:
        turned = [turn(W, turns[layer, INPUT_OF[name]]) for layer, W in enumerate(blocks[name])]
        blocks[name] = np.stack(turned).astype(np.float32)
    sigma = {
        group: np.stack([turn(turn(S, turns[i, group]).T, turns[i, group]) for i, S in enumerate(of_layers)])
        for group, of_layers in moments.sigma.items()
    }
    return {**params, "blocks": blocks}, moments._replace(sigma=sigma), stored


def rotation(stored: Stored, key: Key, n: int) -> Blocks:
    """(columns, float64 blocks of V) of one input group of width n."""
    parts = split_blocks(stored.codes[key], n, stored.block)
    return [(columns, rebuild(part, stored.bits)) for columns, part in parts]


def turn(x: Float[np.ndarray, "m n"], V: Blocks) -> Float[np.ndarray, "m n"]:
    """x V in float64."""
    out = np.empty(x.shape)
    for columns, blocks in V:
        split = np.asarray(x[:, columns], np.float64).reshape(len(x), *blocks.shape[:2]).swapaxes(0, 1)
        out[:, columns] = (split @ blocks).swapaxes(0, 1).reshape(len(x), columns.stop - columns.start)
    return out


def _covariances(params: Params, arch: Architecture, block: int) -> dict[Key, Blocks]:
    """(layer, matrix) -> diagonal blocks of W^T W over the mean square of W."""
    found = {}
    for layer in range(arch.num_layers):
        for name in MATRICES:
            W = np.asarray(params["blocks"][name][layer], np.float64)
            power = max(float(np.mean(W**2)), np.finfo(np.float64).tiny)
            found[layer, name] = []
            for columns, width in _columns(W.shape[1], block):
                x = W[:, columns].reshape(len(W), -1, width).swapaxes(0, 1)
                found[layer, name].append((columns, x.swapaxes(1, 2) @ x / power))
    return found


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
        (parts[0][0], _near_identity(pca(np.sum([C for _, C in parts], axis=0))))
        for parts in zip(*members, strict=True)
    ]


def _near_identity(V: Float[np.ndarray, "k b b"]) -> Float[np.ndarray, "k b b"]:
    """The columns in the order with the largest diagonal: their order is free, small angles are cheap."""
    return np.stack([v[:, linear_sum_assignment(-(v**2))[1]] for v in V])


def _angles(axes: Mapping[Key, Blocks], bits: int) -> dict[Key, Int[np.ndarray, " p"]]:
    """Angles of all axes; the signs of the columns are as free as their order and are dropped."""
    codes = {key: [angle_codes(V, bits)[0].ravel() for _, V in blocks] for key, blocks in axes.items()}
    return {key: np.concatenate(parts) for key, parts in codes.items()}


def _high_rate_bits(params: Params, covariances: Mapping[Key, Blocks], stored: Stored) -> float:
    """Half a log2 of the variance of its rotated column, summed over all weights."""
    total = 0.0
    for (layer, name), blocks in covariances.items():
        rows, n = params["blocks"][name][layer].shape
        turns = rotation(stored, (layer, INPUT_OF[name]), n)
        for (_, C), (_, V) in zip(blocks, turns, strict=True):
            power = np.einsum("kij,kil,klj->kj", V, C, V, optimize=True)
            total += rows / 2 * float(np.sum(np.log2(np.maximum(power, 1e-12))))
    return total


def pack_stored(stored: Stored | None) -> bytes:
    """The `transforms` stream: block, bits and coding as gamma codes, then the angles in the shortest one."""
    if stored is None:
        return b""
    codes = np.concatenate(list(stored.codes.values()))
    octaves = np.concatenate([_octaves(len(x), stored.block) for x in stored.codes.values()])
    bodies = (
        _pack_plain(codes, stored.bits),
        pack_integers(codes),
        b"".join(pack_integers(codes[octaves == k]) for k in range(int(octaves.max(initial=-1)) + 1)),
    )
    coding = min(range(len(_CODINGS)), key=lambda i: len(bodies[i]))
    head = BitWriter()
    head.gammas((stored.block, stored.bits, coding))
    return head.bytes() + bodies[coding]


def unpack_stored(data: bytes, arch: Architecture) -> Stored | None:
    """Inverse of `pack_stored`.

    Raises:
        ValueError: damaged bytes.
    """
    if not data:
        return None
    head = BitReader(data)
    block, bits, coding = head.gammas(3)
    if not (1 <= block <= MAX_BLOCK and 2 <= bits <= MAX_BITS and coding < len(_CODINGS)):
        raise ValueError(f"stored transforms of block {block}, {bits} bits, coding {coding}")
    lengths = [angle_count(n, block) for n in group_widths(arch).values()]
    data, codes = data[head.bytes_read :], np.zeros(sum(lengths), np.int32)
    if coding == 0:
        codes, data = _unpack_plain(data, len(codes), bits)
    elif coding == 1:
        codes, data = unpack_integers(data, len(codes))
    else:
        octaves = np.concatenate([_octaves(length, block) for length in lengths])
        for k in range(int(octaves.max(initial=-1)) + 1):
            codes[octaves == k], data = unpack_integers(data, int(np.sum(octaves == k)))
    if data:
        raise ValueError("the stored transforms do not end with their last angle")
    parts = np.split(codes, np.cumsum(lengths)[:-1])
    return Stored(block, bits, dict(zip(group_widths(arch), parts, strict=True)))


def _octaves(angles: int, block: int) -> Int[np.ndarray, " p"]:
    """floor(log2(i - j)) of every angle's pair: the longer a pivot has gathered, the smaller the angle."""
    full, rest = divmod(angles, max(angle_count(block, block), 1))
    octave = np.array([(i - j).bit_length() - 1 for j, i in angle_pairs(block)], np.int64)
    last = next(b for b in range(block + 1) if angle_count(b, block) >= rest)
    tail = [(i - j).bit_length() - 1 for j, i in angle_pairs(last)]
    return np.concatenate([np.tile(octave, full), np.array(tail, np.int64)])


def _pack_plain(codes: Int[np.ndarray, " p"], bits: int) -> bytes:
    """bits - 1 bits an angle."""
    unsigned = codes + (2 ** (bits - 2) - 1)
    return np.packbits((unsigned[:, None] >> np.arange(bits - 2, -1, -1)) & 1).tobytes()


def _unpack_plain(data: bytes, count: int, bits: int) -> tuple[Int[np.ndarray, " p"], bytes]:
    size = (count * (bits - 1) + 7) // 8
    if len(data) < size:
        raise ValueError("the stored transforms end before their last angle")
    digits = np.unpackbits(np.frombuffer(data, np.uint8, size))[: count * (bits - 1)].reshape(count, bits - 1)
    unsigned = digits.astype(np.int32) @ (1 << np.arange(bits - 2, -1, -1, dtype=np.int32))
    return unsigned - np.int32(2 ** (bits - 2) - 1), data[size:]
