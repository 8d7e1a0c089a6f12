"""The symmetries of one Llama-family block and what they make of its matrices, in numpy or JAX."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Complex, Float, Int

from rdopt.checkpoint.families import Architecture
from rdopt.transforms.arrays import AnyArray, namespace
from rdopt.transforms.maps import Map, Sides, block_diagonal
from rdopt.transforms.matrices.inverse import inverse


class BlockGauges(NamedTuple):
    """The coordinates of one block; None leaves a site as it is. See `Gauges` for what they mean.

    Attributes:
        residual: R.
        value: A of every KV head.
        attn: scales of the normalised stream that attention reads.
        mlp: of that which the MLP reads.
        query: c of every KV head and rotary pair.
        hidden: scale of every hidden channel.
        channels: the old hidden channel in every new place.
        heads: the old query head in every new place.
    """

    residual: Float[AnyArray, "d d"] | None = None
    value: Float[AnyArray, "kv h h"] | None = None
    attn: Float[AnyArray, " d"] | None = None
    mlp: Float[AnyArray, " d"] | None = None
    query: Complex[AnyArray, "kv pairs"] | None = None
    hidden: Float[AnyArray, " ffn"] | None = None
    channels: Int[AnyArray, " ffn"] | None = None
    heads: Int[AnyArray, " heads"] | None = None


Gains = tuple[Float[AnyArray, " d"] | None, Float[AnyArray, " d"] | None]


def sides_of(name: str, gains: Gains, arch: Architecture, gauges: BlockGauges) -> Sides:
    """What becomes of one matrix.

    Args:
        name: of the matrix.
        gains: of the norms before attention and before the MLP, to be folded behind the norm; None: no gain.
        arch: the architecture.
        gauges: the coordinates.

    Raises:
        ValueError: heads that leave their group, or under QK-norm more than signs and one scale per head.
    """
    group = arch.num_heads // arch.num_kv_heads
    if name in ("o", "down"):
        inputs = _values(arch, gauges, group) if name == "o" else Map(order=gauges.channels, scale=gauges.hidden)
        return Sides(stream_of(gauges.residual), inputs)
    outputs: dict[str, Callable[[], Map]] = {
        "q": lambda: _rotary(gauges.query, arch, gauges, group),
        "k": lambda: _rotary(_inverse_conjugate(gauges.query), arch, gauges, 1),
        "v": lambda: _values(arch, gauges, 1),
        "gate": lambda: Map(order=gauges.channels),
        "up": lambda: Map(order=gauges.channels, scale=gauges.hidden),
    }
    attention = name in ("q", "k", "v")
    gain, scale = (gains[0], gauges.attn) if attention else (gains[1], gauges.mlp)
    return Sides(outputs[name](), normalised_of(gain, gauges.residual, scale))


def stream_of(R: Float[AnyArray, "d d"] | None) -> Map:
    """The residual stream: R^T x."""
    return Map() if R is None else Map(dense=(R.T, R))


def normalised_of(
    gain: Float[AnyArray, " d"] | None, R: Float[AnyArray, "d d"] | None, scale: Float[AnyArray, " d"] | None
) -> Map:
    """The normalised stream: s R^T (x / gain); without R the gain stays where it is."""
    if R is None:
        return Map(scale=scale)
    return Map(before=None if gain is None else 1 / gain, dense=(R.T, R), scale=scale)


def _values(arch: Architecture, gauges: BlockGauges, repeats: int) -> Map:
    """Value heads, or what attention makes of them for each of a group's query heads."""
    dense = None
    if gauges.value is not None:
        xp = namespace(gauges.value)
        A = xp.repeat(gauges.value, repeats, axis=0)
        undone = np.linalg.inv(A) if xp is np else inverse(A)
        dense = block_diagonal(A), block_diagonal(undone)
    return Map(dense=dense, order=_head_order(arch, gauges.heads, repeats))


def _rotary(c: Any, arch: Architecture, gauges: BlockGauges, repeats: int) -> Map:
    """Queries (or keys, at one repeat) times c, (kv, pairs) complex or None, in every rotary pair (i, i + h/2)."""
    dense = None
    if c is not None:
        _require_symmetry(c, arch)
        c = namespace(c).repeat(c, repeats, axis=0)
        dense = block_diagonal(_turned_pairs(c)), block_diagonal(_turned_pairs(1 / c))
    return Map(dense=dense, order=_head_order(arch, gauges.heads, repeats))


def _inverse_conjugate(c: Any) -> Any:
    """1 / conj(c), by which keys change where queries change by c, so that every score stays."""
    return c if c is None else 1 / c.conj()


def _turned_pairs(c: Complex[AnyArray, "k pairs"]) -> Float[AnyArray, "k h h"]:
    """Multiplication by c of the pairs (i, i + h/2) as matrices."""
    xp = namespace(c)
    cos, sin = (part[:, :, None] * xp.eye(c.shape[1], dtype=part.dtype) for part in (xp.real(c), xp.imag(c)))
    return xp.concatenate([xp.concatenate([cos, -sin], axis=2), xp.concatenate([sin, cos], axis=2)], axis=1)


def _require_symmetry(c: Complex[AnyArray, "k pairs"], arch: Architecture) -> None:
    """Refuses what fixed numbers show to be none; training makes none under QK-norm."""
    if not arch.qk_norm or not isinstance(c, np.ndarray):
        return
    if np.any(np.imag(c)) or np.ptp(np.abs(c), axis=1).max() > 1e-12 * np.abs(c).max():
        raise ValueError("under QK-norm only signs and one scale per head are a symmetry of queries and keys")


def _head_order(arch: Architecture, heads: Int[AnyArray, " heads"] | None, repeats: int) -> Int[AnyArray, " n"] | None:
    """Where the entries of query heads (repeats: the group's size) or of KV heads (1) come from."""
    if heads is None:
        return None
    group = arch.num_heads // arch.num_kv_heads
    kept = heads.reshape(-1, group) // group
    if np.any(kept != kept[:, :1]):
        raise ValueError("query heads of one group have to stay together")
    order = heads if repeats == group else kept[:, 0]
    return (order[:, None] * arch.head_dim + np.arange(arch.head_dim)).ravel()
