"""What is done to a matrix to see what it costs: rounding at a fixed length, protected outliers, noise of equal norm.

All take a matrix in given coordinates and return it perturbed, float32.
"""

from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.linalg import cho_factor, cho_solve

from rdopt.checkpoint.families import MATRICES


class Inputs:
    """What comes into a matrix.

    Args:
        sigma: its second moment.
    """

    def __init__(self, sigma: Float[np.ndarray, "in in"]) -> None:
        self.sigma = np.asarray(sigma, np.float32)

    def weak(self, noise: Float[np.ndarray, "out in"]) -> Float[np.ndarray, "out in"]:
        """The part of some noise along weak directions: noise (I + sigma / mu)^-1, mu the mean power, float32.

        A principal axis of power p keeps mu / (mu + p) of its amplitude. The soft split costs a solve instead of the
        eigenvectors of sigma, which take most of the time from a width of a few thousand.
        """
        return cho_solve(self._factor, noise.T, check_finite=False).T

    @cached_property
    def _factor(self) -> tuple[np.ndarray, bool]:
        mean = np.trace(self.sigma) / len(self.sigma)
        return cho_factor(self.sigma / mean + np.eye(len(self.sigma), dtype=np.float32), check_finite=False)


class Around(NamedTuple):
    """What a perturbation may look at.

    Attributes:
        W: the matrix.
        inputs: of the matrix.
        seed: what its random numbers come from.
    """

    W: Float[np.ndarray, "out in"]
    inputs: Inputs
    seed: tuple[int, ...]


Perturbation = Callable[[Around], Float[np.ndarray, "out in"]]


def rounded(bits: int, protected: float = 0.0) -> Perturbation:
    """Rounding to 2^bits - 1 levels, symmetric, one scale a row over its largest magnitude.

    Args:
        bits: length of every code.
        protected: share of the matrix's largest entries that keep 16 bits (float16); scales are those of the rest.
    """
    levels = 2 ** (bits - 1) - 1

    def perturb(a: Around) -> Float[np.ndarray, "out in"]:
        W = np.asarray(a.W, np.float32)
        kept = largest(W, protected)
        rest = np.where(kept, 0, W)
        scale = np.abs(rest).max(axis=1, keepdims=True) / levels
        coded = np.rint(rest / np.where(scale > 0, scale, 1)) * scale
        return np.where(kept, W.astype(np.float16), coded).astype(np.float32)

    return perturb


def largest(W: Float[np.ndarray, "out in"], share: float) -> Bool[np.ndarray, "out in"]:
    """Where the largest entries lie, round(share * size) of them."""
    count = round(share * W.size)
    mask = np.zeros(W.size, bool)
    if count:
        mask[np.argpartition(np.abs(W).ravel(), W.size - count)[W.size - count :]] = True
    return mask.reshape(W.shape)


def on_entries(share: float, where: str, size: float) -> Perturbation:
    """Noise on some of the entries.

    Args:
        share: of the entries that are moved.
        where: "largest" or "random" ones.
        size: Frobenius norm of the noise over that of the matrix.
    """

    def perturb(a: Around) -> Float[np.ndarray, "out in"]:
        if where == "largest":
            chosen = largest(a.W, share)
        else:
            chosen = largest(np.random.default_rng((*a.seed, 1)).random(a.W.shape, np.float32), share)
        return a.W + sized(np.where(chosen, gaussian(a.seed, a.W.shape), 0), a.W, size)

    return perturb


def along_inputs(part: str, size: float) -> Perturbation:
    """Noise in some of the directions of the input, judged by the power that comes along them.

    Args:
        part: "weak" directions as `Inputs.weak` says, "strong" ones (what the weak part leaves), or "all".
        size: Frobenius norm of the noise over that of the matrix.
    """

    def perturb(a: Around) -> Float[np.ndarray, "out in"]:
        noise = gaussian(a.seed, a.W.shape)
        if part != "all":
            weak = a.inputs.weak(noise)
            noise = weak if part == "weak" else noise - weak
        return a.W + sized(noise, a.W, size)

    return perturb


@lru_cache(maxsize=len(MATRICES))
def gaussian(seed: tuple[int, ...], shape: tuple[int, int]) -> Float[np.ndarray, "out in"]:
    """The noise of one matrix, float32, not to be written to: all networks of a seed share it, one after the other."""
    noise = np.random.default_rng(seed).standard_normal(shape, np.float32)
    noise.flags.writeable = False
    return noise


def sized(noise: Float[np.ndarray, "out in"], W: Float[np.ndarray, "out in"], size: float) -> np.ndarray:
    """The noise at `size` times the norm of W, float32."""
    return (noise * (size * np.linalg.norm(W) / np.linalg.norm(noise))).astype(np.float32)
