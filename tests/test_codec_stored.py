"""Claims about stored transforms: blockwise axes, and their way through a file."""

from dataclasses import replace

import numpy as np
import pytest

from rdopt.calibration import INPUT_OF, MATRICES_OF, Moments
from rdopt.checkpoint import MATRICES, hf_name, open_checkpoint
from rdopt.codec import decode_model, encode_at_step, make_source
from rdopt.codec.container import pack, unpack
from rdopt.codec.quantize import dequantize, group_widths
from rdopt.codec.rotations import (
    angle_count,
    angle_pairs,
)
from rdopt.codec.stored import (
    BITS,
    Stored,
    _octaves,
    blockwise_pca,
    pack_stored,
    rotation,
    turn,
    unpack_stored,
)
from rdopt.config import EncodeConfig, UserError
from rdopt.operator import load_params
from rdopt.transforms import random_orthogonal

ENCODE = EncodeConfig(threads=1, grid="feedback")


def random_codes(n: int, block: int, bits: int, seed: int = 0) -> np.ndarray:
    """Angles of a random block-diagonal rotation."""
    quarter = 2 ** (bits - 2)
    codes = np.random.default_rng(seed).integers(1 - quarter, quarter + 1, angle_count(n, block))
    return codes.astype(np.int32)


def dense(codes: np.ndarray, n: int, block: int, bits: int) -> np.ndarray:
    """V as an n x n float64 matrix."""
    return turn(np.eye(n), rotation(Stored(block, bits, {(0, "o"): codes}), (0, "o"), n))


@pytest.fixture
def tiny(tiny_llama):
    """A tiny random model (widths 24, 32, 40) with correlated channels, and moments of that kind."""
    checkpoint = open_checkpoint(tiny_llama())
    params, rng = load_params(checkpoint), np.random.default_rng(0)
    mix = {n: random_orthogonal(n, n) * np.exp(rng.standard_normal(n)) for n in (24, 32, 40)}
    for name in MATRICES:
        W = params["blocks"][name]
        params["blocks"][name] = (W @ mix[W.shape[2]].T).astype(np.float32)
    sigma, G = {}, {}
    for name in MATRICES:
        layers, out, n = params["blocks"][name].shape
        x = rng.standard_normal((layers, 2 * n, n)) * np.exp(rng.standard_normal(n))
        sigma[INPUT_OF[name]] = x.swapaxes(1, 2) @ x / (2 * n)
        G[name] = 1 + rng.random((layers, out))
    return checkpoint, params, Moments(sigma, G, 100)


def encoded(tiny, block=16, bits=None, c=0.05, encode=ENCODE):
    """(source, file, stored) of the blockwise arm."""
    checkpoint, params, moments = tiny
    turned, moments, stored = blockwise_pca(params, checkpoint.arch, moments, block, bits)
    arch, config, size = checkpoint.arch, checkpoint.config, checkpoint.num_parameters
    source = make_source(turned, arch, config, {}, moments, encode, size, stored=stored)
    return source, encode_at_step(source, c, encode), stored


@pytest.mark.parametrize("block", [5, 16, 32])
def test_blockwise_axes_keep_the_layer_outputs_and_concentrate_the_columns(tiny, block):
    checkpoint, params, moments = tiny
    turned, turned_moments, stored = blockwise_pca(params, checkpoint.arch, moments, block, 8)
    for (layer, group), n in group_widths(checkpoint.arch).items():
        V = dense(stored.codes[layer, group], n, block, 8)
        sigma = V.T @ moments.sigma[group][layer] @ V
        np.testing.assert_allclose(turned_moments.sigma[group][layer], sigma, atol=1e-10)
        for name in MATRICES_OF[group]:
            W, found = params["blocks"][name][layer], turned["blocks"][name][layer]
            np.testing.assert_allclose(found @ V.T, W, atol=1e-6 * np.abs(W).max())
            before, after = (np.log2(np.mean(x.astype(np.float64) ** 2, axis=0)).sum() for x in (W, found))
            assert after < before
    assert turned_moments.G is moments.G


def test_principal_axes_leave_no_covariance_in_a_block(tiny):
    checkpoint, params, moments = tiny
    turned, _, _ = blockwise_pca(params, checkpoint.arch, moments, 8, 16)
    for layer in range(checkpoint.arch.num_layers):
        for of, diagonal in ((params, False), (turned, True)):
            # A rotation keeps the mean square that each matrix is normalised by.
            x = np.concatenate([of["blocks"][k][layer] / rms(of["blocks"][k][layer]) for k in ("gate", "up")])
            C = x[:, :8].T.astype(np.float64) @ x[:, :8]
            off = np.abs(C - np.diag(np.diag(C))).max() / np.diag(C).max()
            assert (off < 1e-3) == diagonal


def rms(x):
    return np.sqrt(np.mean(x.astype(np.float64) ** 2))


def test_the_number_of_angle_bits_is_the_one_with_the_smallest_total(tiny):
    checkpoint, params, moments = tiny
    chosen = blockwise_pca(params, checkpoint.arch, moments, 16)[2]
    totals = {}
    for bits in BITS:
        turned, _, stored = blockwise_pca(params, checkpoint.arch, moments, 16, bits)
        weights = [turned["blocks"][k].astype(np.float64) for k in MATRICES]
        rate = sum(W.shape[1] * np.log2(np.mean(W**2, axis=1)).sum() / 2 for W in weights)
        totals[bits] = rate + 8 * len(pack_stored(stored))
    assert chosen.bits == min(totals, key=lambda bits: totals[bits])


@pytest.mark.parametrize("grid", ["feedback", "trellis"])
@pytest.mark.parametrize(("block", "bits"), [(16, 6), (32, 5), (7, 8)])
def test_a_file_decodes_to_the_weights_in_the_original_coordinates(tiny, block, bits, grid):
    params, encode = tiny[1], replace(ENCODE, grid=grid)
    source, file, stored = encoded(tiny, block, bits, encode=encode)
    decoded = decode_model(file.data, threads=2)
    for (layer, name), z in decoded.indices.items():
        group = (layer, INPUT_OF[name])
        quantized = decoded.plain[layer, name]
        if grid == "feedback":
            rows, cols = source.grid.rows[layer, name], source.grid.cols[group]
            np.testing.assert_array_equal(quantized, dequantize(z, rows, cols, file.c))
        else:
            assert decoded.gains is not None
            quantized = decoded.gains.apply((layer, name), quantized)
        V = dense(stored.codes[group], z.shape[1], block, bits)
        found = decoded.tensors[hf_name(layer, name)]
        np.testing.assert_allclose(found, quantized @ V.T, rtol=0, atol=3e-7 * np.abs(quantized).max())
    # And a fine step gives the model itself.
    fine = decode_model(encoded(tiny, block, bits, c=1e-3, encode=encode)[1].data)
    for layer, name in fine.indices:
        W = params["blocks"][name][layer]
        assert rms(fine.tensors[hf_name(layer, name)] - W) < 2e-2 * rms(W)


def test_the_bytes_of_the_transforms_are_counted(tiny):
    source, file, stored = encoded(tiny)
    assert file.bits["transforms"] == 8 * len(pack_stored(stored)) > 0
    assert sum(file.bits.values()) == 8 * len(file.data)
    assert decode_model(file.data).bits == file.bits
    without = encode_at_step(source._replace(stored=None), file.c, ENCODE)
    extra = file.bpw(source) - without.bpw(source)
    assert extra * source.weights >= file.bits["transforms"]


def test_files_without_stored_transforms_hold_no_transforms_stream(tiny):
    checkpoint, params, moments = tiny
    source = make_source(
        params, checkpoint.arch, checkpoint.config, {}, moments, ENCODE, checkpoint.num_parameters
    )
    file = encode_at_step(source, 0.05, ENCODE)
    assert file.bits["transforms"] == 0
    assert b"transforms" not in file.data[:1000]
    for (layer, name), z in decode_model(file.data).indices.items():
        W = decode_model(file.data).tensors[hf_name(layer, name)]
        rows, cols = source.grid.rows[layer, name], source.grid.cols[layer, INPUT_OF[name]]
        assert W.tobytes() == dequantize(z, rows, cols, file.c).tobytes()


def test_decoding_does_not_depend_on_threads(tiny):
    data = encoded(tiny)[1].data
    one, many = (decode_model(data, threads=threads).tensors for threads in (1, 4))
    assert all(one[k].tobytes() == many[k].tobytes() for k in one)


# the stream


@pytest.mark.parametrize("kind", ["uniform", "narrow", "octaves"])
@pytest.mark.parametrize(("block", "bits"), [(1, 2), (7, 6), (16, 9), (40, 5)])
def test_the_stream_reads_back_in_every_coding(tiny, kind, block, bits):
    arch, rng = tiny[0].arch, np.random.default_rng(bits)
    codes = {}
    for key, n in group_widths(arch).items():
        codes[key] = random_codes(n, block, bits, int(rng.integers(99)))
        if kind == "narrow":
            codes[key] = np.minimum(np.abs(codes[key]), 1) * (rng.random(codes[key].size) < 0.1)
        if kind == "octaves":
            codes[key] = codes[key] >> _octaves(codes[key].size, block)
        codes[key] = codes[key].astype(np.int32)
    stored = Stored(block, bits, codes)
    data = pack_stored(stored)
    back = unpack_stored(data, arch)
    assert back is not None
    assert (back.block, back.bits) == (block, bits)
    assert all(np.array_equal(back.codes[key], codes[key]) for key in codes)
    assert len(data) <= 5 + sum(x.size for x in codes.values()) * (bits - 1) / 8


def test_no_transforms_are_no_bytes(tiny):
    assert pack_stored(None) == b""
    assert unpack_stored(b"", tiny[0].arch) is None


def test_octaves_follow_the_pairs():
    for n, block in ((40, 16), (5, 8), (8, 8), (3, 1), (33, 32)):
        widths = [block] * (n // block) + [n % block]
        expected = [int(np.log2(i - j)) for b in widths for j, i in angle_pairs(b)]
        assert _octaves(angle_count(n, block), block).tolist() == expected


def test_a_damaged_stream_is_a_value_error(tiny):
    arch = tiny[0].arch
    data = pack_stored(encoded(tiny)[2])
    for bad in (data[:1], data[:-3], data + b"\0", b"\xff" + data[1:], b"\0\0"):
        with pytest.raises(ValueError):
            unpack_stored(bad, arch)


def test_damage_behind_a_correct_hash_is_a_user_error(tiny):
    file = encoded(tiny)[1]
    streams, index = unpack(file.data)
    with pytest.raises(UserError, match="does not decode"):
        decode_model(pack({**streams, "transforms": streams["transforms"][:-4]}, index))
