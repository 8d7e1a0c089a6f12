"""Adam (Kingma and Ba 1412.6980, algorithm 1) whose parts count their own steps: blocks are not drawn in every one."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

B1, B2 = 0.9, 0.95
# Near the smallest gradients that matter: parameters that the loss does not feel would otherwise walk at full speed on
# rounding noise.
EPS = 1e-6


class Memory(NamedTuple):
    """What Adam remembers of a tree of parameters.

    Attributes:
        count: steps; of several blocks one number each, the first axis of every parameter.
        mean: running mean of the slopes.
        square: of their squares.
    """

    count: Int[Array, "*blocks"]
    mean: Any
    square: Any


def first_memory(params: Any, *blocks: int) -> Memory:
    """Before the first step."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    return Memory(jnp.zeros(blocks, jnp.int32), zeros, zeros)


def adam_step(params: Any, slopes: Any, memory: Memory, rate: Float[Array, ""]) -> tuple[Any, Memory]:
    """The parameters after a step, and the memory."""
    count = memory.count + 1
    unbiased = [1 - b**count for b in (B1, B2)]

    def moved(
        x: Float[Array, "..."], mean: Float[Array, "..."], square: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        first, second = (jnp.broadcast_to(c.reshape(c.shape + (1,) * (x.ndim - c.ndim)), x.shape) for c in unbiased)
        # A compiler that sees one divisor for many entries may multiply by its inverse, or not, as it happens to fuse
        # them: then the last bits of a block would depend on which others a step draws.
        second = jax.lax.optimization_barrier(second)
        return x - rate * (mean / (first * (jnp.sqrt(square / second) + EPS)))

    mean = jax.tree.map(lambda g, m: (1 - B1) * g + B1 * m, slopes, memory.mean)
    square = jax.tree.map(lambda g, v: (1 - B2) * g**2 + B2 * v, slopes, memory.square)
    return jax.tree.map(moved, params, mean, square), Memory(count, mean, square)
