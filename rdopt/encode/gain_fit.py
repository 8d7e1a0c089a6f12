"""Row gains of a quantized matrix before they are rounded, and how finely they are worth rounding."""

import numpy as np
from jaxtyping import Float

from rdopt.codec.streams.gains import GAIN_PRECISIONS

_LARGEST = 2.0  # of a gain, and its inverse the smallest


def gain_precision(gains: int, weights: int, lam: float, distortion: float) -> int:
    """The precision with the least log2(precision) bits a gain / weights + lam D, D what rounding adds.

    Args:
        gains: how many there are.
        weights: the bits are counted per weight.
        lam: bits/weight per nat/token.
        distortion: what a relative error of variance one in all gains would cost, nats/token: 1/2 tr(G W sigma W^T)
            summed over the matrices.
    """

    def cost(precision: int) -> float:
        return gains * np.log2(precision) / weights + lam * distortion * rounding_variance(precision)

    return min(GAIN_PRECISIONS, key=cost)


def rounding_variance(precision: int) -> float:
    """Relative variance of a gain rounded to 1 / precision octave, independent of the others."""
    return (np.log(2) / precision) ** 2 / 12


def unbiased_gains(
    W: Float[np.ndarray, "out in"], What: Float[np.ndarray, "out in"], sigma: Float[np.ndarray, "in in"]
) -> Float[np.ndarray, " out"]:
    """Row gains a that make the output error uncorrelated with the output, <a W^ - W, W>_sigma = 0; float64.

    Choosing cheap indices shrinks the weights; what is coherent with the signal adds up over tokens and layers.
    """
    weighted = np.asarray(W, np.float64) @ sigma
    power, coherent = np.sum(weighted * W, axis=1), np.sum(weighted * What, axis=1)
    ratio = np.divide(power, coherent, out=np.ones_like(power), where=coherent > 0)
    return np.clip(ratio, 1 / _LARGEST, _LARGEST)
