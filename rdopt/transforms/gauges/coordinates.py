"""The value `Gauges`: one choice of coordinates by the exact symmetries of a Llama-family network, numpy or JAX.

Each field belongs to a site (`registry.SITES`), whose class tells its shape and what it makes of the weights.
"""

from collections import namedtuple
from collections.abc import Mapping
from typing import Any

import numpy as np

from rdopt.checkpoint.families import INPUT_OF, Architecture
from rdopt.transforms.gauges.registry import OWNERS
from rdopt.transforms.gauges.site import NormGain
from rdopt.transforms.maps import Sides, merged_map
from rdopt.transforms.records import TransformRecord, rebuild

_FIELDS = tuple(OWNERS)
_NONE = (None,) * len(_FIELDS)


class BlockGauges(namedtuple("BlockGauges", _FIELDS, defaults=_NONE)):
    """The coordinates of one block: every gauge's part there; see `Gauges`."""

    def present(self) -> dict[str, Any]:
        """The parts that change something, by field."""
        return {field: part for field, part in self._asdict().items() if part is not None}

    def with_shared(self, gauges: "Gauges") -> "BlockGauges":
        """With what all blocks have alike."""
        return self._replace(**{field: getattr(gauges, field) for field, site in OWNERS.items() if site.shared})


class Gauges(namedtuple("Gauges", _FIELDS, defaults=_NONE)):
    """One choice of coordinates, float64 (float32 in training); None leaves a site as it is.

    The fields, in the order of SITES: residual (d, d), value (layers, kv_heads, h, h), norm (2 layers + 1, d), hidden
    (layers, ffn), query (layers, kv_heads, pairs) complex, channels (layers, ffn) and heads (layers, heads) integers.
    """

    def present(self) -> dict[str, Any]:
        """The gauges that change something, by field."""
        return {field: gauge for field, gauge in self._asdict().items() if gauge is not None}

    @property
    def unties(self) -> bool:
        """Whether embedding and head part."""
        return any(OWNERS[field].unties for field in self.present())

    def tied(self) -> "Gauges":
        """The coordinates without those that part embedding and head."""
        return self._replace(**{field: None for field in self.present() if OWNERS[field].unties})

    def block(self, layer: int, arch: Architecture) -> BlockGauges:
        """The coordinates of one block."""
        return BlockGauges(**{field: OWNERS[field].block(x, layer, arch) for field, x in self.present().items()})

    def stacked(self, arch: Architecture) -> BlockGauges:
        """The coordinates of all blocks with a leading layer axis, without what all blocks have alike."""
        own = {field: x for field, x in self.present().items() if not OWNERS[field].shared}
        return BlockGauges(**{field: OWNERS[field].stacked(x, arch) for field, x in own.items()})

    def drawn(self, layers: Any, arch: Architecture) -> "Gauges":
        """The coordinates of a network of these blocks alone."""
        return Gauges(**{field: OWNERS[field].drawn(x, layers, arch) for field, x in self.present().items()})


def gauges_of(records: Mapping[str, TransformRecord]) -> Gauges:
    """The float64 gauges that the records rebuild."""
    return Gauges(**{field: rebuild(record) for field, record in records.items()})


def fixed_records(gauges: Gauges) -> dict[str, TransformRecord]:
    """Float64 gauges as records of their very numbers."""
    return {field: OWNERS[field].fixed(gauge) for field, gauge in gauges.present().items()}


def sides_of(name: str, gains: tuple[NormGain, NormGain], arch: Architecture, gauges: BlockGauges) -> Sides:
    """What becomes of one matrix.

    Args:
        name: of the matrix.
        gains: of the norms before attention and before the MLP, to be folded behind the norm; None: no gain.
        arch: the architecture.
        gauges: the coordinates.

    Raises:
        ValueError: heads that leave their group, or under QK-norm more than signs and one scale per head.
    """
    group = INPUT_OF[name]
    gain = {"attn": gains[0], "mlp": gains[1]}.get(group)
    sites = [(OWNERS[field], part) for field, part in gauges.present().items()]
    return Sides(
        merged_map(site.outputs(name, part, arch) for site, part in sites if name in site.outputs_changed),
        merged_map(site.inputs(group, part, gain, arch) for site, part in sites if group in site.inputs_changed),
    )


def original_axes(arch: Architecture) -> Gauges:
    """The original axes, with the norms' gains folded into the matrices behind them."""
    return Gauges(residual=np.eye(arch.hidden_size))
