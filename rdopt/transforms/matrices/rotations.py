"""Two ways to learn a rotation on a starting basis: Q = Q0 Cayley(S), and Q = Q0 times layers of Givens rotations.

Cayley moves along all n (n - 1) / 2 dimensions at once, by a factorisation a step. Butterflies of Givens rotations
(STACK of them, over different pairs of axes) have O(n log n) angles and take O(n log n) a row, without a factorisation.
Parameters are all zero at the start, where both are the basis itself.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from rdopt.config.schema import RotationKind
from rdopt.transforms.arrays import AnyArray, matmul
from rdopt.transforms.matrices.cayley import cayley, skew_size
from rdopt.transforms.matrices.givens import apply_givens, pair_count, stacked_butterflies
from rdopt.transforms.records import TransformRecord, composition, pairs_to_fields

STACK = 4  # butterflies of a learned rotation


def rotation_shapes(kind: RotationKind, n: int, batch: tuple[int, ...] = ()) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of rotations of width n, one rotation a batch entry."""
    if kind == "cayley":
        return {"theta": (*batch, skew_size(n))}
    return {"angles": (*batch, pair_count(stacked_butterflies(n, STACK)))}


def rotated(
    kind: RotationKind, parameters: Mapping[str, AnyArray], Q0: Float[AnyArray, "*batch n n"]
) -> Float[AnyArray, "*batch n n"]:
    """Q0 Q(parameters)."""
    n = Q0.shape[-1]
    if kind == "cayley":
        return matmul(Q0, cayley(parameters["theta"], n))
    return apply_givens(Q0, parameters["angles"], stacked_butterflies(n, STACK))


def rotation_record(
    kind: RotationKind, parameters: Mapping[str, Any], site: str, n: int, base: TransformRecord | None
) -> TransformRecord:
    """The record of learned rotations of width n behind that of their basis, None for the identity."""
    fields = {name: np.asarray(x) for name, x in parameters.items()}
    batch, options = next(iter(fields.values())).shape[:-1], {}
    if kind == "givens":
        pairs, options = pairs_to_fields(stacked_butterflies(n, STACK))
        fields |= pairs
    own = TransformRecord(
        kind=kind, site=site, shape=(*batch, n, n), parameters=fields, options=options, precision="float32"
    )
    return own if base is None else composition(site, (base, own))
