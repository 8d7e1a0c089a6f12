"""Scales of the normalised streams: a norm's gain times any positive scale, which the consumers' columns undo."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from rdopt.checkpoint.families import Architecture
from rdopt.config.schema import RotationKind
from rdopt.transforms.arrays import AnyArray, namespace
from rdopt.transforms.gauges.site import NormGain, Parameters, Site
from rdopt.transforms.maps import Map
from rdopt.transforms.records import TransformRecord, rebuild

Scales = Mapping[str, Float[AnyArray, "..."]]  # of a block's norms, by the input group behind each


class Norm(Site):
    """Positive scales (2 layers + 1, d): of the norms before every attention, before every MLP, and of the final one.

    The final one stays as it is in training: its input is no coded matrix's.
    """

    name = field = "norm"
    inputs_changed = frozenset({"attn", "mlp"})
    unties = True

    def parameters(self, arch: Architecture, rotation: RotationKind) -> Mapping[str, tuple[int, ...]]:
        """Logarithms of the blocks' scales."""
        return {"log_scale": (arch.num_layers, 2, arch.hidden_size)}

    def factor(self, theta: Parameters, arch: Architecture) -> Float[AnyArray, "sites d"]:
        """exp(t) in bfloat16, as a file keeps the norms, so that the gauge stays exact there; gradients pass through.

        JAX alone knows the type: what comes out is an array of it.
        """
        import jax
        import jax.numpy as jnp

        scale = jnp.exp(theta["log_scale"])
        rounded = scale + jax.lax.stop_gradient(scale.astype(jnp.bfloat16).astype(scale.dtype) - scale)
        return jnp.concatenate([rounded[:, 0], rounded[:, 1], jnp.ones((1, arch.hidden_size), scale.dtype)])

    def record(
        self, theta: Parameters, start: TransformRecord | None, arch: Architecture, rotation: RotationKind
    ) -> TransformRecord:
        """The very scales, since their rounding is part of them."""
        scales = np.asarray(self.factor(theta, arch), np.float64)
        return self.fixed(scales if start is None else rebuild(start) * scales)

    def block(self, gauge: Float[AnyArray, "sites d"], layer: int, arch: Architecture) -> Scales:
        """Those of its two norms."""
        return {"attn": gauge[layer], "mlp": gauge[layer + arch.num_layers]}

    def stacked(self, gauge: Float[AnyArray, "sites d"], arch: Architecture) -> Scales:
        """Those of all blocks, (layers, d) each."""
        return {"attn": gauge[: arch.num_layers], "mlp": gauge[arch.num_layers : 2 * arch.num_layers]}

    def drawn(self, gauge: Float[AnyArray, "sites d"], layers: Any, arch: Architecture) -> Float[AnyArray, "some d"]:
        """Those before attention, those before the MLP, and the final one."""
        xp, parts = namespace(gauge), self.stacked(gauge, arch)
        return xp.concatenate([parts["attn"][layers], parts["mlp"][layers], gauge[-1:]])

    def inputs(self, group: str, gauge: Scales, gain: NormGain, arch: Architecture) -> Map:
        """The normalised stream times the scale."""
        return Map(scale=gauge[group])

    def gain(
        self, gain: Float[np.ndarray, " d"], gauge: Float[np.ndarray, "sites d"], at: int
    ) -> Float[np.ndarray, " d"]:
        """Times the scale."""
        return gain * gauge[at]

    def head(self, gauge: Float[AnyArray, "sites d"], gain: Float[AnyArray, " d"]) -> Map:
        """The normalised stream times the final norm's scale."""
        return Map(scale=gauge[-1])
