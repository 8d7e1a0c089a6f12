"""One matrix in given coordinates: outliers, entropy, concentration, and what errors of it cost.

Two entropies disagree on purpose. At a step that is a share of the rms, H is about h(W) - log2 step: the spread is the
same in all orthogonal coordinates, and only the shape of the marginal counts. With a number of bins over the range the
step is 2 max|W| / bins: whoever removes an outlier also makes the step finer, H_bins = H_step + log2(step / step_bins)
at fine steps, so that flattening raises it. Shares of energy and effective dimensions follow Roy and Vetterli 2007.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rdopt.codec.coders.huffman import code_sizes
from rdopt.study.analyze.networks import Rounding
from rdopt.study.figures import entropy_dimension, entropy_of_counts, participation_ratio

# One matrix in one basis: the JSON values of `row_of`. A row's layer is None for the embedding and the head.
Row = dict[str, Any]
TOP = (1, 5, 10, 25)  # per cent
BINS = 256
STEP = 0.5  # of the rms; about 3 bits for a Gaussian
COARSE = 2.0  # of the rms; about 1.2 bits, where a dead zone shows


def matrix_figures(W: Float[np.ndarray, "out in"]) -> dict[str, Any]:
    """The figures of a matrix that is not zero in one basis; sums in float64.

    Returns:
        {"l2": Frobenius norm, "l_inf": largest magnitude, "peak": the same over the rms, "kurtosis": fourth moment over
        the squared second, 3 for a Gaussian, "beyond_6_sigma": share of entries larger than six rms, "entropy_step":
        bits of the histogram at a step of STEP rms, "huffman_step": of the best prefix code of that histogram,
        "entropy_bins": of a histogram of BINS bins over the range, "zeros": share of entries that round to zero at a
        step of COARSE rms, "columns" and "rows": `energy_concentration` over them}.

    Raises:
        ValueError: every entry is zero, so that shares are undefined.
    """
    power = np.square(W, dtype=np.float64)
    mean = float(power.mean())
    if mean == 0:
        raise ValueError("a matrix of zeros has no shares of energy")
    rms, largest = mean**0.5, float(np.abs(W).max())
    fine = counts_of(W, STEP * rms)
    return {
        "l2": float(power.sum()) ** 0.5,
        "l_inf": largest,
        "peak": largest / rms,
        "kurtosis": float(np.vdot(power, power)) / power.size / mean**2,
        "beyond_6_sigma": float(np.mean(power > 36 * mean)),
        "entropy_step": entropy_of_counts(fine),
        "huffman_step": huffman_bits(fine),
        "entropy_bins": entropy_of_counts(counts_of(W, 2 * largest / BINS)),
        "zeros": float(np.mean(np.abs(W) <= 0.5 * COARSE * rms)),
        "columns": energy_concentration(power.sum(axis=0)),
        "rows": energy_concentration(power.sum(axis=1)),
    }


def counts_of(W: Float[np.ndarray, "out in"], step: float) -> Int[np.ndarray, " n"]:
    """How many entries round to each multiple of a step, in order."""
    z = np.rint(W / step).astype(np.int64).ravel()
    return np.bincount(z - z.min())


def huffman_bits(counts: Int[np.ndarray, " n"]) -> float:
    """Bits per symbol of the best prefix code of at most 16 bits; one symbol alone takes one bit."""
    present = counts[counts > 0]
    if len(present) == 1:
        return 1.0
    return float(np.vdot(code_sizes(present), present)) / float(present.sum())


def energy_concentration(energy: Float[np.ndarray, " n"]) -> dict[str, float]:
    """How unevenly energy, not negative and not all zero, lies over n directions.

    Returns:
        {"top 1": share of the largest 1 % of the directions, at least one of them, ..., "entropy dimension": exp of the
        entropy of the shares over n, "participation": 1 / sum of the squared shares over n}; a flat spectrum has 1.
    """
    share = -np.sort(-energy / energy.sum())
    n = len(share)
    total = np.cumsum(share)
    tops = {f"top {k}": float(total[max(1, round(k * n / 100)) - 1]) for k in TOP}
    return tops | {"entropy dimension": entropy_dimension(share) / n, "participation": participation_ratio(share) / n}


def singular_concentration(W: Float[np.ndarray, "out in"]) -> dict[str, float]:
    """`energy_concentration` over singular directions, float64: the same in all orthogonal coordinates."""
    W = np.asarray(W, np.float64)
    gram = W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W  # the smaller one: its eigenvalues are the squares
    return energy_concentration(np.maximum(np.linalg.eigvalsh(gram), 0.0))


def row_of(
    W: Float[np.ndarray, "out in"],
    place: Mapping[str, Any],
    inputs: Float[np.ndarray, " in"],
    outputs: Float[np.ndarray, " out"],
    singular: Mapping[str, float],
) -> Row:
    """The figures of a matrix; `note_error` adds to them.

    Args:
        W: in the basis.
        place: name, layer, kind and basis.
        inputs, outputs: power that comes in along each column and of the gradient at each row, diagonals of sigma, G.
        singular: `singular_concentration`.
    """
    inputs, outputs = np.maximum(inputs, 0), np.maximum(outputs, 0)
    return {
        **place,
        "shape": list(W.shape),
        **matrix_figures(W),
        "inputs": energy_concentration(inputs),
        "outputs": energy_concentration(outputs),
        "curvature": curvature_rank(W, outputs, inputs),
        "output_error": {},
        "kl_estimated": {},
        "singular": singular,
    }


class ErrorCost(NamedTuple):
    """What an error of a matrix does.

    Attributes:
        output: mean squared error of its output, tr(E sigma E^T).
        kl: estimate of KL(original || changed), 1/2 tr(G E sigma E^T), nats/token.
    """

    output: float
    kl: float


def error_cost(
    E: Float[np.ndarray, "out in"], sigma: Float[np.ndarray, "in in"], G: Float[np.ndarray, "..."]
) -> ErrorCost:
    """The cost of an error E, sigma the second moment of the inputs, G that of the gradients or its diagonal."""
    reached = E @ sigma
    pulled = E * G[:, None] if G.ndim == 1 else G @ E
    return ErrorCost(float(np.vdot(reached, E)), 0.5 * float(np.vdot(reached, pulled)))


def note_error(row: Row, rounding: Rounding, error: ErrorCost, whole: ErrorCost) -> None:
    """Adds what a rounding of the matrix costs to its row; `whole` is what its loss would cost."""
    row["output_error"][rounding.label] = error.output / whole.output
    row["kl_estimated"][rounding.label] = error.kl


def curvature_rank(
    W: Float[np.ndarray, "out in"], G: Float[np.ndarray, " out"], power: Float[np.ndarray, " in"], sample: int = 100_000
) -> float:
    """Spearman's correlation of |W_ij| with the curvature G_ii sigma_jj there, over at most `sample` entries."""
    from scipy.stats import spearmanr

    chosen = np.random.default_rng(0).choice(W.size, min(sample, W.size), replace=False, shuffle=False)
    i, j = np.unravel_index(chosen, W.shape)
    correlation: Any = spearmanr(np.abs(W[i, j]), G[i] * power[j])  # its type has no attributes to a type checker
    return float(correlation.statistic)
