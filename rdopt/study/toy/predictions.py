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


def _figure(arms: Arms, arm: str, name: str) -> float:
    """Bits at the reference SNR, the energy share of the largest 10 % ("top"), or another of the concentration."""
    if name == "bits":
        return arms[arm]["reference_bits"]
    found = arms[arm]["concentration"][name]
    return found[10] if name == "top" else found


def _log_ratio(name: str, arm: str, over: str) -> Callable[[Arms], float]:
    """log2 of a figure of one arm over that of another."""
    return lambda arms: log2(_figure(arms, arm, name) / _figure(arms, over, name))


def _log_least_ratio(name: str) -> Callable[[Arms], float]:
    """log2 of the smallest figure of the rotated arms over Fourier's; nan where one of them has none."""
    return lambda arms: log2(
        float(np.min([_figure(arms, arm, name) for arm in _ROTATED])) / _figure(arms, "fourier", name)
    )


# Claim, sign and figure -> the figure from the arms of one seed; nan where it has none.
TOY_PREDICTIONS: Mapping[Prediction, Callable[[Arms], float]] = {
    Prediction(
        "At 20 dB Fourier coefficients take fewer bits than the MLP", 1, "log2 of bits, MLP over Fourier",
    ): _log_ratio("bits", "mlp", "fourier"),
    Prediction(
        "The signal's energy lies in fewer Fourier coefficients than MLP parameters", 1,
        "log2 of participation, MLP over Fourier",
    ): _log_ratio("participation", "mlp", "fourier"),
    Prediction(
        "Fourier coefficients are more concentrated than the MLP's parameters", 1,
        "energy share of the largest 10 %, Fourier less MLP",
    ): lambda arms: _figure(arms, "fourier", "top") - _figure(arms, "mlp", "top"),
    Prediction(
        "A Hadamard rotation reduces the MLP's outliers", -1, "log2 of kurtosis, rotated over plain",
    ): _log_ratio("kurtosis", "hadamard", "mlp"),
    Prediction(
        "A Hadamard rotation lowers the MLP's largest weight", -1, "log2 of peak over rms, rotated over plain",
    ): _log_ratio("peak", "hadamard", "mlp"),
    Prediction(
        "No rotation of the layers restores Fourier's concentration", 1,
        "energy share of the largest 10 %, Fourier less the best rotation",
    ): lambda arms: _figure(arms, "fourier", "top") - max(_figure(arms, arm, "top") for arm in _ROTATED),
    Prediction(
        "No rotation of the layers restores Fourier's number of effective coefficients", 1,
        "log2 of participation, best rotation over Fourier",
    ): _log_least_ratio("participation"),
    Prediction(
        "No rotation of the layers restores Fourier's size at 20 dB, its price left out", 1,
        "log2 of bits, best rotation over Fourier",
    ): _log_least_ratio("bits"),
    Prediction(
        "A Hadamard rotation saves no bits at 20 dB", 1, "log2 of bits, rotated over plain",
    ): _log_ratio("bits", "hadamard", "mlp"),
    Prediction(
        "Principal axes of the hidden layers save bits at 20 dB, their price left out", -1,
        "log2 of bits, rotated over plain",
    ): _log_ratio("bits", "pca", "mlp"),
    Prediction(
        "Learned axes save bits at 20 dB, their price left out", -1, "log2 of bits, rotated over plain",
    ): _log_ratio("bits", "learned", "mlp"),
    Prediction(
        "Learned axes save bits at 20 dB with their price counted", -1, "log2 of bits, rotated over plain",
    ): _log_ratio("bits", "learned-stored", "mlp"),
}  # fmt: skip


def outcomes(seeds: Sequence[SeedRecord]) -> list[tuple[Prediction, SeedMean, Verdict]]:
    """All predictions with their mean over the seeds and what it makes of the claim."""
    tested = []
    for prediction, measure in TOY_PREDICTIONS.items():
        mean = mean_over_seeds([measure(seed["arms"]) for seed in seeds])
        tested.append((prediction, mean, prediction.verdict(Estimate(mean.mean, mean.error))))
    return tested
