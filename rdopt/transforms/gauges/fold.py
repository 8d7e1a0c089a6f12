"""Folding gauges into weights and second moments, and back; the network's function stays. Float64 inside.

A folded network is a plain checkpoint of the same architecture (QuaRot 2404.00456).
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from rdopt.calibration.moments import EmbeddingMoments
from rdopt.checkpoint.families import INPUT_OF, MATRICES, Architecture
from rdopt.operator.params import Params
from rdopt.transforms.gauges.coordinates import Gauges, sides_of
from rdopt.transforms.gauges.registry import OWNERS
from rdopt.transforms.maps import Map, Sides, merged_map

NORMS = ("attn_norm", "mlp_norm")


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
    stream, last = _end_maps(params["final_norm"], gauges)
    head = np.asarray(params.get("head", params["embed"]), np.float64)
    return {
        "embed": _f32(stream.apply(np.asarray(params["embed"], np.float64).T).T),
        "head": _f32(Sides(Map(), last).fold(head)),
        "final_norm": _gain(params["final_norm"], gauges, -1),
    }


def _gain(gain: Float[np.ndarray, " d"], gauges: Gauges, at: int) -> Float[np.ndarray, " d"]:
    """What a norm's gain becomes."""
    gain = np.asarray(gain)
    for field, gauge in gauges.present().items():
        gain = OWNERS[field].gain(gain, gauge, at)
    return _f32(gain)


def _end_maps(final_gain: Float[np.ndarray, " d"], gauges: Gauges) -> tuple[Map, Map]:
    """What becomes of the embedding's rows and of the head's input."""
    gain, present = np.asarray(final_gain, np.float64), gauges.present().items()
    rows = merged_map(OWNERS[field].embedding(gauge) for field, gauge in present)
    return rows, merged_map(OWNERS[field].head(gauge, gain) for field, gauge in present)


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
    exact = [[np.asarray(x, np.float64) for x in gains[k]] for k in NORMS]
    held = {k: np.array(v) for k, v in aligned["blocks"].items()}
    for layer in range(arch.num_layers):
        for name in MATRICES:
            sides = sides_of(name, (exact[0][layer], exact[1][layer]), arch, gauges.block(layer, arch))
            held[name][layer] = sides.unfold(np.asarray(held[name][layer], np.float64))
            if name + "_bias" in held:
                bias = held[name + "_bias"]
                bias[layer] = sides.outputs.undo(np.asarray(bias[layer], np.float64))
    out: Params = {**aligned, "blocks": held}
    if not gauges.unties:
        return out
    held |= {k: _f32(gains[k]) for k in NORMS}
    stream, last = _end_maps(gains["final_norm"], gauges)
    out["embed"] = _f32(stream.undo(np.asarray(aligned["embed"], np.float64).T).T)
    out["final_norm"] = _f32(gains["final_norm"])
    head = Sides(Map(), last).unfold(np.asarray(out.pop("head"), np.float64))
    return out if arch.tied else {**out, "head": _f32(head)}


def fold_block_moments(
    sigma: Mapping[str, Float[np.ndarray, "in in"]],
    G: Mapping[str, Float[np.ndarray, "..."]],
    p: Mapping[str, Float[np.ndarray, "..."]],
    layer: int,
    arch: Architecture,
    gauges: Gauges,
) -> tuple[dict[str, Float[np.ndarray, "in in"]], dict[str, Float[np.ndarray, "..."]]]:
    """The moments of one block in other coordinates, float64: x' = U x and g' = T^-T g, without a pass over text.

    Args:
        sigma: input group -> second moment of the input.
        G: matrix -> that of the gradient at its output.
        p: the block's original parameters by short name, of which the norms' gains are needed.
        layer: which block it is.
        arch: of the network.
        gauges: of the network.

    Raises:
        ValueError: a dense gauge where only the diagonal of G is held.
    """
    gains = (np.asarray(p[NORMS[0]], np.float64), np.asarray(p[NORMS[1]], np.float64))
    inputs, outputs = {}, {}
    for name in MATRICES:
        sides = sides_of(name, gains, arch, gauges.block(layer, arch))
        dual = sides.outputs.dual()
        outputs[name] = dual.diagonal_moment(G[name]) if G[name].ndim == 1 else dual.moment(G[name])
        if INPUT_OF[name] not in inputs:
            inputs[INPUT_OF[name]] = sides.inputs.moment(sigma[INPUT_OF[name]])
    return inputs, outputs


def fold_end_moments(embed: EmbeddingMoments, params: Params, gauges: Gauges) -> EmbeddingMoments:
    """The embedding's rows change with the stream, the head's with its input; neither changes the predictions."""
    stream, last = _end_maps(params["final_norm"], gauges)
    return embed._replace(G=stream.dual().moment(embed.G), S=last.moment(embed.S))
