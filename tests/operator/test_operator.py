"""Claims about the Llama forward pass; transformers' torch models and float64 loops are the oracles."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, random_tensors, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from rdopt.checkpoint.families import MATRICES, architecture_from_config
from rdopt.checkpoint.folder import open_checkpoint
from rdopt.checkpoint.write import write_checkpoint
from rdopt.config.errors import UserError
from rdopt.operator.llama import (
    attention,
    block,
    embed_tokens,
    head_logits,
    linear,
    logits,
    rms_norm,
    rope_tables,
    run_blocks,
)
from rdopt.operator.params import load_params, params_to_tensors

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "head_dim": 4}),
    ("llama", {"attention_bias": True, "num_key_value_heads": 1}),
    ("llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    ("mistral", {"num_key_value_heads": 4}),
    ("mistral", {"sliding_window": 40, "head_dim": 12}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    ("qwen3", {}),
    ("qwen3", {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 16}),
]
run = jax.jit(logits, static_argnames=("arch", "linear"))


def tokens_for(arch, length, batch=2, seed=0):
    return np.random.default_rng(seed).integers(0, arch.vocab_size, (batch, length)).astype(np.int32)


def torch_logits(folder, tokens):
    torch = pytest.importorskip("torch", reason="parity is measured against torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor(tokens.astype(np.int64))).logits.numpy()


def parity(folder, length):
    checkpoint = open_checkpoint(folder)
    tokens = tokens_for(checkpoint.arch, length)
    ours = run(load_params(checkpoint), tokens, checkpoint.arch)
    return np.abs(np.asarray(ours) - torch_logits(folder, tokens)).max()


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_logits_are_those_of_transformers_for_a_random_network(tiny_llama, family, changes):
    assert parity(tiny_llama(family, **changes), 40) <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_folders_written_by_transformers_give_its_logits(tmp_path, family):
    """transformers 5 writes rope_parameters; its own defaults and its own naming must be understood."""
    torch = pytest.importorskip("torch", reason="parity is measured against torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = tiny_config(family)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**{k: v for k, v in config.items() if k != "architectures"})
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    model.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    assert parity(tmp_path / "m", 40) <= 1e-4


@pytest.mark.parametrize("name", ["ref-llama", "ref-llama-muon", "stories260k"])
def test_logits_are_those_of_transformers_for_real_models(shared_models, name):
    assert parity(shared_models / name, 256) <= 1e-4


def test_logits_of_the_demo_model_are_those_of_transformers(demo_model):
    assert parity(demo_model, 256) <= 1e-4


@settings(max_examples=10)  # each shape compiles anew
@given(length=st.integers(1, 7), kv=st.integers(1, 3), group=st.integers(1, 3), pairs=st.integers(1, 3))
def test_attention_is_the_loop_over_heads_and_positions(length, kv, group, pairs):
    rng = np.random.default_rng(length)
    h = 2 * pairs
    q, k, v = (rng.standard_normal((1, length, n, h)).astype(np.float32) for n in (kv * group, kv, kv))
    expected = np.zeros((1, length, kv * group, h))
    for head in range(kv * group):
        for t in range(length):
            score = k[0, : t + 1, head // group].astype(float) @ q[0, t, head].astype(float) / math.sqrt(h)
            weight = np.exp(score - score.max())
            expected[0, t, head] = weight / weight.sum() @ v[0, : t + 1, head // group]
    got = jax.jit(attention)(q, k, v)
    np.testing.assert_allclose(got, expected.reshape(1, length, -1), atol=1e-6)


@given(width=st.sampled_from([1, 2, 7, 64, 65]), scale=st.floats(1e-3, 1e3))
def test_rms_norm_is_its_formula_in_float64(width, scale):
    rng = np.random.default_rng(width)
    x = (scale * rng.standard_normal((2, width))).astype(np.float32)
    gain = rng.standard_normal(width).astype(np.float32)
    wide = x.astype(float)
    expected = gain * wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(rms_norm(x, gain, 1e-5), expected, rtol=1e-5, atol=1e-7)


def test_rope_tables_turn_each_pair_by_position_times_frequency():
    arch = architecture_from_config(tiny_config(head_dim=6))
    cos, sin = rope_tables(arch, 50)
    angle = np.arange(50)[:, None] * 10000.0 ** (-np.tile(np.arange(3), 2)[None, :] / 3)
    np.testing.assert_allclose(cos, np.cos(angle), atol=5e-6)
    np.testing.assert_allclose(sin, np.sin(angle), atol=5e-6)
    assert cos.dtype == sin.dtype == np.float32


def test_llama3_scaling_stretches_long_waves_and_keeps_short_ones():
    plain, scaled = (
        architecture_from_config(tiny_config(head_dim=64, rope_parameters=rope))
        for rope in (LLAMA3, {"rope_type": "default", "rope_theta": 500000.0})
    )
    scaled_angle, plain_angle = (np.arcsin(rope_tables(arch, 2)[1][1, :32]) for arch in (plain, scaled))
    ratio = plain_angle[1:] / scaled_angle[1:]  # the first frequency is 1 radian a token in both
    wavelength = 2 * np.pi / plain_angle[1:]
    np.testing.assert_allclose(ratio[wavelength > 32], 8, rtol=1e-3)
    np.testing.assert_allclose(ratio[wavelength < 8], 1, rtol=1e-5)
    assert (np.diff(ratio) > -1e-3).all()


def test_no_position_sees_a_later_token(tiny_llama):
    checkpoint = open_checkpoint(tiny_llama("qwen3"))
    params, tokens = load_params(checkpoint), tokens_for(checkpoint.arch, 12)
    changed = tokens.copy()
    changed[:, 7:] = (changed[:, 7:] + 1) % checkpoint.arch.vocab_size
    before, after = (np.asarray(run(params, t, checkpoint.arch)) for t in (tokens, changed))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.abs(before[:, 7:] - after[:, 7:]).max() > 0.1


def test_a_sequence_longer_than_the_sliding_window_is_refused(tiny_llama):
    checkpoint = open_checkpoint(tiny_llama("mistral", sliding_window=16))
    params = load_params(checkpoint)
    assert run(params, tokens_for(checkpoint.arch, 16), checkpoint.arch).shape == (2, 16, 96)
    with pytest.raises(UserError, match="17 tokens exceed the model's sliding window of 16"):
        run(params, tokens_for(checkpoint.arch, 17), checkpoint.arch)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_scan_over_blocks_is_the_python_loop(tiny_llama, family):
    checkpoint = open_checkpoint(tiny_llama(family))
    arch, params = checkpoint.arch, load_params(checkpoint)
    tokens = tokens_for(arch, 9)
    rope = rope_tables(arch, 9)
    one = jax.jit(lambda p, x: block(p, x, rope, arch))
    x = embed_tokens(params, tokens)
    for layer in range(arch.num_layers):
        x = one({name: a[layer] for name, a in params["blocks"].items()}, x)
    scanned = run_blocks(params["blocks"], embed_tokens(params, tokens), rope, arch)
    np.testing.assert_allclose(scanned, x, atol=1e-5)
    np.testing.assert_allclose(head_logits(params, x, arch), run(params, tokens, arch), atol=1e-5)


def test_the_hook_sees_every_matrix_once_a_block_with_its_input(tiny_llama):
    checkpoint = open_checkpoint(tiny_llama("qwen2"))
    arch, params = checkpoint.arch, load_params(checkpoint)
    seen = []

    def spy(name, p, x):
        seen.append((name, x.shape[-1] == p[name].shape[1]))
        return linear(name, p, x)

    spied = run(params, tokens_for(arch, 5), arch, linear=spy)
    assert sorted(seen) == sorted((name, True) for name in MATRICES)  # the scan traces one block
    np.testing.assert_allclose(spied, run(params, tokens_for(arch, 5), arch), atol=1e-6)


def test_scaling_one_matrix_through_the_hook_scales_the_weight(tiny_llama):
    checkpoint = open_checkpoint(tiny_llama())
    arch, params = checkpoint.arch, load_params(checkpoint)
    tokens = tokens_for(arch, 8)

    def halved(name, p, x):
        return linear(name, p, x) * (0.5 if name == "down" else 1.0)

    params_halved = params | {
        "blocks": params["blocks"] | {"down": params["blocks"]["down"] * np.float32(0.5)}
    }
    np.testing.assert_allclose(
        run(params, tokens, arch, linear=halved), run(params_halved, tokens, arch), atol=1e-5
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_go_back_to_the_same_tensors(tmp_path, tiny_llama, family):
    checkpoint = open_checkpoint(tiny_llama(family))
    pairs = params_to_tensors(load_params(checkpoint), checkpoint.arch)
    write_checkpoint(tmp_path / "again", checkpoint.config, pairs, dtype="float32")
    again = open_checkpoint(tmp_path / "again")
    assert again.names() == checkpoint.names()
    for name, values in random_tensors(tiny_config(family)).items():
        np.testing.assert_array_equal(again.tensor(name), values)


def test_a_tied_head_stored_twice_is_accepted_only_when_equal(tmp_path, tiny_llama):
    import json

    folder = tiny_llama()
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="differs from"):
        load_params(open_checkpoint(folder))
    tensors = random_tensors(tiny_config())
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write_checkpoint(tmp_path / "twice", tiny_config(), tensors.items(), dtype="float32")
    (tmp_path / "twice" / "config.json").write_text(json.dumps(config))
    assert "head" not in load_params(open_checkpoint(tmp_path / "twice"))


def test_untying_the_head_does_not_change_the_logits(tiny_llama):
    checkpoint = open_checkpoint(tiny_llama(tie_word_embeddings=True))
    params, tokens = load_params(checkpoint), tokens_for(checkpoint.arch, 8)
    untied = dataclasses.replace(checkpoint.arch, tied=False)
    np.testing.assert_array_equal(
        run(params, tokens, checkpoint.arch), run(params | {"head": params["embed"]}, tokens, untied)
    )


def test_bfloat16_parameters_compute_in_bfloat16_and_return_float32(tiny_llama):
    checkpoint = open_checkpoint(tiny_llama())
    arch, params = checkpoint.arch, load_params(checkpoint)
    rounded = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    tokens = tokens_for(arch, 8)
    rope = rope_tables(arch, 8)
    stream = jax.eval_shape(lambda p: run_blocks(p["blocks"], embed_tokens(p, tokens), rope, arch), rounded)
    assert stream.dtype == jnp.bfloat16
    low, high = run(rounded, tokens, arch), run(params, tokens, arch)
    assert low.dtype == jnp.float32
    assert 1e-4 < np.abs(low - high).max() < 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_no_type_or_rank_is_promoted_silently(tiny_llama, family):
    checkpoint = open_checkpoint(tiny_llama(family))
    params, tokens = load_params(checkpoint), tokens_for(checkpoint.arch, 8)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for kind in (jnp.float32, jnp.bfloat16):
            cast = jax.tree.map(lambda x, kind=kind: jnp.asarray(x, kind), params)
            shape = jax.eval_shape(functools.partial(logits, arch=checkpoint.arch), cast, tokens)
            assert (shape.shape, shape.dtype) == ((2, 8, 96), jnp.float32)


def test_logits_are_differentiable_in_every_parameter(tiny_llama):
    checkpoint = open_checkpoint(tiny_llama("qwen3"))
    params, tokens = load_params(checkpoint), tokens_for(checkpoint.arch, 8)

    def loss(params):
        return jax.nn.log_softmax(logits(params, tokens, checkpoint.arch))[..., 0].mean()

    for gradient in jax.tree.leaves(jax.jit(jax.grad(loss))(params)):
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0
