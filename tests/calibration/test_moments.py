"""Claims about second moments: gradients at explicit perturbations and the measured KL as oracles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from tiny_sources import stacked_distortion

from rdopt.calibration import backward
from rdopt.calibration.backward import measure_moments, second_moments
from rdopt.calibration.store import MomentStore, open_moments
from rdopt.checkpoint.families import INPUT_OF, MATRICES
from rdopt.checkpoint.folder import open_checkpoint
from rdopt.config.errors import UserError
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


def sampled_labels(params, arch, tokens, seed):
    """A draw of every position by a key of its own."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(tokens.size))
    scores = run(params, tokens, arch)
    return jax.vmap(jax.random.categorical)(keys, scores.reshape(tokens.size, -1)).reshape(tokens.shape)


@pytest.mark.parametrize(("family", "changes"), [("qwen2", {"tie_word_embeddings": True})])
def test_moments_are_means_of_outer_products_of_inputs_and_output_gradients(tiny_llama, family, changes):
    params, arch, tokens = tiny(tiny_llama, family, **changes)
    found = second_moments(params, arch, tokens, seed=3)
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
    found = second_moments(params, arch, tokens)
    for name in MATRICES:
        layers, out, width = params["blocks"][name].shape
        assert np.shape(found.sigma[INPUT_OF[name]]) == (layers, width, width)
        assert np.shape(found.G[name]) == (layers, out, out)
    assert all(np.asarray(v).dtype == np.float64 for part in found[:2] for v in part.values())
    for sigma in found.sigma.values():
        assert np.linalg.eigvalsh(sigma).min() > -1e-6 * np.trace(sigma[0])


def test_moments_do_not_depend_on_the_memory_they_may_take(tiny_llama, tmp_path, monkeypatch):
    """Streams in memory or on disk, logits of all positions or of seven at once: labels belong to positions."""
    params, arch, _ = tiny(tiny_llama)
    tokens = np.random.default_rng(2).integers(0, arch.vocab_size, (20, 16)).astype(np.int32)
    seen, stores = [], [MomentStore(tmp_path / name, arch.num_layers, "key", tokens.size) for name in ("a", "b")]
    measure_moments(params, arch, tokens, stores[0], progress=lambda *x: seen.append(x))
    passes = 2 * arch.num_layers + 1
    assert seen == [(i, passes) for i in range(1, passes + 1)]
    monkeypatch.setattr(backward, "LOGIT_BYTES", 7 * 4 * arch.vocab_size)
    measure_moments(params, arch, tokens, stores[1], budget=0)
    one, two = (store.moments() for store in stores)
    for part, other in zip(one[:2], two[:2], strict=True):
        for name, held in part.items():
            for x, y in zip(held, other[name], strict=True):
                np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(x).max())
    assert one.embed is not None and two.embed is not None
    for x, y in zip(one.embed, two.embed, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(x).max())


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_measurement_that_was_killed_goes_on_and_ends_with_the_same_moments(tiny_llama, tmp_path, kept):
    params, arch, tokens = tiny(tiny_llama)
    whole, broken = (MomentStore(tmp_path / name, arch.num_layers, "key", tokens.size) for name in ("a", "b"))
    measure_moments(params, arch, tokens, whole)

    def kill(done, total):
        if done == arch.num_layers + 1 + kept:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_moments(params, arch, tokens, broken, progress=kill)
    assert not broken.complete and len(broken.missing) == arch.num_layers - kept
    begun = []
    measure_moments(params, arch, tokens, broken, progress=lambda done, total: begun.append(done))
    assert broken.complete and len(begun) == (arch.num_layers - kept) * 2 + 1
    for path in sorted(whole.folder.iterdir()):
        assert path.read_bytes() == (broken.folder / path.name).read_bytes(), path.name


def test_another_seed_draws_other_labels(tiny_llama):
    params, arch, tokens = tiny(tiny_llama)
    one, two = (second_moments(params, arch, tokens, seed=s) for s in (0, 1))
    np.testing.assert_array_equal(one.sigma["attn"], two.sigma["attn"])
    assert np.abs(np.subtract(one.G["down"], two.G["down"])).max() > 1e-3 * np.abs(one.G["down"]).max()


def test_moments_are_taken_only_for_what_they_were_measured_on(tiny_llama, tmp_path):
    params, arch, tokens = tiny(tiny_llama)
    store = MomentStore(tmp_path / "m", arch.num_layers, "key", tokens.size)
    with pytest.raises(UserError, match="holds no second moments; make them there by rdopt moments"):
        open_moments(store.folder, arch.num_layers, "key")
    measure_moments(params, arch, tokens, store)
    again, expected = open_moments(store.folder, arch.num_layers, "key"), second_moments(params, arch, tokens)
    assert again.tokens == expected.tokens
    for part, held in zip(again[:2], expected[:2], strict=True):
        assert set(part) == set(held)
        for name, value in held.items():
            np.testing.assert_array_equal(np.stack(list(part[name])), value)
    with pytest.raises(UserError, match="of another model, text or seed"):
        open_moments(store.folder, arch.num_layers, "other")
    (store.folder / "block-00000.safetensors").unlink()
    with pytest.raises(UserError, match=f"is unfinished .1 of {arch.num_layers} blocks are missing"):
        open_moments(store.folder, arch.num_layers, "key")
    MomentStore(store.folder, arch.num_layers, "other", tokens.size).open()
    assert not list(store.folder.glob("*.safetensors"))


def measured_kl(params, noisy, arch, tokens):
    """KL(params || noisy) in float64, the mean over all positions."""
    total = 0.0
    for batch in np.split(tokens, len(tokens) // 8):
        scores = (np.asarray(run(x, batch, arch), np.float64) for x in (params, noisy))
        p, q = (scipy.special.log_softmax(x, axis=-1) for x in scores)
        total += np.sum(np.exp(p) * (p - q))
    return total / tokens.size


@pytest.mark.parametrize("size", [0.01, 0.03])
def test_half_the_trace_predicts_the_kl_of_small_weight_errors(demo_ends, demo_tokens, demo_moments, size):
    checkpoint = open_checkpoint(demo_ends)
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
