"""Predictions with a sign, and what a measurement makes of them: supported or refuted beyond two standard errors.

A claim and the sign of its figure are written down before the figure is measured.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rdopt.evaluate.perplexity import per_token

Verdict = Literal["supported", "refuted", "undecided"]
BEYOND = 2.0  # standard errors


class Estimate(NamedTuple):
    """A measured figure and its standard error, in the same units."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:+.4f} +- {self.error:.4f}"


class Prediction(NamedTuple):
    """A claim that a figure (what is measured, with its unit) lies above (+1) or below zero (-1)."""

    claim: str
    sign: Literal[-1, 1]
    figure: str = ""

    def verdict(self, estimate: Estimate, least: float = 0.0) -> Verdict:
        """Supported or refuted when the figure lies beyond two standard errors; an unknown error decides nothing.

        Neither does a figure below `least`, what rounding alone could make of it.
        """
        value, error = estimate
        if not abs(value) > max(BEYOND * error, least) or np.isnan(error):
            return "undecided"
        return "supported" if self.sign * value > 0 else "refuted"


class Judgement(NamedTuple):
    """A named prediction beside the figure that was measured."""

    name: str
    prediction: Prediction
    estimate: Estimate

    @property
    def expected(self) -> str:
        """Which side of zero the claim puts the figure on."""
        return "above 0" if self.prediction.sign > 0 else "below 0"

    @property
    def verdict(self) -> Verdict:
        """What the figure makes of the claim."""
        return self.prediction.verdict(self.estimate)

    def to_json(self) -> Mapping[str, Any]:
        """One line of a summary."""
        return {
            "name": self.name,
            "claim": self.prediction.claim,
            "figure": self.prediction.figure,
            "predicted": self.expected,
            "value": self.estimate.value,
            "error": self.estimate.error,
            "verdict": self.verdict,
        }


def mean_of(values: Float[np.ndarray, " m"]) -> Estimate:
    """Mean and its standard error; nan for one value."""
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return Estimate(float(np.mean(values)), float(error))


def jackknife(figure: Callable[[Float[np.ndarray, "..."]], float], parts: Float[np.ndarray, "m ..."]) -> Estimate:
    """A function of a sum, and its standard error over the parts of the sum (Tukey 1958); nan for one part."""
    total, m = parts.sum(axis=0), len(parts)
    without = np.array([figure(total - part) for part in parts]) if m > 1 else np.array([np.nan])
    error = np.sqrt((m - 1) / m * np.sum((without - without.mean()) ** 2))
    return Estimate(figure(total), float(error))


def log_ratio_of_sums(a: Float[np.ndarray, "seeds n"], b: Float[np.ndarray, "seeds n"]) -> Estimate:
    """ln(sum a / sum b) of two networks' KL sums by seed of the noise and sequence.

    Its error is that of the delta method over sequences and, where there are several, over seeds.
    """
    sequences = a.sum(axis=0) / a.sum() - b.sum(axis=0) / b.sum()
    variance = float(np.sum(sequences**2))
    if len(a) > 1:
        variance += mean_of(np.log(a.sum(axis=1) / b.sum(axis=1))).error ** 2
    return Estimate(float(np.log(a.sum() / b.sum())), variance**0.5)


def mean_log_ratio(
    a: Float[np.ndarray, "sizes draws N"], b: Float[np.ndarray, "sizes draws N"], counts: Int[np.ndarray, " N"]
) -> Estimate:
    """Mean over sizes of ln(sum a / sum b), with its error over draws and over sequences (delta method).

    Of sums over the tokens of a sequence, above zero on average, of the same draws on the same sequences. Draws and
    sequences are crossed, so their variances add up; what is left over counts twice, on the safe side.
    """
    tokens = int(counts.sum())
    means = [x.sum(axis=(1, 2), keepdims=True) / (x.shape[1] * tokens) for x in (a, b)]
    value = float(np.mean(np.log(means[0] / means[1])))
    influence = np.mean(a / means[0] - b / means[1], axis=0)
    by_draw = mean_of(influence.sum(axis=1) / tokens).error
    by_sequence = per_token(influence.mean(axis=0), counts)[1]
    return Estimate(value, float(np.hypot(by_draw, by_sequence)))
