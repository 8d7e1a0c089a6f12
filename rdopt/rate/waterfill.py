"""Shannon's limit for independent Gaussian components by reverse water-filling (Cover and Thomas, ch. 10).

Host-side float64: these are the limits printed beside results. A layer's components are the eigendirections
of its weighted metric, D = 1/2 tr(G E Sigma E^T), so no code of such weights gets below them.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class WaterFill(NamedTuple):
    """A point on the limit: total bits, total distortion, and the level, an active component's distortion."""

    bits: float
    distortion: float
    level: float


def reverse_waterfill(variances: Float[np.ndarray, "..."], distortion: float) -> WaterFill:
    """Fewest bits sum_i max(0, log2(v_i / level)) / 2 at a total squared error sum_i min(v_i, level) = D.

    Raises:
        ValueError: for a distortion that is not positive or a negative variance.
    """
    v = _sorted(variances)
    if not distortion > 0:
        raise ValueError(f"no finite rate reaches a distortion of {distortion}; it must be positive")
    if distortion >= v.sum():
        return WaterFill(0.0, float(v.sum()), float(v[-1]))
    n = len(v)
    below = np.concatenate([[0.0], np.cumsum(v)])[:-1]  # distortion of the components under the level
    full = below + (n - np.arange(n)) * v  # total distortion when the level stands at v_k
    k = int(np.searchsorted(full, distortion))
    level = (distortion - below[k]) / (n - k)
    return WaterFill(float(np.sum(np.log2(v[k:] / level)) / 2), float(distortion), float(level))


def waterfill_at_rate(variances: Float[np.ndarray, "..."], bits: float) -> WaterFill:
    """Least total squared error at ``bits`` in total, the inverse of reverse_waterfill.

    Raises:
        ValueError: for a negative rate or a negative variance.
    """
    v = _sorted(variances)
    if bits < 0:
        raise ValueError(f"a rate of {bits} bits is negative")
    if bits == 0 or v[-1] == 0:
        return WaterFill(0.0, float(v.sum()), float(v[-1]))
    falling = v[v > 0][::-1]
    active = np.arange(1, len(falling) + 1)
    log2_sum = np.cumsum(np.log2(falling))
    spent = (log2_sum - active * np.log2(falling)) / 2  # bits when the level stands at component k
    k = int(np.searchsorted(spent, bits, side="right"))
    level = 2.0 ** ((log2_sum[k - 1] - 2 * bits) / k)
    return WaterFill(float(bits), float(np.sum(np.minimum(v, level))), float(level))


def _sorted(variances: np.ndarray) -> np.ndarray:
    v = np.sort(np.asarray(variances, dtype=np.float64).ravel())
    if not v.size or v[0] < 0:
        raise ValueError("variances must be non-negative, and there must be one")
    return v


def metric_spectrum(
    sigma: Float[np.ndarray, "in in"], column_variance: Float[np.ndarray, " in"] | float = 1.0
) -> Float[np.ndarray, " in"]:
    """Eigenvalues of diag(kappa) Sigma diag(kappa): variances per row of W L for independent columns of W.

    ``column_variance`` is kappa^2; with 1 these are the eigenvalues of Sigma.
    """
    kappa = np.sqrt(np.broadcast_to(np.asarray(column_variance, np.float64), len(sigma)))
    return np.maximum(np.linalg.eigvalsh(kappa[:, None] * np.asarray(sigma, np.float64) * kappa[None, :]), 0)


def layer_variances(
    sigma: Float[np.ndarray, "in in"],
    gradient: Float[np.ndarray, " out"] | Float[np.ndarray, "out out"],
    row_variance: Float[np.ndarray, " out"] | float,
    column_variance: Float[np.ndarray, " in"] | float = 1.0,
) -> Float[np.ndarray, "out in"]:
    """Variances of the independent components of a Gaussian W under D = 1/2 tr(G E Sigma E^T), in nats/token.

    W_ij has variance row_variance_i column_variance_j. A scalar row_variance (the mean of W^2) with
    column_variance 1 is the iid-Gaussian reference.

    Args:
        sigma: input second moment.
        gradient: output-gradient moment G, its diagonal or the whole.
        row_variance: of the rows, or one for all.
        column_variance: of the columns, relative to the rows'.
    """
    G = np.asarray(gradient, np.float64)
    rows = metric_spectrum(np.diag(G) if G.ndim == 1 else G, row_variance)
    return np.outer(rows, metric_spectrum(sigma, column_variance)) / 2
