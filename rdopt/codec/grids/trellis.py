"""Trellis-coded quantization: a convolutional code picks which of two interleaved grids each entry uses.

Marcellin and Fischer 1990; entropy-coded, Fischer and Wang 1992; the two grids and the 8-state machine as in
dependent quantization, ISO/IEC 15938-17: grid 0 holds the even multiples of the step, grid 1 zero and the odd
ones. In state s an entry lies on grid s mod 2, and the parity of its index moves the state on:

    value = 2 k - [s odd] sign(k),    s' = next[s, |k| mod 2].

More states come from Ungerboeck's one-dimensional codes (1987, table I); one state is the uniform grid of step 2.
"""

from typing import NamedTuple, no_type_check

import numpy as np
from jaxtyping import Float, Int, Integer

from rdopt.transforms.kernels import kernel

# Parity checks (h0, h1) of Ungerboeck's codes, octal as in his table; 8 states give the standard's machine.
_CODES = {4: (0o5, 0o2), 8: (0o13, 0o04), 16: (0o23, 0o04), 32: (0o45, 0o10), 64: (0o103, 0o024)}
STATES = (1, *_CODES)
SEGMENT = 256  # rows after which a column's machine starts anew, so that segments can run in parallel
# A trellis of this step has the distortion of a scalar grid of step one at high rate: its error is 0.26 of a
# squared step (1.09 dB of granular gain on grids of step two), the scalar grid's 1/12.
TRELLIS_STEP = 0.566
TRELLIS_NOISE = 0.26
TRELLIS_SLOPE = 0.36  # squared steps per bit on the curve D(R) at high rate: 2 ln2 0.26
TRIALS = 3  # magnitudes tried per subset when the rate counts: the nearest and two below it


class RateTerm(NamedTuple):
    """What the rate term of the trellis sees.

    Attributes:
        rows, cols: the class of an entry is rows_i + cols_j.
        bits: (classes, 2, K) code length of |k| on each grid, sign included.
        mu: price of a bit in squared steps; 0 minimises the error alone.
    """

    rows: Int[np.ndarray, " out"]
    cols: Int[np.ndarray, " in"]
    bits: Float[np.ndarray, "classes 2 K"]
    mu: float


class TrellisPath(NamedTuple):
    """A quantized matrix.

    Attributes:
        k: indices.
        values: what they stand for, in steps.
        grids: the grid of every entry.
        targets: what was rounded, the weight and what other entries left over to it; in steps, float32.
    """

    k: Int[np.ndarray, "out in"]
    values: Int[np.ndarray, "out in"]
    grids: Int[np.ndarray, "out in"]
    targets: Float[np.ndarray, "out in"]


def trellis_step(c: float) -> float:
    """The base step of the trellis as the float32 number that encoder and decoder multiply with."""
    return float(np.float32(c) * np.float32(TRELLIS_STEP))


def next_states(states: int) -> Int[np.ndarray, "states 2"]:
    """next[s, parity]: the state after an even or odd index in state s.

    Systematic feedback encoder of the code in observer form: the label's low bit is s mod 2, its high bit the
    parity (inverted on grid 1, where odd indices are the values 1, 5, 9, ...).

    Raises:
        ValueError: a number of states without a code.
    """
    if states == 1:
        return np.zeros((1, 2), np.int64)
    if states not in _CODES:
        raise ValueError(f"{states} states; use one of {', '.join(map(str, STATES))}")
    h0, h1 = _CODES[states]
    s, parity = np.arange(states)[:, None], np.arange(2)[None, :]
    low, high = s % 2, (parity + s) % 2
    return (s >> 1) ^ np.where(high == 1, h1 >> 1, 0) ^ np.where(low == 1, h0 >> 1, 0)


@kernel()
@no_type_check
def subset_index(a: float, subset: int) -> int:
    """The index k >= 0 of a subset (2 grid + parity) whose value is nearest to a >= 0, in steps."""
    if subset == 0:  # values 0, 4, 8, ...
        return 2 * int(np.floor(a / 4 + 0.5))
    if subset == 1:  # 2, 6, 10, ...
        return 2 * int(np.floor(a / 4)) + 1
    if subset == 2:  # 0, 3, 7, 11, ...
        return 0 if a < 1.5 else 2 * int(np.floor((a - 3) / 4 + 0.5)) + 2
    return 2 * int(np.floor(max(a - 1, 0.0) / 4 + 0.5)) + 1  # 1, 5, 9, ...


@kernel()
@no_type_check
def subset_costs(a, bits, mu, costs, indices):
    """Cheapest squared error + mu bits, and its index, in each of the four subsets for a magnitude a."""
    top = bits.shape[1] - 1
    for subset in range(4):
        grid = subset >> 1
        k = subset_index(a, subset)
        e = a - (2 * k - (grid if k > 0 else 0))
        best, index = e * e, k
        if mu > 0.0:
            best += mu * bits[grid, min(k, top)]
            for _ in range(TRIALS - 1):
                k -= 2
                if k < 0:
                    break
                e = a - (2 * k - (grid if k > 0 else 0))
                cost = e * e + mu * bits[grid, min(k, top)]
                if cost < best:
                    best, index = cost, k
        costs[subset] = best
        indices[subset] = index


@kernel()
@no_type_check
def predecessors(step):
    """The two ways into every state, the lower state first: (state before, its subset 2 grid + parity)."""
    states = step.shape[0]
    before, subset = np.empty((states, 2), np.int64), np.empty((states, 2), np.int64)
    ways = np.zeros(states, np.int64)
    for s in range(states):
        for parity in range(2):
            to = step[s, parity]
            before[to, ways[to]], subset[to, ways[to]] = s, 2 * (s & 1) + parity
            ways[to] += 1
    return before, subset


@kernel()
@no_type_check
def viterbi(x, classes, bits, mu, step, start, k):
    """The index sequence of least sum of (x - value)^2 + mu bits(k); the path begins in `start`, its end is free.

    Args:
        x: (T,) float64 targets in steps.
        classes: (T,) rows of `bits`.
        bits: (classes, 2, K) code length of |k| on each grid, sign included; beyond K the last one holds.
        mu: price of a bit in squared steps; 0 minimises the error alone.
        step: next states.
        start: first state.
        k: (T,) int32, receives the signed indices.

    Returns:
        the state after the last entry.
    """
    # Viterbi 1967, Forney 1973: of all paths that reach a state only the cheapest can be the start of the best one, and
    # it comes from one of two states. A branch is a subset of one grid's points; which point of it is decided at once,
    # since only the parity of an index moves the machine on (Ungerboeck 1982; Marcellin and Fischer 1990).
    # Ties go to the lower state, so that every machine writes the same indices.
    length, states = x.shape[0], step.shape[0]
    total, new = np.full(states, np.inf), np.empty(states)
    total[start] = 0.0
    before, subset = predecessors(step)
    second = np.empty((length, states), np.bool_)  # which of its two predecessors a state came from
    indices, costs = np.empty((length, 4), np.int32), np.empty(4)
    for t in range(length):
        subset_costs(abs(x[t]), bits[classes[t]], mu, costs, indices[t])
        for s in range(states):
            a = total[before[s, 0]] + costs[subset[s, 0]]
            b = total[before[s, 1]] + costs[subset[s, 1]]
            second[t, s] = b < a
            new[s] = min(a, b)
        total, new = new, total
    end = np.argmin(total)
    s = end  # back along the kept choices
    for t in range(length - 1, -1, -1):
        choice = int(second[t, s])
        index = indices[t, subset[s, choice]]
        k[t] = index if x[t] >= 0 else -index
        s = before[s, choice]
    return end


@kernel()
@no_type_check
def walk(k, step, start, values, grids):
    """Values and grids of an index sequence, and its last state: the decoder's table walk."""
    s = start
    for t in range(k.shape[0]):
        grid = s & 1
        sign = 1 if k[t] > 0 else (-1 if k[t] < 0 else 0)
        values[t] = 2 * k[t] - grid * sign
        grids[t] = grid
        s = step[s, abs(k[t]) & 1]
    return s


@kernel()
@no_type_check
def _walk_lanes(k, step, segment, values, grids):
    for lane in range(k.shape[0]):
        for low in range(0, k.shape[1], segment):
            part = slice(low, low + segment)
            walk(k[lane, part], step, 0, values[lane, part], grids[lane, part])


def walk_lanes(
    k: Int[np.ndarray, "lanes length"], states: int, segment: int
) -> tuple[Int[np.ndarray, "lanes length"], Integer[np.ndarray, "lanes length"]]:
    """(values in steps, int32; grid of every entry, uint8) of independent lanes.

    Args:
        k: indices, one lane a row.
        states: of the trellis.
        segment: entries after which a lane starts again in state 0.
    """
    values, grids = np.empty(k.shape, np.int32), np.empty(k.shape, np.uint8)
    _walk_lanes(np.ascontiguousarray(k), next_states(states), segment, values, grids)
    return values, grids
