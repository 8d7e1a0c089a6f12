"""Invertible maps of a matrix's inputs or outputs, in numpy or JAX: what a change of coordinates does to one side.

With outputs y' = T y and inputs x' = U x a matrix becomes W' = T W U^-1, the second moment of its input U sigma U^T and
that of the gradient at its output T^-T G T^-1.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from jaxtyping import Float, Int

from rdopt.transforms.arrays import AnyArray, matmul, namespace


class Map(NamedTuple):
    """x -> scale * (dense (before * x))[order]; None stands for the identity.

    Attributes:
        before: scale of every entry at first.
        dense: a matrix and its inverse.
        order: entry i takes the entry order[i].
        scale: scale of every entry at last.
    """

    before: Float[AnyArray, " n"] | None = None
    dense: tuple[Float[AnyArray, "n n"], Float[AnyArray, "n n"]] | None = None
    order: Int[AnyArray, " n"] | None = None
    scale: Float[AnyArray, " n"] | None = None

    def apply(self, x: Float[AnyArray, "n *rest"]) -> Float[AnyArray, "n *rest"]:
        """The map on the first axis."""
        x = x if self.before is None else _scaled(x, self.before)
        x = x if self.dense is None else matmul(self.dense[0], x)
        x = x if self.order is None else x[self.order]
        return x if self.scale is None else _scaled(x, self.scale)

    def undo(self, x: Float[AnyArray, "n *rest"]) -> Float[AnyArray, "n *rest"]:
        """The inverse of `apply`."""
        x = x if self.scale is None else _scaled(x, 1 / self.scale)
        x = x if self.order is None else x[namespace(self.order).argsort(self.order)]
        x = x if self.dense is None else matmul(self.dense[1], x)
        return x if self.before is None else _scaled(x, 1 / self.before)

    def dual(self) -> "Map":
        """T^-T, by which gradients change where values change by T."""
        return Map(
            None if self.before is None else 1 / self.before,
            None if self.dense is None else (self.dense[1].T, self.dense[0].T),
            self.order,
            None if self.scale is None else 1 / self.scale,
        )

    def moment(self, S: Float[AnyArray, "n n"]) -> Float[AnyArray, "n n"]:
        """T S T^T, symmetric."""
        turned = self.apply(self.apply(S).T)
        return (turned + turned.T) / 2

    def diagonal_moment(self, diagonal: Float[AnyArray, " n"]) -> Float[AnyArray, " n"]:
        """The diagonal of T S T^T from that of S.

        Raises:
            ValueError: the map is dense, so that the diagonal does not suffice.
        """
        if self.dense is not None:
            raise ValueError("a dense map needs the whole moment, not its diagonal")
        before, scale = (None if x is None else x * x for x in (self.before, self.scale))
        return Map(before, None, self.order, scale).apply(diagonal)


def merged_map(maps: Iterable[Map]) -> Map:
    """What several symmetries make of one side, each a stage of its own.

    Raises:
        ValueError: two of them take the same stage.
    """
    stages: dict[str, Any] = {}
    for each in maps:
        own = {name: x for name, x in each._asdict().items() if x is not None}
        if taken := own.keys() & stages.keys():
            raise ValueError(f"two symmetries both set the {taken.pop()} of one side; fold them one after the other")
        stages |= own
    return Map(**stages)


class Sides(NamedTuple):
    """What becomes of a matrix: its outputs change by T, its inputs by U."""

    outputs: Map
    inputs: Map

    def fold(self, W: Float[AnyArray, "out in"]) -> Float[AnyArray, "out in"]:
        """T W U^-1."""
        return self.inputs.dual().apply(self.outputs.apply(W).T).T

    def unfold(self, W: Float[AnyArray, "out in"]) -> Float[AnyArray, "out in"]:
        """T^-1 W U."""
        return self.inputs.dual().undo(self.outputs.undo(W).T).T


def _scaled(x: Float[AnyArray, "n *rest"], scale: Float[AnyArray, " n"]) -> Float[AnyArray, "n *rest"]:
    return x * scale.reshape(-1, *[1] * (x.ndim - 1))


def block_diagonal(parts: Float[AnyArray, "k h h"]) -> Float[AnyArray, "n n"]:
    """The matrix with k blocks on its diagonal."""
    k, h, _ = parts.shape
    own = namespace(parts).eye(k, dtype=parts.dtype)
    return (own[:, None, :, None] * parts[:, :, None, :]).reshape(k * h, k * h)
