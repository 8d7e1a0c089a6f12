"""What errors cost in trial coordinates: the moments of one block turned by the gauges, in JAX, float32."""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from rdopt.align.cholesky import cholesky_and_inverse
from rdopt.checkpoint.families import MATRICES_OF
from rdopt.transforms.maps import Sides
from rdopt.transforms.stored.rotation import RotatedSides


class Factor(NamedTuple):
    """Cholesky factor of a damped moment, and its inverse unless it is of a moment that no gauge changes."""

    L: Float[Array, "n n"]
    inverse: Float[Array, "n n"] | None


class ErrorMetric(NamedTuple):
    """How an error of a matrix counts along its rows or its columns.

    Attributes:
        weights: root of what a squared error in a row (or column) costs; steps are in inverse proportion.
        factor: of the damped moment, where the encoder feeds errors back over this side; the weights are its diagonal.
    """

    weights: Float[Array, " n"]
    factor: Factor | None = None


def feedback_metric(S: Float[Array, "n n"], damping: float) -> ErrorMetric:
    """Of a moment over which errors are fed back; damping is a share of the mean diagonal."""
    n = S.shape[0]
    floor = damping * jnp.trace(S) / n
    factor = Factor(*cholesky_and_inverse(S + floor * jnp.eye(n, dtype=S.dtype)))
    return ErrorMetric(jnp.diagonal(factor.L), factor)


def diagonal_metric(diagonal: Float[Array, " n"], damping: float) -> ErrorMetric:
    """Of a moment's diagonal, where every error stays where it is made."""
    return ErrorMetric(jnp.sqrt(diagonal + damping * jnp.mean(diagonal)))


class MatrixCoordinates(NamedTuple):
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
        folded = self.gauges.inputs.moment(sigma)
        return folded if self.stored.inputs is None else self.stored.inputs.moment(folded)

    def gradient_moment(self, G: Float[Array, "out out"]) -> Float[Array, "out out"]:
        """The second moment of the gradient at the output there."""
        folded = self.gauges.outputs.dual().moment(G)
        return folded if self.stored.outputs is None else self.stored.outputs.moment(folded)


def input_metrics(
    sigma: Mapping[str, Array], coordinates: Mapping[str, MatrixCoordinates], damping: float, feedback: bool
) -> dict[str, ErrorMetric]:
    """The metrics of input groups in trial coordinates."""
    metrics = {}
    for group, moment in sigma.items():
        S = coordinates[MATRICES_OF[group][0]].input_moment(moment)
        metrics[group] = feedback_metric(S, damping) if feedback else diagonal_metric(jnp.diagonal(S), damping)
    return metrics


class OutputDamping(NamedTuple):
    """What is added to G, as a share of its mean diagonal (static).

    Attributes:
        diagonal: to its diagonal.
        full: to the whole, where errors are fed back over it.
    """

    diagonal: float
    full: float | None


def output_metric(G: Float[Array, "..."], coordinates: MatrixCoordinates, damping: OutputDamping) -> ErrorMetric:
    """The metric of G in trial coordinates; of a diagonal G, (out,), where that is all there is."""
    if G.ndim == 1:
        return diagonal_metric(coordinates.gauges.outputs.dual().diagonal_moment(G), damping.diagonal)
    G = coordinates.gradient_moment(G)
    if damping.full is not None:
        return feedback_metric(G, damping.full)
    return diagonal_metric(jnp.diagonal(G), damping.diagonal)
