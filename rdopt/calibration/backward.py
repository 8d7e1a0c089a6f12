"""Measures the second moments of a whole model (see `calibration.moments`) by one backward pass a batch."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rdopt.calibration.moments import EmbeddingMoments, Moments
from rdopt.checkpoint.families import INPUT_OF, MATRICES, MATRICES_OF, Architecture
from rdopt.config.progress import Tick
from rdopt.operator.llama import embed_tokens, head_logits, linear, rms_norm, rope_tables, run_blocks
from rdopt.operator.params import Params

# Outputs that a gauge can rotate always need the full G. For the others it is kept up to this width, for feedback
# over the rows; beyond it the memory of a layer's square matrices outgrows that of its weights.
ROTATED = ("q", "k", "v", "o", "down")
FULL_WIDTH = 4096


@jax.custom_vjp
def _probe(x: Array, y: Array, sigma: Array | None, G: Array) -> Array:
    """Returns y; its backward pass hands out sums over tokens as gradients of what else it is given.

    Of x x^T to sigma, of g g^T to G (where G is a vector, of g^2).
    """
    return y


def _probe_backward(saved: tuple[Array, Array | None, Array], g: Array) -> tuple[Any, ...]:
    x, sigma, G = saved
    rows, grads = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    outputs = gram(grads) if G.ndim == 2 else jnp.sum(grads**2, axis=0)
    return jnp.zeros_like(x), g, None if sigma is None else gram(rows), outputs


def gram(rows: Array) -> Array:
    """Sum over rows of row row^T in full float32, also where products default to a shorter type."""
    return jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)


_probe.defvjp(lambda x, y, sigma, G: (y, (x, sigma, G)), _probe_backward)


def probed_linear(name: str, p: Mapping[str, Any], x: Any) -> Array:
    """The hook that measures: `linear` whose backward pass hands out the sums of `_probe` in p["probes"]."""
    probes, group = p["probes"], INPUT_OF[name]
    # Matrices that share an input share one sigma: the first of them reports it.
    sigma = probes["sigma"][group] if name == MATRICES_OF[group][0] else None
    return _probe(x, linear(name, p, x), sigma, probes["G"][name])


def full_G(name: str, width: int) -> bool:
    """Whether the whole G of a matrix with `width` outputs is measured, or its diagonal."""
    return name in ROTATED or width <= FULL_WIDTH


@partial(jax.jit, static_argnames="arch")
def _batch_sums(
    params: Params, tokens: Int[Array, "batch length"], key: Array, arch: Architecture
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Sums over the tokens of a batch: a tree of probes (see `_probe`), and those of `EmbeddingMoments`.

    In place of the frequency, the sum of |g|^2 over a token's occurrences.
    """
    rope = rope_tables(arch, tokens.shape[1])

    def log_likelihood(probes: dict[str, Any], x: Array) -> tuple[Array, tuple[Array, Array]]:
        x = run_blocks({**params["blocks"], "probes": probes}, x, rope, arch, probed_linear)
        return sampled_log_likelihood(params, x, key, arch)

    gradient = jax.grad(log_likelihood, argnums=(0, 1), has_aux=True)
    (sums, g), (fisher, S) = gradient(zero_probes(params["blocks"]), embed_tokens(params, tokens))
    energy = jnp.zeros(arch.vocab_size).at[tokens].add(jnp.sum(g**2, axis=-1))
    return sums, {"frequency": energy, "G": gram(g.reshape(-1, g.shape[-1])), "fisher": fisher, "S": S}


def sampled_log_likelihood(
    ends: Mapping[str, Any], x: Float[Array, "B T d"], key: Array, arch: Architecture
) -> tuple[Array, tuple[Array, Array]]:
    """The loss whose gradients G is made of, from the residual stream behind the last block.

    Returns:
        the sum over all positions of log p of a label that the model itself draws there, and sums over tokens of
        p (1 - p) and of y y^T, y the head's input.
    """
    scores = head_logits(dict(ends), x, arch)
    labels = jax.random.categorical(key, jax.lax.stop_gradient(scores))
    logp = jax.nn.log_softmax(scores)
    chosen = jnp.sum(jnp.take_along_axis(logp, labels[..., None], axis=-1))
    p, y = jnp.exp(logp), rms_norm(x, ends["final_norm"], arch.norm_eps)
    return chosen, (jnp.sum(p * (1 - p), axis=(0, 1)), gram(y.reshape(-1, y.shape[-1])))


def zero_probes(blocks: Mapping[str, Any]) -> dict[str, Any]:
    """What the probes of stacked blocks add up to, at zero."""
    shapes = {k: blocks[k].shape for k in MATRICES}
    layers = shapes["q"][0]
    sigma = {INPUT_OF[k]: (layers, s[2], s[2]) for k, s in shapes.items()}
    G = {k: (layers, s[1], s[1]) if full_G(k, s[1]) else (layers, s[1]) for k, s in shapes.items()}
    return {kind: {k: jnp.zeros(s) for k, s in of.items()} for kind, of in (("sigma", sigma), ("G", G))}


def second_moments(
    params: Params,
    arch: Architecture,
    tokens: Int[np.ndarray, "sequences length"],
    *,
    seed: int = 0,
    batch: int = 8,
    progress: Tick | None = None,
) -> Moments:
    """Measures the moments of a model on calibration sequences.

    A matrix's own D is 1/2 mean (g^T E x)^2, the mean over tokens of g g^T (x) x x^T as a quadratic form in E; the
    product of the two means stands for it.

    Args:
        params, arch: the model, float32.
        tokens: calibration sequences.
        seed: of the sampled labels.
        batch: sequences per pass; sigma depends on it only through summation order, G also through
            the labels, which are drawn pass by pass.
        progress: called with (sequences done, of how many).

    Returns:
        the moments; sums run in float32 inside a batch and in float64 across batches.
    """
    total: Any = None
    for start in range(0, len(tokens), batch):
        part, key = tokens[start : start + batch], jax.random.fold_in(jax.random.key(seed), start)
        sums = jax.tree.map(lambda x: np.asarray(x, np.float64), _batch_sums(params, part, key, arch))
        total = sums if total is None else jax.tree.map(np.add, total, sums)
        if progress is not None:
            progress(start + len(part), len(tokens))
    probes, embed = jax.tree.map(lambda x: x / tokens.size, total)
    embed["frequency"] /= max(np.trace(embed["G"]), np.finfo(np.float64).tiny)
    return Moments(probes["sigma"], probes["G"], int(tokens.size), EmbeddingMoments(**embed))
