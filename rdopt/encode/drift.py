"""Targets that undo what the matrices quantized so far have changed.

Block by block the original and the quantized model run on calibration tokens. A matrix whose input became x^
instead of x aims at W x rather than W x^, and a residual producer (o_proj, down_proj) also at the error r = h - h^
that the residual stream carries past it (WaterSIC 2026; Qronos):

    W* = argmin E |W x + r - W* x^|^2 = W + (W (C - S^) + E[r x^^T]) (S^ + damping I)^-1,   C = E[x x^^T].
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rdopt.checkpoint.families import MATRICES_OF, Architecture
from rdopt.checkpoint.spill import Spill
from rdopt.operator.llama import STAGES, rope_tables, run_stage
from rdopt.transforms.aligned import Aligned

PRODUCERS = ("o", "down")  # the matrices behind which the residual stream adds up, and their input groups
_BATCH = 8
_SHARE = 4  # of the budget may be taken by activations


class Sums(NamedTuple):
    """Means over tokens at the input of a group, float64.

    Attributes:
        S: E[x^ x^^T].
        C: E[x x^^T].
        R: E[r x^^T], r the error that the residual stream carries past the group; of the producers' inputs only.
    """

    S: Float[np.ndarray, "in in"]
    C: Float[np.ndarray, "in in"]
    R: Float[np.ndarray, "d in"] | None


class Prefix:
    """The activations of calibration tokens in the original model and in the part quantized so far.

    Both models go forward together, from the input of one group of matrices to that of the next.

    Args:
        aligned: the model in the coordinates in which it runs.
        tokens: calibration sequences.
        damping: of S^, as a share of its mean diagonal.
    """

    def __init__(self, aligned: Aligned, tokens: Int[np.ndarray, "n length"], damping: float):
        self._aligned, self._damping = aligned, damping
        starts = range(0, len(tokens), _BATCH)
        # (original or quantized model, batch) -> its residual stream and the input of the group, one above the other.
        self._states = Spill(aligned.subject.cache.budget // _SHARE)
        self._batches, self._tokens = len(starts), tokens.size
        embed = np.asarray(aligned.ends["embed"])
        for batch, start in enumerate(starts):
            x = embed[tokens[start : start + _BATCH]]
            for model in range(2):
                self._keep(model, batch, x, x)
        self._layer, self._behind = 0, 0  # the first `_behind` groups of block `_layer` have had their inputs

    @property
    def layer(self) -> int:
        """The block before which, or in which, it stands."""
        return self._layer

    def state(self) -> dict[str, np.ndarray]:
        """What to go on from before a block: the residual streams of both models."""
        places = ((model, batch) for model in range(2) for batch in range(self._batches))
        held = {f"{model}.{batch}": self._read(model, batch)[0] for model, batch in places}
        return {**held, "layer": np.array([self._layer])}

    def go_on(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes up a state."""
        for model in range(2):
            for batch in range(self._batches):
                x = state[f"{model}.{batch}"]
                self._keep(model, batch, x, x)
        self._layer, self._behind = int(state["layer"].item()), 0

    def sums(self, layer: int, group: str, done: Mapping[str, Float[np.ndarray, "_ _"]]) -> Sums:
        """Goes on to the input of a group and measures there.

        Args:
            layer: the block; all before it were passed to `advance`.
            group: attn, o, mlp or down, none before the last one asked for.
            done: decoded matrices of this block so far.

        Raises:
            ValueError: the input of a later group was already computed.
        """
        wanted = STAGES.index(group) + 1
        if layer != self._layer or wanted < self._behind:
            raise ValueError(f"block {layer}, {group}, lies behind; the prefix only goes forward")
        for stage in STAGES[self._behind : wanted]:
            self._go(stage, done)
        self._behind = wanted
        total: list[np.ndarray] | None = None
        for batch in range(self._batches):
            (x, a), (x_hat, a_hat) = (self._read(model, batch) for model in range(2))
            pairs = [(a_hat, a_hat), (a, a_hat), *([(x - x_hat, a_hat)] if group in PRODUCERS else [])]
            products = [np.asarray(_product(u, v), np.float64) for u, v in pairs]
            total = products if total is None else [t + f for t, f in zip(total, products, strict=True)]
        assert total is not None
        S, C, *R = (t / self._tokens for t in total)
        return Sums(S, C, R[0] if R else None)

    def targets(
        self, layer: int, group: str, done: Mapping[str, Float[np.ndarray, "_ _"]]
    ) -> dict[str, Float[np.ndarray, "_ _"]]:
        """W* of every matrix of an input group, float64; see `sums`."""
        return self.targets_of(self.sums(layer, group, done), layer, group)

    def targets_of(self, sums: Sums, layer: int, group: str) -> dict[str, Float[np.ndarray, "_ _"]]:
        """W* of every matrix of an input group from its sums, float64."""
        S, C, R = sums
        inverse = np.linalg.inv(S + self._damping * np.trace(S) / len(S) * np.eye(len(S)))
        corrected = {}
        for name in MATRICES_OF[group]:
            W = np.asarray(self._aligned.layer(layer)[name], np.float64)
            moved = W @ (C - S)
            corrected[name] = W + (moved if R is None else moved + R) @ inverse
        return corrected

    def advance(self, layer: int, done: Mapping[str, Float[np.ndarray, "_ _"]]) -> None:
        """Goes past a block whose matrices are all decoded."""
        for stage in STAGES[self._behind :]:
            self._go(stage, done)
        self._layer, self._behind = layer + 1, 0

    def _go(self, stage: str, done: Mapping[str, Float[np.ndarray, "_ _"]]) -> None:
        p = {k: jnp.asarray(v) for k, v in self._aligned.layer(self._layer).items()}
        p_hat = {**p, **{k: jnp.asarray(v, jnp.float32) for k, v in done.items()}}
        for model, weights in enumerate((p, p_hat)):
            for batch in range(self._batches):
                self._keep(model, batch, *_stage(weights, *self._read(model, batch), self._aligned.arch, stage))

    def _keep(self, model: int, batch: int, stream: Array | np.ndarray, inputs: Array | np.ndarray) -> None:
        self._states.keep((model, batch), np.concatenate([np.asarray(stream), np.asarray(inputs)], axis=-1))

    def _read(self, model: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
        both, width = self._states.read((model, batch)), self._aligned.arch.hidden_size
        return both[..., :width], both[..., width:]


@partial(jax.jit, static_argnames=("arch", "stage"))
def _stage(p: dict, stream: Array, inputs: Array, arch: Architecture, stage: str) -> tuple[Array, Array]:
    return run_stage(stage, p, stream, inputs, rope_tables(arch, stream.shape[1]), arch)


@jax.jit
def _product(u: Array, v: Array) -> Array:
    """Sum over tokens of u v^T."""
    rows = (t.reshape(-1, t.shape[-1]) for t in (u, v))
    return jnp.einsum("ti,tj->ij", *rows, precision=jax.lax.Precision.HIGHEST)
