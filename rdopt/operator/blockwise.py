"""Passes of a network over text that hold one block at a time; the residual stream between blocks lies on the host."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from rdopt.checkpoint.families import Architecture
from rdopt.operator.llama import block, rope_tables
from rdopt.operator.params import read_block

Through = Callable[[Mapping[str, Any], Any, Any, Architecture], Array]


@partial(jax.jit, static_argnames="arch")
def forward(p: Mapping[str, Any], x: Array, rope: Any, arch: Architecture) -> Array:
    """`block`, compiled once for all layers."""
    return block(p, x, rope, arch)


def padded_batches(x: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Equal parts along the first axis, the last one padded with zeros, so that one compilation serves all."""
    for start in range(0, len(x), size):
        part = x[start : start + size]
        yield np.pad(part, ((0, size - len(part)), *((0, 0),) * (x.ndim - 1)))


def run_block(
    p: Mapping[str, Any], x: np.ndarray, arch: Architecture, batch: int, through: Through = forward
) -> np.ndarray:
    """The residual stream behind one block, in x's type.

    Args:
        p: its parameters.
        x: (n, T, d), the stream before it.
        arch: of the network.
        batch: sequences on the device at once.
        through: `forward`, or a program of its own for the same.
    """
    rope, held, out = rope_tables(arch, x.shape[1]), jax.device_put(dict(p)), np.empty_like(x)
    for start, part in zip(range(0, len(x), batch), padded_batches(x, batch), strict=True):
        some = out[start : start + batch]
        some[:] = np.asarray(through(held, part, rope, arch))[: len(some)]
    return out


def streams(
    params: Mapping[str, Any],
    tokens: Int[np.ndarray, "n T"],
    arch: Architecture,
    batch: int,
    through: Through = forward,
) -> Iterator[np.ndarray]:
    """The residual stream (n, T, d) before every block and behind the last one, in the weights' type.

    Args:
        params: a model whose blocks are read when they are indexed, or one in memory.
        tokens: sequences.
        arch: of the model.
        batch: sequences on the device at once.
        through: see `run_block`.
    """
    x = np.asarray(params["embed"])[tokens]
    yield x
    for layer in range(arch.num_layers):
        x = run_block(read_block(params, layer), x, arch, batch, through)
        yield x


def last_stream(
    params: Mapping[str, Any],
    tokens: Int[np.ndarray, "n T"],
    arch: Architecture,
    batch: int,
    through: Through = forward,
) -> np.ndarray:
    """The residual stream (n, T, d) behind the last block; see `streams`."""
    return deque(streams(params, tokens, arch, batch, through), maxlen=1).pop()
