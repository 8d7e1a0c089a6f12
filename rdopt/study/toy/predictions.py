"""What the signal experiment is expected to show, each with the sign of one figure, and what it shows.

The signs follow the thesis (rotation stabilises, alignment compresses) and were written down before the first figures
were seen. The mean over the seeds decides.
"""

from collections.abc import Callable, Mapping, Sequence
from math import log2
from typing import Any, NamedTuple

import numpy as np

from rdopt.study.predictions import Estimate, Prediction, Verdict, mean_of

Arms = Mapping[str, Mapping[str, Any]]  # the records of one seed, `rdopt.study.toy.experiment.arm_of`, by arm
SeedRecord = Mapping[str, Any]
_ROTATED = ("hadamard", "pca", "learned")


class SeedMean(NamedTuple):
    """A mean over seeds, its standard error, and over how many; nan where there are too few."""

    mean: float
    error: float
    count: int


def mean_over_seeds(values: Sequence[float]) -> SeedMean:
    """Mean and standard error of the values that are not nan."""
    known = np.array([v for v in values if not np.isnan(v)], np.float64)
    if not len(known):
        return SeedMean(float("nan"), float("nan"), 0)
    return SeedMean(*mean_of(known), len(known))


class SeedPrediction(NamedTuple):
    """A prediction about the figure of one seed.

    Attributes:
        prediction: claim, figure and sign.
        measure: the figure from the arms of one seed; nan where it has none.
    """

    prediction: Prediction
    measure: Callable[[Arms], float]


class Outcome(NamedTuple):
    """A tested prediction."""

    prediction: Prediction
    mean: SeedMean

    @property
    def verdict(self) -> Verdict:
        """What the mean over the seeds makes of the claim."""
        return self.prediction.verdict(Estimate(self.mean.mean, self.mean.error))

    @property
    def sentence(self) -> str:
        """Claim, verdict and figure."""
        p, (mean, error, count) = self.prediction, self.mean
        return (
            f"{p.claim}: {self.verdict} ({p.figure} {mean:+.3f} +- {error:.3f}, predicted "
            f"{'positive' if p.sign > 0 else 'negative'}, {count} seeds)."
        )


def _bits(arms: Arms, arm: str) -> float:
    return arms[arm]["reference_bits"]


def _fewest(arms: Arms) -> float:
    return float(np.min([_bits(arms, arm) for arm in _ROTATED]))  # nan where one of them does not reach


def _top(arms: Arms, arm: str) -> float:
    return arms[arm]["concentration"]["top"][10]


def _participation(arms: Arms, arm: str) -> float:
    return arms[arm]["concentration"]["participation"]


def _kurtosis(arms: Arms, arm: str) -> float:
    return arms[arm]["concentration"]["kurtosis"]


def _peak(arms: Arms, arm: str) -> float:
    return arms[arm]["concentration"]["peak"]


TOY_PREDICTIONS = (
    SeedPrediction(
        Prediction("At 20 dB Fourier coefficients take fewer bits than the MLP", 1, "log2 of bits, MLP over Fourier"),
        lambda arms: log2(_bits(arms, "mlp") / _bits(arms, "fourier")),
    ),
    SeedPrediction(
        Prediction(
            "The signal's energy lies in fewer Fourier coefficients than MLP parameters", 1,
            "log2 of participation, MLP over Fourier",
        ),
        lambda arms: log2(_participation(arms, "mlp") / _participation(arms, "fourier")),
    ),
    SeedPrediction(
        Prediction(
            "Fourier coefficients are more concentrated than the MLP's parameters", 1,
            "energy share of the largest 10 %, Fourier less MLP",
        ),
        lambda arms: _top(arms, "fourier") - _top(arms, "mlp"),
    ),
    SeedPrediction(
        Prediction("A Hadamard rotation reduces the MLP's outliers", -1, "log2 of kurtosis, rotated over plain"),
        lambda arms: log2(_kurtosis(arms, "hadamard") / _kurtosis(arms, "mlp")),
    ),
    SeedPrediction(
        Prediction(
            "A Hadamard rotation lowers the MLP's largest weight", -1, "log2 of peak over rms, rotated over plain",
        ),
        lambda arms: log2(_peak(arms, "hadamard") / _peak(arms, "mlp")),
    ),
    SeedPrediction(
        Prediction(
            "No rotation of the layers restores Fourier's concentration", 1,
            "energy share of the largest 10 %, Fourier less the best rotation",
        ),
        lambda arms: _top(arms, "fourier") - max(_top(arms, arm) for arm in _ROTATED),
    ),
    SeedPrediction(
        Prediction(
            "No rotation of the layers restores Fourier's number of effective coefficients", 1,
            "log2 of participation, best rotation over Fourier",
        ),
        lambda arms: log2(min(_participation(arms, arm) for arm in _ROTATED) / _participation(arms, "fourier")),
    ),
    SeedPrediction(
        Prediction(
            "No rotation of the layers restores Fourier's size at 20 dB, its price left out", 1,
            "log2 of bits, best rotation over Fourier",
        ),
        lambda arms: log2(_fewest(arms) / _bits(arms, "fourier")),
    ),
    SeedPrediction(
        Prediction("A Hadamard rotation saves no bits at 20 dB", 1, "log2 of bits, rotated over plain"),
        lambda arms: log2(_bits(arms, "hadamard") / _bits(arms, "mlp")),
    ),
    SeedPrediction(
        Prediction(
            "Principal axes of the hidden layers save bits at 20 dB, their price left out", -1,
            "log2 of bits, rotated over plain",
        ),
        lambda arms: log2(_bits(arms, "pca") / _bits(arms, "mlp")),
    ),
    SeedPrediction(
        Prediction("Learned axes save bits at 20 dB, their price left out", -1, "log2 of bits, rotated over plain"),
        lambda arms: log2(_bits(arms, "learned") / _bits(arms, "mlp")),
    ),
    SeedPrediction(
        Prediction("Learned axes save bits at 20 dB with their price counted", -1, "log2 of bits, rotated over plain"),
        lambda arms: log2(_bits(arms, "learned-stored") / _bits(arms, "mlp")),
    ),
)  # fmt: skip


def outcomes(seeds: Sequence[SeedRecord]) -> list[Outcome]:
    """All predictions tested on the records of all seeds."""
    return [
        Outcome(prediction, mean_over_seeds([measure(seed["arms"]) for seed in seeds]))
        for prediction, measure in TOY_PREDICTIONS
    ]
