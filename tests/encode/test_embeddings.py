"""Claims about coded embeddings: explicit gradients, invariance under gauges, Lambert's W, round trips, damage."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from conftest import synthetic_moments
from tiny_sources import aligned_of, fold_moments

from rdopt.calibration.backward import second_moments
from rdopt.calibration.moments import EmbeddingMoments
from rdopt.checkpoint.families import EMBED, HEAD
from rdopt.checkpoint.folder import open_checkpoint
from rdopt.codec.decoder import decode_model
from rdopt.codec.streams.embeddings import unpack_embeddings
from rdopt.codec.streams.index import coded_bits
from rdopt.config.errors import UserError
from rdopt.config.schema import EncodeConfig
from rdopt.encode.embeddings import code_embeddings, embedding_distortion, row_weights, smoothed
from rdopt.encode.model import encode_at_step
from rdopt.encode.source import make_source
from rdopt.evaluate.divergence import Reference, compare
from rdopt.operator.llama import head_logits, logits, rms_norm, rope_tables, run_blocks
from rdopt.operator.params import load_params, params_from_tensors
from rdopt.transforms.gauges.coordinates import Gauges
from rdopt.transforms.gauges.fold import fold
from rdopt.transforms.matrices.random import random_orthogonal

C = 0.05
CODED = EncodeConfig(embeddings="coded", states=4, drift="none", gains="none")


def load(folder):
    checkpoint = open_checkpoint(folder)
    return checkpoint, load_params(checkpoint), checkpoint.arch


def moments_for(arch, seed=0):
    """Synthetic moments with tokens from frequent to never seen or predicted."""
    rng = np.random.default_rng(seed)
    d, vocab = arch.hidden_size, arch.vocab_size
    G, S = (np.cov(rng.standard_normal((d, 3 * d)) * np.exp(rng.standard_normal(d))[:, None]) for _ in range(2))
    share = np.exp(2 * rng.standard_normal(vocab))
    fisher = np.where(np.arange(vocab) % 7 == 0, 0.0, share[::-1] / share.sum())
    return synthetic_moments(arch)._replace(embed=EmbeddingMoments(share / share.sum(), G, fisher, S))


def source_of(folder, encode=CODED, moments=None):
    checkpoint, params, arch = load(folder)
    moments = moments or moments_for(arch)
    return make_source(aligned_of(params, arch, moments, checkpoint.config), encode)


def noisy(params, size=0.05, seed=0):
    rng = np.random.default_rng(seed)
    moved = {k: params[k] + size * rng.standard_normal(params[k].shape) for k in ("embed", "head") if k in params}
    return {**params, **{k: v.astype(np.float32) for k, v in moved.items()}}


def test_moments_are_those_of_gradients_at_the_embedding_and_of_predictions_at_the_head(tiny_llama):
    _, params, arch = load(tiny_llama())
    tokens = np.random.default_rng(1).integers(0, 40, (4, 9)).astype(np.int32)
    found = second_moments(params, arch, tokens, seed=3).embed
    assert found is not None
    scores = logits(params, tokens, arch)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(3), jnp.arange(tokens.size))
    labels = jax.vmap(jax.random.categorical)(keys, scores.reshape(tokens.size, -1)).reshape(tokens.shape)
    rope = rope_tables(arch, tokens.shape[1])

    def final(x):
        return run_blocks(params["blocks"], x, rope, arch)

    def log_likelihood(x):
        logp = jax.nn.log_softmax(head_logits(params, final(x), arch))
        return jnp.take_along_axis(logp, labels[..., None], axis=-1).sum()

    x = jnp.asarray(params["embed"][tokens])
    g = np.asarray(jax.grad(log_likelihood)(x), np.float64).reshape(tokens.size, -1)
    np.testing.assert_allclose(found.G, g.T @ g / tokens.size, atol=1e-4 * np.trace(found.G))
    energy = np.bincount(tokens.ravel(), np.sum(g**2, axis=1), arch.vocab_size)
    np.testing.assert_allclose(found.frequency, energy / energy.sum(), atol=1e-4)
    y = np.asarray(rms_norm(final(x), params["final_norm"], arch.norm_eps), np.float64).reshape(tokens.size, -1)
    np.testing.assert_allclose(found.S, y.T @ y / tokens.size, atol=1e-4 * np.trace(found.S))
    p = scipy.special.softmax(np.asarray(scores, np.float64), axis=-1)
    np.testing.assert_allclose(found.fisher, np.mean(p * (1 - p), axis=(0, 1)), atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_the_distortion_of_an_error_is_the_same_in_all_coordinates(tiny_llama, tied):
    """Rows turn as e R in the embedding and e diag(gain) R in the head; a tied pair comes apart on the way."""
    _, params, arch = load(tiny_llama(tie_word_embeddings=tied))
    gauges, moments, moved = Gauges(random_orthogonal(5, arch.hidden_size)), moments_for(arch), noisy(params)
    turned = fold_moments(moments, params, arch, gauges)
    assert moments.embed is not None and turned.embed is not None
    before = embedding_distortion(aligned_of(params, arch, moments), moved)
    aligned = aligned_of(params, arch, moments, gauges=gauges)
    after = embedding_distortion(aligned, fold(moved, arch, gauges)[0])
    assert after == pytest.approx(before, rel=1e-4) and before > 0
    np.testing.assert_array_equal(turned.embed.frequency, moments.embed.frequency)


@pytest.mark.parametrize("site", ["embed", "head"])
def test_the_distortion_predicts_the_kl_of_small_errors(demo_ends, demo_tokens, demo_moments, site):
    _, params, arch = load(demo_ends)
    if site not in params:
        pytest.skip("the demo model ties its head")
    moved = {**params, site: noisy(params, 0.02 * params[site].std())[site]}
    scored = np.ones(demo_tokens.shape, bool)
    scored[:, 0] = False
    kl = compare(Reference(params, arch, demo_tokens, scored, 8), moved, arch).kl_mean
    assert 0.7 < kl / embedding_distortion(aligned_of(params, arch, demo_moments), moved) < 1.4


def test_rare_tokens_keep_weight_but_never_more_than_a_tenth_of_the_text():
    share = np.array([0.9, 0.1, 0.0, 0.0])
    np.testing.assert_allclose(smoothed(share, 10), share + 0.025)
    np.testing.assert_allclose(smoothed(share, 10**6), share + 3e-6)


def test_row_weights_are_those_of_lambert_for_a_head_and_the_frequencies_for_an_embedding():
    h = np.logspace(-12, 0, 30)
    none = np.zeros_like(h)
    np.testing.assert_allclose(row_weights(h, none, 1e-3), h)
    expected = 1e-3 / (2 * scipy.special.lambertw(1e-3 / (2 * h)).real)
    np.testing.assert_allclose(row_weights(none, h, 1e-3), expected, rtol=1e-9)
    both = row_weights(h, h[::-1], 1e-3)
    np.testing.assert_allclose(both, h + h[::-1] * np.exp(1e-3 / (2 * both)), rtol=1e-9)


@pytest.mark.parametrize("tied", [False, True])
def test_a_file_gives_back_embeddings_within_the_stacked_distortion(tiny_llama, tied):
    """At high rate every entry adds c^2 / 24 nats, no row goes to zero; the rest of the model stays as it was."""
    folder = tiny_llama(tie_word_embeddings=tied)
    source, kept = source_of(folder), source_of(folder, replace(CODED, embeddings="16bit"))
    fine = 1e-4
    coded = encode_at_step(source, fine, CODED)
    plain = encode_at_step(kept, fine, replace(CODED, embeddings="16bit"))
    ours, theirs = (decode_model(x.data).tensors for x in (coded, plain))
    moved = {name for name in ours if not np.array_equal(ours[name], theirs[name])}
    assert moved == ({EMBED} if tied else {EMBED, HEAD})
    decoded = params_from_tensors(ours, source.arch)
    found = embedding_distortion(source.aligned, decoded)
    entries = source.aligned.network()["embed"].size * (1 if tied else 2)
    assert 0.4 < found / (entries * fine**2 / 24) < 1.1


def test_the_two_accountings_count_embeddings_only_in_the_whole_file(tiny_llama):
    folder = tiny_llama()
    source = source_of(folder)
    coded, plain = (encode_at_step(source, C, replace(CODED, embeddings=kind)) for kind in ("coded", "16bit"))
    assert sum(coded.bits.values()) == 8 * len(coded.data)
    assert coded.bits["embeddings"] > 0 == plain.bits["embeddings"]
    assert plain.bits["uncoded"] - coded.bits["uncoded"] == 2 * 8 * (1 + 2 * source.aligned.network()["embed"].size)
    assert abs(coded_bits(coded.bits) - coded_bits(plain.bits)) < 8 * 128  # one more entry in the header
    assert coded.bpw_all < plain.bpw_all
    assert decode_model(coded.data).bits == coded.bits


@pytest.mark.parametrize("threads", [1, 4])
def test_the_same_model_gives_the_same_stream(tiny_llama, threads):
    _, params, arch = load(tiny_llama())
    moments = moments_for(arch)
    data = code_embeddings(aligned_of(params, arch, moments), C, CODED)
    assert code_embeddings(aligned_of(params, arch, moments), C, replace(CODED, threads=threads)) == data
    one, other = (unpack_embeddings(data, arch, C, t) for t in (1, threads))
    assert set(one) == {EMBED, HEAD}
    for name, W in one.items():
        assert W.dtype == np.float32
        np.testing.assert_array_equal(other[name], W)


def test_damaged_streams_raise_value_errors_or_decode_to_something(tiny_llama):
    _, params, arch = load(tiny_llama())
    data = code_embeddings(aligned_of(params, arch, moments_for(arch)), C, CODED)
    rng, refused = np.random.default_rng(0), 0
    for _ in range(60):
        broken = bytearray(data)
        broken[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        try:
            unpack_embeddings(bytes(broken), arch, C, 1)
        except ValueError:
            refused += 1
    assert refused > 0
    with pytest.raises(ValueError, match=r"."):
        unpack_embeddings(data[: len(data) // 2], arch, C, 1)


def test_what_cannot_be_coded_is_refused_in_a_sentence(tiny_llama):
    _, params, arch = load(tiny_llama())
    with pytest.raises(UserError, match="nothing about the embedding"):
        code_embeddings(aligned_of(params, arch, synthetic_moments(arch)), C, CODED)
    broken = {**params, "head": np.full_like(params["head"], np.nan)}
    with pytest.raises(UserError, match=r"lm_head.weight holds NaN"):
        code_embeddings(aligned_of(broken, arch, moments_for(arch)), C, CODED)
    with pytest.raises(UserError, match="embeddings"):
        EncodeConfig(embeddings="8bit")  # pyright: ignore[reportArgumentType]
