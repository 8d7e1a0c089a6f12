"""What a training run's checkpoints say about W ~ W0 + J theta: dimensions beside a random walk's, and harm along J.

The signs of the predictions are written down here, before anything is measured. Unlike the rest of an analysis this
holds the model and all its checkpoints in memory.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from rdopt.calibration.subject import Corpus, Subject
from rdopt.config.errors import UserError
from rdopt.config.progress import Say
from rdopt.config.schema import Config
from rdopt.runs.export import reference_of
from rdopt.study.manifold.dimension import Dimensions, dimensions_of, gram_dimension
from rdopt.study.manifold.tangent import tangent
from rdopt.study.manifold.trajectory import Harm, Trajectory, directions, measure_harm
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


def judge_trajectory(
    subject: Subject, trajectory: Trajectory, config: Config, corpus: Corpus, say: Say
) -> list[Judgement]:
    """The predictions about a training run with what was found.

    The seed of the text draws the noise; at most MAX_TOKENS of its test windows are used; says a line a draw.

    Raises:
        UserError: checkpoints that span nothing.
    """
    short = replace(config.evaluate, max_tokens=min(config.evaluate.max_tokens, MAX_TOKENS))
    reference, seed = reference_of(subject, corpus, replace(config, evaluate=short)), config.text.seed

    def report(done: int) -> None:
        say(f"noise along the run's tangent and across it: draw {done} of {NOISE_DRAWS}")

    try:
        noise = directions(tangent(trajectory.points), trajectory, seed, NOISE_DRAWS)
        estimates = dimension_estimates(dimensions_of(trajectory, seed))
        estimates |= harm_estimates(measure_harm(reference, subject, noise, NOISE_SIZES, report))
    except ValueError as error:
        raise UserError(f"the checkpoints cannot be studied: {error}; name others with --trajectory.") from error
    figure = f"{len(trajectory.names)} checkpoints"
    return [
        Judgement(name, prediction._replace(figure=figure), estimates[name])
        for name, prediction in MANIFOLD_PREDICTIONS.items()
    ]
