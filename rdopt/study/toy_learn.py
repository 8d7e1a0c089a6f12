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

from rdopt.rate import noise_rate, spreads
from rdopt.transforms import cayley, skew_size

_LEARNING_RATE = 0.02
_DRAWS = 8  # of the noise, when start and result are compared


def learn_axes(
    W: Float[np.ndarray, "k out n"],
    start: Float[np.ndarray, "k n n"],
    steps_of_grid: Float[np.ndarray, " k"],
    *,
    steps: int,
    seed: int,
) -> Float[np.ndarray, "k n n"]:
    """The learned rotation of every matrix's inputs, float64, orthogonal to rounding; the start where it is better.

    Args:
        W: matrices of one shape.
        start: orthogonal V0.
        steps_of_grid: step of each, in its units.
        steps: of Adam.
        seed: of the noise.
    """
    arrays = (jnp.asarray(a, jnp.float32) for a in (W, start, steps_of_grid))
    theta, better = _train(jax.random.key(seed), *arrays, steps=steps)
    turned = start @ cayley(np.asarray(theta, np.float64), W.shape[2])
    return np.where(np.asarray(better)[:, None, None], turned, start)


def relaxed_bits(
    W: Float[Array, "k out n"], step: Float[Array, " k"], key: PRNGKeyArray
) -> Float[Array, " k"]:
    """Mean relaxed rate of each matrix in bits/weight, at one draw of the noise."""

    def one(W: Array, step: Array, key: PRNGKeyArray) -> Array:
        spread = spreads(W)
        return jnp.mean(noise_rate(W, step, spread.row[:, None] * spread.col[None, :], key, "laplace"))

    return jax.vmap(one)(W, step, jax.random.split(key, len(W)))


@partial(jax.jit, static_argnames="steps")
def _train(
    key: PRNGKeyArray,
    W: Float[Array, "k out n"],
    start: Float[Array, "k n n"],
    grid: Float[Array, " k"],
    *,
    steps: int,
) -> tuple[Array, Array]:
    """(skew entries, whether they take fewer bits than zeros)."""
    n = W.shape[2]
    adam = optax.adam(optax.cosine_decay_schedule(_LEARNING_RATE, steps))
    begun = jnp.matmul(W, start, precision="highest")

    def rate(theta: Array, key: PRNGKeyArray) -> Array:
        return relaxed_bits(jnp.matmul(begun, cayley(theta, n), precision="highest"), grid, key)

    def step(number: Array, held: tuple) -> tuple:
        theta, state = held
        slope = jax.grad(lambda t: jnp.sum(rate(t, jax.random.fold_in(key, number))))(theta)
        change, state = adam.update(slope, state)
        return optax.apply_updates(theta, change), state

    zeros = jnp.zeros((len(W), skew_size(n)))
    theta, _ = jax.lax.fori_loop(0, steps, step, (zeros, adam.init(zeros)))
    draws = jax.random.split(jax.random.fold_in(key, steps), _DRAWS)
    before, after = (jnp.mean(jax.vmap(rate, (None, 0))(t, draws), axis=0) for t in (zeros, theta))
    return theta, after < before
