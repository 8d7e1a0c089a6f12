"""The trainable gauges as one Flax module: a Cayley rotation of the residual stream and one per value head."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from rdopt.align.coordinates import Rotations
from rdopt.checkpoint import MATRICES, Architecture, block_shapes
from rdopt.transforms import CayleyRotation, Gauges, TransformRecord, record_of

# Rates that sample indices need a learned spread per column; the others derive it from the weights.
SAMPLED_RATES = ("noise", "ste")


class Alignment(nn.Module):
    """Residual rotation R = R0 Cayley(S) and value rotations V = V0 Cayley(S), S = 0 at the start.

    Attributes:
        arch: the network's architecture.
        residual: whether R is trained.
        value_heads: whether V is trained.
        rate: the relaxed rate; a sampled one adds a learned log2 spread per column.
    """

    arch: Architecture
    residual: bool
    value_heads: bool
    rate: str

    def setup(self) -> None:
        """Makes the rotations of the sites that are trained, and the spreads of a sampled rate."""
        if self.residual:
            self.residual_rotation = residual_module(self.arch)
        if self.value_heads:
            self.value_rotation = value_module(self.arch)
        if self.rate in SAMPLED_RATES:
            shapes = block_shapes(self.arch)
            # log2 relative to the column's root mean square.
            self.log_scale = {
                name: self.param(
                    f"log_scale_{name}", nn.initializers.zeros_init(), (self.arch.num_layers, shapes[name][1])
                )
                for name in MATRICES
            }

    def __call__(self, start: Rotations) -> dict[str, Any]:
        """The variables of the objective: R (d, d), V (layers, kv, h, h), log_scale per matrix.

        Args:
            start: R0 (d, d) and V0 (layers, kv_heads, h, h).
        """
        R = self.residual_rotation(start.R) if self.residual else start.R
        V = self.value_rotation(start.V) if self.value_heads else start.V
        scales = dict(self.log_scale) if self.rate in SAMPLED_RATES else {}
        return {"R": R, "V": V, "log_scale": scales}


def residual_module(arch: Architecture) -> CayleyRotation:
    """The rotation of the residual stream."""
    return CayleyRotation(n=arch.hidden_size)


def value_module(arch: Architecture) -> CayleyRotation:
    """The rotations of all value heads, batched over (layers, kv_heads)."""
    return CayleyRotation(n=arch.head_dim, batch=(arch.num_layers, arch.num_kv_heads))


def starting_rotations(start: Gauges, arch: Architecture) -> Rotations:
    """Float32 R0 and V0 on the device; identities where the gauges have none."""
    R = np.eye(arch.hidden_size) if start.residual is None else start.residual
    shape = (arch.num_layers, arch.num_kv_heads, arch.head_dim, arch.head_dim)
    V = np.broadcast_to(np.eye(arch.head_dim), shape) if start.value is None else start.value
    return Rotations(jnp.asarray(R, jnp.float32), jnp.asarray(V, jnp.float32))


def trained_records(
    params: Mapping[str, Any], start: Gauges, arch: Architecture
) -> dict[str, TransformRecord]:
    """What was learned, by site ("residual", "value"), as records on the float64 starting bases."""
    modules = {"residual": residual_module(arch), "value": value_module(arch)}
    records = {}
    for site, basis in zip(("residual", "value"), start, strict=True):
        trained = params.get(f"{site}_rotation")
        if basis is None and trained is None:
            continue
        base = None
        if basis is not None:
            base = TransformRecord(kind="matrix", site=site, shape=basis.shape, parameters={"matrix": basis})
        if trained is None:
            assert base is not None
            records[site] = base
        else:
            records[site] = record_of(modules[site], trained, site=site, base=base)
    return records


def orthogonality(x: Float[Array, "*batch n n"]) -> float:
    """max |Q^T Q - I| over a batch, float32 on the device."""
    gram = jnp.matmul(jnp.swapaxes(x, -1, -2), x, precision=jax.lax.Precision.HIGHEST)
    return float(jnp.max(jnp.abs(gram - jnp.eye(x.shape[-1]))))
