"""Targets that undo what the matrices quantized so far have changed.

Block by block the original and the quantized model run on calibration tokens. A matrix whose input became x^
instead of x aims at W x rather than W x^, and a residual producer (o_proj, down_proj) also at the error r = h - h^
that the residual stream carries past it (WaterSIC 2026; Qronos):

    W* = argmin E |W x + r - W* x^|^2 = W + (W (C - S^) + E[r x^^T]) (S^ + damping I)^-1,   C = E[x x^^T].
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rdopt.calibration import INPUT_OF
from rdopt.checkpoint import MATRICES, Architecture
from rdopt.operator import Params, block, embed_tokens, linear, rope_tables

PRODUCERS = {"o": "residual", "down": "middle"}
Sums = dict[str, Float[np.ndarray, "_ _"]]
_BATCH = 8


class Prefix:
    """The activations of calibration tokens in the original model and in the part quantized so far.

    Args:
        params: the model in the coordinates it is coded in, float32.
        arch: its architecture.
        tokens: calibration sequences.
        damping: of S^, as a share of its mean diagonal.
    """

    def __init__(self, params: Params, arch: Architecture, tokens: Int[np.ndarray, "n length"], damping: float):
        self._params, self._arch, self._damping = params, arch, damping
        starts = range(0, len(tokens), _BATCH)
        self._streams = [np.asarray(embed_tokens(params, tokens[i : i + _BATCH])) for i in starts]
        self._quantized = list(self._streams)
        self._tokens = tokens.size

    def targets(
        self, layer: int, group: str, done: Mapping[str, Float[np.ndarray, "_ _"]]
    ) -> dict[str, Float[np.ndarray, "_ _"]]:
        """W* of every matrix of an input group, float64.

        Args:
            layer: the block; all before it were passed to `advance`.
            group: attn, o, mlp or down.
            done: decoded matrices of this block so far.
        """
        total: Sums = {}
        for x, quantized in zip(self._streams, self._quantized, strict=True):
            sums = _sums(*self._blocks(layer, done), x, quantized, self._arch, group)
            total = {k: np.asarray(v, np.float64) + total.get(k, 0.0) for k, v in sums.items()}
        S, C = (total[k] / self._tokens for k in ("S", "C"))
        inverse = np.linalg.inv(S + self._damping * np.trace(S) / len(S) * np.eye(len(S)))
        found = {}
        for name in (k for k in MATRICES if INPUT_OF[k] == group):
            W = np.asarray(self._params["blocks"][name][layer], np.float64)
            moved = W @ (C - S) + (total["R"] / self._tokens if name in PRODUCERS else 0.0)
            found[name] = W + moved @ inverse
        return found

    def advance(self, layer: int, done: Mapping[str, Float[np.ndarray, "_ _"]]) -> None:
        """Goes past a block whose matrices are all decoded."""
        p, p_hat = self._blocks(layer, done)
        self._streams = [np.asarray(_block(p, x, self._arch)) for x in self._streams]
        self._quantized = [np.asarray(_block(p_hat, x, self._arch)) for x in self._quantized]

    def _blocks(self, layer: int, done: Mapping[str, Float[np.ndarray, "_ _"]]) -> tuple[dict, dict]:
        p = {k: jnp.asarray(v[layer]) for k, v in self._params["blocks"].items()}
        return p, {**p, **{k: jnp.asarray(v, jnp.float32) for k, v in done.items()}}


def prefix_order(layers: int) -> Iterator[tuple[int, str]]:
    """(layer, group) in the order of the computation."""
    for layer in range(layers):
        for group in ("attn", "o", "mlp", "down"):
            yield layer, group


def _inputs(p: dict, x: Array, arch: Architecture) -> tuple[dict[str, Array], Array]:
    """Inputs of every group of a block, and the residual stream between its halves."""
    found: dict[str, Array] = {}

    def recorded(name: str, p: Mapping[str, Any], y: Any) -> Array:
        found[INPUT_OF[name]] = y
        out = linear(name, p, y)
        if name == "o":
            found["middle"] = x + out
        return out

    block(p, x, rope_tables(arch, x.shape[1]), arch, recorded)
    return found, found["middle"]


@partial(jax.jit, static_argnames=("arch", "group"))
def _sums(p: dict, p_hat: dict, x: Array, x_hat: Array, arch: Architecture, group: str) -> dict[str, Array]:
    """Sums over tokens: S of x^ x^^T, C of x x^^T, R of r x^^T for a producer; the compiler drops the rest."""
    inputs, middle = _inputs(p, x, arch)
    inputs_hat, middle_hat = _inputs(p_hat, x_hat, arch)
    a, a_hat = _rows(inputs[group]), _rows(inputs_hat[group])
    out = {"S": _product(a_hat, a_hat), "C": _product(a, a_hat)}
    if group in PRODUCERS:
        error = x - x_hat if PRODUCERS[group] == "residual" else middle - middle_hat
        out["R"] = _product(_rows(error), a_hat)
    return out


@partial(jax.jit, static_argnames="arch")
def _block(p: dict, x: Array, arch: Architecture) -> Array:
    return block(p, x, rope_tables(arch, x.shape[1]), arch)


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a.T, b, precision=jax.lax.Precision.HIGHEST)
