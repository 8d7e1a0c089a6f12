"""Claims about files: round trips of all families, equal bytes, damaged bytes, and where the bits go."""

import functools
import json
import struct
from dataclasses import replace
from typing import Literal

import ml_dtypes
import numpy as np
import pytest
from conftest import FAMILIES, random_tensors, synthetic_moments, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_sources import aligned_of, source_of

from rdopt.checkpoint.families import (
    INPUT_OF,
    MATRICES,
    architecture_from_config,
    block_shapes,
    coded_matrices,
    expected_tensors,
)
from rdopt.checkpoint.folder import open_checkpoint
from rdopt.codec.coders.order import from_lanes, restart, to_lanes
from rdopt.codec.decoder import decode_model
from rdopt.codec.encoder import structure_saved
from rdopt.codec.grids.steps import dequantize
from rdopt.codec.grids.trellis import trellis_step, walk_lanes
from rdopt.codec.streams import container
from rdopt.codec.streams.container import STREAMS, pack, read_container, unpack, write_container
from rdopt.codec.streams.uncoded import pack_files, unpack_files
from rdopt.config.errors import UserError
from rdopt.config.schema import EncodeConfig
from rdopt.encode.model import encode_at_step, encode_model
from rdopt.encode.quantize import quantize_model
from rdopt.encode.source import make_source
from rdopt.encode.trellis_model import quantize_trellis
from rdopt.operator.params import load_params

VARIANTS = [(family, {}) for family in FAMILIES] + [
    ("llama", {"tie_word_embeddings": True}),
    ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    ("qwen3", {"attention_bias": True}),
]


@functools.cache
def tiny_file(grid: Literal["trellis", "feedback"] = "trellis"):
    """A small encoded model for damaging, with its decoded form."""
    config = tiny_config(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=1, head_dim=2)
    arch, tensors = architecture_from_config(config), random_tensors(config)
    blocks = {short: np.stack([tensors[arch.tensor_name(0, short)]]) for short in block_shapes(arch)}
    params = {
        "embed": tensors["model.embed_tokens.weight"],
        "blocks": blocks,
        "final_norm": tensors["model.norm.weight"],
        "head": tensors["lm_head.weight"],
    }
    encode = EncodeConfig(grid=grid)
    source = make_source(aligned_of(params, arch, synthetic_moments(arch), config), encode, 1000)
    data = encode_at_step(source, 0.03, encode).data
    return data, decode_model(data)


both_grids = pytest.mark.parametrize("grid", ["trellis", "feedback"])


def assert_refused_or_the_same(damaged):
    """The claim about damaged bytes: a UserError, or (in unread padding) the very same model."""
    try:
        found = decode_model(damaged)
    except UserError:
        return
    expected = tiny_file()[1]
    assert found.config == expected.config and found.files == expected.files
    for name, value in expected.tensors.items():
        np.testing.assert_array_equal(found.tensors[name], value)


# round trips


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
@pytest.mark.parametrize("grid", ["feedback", "round"])
def test_a_decoded_model_is_the_quantized_one(tiny_llama, family, changes, grid):
    encode = EncodeConfig(grid=grid)
    source = source_of(tiny_llama(family, **changes), encode)
    c = 0.02
    encoded = encode_at_step(source, c, encode)
    decoded = decode_model(encoded.data)
    assert decoded.arch == source.arch and (decoded.config, decoded.files) == unpack_files(source.files)
    assert decoded.parameters == source.parameters and decoded.c == np.float32(c)
    assert [(k, v.shape) for k, v in decoded.tensors.items()] == list(expected_tensors(source.arch).items())
    assert all(v.dtype == np.float32 for v in decoded.tensors.values())
    for (layer, name), z in quantize_model(source.blocks(), source.grid, c, encode).items():
        np.testing.assert_array_equal(decoded.indices[layer, name], z)
        rows, cols = source.grid.rows[layer, name], source.grid.cols[layer, INPUT_OF[name]]
        W = decoded.tensors[source.arch.tensor_name(layer, name)]
        np.testing.assert_array_equal(W, dequantize(z, rows, cols, c))


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
@pytest.mark.parametrize("states", [1, 8])
def test_a_decoded_model_is_the_one_the_trellis_quantized(tiny_llama, family, changes, states):
    encode = EncodeConfig(states=states)
    source = source_of(tiny_llama(family, **changes), encode)
    model = quantize_trellis(source, 0.02, encode)
    decoded = decode_model(encode_at_step(source, 0.02, encode).data)
    assert decoded.arch == source.arch and decoded.c == np.float32(0.02)
    assert [(k, v.shape) for k, v in decoded.tensors.items()] == list(expected_tensors(source.arch).items())
    assert model.gains is not None and decoded.gains is not None
    kept = zip(coded_matrices(source.arch.num_layers), model.indices, model.indices.orders, strict=True)
    for key, k, order in kept:
        layer, name = key
        np.testing.assert_array_equal(decoded.indices[key], k)
        values = walk_lanes(to_lanes(k.astype(np.int32), order), states, restart(order))[0]
        rows, cols = source.grid.rows[key], source.grid.cols[layer, INPUT_OF[name]]
        plain = dequantize(from_lanes(values, order), rows, cols, trellis_step(0.02))
        np.testing.assert_array_equal(decoded.plain[key], plain)
        np.testing.assert_array_equal(decoded.tensors[decoded.arch.tensor_name(*key)], model.gains.apply(key, plain))


def test_a_file_without_gains_holds_the_plain_weights(tiny_llama):
    encode = EncodeConfig(gains="none")
    encoded = encode_at_step(source_of(tiny_llama(), encode), 0.05, encode)
    decoded = decode_model(encoded.data)
    assert encoded.coded.gains is None and decoded.gains is None
    for key, plain in decoded.plain.items():
        np.testing.assert_array_equal(decoded.tensors[decoded.arch.tensor_name(*key)], plain)


def test_a_planted_component_is_coded_apart_and_reported(tiny_llama):
    checkpoint = open_checkpoint(tiny_llama(hidden_size=64, intermediate_size=160))
    params, arch = load_params(checkpoint), checkpoint.arch
    rng = np.random.default_rng(0)
    wave = np.cos(np.arange(160) / 9)[:, None] * np.cos(np.arange(64) / 5) + 0.02 * rng.standard_normal((160, 64))
    params["blocks"]["up"][0] += 8 * wave.astype(np.float32)
    plain = EncodeConfig()
    files = {}
    for encode in (plain, replace(plain, structured="svd")):
        moments = synthetic_moments(arch)
        source = make_source(aligned_of(params, arch, moments, checkpoint.config), encode)
        files[encode.structured] = encode_at_step(source, 0.02, encode)
    found = files["svd"]
    _, low_rank = structure_saved(found, source.arch)
    assert low_rank[source.arch.tensor_name(0, "up")][0] >= 1 and low_rank[source.arch.tensor_name(0, "up")][1] > 0
    assert found.bits["structured"] > 0 and files["none"].bits["structured"] == 0
    assert found.bpw < files["none"].bpw
    W, original = decode_model(found.data).tensors[source.arch.tensor_name(0, "up")], params["blocks"]["up"][0]
    assert np.linalg.norm(W - original) < 0.1 * np.linalg.norm(original)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tensors_that_are_not_coded_survive_exactly_when_they_had_16_bits(tiny_llama, dtype):
    source = source_of(tiny_llama("qwen3", dtype=dtype))
    decoded = decode_model(encode_at_step(source, 0.03, EncodeConfig()).data)
    np.testing.assert_array_equal(decoded.tensors["model.embed_tokens.weight"], source.aligned.network()["embed"])
    np.testing.assert_array_equal(decoded.tensors["lm_head.weight"], source.aligned.network()["head"])
    for name in ("attn_norm", "mlp_norm", "q_norm", "k_norm"):
        for layer, value in enumerate(source.aligned.network()["blocks"][name]):
            np.testing.assert_array_equal(decoded.tensors[decoded.arch.tensor_name(layer, name)], value)


def test_tensors_that_are_not_coded_take_the_closer_16_bit_type(tiny_llama):
    source = source_of(tiny_llama())
    source.aligned.network()["embed"][0, 0] = 1e5  # beyond float16
    decoded = decode_model(encode_at_step(source, 0.03, EncodeConfig()).data)
    brain = source.aligned.network()["embed"].astype(ml_dtypes.bfloat16).astype(np.float32)
    half = source.aligned.network()["head"].astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(decoded.tensors["model.embed_tokens.weight"], brain)
    np.testing.assert_array_equal(decoded.tensors["lm_head.weight"], half)


@both_grids
def test_encoding_twice_and_with_any_number_of_threads_gives_the_same_bytes(tiny_llama, grid):
    encode = EncodeConfig(grid=grid)
    source = source_of(tiny_llama(), encode)
    found = {encode_model(source, 20.0, replace(encode, threads=n)).data for n in (1, 4, 0, 1)}
    assert len(found) == 1
    again = source_of(tiny_llama(), encode)
    assert encode_model(again, 20.0, encode).data in found


@both_grids
def test_decoding_does_not_depend_on_the_number_of_threads(tiny_llama, grid):
    encode = EncodeConfig(grid=grid)
    data = encode_model(source_of(tiny_llama(), encode), 20.0, encode).data
    one, four = (decode_model(data, threads=n).tensors for n in (1, 4))
    for name, value in one.items():
        np.testing.assert_array_equal(four[name], value)


@both_grids
def test_finer_slopes_make_larger_files_with_smaller_errors(tiny_llama, grid):
    encode = EncodeConfig(grid=grid)
    source = source_of(tiny_llama(), encode)
    sizes, errors = [], []
    for lam in (2.0, 20.0, 200.0):
        encoded = encode_model(source, lam, encode)
        decoded = decode_model(encoded.data)
        sizes.append(len(encoded.data))
        W = decoded.tensors[source.arch.tensor_name(0, "q")]
        errors.append(np.abs(W - source.aligned.network()["blocks"]["q"][0]).mean())
    assert sizes == sorted(sizes) and errors == sorted(errors, reverse=True)


def test_weights_that_are_not_finite_are_refused_by_name(tiny_llama):
    checkpoint = open_checkpoint(tiny_llama())
    params = load_params(checkpoint)
    params["blocks"]["up"][1, 2, 3] = np.nan
    moments = synthetic_moments(checkpoint.arch)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        make_source(aligned_of(params, checkpoint.arch, moments, checkpoint.config), EncodeConfig())


# where the bits go


@both_grids
def test_the_parts_sum_to_the_file_and_the_decoder_agrees(tiny_llama, grid):
    encode = EncodeConfig(grid=grid)
    source = source_of(tiny_llama(), encode)
    encoded = encode_at_step(source, 0.02, encode)
    decoded = decode_model(encoded.data)
    assert sum(encoded.bits.values()) == 8 * len(encoded.data)
    assert decoded.bits == encoded.bits
    assert sum(decoded.code_bits.values()) == pytest.approx(encoded.bits["codes"])
    if grid == "trellis":  # real bits against ideal ones
        assert encoded.coded.indices.bits == pytest.approx(encoded.bits["codes"], rel=0.02)
    assert all(v >= 0 for v in encoded.bits.values())
    coded = 8 * len(encoded.data) - encoded.bits["uncoded"]
    assert encoded.bpw == pytest.approx(coded / source.weights)
    assert encoded.bpw_all == pytest.approx(8 * len(encoded.data) / source.parameters)


@pytest.fixture(scope="module")
def demo_file(demo_ends):
    """(source, file) of the outer blocks of the demo model for a grid and a slope, each made once."""

    @functools.cache
    def make(grid, lam):
        encode = EncodeConfig(grid=grid)
        source = source_of(demo_ends, encode)
        return source, encode_model(source, lam, encode)

    return make


@both_grids
@pytest.mark.parametrize("lam", [3.0, 100.0])
def test_the_estimated_bits_are_the_real_ones_within_one_percent(demo_file, lam, grid):
    source, encoded = demo_file(grid, lam)
    assert encoded.bpw_estimated == pytest.approx(encoded.bpw, rel=0.01)
    assert encoded.bits["headers"] / source.weights < 0.01
    assert source.weights == sum(W.size for k in MATRICES for W in source.aligned.network()["blocks"][k])


def test_the_real_bits_are_near_the_entropy_of_the_indices_class_by_class(demo_file):
    """One table a matrix (its empirical entropy) cannot beat the codes by more than spreads tell."""
    source, encoded = demo_file("trellis", 100.0)
    decoded = decode_model(encoded.data)
    entropy = 0.0
    for key in coded_matrices(source.arch.num_layers):
        _, counts = np.unique(decoded.indices[key], return_counts=True)
        entropy -= np.sum(counts * np.log2(counts / counts.sum()))
    assert encoded.bits["codes"] < 1.01 * entropy


# the container


streams_strategy = st.fixed_dictionaries({k: st.binary(max_size=30) for k in STREAMS})


@given(streams=streams_strategy, index=st.binary(max_size=30))
def test_streams_of_any_bytes_are_returned(streams, index):
    assert unpack(pack(streams, index)) == (streams, index)


def test_a_container_is_a_safetensors_file_of_bytes(tmp_path):
    from safetensors.numpy import load_file

    streams = {k: bytes(range(i, 40)) for i, k in enumerate(STREAMS)}
    write_container(tmp_path / "m.rdopt", pack(streams, b"index"))
    found = load_file(tmp_path / "m.rdopt")
    assert set(found) == {"index", *STREAMS}
    for kind, data in streams.items():
        assert found[kind].tobytes() == data
    assert read_container(tmp_path / "m.rdopt") == (streams, b"index")


def test_an_existing_file_is_never_replaced_and_a_missing_one_is_named(tmp_path):
    (tmp_path / "m.rdopt").write_bytes(b"precious")
    with pytest.raises(UserError, match="already exists"):
        write_container(tmp_path / "m.rdopt", b"new")
    assert (tmp_path / "m.rdopt").read_bytes() == b"precious"
    with pytest.raises(UserError, match=r"none\.rdopt is not a file"):
        read_container(tmp_path / "none.rdopt")


def test_another_version_is_refused_naming_both(monkeypatch):
    monkeypatch.setattr(container, "VERSION", 7)
    data = pack({"codes": b"x"}, b"")
    monkeypatch.undo()
    with pytest.raises(UserError, match="version 7; this rdopt reads rdopt version 4"):
        unpack(data)


def test_a_file_cut_short_anywhere_is_refused():
    data, _ = tiny_file()
    for cut in range(len(data)):
        with pytest.raises(UserError):
            unpack(data[:cut])


@given(data=st.data())
@settings(max_examples=20)
def test_a_cut_file_does_not_decode(data):
    whole, _ = tiny_file()
    with pytest.raises(UserError):
        decode_model(whole[: data.draw(st.integers(0, len(whole) - 1))])


def test_every_flipped_bit_of_the_header_is_refused_or_harmless():
    whole, _ = tiny_file()
    (length,) = struct.unpack_from("<Q", whole)
    for at in range(8 + length):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << bit
            try:
                found = unpack(bytes(damaged))
            except UserError:
                continue
            assert found == unpack(whole)


@given(at=st.integers(0, 10**9), value=st.integers(0, 255))
@settings(max_examples=200)
def test_a_replaced_byte_anywhere_is_refused_or_harmless(at, value):
    damaged = bytearray(tiny_file()[0])
    damaged[at % len(damaged)] = value
    assert_refused_or_the_same(bytes(damaged))


def test_a_flipped_byte_behind_the_header_is_always_refused():
    whole, _ = tiny_file()
    (length,) = struct.unpack_from("<Q", whole)
    for at in range(8 + length, len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 + at % 255
        with pytest.raises(UserError, match="altered"):
            unpack(bytes(damaged))


@given(data=st.binary(max_size=200))
def test_arbitrary_bytes_are_no_file(data):
    with pytest.raises(UserError):
        decode_model(data)


META = {"format": "rdopt", "version": "4", "sha256": ""}
SPANS = ([0, 1.0], [0, 0.5, 1], ["0", "1"], [0.0, 0], [-5, 0], [0], 7, None, {})
BAD_HEADERS = [
    [],
    "text",
    {},
    {"__metadata__": None},
    {"__metadata__": META | {"sha256": 0}},
    *({"__metadata__": META, "codes": {"data_offsets": span}} for span in SPANS),
]


@pytest.mark.parametrize("header", BAD_HEADERS)
def test_a_header_of_the_wrong_kind_is_refused(header):
    text = json.dumps(header).encode()
    with pytest.raises(UserError):
        unpack(struct.pack("<Q", len(text)) + text)


def test_a_header_of_endless_brackets_is_refused():
    with pytest.raises(UserError):
        unpack(struct.pack("<Q", 10**5) + b"[" * 10**5)


# files made by someone else, whose hashes are right


@given(
    grid=st.sampled_from(["trellis", "feedback"]),
    kind=st.sampled_from([*STREAMS, "index"]),
    at=st.integers(0, 10**9),
    value=st.integers(0, 255),
)
@settings(max_examples=200)
def test_a_wrong_stream_with_right_hashes_decodes_or_is_refused(grid, kind, at, value):
    streams, index = unpack(tiny_file(grid)[0])
    parts = {**streams, "index": index}
    damaged = bytearray(parts[kind] or b"\0")
    damaged[at % len(damaged)] = value
    parts[kind] = bytes(damaged)
    index = parts.pop("index")
    try:
        decoded = decode_model(pack(parts, index))
    except UserError:
        return
    assert {k: v.shape for k, v in decoded.tensors.items()} == expected_tensors(decoded.arch)


def test_carried_files_cannot_leave_the_output_folder(tiny_llama):
    source = replace(source_of(tiny_llama()), files=pack_files({}, {"../evil": b"x"}))
    data = encode_at_step(source, 0.03, EncodeConfig()).data
    with pytest.raises(UserError, match="not a plain file name"):
        decode_model(data)
