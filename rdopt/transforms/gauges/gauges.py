"""Gauges: the exact symmetries of a Llama-family network, folded into its weights and moments.

The residual rotation R (QuaRot 2404.00456, SliceGPT 2401.15024: norm gains are folded into the consumers first), the
norms' gains, which are free behind it, an invertible map of every value head that o_proj undoes, a complex number for
every rotary pair of queries and keys, scale and order of the hidden channels, and the order of the heads. The network's
function stays; folding runs in float64.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Complex, Float, Int

from rdopt.calibration.moments import EmbeddingMoments, Moments
from rdopt.checkpoint.families import INPUT_OF, MATRICES, Architecture
from rdopt.operator.params import Params
from rdopt.transforms.arrays import AnyArray
from rdopt.transforms.gauges.block import BlockGauges, normalised_of, sides_of, stream_of
from rdopt.transforms.maps import Map, Sides

NORMS = ("attn_norm", "mlp_norm")


class Gauges(NamedTuple):
    """One choice of coordinates, float64 (float32 in training); None leaves a site as it is.

    Attributes:
        residual: R, whose columns are the new axes of the residual stream; norm gains are folded away.
        value: A per layer and KV head, invertible; a head's values become A v.
        norm: positive scales of the normalised streams, of every attention, every MLP and the final norm.
        query: c per layer, KV head and rotary pair: queries become c q, keys c / |c|^2 k. Under QK-norm only signs and
            one scale per head are a symmetry, the scale where the norm's eps is zero.
        hidden: nonzero scale of every hidden channel of the MLP, in its new place.
        channels: the old hidden channel in every new place.
        heads: the old query head in every new place; heads of one group stay together.
    """

    residual: Float[AnyArray, "d d"] | None = None
    value: Float[AnyArray, "layers kv_heads h h"] | None = None
    norm: Float[AnyArray, "sites d"] | None = None
    query: Complex[AnyArray, "layers kv_heads pairs"] | None = None
    hidden: Float[AnyArray, "layers ffn"] | None = None
    channels: Int[AnyArray, "layers ffn"] | None = None
    heads: Int[AnyArray, "layers heads"] | None = None

    @property
    def unties(self) -> bool:
        """Whether embedding and head part."""
        return self.residual is not None or self.norm is not None

    def block(self, layer: int, arch: Architecture) -> BlockGauges:
        """The coordinates of one block."""

        def at(field: Any, index: int = layer) -> Any:
            return None if field is None else field[index]

        return BlockGauges(
            residual=self.residual,
            value=at(self.value),
            attn=at(self.norm),
            mlp=at(self.norm, layer + arch.num_layers),
            query=at(self.query),
            hidden=at(self.hidden),
            channels=at(self.channels),
            heads=at(self.heads),
        )


def _sides(name: str, gains: Mapping[str, np.ndarray], arch: Architecture, gauges: Gauges) -> list[Sides]:
    """What becomes of a matrix in every block."""
    exact = [np.asarray(gains[k], np.float64) for k in NORMS]
    return [
        sides_of(name, (exact[0][i], exact[1][i]), arch, gauges.block(i, arch)) for i in range(arch.num_layers)
    ]


def fold(params: Params, arch: Architecture, gauges: Gauges) -> tuple[Params, Architecture]:
    """The same network in other coordinates.

    Args:
        params: the original weights.
        arch: its architecture; a tied head is untied when the stream or its norms change, since the final gain
            is folded into the head alone.
        gauges: the coordinates.

    Returns:
        (params, arch), computed in float64 and stored as float32.

    Raises:
        ValueError: gauges that are no symmetry of this network.
    """
    held = {k: np.asarray(v) for k, v in params["blocks"].items()}
    blocks = [fold_block({k: v[i] for k, v in held.items()}, i, arch, gauges) for i in range(arch.num_layers)]
    out: Params = {**params, "blocks": {k: np.stack([p[k] for p in blocks]) for k in held}}
    if not gauges.unties:
        return out, arch
    out.update(fold_ends(params, gauges))
    return out, replace(arch, tied=False)


def fold_block(
    p: Mapping[str, Float[np.ndarray, "..."]], layer: int, arch: Architecture, gauges: Gauges
) -> dict[str, Float[np.ndarray, "..."]]:
    """One block in other coordinates, float32; see `fold`.

    Args:
        p: its original parameters by short name.
        layer: which one it is.
        arch: of the network.
        gauges: of the network.
    """
    gains = (np.asarray(p[NORMS[0]], np.float64), np.asarray(p[NORMS[1]], np.float64))
    out = {k: np.asarray(v) for k, v in p.items()}
    for name in MATRICES:
        sides = sides_of(name, gains, arch, gauges.block(layer, arch))
        out[name] = _f32(sides.fold(np.asarray(p[name], np.float64)))
        if name + "_bias" in p:
            out[name + "_bias"] = _f32(sides.outputs.apply(np.asarray(p[name + "_bias"], np.float64)))
    for site, name in enumerate(NORMS):
        out[name] = _gain(p[name], gauges, layer + site * arch.num_layers)
    return out


def fold_ends(params: Params, gauges: Gauges) -> Params:
    """Embedding, final norm and head in other coordinates, float32, for gauges that untie them; see `fold`."""
    stream, last = _ends(params["final_norm"], gauges)
    head = np.asarray(params.get("head", params["embed"]), np.float64)
    return {
        "embed": _f32(stream.apply(np.asarray(params["embed"], np.float64).T).T),
        "head": _f32(Sides(Map(), last).fold(head)),
        "final_norm": _gain(params["final_norm"], gauges, -1),
    }


def _gain(gain: Float[np.ndarray, " d"], gauges: Gauges, site: int) -> Float[np.ndarray, " d"]:
    """What a norm's gain becomes: a rotated stream has it in the consumers, and any positive scale is free."""
    left = np.ones_like(gain) if gauges.residual is not None else np.asarray(gain)
    return _f32(left if gauges.norm is None else left * gauges.norm[site])


def _ends(final_gain: Float[np.ndarray, " d"], gauges: Gauges) -> tuple[Map, Map]:
    """The maps of the residual stream and of the head's input."""
    scale = None if gauges.norm is None else gauges.norm[-1]
    return stream_of(gauges.residual), normalised_of(np.asarray(final_gain, np.float64), gauges.residual, scale)


def _each(
    change: Callable[[Sides, np.ndarray], np.ndarray], sides: list[Sides], arrays: Float[np.ndarray, "layers ..."]
) -> Float[np.ndarray, "layers ..."]:
    return np.stack([_f32(change(s, np.asarray(x, np.float64))) for s, x in zip(sides, arrays, strict=True)])


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
        gains: "attn_norm", "mlp_norm", "final_norm" of the original; needed where the stream or its norms changed.

    Returns:
        float32 params, equal to the original up to float32 rounding.
    """
    gains = gains or {k: aligned["blocks"][k] for k in NORMS}
    held = {k: np.asarray(v) for k, v in aligned["blocks"].items()}
    for name in MATRICES:
        sides = _sides(name, gains, arch, gauges)
        held[name] = _each(lambda s, W: s.unfold(W), sides, held[name])
        if name + "_bias" in held:
            held[name + "_bias"] = _each(lambda s, b: s.outputs.undo(b), sides, held[name + "_bias"])
    out: Params = {**aligned, "blocks": held}
    if not gauges.unties:
        return out
    held |= {k: _f32(gains[k]) for k in NORMS}
    stream, last = _ends(gains["final_norm"], gauges)
    out["embed"] = _f32(stream.undo(np.asarray(aligned["embed"], np.float64).T).T)
    out["final_norm"] = _f32(gains["final_norm"])
    head = Sides(Map(), last).unfold(np.asarray(out.pop("head"), np.float64))
    return out if arch.tied else {**out, "head": _f32(head)}


def fold_moments(moments: Moments, params: Params, arch: Architecture, gauges: Gauges) -> Moments:
    """The moments of the folded model: x' = U x and g' = T^-T g, without another pass over text.

    Args:
        moments: of the original.
        params: the original weights (their gains are needed).
        arch: its architecture.
        gauges: the coordinates.

    Raises:
        ValueError: a dense gauge where only the diagonal of G is held.
    """
    held = params["blocks"]
    parts = []
    for layer in range(arch.num_layers):
        sigma, G = ({k: x[layer] for k, x in part.items()} for part in (moments.sigma, moments.G))
        parts.append(fold_block_moments(sigma, G, {k: held[k][layer] for k in NORMS}, layer, arch, gauges))
    sigma, G = ({k: np.stack([part[i][k] for part in parts]) for k in parts[0][i]} for i in range(2))
    embed = None if moments.embed is None else fold_end_moments(moments.embed, params, gauges)
    return Moments(sigma, G, moments.tokens, embed)


def fold_block_moments(
    sigma: Mapping[str, Float[np.ndarray, "in in"]],
    G: Mapping[str, Float[np.ndarray, "..."]],
    p: Mapping[str, Float[np.ndarray, "..."]],
    layer: int,
    arch: Architecture,
    gauges: Gauges,
) -> tuple[dict[str, Float[np.ndarray, "in in"]], dict[str, Float[np.ndarray, "..."]]]:
    """The moments of one block in other coordinates, float64; see `fold_moments`.

    Args:
        sigma: input group -> second moment of the input.
        G: matrix -> that of the gradient at its output.
        p: the block's original parameters by short name, of which the norms' gains are needed.
        layer: which block it is.
        arch: of the network.
        gauges: of the network.
    """
    gains = (np.asarray(p[NORMS[0]], np.float64), np.asarray(p[NORMS[1]], np.float64))
    inputs, outputs = {}, {}
    for name in MATRICES:
        sides = sides_of(name, gains, arch, gauges.block(layer, arch))
        outputs[name] = _gradient_moment(sides.outputs.dual(), G[name])
        if INPUT_OF[name] not in inputs:
            inputs[INPUT_OF[name]] = sides.inputs.moment(sigma[INPUT_OF[name]])
    return inputs, outputs


def _gradient_moment(dual: Map, G: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    return dual.diagonal_moment(G) if G.ndim == 1 else dual.moment(G)


def fold_end_moments(embed: EmbeddingMoments, params: Params, gauges: Gauges) -> EmbeddingMoments:
    """The embedding's rows change with the stream, the head's with its input; neither changes the predictions."""
    stream, last = _ends(params["final_norm"], gauges)
    return embed._replace(G=stream.dual().moment(embed.G), S=last.moment(embed.S))
