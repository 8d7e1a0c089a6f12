"""Second moments of inputs and of output gradients of every coded matrix, by one backward pass.

sigma is the uncentred mean of x x^T over tokens at a matrix's input; G that of g g^T at its output, g the gradient
of the sum of a sequence's log-likelihood under labels sampled from the model itself, one per position (the Fisher
information, Martens 1412.1193). D = 1/2 tr(G E sigma E^T) is then in nats/token.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rdopt.checkpoint import MATRICES, Architecture
from rdopt.operator import Params, linear, logits

INPUT_OF = {"q": "attn", "k": "attn", "v": "attn", "o": "o", "gate": "mlp", "up": "mlp", "down": "down"}
# Outputs that a gauge can rotate always need the full G. For the others it is kept up to this width, for feedback
# over the rows; beyond it the memory of a layer's square matrices outgrows that of its weights.
ROTATED = ("v", "o", "down")
FULL_WIDTH = 4096


class Moments(NamedTuple):
    """Second moments of a model on a calibration text, float64.

    Attributes:
        sigma: input group (attn, o, mlp, down) -> (layers, in, in).
        G: matrix -> (layers, out, out); (layers, out) diagonals for very wide q, k, gate and up.
        tokens: how many tokens they are the mean of.
    """

    sigma: dict[str, Float[np.ndarray, "layers in in"]]
    G: dict[str, Float[np.ndarray, "layers ..."]]
    tokens: int

    def diag_G(self, name: str, layer: int) -> Float[np.ndarray, " out"]:
        """Diagonal of G of one matrix."""
        G = self.G[name][layer]
        return G if G.ndim == 1 else np.diagonal(G)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _probe(wants_sigma: bool, full: bool, x: Array, y: Array, sigma: Array | None, G: Array) -> Array:
    """Returns y; its backward pass hands out the sums of x x^T and g g^T as gradients of sigma and G."""
    return y


def _probe_forward(
    wants_sigma: bool, full: bool, x: Array, y: Array, sigma: Array | None, G: Array
) -> tuple[Array, Array]:
    return y, x


def _probe_backward(wants_sigma: bool, full: bool, x: Array, g: Array) -> tuple[Any, ...]:
    rows, grads = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    sigma = _gram(rows) if wants_sigma else None
    return jnp.zeros_like(x), g, sigma, _gram(grads) if full else jnp.sum(grads**2, axis=0)


def _gram(rows: Array) -> Array:
    """Sum over rows of row row^T in full float32, also where products default to a shorter type."""
    return jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)


_probe.defvjp(_probe_forward, _probe_backward)


def _probed_linear(name: str, p: Mapping[str, Any], x: Any) -> Array:
    probes, group = p["probes"], INPUT_OF[name]
    # Matrices that share an input share one sigma; the first of them reports it.
    wants_sigma = name == next(k for k in MATRICES if INPUT_OF[k] == group)
    sigma = probes["sigma"][group] if wants_sigma else None
    y = linear(name, p, x)
    return _probe(wants_sigma, full_G(name, y.shape[-1]), x, y, sigma, probes["G"][name])


def full_G(name: str, width: int) -> bool:
    """Whether the whole G of a matrix with `width` outputs is measured, or its diagonal."""
    return name in ROTATED or width <= FULL_WIDTH


@partial(jax.jit, static_argnames="arch")
def _batch_sums(
    params: Params, tokens: Int[Array, "batch length"], key: Array, arch: Architecture
) -> tuple[dict[str, Any], Float[Array, ""]]:
    """Sums over the tokens of a batch of x x^T and g g^T, as a tree of probes, and the log-likelihood."""

    def log_likelihood(probes: dict[str, Any]) -> Array:
        blocks = {**params["blocks"], "probes": probes}
        scores = logits({**params, "blocks": blocks}, tokens, arch, _probed_linear)
        labels = jax.random.categorical(key, jax.lax.stop_gradient(scores))
        logp = jax.nn.log_softmax(scores)
        return jnp.sum(jnp.take_along_axis(logp, labels[..., None], axis=-1))

    value, sums = jax.value_and_grad(log_likelihood)(_zero_probes(params["blocks"]))
    return sums, value


def _zero_probes(blocks: dict[str, Any]) -> dict[str, Any]:
    shapes = {k: blocks[k].shape for k in MATRICES}
    layers = shapes["q"][0]
    sigma = {INPUT_OF[k]: (layers, s[2], s[2]) for k, s in shapes.items()}
    G = {k: (layers, s[1], s[1]) if full_G(k, s[1]) else (layers, s[1]) for k, s in shapes.items()}
    return {"sigma": {k: jnp.zeros(s) for k, s in sigma.items()}, "G": {k: jnp.zeros(s) for k, s in G.items()}}


def second_moments(
    params: Params,
    arch: Architecture,
    tokens: Int[np.ndarray, "sequences length"],
    *,
    seed: int = 0,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Moments:
    """Measures the moments of a model on calibration sequences.

    Args:
        params: the model, float32.
        arch: its architecture.
        tokens: calibration sequences.
        seed: of the sampled labels.
        batch: sequences per pass; sigma depends on it only through summation order, G also through
            the labels, which are drawn pass by pass.
        progress: called with (sequences done, of how many).

    Returns:
        the moments; sums run in float32 inside a batch and in float64 across batches.
    """
    total: Any = None
    for start, part in _batches(tokens, batch):
        key = jax.random.fold_in(jax.random.key(seed), start)
        sums, _ = _batch_sums(params, part, key, arch)
        sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
        total = sums if total is None else jax.tree.map(np.add, total, sums)
        if progress is not None:
            progress(start + len(part), len(tokens))
    mean = jax.tree.map(lambda x: x / tokens.size, total)
    return Moments(mean["sigma"], mean["G"], int(tokens.size))


def _batches(tokens: Int[np.ndarray, "n length"], batch: int) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(tokens), batch):
        yield start, tokens[start : start + batch]
