"""Asks a training run whether its weights lie near a manifold of few dimensions that the network's output follows.

The checkpoints that train_demo_lm.py --keep-checkpoints leaves span the tangent J of W ~ W0 + J theta, W all coded
matrices together. Printed: the effective dimension of the differences from the last checkpoint and of the steps
between checkpoints beside those of a random walk with the same steps, which PCA finds low-dimensional, too; and
KL(original || noisy) on held-out text of noise along J and across it, of equal norm in every matrix and in total.
Controls: the same with random directions for J, where along and across must agree; and noise along J whose matrices
keep their singular values behind random rotations of outputs and inputs, which asks whether it is where J points that
harms, or that its matrices have few large singular values. rdopt/study/manifold/hypotheses.py holds the predictions.

    python scripts/train_demo_lm.py --text my_texts/ --tokens 8e6 --keep-checkpoints --out my-model
    python scripts/study_manifold.py --model my-model --steps my-model.steps --text my_texts/ --split-on file \\
        --last 12 --json manifold.json --png manifold.png
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator
from outputs import check_new, exit_code, save_picture, write_json

from rdopt.calibration.subject import open_subject
from rdopt.config.errors import UserError
from rdopt.config.schema import Config, EvaluateConfig, TextConfig
from rdopt.runs.export import reference_of
from rdopt.study.figures import entropy_dimension
from rdopt.study.labels import name_ends
from rdopt.study.manifold.dimension import Dimensions, dimensions_of, gram_dimension, powers
from rdopt.study.manifold.hypotheses import (
    MANIFOLD_PREDICTIONS,
    NOISE_DRAWS,
    NOISE_SIZES,
    dimension_estimates,
    harm_estimates,
)
from rdopt.study.manifold.tangent import norms, tangent
from rdopt.study.manifold.trajectory import NOISE_ARMS, Harm, directions, measure_harm, read_trajectory
from rdopt.study.predictions import Estimate, Prediction, mean_log_ratio

CONTROL = "control: along and across random directions, ln KL ratio"
_DRAWN = {  # arm: colour, line, label
    "along": ("#d55e00", "-", "along"), "along, turned": ("#b08000", "-", "along, turned"),
    "across": ("#0072b2", "-", "across"), "control along": ("#777777", "--", "random"),
}


def dimension_lines(dimensions: Dimensions) -> Iterator[str]:
    """Effective dimensions of run and walk."""
    yield f"{'effective dimension':34s}{'number':>8s}{'participation':>15s}{'entropy':>9s}"
    for name, grams in zip(("differences from the last", "steps", "differences of a random walk",
                            "steps of a random walk"), dimensions, strict=True):
        values = powers(grams.sum(axis=0))
        yield f"{name:34s}{len(values):8d}{gram_dimension(grams.sum(axis=0)):15.3f}{entropy_dimension(values):9.3f}"


def harm_lines(harm: Harm, sizes: Sequence[float]) -> Iterator[str]:
    """KL of every arm at every size, its error over draws, and along over across at that size."""
    yield "KL in nats/token of noise of a norm relative to the weights, mean over draws +- standard error"
    yield f"{'arm':18s}" + "".join(f"{size:>26g}" for size in sizes)
    for arm in NOISE_ARMS:
        mean = harm.mean(arm)
        error = mean.std(axis=1, ddof=1) / math.sqrt(mean.shape[1])
        yield f"{arm:18s}" + "".join(f"{m:14.6f} +- {e:.6f}" for m, e in zip(mean.mean(axis=1), error, strict=True))
    for name, a, b in (("ln along/across", "along", "across"), ("ln along/turned", "along", "along, turned"),
                        ("ln control", "control along", "control across")):
        each = [mean_log_ratio(harm.sums[a][[i]], harm.sums[b][[i]], harm.counts) for i in range(len(sizes))]
        yield f"{name:18s}" + "".join(f"{x!s:>26s}" for x in each)


def prediction_lines(estimates: Mapping[str, Estimate]) -> Iterator[str]:
    """Every prediction with its verdict, then the control."""
    for key, prediction in MANIFOLD_PREDICTIONS.items():
        yield f"{prediction.verdict(estimates[key]):10s} {estimates[key]}  {prediction.claim}"
    yield f"{_control(estimates['control']):10s} {estimates['control']}  {CONTROL}"


def _control(estimate: Estimate) -> str:
    verdict = Prediction(CONTROL, 1).verdict(estimate)
    return "agrees" if verdict == "undecided" and math.isfinite(estimate.error) else "differs"


def draw_study(fig: Any, dimensions: Dimensions, harm: Harm, sizes: Sequence[float]) -> None:
    """Above, both spectra of the trajectory; below, KL over the square of the noise, against its size."""
    top, bottom = fig.subplots(2, 1)
    draw_spectra(top, dimensions)
    ends = []
    for arm, (colour, style, label) in _DRAWN.items():
        curvature = harm.mean(arm) / np.square(sizes)[:, None]
        error = curvature.std(axis=1, ddof=1) / math.sqrt(curvature.shape[1])
        line = curvature.mean(axis=1)
        bottom.errorbar(sizes, line, 2 * error, fmt=f"{style}o", color=colour, markersize=2, linewidth=1, capsize=2)
        ends.append((label, max(sizes), line[np.argmax(sizes)], colour))
    bottom.set(xscale="log", yscale="log", xlabel="norm of the noise over that of the weights",
               ylabel="KL / norm², nats/token (± 2 s.e.)")
    bottom.set_xticks(sizes, [f"{x:g}" for x in sizes])
    bottom.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    bottom.yaxis.set_major_formatter("{x:g}")
    bottom.minorticks_off()
    name_ends(bottom, ends, "right")
    for ax in (top, bottom):
        ax.grid(True, color="#ececec", linewidth=0.5)
        ax.set_axisbelow(True)


def draw_spectra(ax: Any, dimensions: Dimensions) -> None:
    """Squared singular values of the differences and of the steps, dashed those of a random walk."""
    for grams, colour, style, label in (
        (dimensions.walk_steps, "#0072b2", "--", None), (dimensions.walk_differences, "#d55e00", "--", None),
        (dimensions.steps, "#0072b2", "-", "steps between checkpoints"),
        (dimensions.differences, "#d55e00", "-", "differences from the last"),
    ):
        share = powers(grams.sum(axis=0))
        number = np.arange(1, len(share) + 1)
        ax.plot(number, share / share.sum(), f"{style}o", color=colour, markersize=2, linewidth=1)
        if label is not None:
            at = len(share) // 2
            up = label.startswith("steps")
            ax.annotate(label, (number[at], share[at] / share.sum()), (0, 12 if up else -14), color=colour, fontsize=6,
                        textcoords="offset points", ha="left" if up else "right")
    ax.set_title("dashed: a random walk with the same steps", fontsize=6, loc="right", color="#555555")
    ax.set_yscale("log")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel("direction, by its power")
    ax.set_ylabel("share of the squared norm")


def run(args: argparse.Namespace) -> None:
    """Reads, measures, prints, writes."""
    check(args)
    begun = time.perf_counter()
    config = Config(
        model=str(args.model),
        text=TextConfig(sources=tuple(args.text), split_on=args.split_on, seq_len=args.context,
                        calibration_sequences=1),
        evaluate=EvaluateConfig(context=args.context, stride=args.context, max_tokens=args.max_tokens),
    )
    subject, corpus = open_subject(config)
    trajectory = read_trajectory(args.steps, subject, args.last)
    reference = reference_of(subject, corpus, config)
    try:
        J = tangent(trajectory.points)
        noise = directions(J, trajectory, args.seed, args.draws)
        dimensions = dimensions_of(trajectory, args.seed)
        print(f"{args.model}: {len(trajectory.names)} checkpoints, {trajectory.names[0]} to {trajectory.names[-1]}; "
              f"{trajectory.points.shape[1]:,} weights in {len(trajectory.sizes)} matrices; tangent of {J.shape[1]}")
        print(*dimension_lines(dimensions), sep="\n", flush=True)
        harm = measure_harm(reference, subject, noise, args.sizes,
                            lambda done: print(f"draw {done}/{args.draws}", flush=True))
    except ValueError as error:
        raise UserError(f"{args.steps} cannot be studied: {error}; use other checkpoints or fewer (--last).") from error
    estimates = dimension_estimates(dimensions) | harm_estimates(harm)
    print(*harm_lines(harm, args.sizes), *prediction_lines(estimates), sep="\n")
    share = np.square(norms(J, trajectory.starts)).mean(axis=1)
    write_json(args.json, {
        "model": str(args.model), "checkpoints": trajectory.names, "sizes": args.sizes, "draws": args.draws,
        "tokens": int(harm.counts.sum()), "tangent": J.shape[1], "share_of_matrices": share.tolist(),
        "spectra": {k: powers(x.sum(axis=0)).tolist() for k, x in dimensions._asdict().items()},
        "dimension": {k: gram_dimension(x.sum(axis=0)) for k, x in dimensions._asdict().items()},
        "kl": {arm: harm.mean(arm).tolist() for arm in NOISE_ARMS},
        "predictions": {
            k: {"claim": p.claim, "sign": p.sign, **estimates[k]._asdict(), "verdict": p.verdict(estimates[k])}
            for k, p in MANIFOLD_PREDICTIONS.items()
        },
        "control": {**estimates["control"]._asdict(), "verdict": _control(estimates["control"])},
    })
    save_picture(args.png, lambda fig: draw_study(fig, dimensions, harm, args.sizes), height=4.6)
    print(f"{time.perf_counter() - begun:.0f} s")


def check(args: argparse.Namespace) -> None:
    """Refuses settings that cannot be measured.

    Raises:
        UserError: a number out of range, or an output that exists.
    """
    check_new((args.json, args.png))
    if args.draws < 2:
        raise UserError(f"--draws is {args.draws}, but a standard error needs at least 2.")
    if min(args.sizes) <= 0:
        raise UserError(f"--sizes holds {min(args.sizes):g}, but noise must be above 0.")
    if args.last is not None and args.last < 3:
        raise UserError(f"--last is {args.last}, but a tangent needs at least 3 checkpoints.")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study; 0, or 2 after a sentence on standard error."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="the model that the run ended with")
    p.add_argument("--steps", type=Path, required=True, metavar="FOLDER", help="folder of its checkpoints step-*")
    p.add_argument("--text", nargs="+", required=True, metavar="PATH", help="what it was trained on; its test part")
    p.add_argument("--split-on", default="file", choices=("line", "blank", "blank2", "file"))
    p.add_argument("--last", type=int, metavar="N", help="checkpoints from the end; default: all")
    p.add_argument("--sizes", type=float, nargs="+", default=list(NOISE_SIZES), help="of the noise over the weights")
    p.add_argument("--draws", type=int, default=NOISE_DRAWS, help="of the noise")
    p.add_argument("--context", type=int, default=256, help="tokens in a sequence")
    p.add_argument("--max-tokens", type=int, default=8192, help="test tokens")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--json", type=Path, help="also write the figures to this new file")
    p.add_argument("--png", type=Path, help="also draw them into this new file")
    return exit_code(run, p.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
