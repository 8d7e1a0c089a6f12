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


def _sorted(variances: np.ndarray) -> np.ndarray:
    v = np.sort(np.asarray(variances, dtype=np.float64).ravel())
    if not v.size or v[0] < 0:
        raise ValueError("variances must be non-negative, and there must be one")
    return v
