"""What is done to a matrix to see what it costs: rounding at a fixed length, protected outliers, noise of equal norm.

All take a matrix in given coordinates and return it perturbed, float32.
"""

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float


class Inputs:
    """What comes into a matrix.

    Args:
        sigma: its second moment.
    """

    def __init__(self, sigma: Float[np.ndarray, "in in"]) -> None:
        self.sigma = np.asarray(sigma, np.float32)

    @cached_property
    def axes(self) -> Float[np.ndarray, "in in"]:
        """Principal axes as columns, the weakest first, float32; found once for all matrices and noises."""
        return np.linalg.eigh(self.sigma)[1]


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
        rng = np.random.default_rng(a.seed)
        noise = rng.standard_normal(a.W.shape).astype(np.float32)
        chosen = largest(a.W, share) if where == "largest" else largest(rng.random(a.W.shape, np.float32), share)
        return a.W + sized(np.where(chosen, noise, 0), a.W, size)

    return perturb


def along_inputs(part: str, size: float) -> Perturbation:
    """Noise in some of the directions of the input, judged by the power that comes along them.

    Args:
        part: "weak" or "strong" half of the principal axes of sigma, or "all".
        size: Frobenius norm of the noise over that of the matrix.
    """

    def perturb(a: Around) -> Float[np.ndarray, "out in"]:
        noise = np.random.default_rng(a.seed).standard_normal(a.W.shape).astype(np.float32)
        if part != "all":
            half = a.W.shape[1] // 2
            axes = a.inputs.axes[:, :half] if part == "weak" else a.inputs.axes[:, half:]
            noise = (noise @ axes) @ axes.T
        return a.W + sized(noise, a.W, size)

    return perturb


def sized(noise: Float[np.ndarray, "out in"], W: Float[np.ndarray, "out in"], size: float) -> np.ndarray:
    """The noise at `size` times the norm of W, float32."""
    return (noise * (size * np.linalg.norm(W) / np.linalg.norm(noise))).astype(np.float32)
