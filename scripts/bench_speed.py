"""Prints how fast everything is on one core: quantizers, entropy coders, decoding, calibration and training.

Each figure is the median of repeats after a warm-up. Beside it stands what a weight costs in things measured in the
same run, copies of a float32 and multiply-adds of a float32 matrix product, so that machines can be compared, and
how the time grows with the width n of a square matrix: 2.0 is linear in its n^2 weights, 3.0 that of a product.

    python scripts/bench_speed.py --json speed.json

scripts/results/speed.json holds its rates.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when numpy is imported

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from rdopt.align.learn import learn
from rdopt.align.problem import make_problem
from rdopt.calibration.backward import second_moments
from rdopt.calibration.subject import open_subject
from rdopt.checkpoint.families import coded_weights
from rdopt.codec.coders.bits import BitReader, BitWriter
from rdopt.codec.coders.constriction import decode_indices, encode_indices
from rdopt.codec.coders.order import walked_lanes
from rdopt.codec.coders.rans import Blank, Lanes
from rdopt.codec.coders.registry import CODERS
from rdopt.codec.decoder import decode_model
from rdopt.codec.grids.steps import dequantize
from rdopt.codec.grids.trellis import SEGMENT, TRELLIS_SLOPE, TRELLIS_STEP, RateTerm, TrellisPath, next_states
from rdopt.codec.streams.paths import pack_trellis, unpack_trellis
from rdopt.codec.tables.classes import rank1_spreads
from rdopt.codec.tables.trellis import fit_plan, rates_of, starting_plan
from rdopt.codec.tables.uniform import choose_plan, table_classes
from rdopt.config.load import load_config
from rdopt.config.schema import Config
from rdopt.encode.columns import quantize_columns
from rdopt.encode.feedback import quantize_feedback
from rdopt.encode.model import encode_model
from rdopt.encode.source import make_source
from rdopt.encode.wavefront import quantize_wavefront
from rdopt.evaluate.divergence import compare
from rdopt.runs.export import reference_of
from rdopt.transforms.aligned import Aligned
from rdopt.transforms.bases import starting_gauges

ONE_SIDED, TWO_SIDED = (256, 512, 1024, 2048, 4096), 4096
_STEP = 0.5  # base step in standard deviations of the weights: about 3 bits/weight
_PATIENCE = 20.0  # seconds after which no more repeats begin


class Row(NamedTuple):
    """One figure: seconds for n^2 weights; growth is the exponent of n since the size before."""

    name: str
    n: int
    seconds: float
    growth: float | None

    def per_second(self) -> float:
        """Weights per second."""
        return self.n**2 / self.seconds


class Matrix(NamedTuple):
    """A matrix to quantize with its metrics and steps; see `quantize_wavefront`."""

    W: Float[np.ndarray, "n n"]
    L: Float[np.ndarray, "n n"]
    M: Float[np.ndarray, "n n"]
    row: Float[np.ndarray, " n"]
    col: Float[np.ndarray, " n"]
    rates: RateTerm


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Keeps this thread, and those it starts, on one core where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def median_seconds(work: Callable[[], Any], repeats: int) -> float:
    """Median wall time of `work` after one warm-up call."""
    begun = time.perf_counter()
    jax.block_until_ready(work())
    end = begun + _PATIENCE
    times = []
    while len(times) < repeats and not (times and time.perf_counter() > end):
        begun = time.perf_counter()
        jax.block_until_ready(work())
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def references(repeats: int) -> dict[str, float]:
    """What the figures are compared with."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal(1 << 24, np.float32)
    target = np.empty_like(values)
    square = rng.standard_normal((1024, 1024), np.float32)
    return {
        "float32 copies/s": values.size / median_seconds(lambda: np.copyto(target, values), 10 * repeats),
        "multiply-adds/s": 1024**3 / median_seconds(lambda: square @ square, 10 * repeats),
    }


def random_matrix(n: int) -> Matrix:
    """Gaussian weights under triangular factors whose off-diagonal entries matter."""
    rng = np.random.default_rng(n)
    L, M = (np.tril(0.5 * rng.standard_normal((n, n)) / np.sqrt(n), -1) + np.eye(n) for _ in range(2))
    W, row, col = rng.standard_normal((n, n)), np.ones(n), np.full(n, _STEP * TRELLIS_STEP)
    plan = starting_plan([rank1_spreads(W / np.outer(row, col))])
    (rates,) = rates_of(plan, 0.4 * TRELLIS_SLOPE)
    return Matrix(W, L, M, row, col, rates)


def quantizers(x: Matrix) -> dict[str, Callable[[], Any]]:
    """The quantizers that are timed at this size."""
    n, one_sided = len(x.W), (x.W, x.L, x.row, x.col, x.rates)
    works: dict[str, Callable[[], Any]] = {}
    works["scalar feedback"] = lambda: quantize_feedback(x.W, x.L, x.row, x.col / TRELLIS_STEP)
    for states in (8, 64):
        works[f"trellis columns, {states} states"] = lambda states=states: quantize_columns(*one_sided, states)
        if n <= TWO_SIDED:
            works[f"trellis wavefront, {states} states"] = lambda states=states: quantize_wavefront(
                x.W, x.L, x.M, x.row, x.col, x.rates, states
            )
    return works


def coders(x: Matrix) -> dict[str, Callable[[], Any]]:
    """Entropy coders on the indices of this matrix, and decoding to weights."""
    path = quantize_columns(x.W, x.L, x.row, x.col, x.rates, 8)
    works = {**_scalar_coder(quantize_feedback(x.W, x.L, x.row, x.col / TRELLIS_STEP)), **_trellis_coders(path)}
    plan = fit_plan([path.k], ["columns"], 8, [rank1_spreads(path.values)])
    packed = pack_trellis([path.k], ["columns"], plan, 8, 1)
    head, exponents = BitWriter(), np.zeros(len(x.W), np.int32)
    head.gammas(packed.numbers)

    def decode() -> Any:
        index = BitReader(head.bytes())
        (found,) = unpack_trellis(packed.codes, packed.tables, plan.spreads, index, [path.k.shape], 1)
        return dequantize(found.values, exponents, exponents, _STEP)

    return {**works, "streams to weights": decode}


def _scalar_coder(z: Any) -> dict[str, Callable[[], Any]]:
    plan = choose_plan([z])
    classes = table_classes(plan.spreads[0], plan.width)
    data = encode_indices(z, classes, plan.tables)
    return {
        "scalar grid, constriction, encode": lambda: encode_indices(z, classes, plan.tables),
        "scalar grid, constriction, decode": lambda: decode_indices(data, classes, plan.tables),
    }


def _trellis_coders(path: TrellisPath) -> dict[str, Callable[[], Any]]:
    plan = fit_plan([path.k], ["columns"], 8, [rank1_spreads(path.values)])
    k, grids, step = *walked_lanes(path.k, "columns", 8), next_states(8)
    lanes = Lanes(k, plan.tables_of(0, plan.keys(), "columns"), grids)
    works: dict[str, Callable[[], Any]] = {}
    for name, kind in CODERS.items():
        coder, blank = kind(plan.coder()), Blank(np.empty_like(lanes.k), lanes.classes, SEGMENT)
        data = coder.encode([lanes])
        works[f"trellis, {name}, encode"] = lambda coder=coder: coder.encode([lanes])
        works[f"trellis, {name}, decode"] = lambda coder=coder, data=data, blank=blank: coder.decode(
            data, [blank], step
        )
    return works


def kernel_rows(sizes: Sequence[int], repeats: int) -> Iterator[Row]:
    """All figures of all sizes, a size at a time."""
    last: dict[str, Row] = {}
    for n in sorted(sizes):
        x = random_matrix(n)
        for works in (quantizers(x), coders(x)):
            for name, work in works.items():
                seconds, before = median_seconds(work, repeats), last.get(name)
                growth = before and float(np.log(seconds / before.seconds) / np.log(n / before.n))
                last[name] = Row(name, n, seconds, growth)
                yield last[name]


def step_seconds(config: Config, subject: Any, moments: Any, tokens: np.ndarray) -> float:
    """Median time of a training step after the first two."""
    problem, settings = make_problem(subject, moments, config)
    start = starting_gauges(config.train.init, subject.params, subject.arch, moments)
    stamps: list[float] = []
    learn(
        problem,
        settings,
        tokens,
        start,
        config.train,
        devices=jax.local_devices(),
        report=lambda _: stamps.append(time.perf_counter()),
    )
    return statistics.median(np.diff(stamps)[1:])


def model_figures(config: Config, repeats: int, steps: int) -> dict[str, float]:
    """Figures of a whole model, per second; training only if there are steps to time."""
    subject, corpus = open_subject(config)
    arch = subject.arch
    tokens = corpus.calibration[:32]
    moments = second_moments(subject.params, arch, tokens)
    calibration = median_seconds(lambda: second_moments(subject.params, arch, tokens), repeats)
    weights = coded_weights(subject.arch)
    source = make_source(Aligned(subject=subject, moments=moments), config.encode)
    lam = config.train.lam
    data = encode_model(source, lam, config.encode).data
    reference = reference_of(subject, corpus, config)
    scored = float(reference.counts.sum())
    training = {"training steps/s": 1 / step_seconds(config, subject, moments, corpus.calibration)} if steps else {}
    return {
        "calibration tokens/s": tokens.size / calibration,
        **training,
        "evaluation tokens/s": scored / median_seconds(lambda: compare(reference, subject.params, arch), repeats),
        "encode weights/s": weights / median_seconds(lambda: encode_model(source, lam, config.encode), repeats),
        "decode weights/s": weights / median_seconds(lambda: decode_model(data, threads=1), repeats),
    }


def print_row(row: Row, base: Mapping[str, float]) -> None:
    """One line of the table."""
    rate, growth = row.per_second(), "" if row.growth is None else f"n^{row.growth:.1f}"
    costs = [base[name] / rate for name in ("float32 copies/s", "multiply-adds/s")]
    print(f"{row.name:36s} {row.n:5d} {rate / 1e6:9.2f} {costs[0]:10.1f} {costs[1]:14.0f} {growth:>7s}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, and writes JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=ONE_SIDED,
                        help=f"widths of square matrices (two-sided up to {TWO_SIDED})")
    parser.add_argument("--model", default="demo", help="a model for the second table, or none")
    parser.add_argument("--config", type=Path, default=None)
    parser.add_argument("--steps", type=int, default=12, help="training steps to time; 0: none")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args(argv)
    with one_core():
        base = references(args.repeats)
        print(", ".join(f"{value / 1e6:,.0f} M {name}" for name, value in base.items()))
        print(f"{'on one core':36s} {'n':>5s} {'M wgt/s':>9s} {'= copies':>10s} {'= multiply-adds':>14s} {'grows':>7s}")
        rows = []
        for row in kernel_rows(args.sizes, args.repeats):
            rows.append(row)
            print_row(row, base)
        figures: dict[str, float] = {}
        if args.model != "none":
            overrides = [("model", args.model), ("train.steps", str(max(args.steps, 1))), ("encode.threads", "1")]
            config = load_config(args.config, [*overrides, ("evaluate.max_tokens", "16384")])
            figures = model_figures(config, args.repeats, args.steps)
            for name, value in figures.items():
                print(f"{name:36s} {value:14,.1f}")
    if args.json is not None:
        table = [{**row._asdict(), "weights_per_second": row.per_second()} for row in rows]
        out = {"references": base, "rows": table, "model": figures}
        args.json.write_text(json.dumps(out, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
