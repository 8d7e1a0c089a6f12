"""Claims about gauges: logits, inverses, moments and traces; a float64 network and new passes as oracles."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import FAMILIES, orthogonality_error, synthetic_moments
from tiny_sources import fold_moments, stacked_distortion

from rdopt.calibration.backward import second_moments
from rdopt.checkpoint.families import INPUT_OF, MATRICES
from rdopt.checkpoint.folder import open_checkpoint
from rdopt.operator.llama import logits
from rdopt.operator.params import load_params
from rdopt.transforms.bases import BASES, starting_gauges
from rdopt.transforms.gauges import residual
from rdopt.transforms.gauges.coordinates import Gauges
from rdopt.transforms.gauges.fold import fold, unfold
from rdopt.transforms.gauges.residual import stream_rows
from rdopt.transforms.matrices.joint import row_moments
from rdopt.transforms.matrices.random import random_orthogonal

GAINS = ("attn_norm", "mlp_norm")
VARIANTS = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
    ("mistral", {"num_key_value_heads": 1}),
    ("qwen2", {"num_key_value_heads": 4}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"num_key_value_heads": 1}),
    ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
]
run = jax.jit(logits, static_argnames="arch")


def load(folder):
    checkpoint = open_checkpoint(folder)
    return load_params(checkpoint), checkpoint.arch


def random_gauges(arch, seed=5, residual=True, value=True):
    heads = (arch.num_layers, arch.num_kv_heads)
    return Gauges(
        random_orthogonal(seed, arch.hidden_size) if residual else None,
        random_orthogonal(seed + 1, arch.head_dim, heads) if value else None,
    )


def every_gauge(arch, seed=5):
    """Random gauges at every site that the network has: the scale of queries under QK-norm needs eps = 0."""
    rng = np.random.default_rng(seed)
    layers, kv, h = arch.num_layers, arch.num_kv_heads, arch.head_dim
    group = arch.num_heads // kv
    size = np.exp(0.3 * rng.standard_normal((layers, kv, 1 if arch.qk_norm else h // 2)))
    signs, angles = rng.choice([-1.0, 1.0], (layers, kv, h // 2)), rng.uniform(0, 2 * np.pi, (layers, kv, h // 2))
    turn = signs if arch.qk_norm else np.exp(1j * angles)
    order = [[(k, i) for k in rng.permutation(kv) for i in rng.permutation(group)] for _ in range(layers)]
    rotations = random_gauges(arch, seed)
    assert rotations.value is not None
    return rotations._replace(
        value=rotations.value + 0.1 * rng.standard_normal((layers, kv, h, h)),
        norm=np.exp(0.3 * rng.standard_normal((2 * layers + 1, arch.hidden_size))),
        query=(size * turn).astype(complex),
        hidden=rng.choice([-1.0, 1.0], (layers, arch.ffn_size)) * np.exp(rng.standard_normal((layers, arch.ffn_size))),
        channels=np.stack([rng.permutation(arch.ffn_size) for _ in range(layers)]),
        heads=np.array(order) @ np.array([group, 1]),
    )


def without_eps(arch, gauges):
    """The architecture in which the gauges are exact."""
    return replace(arch, norm_eps=0.0) if arch.qk_norm and gauges.query is not None else arch


def tokens_of(arch, shape=(2, 16), seed=0):
    return np.random.default_rng(seed).integers(0, arch.vocab_size, shape).astype(np.int32)


def gains_of(params):
    return {k: params["blocks"][k] for k in GAINS} | {"final_norm": params["final_norm"]}


def wide(params):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
@pytest.mark.parametrize("sites", [(True, True), (True, False), (False, True)])
def test_folding_keeps_the_logits(tiny_llama, family, changes, sites):
    params, arch = load(tiny_llama(family, **changes))
    folded, folded_arch = fold(params, arch, random_gauges(arch, residual=sites[0], value=sites[1]))
    assert folded_arch.tied == (arch.tied and not sites[0])
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(folded))
    tokens = tokens_of(arch)
    before, after = run(params, tokens, arch), run(folded, tokens, folded_arch)
    np.testing.assert_allclose(after, before, atol=1e-4)
    changed = [np.abs(folded["blocks"][k] - params["blocks"][k]).max() > 0.1 for k in MATRICES]
    assert changed == [sites[0] or (k in ("v", "o") and sites[1]) for k in MATRICES]


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
@pytest.mark.parametrize("sites", [*((site,) for site in Gauges._fields), Gauges._fields])
def test_the_fold_is_exact_in_float64(tiny_llama, family, changes, sites, monkeypatch):
    """Stored in float64 instead of float32, the folded network has the same logits to 1e-10."""
    params, arch = load(tiny_llama(family, **changes))
    # The forward pass rounds norms and scores to float32: this one runs wholly in float64.
    monkeypatch.setattr("rdopt.transforms.gauges.fold._f32", lambda x: np.asarray(x, np.float64))
    tokens = tokens_of(arch)
    gauges = {site: value for site, value in every_gauge(arch)._asdict().items() if site in sites}
    arch = without_eps(arch, Gauges(**gauges))
    folded, folded_arch = fold(wide(params), arch, Gauges(**gauges))
    before, after = (reference_logits(p, tokens, a) for p, a in ((wide(params), arch), (folded, folded_arch)))
    np.testing.assert_allclose(after, before, atol=1e-10)
    np.testing.assert_allclose(before, run(params, tokens, arch), atol=1e-4)
    assert folded_arch.tied == (arch.tied and not {"residual", "norm"} & set(sites))
    moved = [np.abs(folded["blocks"][k] - params["blocks"][k]).max() > 1e-3 for k in MATRICES]
    assert any(moved)


def reference_logits(params, tokens, arch):
    """The network in float64 numpy, one head and position after the other."""
    from rdopt.operator.llama import rope_tables

    h, half = arch.head_dim, arch.head_dim // 2
    cos, sin = (t.astype(np.float64) for t in rope_tables(arch, tokens.shape[1]))

    def norm(x, gain):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + arch.norm_eps) * gain

    def apply(name, p, x):
        return x @ p[name].T + p.get(name + "_bias", 0.0)

    def rotate(x):
        return x * cos + np.concatenate([-x[:, half:], x[:, :half]], axis=1) * sin

    out = []
    for sequence in tokens:
        x = params["embed"][sequence]
        length = len(sequence)
        for i in range(arch.num_layers):
            p = {k: v[i] for k, v in params["blocks"].items()}
            y = norm(x, p["attn_norm"])
            q, k, v = (apply(n, p, y).reshape(length, -1, h) for n in "qkv")
            if arch.qk_norm:
                q, k = norm(q, p["q_norm"]), norm(k, p["k_norm"])
            heads = []
            for head in range(arch.num_heads):
                shared = head // (arch.num_heads // arch.num_kv_heads)
                score = rotate(q[:, head]) @ rotate(k[:, shared]).T / np.sqrt(h)
                score[np.triu_indices(length, 1)] = -np.inf
                weight = np.exp(score - score.max(-1, keepdims=True))
                heads.append(weight / weight.sum(-1, keepdims=True) @ v[:, shared])
            x = x + apply("o", p, np.concatenate(heads, axis=1))
            y = norm(x, p["mlp_norm"])
            gate = apply("gate", p, y)
            x = x + apply("down", p, gate / (1 + np.exp(-gate)) * apply("up", p, y))
        out.append(norm(x, params["final_norm"]) @ params["embed" if arch.tied else "head"].T)
    return np.stack(out)


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
@pytest.mark.parametrize("sites", [("residual",), ("value",), ("norm",), ("query", "heads"), Gauges._fields])
def test_unfolding_returns_the_original(tiny_llama, family, changes, sites):
    params, arch = load(tiny_llama(family, **changes))
    gauges = Gauges(**{site: getattr(every_gauge(arch), site) for site in sites})
    folded, _ = fold(params, arch, gauges)
    again = unfold(folded, arch, gauges, gains_of(params))
    assert jax.tree.structure(again) == jax.tree.structure(params)
    for found, expected in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        assert found.dtype == np.float32 and found.shape == expected.shape
        assert np.sqrt(np.mean((found - expected) ** 2)) <= 1e-6 * np.sqrt(np.mean(expected**2))


def test_no_gauge_changes_nothing(tiny_llama):
    params, arch = load(tiny_llama("qwen3"))
    folded, folded_arch = fold(params, arch, Gauges())
    assert folded_arch == arch
    for found, expected in zip(jax.tree.leaves(folded), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])  # biases; norms inside the heads
def test_folded_moments_are_those_measured_on_the_folded_model(tiny_llama, family):
    params, arch = load(tiny_llama(family))
    gauges, tokens = every_gauge(arch), tokens_of(arch, (4, 16))
    arch = without_eps(arch, gauges)
    folded, folded_arch = fold(params, arch, gauges)
    moved = fold_moments(second_moments(params, arch, tokens), params, arch, gauges)
    measured = second_moments(folded, folded_arch, tokens)
    for found, expected in zip(moved[:2], measured[:2], strict=True):
        assert set(found) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=1e-4 * np.abs(value).max(), err_msg=name)
    assert moved.tokens == measured.tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_the_trace_of_an_error_is_the_same_in_all_coordinates(tiny_llama, family):
    """Errors fold as weights do; D = 1/2 tr(G E sigma E^T) of the same function change is the same number."""
    params, arch = load(tiny_llama(family))
    gauges = every_gauge(arch)
    moments = synthetic_moments(arch)
    rng = np.random.default_rng(0)
    noisy = {
        k: W + 0.05 * rng.standard_normal(W.shape).astype(np.float32) if k in MATRICES else W
        for k, W in params["blocks"].items()
    }
    turned, turned_noisy = (fold({**params, "blocks": b}, arch, gauges)[0] for b in (params["blocks"], noisy))
    before = stacked_distortion(params, {"blocks": noisy}, moments)
    after = stacked_distortion(turned, turned_noisy, fold_moments(moments, params, arch, gauges))
    assert after == pytest.approx(before, rel=1e-4)
    for name in MATRICES:
        sigma = fold_moments(moments, params, arch, gauges).sigma[INPUT_OF[name]]
        np.testing.assert_allclose(sigma, np.swapaxes(sigma, 1, 2), atol=1e-9 * np.abs(sigma).max())


def test_what_is_no_symmetry_is_refused(tiny_llama):
    params, arch = load(tiny_llama("qwen3"))
    c = np.ones((arch.num_layers, arch.num_kv_heads, arch.head_dim // 2), complex)
    c[0, 0, 0] = 1j
    with pytest.raises(ValueError, match="only signs and one scale per head"):
        fold(params, arch, Gauges(query=c))
    heads = np.tile(np.arange(arch.num_heads), (arch.num_layers, 1))
    heads[0, [0, -1]] = heads[0, [-1, 0]]
    with pytest.raises(ValueError, match="one group have to stay together"):
        fold(params, arch, Gauges(heads=heads))


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_basis_is_orthogonal_and_keeps_the_logits(tiny_llama, kind, family):
    params, arch = load(tiny_llama(family))
    moments = synthetic_moments(arch)
    gauges = starting_gauges(kind, params, arch, moments, seed=2)
    if kind == "identity":
        assert gauges == Gauges()
    else:
        assert gauges.residual is not None and gauges.value is not None
        assert gauges.residual.dtype == gauges.value.dtype == np.float64
        assert orthogonality_error(gauges.residual) < 1e-12
        assert orthogonality_error(gauges.value) < 1e-12
    tokens = tokens_of(arch)
    folded, folded_arch = fold(params, arch, gauges)
    np.testing.assert_allclose(run(folded, tokens, folded_arch), run(params, tokens, arch), atol=1e-4)


def test_a_basis_is_the_same_for_the_same_seed_and_another_for_another(tiny_llama):
    params, arch = load(tiny_llama())
    moments = synthetic_moments(arch)
    for kind in ("random", "hadamard"):
        one, again, two = (starting_gauges(kind, params, arch, moments, seed=s) for s in (0, 0, 1))
        assert one.residual is not None and two.residual is not None and again.residual is not None
        np.testing.assert_array_equal(one.residual, again.residual)
        assert np.abs(one.residual - two.residual).max() > 0.1


def test_an_unknown_basis_is_refused(tiny_llama):
    params, arch = load(tiny_llama())
    with pytest.raises(ValueError, match="basis 'wavelet' is none of"):
        starting_gauges("wavelet", params, arch, synthetic_moments(arch))


def test_pca_diagonalises_what_it_is_made_of(tiny_llama):
    """The summed Gram matrix in the weights' basis, the stream's moment in the activations'."""
    params, arch = load(tiny_llama())
    moments = synthetic_moments(arch)
    for kind in ("pca", "pca-act"):
        gauges = starting_gauges(kind, params, arch, moments)
        folded, _ = fold(params, arch, gauges)
        turned = fold_moments(moments, params, arch, gauges)
        grams = []
        for layer in range(arch.num_layers):
            if kind == "pca-act":
                grams += [turned.sigma[site][layer] for site in ("attn", "mlp")]
                continue
            for name in MATRICES:
                W = folded["blocks"][name][layer].astype(np.float64)
                grams.append(W @ W.T if name in ("o", "down") else W.T @ W)
        total = np.sum([g / np.trace(g) for g in grams], axis=0)
        off = total - np.diag(np.diagonal(total))
        assert np.abs(off).max() < 1e-6 * np.trace(total)
        assert np.diff(np.diagonal(total)).max() <= 1e-6


def test_moments_of_neighbouring_layers_are_pooled_where_all_of_them_would_be_too_many(tiny_llama, monkeypatch):
    params, arch = load(tiny_llama(num_hidden_layers=5))
    C, weights = row_moments(stream_rows(params, arch), floor=0.0)
    assert len(C) == 5 * len(MATRICES)
    monkeypatch.setattr(residual, "JOINT_BYTES", C.nbytes / 2)  # every other layer: pools of 2, 2 and 1
    pooled, rows = row_moments(stream_rows(params, arch), floor=0.0)
    assert len(pooled) == 3 * len(MATRICES) and rows.sum() == weights.sum()
    of_name = np.arange(5)[:2] * len(MATRICES) + 3  # o of the first two layers
    np.testing.assert_allclose(pooled[3], np.average(C[of_name], axis=0, weights=weights[of_name]), rtol=1e-12)
    start = starting_gauges("joint", params, arch)
    assert start.residual is not None and orthogonality_error(start.residual) < 1e-10
