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
from jaxtyping import Array, Float, Int, PRNGKeyArray

from rdopt.rate import noise_rate, spreads
from rdopt.transforms import cayley, skew_size

_LEARNING_RATE = 0.03
_DRAWS = 8  # of the noise, when start and result are compared


def learn_axes(
    W: Float[np.ndarray, "k out n"],
    start: Float[np.ndarray, "k n n"],
    grid: Float[np.ndarray, " k"],
    *,
    steps: int,
    seeds: Int[np.ndarray, " k"],
) -> Float[np.ndarray, "k n n"]:
    """The learned rotation of every matrix's inputs, float64, orthogonal to rounding; the start where it is better.

    Args:
        W: matrices of one shape.
        start: orthogonal V0.
        grid: step of each, in its units.
        steps: of Adam.
        seeds: of the noise of each.
    """
    arrays = (jnp.asarray(a, jnp.float32) for a in (W, start, grid))
    theta, better = _train(jax.vmap(jax.random.key)(jnp.asarray(seeds)), *arrays, steps=steps)
    turned = start @ cayley(np.asarray(theta, np.float64), W.shape[2])
    return np.where(np.asarray(better)[:, None, None], turned, start)


def relaxed_bits(W: Float[Array, "out n"], step: Float[Array, ""], key: PRNGKeyArray) -> Float[Array, ""]:
    """Mean relaxed rate of a matrix in bits/weight, at one draw of the noise."""
    spread = spreads(W)
    return jnp.mean(noise_rate(W, step, spread.row[:, None] * spread.col[None, :], key, "laplace"))


@partial(jax.jit, static_argnames="steps")
def _train(
    keys: PRNGKeyArray,
    W: Float[Array, "k out n"],
    start: Float[Array, "k n n"],
    grid: Float[Array, " k"],
    *,
    steps: int,
) -> tuple[Array, Array]:
    """(skew entries, whether they take fewer bits than zeros), a matrix each."""
    n = W.shape[2]
    adam = optax.adam(optax.cosine_decay_schedule(_LEARNING_RATE, steps))
    begun = jnp.matmul(W, start, precision="highest")

    def rates(theta: Array, number: Array | int) -> Array:
        noise = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
        return jax.vmap(relaxed_bits)(jnp.matmul(begun, cayley(theta, n), precision="highest"), grid, noise)

    def step(number: Array, held: tuple) -> tuple:
        theta, state = held
        change, state = adam.update(jax.grad(lambda t: jnp.sum(rates(t, number)))(theta), state)
        return optax.apply_updates(theta, change), state

    zeros = jnp.zeros((len(W), skew_size(n)))
    theta, _ = jax.lax.fori_loop(0, steps, step, (zeros, adam.init(zeros)))
    draws = steps + jnp.arange(_DRAWS)
    before, after = (jnp.mean(jax.lax.map(partial(rates, t), draws), axis=0) for t in (zeros, theta))
    return theta, after < before
