"""Measures second moments (see `calibration.moments`) by one forward and one backward pass, block by block.

Memory holds one block with its sums and a batch of sequences; the residual stream before every block, from which the
backward pass starts anew, is kept within a budget and behind it on disk. A killed run goes on at its next block.
"""

import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rdopt.calibration.moments import EmbeddingMoments, Moments, full_G
from rdopt.calibration.store import MomentStore
from rdopt.checkpoint.atomic import new_file
from rdopt.checkpoint.families import INPUT_OF, MATRICES, MATRICES_OF, Architecture
from rdopt.checkpoint.spill import Spill
from rdopt.config.progress import Tick
from rdopt.operator.blockwise import padded_batches, streams
from rdopt.operator.llama import block, head_logits, linear, rms_norm, rope_tables
from rdopt.operator.params import read_block

_ATTENTION_BYTES = 2**28  # of the attention scores of a batch
LOGIT_BYTES = 2**26  # of the logits of some positions


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


def zero_probes(p: Mapping[str, Any]) -> dict[str, Any]:
    """What the probes of a block add up to, at zero."""
    shapes = {k: p[k].shape for k in MATRICES}
    sigma = {INPUT_OF[k]: (n, n) for k, (_, n) in shapes.items()}
    G = {k: (m, m) if full_G(k, m) else (m,) for k, (m, _) in shapes.items()}
    return {kind: {k: jnp.zeros(s) for k, s in of.items()} for kind, of in (("sigma", sigma), ("G", G))}


def measure_moments(
    params: Mapping[str, Any],
    arch: Architecture,
    tokens: Int[np.ndarray, "sequences length"],
    store: MomentStore,
    *,
    seed: int = 0,
    budget: int = 2**30,
    progress: Tick | None = None,
) -> None:
    """Measures the moments of a model on calibration sequences into a store, the last block first.

    A matrix's own D is 1/2 mean (g^T E x)^2, the mean over tokens of g g^T (x) x x^T as a quadratic form in E; the
    product of the two means stands for it.

    Args:
        params: the model, float32, its blocks in memory or read when they are indexed.
        arch: its architecture.
        tokens: calibration sequences.
        store: where they go; blocks that lie there are not measured again.
        seed: of the sampled labels, one draw for every position, however the text is cut.
        budget: bytes of residual streams in memory; the others lie on disk meanwhile.
        progress: called with (passes through a block done, of how many).
    """
    store.open()
    layers, size = arch.num_layers, batch_size(arch, tokens.shape[1])
    passes = iter(range(1, 2 * layers + 2))

    def count() -> None:
        if progress is not None:
            progress(next(passes), 2 * layers + 1)

    slopes = _Slopes(store)
    behind = slopes.behind()  # the gradient behind this block is known, and blocks from here on are done
    before = Spill(budget)
    for layer, x in enumerate(streams(params, tokens, arch, size)):
        if layer < behind or behind == layers:
            before.keep(layer, x)
        count()
        if layer == behind:
            break
    if not slopes.path(behind).is_file():
        slopes.write_head(*_head_moments(params, before.take(layers), seed, arch))
    g, rope = slopes.read(behind), rope_tables(arch, tokens.shape[1])
    for layer in reversed(range(behind)):
        p, x = jax.device_put(read_block(params, layer)), before.take(layer)
        sums = zero_probes(p)
        for i in range(0, len(x), size):
            sums, below = _backward(p, x[i : i + size], g[i : i + size], rope, sums, arch)
            g[i : i + size] = np.asarray(below)
        means = jax.tree.map(lambda s: np.asarray(s) / tokens.size, sums)
        slopes.write(layer, g)
        store.keep(layer, means["sigma"], means["G"])
        count()
    rows = g.reshape(-1, g.shape[-1])
    energy = np.bincount(tokens.ravel(), np.sum(rows**2, axis=1, dtype=np.float64), arch.vocab_size)
    G = np.matmul(rows.T, rows, dtype=np.float64) / tokens.size
    fisher, S = (x / tokens.size for x in slopes.read_head())
    store.keep_ends(EmbeddingMoments(energy / max(energy.sum(), np.finfo(np.float64).tiny), G, fisher, S))
    slopes.close()


def second_moments(
    params: Mapping[str, Any],
    arch: Architecture,
    tokens: Int[np.ndarray, "sequences length"],
    *,
    seed: int = 0,
    progress: Tick | None = None,
) -> Moments:
    """The moments of a small model in memory; see `measure_moments`."""
    with tempfile.TemporaryDirectory() as folder:
        store = MomentStore(Path(folder), arch.num_layers, "", int(tokens.size))
        measure_moments(params, arch, tokens, store, seed=seed, progress=progress)
        moments = store.moments()
        sigma, G = ({k: np.stack(list(x)) for k, x in held.items()} for held in (moments.sigma, moments.G))
        return moments._replace(sigma=sigma, G=G)


class _Slopes:
    """The gradient before the first block that is done, kept beside the blocks until all are."""

    def __init__(self, store: MomentStore) -> None:
        self._store, self._folder = store, store.folder / "slopes"

    def path(self, layer: int) -> Path:
        """Of the gradient before a block; of the one behind the last block where the layer is their number."""
        return self._folder / f"{layer}.npy"

    def behind(self) -> int:
        """The first of the blocks that need not be measured again; their number where none is done."""
        layers, missing = self._store.layers, self._store.missing
        done = range(max(missing, default=-1) + 1, layers + 1)
        return min((layer for layer in done if self.path(layer).is_file()), default=layers)

    def write(self, layer: int, g: Float[np.ndarray, "n T d"]) -> None:
        """Keeps the gradient before a block; that behind it goes with the block after it."""
        self._save(self.path(layer), g)
        self.path(layer + 2).unlink(missing_ok=True)

    def read(self, layer: int) -> Float[np.ndarray, "n T d"]:
        """The gradient before a block."""
        return np.load(self.path(layer))

    def write_head(
        self, g: Float[np.ndarray, "n T d"], fisher: Float[np.ndarray, " V"], S: Float[np.ndarray, "d d"]
    ) -> None:
        """Keeps the gradient behind the last block and what the head's moments add up to."""
        self._save(self._folder / "fisher.npy", fisher)
        self._save(self._folder / "S.npy", S)
        self._save(self.path(self._store.layers), g)

    def read_head(self) -> tuple[Float[np.ndarray, " V"], Float[np.ndarray, "d d"]]:
        """The sums of the head."""
        return np.load(self._folder / "fisher.npy"), np.load(self._folder / "S.npy")

    def close(self) -> None:
        """Keeps nothing any longer."""
        shutil.rmtree(self._folder)

    def _save(self, path: Path, x: np.ndarray) -> None:
        path.unlink(missing_ok=True)
        with new_file(path) as part, part.open("wb") as file:
            np.save(file, x)


def batch_size(arch: Architecture, length: int) -> int:
    """Sequences on the device at once: 8, or fewer where their attention scores grow large."""
    return max(1, min(8, _ATTENTION_BYTES // (4 * arch.num_heads * length**2)))


@partial(jax.jit, static_argnames="arch", donate_argnames="sums")
def _backward(
    p: Mapping[str, Array], x: Array, g: Array, rope: Any, sums: dict[str, Any], arch: Architecture
) -> tuple[dict[str, Any], Array]:
    """The sums of the probes of one block with those of a batch added, and the gradient before the block."""

    def through(probes: dict[str, Any], x: Array) -> Array:
        return block({**p, "probes": probes}, x, rope, arch, probed_linear)

    _, pull = jax.vjp(through, zero_probes(p), x)
    added, below = pull(g)
    return jax.tree.map(jnp.add, sums, added), below


def _head_moments(
    params: Mapping[str, Any], x: Float[np.ndarray, "n T d"], seed: int, arch: Architecture
) -> tuple[Float[np.ndarray, "n T d"], Float[np.ndarray, " V"], Float[np.ndarray, "d d"]]:
    """The gradient behind the last block, and sums over tokens of p (1 - p) and y y^T at the head, float64.

    Some positions at a time: the logits of the whole text never exist at once.
    """
    head = jax.device_put({k: params[k] for k in ("final_norm", "embed" if arch.tied else "head")})
    rows, key = x.reshape(-1, x.shape[-1]), jax.random.key(seed)
    size = max(1, min(len(rows), LOGIT_BYTES // (4 * arch.vocab_size)))
    g, fisher, S = np.empty_like(rows), np.zeros(arch.vocab_size), np.zeros((rows.shape[1], rows.shape[1]))
    for start, part in zip(range(0, len(rows), size), padded_batches(rows, size), strict=True):
        some = g[start : start + size]
        slope, sums = _head_gradient(head, part, key, start, len(some), arch)
        some[:] = np.asarray(slope)[: len(some)]
        fisher += np.asarray(sums[0])
        S += np.asarray(sums[1])
    return g.reshape(x.shape), fisher, S


@partial(jax.jit, static_argnames="arch")
def _head_gradient(
    head: dict[str, Array], x: Array, key: Array, start: Array, count: Array, arch: Architecture
) -> tuple[Array, tuple[Array, Array]]:
    """Gradient of the log-likelihood of sampled labels at the streams of `count` positions from `start` on, and sums.

    The loss whose gradients G is made of: the sum of log p of a label that the model itself draws at each position.
    The sums are those of p (1 - p) and of y y^T, y the head's input.
    """
    at = jnp.arange(len(x))
    real = at < count
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, start + at)

    def log_likelihood(x: Array) -> tuple[Array, tuple[Array, Array]]:
        scores = head_logits(head, x[None], arch)[0]
        labels = jax.vmap(jax.random.categorical)(keys, jax.lax.stop_gradient(scores))
        logp = jax.nn.log_softmax(scores)
        chosen = jnp.where(real, jnp.take_along_axis(logp, labels[:, None], axis=-1)[:, 0], 0)
        p = jnp.where(real[:, None], jnp.exp(logp), 0)
        y = jnp.where(real[:, None], rms_norm(x, head["final_norm"], arch.norm_eps), 0)
        return jnp.sum(chosen), (jnp.sum(p * (1 - p), axis=0), gram(y))

    return jax.grad(log_likelihood, has_aux=True)(x)
