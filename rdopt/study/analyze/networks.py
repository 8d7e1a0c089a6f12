"""The networks whose outputs are compared with the original's: one basis each, and what is done to its matrices.

Rounding at a fixed length, with or without protected outliers, and noise of equal norm on some entries or along some
inputs. Every change takes a matrix in given coordinates and returns it changed, float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Bool, Float
from scipy.linalg import cho_factor, cho_solve

from rdopt.checkpoint.families import MATRICES

RoundedPart = Literal["blocks", "embed", "head"]
SHARES = (0.005, 0.05)  # of the entries that noise falls on
NOISE = 0.1  # norm of the noise over that of its matrix
SEEDS = 3


class Inputs:
    """What comes into a matrix, by its second moment sigma."""

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


@dataclass(frozen=True)
class Rounding:
    """Rounding to 2^bits - 1 levels, symmetric, one scale a row over its largest magnitude.

    Attributes:
        part: all matrices of the blocks, the embedding alone, or the head alone.
        bits: length of every code.
        protected: share of a matrix's largest entries that keep 16 bits (float16); scales are those of the rest. None
            for no protection.
    """

    part: RoundedPart
    bits: int
    protected: float | None = None

    @property
    def kind(self) -> str:
        """What it is called beside other changes."""
        return "rounded" if self.part == "blocks" else f"rounded {self.part}"

    @property
    def label(self) -> str:
        """What tells it from others of its kind."""
        return f"{self.bits} bits" + ("" if self.protected is None else ", protected")

    def apply(
        self, W: Float[np.ndarray, "out in"], inputs: Inputs, seed: tuple[int, ...]
    ) -> Float[np.ndarray, "out in"]:
        """The matrix rounded; neither inputs nor seed matter."""
        W = np.asarray(W, np.float32)
        exempt = largest(W, self.protected or 0.0)
        rest = np.where(exempt, 0, W)
        scale = np.abs(rest).max(axis=1, keepdims=True) / (2 ** (self.bits - 1) - 1)
        coded = np.rint(rest / np.where(scale > 0, scale, 1)) * scale
        return np.where(exempt, W.astype(np.float16), coded).astype(np.float32)


@dataclass(frozen=True)
class Noise:
    """Noise of NOISE times the norm of its matrix, in all matrices of the blocks.

    Attributes:
        where: on the "largest" or on "random" entries; or along "weak" directions of the input as `Inputs.weak` says,
            along "strong" ones (what that leaves), or along "all".
        share: of the entries; None for directions.
    """

    where: Literal["largest", "random", "weak", "all", "strong"]
    share: float | None = None

    part = "blocks"

    @property
    def kind(self) -> str:
        """What it is called beside other changes."""
        return "inputs" if self.share is None else "entries"

    @property
    def label(self) -> str:
        """What distinguishes it from others of its kind."""
        return self.where + ("" if self.share is None else f" {100 * self.share:g} %")

    def apply(
        self, W: Float[np.ndarray, "out in"], inputs: Inputs, seed: tuple[int, ...]
    ) -> Float[np.ndarray, "out in"]:
        """The matrix with noise."""
        noise = gaussian(seed, W.shape)
        if self.share is not None:
            random = self.where == "random"
            order = np.random.default_rng((*seed, 1)).random(W.shape, np.float32) if random else W
            noise = np.where(largest(order, self.share), noise, 0)
        elif self.where != "all":
            weak = inputs.weak(noise)
            noise = weak if self.where == "weak" else noise - weak
        return W + (noise * (NOISE * np.linalg.norm(W) / np.linalg.norm(noise))).astype(np.float32)


class Network(NamedTuple):
    """One network to be run beside the original.

    Attributes:
        basis: the coordinates it is changed in.
        change: what is done to its matrices; None: it is the original in that basis.
        seed: of its noise.
    """

    basis: str
    change: Rounding | Noise | None = None
    seed: int = 0

    @property
    def part(self) -> str | None:
        """Which matrices are changed."""
        return None if self.change is None else self.change.part

    @property
    def has_stream(self) -> bool:
        """Whether it has a residual stream of its own; a changed head reads that of the unchanged network."""
        return self.part != "head"

    @property
    def streamed(self) -> "Network":
        """The network whose residual stream its head reads."""
        return self if self.has_stream else Network(self.basis)


def networks_of(bases: Sequence[str], bits: Sequence[int], protected: float) -> list[Network]:
    """All networks: every basis as it is and rounded to every number of bits, the first one with noise, too.

    Without protection of outliers, and with that share of them in 16 bits.
    """
    noises = [Noise(entries, share) for share in SHARES for entries in ("largest", "random")]
    noises += [Noise(directions) for directions in ("weak", "all", "strong")]
    return [
        *(Network(basis) for basis in bases),
        *(
            Network(basis, Rounding(part, b, share))
            for basis in bases for b in bits for part in get_args(RoundedPart) for share in (None, protected)
        ),
        *(Network(bases[0], noise, seed) for seed in range(SEEDS) for noise in noises),
    ]  # fmt: skip


def largest(W: Float[np.ndarray, "out in"], share: float) -> Bool[np.ndarray, "out in"]:
    """Where the largest entries lie, round(share * size) of them."""
    count = round(share * W.size)
    mask = np.zeros(W.size, bool)
    if count:
        mask[np.argpartition(np.abs(W).ravel(), W.size - count)[W.size - count :]] = True
    return mask.reshape(W.shape)


@lru_cache(maxsize=len(MATRICES))
def gaussian(seed: tuple[int, ...], shape: tuple[int, int]) -> Float[np.ndarray, "out in"]:
    """The noise of one matrix, float32, not to be written to: all networks of a seed share it, one after the other."""
    noise = np.random.default_rng(seed).standard_normal(shape, np.float32)
    noise.flags.writeable = False
    return noise
