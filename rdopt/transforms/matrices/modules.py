"""Trainable rotations as Flax modules: Optax trains parameters, the matrix is orthogonal by construction.

A module maps an initial basis Q0 to Q0 Q(parameters); parameters start at zero, where Q is the identity. Q0
is an argument, not an attribute, so that jitted training does not bake an n x n constant into the program.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from rdopt.transforms.arrays import AnyArray, matmul
from rdopt.transforms.matrices.cayley import apply_block_cayley, block_cayley_size, cayley, skew_size
from rdopt.transforms.matrices.givens import Pairs, apply_givens, butterfly, pair_count
from rdopt.transforms.matrices.stretch import stretch, stretch_size
from rdopt.transforms.records import TransformRecord, pairs_to_fields, rebuild

Basis = Float[Array, "*batch n n"]


class Rotation(nn.Module):
    """What the rotations share.

    Attributes:
        n: width.
        batch: leading axes, e.g. (layers, heads); each entry is a rotation of its own.
    """

    n: int
    batch: tuple[int, ...] = ()

    def _start(self, q0: Any) -> jax.Array:
        basis = jnp.eye(self.n, dtype=jnp.float32) if q0 is None else jnp.asarray(q0, dtype=jnp.float32)
        return jnp.broadcast_to(basis, (*self.batch, self.n, self.n))

    def _parameter(self, name: str, size: int) -> jax.Array:
        return self.param(name, nn.initializers.zeros_init(), (*self.batch, size))


class CayleyRotation(Rotation):
    """Q0 (I + S)^-1 (I - S); with ``block``, S has blocks of that width on its diagonal."""

    block: int | None = None

    @nn.compact
    def __call__(self, q0: Float[AnyArray, "... n n"] | None = None) -> Basis:
        """The rotated basis (*batch, n, n), float32; ``q0`` (n, n) or (*batch, n, n), identity when None."""
        if self.block is None:
            return matmul(self._start(q0), cayley(self._parameter("theta", skew_size(self.n)), self.n))
        theta = self._parameter("theta", block_cayley_size(self.n, self.block))
        return apply_block_cayley(self._start(q0), theta, self.block)


class GivensRotation(Rotation):
    """Q0 times layers of Givens rotations; the butterfly of the width, or the layers in ``pairs``."""

    pairs: Pairs | None = None

    @nn.compact
    def __call__(self, q0: Float[AnyArray, "... n n"] | None = None) -> Basis:
        """The rotated basis (*batch, n, n), float32; ``q0`` (n, n) or (*batch, n, n), identity when None."""
        pairs = butterfly(self.n) if self.pairs is None else self.pairs
        return apply_givens(self._start(q0), self._parameter("angles", pair_count(pairs)), pairs)


class Stretch(Rotation):
    """exp(K) Q0 with a symmetric K of bounded norm; see `stretch`."""

    @nn.compact
    def __call__(self, q0: Float[AnyArray, "... n n"] | None = None) -> Basis:
        """The stretched basis (*batch, n, n), float32; ``q0`` (n, n) or (*batch, n, n), identity when None."""
        return matmul(stretch(self._parameter("theta", stretch_size(self.n)), self.n), self._start(q0))


class ComposedRotation(nn.Module):
    """Q0 Q_1 Q_2 ...: every part turns the basis that the parts before it made."""

    parts: tuple[Rotation, ...]

    @nn.compact
    def __call__(self, q0: Float[AnyArray, "... n n"] | None = None) -> Basis:
        """The rotated basis (*batch, n, n), float32."""
        basis: Any = q0
        for part in self.parts:
            basis = part(basis)
        return basis


def record_of(
    rotation: Rotation | ComposedRotation,
    params: Mapping[str, Any],
    *,
    site: str,
    base: TransformRecord | None = None,
) -> TransformRecord:
    """The record of a trained rotation on its basis.

    Args:
        rotation: the module.
        params: its "params" collection.
        site: where it acts.
        base: the record of Q0; None when that is the identity.
    """
    if isinstance(rotation, ComposedRotation):
        parts = [
            record_of(part, params.get(f"parts_{number}", {}), site=site)
            for number, part in enumerate(rotation.parts)
        ]
    else:
        parts = [_leaf_record(rotation, params, site)]
    if base is not None:
        parts.insert(0, _spread(base, parts[0].shape))
    if len(parts) == 1:
        return parts[0]
    return TransformRecord(kind="composition", site=site, shape=parts[-1].shape, parts=tuple(parts))


def _spread(base: TransformRecord, shape: tuple[int, ...]) -> TransformRecord:
    if base.shape[-1] != shape[-1]:
        raise ValueError(f"the basis has width {base.shape[-1]}, the rotation {shape[-1]}")
    return base


def _leaf_record(rotation: Rotation, params: Mapping[str, Any], site: str) -> TransformRecord:
    shape = (*rotation.batch, rotation.n, rotation.n)
    fields: dict[str, np.ndarray] = {name: np.asarray(value) for name, value in params.items()}
    options: dict[str, Any] = {}
    kind = "stretch" if isinstance(rotation, Stretch) else "cayley"
    if isinstance(rotation, GivensRotation):
        kind = "givens"
        if rotation.pairs is not None:
            pairs, options = pairs_to_fields(rotation.pairs)
            fields |= pairs
    elif isinstance(rotation, CayleyRotation) and rotation.block is not None:
        kind, options = "cayley_block", {"block": rotation.block}
    return TransformRecord(
        kind=kind, site=site, shape=shape, parameters=fields, options=options, precision="float32"
    )


def materialize(
    rotation: Rotation | ComposedRotation, params: Mapping[str, Any], q0: np.ndarray | None = None
) -> Float[np.ndarray, "*batch n n"]:
    """Q0 Q(params) in float64, orthogonal to about 1e-12 when ``q0`` (float64) is."""
    base = None
    if q0 is not None:
        base = TransformRecord(kind="matrix", site="", shape=q0.shape, parameters={"matrix": q0})
    return rebuild(record_of(rotation, params, site="", base=base))
