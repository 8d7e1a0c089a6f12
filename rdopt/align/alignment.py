"""The trainable gauges as one Flax module: every site starts as it is in the starting coordinates."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Shaped

from rdopt.align.objective import Variables
from rdopt.align.stored_sites import (
    NO_SITES,
    STORED,
    Plan,
    Sites,
    expected_angle_bits,
    parameters,
    site_turn,
    site_widths,
)
from rdopt.checkpoint.families import MATRICES, Architecture, block_shapes
from rdopt.config.schema import SiteName
from rdopt.transforms.files import fixed_record
from rdopt.transforms.gauges.gauges import Gauges
from rdopt.transforms.matrices.modules import CayleyRotation, Stretch, record_of
from rdopt.transforms.records import TransformRecord

# Rates that sample indices need a learned spread per column; the others derive it from the weights.
SAMPLED_RATES = ("noise", "annealed", "ste")


class Start(NamedTuple):
    """What training starts from: R0 (d, d) and V0 (layers, kv_heads, h, h), float32, and the stored rotations."""

    R: Float[Array, "d d"]
    V: Float[Array, "layers kv h h"]
    stored: Sites = NO_SITES


class Alignment(nn.Module):
    """R = R0 Cayley(S), A = exp(K) V0 Cayley(S), c = exp(g + i angle), scales exp(t); all parameters zero at the start.

    Attributes:
        arch: the network's architecture.
        sites: which symmetries are trained.
        rate: the relaxed rate; a sampled one adds a learned log2 spread per column.
        plan: the stored rotations that are trained, if any.
    """

    arch: Architecture
    sites: tuple[SiteName, ...]
    rate: str
    plan: Plan | None = None

    @nn.compact
    def __call__(self, start: Start, hardness: Any = 0.0) -> Variables:
        """The variables of the objective; hardness is passed on."""
        arch, sites = self.arch, self.sites
        R = residual_module(arch, "residual")(start.R) if "residual" in sites else start.R
        A = value_module(arch, "value")(start.V) if "value" in sites else start.V
        A = stretch_module(arch, "stretch")(A) if "stretch" in sites else A
        gauges = Gauges(
            residual=R,
            value=A,
            norm=norm_scales(self._zeros("norm", (2 * arch.num_layers, arch.hidden_size))) if "norm" in sites else None,
            query=self._query() if "query" in sites else None,
            hidden=jnp.exp(self._zeros("hidden", (arch.num_layers, arch.ffn_size))) if "hidden" in sites else None,
        )
        scales = {}
        if self.rate in SAMPLED_RATES:
            shapes = block_shapes(arch)  # log2 relative to the column's root mean square
            scales = {k: self._zeros(f"log_scale_{k}", (arch.num_layers, shapes[k][1])) for k in MATRICES}
        stored, bits = self._stored(start.stored)
        return Variables(gauges, stored, bits, scales, hardness)

    def _stored(self, starts: Sites) -> tuple[Sites, Any]:
        """The stored rotations and the bits of their angles."""
        if self.plan is None:
            return NO_SITES, 0.0
        found, bits, widths = Sites({}, {}), jnp.zeros(()), site_widths(self.plan, self.arch)
        for side in self.plan.sides:
            for key, n in getattr(widths, side).items():
                count = parameters(self.plan, n)
                theta = self._zeros(f"{STORED}{side}_{key}", (self.arch.num_layers, count))
                turn = site_turn(self.plan, getattr(starts, side)[key], theta)
                getattr(found, side)[key] = turn
                bits = bits + expected_angle_bits(turn, count)
        return found, bits

    def _query(self) -> jax.Array:
        """c of every pair; under QK-norm one gain a head, and no angle."""
        heads, pairs = (self.arch.num_layers, self.arch.num_kv_heads), self.arch.head_dim // 2
        if self.arch.qk_norm:
            gain = jnp.broadcast_to(self._zeros("query_gain", (*heads, 1)), (*heads, pairs))
            return jnp.exp(gain).astype(jnp.complex64)
        return jnp.exp(self._zeros("query_gain", (*heads, pairs)) + 1j * self._zeros("query_angle", (*heads, pairs)))

    def _zeros(self, name: str, shape: tuple[int, ...]) -> jax.Array:
        return self.param(name, nn.initializers.zeros_init(), shape)


def norm_scales(t: Float[Array | np.ndarray, "sites d"]) -> Float[Array, "sites d"]:
    """exp(t) in bfloat16, as a file keeps the norms, so that the gauge stays exact there; gradients pass through."""
    scale = jnp.exp(t)
    return scale + jax.lax.stop_gradient(scale.astype(jnp.bfloat16).astype(scale.dtype) - scale)


def residual_module(arch: Architecture, name: str | None = None) -> CayleyRotation:
    """The rotation of the residual stream."""
    return CayleyRotation(n=arch.hidden_size, name=name)


def value_module(arch: Architecture, name: str | None = None) -> CayleyRotation:
    """The rotations of all value heads, batched over (layers, kv_heads)."""
    return CayleyRotation(n=arch.head_dim, batch=(arch.num_layers, arch.num_kv_heads), name=name)


def stretch_module(arch: Architecture, name: str | None = None) -> Stretch:
    """The stretches of all value heads."""
    return Stretch(n=arch.head_dim, batch=(arch.num_layers, arch.num_kv_heads), name=name)


def starting_rotations(start: Gauges, arch: Architecture) -> Start:
    """Float32 R0 and V0 on the device; identities where the gauges have none."""
    R = np.eye(arch.hidden_size) if start.residual is None else start.residual
    shape = (arch.num_layers, arch.num_kv_heads, arch.head_dim, arch.head_dim)
    V = np.broadcast_to(np.eye(arch.head_dim), shape) if start.value is None else start.value
    return Start(jnp.asarray(R, jnp.float32), jnp.asarray(V, jnp.float32))


def trained_records(
    params: Mapping[str, Any], start: Gauges, arch: Architecture
) -> dict[str, TransformRecord]:
    """What was learned, by site, as records on the float64 starting bases."""
    records = {site: fixed_record(site, x) for site, x in start._asdict().items() if x is not None}
    for site, module in (("residual", residual_module(arch)), ("value", value_module(arch))):
        if site in params:
            records[site] = record_of(module, params[site], site=site, base=records.get(site))
    if "stretch" in params:
        stretched = record_of(stretch_module(arch), params["stretch"], site="value")
        parts = (stretched, records["value"]) if "value" in records else (stretched,)
        records["value"] = TransformRecord(kind="composition", site="value", shape=stretched.shape, parts=parts)
    exact = {k: np.asarray(x, np.float64) for k, x in params.items() if not isinstance(x, Mapping)}
    if "norm" in exact:
        found = np.asarray(norm_scales(params["norm"]), np.float64)
        head = np.ones((1, arch.hidden_size))  # its input is no coded matrix's
        records["norm"] = fixed_record("norm", np.concatenate([found, head]))
    if "hidden" in exact:
        records["hidden"] = fixed_record("hidden", np.exp(exact["hidden"]))
    if "query_gain" in exact:
        shape = (arch.num_layers, arch.num_kv_heads, arch.head_dim // 2)
        c = np.exp(exact["query_gain"] + 1j * exact.get("query_angle", np.zeros(1)))
        records["query"] = fixed_record("query", np.array(np.broadcast_to(c, shape)))
    return records


def single_precision(gauges: Gauges, arch: Architecture) -> Gauges:
    """Float64 coordinates as the objective takes them: float32 on the device, no final norm, identities for none."""
    start = starting_rotations(gauges, arch)
    exact = gauges._replace(norm=None if gauges.norm is None else gauges.norm[:-1])
    return jax.tree.map(_single, exact)._replace(residual=start.R, value=start.V)


def _single(x: Shaped[np.ndarray, "..."]) -> Shaped[Array, "..."]:
    return jnp.asarray(x, jnp.complex64 if np.iscomplexobj(x) else jnp.float32)
