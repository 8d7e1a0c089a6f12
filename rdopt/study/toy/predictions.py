"""What the signal experiment is expected to show, each with the sign of one figure, and what it shows.

The signs follow the thesis (rotation stabilises, alignment compresses) and were written down before the first figures
were seen. A prediction is supported or refuted when the mean over the seeds lies beyond two standard errors of zero on
its side or on the other, and undecided between.
"""

from collections.abc import Callable, Mapping, Sequence
from math import log2
from typing import Any, NamedTuple

import numpy as np

from rdopt.study.predictions import verdict
from rdopt.study.toy.curve import Mean, mean_of

ROTATED = ("hadamard", "pca", "learned")
Seed = Mapping[str, Any]


class Prediction(NamedTuple):
    """A claim and how it is tested.

    Attributes:
        claim: one clause.
        figure: what is measured, with its unit.
        sign: of the figure if the claim is true.
        measure: the figure of one seed; nan where it has none.
    """

    claim: str
    figure: str
    sign: int
    measure: Callable[[Seed], float]


class Outcome(NamedTuple):
    """A tested prediction; the verdict is supported, refuted or undecided."""

    prediction: Prediction
    found: Mean
    verdict: str

    @property
    def sentence(self) -> str:
        """Claim, verdict and figure."""
        p, found = self.prediction, self.found
        return (
            f"{p.claim}: {self.verdict} ({p.figure} {found.mean:+.3f} +- {found.error:.3f}, predicted "
            f"{'positive' if p.sign > 0 else 'negative'}, {found.count} seeds)."
        )


def _bits(seed: Seed, arm: str) -> float:
    return seed["arms"][arm]["reference_bits"]


def _top(seed: Seed, arm: str) -> float:
    return seed["arms"][arm]["concentration"]["top"][10]


def _fewest(seed: Seed) -> float:
    return float(np.min([_bits(seed, arm) for arm in ROTATED]))  # nan where one of them does not reach


PREDICTIONS = (
    Prediction(
        "At 20 dB Fourier coefficients take fewer bits than the MLP",
        "log2 of bits, MLP over Fourier", +1, lambda s: log2(_bits(s, "mlp") / _bits(s, "fourier")),
    ),
    Prediction(
        "The signal's energy lies in fewer Fourier coefficients than MLP parameters",
        "log2 of participation, MLP over Fourier", +1,
        lambda s: log2(_participation(s, "mlp") / _participation(s, "fourier")),
    ),
    Prediction(
        "Fourier coefficients are more concentrated than the MLP's parameters",
        "energy share of the largest 10 %, Fourier less MLP", +1, lambda s: _top(s, "fourier") - _top(s, "mlp"),
    ),
    Prediction(
        "A Hadamard rotation reduces the MLP's outliers",
        "log2 of kurtosis, rotated over plain", -1,
        lambda s: log2(_kurtosis(s, "hadamard") / _kurtosis(s, "mlp")),
    ),
    Prediction(
        "A Hadamard rotation lowers the MLP's largest weight",
        "log2 of peak over rms, rotated over plain", -1,
        lambda s: log2(_peak(s, "hadamard") / _peak(s, "mlp")),
    ),
    Prediction(
        "No rotation of the layers restores Fourier's concentration",
        "energy share of the largest 10 %, Fourier less the best rotation", +1,
        lambda s: _top(s, "fourier") - max(_top(s, arm) for arm in ROTATED),
    ),
    Prediction(
        "No rotation of the layers restores Fourier's number of effective coefficients",
        "log2 of participation, best rotation over Fourier", +1,
        lambda s: log2(min(_participation(s, arm) for arm in ROTATED) / _participation(s, "fourier")),
    ),
    Prediction(
        "No rotation of the layers restores Fourier's size at 20 dB, its price left out",
        "log2 of bits, best rotation over Fourier", +1, lambda s: log2(_fewest(s) / _bits(s, "fourier")),
    ),
    Prediction(
        "A Hadamard rotation saves no bits at 20 dB",
        "log2 of bits, rotated over plain", +1, lambda s: log2(_bits(s, "hadamard") / _bits(s, "mlp")),
    ),
    Prediction(
        "Principal axes of the hidden layers save bits at 20 dB, their price left out",
        "log2 of bits, rotated over plain", -1, lambda s: log2(_bits(s, "pca") / _bits(s, "mlp")),
    ),
    Prediction(
        "Learned axes save bits at 20 dB, their price left out",
        "log2 of bits, rotated over plain", -1, lambda s: log2(_bits(s, "learned") / _bits(s, "mlp")),
    ),
    Prediction(
        "Learned axes save bits at 20 dB with their price counted",
        "log2 of bits, rotated over plain", -1,
        lambda s: log2(_bits(s, "learned-stored") / _bits(s, "mlp")),
    ),
)  # fmt: skip


def _kurtosis(seed: Seed, arm: str) -> float:
    return seed["arms"][arm]["concentration"]["kurtosis"]


def _participation(seed: Seed, arm: str) -> float:
    return seed["arms"][arm]["concentration"]["participation"]


def _peak(seed: Seed, arm: str) -> float:
    return seed["arms"][arm]["concentration"]["peak"]


def outcomes(seeds: Sequence[Seed]) -> list[Outcome]:
    """All predictions tested on the records of all seeds."""
    tested = [(p, mean_of([p.measure(seed) for seed in seeds])) for p in PREDICTIONS]
    return [Outcome(p, found, verdict(p.sign, found.mean, found.error)) for p, found in tested]
