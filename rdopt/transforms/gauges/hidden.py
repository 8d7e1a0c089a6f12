"""Scales of the hidden channels of the MLP: up's rows times s, down's columns over s. The gate cannot be scaled."""

from collections.abc import Mapping

from jaxtyping import Float

from rdopt.checkpoint.families import Architecture
from rdopt.config.schema import RotationKind
from rdopt.transforms.arrays import AnyArray, namespace
from rdopt.transforms.gauges.site import Parameters, Site
from rdopt.transforms.maps import Map


class Hidden(Site):
    """Nonzero scales (layers, ffn) of the channels in their new places; learned as exp(t)."""

    name = field = "hidden"
    outputs_changed, inputs_changed = frozenset({"up"}), frozenset({"down"})

    def parameters(self, arch: Architecture, rotation: RotationKind) -> Mapping[str, tuple[int, ...]]:
        """Logarithms of the scales."""
        return {"log_scale": (arch.num_layers, arch.ffn_size)}

    def factor(self, theta: Parameters, arch: Architecture) -> Float[AnyArray, "layers ffn"]:
        """exp(t)."""
        return namespace(theta["log_scale"]).exp(theta["log_scale"])

    def outputs(self, name: str, gauge: Float[AnyArray, " ffn"], arch: Architecture) -> Map:
        """Times the scale, behind the activation function too."""
        return Map(scale=gauge)
