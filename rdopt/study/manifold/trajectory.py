"""Checkpoints of a training run as points in the space of a network's coded matrices, and the harm of noise there."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rdopt.calibration.subject import Subject, load_subject
from rdopt.checkpoint.families import MATRICES, Architecture
from rdopt.config.errors import UserError
from rdopt.evaluate.divergence import Reference, compare
from rdopt.operator.params import Params
from rdopt.study.manifold.tangent import (
    across,
    across_in_total,
    along,
    matrix_bases,
    random_tangent,
    rotated_at_random,
)

NOISE_ARMS = ("along", "along, turned", "across", "across in total", "control along", "control across")


class Trajectory(NamedTuple):
    """The last checkpoints of a run.

    Attributes:
        points: (k, N), float64, in order of time; matrices of one kind follow each other, layer by layer.
        starts: where each matrix begins.
        shapes: (out, in) of each matrix.
        names: of the checkpoints' folders.
    """

    points: Float[np.ndarray, "k N"]
    starts: Int[np.ndarray, " m"]
    shapes: tuple[tuple[int, int], ...]
    names: tuple[str, ...]

    @property
    def sizes(self) -> Int[np.ndarray, " m"]:
        """Entries of each matrix."""
        return np.prod(self.shapes, axis=1)


class Harm(NamedTuple):
    """KL of noisy models: by arm that of each sequence, summed over its tokens, nats; and how many these are."""

    sums: Mapping[str, Float[np.ndarray, "sizes draws N"]]
    counts: Int[np.ndarray, " N"]

    def mean(self, arm: str) -> Float[np.ndarray, "sizes draws"]:
        """Nats/token of every draw."""
        return self.sums[arm].sum(axis=2) / self.counts.sum()


def vector_of(params: Params) -> Float[np.ndarray, " N"]:
    """All coded matrices of a network in one vector, float64."""
    return np.concatenate([np.asarray(params["blocks"][k], np.float64).ravel() for k in MATRICES])


def params_of(vector: Float[np.ndarray, " N"], params: Params) -> Params:
    """A network with the matrices of a vector, float32, and everything else from `params`."""
    shapes = {k: (len(params["blocks"][k]), *params["blocks"][k][0].shape) for k in MATRICES}
    parts = np.split(vector, np.cumsum([math.prod(shape) for shape in shapes.values()])[:-1])
    own = {k: x.reshape(shape).astype(np.float32) for (k, shape), x in zip(shapes.items(), parts, strict=True)}
    return {**params, "blocks": {**params["blocks"], **own}}


def read_trajectory(steps: Path, subject: Subject, last: int | None = None) -> Trajectory:
    """Reads the folders step-* that train_demo_lm.py --keep-checkpoints leaves, in order, all or the last few.

    Raises:
        UserError: fewer than three checkpoints, another network, or a subject that is not the last of them.
    """
    folders = sorted(steps.glob("step-*"))[-(last or 0) :]
    if len(folders) < 3:
        raise UserError(f"{steps} gives {len(folders)} checkpoints step-*, but a tangent needs at least 3: train with "
                        "--keep-checkpoints and a smaller --save-every, or raise --last.")
    points = np.stack([_point(folder, subject.arch) for folder in folders])
    # The model is the last checkpoint, perhaps rounded: nearer to it than to any other, and than the run is long.
    away = np.linalg.norm(points - vector_of(subject.params), axis=1)
    extent = np.linalg.norm(points - points[-1], axis=1).max()
    nearest = int(np.argmin(away[::-1]))
    if nearest != 0 or away[-1] > extent / 2:
        raise UserError(f"the model lies {away[-1]:.3g} from {folders[-1]}, {away.min():.3g} from "
                        f"{folders[-1 - nearest].name}, on a run of extent {extent:.3g}: name the model that this run "
                        "ended with, or its last checkpoint.")
    shapes = tuple(W.shape for k in MATRICES for W in subject.params["blocks"][k])
    sizes = np.prod(shapes, axis=1)
    return Trajectory(points, np.cumsum(sizes) - sizes, shapes, tuple(x.name for x in folders))


def _point(folder: Path, arch: Architecture) -> Float[np.ndarray, " N"]:
    checkpoint = load_subject(folder)
    if checkpoint.arch != arch:
        raise UserError(f"{folder} holds another network ({checkpoint.arch}) than the model ({arch}): name the "
                        "checkpoints of the model's own run.")
    return vector_of(checkpoint.params)


def directions(
    J: Float[np.ndarray, "N d"], run: Trajectory, seed: int, draws: int
) -> Iterator[Mapping[str, Float[np.ndarray, " N"]]]:
    """Draws of noise of norm one of every arm, J the orthonormal tangent of the run.

    In one draw "across" and "along, turned" have the norm per matrix of its "along", "across in total" only the sum.
    The seed is that of all draws and of the control's random tangent.
    """
    starts, bases = run.starts, matrix_bases(J, run.starts)
    control = random_tangent(J, starts, np.random.default_rng((seed, 0)))
    control_bases = matrix_bases(control, starts)
    for draw in range(1, draws + 1):
        rng = np.random.default_rng((seed, draw))
        inside, outside = along(J, rng), along(control, rng)
        yield {
            "along": inside,
            "along, turned": rotated_at_random(inside, run.shapes, starts, rng),
            "across": across(bases, inside, starts, rng),
            "across in total": across_in_total(J, rng),
            "control along": outside,
            "control across": across(control_bases, outside, starts, rng),
        }


def measure_harm(
    reference: Reference,
    subject: Subject,
    noise: Iterator[Mapping[str, Float[np.ndarray, " N"]]],
    sizes: Sequence[float],
    report: Callable[[int], None],
) -> Harm:
    """KL(original || noisy) of every arm, size and draw on the same sequences.

    Args:
        reference, subject: the original, on its test text.
        noise: draws of `directions`.
        sizes: norm of the noise over that of all matrices together.
        report: called with the number of finished draws.
    """
    origin = vector_of(subject.params)
    whole, draws = float(np.linalg.norm(origin)), []

    def kl(vector: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        return compare(reference, params_of(vector, subject.params), subject.arch).kl_sums

    for done, draw in enumerate(noise, 1):
        draws.append({arm: [kl(origin + size * whole * x) for size in sizes] for arm, x in draw.items()})
        report(done)
    sums = {arm: np.swapaxes(np.array([draw[arm] for draw in draws]), 0, 1) for arm in NOISE_ARMS}
    return Harm(sums, np.asarray(reference.counts))
