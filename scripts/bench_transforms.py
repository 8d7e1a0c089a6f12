"""Prints how fast the trainable transforms, the joint diagonaliser and a training step are.

Times are medians of repeats after a warm-up. Structured rotations and Cayley stand as ratios to a float32 matrix
product of their width, the training step as a ratio to its floor: the multiply-adds of its necessary matrix products at
the rate of a product measured in the same run.

    python scripts/bench_transforms.py --json rotations.json

scripts/results/rotations.json holds its ratios.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads wait busily for each other where cores are shared

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rdopt.align import devices as pool
from rdopt.align.alignment import Alignment, Start, single_precision
from rdopt.align.feed import Feed
from rdopt.align.learn import Constants, compiled_step, first_memories
from rdopt.align.loop import State
from rdopt.align.problem import make_problem
from rdopt.calibration.backward import second_moments
from rdopt.calibration.subject import open_subject
from rdopt.checkpoint.families import MATRICES, Architecture, block_shapes
from rdopt.config.load import load_config
from rdopt.transforms.bases import starting_gauges
from rdopt.transforms.matrices.cayley import (
    block_cayley,
    block_skew_size,
    cayley,
    skew,
    skew_size,
)
from rdopt.transforms.matrices.givens import apply_givens, butterfly, givens_matrix, pair_count, round_robin
from rdopt.transforms.matrices.jacobi import joint_diagonalizer
from rdopt.transforms.stored.rotation import Rotation

_BLOCK_WIDTHS = (16, 32, 64)
_MOMENTS = 35  # as many as five blocks of seven matrices have
_ROUNDS = 2  # of the feedback's fixed point, `rdopt.align.relaxation`
Product = Callable[[Array, Array], Array]


class RotationCost(NamedTuple):
    """Forward and backward of x (n, n) times a rotation, in products of that width: in place, and made dense."""

    name: str
    n: int
    structured: float
    dense: float


class TrainingStep(NamedTuple):
    """A training step by distortion: seconds, floor, their ratio, and XLA's multiply-adds over those counted here."""

    name: str
    seconds: float
    floor: float
    ratio: float
    xla: float


def median_seconds(work: Callable[[], Any], repeats: int) -> float:
    """Median wall time of `work` after one warm-up call."""
    jax.block_until_ready(work())
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        jax.block_until_ready(work())
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def normal(*shape: int) -> Float[Array, "..."]:
    """Gaussian numbers, float32."""
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32)


def product_seconds(n: int, repeats: int) -> float:
    """One float32 product of width n."""
    a, run = normal(n, n), jax.jit(partial(jnp.matmul, precision="highest"))
    return median_seconds(lambda: run(a, a), repeats)


def gradient_seconds(turn: Callable[..., Array], args: Sequence[Array], repeats: int) -> float:
    """Forward and backward of `turn`, whose result is (n, n), in all its arguments."""
    weight = normal(*jax.eval_shape(turn, *args).shape)
    run = jax.jit(jax.value_and_grad(lambda *a: jnp.sum(turn(*a) * weight), argnums=tuple(range(len(args)))))
    return median_seconds(lambda: run(*args), repeats)


def rotations(n: int) -> dict[str, tuple[int, Product, Callable[[Array], Array]]]:
    """By name: number of parameters, application to rows, dense matrix."""
    found: dict[str, tuple[int, Product, Callable[[Array], Array]]] = {}
    layers = butterfly(n)
    for name, pairs in (("butterfly", layers), ("round robin", round_robin(n, len(layers)))):
        apply, dense = partial(apply_givens, pairs=pairs), partial(givens_matrix, pairs=pairs, n=n)
        found[name] = pair_count(pairs), apply, dense
    for block in (b for b in _BLOCK_WIDTHS if b <= n):
        apply = partial(apply_blocks, block=block)
        dense = partial(apply, jnp.eye(n))
        found[f"Cayley in blocks of {block}"] = block_skew_size(n, block), apply, dense
    return found


def apply_blocks(x: Float[Array, "rows n"], theta: Float[Array, " p"], block: int) -> Float[Array, "rows n"]:
    """x Q by the diagonal blocks of Q."""
    full, last = block_cayley(theta, x.shape[1], block)
    return Rotation(blocks=(full, last[None])).apply(x)


def made_dense(dense: Callable[[Array], Array]) -> Product:
    """Application by way of the dense matrix."""
    return lambda x, parameters: jnp.matmul(x, dense(parameters), precision="highest")


def crossings(widths: Sequence[int], repeats: int) -> list[RotationCost]:
    """Every rotation at every width."""
    rows = []
    for n in widths:
        unit, x = product_seconds(n, repeats), normal(n, n)
        for name, (size, apply, dense) in rotations(n).items():
            args = x, 0.1 * normal(size)
            times = [gradient_seconds(turn, args, repeats) / unit for turn in (apply, made_dense(dense))]
            rows.append(RotationCost(name, n, *times))
    return rows


def solved_cayley(theta: Float[Array, " p"], n: int) -> Float[Array, "n n"]:
    """The definition, differentiated by JAX."""
    S, eye = skew(theta, n), jnp.eye(n, dtype=theta.dtype)
    return jnp.linalg.solve(eye + S, eye - S)


def cayley_rows(widths: Sequence[int], repeats: int) -> list[dict[str, float]]:
    """Forward and backward in products: the plain solve and the transform."""
    rows = []
    for n in widths:
        unit, theta = product_seconds(n, repeats), normal(skew_size(n)) / np.sqrt(n)
        ways = {"solve": solved_cayley, "cayley": cayley}
        times = {k: gradient_seconds(partial(f, n=n), [theta], repeats) / unit for k, f in ways.items()}
        rows.append({"n": n, **times})
    return rows


def alike(n: int, count: int) -> Float[np.ndarray, "k n n"]:
    """Moments whose axes differ a little, damped as those of a model are."""
    rng = np.random.default_rng(n)
    shared, C = np.linalg.qr(rng.standard_normal((n, n)))[0], np.empty((count, n, n))
    for k in range(count):
        axes = shared + 0.3 * rng.standard_normal((n, n)) / np.sqrt(n)
        C[k] = (axes * np.exp(rng.standard_normal(n))) @ axes.T
        C[k] += 0.05 * np.trace(C[k]) / n * np.eye(n)
    return C


def joint_rows(widths: Sequence[int]) -> list[dict[str, float]]:
    """Seconds of a sweep and of the whole search, each once."""
    rows = []
    joint_diagonalizer(alike(4, 2), np.ones(2))  # compiles
    for n in widths:
        C, weights = alike(n, _MOMENTS), np.ones(_MOMENTS)
        times = []
        for sweeps in (0, 1, 30):
            begun = time.perf_counter()
            joint_diagonalizer(C, weights, sweeps=sweeps)
            times.append(time.perf_counter() - begun)
        rows.append({"n": n, "sweep": times[1] - times[0], "all": times[2]})
    return rows


def necessary(arch: Architecture, batch: int, length: int, distortion: str) -> dict[str, float]:
    """Multiply-adds of a step's matrix products by purpose, residual and value rotations trained, trellis grid.

    A product of m x n and n x k counts m n k forward, and as much backward for each of its operands that the parameters
    move. A triangular factor or inverse counts n^3 / 6, its gradient the products it is made of; block-diagonal value
    rotations h per entry.
    """
    d, h = arch.hidden_size, arch.head_dim
    shapes, wide = {k: block_shapes(arch)[k] for k in MATRICES}, arch.num_heads * h
    kv, ffn = arch.num_kv_heads * h, arch.ffn_size
    entries = sum(out * n for out, n in shapes.values())
    # The residual rotation stands last for v and first for o: there two operands move, not one.
    fold = 2 * entries * d + kv * d * (d + 2 * h) + 3 * d * wide * h
    moment = 5 * (4 * d**3 + (wide**2 + kv**2) * h)
    inverted = distortion != "matrix"
    moved = 4 * d**3 + wide**3 + kv**3
    factor = (moved + ffn**3) / 3 + (5 if inverted else 3) * moved
    carried = {k: n * out * (n + out) for k, (out, n) in shapes.items()}
    # Of the factors, those of down's inputs and of the outputs of q, k, gate and up stand still.
    turning = sum(out * n * n for k, (out, n) in shapes.items() if k != "down")
    turning += sum(shapes[k][0] ** 2 * shapes[k][1] for k in ("v", "o", "down"))
    parts: dict[str, float] = {
        "fold": fold,
        "moments": moment,
        "factors": factor,
        "feedback": _ROUNDS * (2 * sum(carried.values()) + turning),
    }
    if distortion == "block":
        tokens = batch * length
        parts["errors"] = 2 * sum(carried.values()) + turning + fold + entries * d
        attention = 2 * length * wide
        parts["passes"] = tokens * (4 * (entries + attention) + 2 * attention)
    return {name: arch.num_layers * count for name, count in parts.items()}


def step_row(distortion: str, args: argparse.Namespace) -> TrainingStep:
    """The pmapped step of `rdopt train` on one device, analytic rate."""
    config = load_config(args.config, [("model", args.model), ("train.distortion", distortion)])
    subject, corpus = open_subject(config)
    moments = second_moments(subject.params, subject.arch, corpus.calibration[:8])
    problem, settings = make_problem(subject, moments, config)
    train = replace(config.train, init="pca", blocks=subject.arch.num_layers)
    devices = jax.local_devices()[:1]
    pca = starting_gauges("pca", subject.params, subject.arch, moments)
    start = Start(single_precision(pca, settings.arch))
    module = Alignment(arch=settings.arch, sites=train.sites, rate="analytic")
    key = jax.random.key(0)
    params: Any = module.init(key, start)["params"]
    compiled: Any = compiled_step
    plain = compiled(module, settings, train.steps, train.learning_rate, tuple(devices))
    state = State(params, first_memories(params, settings.arch))
    tokens = corpus.calibration[: train.batch_sequences]
    constants = Constants(start, None, np.float32(train.lam), jax.random.key_data(key))
    states, copies, number = pool.replicate((state, constants, np.int32(0)), devices)
    with ThreadPoolExecutor(1) as thread:
        words = states, copies, *Feed(problem, settings, tokens, train, devices, thread)(0), number
    counted = sum(necessary(settings.arch, len(tokens), tokens.shape[1], distortion).values())
    step = plain.lower(*words).compile()
    # XLA's analysis takes a scan's body once.
    xla = step.cost_analysis()["flops"] / 2 * settings.arch.num_layers
    # Timed beside the step, because the rate is what other work leaves.
    seconds, product = median_seconds(lambda: step(*words), args.repeats), product_seconds(512, 5 * args.repeats)
    floor = counted / 512**3 * product
    return TrainingStep(distortion, seconds, floor, seconds / floor, xla / counted)


def measure_transforms(args: argparse.Namespace) -> dict[str, Any]:
    """All tables, each printed when it is there."""
    rate = 512**3 / product_seconds(512, 3 * args.repeats)
    print(f"{rate / 1e9:.1f} G multiply-adds/s in a product of width 512")
    found: dict[str, Any] = {"multiply-adds/s": rate}
    found["crossings"] = [row._asdict() for row in crossings(args.widths, args.repeats)]
    show("forward and backward, in products", found["crossings"], ("structured", "dense"))
    found["cayley"] = cayley_rows(args.widths, args.repeats)
    show("Cayley forward and backward, in products", found["cayley"], ("solve", "cayley"))
    found["joint"] = joint_rows(args.joint)
    show(f"joint diagonaliser of {_MOMENTS} moments, s", found["joint"], ("sweep", "all"))
    kinds = () if args.model == "none" else ("matrix", "block")
    found["steps"] = [step_row(kind, args)._asdict() for kind in kinds]
    show("training step by distortion, s", found["steps"], ("seconds", "floor", "ratio", "xla"))
    return found


def show(title: str, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """One table: name, width, and the figures in `columns`."""
    print(f"\n{title:42s} {'n':>5s}", *(f"{column:>10s}" for column in columns))
    for row in rows:
        name, n = row.get("name", ""), row.get("n", "")
        print(f"{name:42s} {n!s:>5s}", *(f"{row[column]:10.3f}" for column in columns), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, and writes JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="*", default=(64, 128, 256, 512, 1024, 2048))
    parser.add_argument("--joint", type=int, nargs="*", default=(192, 512, 1024), help="widths of the diagonaliser")
    parser.add_argument("--model", default="demo", help="a model whose training step is timed, or none")
    parser.add_argument("--config", type=Path, default=None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args(argv)
    found = measure_transforms(args)
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
