"""Claims about stored transforms: blockwise axes, and their way through a file."""

from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from stored_oracle import fold_stored, fold_stored_moments
from tiny_sources import aligned_of

from rdopt.calibration.backward import second_moments
from rdopt.calibration.moments import Moments
from rdopt.checkpoint.families import INPUT_OF, MATRICES, MATRICES_OF, group_widths, matrix_shapes
from rdopt.checkpoint.folder import open_checkpoint
from rdopt.codec.decoder import decode_model
from rdopt.codec.grids.steps import dequantize
from rdopt.codec.streams.container import pack, unpack
from rdopt.codec.streams.stored import _octaves, pack_pairing, pack_stored, unpack_pairing, unpack_stored
from rdopt.config.errors import UserError
from rdopt.config.schema import EncodeConfig
from rdopt.encode.blockwise_pca import BITS, blockwise_pca
from rdopt.encode.model import encode_at_step
from rdopt.encode.source import make_source
from rdopt.operator.params import load_params
from rdopt.rate.steps import base_step
from rdopt.transforms.matrices.cayley import block_skew_size
from rdopt.transforms.matrices.givens import round_robin
from rdopt.transforms.matrices.random import random_orthogonal
from rdopt.transforms.stored.angles import angle_pairs
from rdopt.transforms.stored.pairing import learned_pairs
from rdopt.transforms.stored.rotations import StoredRotation, StoredRotations, angle_count

ENCODE = EncodeConfig(threads=1, grid="feedback")


def random_codes(n: int, block: int, bits: int, seed: int = 0) -> np.ndarray:
    """Angles of a random block-diagonal rotation."""
    quarter = 2 ** (bits - 2)
    codes = np.random.default_rng(seed).integers(1 - quarter, quarter + 1, block_skew_size(n, block))
    return codes.astype(np.int32)


def dense(codes: np.ndarray, n: int, block: int, bits: int) -> np.ndarray:
    """V as an n x n float64 matrix."""
    return StoredRotations("blocks", block, False, bits, {}, {}).rotation(StoredRotation(codes), n).apply(np.eye(n))


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
    stored = blockwise_pca(params, checkpoint.arch, block, bits)
    source = make_source(aligned_of(params, checkpoint.arch, moments, checkpoint.config, stored=stored), encode)
    return source, encode_at_step(source, c, encode), stored


@pytest.mark.parametrize("block", [5, 16, 32])
def test_blockwise_axes_keep_the_layer_outputs_and_concentrate_the_columns(tiny, block):
    checkpoint, params, moments = tiny
    stored = blockwise_pca(params, checkpoint.arch, block, 8)
    turned, turned_moments = fold_stored(params, stored), fold_stored_moments(moments, stored)
    for (layer, group), n in group_widths(checkpoint.arch).items():
        V = dense(stored.inputs[layer, group].codes, n, block, 8)
        sigma = V.T @ moments.sigma[group][layer] @ V
        np.testing.assert_allclose(turned_moments.sigma[group][layer], sigma, atol=1e-10)
        for name in MATRICES_OF[group]:
            W, found = params["blocks"][name][layer], turned["blocks"][name][layer]
            np.testing.assert_allclose(found @ V.T, W, atol=1e-6 * np.abs(W).max())
            before, after = (np.log2(np.mean(x.astype(np.float64) ** 2, axis=0)).sum() for x in (W, found))
            assert after < before
    assert all(np.array_equal(turned_moments.G[name], moments.G[name]) for name in MATRICES)


def test_principal_axes_leave_no_covariance_in_a_block(tiny):
    checkpoint, params, _ = tiny
    turned = fold_stored(params, blockwise_pca(params, checkpoint.arch, 8, 16))
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
    checkpoint, params, _ = tiny
    chosen = blockwise_pca(params, checkpoint.arch, 16)
    totals = {}
    for bits in BITS:
        stored = blockwise_pca(params, checkpoint.arch, 16, bits)
        turned = fold_stored(params, stored)
        weights = [turned["blocks"][k].astype(np.float64) for k in MATRICES]
        rate = sum(W.shape[1] * np.log2(np.mean(W**2, axis=1)).sum() / 2 for W in weights)
        totals[bits] = rate + 8 * len(pack_stored(stored, tiny[0].arch))
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
        V = dense(stored.inputs[group].codes, z.shape[1], block, bits)
        found = decoded.tensors[decoded.arch.tensor_name(layer, name)]
        np.testing.assert_allclose(found, quantized @ V.T, rtol=0, atol=3e-7 * np.abs(quantized).max())
    # And a fine step gives the model itself.
    fine = decode_model(encoded(tiny, block, bits, c=1e-3, encode=encode)[1].data)
    for layer, name in fine.indices:
        W = params["blocks"][name][layer]
        assert rms(fine.tensors[fine.arch.tensor_name(layer, name)] - W) < 2e-2 * rms(W)


def test_the_bytes_of_the_transforms_are_counted(tiny):
    source, file, stored = encoded(tiny)
    assert file.bits["transforms"] == 8 * len(pack_stored(stored, tiny[0].arch)) > 0
    assert sum(file.bits.values()) == 8 * len(file.data)
    assert decode_model(file.data).bits == file.bits
    checkpoint, params, moments = tiny
    behind = fold_stored(params, stored), checkpoint.arch, fold_stored_moments(moments, stored), checkpoint.config
    turned = make_source(aligned_of(*behind), ENCODE)
    extra = file.bpw - encode_at_step(turned, file.c, ENCODE).bpw
    assert extra * source.weights >= file.bits["transforms"]


def test_files_without_stored_transforms_hold_no_transforms_stream(tiny):
    checkpoint, params, moments = tiny
    source = make_source(aligned_of(params, checkpoint.arch, moments, checkpoint.config), ENCODE)
    file = encode_at_step(source, 0.05, ENCODE)
    assert file.bits["transforms"] == 0
    assert b"transforms" not in file.data[:1000]
    for (layer, name), z in decode_model(file.data).indices.items():
        W = decode_model(file.data).tensors[checkpoint.arch.tensor_name(layer, name)]
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
            codes[key] = codes[key] >> _octaves(n, block)
        codes[key] = codes[key].astype(np.int32)
    stored = StoredRotations("blocks", block, False, bits, {key: StoredRotation(x) for key, x in codes.items()}, {})
    data = pack_stored(stored, arch)
    back = unpack_stored(data, arch)
    assert back is not None
    assert (back.structure, back.size, back.hadamard, back.bits) == ("blocks", block, False, bits)
    assert back.outputs == {} and list(back.inputs) == list(codes)
    assert all(np.array_equal(back.inputs[key].codes, codes[key]) for key in codes)
    places = arch.num_layers * (4 + len(MATRICES))
    assert len(data) <= 6 + 3 * places / 8 + sum(x.size for x in codes.values()) * (bits - 1) / 8


def test_no_transforms_are_no_bytes(tiny):
    assert pack_stored(None, tiny[0].arch) == b""
    assert unpack_stored(b"", tiny[0].arch) is None


def test_octaves_follow_the_pairs():
    for n, block in ((40, 16), (5, 8), (8, 8), (3, 1), (33, 32)):
        widths = [block] * (n // block) + [n % block]
        expected = [int(np.log2(i - j)) for b in widths for j, i in angle_pairs(b)]
        assert _octaves(n, block).tolist() == expected


def test_a_damaged_stream_is_a_value_error(tiny):
    arch = tiny[0].arch
    data = pack_stored(encoded(tiny)[2], arch)
    for bad in (data[:1], data[:-3], data + b"\0", b"\xff" + data[1:], b"\0\0"):
        with pytest.raises(ValueError):
            unpack_stored(bad, arch)


def test_damage_behind_a_correct_hash_is_a_user_error(tiny):
    file = encoded(tiny)[1]
    streams, index = unpack(file.data)
    with pytest.raises(UserError, match="does not decode"):
        decode_model(pack({**streams, "transforms": streams["transforms"][:-4]}, index))


def every_site(arch, structure, hadamard, bits=6) -> StoredRotations:
    """Small random angles at the inputs of the first layer and the outputs of the last."""
    rng = np.random.default_rng(0)
    stored = StoredRotations(structure, {"blocks": 8, "butterfly": 1, "pairs": 2}[structure], hadamard, bits, {}, {})

    def site(n: int) -> StoredRotation:
        codes = rng.integers(-3, 4, angle_count(stored.structure, stored.size, n)).astype(np.int32)
        return StoredRotation(codes, round_robin(n, 2) if structure == "pairs" else None)

    last = arch.num_layers - 1
    inputs = {(0, group): site(n) for (layer, group), n in group_widths(arch).items() if layer == 0}
    outputs = {key: site(m) for key, (m, _) in matrix_shapes(arch).items() if key[0] == last}
    return stored._replace(inputs=inputs, outputs=outputs)


@pytest.mark.parametrize("structure", ["blocks", "butterfly", "pairs"])
@pytest.mark.parametrize("hadamard", [False, True])
def test_every_structure_reads_back(tiny, structure, hadamard):
    arch = tiny[0].arch
    stored = every_site(arch, structure, hadamard)
    back = unpack_stored(pack_stored(stored, arch), arch)
    assert back is not None
    assert (back.structure, back.size, back.hadamard, back.bits) == (structure, stored.size, hadamard, 6)
    for side, found in ((stored.inputs, back.inputs), (stored.outputs, back.outputs)):
        assert list(side) == list(found)
        for key in side:
            np.testing.assert_array_equal(side[key].codes, found[key].codes)
            for a, b in zip(side[key].pairs or (), found[key].pairs or (), strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("structure", ["blocks", "butterfly", "pairs"])
def test_a_fine_file_of_both_sides_is_the_model_and_sees_the_drift(tiny_llama, structure):
    checkpoint = open_checkpoint(tiny_llama())
    arch, params = checkpoint.arch, load_params(checkpoint)
    tokens = np.random.default_rng(0).integers(0, arch.vocab_size, (4, 16)).astype(np.int32)
    moments = second_moments(params, arch, tokens)
    encode = EncodeConfig(threads=1, drift_damping=0.02)
    stored = every_site(arch, structure, True, bits=8)
    source = make_source(aligned_of(params, arch, moments, checkpoint.config, tokens=tokens, stored=stored), encode)
    file = encode_at_step(source, 1e-4 * encode_step(source), encode)
    decoded = decode_model(file.data)
    for layer, name in matrix_shapes(arch):
        W = params["blocks"][name][layer]
        assert rms(decoded.tensors[decoded.arch.tensor_name(layer, name)] - W) < 1e-3 * rms(W)


def encode_step(source) -> float:
    """The base step of lambda 1."""
    return base_step(1.0, source.weights)


@pytest.mark.parametrize("n", [2, 7, 24])
def test_learned_pairs_come_back_in_the_order_of_their_angles(n):
    C = np.array([X.T @ X for X in np.random.default_rng(n).standard_normal((3, 2 * n, n))])
    pairs, angles = learned_pairs(C, np.ones(3), 2)
    assert len(angles) == 2 * (n // 2)
    data = b"".join(pack_pairing(layer, n) for layer in pairs)
    for layer in pairs:
        found, data = unpack_pairing(data, n)
        np.testing.assert_array_equal(found, layer)


def test_pairs_in_an_order_that_a_file_cannot_name_are_refused():
    for pairs in ([[2, 3], [0, 1]], [[1, 0], [2, 3]]):
        with pytest.raises(ValueError, match="ascending"):
            pack_pairing(np.array(pairs), 4)


@given(st.integers(2, 40), st.integers(0, 10**6))
def test_a_pairing_is_a_number(n, seed):
    order = np.random.default_rng(seed).permutation(n)
    pairs = np.sort(order[: n - n % 2].reshape(-1, 2), axis=1)
    pairs = pairs[np.argsort(pairs[:, 0])]
    data = pack_pairing(pairs, n)
    found, rest = unpack_pairing(data + b"x", n)
    np.testing.assert_array_equal(found, pairs)
    assert rest == b"x"
    pairings = np.sum(np.log2(np.arange(1, n, 2))) if n % 2 == 0 else np.sum(np.log2(np.arange(1, n + 1, 2)))
    assert len(data) <= pairings / 8 + 1
