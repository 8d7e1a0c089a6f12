"""Stretches of the value heads: the other factor of an invertible A = exp(K) Q, K symmetric and bounded."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from rdopt.checkpoint.families import Architecture
from rdopt.config.schema import RotationKind
from rdopt.transforms.arrays import AnyArray, matmul
from rdopt.transforms.gauges.site import Parameters, Site
from rdopt.transforms.matrices.stretch import stretch, stretch_size
from rdopt.transforms.records import TransformRecord, composition


class StretchedValue(Site):
    """A second factor of the value heads' maps, from the left: A becomes exp(K) A."""

    name = "stretch"
    field = "value"
    kind = "matrix"
    outputs_changed = frozenset({"v"})

    def parameters(self, arch: Architecture, rotation: RotationKind) -> Mapping[str, tuple[int, ...]]:
        """The upper triangle of K, before it is bounded, a head."""
        return {"theta": (arch.num_layers, arch.num_kv_heads, stretch_size(arch.head_dim))}

    def learned(
        self, theta: Parameters, start: Float[AnyArray, "layers kv h h"], arch: Architecture, rotation: RotationKind
    ) -> Float[AnyArray, "layers kv h h"]:
        """exp(K) A."""
        return matmul(stretch(theta["theta"], arch.head_dim), start)

    def record(
        self, theta: Parameters, start: TransformRecord | None, arch: Architecture, rotation: RotationKind
    ) -> TransformRecord:
        """The stretch before what it stretches."""
        K, h = np.asarray(theta["theta"]), arch.head_dim
        shape = (*K.shape[:-1], h, h)
        own = TransformRecord(
            kind="stretch", site=self.field, shape=shape, parameters={"theta": K}, precision="float32"
        )
        return composition(self.field, (own,) if start is None else (own, start))
