"""A model that does not fit in memory, block by block: its forward pass, and the second moments behind it.

One block's weights are in memory at a time, and the residual stream of the whole text before every block, from which
the backward pass starts anew; the moments are those of `second_moments`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from rdopt.calibration.backward import probed_linear, sampled_log_likelihood, zero_probes
from rdopt.calibration.moments import EmbeddingMoments
from rdopt.checkpoint.atomic import new_file
from rdopt.checkpoint.families import EMBED, FINAL_NORM, HEAD, MATRICES_OF, Architecture, block_shapes
from rdopt.checkpoint.folder import Checkpoint
from rdopt.config.progress import Tick
from rdopt.operator.llama import block, embed_tokens, rope_tables

BATCH = 8  # sequences in a pass


@dataclass(frozen=True)
class PerBlock(Sequence[Float[np.ndarray, "..."]]):
    """One array of every block, read from its file when it is indexed."""

    layers: int
    read: Callable[[int], Float[np.ndarray, "..."]]

    def __len__(self) -> int:
        return self.layers

    def __getitem__(self, layer: Any) -> Any:
        if not 0 <= layer < self.layers:
            raise IndexError(layer)
        return self.read(layer)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all blocks stacked."""
        return (self.layers, *self[0].shape)


@dataclass(frozen=True)
class LayerStore:
    """Second moments in a folder with a file per block, so that a model's need not fit in memory."""

    folder: Path
    layers: int

    def keep(self, layer: int, moments: Mapping[str, Any]) -> None:
        """Writes the moments of one block as `streamed_moments` gives them, float32."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _replace(self._path(layer), {f"{kind}.{k}": v for kind, held in moments.items() for k, v in held.items()})

    def keep_ends(self, moments: EmbeddingMoments) -> None:
        """Writes those of the embedding and the head, float64."""
        _replace(self._ends, moments._asdict())

    @property
    def complete(self) -> bool:
        """Whether every block and the ends are there."""
        return self._ends.is_file() and all(self._path(layer).is_file() for layer in range(self.layers))

    def read_ends(self) -> EmbeddingMoments:
        """What `keep_ends` wrote."""
        return EmbeddingMoments(**load_file(str(self._ends)))

    def read(self, layer: int) -> dict[str, dict[str, Float[np.ndarray, "..."]]]:
        """{"sigma": group -> moment, "G": matrix -> moment or diagonal}, float64."""
        found: dict[str, dict[str, Any]] = {"sigma": {}, "G": {}}
        for name, value in load_file(str(self._path(layer))).items():
            kind, which = name.split(".")
            found[kind][which] = value.astype(np.float64)
        return found

    def sigma(self) -> dict[str, Any]:
        """The moments of the inputs by group, float64, each read block by block."""

        def read(group: str, layer: int) -> Float[np.ndarray, "in in"]:
            with safe_open(str(self._path(layer)), "np") as file:
                return file.get_tensor(f"sigma.{group}").astype(np.float64)

        return {group: PerBlock(self.layers, partial(read, group)) for group in MATRICES_OF}

    @property
    def _ends(self) -> Path:
        return self.folder / "ends.safetensors"

    def _path(self, layer: int) -> Path:
        return self.folder / f"block-{layer:04d}.safetensors"


def _replace(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    path.unlink(missing_ok=True)
    with new_file(path) as part:
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, str(part))


def lazy_params(checkpoint: Checkpoint) -> dict[str, Any]:
    """`load_params` with every block's tensors left in the file until they are indexed, float32."""
    arch = checkpoint.arch

    def read(short: str, layer: int) -> Float[np.ndarray, "..."]:
        return checkpoint.tensor(arch.tensor_name(layer, short))

    blocks = {short: PerBlock(arch.num_layers, partial(read, short)) for short in block_shapes(arch)}
    params = {"embed": checkpoint.tensor(EMBED), "blocks": blocks, "final_norm": checkpoint.tensor(FINAL_NORM)}
    return params if arch.tied else params | {"head": checkpoint.tensor(HEAD)}


def read_block(params: Mapping[str, Any], layer: int) -> dict[str, Float[np.ndarray, "..."]]:
    """The parameters of one block by short name."""
    return {short: np.asarray(held[layer]) for short, held in params["blocks"].items()}


def run_block(p: Mapping[str, Any], x: Float[np.ndarray, "n T d"], arch: Architecture) -> Float[np.ndarray, "n T d"]:
    """The residual stream after one block, float32."""
    rope, held = rope_tables(arch, x.shape[1]), jax.device_put(dict(p))
    return np.concatenate([np.asarray(_forward(held, part, rope, arch)) for part in _batches(x)])


def streams(
    params: Mapping[str, Any], tokens: Int[np.ndarray, "n T"], arch: Architecture
) -> Iterator[Float[np.ndarray, "n T d"]]:
    """The residual stream before every block and behind the last one, float32."""
    x = np.asarray(embed_tokens(dict(params), tokens))
    yield x
    for layer in range(arch.num_layers):
        x = run_block(read_block(params, layer), x, arch)
        yield x


def streamed_moments(
    params: Mapping[str, Any],
    arch: Architecture,
    tokens: Int[np.ndarray, "n T"],
    keep: Callable[[int, Mapping[str, Any]], None],
    *,
    seed: int = 0,
    progress: Tick | None = None,
) -> EmbeddingMoments:
    """Measures sigma and G of every block, the last one first.

    Args:
        params, arch: of `lazy_params`, or a model in memory.
        tokens: calibration sequences.
        keep: called with a layer and {"sigma": group -> (in, in), "G": matrix -> (out, out) or its diagonal}, float32
            means over tokens.
        seed: of the sampled labels.
        progress: called with (blocks done, of how many).

    Returns:
        the moments of the embedding and the head, float64.
    """
    before = list(streams(params, tokens, arch))
    ends = jax.device_put({k: v for k, v in params.items() if k != "blocks"})
    keys = [jax.random.fold_in(jax.random.key(seed), start) for start in range(0, len(tokens), BATCH)]
    parts = zip(_batches(before.pop()), keys, strict=True)
    heads = [jax.tree.map(np.asarray, _head_gradient(ends, x, key, arch)) for x, key in parts]
    g = np.concatenate([slope for slope, _ in heads])
    fisher, S = (np.stack([sums[i] for _, sums in heads]).sum(axis=0, dtype=np.float64) / tokens.size for i in (0, 1))
    rope = rope_tables(arch, tokens.shape[1])
    for layer in reversed(range(arch.num_layers)):
        p, x, total, slopes = jax.device_put(read_block(params, layer)), before.pop(), None, []
        for part, slope in zip(_batches(x), _batches(g), strict=True):
            sums, below = _backward(p, part, slope, rope, arch)
            total = sums if total is None else jax.tree.map(jnp.add, total, sums)
            slopes.append(np.asarray(below))
        assert total is not None
        g = np.concatenate(slopes)
        means = jax.tree.map(lambda s: np.asarray(s[0]) / tokens.size, total)
        keep(layer, {kind: means[kind] for kind in ("sigma", "G")})
        if progress is not None:
            progress(arch.num_layers - layer, arch.num_layers)
    rows = g.reshape(-1, g.shape[-1])
    energy = np.bincount(tokens.ravel(), np.sum(rows**2, axis=1, dtype=np.float64), arch.vocab_size)
    G = np.matmul(rows.T, rows, dtype=np.float64) / tokens.size
    return EmbeddingMoments(energy / max(energy.sum(), np.finfo(np.float64).tiny), G, fisher, S)


@partial(jax.jit, static_argnames="arch")
def _forward(p: Mapping[str, Array], x: Array, rope: Any, arch: Architecture) -> Array:
    return block(p, x, rope, arch)


@partial(jax.jit, static_argnames="arch")
def _head_gradient(
    ends: Mapping[str, Array], x: Array, key: Array, arch: Architecture
) -> tuple[Array, tuple[Array, Array]]:
    """Gradient of `sampled_log_likelihood` at the last stream, and its sums."""
    return jax.grad(lambda x: sampled_log_likelihood(ends, x, key, arch), has_aux=True)(x)


@partial(jax.jit, static_argnames="arch")
def _backward(
    p: Mapping[str, Array], x: Array, g: Array, rope: Any, arch: Architecture
) -> tuple[dict[str, Any], Array]:
    """Sums of the probes of one block, with a leading axis of one, and the gradient before it."""
    stacked = zero_probes({k: v[None] for k, v in p.items()})

    def through(probes: dict[str, Any], x: Array) -> Array:
        own = jax.tree.map(lambda held: held[0], probes)
        return block({**p, "probes": own}, x, rope, arch, probed_linear)

    _, pull = jax.vjp(through, stacked, x)
    return pull(g)


def _batches(x: Float[np.ndarray, "n T d"]) -> Iterator[Float[np.ndarray, "batch T d"]]:
    for start in range(0, len(x), BATCH):
        yield x[start : start + BATCH]
