"""Coordinates U^T W V of single matrices: a Hadamard that costs nothing, axes for free, and axes stored as angles.

A rotation between the layers of a ReLU network is no symmetry of it, so every one is undone after decoding. U and V
are orthogonal: white errors stay white, and equal steps cost equal distortion in all coordinates.

Learned axes are V0 Q, Q a Cayley transform, by Adam on the relaxed rate: -log2 of a Laplace density's mass on an
entry's bin, with uniform noise in place of rounding (Balle et al. 2017); the density's spread is the rank-1 fit of the
rotated matrix, as the codec's is. Distortion does not change under a rotation, so that the rate alone is minimised.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from rdopt.codec.coders.constriction import pack_integers
from rdopt.rate.relaxed import noise_rate
from rdopt.rate.spreads import marginal_spreads
from rdopt.transforms.matrices.cayley import cayley, skew_size
from rdopt.transforms.matrices.hadamard import hadamard
from rdopt.transforms.matrices.pca import near_identity, pca
from rdopt.transforms.stored.angles import angle_codes, blocks_of_angles

ANGLE_BITS = (4, 5, 6, 7, 8)
_LEARNING_RATE = 0.03
_DRAWS = 8  # of the noise, when start and result are compared


class Coordinates(NamedTuple):
    """Axes of outputs U and of inputs V by the place of their matrix, float64, and the bytes that rebuild them.

    Where there are none they are the identity.
    """

    U: Mapping[int, Float[np.ndarray, "out out"]] = MappingProxyType({})
    V: Mapping[int, Float[np.ndarray, "in in"]] = MappingProxyType({})
    data: bytes = b""

    def rotate(self, arrays: Sequence[Float[np.ndarray, "_ _"]]) -> list[Float[np.ndarray, "_ _"]]:
        """U^T W V of every matrix."""
        turned = [self.U[at].T @ W if at in self.U else W for at, W in enumerate(arrays)]
        return [W @ self.V[at] if at in self.V else W for at, W in enumerate(turned)]

    def undo(self, arrays: Sequence[Float[np.ndarray, "_ _"]]) -> list[Float[np.ndarray, "_ _"]]:
        """U W V^T of every matrix, float64."""
        plain = [np.asarray(W, np.float64) for W in arrays]
        turned = [self.U[at] @ W if at in self.U else W for at, W in enumerate(plain)]
        return [W @ self.V[at].T if at in self.V else W for at, W in enumerate(turned)]


def hadamard_coordinates(shapes: Sequence[tuple[int, int]], rng: np.random.Generator) -> Coordinates:
    """A Hadamard matrix with random signs on every side longer than one; the seed rebuilds it, so it costs nothing."""
    sides = ({}, {})
    for at, shape in enumerate(shapes):
        for side, n in zip(sides, shape, strict=True):
            if n > 1:
                side[at] = rng.choice((-1.0, 1.0), n)[:, None] * hadamard(n)
    return Coordinates(*sides)


def principal_axes(W: Float[np.ndarray, "out in"]) -> Float[np.ndarray, "in in"]:
    """Eigenvectors of W^T W, in the order nearest to the identity."""
    return near_identity(pca(np.asarray(W, np.float64).T @ W)[None])[0]


def stored_coordinates(
    arrays: Sequence[Float[np.ndarray, "out in"]],
    axes: Mapping[int, Float[np.ndarray, "n n"]],
    steps: Float[np.ndarray, " k"],
) -> Coordinates:
    """Axes V for the inputs of some matrices, by their place, with the angles rounded and coded.

    The width of an angle is the one of ANGLE_BITS that takes the fewest bits in all: the angles as coded, plus the
    weights at high rate, quantized with these steps.
    """
    best, least = Coordinates(), np.inf
    for bits in ANGLE_BITS:
        codes = {at: angle_codes(V[None], bits) for at, V in axes.items()}
        rounded = {at: blocks_of_angles(code, bits)[0] for at, code in codes.items()}
        data = pack_angles([code.ravel() for code in codes.values()], bits)
        rate = sum(high_rate_bits(arrays[at] @ V, float(steps[at])) for at, V in rounded.items())
        if rate + 8 * len(data) < least:
            best, least = Coordinates(V=rounded, data=data), rate + 8 * len(data)
    return best


def pack_angles(codes: Sequence[Int[np.ndarray, " p"]], bits: int) -> bytes:
    """The width of an angle in a byte, then all angles with one table."""
    return bytes([bits]) + pack_integers(np.concatenate([*codes, np.zeros(0, np.int32)]).astype(np.int32))


def high_rate_bits(W: Float[np.ndarray, "out in"], step: float) -> float:
    """Half a log2 of the variance of its column a weight, none below that of the grid's own error."""
    power = np.mean(W**2, axis=0) / (step**2 / 12)
    return len(W) / 2 * float(np.sum(np.log2(np.maximum(power, 1.0))))


def learn_axes(
    W: Float[np.ndarray, "out n"], start: Float[np.ndarray, "n n"], grid: float, *, steps: int, seed: int
) -> Float[np.ndarray, "n n"]:
    """The learned rotation of a matrix's inputs, float64, orthogonal to rounding; the start V0 where it is better.

    The grid is the matrix's step in its units, the steps are Adam's, the seed is that of the noise.
    """
    rotated, step = jnp.asarray(W @ start, jnp.float32), jnp.asarray(grid, jnp.float32)
    theta, better = _train(jax.random.key(seed), rotated, step, steps=steps)
    return start @ cayley(np.asarray(theta, np.float64), W.shape[1]) if better else start


@partial(jax.jit, static_argnames="steps")
def _train(
    key: PRNGKeyArray, rotated: Float[Array, "out n"], grid: Float[Array, ""], *, steps: int
) -> tuple[Array, Array]:
    """Skew entries, and whether they take fewer bits than zeros, of a matrix in the basis to begin with."""
    n = rotated.shape[1]
    adam = optax.adam(optax.cosine_decay_schedule(_LEARNING_RATE, steps))

    def rate(theta: Array, number: Array | int) -> Array:
        """Mean bits/weight at one draw of the noise."""
        trial = jnp.matmul(rotated, cayley(theta, n), precision="highest")
        rho, kappa = marginal_spreads(trial)
        spreads = rho[:, None] * kappa[None, :]
        return jnp.mean(noise_rate(trial, grid, spreads, jax.random.fold_in(key, number), "laplace"))

    def step(number: Array, held: tuple) -> tuple:
        theta, state = held
        change, state = adam.update(jax.grad(rate)(theta, number), state)
        return optax.apply_updates(theta, change), state

    zeros = jnp.zeros(skew_size(n))
    theta, _ = jax.lax.fori_loop(0, steps, step, (zeros, adam.init(zeros)))
    draws = steps + jnp.arange(_DRAWS)
    before, after = (jnp.mean(jax.lax.map(partial(rate, t), draws)) for t in (zeros, theta))
    return theta, after < before
