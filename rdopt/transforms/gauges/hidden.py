"""Scales of the hidden channels of the MLP: up's rows times s, down's columns over s. The gate cannot be scaled."""

from collections.abc import Mapping

from jaxtyping import Float

from rdopt.checkpoint.families import Architecture
from rdopt.config.schema import RotationKind
from rdopt.transforms.arrays import AnyArray, namespace
from rdopt.transforms.gauges.site import NormGain, Parameters, Site
from rdopt.transforms.maps import Map


class Hidden(Site):
    """Nonzero scales (layers, ffn) of the channels in their new places; learned as exp(t)."""

    name = field = "hidden"
    outputs_changed = frozenset({"up"})

    def parameters(self, arch: Architecture, rotation: RotationKind) -> Mapping[str, tuple[int, ...]]:
        """Logarithms of the scales."""
        return {"log_scale": (arch.num_layers, arch.ffn_size)}

    def learned(
        self, theta: Parameters, start: Float[AnyArray, "layers ffn"] | None, arch: Architecture, rotation: RotationKind
    ) -> Float[AnyArray, "layers ffn"]:
        """exp(t), times the start."""
        scale = namespace(theta["log_scale"]).exp(theta["log_scale"])
        return scale if start is None else start * scale

    def outputs(self, name: str, gauge: Float[AnyArray, " ffn"], arch: Architecture) -> Map:
        """Times the scale."""
        return Map(scale=gauge)

    def inputs(self, group: str, gauge: Float[AnyArray, " ffn"], gain: NormGain, arch: Architecture) -> Map:
        """Times the scale, behind the activation function too."""
        return Map(scale=gauge) if group == "down" else Map()
