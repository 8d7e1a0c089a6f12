"""Claims about second moments: gradients at explicit perturbations and the measured KL as oracles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from tiny_sources import stacked_distortion

from rdopt.calibration.backward import second_moments
from rdopt.calibration.subject import load_moments, save_moments
from rdopt.checkpoint.families import INPUT_OF, MATRICES
from rdopt.checkpoint.folder import open_checkpoint
from rdopt.operator.llama import block, embed_tokens, head_logits, linear, logits, rope_tables
from rdopt.operator.params import load_params

run = jax.jit(logits, static_argnames="arch")


def tiny(tiny_llama, family="llama", **changes):
    checkpoint = open_checkpoint(tiny_llama(family, **changes))
    tokens = np.random.default_rng(1).integers(0, checkpoint.arch.vocab_size, (4, 9)).astype(np.int32)
    return load_params(checkpoint), checkpoint.arch, tokens


def brute_force(params, arch, tokens, labels):
    """x and g of every matrix and token: layers in a Python loop, a perturbation added to every output."""
    rope = rope_tables(arch, tokens.shape[1])
    layers = [{k: v[i] for k, v in params["blocks"].items()} for i in range(arch.num_layers)]
    rows = {name: params["blocks"][name].shape[1] for name in MATRICES}
    zeros = {(i, n): jnp.zeros((*tokens.shape, rows[n])) for i in range(arch.num_layers) for n in MATRICES}

    def log_likelihood(deltas):
        x, inputs = embed_tokens(params, tokens), {}
        for i, p in enumerate(layers):

            def perturbed(name, p, x, i=i):
                inputs[i, name] = x
                return linear(name, p, x) + deltas[i, name]

            x = block(p, x, rope, arch, perturbed)
        logp = jax.nn.log_softmax(head_logits(params, x, arch))
        return jnp.take_along_axis(logp, labels[..., None], axis=-1).sum(), inputs

    grads, inputs = jax.jit(jax.grad(log_likelihood, has_aux=True))(zeros)
    return tuple({k: np.asarray(v, np.float64) for k, v in part.items()} for part in (inputs, grads))


def sampled_labels(params, arch, tokens, seed, start=0):
    key = jax.random.fold_in(jax.random.key(seed), start)
    return jax.random.categorical(key, run(params, tokens, arch))


@pytest.mark.parametrize(("family", "changes"), [("qwen2", {"tie_word_embeddings": True})])
def test_moments_are_means_of_outer_products_of_inputs_and_output_gradients(tiny_llama, family, changes):
    params, arch, tokens = tiny(tiny_llama, family, **changes)
    found = second_moments(params, arch, tokens, seed=3, batch=4)
    inputs, grads = brute_force(params, arch, tokens, sampled_labels(params, arch, tokens, 3))
    assert found.tokens == tokens.size
    for (layer, name), x in inputs.items():
        x, g = x.reshape(tokens.size, -1), grads[layer, name].reshape(tokens.size, -1)
        sigma, G = x.T @ x / tokens.size, g.T @ g / tokens.size
        np.testing.assert_allclose(found.sigma[INPUT_OF[name]][layer], sigma, atol=1e-5 * np.trace(sigma))
        held = found.G[name][layer]
        np.testing.assert_allclose(held, G, atol=1e-5 * np.trace(G))
        diagonal = np.diagonal(held)
        np.testing.assert_array_equal(found.diag_G(name, layer), diagonal)


def test_moments_have_the_shapes_of_the_matrices_and_are_float64(tiny_llama):
    params, arch, tokens = tiny(tiny_llama)
    found = second_moments(params, arch, tokens, batch=4)
    for name in MATRICES:
        layers, out, width = params["blocks"][name].shape
        assert found.sigma[INPUT_OF[name]].shape == (layers, width, width)
        assert found.G[name].shape == (layers, out, out)
    assert all(v.dtype == np.float64 for part in found[:2] for v in part.values())
    for sigma in found.sigma.values():
        assert np.linalg.eigvalsh(sigma).min() > -1e-6 * np.trace(sigma[0])


def test_input_moments_do_not_depend_on_the_batch_and_output_moments_only_by_the_draw_of_labels(tiny_llama):
    """Labels are drawn batch by batch: with one batch size the same seed gives the same moments."""
    params, arch, _ = tiny(tiny_llama)
    tokens = np.random.default_rng(2).integers(0, arch.vocab_size, (64, 16)).astype(np.int32)
    seen = []
    whole, again = (second_moments(params, arch, tokens, batch=64) for _ in range(2))
    parts = second_moments(params, arch, tokens, batch=16, progress=lambda *x: seen.append(x))
    assert seen == [(16, 64), (32, 64), (48, 64), (64, 64)]
    for group, sigma in whole.sigma.items():
        np.testing.assert_allclose(parts.sigma[group], sigma, atol=1e-6 * np.trace(sigma[0]))
        np.testing.assert_array_equal(again.sigma[group], sigma)
    for name, G in whole.G.items():
        np.testing.assert_array_equal(again.G[name], G)
        for layer in range(arch.num_layers):
            total = whole.diag_G(name, layer).sum()
            assert parts.diag_G(name, layer).sum() == pytest.approx(total, rel=0.15)


def test_another_seed_draws_other_labels(tiny_llama):
    params, arch, tokens = tiny(tiny_llama)
    one, two = (second_moments(params, arch, tokens, seed=s) for s in (0, 1))
    np.testing.assert_array_equal(one.sigma["attn"], two.sigma["attn"])
    assert np.abs(one.G["down"] - two.G["down"]).max() > 1e-3 * np.abs(one.G["down"]).max()


def test_moments_are_read_back_only_for_what_they_were_measured_on(tiny_llama, tmp_path):
    params, arch, tokens = tiny(tiny_llama)
    found = second_moments(params, arch, tokens)
    save_moments(tmp_path / "m", found, "key")
    again = load_moments(tmp_path / "m", "key")
    assert again is not None and again.tokens == found.tokens
    for part, expected in zip(again[:2], found[:2], strict=True):
        assert set(part) == set(expected)
        for name, value in expected.items():
            np.testing.assert_array_equal(part[name], value)
    assert load_moments(tmp_path / "m", "other") is None
    assert load_moments(tmp_path / "absent", "key") is None


def measured_kl(params, noisy, arch, tokens):
    """KL(params || noisy) in float64, the mean over all positions."""
    total = 0.0
    for batch in np.split(tokens, len(tokens) // 8):
        scores = (np.asarray(run(x, batch, arch), np.float64) for x in (params, noisy))
        p, q = (scipy.special.log_softmax(x, axis=-1) for x in scores)
        total += np.sum(np.exp(p) * (p - q))
    return total / tokens.size


@pytest.mark.parametrize("size", [0.01, 0.03])
def test_half_the_trace_predicts_the_kl_of_small_weight_errors(demo_model, demo_tokens, demo_moments, size):
    checkpoint = open_checkpoint(demo_model)
    params, arch = load_params(checkpoint), checkpoint.arch
    rng = np.random.default_rng(0)
    blocks = dict(params["blocks"])
    for name in MATRICES:
        W = blocks[name]
        noise = rng.standard_normal(W.shape).astype(np.float32)
        blocks[name] = W + np.float32(size * W.std()) * noise
    noisy = {**params, "blocks": blocks}
    estimate = stacked_distortion(params, noisy, demo_moments)
    assert 0.7 < measured_kl(params, noisy, arch, demo_tokens) / estimate < 1.4
