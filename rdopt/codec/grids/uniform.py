"""Scalar grids: what a real coordinate, in units of its step, is rounded to.

Uniform reconstruction at integers with a dead zone around zero (Sullivan 1996): a coordinate becomes zero when
it lies within half a step plus `dead_zone` of zero, and its nearest integer otherwise.
"""

import numpy as np
from jaxtyping import Float, Int

UNIFORM_SLOPE = 2 * np.log(2) / 12  # squared steps per bit on the curve D(R) at high rate: D = 2^(-2R) / 12 in steps


def round_dead_zone(x: Float[np.ndarray, "*shape"], dead_zone: float = 0.0) -> Int[np.ndarray, "*shape"]:
    """Rounds x (in steps) to integers, zero where |x| < 1/2 + dead_zone.

    Args:
        x: coordinates in units of the step, float64.
        dead_zone: extra half-width of the zero bin, in steps; 0 is plain rounding (ties away from zero).

    Returns:
        int32 indices of the same shape.
    """
    magnitude = np.floor(np.abs(x) + 0.5)
    return np.where(np.abs(x) < 0.5 + dead_zone, 0, np.sign(x) * magnitude).astype(np.int32)
