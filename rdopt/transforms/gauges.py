"""Gauges: the exact symmetries of a Llama-family network, folded into its weights and moments.

A gauge changes every matrix as W -> A W B with A and B fixed by its site; the network's function stays. Two sites:
the residual rotation R (QuaRot 2404.00456, SliceGPT 2401.15024: norm gains are folded into the consumers first)
and a rotation V of every value head, undone in o_proj. Folding runs in float64.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from rdopt.calibration.moments import INPUT_OF, EmbeddingMoments, Moments
from rdopt.checkpoint import MATRICES, Architecture
from rdopt.operator import Params

Left = Float[np.ndarray, "out out"]
Right = Float[np.ndarray, "in in"]


class Gauges(NamedTuple):
    """One choice of coordinates, float64.

    Attributes:
        residual: R, whose columns are the new axes of the residual stream; None leaves the stream and the
            norm gains as they are.
        value: V per layer and KV head; a head's values become V v. None leaves them.
    """

    residual: Float[np.ndarray, "d d"] | None = None
    value: Float[np.ndarray, "layers kv_heads h h"] | None = None


def left_right(
    name: str, layer: int, params: Params, arch: Architecture, gauges: Gauges
) -> tuple[Left | None, Right | None, Float[np.ndarray, " in"] | None]:
    """How one matrix changes: W -> A (W diag(gain)) B.

    Returns:
        (A, B, gain); None stands for the identity.
    """
    A = B = gain = None
    R, V = gauges.residual, gauges.value
    if R is not None and INPUT_OF[name] in ("attn", "mlp"):
        gain = np.asarray(params["blocks"][INPUT_OF[name] + "_norm"][layer], np.float64)
        B = R
    if R is not None and name in ("o", "down"):
        A = R.T
    if V is not None and name == "v":
        A = _block_diagonal(V[layer])
    if V is not None and name == "o":
        group = arch.num_heads // arch.num_kv_heads
        B = _block_diagonal(np.repeat(V[layer], group, axis=0)).T
    return A, B, gain


def _block_diagonal(blocks: Float[np.ndarray, "k h h"]) -> Float[np.ndarray, "n n"]:
    k, h, _ = blocks.shape
    out = np.zeros((k, h, k, h))
    out[np.arange(k), :, np.arange(k), :] = blocks
    return out.reshape(k * h, k * h)


def fold(params: Params, arch: Architecture, gauges: Gauges) -> tuple[Params, Architecture]:
    """The same network in other coordinates.

    Args:
        params: the original weights.
        arch: its architecture; a tied head is untied when the residual stream is rotated, since the final
            gain is folded into the head alone.
        gauges: the coordinates.

    Returns:
        (params, arch), computed in float64 and stored as float32.
    """
    blocks = {k: np.asarray(v) for k, v in params["blocks"].items()}
    for name in MATRICES:
        folded = [_fold_matrix(name, i, params, arch, gauges) for i in range(arch.num_layers)]
        blocks[name] = np.stack([W for W, _ in folded])
        if name + "_bias" in blocks:
            blocks[name + "_bias"] = np.stack([b for _, b in folded])
    out: Params = {**params, "blocks": blocks}
    if gauges.residual is None:
        return out, arch
    R = gauges.residual
    blocks["attn_norm"], blocks["mlp_norm"] = (np.ones_like(blocks[k]) for k in ("attn_norm", "mlp_norm"))
    head = np.asarray(params.get("head", params["embed"]), np.float64)
    out["embed"] = _f32(np.asarray(params["embed"], np.float64) @ R)
    out["head"] = _f32((head * np.asarray(params["final_norm"], np.float64)) @ R)
    out["final_norm"] = np.ones_like(params["final_norm"])
    return out, replace(arch, tied=False)


def _fold_matrix(name: str, layer: int, params: Params, arch: Architecture, gauges: Gauges) -> Any:
    A, B, gain = left_right(name, layer, params, arch, gauges)
    W = np.asarray(params["blocks"][name][layer], np.float64)
    W = W if gain is None else W * gain
    W = W if B is None else W @ B
    bias = params["blocks"].get(name + "_bias")
    b = None if bias is None else np.asarray(bias[layer], np.float64)
    if A is not None:
        W, b = A @ W, None if b is None else A @ b
    return _f32(W), None if b is None else _f32(b)


def _f32(x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    return np.asarray(x, np.float32)


def unfold(
    aligned: Params, arch: Architecture, gauges: Gauges, gains: dict[str, Float[np.ndarray, "..."]]
) -> Params:
    """The original weights from the aligned ones, the gauges and the norm gains (inverse of `fold`).

    Args:
        aligned: what `fold` returned.
        arch: the original architecture (its `tied` decides whether a head is returned).
        gauges: the coordinates.
        gains: "attn_norm", "mlp_norm", "final_norm" of the original; not needed without a residual rotation.

    Returns:
        float32 params, equal to the original up to float32 rounding.
    """
    inverse = Gauges(
        None if gauges.residual is None else gauges.residual.T,
        None if gauges.value is None else np.swapaxes(gauges.value, -1, -2),
    )
    ones = {k: np.ones_like(aligned["blocks"][k]) for k in ("attn_norm", "mlp_norm")}
    plain = {**aligned, "blocks": {**aligned["blocks"], **ones}}
    out, _ = fold(plain, arch, inverse)
    if gauges.residual is None:
        out["blocks"] = {**out["blocks"], **{k: aligned["blocks"][k] for k in ones}}
        return out
    blocks = dict(out["blocks"])
    for name in MATRICES:
        site = INPUT_OF[name] + "_norm"
        if site in ones:
            blocks[name] = _f32(blocks[name] / np.asarray(gains[site], np.float64)[:, None, :])
    for site in ones:
        blocks[site] = _f32(gains[site])
    out["blocks"], out["final_norm"] = blocks, _f32(gains["final_norm"])
    head = out.pop("head")
    if not arch.tied:
        out["head"] = _f32(head / np.asarray(gains["final_norm"], np.float64))
    return out


def fold_moments(moments: Moments, params: Params, arch: Architecture, gauges: Gauges) -> Moments:
    """The moments of the folded model: x' = B^-1 diag(1/gain) x and g' = A^-T g, without another pass over text.

    Args:
        moments: of the original.
        params: the original weights (their gains are needed).
        arch: its architecture.
        gauges: the coordinates, orthogonal.
    """
    sigma, G = dict(moments.sigma), dict(moments.G)
    for name in MATRICES:
        parts = [left_right(name, i, params, arch, gauges) for i in range(arch.num_layers)]
        group = INPUT_OF[name]
        if parts[0][1] is not None:
            sigma[group] = np.stack([_input_moment(moments.sigma[group][i], *p[1:]) for i, p in enumerate(parts)])
        if parts[0][0] is not None:
            # A is orthogonal: A^-T = A.
            G[name] = np.stack([p[0] @ moments.G[name][i] @ p[0].T for i, p in enumerate(parts)])  # type: ignore
    return Moments(sigma, G, moments.tokens, _fold_embedding(moments.embed, params, gauges.residual))


def _fold_embedding(
    embed: EmbeddingMoments | None, params: Params, R: Float[np.ndarray, "d d"] | None
) -> EmbeddingMoments | None:
    """The embedding's rows become e R, the head's e diag(gain) R; neither changes tokens or predictions."""
    if embed is None or R is None:
        return embed
    gain = np.asarray(params["final_norm"], np.float64)
    return embed._replace(G=R.T @ embed.G @ R, S=_input_moment(embed.S, R, gain))


def _input_moment(sigma: Right, B: Right | None, gain: Float[np.ndarray, " in"] | None) -> Right:
    assert B is not None
    scaled = sigma if gain is None else sigma / np.outer(gain, gain)
    return B.T @ scaled @ B
