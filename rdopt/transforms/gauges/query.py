"""A complex number for every rotary pair of queries and keys: queries become c q, keys c / |c|^2 k.

RoPE multiplies the pairs (i, i + h/2) by unit complex numbers, which commute with c; every score stays.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Complex, Float

from rdopt.checkpoint.families import Architecture
from rdopt.config.schema import RotationKind
from rdopt.transforms.arrays import AnyArray, namespace
from rdopt.transforms.gauges.site import Parameters, Site
from rdopt.transforms.maps import Map, block_diagonal


class Query(Site):
    """c (layers, kv_heads, pairs), nonzero; learned as exp(gain + i angle).

    Under QK-norm only signs and one scale per head are a symmetry, the scale where the norm's eps is zero; one gain a
    head is learned there.
    """

    name = field = "query"
    kind = "complex"
    outputs_changed = frozenset({"q", "k"})

    def parameters(self, arch: Architecture, rotation: RotationKind) -> Mapping[str, tuple[int, ...]]:
        """Gain and angle of every pair, or a gain a head."""
        heads, pairs = (arch.num_layers, arch.num_kv_heads), arch.head_dim // 2
        return {"gain": (*heads, 1)} if arch.qk_norm else {"gain": (*heads, pairs), "angle": (*heads, pairs)}

    def factor(self, theta: Parameters, arch: Architecture) -> Complex[AnyArray, "layers kv pairs"]:
        """exp(gain + i angle)."""
        gain, xp = theta["gain"], namespace(theta["gain"])
        if "angle" in theta:
            return xp.exp(gain + 1j * theta["angle"])
        gains = xp.broadcast_to(gain, (*gain.shape[:-1], arch.head_dim // 2))
        return xp.exp(gains).astype(xp.result_type(gain.dtype, xp.complex64))

    def outputs(self, name: str, gauge: Complex[AnyArray, "kv pairs"], arch: Architecture) -> Map:
        """Queries times c; keys times 1 / conj(c)."""
        _require_symmetry(gauge, arch)
        if name == "k":
            c = 1 / gauge.conj()
        else:
            c = namespace(gauge).repeat(gauge, arch.num_heads // arch.num_kv_heads, axis=0)
        return Map(dense=(block_diagonal(_pair_products(c)), block_diagonal(_pair_products(1 / c))))


def _pair_products(c: Complex[AnyArray, "k pairs"]) -> Float[AnyArray, "k h h"]:
    """Multiplication by c of the pairs (i, i + h/2) as matrices."""
    xp = namespace(c)
    cos, sin = (part[:, :, None] * xp.eye(c.shape[1], dtype=part.dtype) for part in (xp.real(c), xp.imag(c)))
    return xp.concatenate([xp.concatenate([cos, -sin], axis=2), xp.concatenate([sin, cos], axis=2)], axis=1)


def _require_symmetry(c: Complex[AnyArray, "k pairs"], arch: Architecture) -> None:
    """Refuses what fixed numbers show to be none; training makes none under QK-norm."""
    if not arch.qk_norm or not isinstance(c, np.ndarray):
        return
    if np.any(np.imag(c)) or np.ptp(np.abs(c), axis=1).max() > 1e-12 * np.abs(c).max():
        raise ValueError("under QK-norm only signs and one scale per head are a symmetry of queries and keys")
