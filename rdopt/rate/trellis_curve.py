"""The operational curve of the trellis on Gaussian weights, as `scripts/tabulate_trellis.py` measures it.

Eight states, rate in the metric as the encoder has it. No closed form is known; between the measured spreads the curve
is interpolated monotonically (PCHIP), beyond them it goes on as any quantizer does: a bit an octave, and nothing coded.
"""

import numpy as np
from scipy.interpolate import PchipInterpolator

LOG2_SPREADS = np.arange(-14, 17) / 4  # of a weight, in steps of the scalar grid of equal distortion
_BITS = (
    0.0, 0.0, 0.0, 0.0, 0.0001, 0.006, 0.2529, 0.7207, 0.9245, 1.1114, 1.3134, 1.5141, 1.7128, 1.9124, 2.1214,
    2.3326, 2.5489, 2.7739, 2.9991, 3.2288, 3.4604, 3.6957, 3.9338, 4.1729, 4.4144, 4.657, 4.9009, 5.1459, 5.3915,
    5.6378, 5.8849,
)
_ERROR = (  # mean squared, in squared steps
    0.00782, 0.01106, 0.01564, 0.02212, 0.03128, 0.04399, 0.04962, 0.04189, 0.04465, 0.04891, 0.05264, 0.05591,
    0.05899, 0.06201, 0.06476, 0.06734, 0.06966, 0.07149, 0.07323, 0.07485, 0.07621, 0.07735, 0.07824, 0.07917,
    0.07988, 0.08046, 0.08094, 0.08144, 0.08176, 0.08203, 0.08228,
)
_bits = PchipInterpolator(LOG2_SPREADS, _BITS)
_log2_error = PchipInterpolator(LOG2_SPREADS, np.log2(_ERROR))


def measured_rate_distortion(step: float) -> tuple[float, float]:
    """Bits per entry and mean squared error of a unit-variance Gaussian at a step of so many standard deviations."""
    spread = -np.log2(step)
    inside = float(np.clip(spread, LOG2_SPREADS[0], LOG2_SPREADS[-1]))
    above, below = max(spread - inside, 0.0), min(spread - inside, 0.0)
    log2_error = float(_log2_error(inside)) + 2 * below  # in squared steps; below the table the error is the weight
    return float(_bits(inside)) + above, min(1.0, 2.0 ** (log2_error - 2 * spread))
