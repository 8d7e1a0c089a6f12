"""Claims about the drift's correction: exact on an exact prefix, least squares by brute force on a perturbed one."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_sources import aligned_of

from rdopt.checkpoint.families import MATRICES, MATRICES_OF, input_groups
from rdopt.checkpoint.folder import open_checkpoint
from rdopt.encode.drift import Prefix
from rdopt.operator.llama import block, embed_tokens, linear, rope_tables
from rdopt.operator.params import load_params

DAMPING = 0.02


@pytest.fixture(params=["llama", "qwen2", "qwen3"])
def model(request, tiny_llama):
    """(params, arch, tokens) of a tiny model; ten sequences are more than one batch."""
    checkpoint = open_checkpoint(tiny_llama(request.param))
    tokens = np.random.default_rng(1).integers(0, checkpoint.arch.vocab_size, (10, 12)).astype(np.int32)
    return load_params(checkpoint), checkpoint.arch, tokens


def one_block(params, layer):
    return {k: v[layer] for k, v in params["blocks"].items()}


def perturbed(params, layer, names, size=0.2):
    rng = np.random.default_rng(7)
    found = {}
    for name in names:
        W = params["blocks"][name][layer]
        found[name] = W + np.float32(size * W.std()) * rng.standard_normal(W.shape, dtype=np.float32)
    return found


def recorded(p, x, arch):
    """Inputs and outputs of every matrix of a block, the stream behind it; rows are tokens, float64."""
    inputs, outputs = {}, {}

    def watching(name, p, y):
        inputs[name], outputs[name] = y, linear(name, p, y)
        return outputs[name]

    after = block(p, x, rope_tables(arch, x.shape[1]), arch, watching)
    flat = [{k: np.asarray(v, np.float64).reshape(-1, v.shape[-1]) for k, v in d.items()} for d in (inputs, outputs)]
    return *flat, after


def ridge(X, Y, W):
    """argmin_V |Y - X V^T|^2 / n + damping mean(diag S) |V - W|^2 by an augmented least-squares problem."""
    width = X.shape[1]
    weight = np.sqrt(DAMPING * np.mean(np.sum(X**2, axis=0)))
    A = np.concatenate([X, weight * np.eye(width)])
    B = np.concatenate([Y, weight * W.T])
    return np.linalg.lstsq(A, B, rcond=None)[0].T


def test_the_order_is_that_of_the_computation():
    assert list(input_groups(2)) == [(i, g) for i in range(2) for g in ("attn", "o", "mlp", "down")]


def test_behind_an_unquantized_prefix_the_targets_are_the_weights(model):
    params, arch, tokens = model
    prefix, done = Prefix(aligned_of(params, arch), tokens, DAMPING), {}
    for layer, group in input_groups(arch.num_layers):
        targets = prefix.targets(layer, group, done)
        assert set(targets) == set(MATRICES_OF[group])
        for name, target in targets.items():
            W = params["blocks"][name][layer]
            assert target.dtype == np.float64
            np.testing.assert_allclose(target, W, atol=1e-6 * np.abs(W).max())
            done[name] = W
        if group == "down":
            prefix.advance(layer, done)
            done = {}


@pytest.mark.parametrize("group", ["attn", "mlp"])
def test_a_consumer_aims_at_what_the_original_gives(model, group):
    """Block 0 is perturbed as a whole, block 1 up to the group: W* is ridge regression of W x on x^."""
    params, arch, tokens = model
    first = perturbed(params, 0, MATRICES)
    before = perturbed(params, 1, [] if group == "attn" else ["q", "k", "v", "o"])
    prefix = Prefix(aligned_of(params, arch), tokens, DAMPING)
    prefix.advance(0, first)
    targets = prefix.targets(1, group, before)
    x = jnp.asarray(embed_tokens(params, tokens))
    plain = recorded(one_block(params, 1), recorded(one_block(params, 0), x, arch)[2], arch)[0]
    behind = recorded({**one_block(params, 0), **first}, x, arch)[2]
    quantized = recorded({**one_block(params, 1), **before}, behind, arch)[0]
    for name in MATRICES_OF[group]:
        W = params["blocks"][name][1].astype(np.float64)
        expected = ridge(quantized[name], plain[name] @ W.T, W)
        np.testing.assert_allclose(targets[name], expected, atol=2e-4 * np.abs(W).max())
        assert np.abs(expected - W).max() > 0.01 * np.abs(W).max()


@pytest.mark.parametrize("group", ["o", "down"])
def test_a_producer_takes_back_the_error_of_the_residual_stream_too(model, group):
    """W* is ridge regression of (the original's stream behind the product) - (the quantized stream before it)."""
    params, arch, tokens = model
    first = perturbed(params, 0, MATRICES)
    before = perturbed(params, 1, ["q", "k", "v"] if group == "o" else [k for k in MATRICES if k != "down"])
    prefix = Prefix(aligned_of(params, arch), tokens, DAMPING)
    prefix.advance(0, first)
    targets = prefix.targets(1, group, before)
    x = jnp.asarray(embed_tokens(params, tokens))
    streams = recorded(one_block(params, 0), x, arch)[2], recorded({**one_block(params, 0), **first}, x, arch)[2]
    plain, quantized = (
        recorded(p, stream, arch)
        for p, stream in zip((one_block(params, 1), {**one_block(params, 1), **before}), streams, strict=True)
    )
    flat = [np.asarray(s, np.float64).reshape(-1, arch.hidden_size) for s in streams]
    if group == "down":  # the streams between the halves of the block
        flat = [s + run[1]["o"] for s, run in zip(flat, (plain, quantized), strict=True)]
    W = params["blocks"][group][1].astype(np.float64)
    wanted = plain[0][group] @ W.T + flat[0] - flat[1]
    expected = ridge(quantized[0][group], wanted, W)
    np.testing.assert_allclose(targets[group], expected, atol=5e-4 * np.abs(expected).max())
    without = ridge(quantized[0][group], plain[0][group] @ W.T, W)
    assert np.abs(expected - without).max() > 0.01 * np.abs(W).max()


def test_the_targets_bring_the_output_closer_than_the_weights_do(model):
    params, arch, tokens = model
    first = perturbed(params, 0, MATRICES)
    prefix = Prefix(aligned_of(params, arch), tokens, DAMPING)
    prefix.advance(0, first)
    targets = prefix.targets(1, "attn", {})
    x = jnp.asarray(embed_tokens(params, tokens))
    plain = recorded(one_block(params, 1), recorded(one_block(params, 0), x, arch)[2], arch)[0]["q"]
    behind = recorded({**one_block(params, 0), **first}, x, arch)[2]
    quantized = recorded(one_block(params, 1), behind, arch)[0]["q"]
    for name in ("q", "k", "v"):
        W = params["blocks"][name][1].astype(np.float64)
        corrected, left_alone = (np.sum((plain @ W.T - quantized @ V.T) ** 2) for V in (targets[name], W))
        assert corrected < 0.98 * left_alone
