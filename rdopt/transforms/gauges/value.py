"""Maps of the value heads: a head's values become A v, and o_proj undoes A for every query head of the group."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from rdopt.checkpoint.families import Architecture
from rdopt.operator.params import Params
from rdopt.transforms.arrays import AnyArray, namespace
from rdopt.transforms.gauges.site import NormGain, RotatedSite
from rdopt.transforms.maps import Map, block_diagonal
from rdopt.transforms.matrices.frequency import dct, fourier
from rdopt.transforms.matrices.hadamard import hadamard
from rdopt.transforms.matrices.joint import joint_axes
from rdopt.transforms.matrices.pca import pca
from rdopt.transforms.matrices.random import random_orthogonal


class Value(RotatedSite):
    """A (layers, kv_heads, h, h), invertible; learned as a rotation of its start."""

    name = field = "value"
    outputs_changed, inputs_changed = frozenset({"v"}), frozenset({"o"})

    def start(
        self, basis: str, params: Params, arch: Architecture, sigma: Mapping[str, Any], seed: int
    ) -> Float[np.ndarray, "layers kv h h"] | None:
        """One basis for all heads, or what diagonalises moments of each head's weights or activations."""
        h, heads = arch.head_dim, (arch.num_layers, arch.num_kv_heads)
        if basis == "random":
            return random_orthogonal(seed + 1, h, heads)
        if basis == "pca":
            return np.swapaxes(pca(value_gram(params, arch)), -1, -2)
        if basis == "pca-act":
            return np.swapaxes(pca(_head_moments(sigma["o"], arch)), -1, -2)
        if basis == "joint":
            axes = [[joint_axes([W] for W in rows) for rows in heads] for heads in _head_rows(params, arch)]
            return np.swapaxes(np.array(axes), -1, -2)
        alike = {"hadamard": lambda: hadamard(h), "dct": lambda: dct(h).T, "fourier": lambda: fourier(h).T}.get(basis)
        return None if alike is None else np.broadcast_to(alike(), (*heads, h, h)).copy()

    def shape(self, arch: Architecture) -> tuple[int, ...]:
        """(layers, kv_heads, h, h)."""
        return arch.num_layers, arch.num_kv_heads, arch.head_dim, arch.head_dim

    def outputs(self, name: str, gauge: Float[AnyArray, "kv h h"], arch: Architecture) -> Map:
        """A v, head by head."""
        return _on_heads(gauge, 1)

    def inputs(self, group: str, gauge: Float[AnyArray, "kv h h"], gain: NormGain, arch: Architecture) -> Map:
        """What attention makes of the values, for each query head of a group."""
        return _on_heads(gauge, arch.num_heads // arch.num_kv_heads)


def _on_heads(A: Float[AnyArray, "kv h h"], repeats: int) -> Map:
    xp = namespace(A)
    A = xp.repeat(A, repeats, axis=0)
    return Map(dense=(block_diagonal(A), block_diagonal(_inverses(A))))


def _inverses(A: Float[AnyArray, "k h h"]) -> Float[AnyArray, "k h h"]:
    if isinstance(A, np.ndarray):
        return np.linalg.inv(A)
    from rdopt.transforms.matrices.gradients import inverse

    return inverse(A)


def _head_rows(params: Params, arch: Architecture) -> Iterator[list[list[Float[np.ndarray, "_ h"]]]]:
    """By layer and KV head the matrices that touch its values with these as columns, gains folded, float64."""
    kv, h, group = arch.num_kv_heads, arch.head_dim, arch.num_heads // arch.num_kv_heads
    for layer in range(arch.num_layers):
        v, o = (np.asarray(params["blocks"][k][layer], np.float64) for k in ("v", "o"))
        values = (v * params["blocks"]["attn_norm"][layer]).reshape(kv, h, -1)
        readers = o.reshape(-1, kv, group, h).transpose(1, 2, 0, 3)
        yield [[values[k].T, *readers[k]] for k in range(kv)]


def value_gram(params: Params, arch: Architecture) -> Float[np.ndarray, "layers kv h h"]:
    """Per value head: W_v W_v^T plus W_o^T W_o of its query group, each divided by its trace."""
    kv, h, group = arch.num_kv_heads, arch.head_dim, arch.num_heads // arch.num_kv_heads
    out = np.zeros((arch.num_layers, kv, h, h))
    for layer in range(arch.num_layers):
        v = np.asarray(params["blocks"]["v"][layer], np.float64) * params["blocks"]["attn_norm"][layer]
        o = np.asarray(params["blocks"]["o"][layer], np.float64).reshape(-1, kv, group, h)
        rows = v.reshape(kv, h, -1)
        produced = np.einsum("khd,kgd->khg", rows, rows)
        consumed = np.einsum("dkgi,dkgj->kij", o, o)
        traces = [np.trace(x, axis1=1, axis2=2)[:, None, None] for x in (produced, consumed)]
        out[layer] = produced / traces[0] + consumed / traces[1]
    return out


def _head_moments(sigma: Any, arch: Architecture) -> Float[np.ndarray, "layers kv h h"]:
    """The diagonal blocks of o_proj's input moment, summed over the query heads of a group; one layer at a time."""
    kv, h, group = arch.num_kv_heads, arch.head_dim, arch.num_heads // arch.num_kv_heads
    return np.stack([np.einsum("kgikgj->kij", S.reshape(kv, group, h, kv, group, h)) for S in sigma])
