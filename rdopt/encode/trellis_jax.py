"""Trellis quantization with column feedback for accelerators: the algorithm of `columns`, in JAX.

The segments of a column do not depend on one another, so one Viterbi step (Viterbi 1967; Marcellin and Fischer 1990)
takes all segments and states at once; only time within a segment and the columns are walked one by one. On an
accelerator all segments run in parallel, and under `jax.vmap` of `quantize_blocks` all matrices of one shape.
Costs are float64 sums in the order of the kernel of `trellis` and ties fall the same way, so the indices are those of
`quantize_columns`; the sums of the feedback may round elsewhere, which moves a target by an ulp.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rdopt.codec.grids.trellis import SEGMENT, TRIALS, next_states, predecessors
from rdopt.encode.columns import BLOCK, Path, Rates


class Sequences(NamedTuple):
    """What many trellises found: signed indices, values in steps, grids; each (length, sequences)."""

    k: Int[Array, "length sequences"]
    values: Int[Array, "length sequences"]
    grids: Int[Array, "length sequences"]


def branch_costs(
    a: Float[Array, "*shape"],
    classes: Int[Array, "*shape"],
    bits: Float[Array, "classes 2 K"],
    mu: Float[Array, ""],
    trials: int,
) -> tuple[Float[Array, "*shape 4"], Int[Array, "*shape 4"]]:
    """Cheapest squared error + mu bits, and its index, in each of the four subsets for magnitudes a.

    Args:
        a: magnitudes in steps.
        classes: rows of `bits`.
        bits: code length of |k| on each grid, sign included.
        mu: price of a bit in squared steps.
        trials: indices tried per subset: TRIALS with a rate, 1 without.
    """
    nearest = (
        2 * jnp.floor(a / 4 + 0.5),
        2 * jnp.floor(a / 4) + 1,
        jnp.where(a < 1.5, 0.0, 2 * jnp.floor((a - 3) / 4 + 0.5) + 2),
        2 * jnp.floor(jnp.maximum(a - 1, 0.0) / 4 + 0.5) + 1,
    )
    k = jnp.stack(nearest, axis=-1)[..., None] - 2.0 * jnp.arange(trials)
    grid = jnp.array([0, 0, 1, 1])[:, None]
    error = a[..., None, None] - (2 * k - jnp.where(k > 0, grid, 0))
    costs = error * error
    if trials > 1:
        rate = mu * bits[classes[..., None, None], grid, jnp.clip(k, 0, bits.shape[2] - 1).astype(jnp.int32)]
        # The products round before they are added: a fused multiply-add would settle ties in another way.
        costs, rate = jax.lax.optimization_barrier((costs, rate))
        costs = jnp.where(k < 0, jnp.inf, costs + rate)
    best = jnp.argmin(costs, axis=-1)[..., None]
    cost, index = (jnp.take_along_axis(x, best, axis=-1)[..., 0] for x in (costs, k))
    return cost, index.astype(jnp.int32)


def viterbi(
    x: Float[Array, "length sequences"],
    classes: Int[Array, "length sequences"],
    live: Bool[Array, "length sequences"],
    bits: Float[Array, "classes 2 K"],
    mu: Float[Array, ""],
    *,
    states: int,
    trials: int,
) -> Sequences:
    """`trellis.viterbi` of many sequences, each from state 0 to a free end.

    Args:
        x: targets in steps, one sequence a column.
        classes: rows of `bits`.
        live: False behind the end of a sequence shorter than the others.
        bits, mu, trials: see `branch_costs`.
        states: of the trellis.
    """
    before, subset = predecessors(next_states(states))
    costs, indices = branch_costs(jnp.abs(x), classes, bits, mu, trials)

    def forward(total: Array, entry: tuple[Array, Array]) -> tuple[Array, Array]:
        cost, alive = entry
        ways = total[:, before] + cost[:, subset]
        second = ways[..., 1] < ways[..., 0]
        new = jnp.where(second, ways[..., 1], ways[..., 0])
        return jnp.where(alive[:, None], new, total), second

    def backward(state: Array, entry: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        second, index, target, alive = entry
        way = jnp.take_along_axis(second, state[:, None], axis=1)[:, 0].astype(jnp.int32)
        used = jnp.asarray(subset, jnp.int32)[state, way]
        magnitude = jnp.take_along_axis(index, used[:, None], axis=1)[:, 0]
        k = jnp.where(alive, jnp.where(target >= 0, magnitude, -magnitude), 0)
        return jnp.where(alive, jnp.asarray(before, jnp.int32)[state, way], state), (k, used >> 1)

    start = jnp.full((x.shape[1], states), jnp.inf).at[:, 0].set(0.0)
    total, second = jax.lax.scan(forward, start, (costs, live))
    end = jnp.argmin(total, axis=1).astype(jnp.int32)
    _, (k, grids) = jax.lax.scan(backward, end, (second, indices, x, live), reverse=True)
    return Sequences(k, 2 * k - grids * jnp.sign(k), grids)


@partial(jax.jit, static_argnames=("out", "states", "trials"))
def quantize_blocks(
    Y: Float[Array, "in padded"],
    M: Float[Array, "in in"],
    rows: Int[Array, " padded"],
    cols: Int[Array, " in"],
    bits: Float[Array, "classes 2 K"],
    mu: Float[Array, ""],
    *,
    out: int,
    states: int,
    trials: int,
) -> tuple[Array, Array, Array]:
    """Indices, values and grids, each (in, padded), of targets Y; `in` is a multiple of BLOCK.

    Args:
        Y: targets times the pivots of M, one column of the matrix a row, rows beyond `out` are padding.
        M: lower triangular; values_j M_j is what column j takes from the columns before it.
        rows, cols: the class of an entry is rows_i + cols_j.
        bits, mu, trials: see `branch_costs`.
        out: rows of the matrix.
        states: of the trellis.
    """
    width, padded = Y.shape
    segment = min(SEGMENT, padded)
    live = (jnp.arange(padded) < out).reshape(-1, segment).T

    def column(block: Array, entry: tuple[Array, ...]) -> tuple[Array, Sequences]:
        j, pivots, shift = entry
        x, classes = (z.reshape(-1, segment).T for z in (block[j] / pivots[j], rows + shift))
        found = viterbi(x, classes, live, bits, mu, states=states, trials=trials)
        flat = Sequences(*(z.T.reshape(-1) for z in found))
        return block - jax.lax.optimization_barrier(pivots[:, None] * flat.values[None, :]), flat

    def one(Y: Array, low: Array) -> tuple[Array, Sequences]:
        block, M_rows = (jax.lax.dynamic_slice_in_dim(z, low, BLOCK) for z in (Y, M))
        pivots = jax.lax.dynamic_slice_in_dim(M_rows, low, BLOCK, axis=1)
        shifts = jax.lax.dynamic_slice_in_dim(cols, low, BLOCK)
        _, found = jax.lax.scan(column, block, (jnp.arange(BLOCK), pivots, shifts), reverse=True)
        taken = jnp.matmul(M_rows.T, found.values.astype(Y.dtype), precision=jax.lax.Precision.HIGHEST)
        return Y - taken, found

    _, found = jax.lax.scan(one, Y, jnp.arange(0, width, BLOCK), reverse=True)
    return found.k.reshape(Y.shape), found.values.reshape(Y.shape), found.grids.reshape(Y.shape)


def quantize_columns_jax(
    W: Float[np.ndarray, "out in"],
    L: Float[np.ndarray, "in in"],
    row: Float[np.ndarray, " out"],
    col: Float[np.ndarray, " in"],
    rates: Rates,
    states: int,
) -> Path:
    """`columns.quantize_columns` on the default device of JAX, in float64; see there."""
    out, n = W.shape
    Y = ((np.asarray(W, np.float64) / row[:, None]) @ L).T
    front = -n % BLOCK  # columns are taken from the last, so empty ones in front change nothing
    behind = -out % SEGMENT if out > SEGMENT else 0
    M = np.eye(front + n)
    M[front:, front:] = col[:, None] * L
    with jax.enable_x64(True):
        found = quantize_blocks(
            jnp.asarray(np.pad(Y, ((front, 0), (0, behind)))),
            jnp.asarray(M),
            jnp.asarray(np.pad(rates.rows, (0, behind), mode="edge")),
            jnp.asarray(np.pad(rates.cols, (front, 0), mode="edge")),
            jnp.asarray(np.asarray(rates.bits, np.float32), jnp.float64),
            jnp.asarray(float(rates.mu), jnp.float64),
            out=out,
            states=states,
            trials=TRIALS if rates.mu > 0 else 1,
        )
        k, values, grids = (np.asarray(x)[front:, :out].T for x in found)
    return Path(k.astype(np.int32), values.astype(np.int32), grids.astype(np.uint8))
