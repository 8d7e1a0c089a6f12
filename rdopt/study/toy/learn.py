"""Rotations of single matrices learned on the relaxed rate: V0 Q, Q a Cayley transform, by Adam.

The rate of an entry is -log2 of a Laplace density's mass on its bin, with uniform noise in place of rounding
(Balle et al. 2017); the density's spread is the rank-1 fit of the turned matrix, as the codec's is. Distortion does
not change under a rotation, so that the rate alone is minimised.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from rdopt.rate.analytic import spreads
from rdopt.rate.relaxed import noise_rate
from rdopt.transforms.matrices.cayley import cayley, skew_size

_LEARNING_RATE = 0.03
_DRAWS = 8  # of the noise, when start and result are compared


def learn_axes(
    W: Float[np.ndarray, "out n"], start: Float[np.ndarray, "n n"], grid: float, *, steps: int, seed: int
) -> Float[np.ndarray, "n n"]:
    """The learned rotation of a matrix's inputs, float64, orthogonal to rounding; the start where it is better.

    Args:
        W: the matrix.
        start: orthogonal V0.
        grid: its step, in its units.
        steps: of Adam.
        seed: of the noise.
    """
    begun, step = jnp.asarray(W @ start, jnp.float32), jnp.asarray(grid, jnp.float32)
    theta, better = _train(jax.random.key(seed), begun, step, steps=steps)
    return start @ cayley(np.asarray(theta, np.float64), W.shape[1]) if better else start


def relaxed_bits(W: Float[Array, "out n"], step: Float[Array, ""], key: PRNGKeyArray) -> Float[Array, ""]:
    """Mean relaxed rate of a matrix in bits/weight, at one draw of the noise."""
    spread = spreads(W)
    return jnp.mean(noise_rate(W, step, spread.row[:, None] * spread.col[None, :], key, "laplace"))


@partial(jax.jit, static_argnames="steps")
def _train(
    key: PRNGKeyArray, begun: Float[Array, "out n"], grid: Float[Array, ""], *, steps: int
) -> tuple[Array, Array]:
    """Skew entries, and whether they take fewer bits than zeros, of a matrix in the basis to begin with."""
    n = begun.shape[1]
    adam = optax.adam(optax.cosine_decay_schedule(_LEARNING_RATE, steps))

    def rate(theta: Array, number: Array | int) -> Array:
        turned = jnp.matmul(begun, cayley(theta, n), precision="highest")
        return relaxed_bits(turned, grid, jax.random.fold_in(key, number))

    def step(number: Array, held: tuple) -> tuple:
        theta, state = held
        change, state = adam.update(jax.grad(rate)(theta, number), state)
        return optax.apply_updates(theta, change), state

    zeros = jnp.zeros(skew_size(n))
    theta, _ = jax.lax.fori_loop(0, steps, step, (zeros, adam.init(zeros)))
    draws = steps + jnp.arange(_DRAWS)
    before, after = (jnp.mean(jax.lax.map(partial(rate, t), draws)) for t in (zeros, theta))
    return theta, after < before
