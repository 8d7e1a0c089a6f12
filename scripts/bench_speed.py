"""Prints a table of speed: calibration tokens/s, training steps/s, encoding and decoding weights/s.

Each figure is the median of repeats after a warm-up, beside a float32 matrix product measured in the same run, so
that machines can be compared.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rdopt.align import coded_weights, learn, make_problem
from rdopt.calibration import open_subject, second_moments
from rdopt.checkpoint import carried_files
from rdopt.codec import decode_model, encode_model, make_source
from rdopt.config import Config, load_config
from rdopt.evaluate import compare
from rdopt.export import reference_of
from rdopt.transforms import starting_gauges


def median_seconds(work: Callable[[], Any], repeats: int) -> float:
    """Median wall time of `work` after one warm-up call."""
    work()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        jax.block_until_ready(work())
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


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


def measure(config: Config, repeats: int) -> dict[str, float]:
    """All figures of the table, rates per second."""
    subject, corpus = open_subject(config)
    arch, checkpoint = subject.arch, subject.checkpoint
    tokens = corpus.calibration[:32]
    moments = second_moments(subject.params, arch, tokens)
    calibration = median_seconds(lambda: second_moments(subject.params, arch, tokens), repeats)
    weights = coded_weights(subject)
    source = make_source(
        subject.params, arch, checkpoint.config, carried_files(checkpoint.folder), moments, config.encode, 1
    )
    lam = config.train.lam
    data = encode_model(source, lam, config.encode).data
    reference = reference_of(subject, corpus, config)
    square = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32)
    product = jax.jit(lambda x: x @ x)
    flops = 2 * 1024**3 / median_seconds(lambda: product(square), 10 * repeats)
    return {
        "calibration tokens/s": tokens.size / calibration,
        "training steps/s": 1 / step_seconds(config, subject, moments, corpus.calibration),
        "evaluation tokens/s": float(reference.counts.sum())
        / median_seconds(lambda: compare(reference, subject.params, arch), repeats),
        "encode weights/s": weights / median_seconds(lambda: encode_model(source, lam, config.encode), repeats),
        "decode weights/s": weights / median_seconds(lambda: decode_model(data), repeats),
        "float32 matrix product GFLOP/s": flops / 1e9,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, and writes JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--config", type=Path, default=None)
    parser.add_argument("--steps", type=int, default=12, help="training steps to time")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args(argv)
    overrides = [("model", args.model), ("train.steps", str(args.steps)), ("evaluate.max_tokens", "16384")]
    config = load_config(args.config, overrides)
    found = measure(config, args.repeats)
    for name, value in found.items():
        print(f"{name:32s} {value:14,.1f}")
    shape = f"{config.train.batch_sequences} x {config.text.seq_len} tokens a training step"
    print(f"{len(jax.local_devices())} x {jax.local_devices()[0].device_kind}, {shape}")
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
