"""What a training run's checkpoints say about W ~ W0 + J theta: dimensions beside a random walk's, and harm along J.

The signs of the predictions are written down here, before anything is measured.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from rdopt.study.manifold.manifold import difference_grams, gram_dimension, step_grams
from rdopt.study.manifold.random_walk import difference_gram_of_steps, sampled_step_grams
from rdopt.study.manifold.trajectory import Harm, Trajectory
from rdopt.study.predictions import Estimate, Prediction, jackknife, log_ratio

SIZES = (0.02, 0.05, 0.1)  # norm of the noise over that of the weights
DRAWS = 8
PREDICTIONS: Mapping[str, Prediction] = {
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


class Dimensions(NamedTuple):
    """Gram matrices of every coded matrix: differences from the last checkpoint and steps, of the run and of a walk."""

    differences: Float[np.ndarray, "m k k"]
    steps: Float[np.ndarray, "m k k"]
    walk_differences: Float[np.ndarray, "m k k"]
    walk_steps: Float[np.ndarray, "m k k"]


def dimensions_of(run: Trajectory, seed: int) -> Dimensions:
    """The run beside a random walk of the same steps."""
    differences = difference_grams(run.points, run.starts)
    steps = step_grams(differences)
    walk = sampled_step_grams(steps, run.sizes, np.random.default_rng((seed, 0)))
    return Dimensions(differences, steps, difference_gram_of_steps(walk), walk)


def dimension_estimates(found: Dimensions) -> dict[str, Estimate]:
    """Log ratios of participation ratios of all matrices together, with their error over matrices."""

    def between(a: np.ndarray, b: np.ndarray) -> Estimate:
        return jackknife(lambda G: math.log(gram_dimension(G[0]) / gram_dimension(G[1])), np.stack([a, b], axis=1))

    half = found.differences.shape[-1] / 2
    return {
        "few": jackknife(lambda G: math.log(gram_dimension(G) / half), found.differences),
        "walk": between(found.differences, found.walk_differences),
        "steps": between(found.steps, found.walk_steps),
    }


def harm_estimates(harm: Harm) -> dict[str, Estimate]:
    """Log ratios of KL, mean over the sizes; "control" compares random directions and should find no difference."""
    return {name: log_ratio(harm.sums[a], harm.sums[b], harm.counts) for name, (a, b) in _PAIRS.items()}
