"""The trainable gauges as one Flax module: every site starts as it is in the starting coordinates."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Shaped

from rdopt.align.objective import Variables
from rdopt.align.stored_learning import Place, RotationStart, StoredSettings, expected_angle_bits, parameter_name
from rdopt.checkpoint.families import MATRICES, Architecture, block_shapes
from rdopt.config.schema import RotationKind, SiteName
from rdopt.transforms.gauges.coordinates import Gauges, fixed_records
from rdopt.transforms.gauges.registry import OWNERS, SITES
from rdopt.transforms.records import TransformRecord
from rdopt.transforms.stored.rotation import Rotation
from rdopt.transforms.stored.rotations import angle_count

# Rates that sample indices need a learned spread per column; the others derive it from the weights.
SAMPLED_RATES = ("noise", "annealed", "ste")


class Start(NamedTuple):
    """What training starts from, float32 on the device: gauges, identities where it needs some, and stored rotations.
    """

    gauges: Gauges
    stored: Mapping[Place, RotationStart] = {}

    def drawn(self, layers: Any, arch: Architecture) -> "Start":
        """That of a network of these blocks alone."""
        return Start(self.gauges.drawn(layers, arch), {k: x.drawn(layers) for k, x in self.stored.items()})


class Alignment(nn.Module):
    """The gauges of every trained site on their start, and the stored rotations; all parameters zero at the start.

    Attributes:
        arch: the network's architecture.
        sites: which symmetries are trained.
        rate: the relaxed rate; a sampled one adds a learned log2 spread per column.
        rotation: how orthogonal gauges are parametrised.
        stored: the stored rotations that are trained, if any.
    """

    arch: Architecture
    sites: tuple[SiteName, ...]
    rate: str
    rotation: RotationKind = "cayley"
    stored: StoredSettings | None = None

    @nn.compact
    def __call__(self, start: Start, hardness: Any = 0.0) -> Variables:
        """The variables of the objective; hardness is passed on."""
        arch, gauges = self.arch, start.gauges
        for site in SITES:
            if site.name in self.sites:
                theta = _Parameters(site.parameters(arch, self.rotation), name=site.name)()
                moved = site.learned(theta, getattr(gauges, site.field), arch, self.rotation)
                gauges = gauges._replace(**{site.field: moved})
        scales = {}
        if self.rate in SAMPLED_RATES:
            shapes = block_shapes(arch)  # log2 relative to the column's root mean square
            scales = {k: self._zeros(f"log_scale_{k}", (arch.num_layers, shapes[k][1])) for k in MATRICES}
        stored, bits = self._stored(start.stored)
        return Variables(gauges, stored, bits, scales, hardness)

    def _stored(self, starts: Mapping[Place, RotationStart]) -> tuple[dict[Place, Rotation], Any]:
        """The stored rotations and the bits of their angles."""
        if self.stored is None:
            return {}, 0.0
        rotations, bits = {}, jnp.zeros(())
        for place, n in self.stored.widths(self.arch).items():
            count = angle_count(self.stored.structure, self.stored.size, n)
            rotations[place] = starts[place].moved(self._zeros(parameter_name(place), (self.arch.num_layers, count)))
            bits = bits + expected_angle_bits(rotations[place], count)
        return rotations, bits

    def _zeros(self, name: str, shape: tuple[int, ...]) -> jax.Array:
        return self.param(name, nn.initializers.zeros_init(), shape)


class _Parameters(nn.Module):
    """The parameters of one site."""

    shapes: Mapping[str, tuple[int, ...]]

    @nn.compact
    def __call__(self) -> dict[str, Float[Array, "..."]]:
        return {name: self.param(name, nn.initializers.zeros_init(), shape) for name, shape in self.shapes.items()}


def trained_records(
    params: Mapping[str, Any], start: Gauges, arch: Architecture, rotation: RotationKind = "cayley"
) -> dict[str, TransformRecord]:
    """What was learned, by field of `Gauges`, as records on the float64 starting coordinates."""
    records = fixed_records(start)
    for site in SITES:
        if site.name in params:
            records[site.field] = site.record(params[site.name], records.get(site.field), arch, rotation)
    return records


def single_precision(gauges: Gauges, arch: Architecture, sites: Sequence[str] | None = None) -> Gauges:
    """Float64 coordinates as the objective takes them: float32 on the device.

    Args:
        gauges: the coordinates.
        arch: of the network.
        sites: which are trained, where some need identities to start from; None: any of them.
    """
    fields = [site.field for site in SITES if sites is None or site.name in sites]
    identities = {field: OWNERS[field].identity(arch) for field in fields}
    return Gauges(**{
        field: None if x is None else _single(x) for field, x in (identities | gauges.present()).items()
    })


def _single(x: Shaped[np.ndarray, "..."]) -> Shaped[Array, "..."]:
    if np.issubdtype(x.dtype, np.integer):
        return jnp.asarray(x, jnp.int32)
    return jnp.asarray(x, jnp.complex64 if np.iscomplexobj(x) else jnp.float32)
