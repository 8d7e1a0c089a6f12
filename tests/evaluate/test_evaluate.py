"""Claims about perplexity, KL and the windows they are measured on."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st

from rdopt.checkpoint.folder import open_checkpoint
from rdopt.config.errors import UserError
from rdopt.evaluate import divergence
from rdopt.evaluate.divergence import Reference, as_eval_json, compare, noise_floor_bf16, token_kl
from rdopt.evaluate.perplexity import perplexity, windows
from rdopt.operator.llama import logits
from rdopt.operator.params import load_params


def noisy(params, size, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: x + np.float32(size) * rng.standard_normal(x.shape, dtype=np.float32), params
    )


@jax.jit
def kl_of_logits(z, w):
    return token_kl(jax.nn.log_softmax(z), jax.nn.log_softmax(w))


def log_softmax64(z):
    z = z.astype(float) - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


@pytest.fixture
def tiny(tiny_llama):
    """Parameters, architecture, inputs and scored of a tiny model on 11 windows of 16 random tokens."""
    checkpoint = open_checkpoint(tiny_llama("qwen2"))
    tokens = np.random.default_rng(1).integers(0, checkpoint.arch.vocab_size, 11 * 16).astype(np.int32)
    return load_params(checkpoint), checkpoint.arch, *windows(tokens, 16, 16, 10_000)


def demo_windows(demo_model, shared_text, max_tokens):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(demo_model / "tokenizer.json"))
    text = (shared_text / "docs_valid.txt").read_text(encoding="utf-8")[: 8 * max_tokens]
    return windows(np.array(tokenizer.encode(text).ids, np.int32), 256, 256, max_tokens)


@given(n=st.integers(2, 90), context=st.integers(2, 20), data=st.data(), max_tokens=st.integers(2, 120))
def test_every_token_with_a_predecessor_in_its_window_is_a_target_once(n, context, data, max_tokens):
    stride = data.draw(st.integers(1, context))
    tokens = np.arange(100, 100 + n)
    used = min(n, max_tokens)
    if used < context:
        with pytest.raises(UserError, match=f"{used} tokens but one window needs {context}"):
            windows(tokens, context, stride, max_tokens)
        return
    inputs, scored = windows(tokens, context, stride, max_tokens)
    assert inputs.shape == scored.shape and inputs.dtype == np.int32 and scored.dtype == bool
    assert scored.any(axis=1).all() and not scored[:, 0].any()
    np.testing.assert_array_equal(inputs, inputs[:, :1] + np.arange(context))
    # Brute force over what a reader of the docstring would do.
    targets = inputs[scored].tolist()
    assert len(set(targets)) == len(targets)
    reachable = {t for row in inputs.tolist() for t in row[1:]}
    assert set(targets) == reachable
    assert targets == sorted(targets)
    if stride < context:
        assert reachable == set(range(101, 100 + used))


@pytest.mark.parametrize(("context", "stride"), [(16, 0), (16, 17), (1, 1)])
def test_a_stride_that_skips_text_is_refused(context, stride):
    with pytest.raises(UserError, match="stride"):
        windows(np.arange(100), context, stride, 100)


@given(
    size=st.floats(-5, 2).map(lambda e: 10.0**e),
    width=st.sampled_from([2, 3, 40, 300]),
    sharp=st.floats(0.1, 30),
    seed=st.integers(0, 99),
)
def test_kl_from_float32_logits_is_the_float64_sum(size, width, sharp, seed):
    rng = np.random.default_rng(seed)
    z = (sharp * rng.standard_normal((4, width))).astype(np.float32)
    w = (z + size * rng.standard_normal((4, width))).astype(np.float32)
    logp, logq = log_softmax64(z), log_softmax64(w)
    expected = (np.exp(logp) * (logp - logq)).sum(-1)
    got = np.asarray(kl_of_logits(z, w))
    assert (got >= 0).all()
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=1e-11)


def test_kl_is_accurate_far_below_a_hundred_millionth_nat():
    z = np.random.default_rng(0).standard_normal((64, 2048)).astype(np.float32)
    w = z + np.float32(1e-4) * np.random.default_rng(1).standard_normal(z.shape, dtype=np.float32)
    logp, logq = log_softmax64(z), log_softmax64(w)
    expected = (np.exp(logp) * (logp - logq)).sum(-1)
    assert expected.max() < 1e-8
    got = kl_of_logits(z, w)
    np.testing.assert_allclose(got, expected, rtol=2e-3)


def test_a_model_against_itself_has_no_divergence(tiny):
    params, arch, inputs, scored = tiny
    result = compare(Reference(params, arch, inputs, scored, 4), params, arch)
    assert result.kl_mean == result.kl_p90 == 0.0
    np.testing.assert_allclose(result.nll_candidate, result.nll_reference, rtol=1e-6)


def test_figures_are_those_of_float64_on_the_whole_logits(tiny):
    params, arch, inputs, scored = tiny
    candidate = noisy(params, 0.05)
    result = compare(Reference(params, arch, inputs, scored, 4), candidate, arch)
    logp, logq = (
        np.asarray(jax.nn.log_softmax(jnp.asarray(logits(p, inputs, arch)))).astype(float)[:, :-1]
        for p in (params, candidate)
    )
    kl = (np.exp(logp) * (logp - logq)).sum(-1)
    nll = -np.take_along_axis(logq, inputs[:, 1:, None].astype(int), -1)[..., 0]
    mask = scored[:, 1:]
    assert len(result.kl) == mask.sum() == result.counts.sum()
    np.testing.assert_allclose(result.kl, kl[mask], rtol=1e-3)
    np.testing.assert_allclose(result.kl_sums, (kl * mask).sum(1), rtol=1e-4)
    np.testing.assert_allclose(result.nll_candidate, (nll * mask).sum(1), rtol=1e-5)
    assert result.kl_mean == pytest.approx(kl[mask].mean(), rel=1e-4)
    assert result.kl_median == pytest.approx(np.median(kl[mask]), rel=1e-3)
    assert result.kl_p90 == pytest.approx(np.percentile(kl[mask], 90), rel=1e-3)
    assert result.perplexity.value == pytest.approx(np.exp(nll[mask].mean()), rel=1e-5)


@pytest.mark.parametrize("batch", [1, 3, 11, 16])
def test_neither_batch_size_nor_slices_of_the_head_change_a_figure(tiny, batch, monkeypatch):
    params, arch, inputs, scored = tiny
    candidate = noisy(params, 0.05)
    first, second = (compare(Reference(params, arch, inputs, scored, size), candidate, arch) for size in (4, batch))
    monkeypatch.setattr(divergence, "SLICE_BYTES", 7 * 4 * arch.vocab_size)
    third = compare(Reference(params, arch, inputs, scored, batch), candidate, arch)
    for other in (second, third):
        np.testing.assert_allclose(other.kl, first.kl, rtol=1e-3, atol=1e-9)
        np.testing.assert_allclose(other.nll_candidate, first.nll_candidate, rtol=1e-5)


def test_candidates_of_one_shape_share_one_compilation(tiny):
    params, arch, inputs, scored = tiny
    reference = Reference(params, arch, inputs, scored, 4)
    compare(reference, params, arch)
    compiled: Any = divergence._score
    before = compiled._cache_size()
    for seed in range(3):
        compare(reference, noisy(params, 0.1, seed), arch)
    assert compiled._cache_size() == before


def test_a_tied_reference_takes_an_untied_candidate(tiny_llama):
    import dataclasses

    checkpoint = open_checkpoint(tiny_llama(tie_word_embeddings=True))
    params, arch = load_params(checkpoint), checkpoint.arch
    inputs, scored = windows(np.arange(64) % 96, 16, 16, 64)
    untied = compare(
        Reference(params, arch, inputs, scored, 4),
        params | {"head": params["embed"]},
        dataclasses.replace(arch, tied=False),
    )
    assert untied.kl_mean < 1e-10


def test_a_model_without_knowledge_has_the_vocabulary_as_perplexity(tiny):
    params, arch, inputs, scored = tiny
    silent = params | {"head": np.zeros_like(params["head"])}
    loss = Reference(silent, arch, inputs, scored, 4).perplexity
    assert loss.value == pytest.approx(arch.vocab_size, rel=1e-6)
    assert loss.stderr == pytest.approx(0, abs=1e-3)


def test_the_standard_error_of_perplexity_is_that_of_a_bootstrap():
    rng = np.random.default_rng(0)
    counts = rng.integers(50, 256, 400)
    nll = counts * 3.0 + 10 * rng.standard_normal(400) * np.sqrt(counts / 100)
    loss = perplexity(nll, counts)
    draws = rng.integers(0, 400, (4000, 400))
    bootstrap = np.exp(nll[draws].sum(1) / counts[draws].sum(1))
    assert loss.value == pytest.approx(np.exp(nll.sum() / counts.sum()))
    assert loss.stderr == pytest.approx(bootstrap.std(), rel=0.05)
    assert loss.tokens == counts.sum()


def test_a_single_window_has_no_standard_error():
    assert np.isnan(perplexity(np.array([3.0]), np.array([2])).stderr)


def test_the_demo_model_has_the_loss_of_its_model_card(demo_model, shared_text):
    checkpoint = open_checkpoint("demo")
    inputs, scored = demo_windows(demo_model, shared_text, 65_536)
    loss = Reference(load_params(checkpoint), checkpoint.arch, inputs, scored, 8).perplexity
    assert loss.tokens >= 64_000
    assert loss.nll == pytest.approx(3.12, abs=0.005)


def test_losses_of_the_demo_model_are_those_of_transformers(demo_model, shared_text):
    torch = pytest.importorskip("torch", reason="the oracle for losses")
    transformers = pytest.importorskip("transformers")
    checkpoint = open_checkpoint("demo")
    inputs, scored = demo_windows(demo_model, shared_text, 2048)
    ours = Reference(load_params(checkpoint), checkpoint.arch, inputs, scored, 8).perplexity
    model = transformers.AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    ids = torch.tensor(inputs.astype(np.int64))
    with torch.no_grad():
        theirs = model(ids, labels=ids).loss.item()
    assert ours.nll == pytest.approx(theirs, abs=1e-5)


def test_the_bfloat16_floor_is_small_and_hardly_depends_on_the_batch(demo_model, shared_text):
    checkpoint = open_checkpoint("demo")
    params = load_params(checkpoint)
    inputs, scored = demo_windows(demo_model, shared_text, 2048)
    small, large = (noise_floor_bf16(Reference(params, checkpoint.arch, inputs, scored, b)) for b in (4, 16))
    assert 1e-5 < small < 1e-3
    assert large == pytest.approx(small, rel=0.2)


def test_the_report_is_plain_json_with_every_figure(tiny):
    params, arch, inputs, scored = tiny
    reference = Reference(params, arch, inputs, scored, 4)
    report = as_eval_json(compare(reference, noisy(params, 0.05), arch), noise_floor_bf16(reference), 16, 16)
    again = json.loads(json.dumps(report, allow_nan=False))
    assert set(again["perplexity"]) == {"value", "stderr", "nll", "tokens", "context", "stride"}
    assert set(again["kl"]) == {"mean", "median", "p90", "noise_floor_bf16"}
    assert 0 < again["kl"]["median"] < again["kl"]["p90"]


def test_models_of_different_vocabularies_are_refused(tiny, tiny_llama):
    params, arch, inputs, scored = tiny
    other = open_checkpoint(tiny_llama("qwen2", vocab_size=97))
    with pytest.raises(UserError, match="96 and 97"):
        compare(Reference(params, arch, inputs, scored, 4), load_params(other), other.arch)


def test_a_loss_that_is_not_a_number_is_refused(tiny):
    params, arch, inputs, scored = tiny
    broken = params | {"final_norm": np.full_like(params["final_norm"], np.nan)}
    with pytest.raises(UserError, match="candidate model's loss is NaN"):
        compare(Reference(params, arch, inputs, scored, 4), broken, arch)
    with pytest.raises(UserError, match="reference model's loss is NaN"):
        Reference(broken, arch, inputs, scored, 4)


def test_windows_the_model_cannot_read_are_refused(tiny):
    params, arch, inputs, scored = tiny
    with pytest.raises(UserError, match="Token 96 lies outside the model's vocabulary of 96"):
        Reference(params, arch, np.where(inputs == inputs.max(), 96, inputs), scored, 4)
    long = windows(np.zeros(200, np.int32), 65, 65, 200)
    with pytest.raises(UserError, match="65 tokens exceed the model's 64 positions"):
        Reference(params, arch, *long, 4)
    with pytest.raises(UserError, match="batch is 0"):
        Reference(params, arch, inputs, scored, 0)


def test_the_slope_of_the_kl_is_the_difference_of_the_probabilities_and_finite_where_q_vanishes():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((6, 40)).astype(np.float32)
    for shift in (1e-6, 0.3, 300.0):
        b = a + np.float32(shift) * rng.standard_normal(a.shape).astype(np.float32)

        def kl(scores, a=a):
            return jnp.sum(token_kl(jax.nn.log_softmax(a), jax.nn.log_softmax(scores)))

        p, q = (scipy.special.softmax(np.asarray(x, np.float64), axis=-1) for x in (a, b))
        found = np.asarray(jax.jit(jax.grad(kl))(jnp.asarray(b)))
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found, q - p, atol=1e-6 if shift > 1 else 1e-6 * max(shift, 0.1))
