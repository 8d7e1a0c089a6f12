"""What a training run's checkpoints say about W ~ W0 + J theta: dimensions beside a random walk's, and harm along J.

The signs of the predictions are written down here, before anything is measured. Unlike the rest of an analysis this
holds the model and all its checkpoints in memory.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rdopt.calibration.subject import Corpus, Subject, load_subject
from rdopt.config.errors import UserError
from rdopt.config.progress import Say
from rdopt.config.schema import Config
from rdopt.runs.export import reference_of
from rdopt.study.manifold.dimension import Dimensions, dimensions_of, gram_dimension
from rdopt.study.manifold.tangent import tangent
from rdopt.study.manifold.trajectory import Harm, Trajectory, directions, measure_harm, read_trajectory
from rdopt.study.predictions import Estimate, Judgement, Prediction, jackknife, mean_log_ratio

NOISE_SIZES = (0.02, 0.05, 0.1)  # norm of the noise over that of the weights
NOISE_DRAWS = 8
MAX_TOKENS = 8192  # of the test text of an analysis; every draw runs 18 networks over them
MANIFOLD_PREDICTIONS: Mapping[str, Prediction] = {
    "few": Prediction("the last checkpoints span fewer dimensions than half their number, ln ratio", -1),
    "walk": Prediction("... and fewer than a random walk with the same steps, ln ratio", -1),
    "steps": Prediction("the steps between them span fewer dimensions than a random walk's, ln ratio", -1),
    "across": Prediction("noise along J harms more than across it, equal norm in every matrix, ln KL ratio", 1),
    "across in total": Prediction("noise along J harms more than across it, equal norm in total, ln KL ratio", 1),
    "turned": Prediction("noise along J harms more than the same singular values turned at random, ln KL ratio", 1),
}
_PAIRS = {
    "across": ("along", "across"),
    "across in total": ("along", "across in total"),
    "turned": ("along", "along, turned"),
    "control": ("control along", "control across"),
}


def dimension_estimates(dimensions: Dimensions) -> dict[str, Estimate]:
    """Log ratios of participation ratios of all matrices together, with their error over matrices."""

    def between(a: np.ndarray, b: np.ndarray) -> Estimate:
        return jackknife(lambda G: math.log(gram_dimension(G[0]) / gram_dimension(G[1])), np.stack([a, b], axis=1))

    half = dimensions.differences.shape[-1] / 2
    return {
        "few": jackknife(lambda G: math.log(gram_dimension(G) / half), dimensions.differences),
        "walk": between(dimensions.differences, dimensions.walk_differences),
        "steps": between(dimensions.steps, dimensions.walk_steps),
    }


def harm_estimates(harm: Harm) -> dict[str, Estimate]:
    """Log ratios of KL, mean over the sizes; "control" compares random directions and should find no difference."""
    return {name: mean_log_ratio(harm.sums[a], harm.sums[b], harm.counts) for name, (a, b) in _PAIRS.items()}


class TrainingRun(NamedTuple):
    """A trained model and the checkpoints that led to it."""

    subject: Subject
    trajectory: Trajectory


def open_training_run(steps: Path, config: Config) -> TrainingRun:
    """Reads the checkpoints of a model's training; see `read_trajectory` for what is refused."""
    subject = load_subject(config.model)
    return TrainingRun(subject, read_trajectory(steps, subject))


def judge_training_run(
    run: TrainingRun, config: Config, corpus: Corpus, say: Say
) -> list[Judgement]:
    """The predictions about a training run with what was found.

    Args:
        run: of `open_training_run`.
        config: its text's seed draws the noise; at most MAX_TOKENS of its test windows are used.
        corpus: the text.
        say: called with a line a draw.

    Raises:
        UserError: checkpoints that span nothing.
    """
    short = replace(config.evaluate, max_tokens=min(config.evaluate.max_tokens, MAX_TOKENS))
    reference = reference_of(run.subject, corpus, replace(config, evaluate=short))

    def report(done: int) -> None:
        say(f"noise along the run's tangent and across it: draw {done} of {NOISE_DRAWS}")

    try:
        J = tangent(run.trajectory.points).J
        noise = directions(J, run.trajectory, config.text.seed, NOISE_DRAWS)
        estimates = dimension_estimates(dimensions_of(run.trajectory, config.text.seed))
        estimates |= harm_estimates(measure_harm(reference, run.subject, noise, NOISE_SIZES, report))
    except ValueError as error:
        raise UserError(f"the checkpoints cannot be studied: {error}; name others with --trajectory.") from error
    figure = f"{len(run.trajectory.names)} checkpoints"
    return [
        Judgement(name, prediction._replace(figure=figure), estimates[name])
        for name, prediction in MANIFOLD_PREDICTIONS.items()
    ]
