"""Prints the operational curve of the trellis on Gaussian weights, the table of `rdopt/rate/operational.py`.

Beside each spread (log2, in steps of the scalar grid of equal distortion) stand bits per weight, the entropy of the
index given the grid that its state allows, and the mean squared error in squared steps.

    python scripts/tabulate_trellis.py
"""

import argparse
from collections.abc import Sequence

import numpy as np

from rdopt.codec.grids.trellis import TRELLIS_SLOPE, TRELLIS_STEP, TrellisPath
from rdopt.codec.tables.trellis import fit_plan, rates_of, starting_plan
from rdopt.config.schema import EncodeConfig
from rdopt.encode.columns import quantize_columns
from rdopt.rate.operational import LOG2_SPREADS


def operational_point(log2_spread: float, states: int, rows: int = 1 << 15, columns: int = 24) -> tuple[float, float]:
    """(bits per weight, mean squared error in squared steps) of independent Gaussian weights, rate in the metric."""
    W = np.random.default_rng(0).standard_normal((rows, columns)) * 2.0**log2_spread
    row, col = np.ones(rows), np.full(columns, TRELLIS_STEP)
    spreads = [(np.ones(rows), np.full(columns, 2.0**log2_spread / TRELLIS_STEP))]

    def quantize(plan, mu: float) -> TrellisPath:
        return quantize_columns(W, np.eye(columns), row, col, rates_of(plan, mu)[0], states)

    rough = quantize(starting_plan(spreads), 0.0)
    path = quantize(fit_plan([rough.k], ["columns"], states, spreads), TRELLIS_SLOPE * EncodeConfig().rdo)
    bits = sum(_entropy(path.k[path.grids == grid]) for grid in range(2))
    return bits / W.size, float(np.mean((W - TRELLIS_STEP * path.values) ** 2))


def _entropy(k: np.ndarray) -> float:
    """Bits of all indices at their empirical entropy."""
    _, counts = np.unique(k, return_counts=True)
    return float(-(counts * np.log2(counts / max(1, counts.sum()))).sum())


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=int, default=EncodeConfig().states)
    args = parser.parse_args(argv)
    for log2_spread in LOG2_SPREADS:
        bits, error = operational_point(float(log2_spread), args.states)
        print(f"{log2_spread:+.2f}  {bits:.4f}  {error:.5f}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
