"""A ReLU MLP from one number to one, trained on sampled signals with Adam (Kingma and Ba 2014) through Optax.

Parameters are a list of matrices (out, in) and biases (1, out), layer by layer. The kinks of the first layer begin
spread evenly over the domain, without which such a network learns fast oscillations slowly (Rahaman et al. 2019).
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

_SLOPE = 4.0  # of the first layer's units at the beginning
_LEARNING_RATE = 0.005
_LAST = 0.002  # of the learning rate at the end, as a share of the first
Layers = Sequence[Float[Array, "..."]]


def mlp_shapes(width: int, layers: int) -> list[tuple[int, int]]:
    """Shapes of matrix and bias of every layer, `layers` of them hidden."""
    widths = [1, *[width] * layers, 1]
    return [shape for n, m in pairwise(widths) for shape in ((m, n), (1, m))]


def start_mlp(key: PRNGKeyArray, width: int, layers: int) -> list[Float[Array, "..."]]:
    """Parameters to begin with, float32: He's (2015) in hidden matrices, biases zero but in the first layer."""
    shapes = mlp_shapes(width, layers)
    keys = jax.random.split(key, len(shapes))
    params = []
    for at, shape in enumerate(shapes):
        if shape[0] == 1 and at % 2:
            params.append(jnp.zeros(shape))
        else:
            gain = _SLOPE if at == 0 else np.sqrt((1.0 if shape[0] == 1 else 2.0) / shape[1])
            params.append(gain * jax.random.normal(keys[at], shape))
    kinks = jax.random.uniform(keys[1], (1, width), minval=-1.0, maxval=1.0)
    params[1] = -params[0].T * kinks
    return params


def run_mlp(params: Layers, x: Float[Array, " n"]) -> Float[Array, " n"]:
    """The network at the places x of [0, 1), which it sees as [-1, 1)."""
    h = 2 * x[:, None] - 1
    for W, b in zip(params[:-2:2], params[1:-2:2], strict=True):
        h = jax.nn.relu(jnp.matmul(h, W.T, precision="highest") + b)
    return (jnp.matmul(h, params[-2].T, precision="highest") + params[-1])[:, 0]


@partial(jax.jit, static_argnames=("width", "layers", "steps"))
def train_mlps(
    keys: PRNGKeyArray, x: Float[Array, " n"], y: Float[Array, "signals n"], *, width: int, layers: int, steps: int
) -> list[Float[Array, "signals ..."]]:
    """An MLP with some hidden layers for every signal y, all samples in every step of Adam.

    The places x of the samples lie in [0, 1); the rate falls along a cosine.
    """
    adam = optax.adam(optax.cosine_decay_schedule(_LEARNING_RATE, steps, _LAST))
    params = jax.vmap(partial(start_mlp, width=width, layers=layers))(keys)

    def loss(params: Layers) -> Array:
        return jnp.sum(jnp.mean((jax.vmap(run_mlp, (0, None))(params, x) - y) ** 2, axis=1))

    def step(_: int, held: tuple) -> tuple:
        params, state = held
        change, state = adam.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, change), state

    return jax.lax.fori_loop(0, steps, step, (params, adam.init(params)))[0]


@jax.jit
def mean_sensitivities(params: Layers, x: Float[Array, " n"]) -> list[Float[Array, ""]]:
    """Mean square of d output / d parameter over the samples and over the entries of each array."""
    slopes = jax.vmap(jax.grad(lambda p, at: run_mlp(p, at[None])[0]), (None, 0))(params, x)
    return [jnp.mean(s**2) for s in slopes]
