"""What errors cost in trial coordinates: the moments of one block turned by the gauges, in JAX, float32."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from rdopt.align.cholesky import cholesky_and_inverse
from rdopt.checkpoint.families import MATRICES_OF
from rdopt.config.schema import SiteName
from rdopt.transforms.maps import Sides
from rdopt.transforms.stored.rotation import RotatedSides


class Factor(NamedTuple):
    """Cholesky factor of a damped moment, and its inverse."""

    L: Float[Array, "n n"]
    inverse: Float[Array, "n n"]


class Side(NamedTuple):
    """How an error of a matrix counts along its rows or its columns.

    Attributes:
        weights: root of what a squared error in a row (or column) costs; steps are in inverse proportion.
        factor: of the damped moment, where the encoder feeds errors back over this side; the weights are its diagonal.
    """

    weights: Float[Array, " n"]
    factor: Factor | None = None


def fed_back(S: Float[Array, "n n"], damping: float) -> Side:
    """The side of a moment over which errors are fed back; damping is a share of the mean diagonal."""
    n = S.shape[0]
    floor = damping * jnp.trace(S) / n
    factor = Factor(*cholesky_and_inverse(S + floor * jnp.eye(n, dtype=S.dtype)))
    return Side(jnp.diagonal(factor.L), factor)


def kept(diagonal: Float[Array, " n"], damping: float) -> Side:
    """The side of a moment's diagonal, where every error stays where it is made."""
    return Side(jnp.sqrt(diagonal + damping * jnp.mean(diagonal)))


class Turned(NamedTuple):
    """What trial coordinates make of one matrix: first the symmetries, then the stored rotations."""

    gauges: Sides
    stored: RotatedSides = RotatedSides(None, None)

    def fold(self, W: Float[Array, "out in"]) -> Float[Array, "out in"]:
        """The matrix there."""
        return self.stored.fold(self.gauges.fold(W))

    def unfold(self, W: Float[Array, "out in"]) -> Float[Array, "out in"]:
        """The matrix in the network's own coordinates."""
        return self.gauges.unfold(self.stored.unfold(W))

    def input_moment(self, sigma: Float[Array, "in in"]) -> Float[Array, "in in"]:
        """The second moment of the input there."""
        turned = self.gauges.inputs.moment(sigma)
        return turned if self.stored.inputs is None else self.stored.inputs.moment(turned)

    def gradient_moment(self, G: Float[Array, "out out"]) -> Float[Array, "out out"]:
        """The second moment of the gradient at the output there."""
        turned = self.gauges.outputs.dual().moment(G)
        return turned if self.stored.outputs is None else self.stored.outputs.moment(turned)


def input_sides(
    sigma: Mapping[str, Array], turns: Mapping[str, Turned], damping: float, feedback: bool
) -> dict[str, Side]:
    """The sides of each input group's moment in trial coordinates."""
    sides = {}
    for group, names in MATRICES_OF.items():
        turned = turns[names[0]].input_moment(sigma[group])
        sides[group] = fed_back(turned, damping) if feedback else kept(jnp.diagonal(turned), damping)
    return sides


class OutputMetric(NamedTuple):
    """How G becomes a side (static).

    Attributes:
        damping: of its diagonal.
        full_damping: of the whole, where errors are fed back over it.
    """

    damping: float
    full_damping: float | None


def output_side(G: Float[Array, "..."], turned: Turned, metric: OutputMetric) -> Side:
    """The side of G in trial coordinates; of a diagonal G, (out,), where that is all there is."""
    if G.ndim == 1:
        return kept(turned.gauges.outputs.dual().diagonal_moment(G), metric.damping)
    turned_G = turned.gradient_moment(G)
    if metric.full_damping is not None:
        return fed_back(turned_G, metric.full_damping)
    return kept(jnp.diagonal(turned_G), metric.damping)


def turned_outputs(sites: Sequence[SiteName]) -> frozenset[str]:
    """The matrices whose outputs the gauges turn."""
    found = {"o", "down", "v"} | ({"q", "k"} if "query" in sites else set()) | ({"up"} if "hidden" in sites else set())
    return frozenset(found)
