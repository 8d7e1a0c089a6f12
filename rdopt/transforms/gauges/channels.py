"""The order of the hidden channels of the MLP, the same for gate, up and down."""

from jaxtyping import Int

from rdopt.checkpoint.families import Architecture
from rdopt.transforms.arrays import AnyArray
from rdopt.transforms.gauges.site import Site
from rdopt.transforms.maps import Map


class Channels(Site):
    """The old channel in every new place, (layers, ffn)."""

    name = field = "channels"
    kind = "order"
    outputs_changed, inputs_changed = frozenset({"gate", "up"}), frozenset({"down"})

    def outputs(self, name: str, gauge: Int[AnyArray, " ffn"], arch: Architecture) -> Map:
        """The channels in the new order."""
        return Map(order=gauge)
