"""One matrix in one basis as a row of the report, and what an error of it costs."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from rdopt.study.analyze.figures import concentration, figures

Row = dict[str, Any]


class Cost(NamedTuple):
    """What an error of a matrix does.

    Attributes:
        output: mean squared error of its output, tr(E sigma E^T).
        kl: estimate of KL(original || changed), 1/2 tr(G E sigma E^T), nats/token.
    """

    output: float
    kl: float


def row_of(
    W: Float[np.ndarray, "out in"],
    about: Mapping[str, Any],
    inputs: Float[np.ndarray, " in"],
    outputs: Float[np.ndarray, " out"],
) -> Row:
    """The figures of a matrix.

    Args:
        W: in the basis.
        about: name, layer, kind and basis.
        inputs: power that comes in along each column, the diagonal of sigma.
        outputs: power of the gradient at each row, the diagonal of G.
    """
    inputs, outputs = np.maximum(inputs, 0), np.maximum(outputs, 0)
    return {
        **about,
        "shape": list(W.shape),
        **figures(W)._asdict(),
        "inputs": concentration(inputs),
        "outputs": concentration(outputs),
        "curvature": curvature_rank(W, outputs, inputs),
        "output_error": {},
        "kl_estimated": {},
    }


def note_error(row: Row, about: str, error: Cost, whole: Cost) -> None:
    """Adds what a rounding of the matrix costs to its row; `whole` is what its loss would cost."""
    row["output_error"][about] = error.output / whole.output
    row["kl_estimated"][about] = error.kl


def cost_of(
    E: Float[np.ndarray, "out in"], sigma: Float[np.ndarray, "in in"], G: Float[np.ndarray, "..."]
) -> Cost:
    """The cost of an error.

    Args:
        E: the error.
        sigma: second moment of the inputs.
        G: that of the gradients at the outputs, or its diagonal.
    """
    reached = E @ sigma
    pulled = E * G[:, None] if G.ndim == 1 else G @ E
    return Cost(float(np.vdot(reached, E)), 0.5 * float(np.vdot(reached, pulled)))


def curvature_rank(
    W: Float[np.ndarray, "out in"], G: Float[np.ndarray, " out"], power: Float[np.ndarray, " in"], sample: int = 100_000
) -> float:
    """Spearman's correlation of |W_ij| with the curvature G_ii sigma_jj there, over at most `sample` entries."""
    from scipy.stats import spearmanr

    chosen = np.random.default_rng(0).choice(W.size, min(sample, W.size), replace=False, shuffle=False)
    i, j = np.unravel_index(chosen, W.shape)
    found: Any = spearmanr(np.abs(W[i, j]), G[i] * power[j])
    return float(found.statistic)
