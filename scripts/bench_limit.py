"""How far real bytes lie above the rate-distortion function: synthetic layers whose limit is known.

Weights are independent Gaussians, the input's second moment has eigenvalues proportional to i^-2, in its eigenbasis
or in a random one. R(D) is reverse water-filling on the eigenvalues (Cover and Thomas, section 10.3); bits are those
of the entropy-coded bytes with tables, spreads, steps and index, and every row is decoded again before it counts.

    python scripts/bench_limit.py --json limit.json

scripts/results/limit.json holds its gaps.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rdopt.codec.coders.bits import BitReader, BitWriter
from rdopt.codec.coders.constriction import pack_lists
from rdopt.codec.grids.steps import exp_steps, log_steps
from rdopt.codec.grids.trellis import TRELLIS_SLOPE
from rdopt.codec.streams.paths import pack_trellis, unpack_trellis
from rdopt.codec.tables.classes import pack_spreads, rank1_spreads
from rdopt.codec.tables.trellis import fit_plan, rates_of, starting_plan
from rdopt.encode.columns import quantize_columns

_OUT, _IN = 1024, 512
_TARGETS = (1.0, 2.0, 3.0, 4.0)


class TestedGrid(NamedTuple):
    """States of the trellis (1: uniform grid) and weight of the rate in its decisions."""

    states: int
    rdo: float


_GRIDS = {
    "scalar": TestedGrid(1, 0.0),
    "scalar, rate-aware": TestedGrid(1, 1.0),
    "trellis 8, error only": TestedGrid(8, 0.0),
    "trellis 8": TestedGrid(8, 1.0),
    "trellis 64, error only": TestedGrid(64, 0.0),
    "trellis 64": TestedGrid(64, 1.0),
}


class GaussianLayer(NamedTuple):
    """A synthetic layer: weights, Cholesky factor of the moment, its eigenvalues."""

    W: np.ndarray
    L: np.ndarray
    eigenvalues: np.ndarray


class WaterFill(NamedTuple):
    """A point on the limit: total bits, total distortion, and the level, an active component's distortion."""

    bits: float
    distortion: float
    level: float


def reverse_waterfill(variances: np.ndarray, distortion: float) -> WaterFill:
    """Fewest bits sum_i max(0, log2(v_i / level)) / 2 at a total squared error sum_i min(v_i, level) = D.

    Raises:
        ValueError: for a distortion that is not positive or a negative variance.
    """
    v = np.sort(np.asarray(variances, dtype=np.float64).ravel())
    if not v.size or v[0] < 0:
        raise ValueError("variances must be non-negative, and there must be one")
    if not distortion > 0:
        raise ValueError(f"no finite rate reaches a distortion of {distortion}; it must be positive")
    if distortion >= v.sum():
        return WaterFill(0.0, float(v.sum()), float(v[-1]))
    n = len(v)
    below = np.concatenate([[0.0], np.cumsum(v)])[:-1]  # distortion of the components under the level
    full = below + (n - np.arange(n)) * v  # total distortion when the level stands at v_k
    k = int(np.searchsorted(full, distortion))
    level = (distortion - below[k]) / (n - k)
    return WaterFill(float(np.sum(np.log2(v[k:] / level)) / 2), float(distortion), float(level))


def make_layer(basis: str, out: int, width: int, seed: int) -> GaussianLayer:
    """iid Gaussian weights under a moment with eigenvalues i^-2."""
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((out, width))
    eigenvalues = np.arange(1, width + 1) ** -2.0
    if basis == "eigenbasis":
        return GaussianLayer(W, np.diag(np.sqrt(eigenvalues)), eigenvalues)
    Q = np.linalg.qr(rng.standard_normal((width, width)))[0]
    return GaussianLayer(W, np.linalg.cholesky((Q * eigenvalues) @ Q.T), eigenvalues)


def code(layer: GaussianLayer, grid: TestedGrid, c: float) -> tuple[float, float]:
    """(bits/weight of the bytes, distortion per weight) at a base step; two passes, the first fits the tables."""
    m, n = layer.W.shape
    logs = log_steps(1.0 / np.diagonal(layer.L))
    row, col = np.ones(m), exp_steps(logs).astype(np.float64) * c
    plan = starting_plan([rank1_spreads(layer.W / col)])
    for mu in (0.0, TRELLIS_SLOPE * grid.rdo):
        (rates,) = rates_of(plan, mu)
        path = quantize_columns(layer.W, layer.L, row, col, rates, grid.states)
        plan = fit_plan([path.k], ["columns"], grid.states, [rank1_spreads(path.values)])
    packed = pack_trellis([path.k], ["columns"], plan, grid.states, 1)
    head = BitWriter()
    head.gammas(packed.numbers)
    size = sum(map(len, (packed.codes, packed.tables, pack_spreads(plan.spreads), pack_lists([logs]), head.bytes())))
    (decoded,) = unpack_trellis(packed.codes, packed.tables, plan.spreads, BitReader(head.bytes()), [(m, n)], 1)
    error = (layer.W - decoded.values * col) @ layer.L
    return 8 * (size + 4) / (m * n), float(np.mean(error**2))  # 4 bytes of base step


def at_target(run: Callable[[float], tuple[float, float]], target: float) -> tuple[float, float]:
    """The run whose bits come within 0.005 of the target, by secant steps on log2 of the base step."""
    log_c, slope, last = -target, -1.0, None
    for _ in range(20):
        bits, D = run(2.0**log_c)
        if abs(bits - target) < 0.005:
            return bits, D
        if last is not None and (found := (bits - last[1]) / (log_c - last[0])) < -0.1:
            slope = found
        last = (log_c, bits)
        log_c -= float(np.clip((bits - target) / slope, -3, 3))
    raise RuntimeError(f"no step gives {target} bits/weight")


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--size", type=int, nargs=2, default=(_OUT, _IN), metavar=("OUT", "IN"))
    parser.add_argument("--targets", type=float, nargs="+", default=_TARGETS, help="bits/weight")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rows = []
    print(f"iid Gaussian {args.size[0]} x {args.size[1]}, eigenvalues i^-2; gap of real bytes to R(D), bits/weight")
    print(f"{'basis':12}{'grid':24}" + "".join(f"{t:>8g} bits" for t in args.targets))
    for basis in ("eigenbasis", "random"):
        layer = make_layer(basis, args.size[0], args.size[1], args.seed)
        for name, grid in _GRIDS.items():
            cells = []
            for target in args.targets:
                bits, D = at_target(partial(code, layer, grid), target)
                bound = reverse_waterfill(layer.eigenvalues, D * args.size[1]).bits / args.size[1]
                rows.append({"basis": basis, "grid": name, "target": target, "bits": bits, "bound": bound,
                             "gap": bits - bound})  # fmt: skip
                cells.append(f"{bits - bound:13.3f}")
            print(f"{basis:12}{name:24}" + "".join(cells), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
