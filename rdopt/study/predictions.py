"""Predictions with a sign, and what a measurement makes of them: supported or refuted beyond two standard errors."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rdopt.evaluate.perplexity import ratio

Verdict = Literal["supported", "refuted", "undecided"]
BEYOND = 2.0  # standard errors


class Estimate(NamedTuple):
    """A measured figure and its standard error, in the same units."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:+.4f} +- {self.error:.4f}"


class Prediction(NamedTuple):
    """A claim that a figure is above (+1) or below (-1) zero, written down before the figure is measured."""

    claim: str
    sign: Literal[-1, 1]

    def verdict(self, found: Estimate) -> Verdict:
        """What the figure makes of the claim."""
        return verdict(self.sign, *found)


def verdict(sign: int, value: float, error: float, least: float = 0.0) -> Verdict:
    """Supported or refuted when a figure lies beyond two standard errors; an unknown error decides nothing.

    Args:
        sign: +1 or -1, what the claim says of the figure.
        value: the figure.
        error: its standard error.
        least: what rounding alone could make of it.
    """
    if not abs(value) > max(BEYOND * error, least) or np.isnan(error):
        return "undecided"
    return "supported" if sign * value > 0 else "refuted"


def mean_of(values: Float[np.ndarray, " m"]) -> Estimate:
    """Mean and its standard error; nan for one value."""
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return Estimate(float(np.mean(values)), float(error))


def jackknife(figure: Callable[[Float[np.ndarray, "..."]], float], parts: Float[np.ndarray, "m ..."]) -> Estimate:
    """A function of a sum, and its standard error over the terms of the sum (Tukey 1958).

    Args:
        figure: of the sum of the parts.
        parts: the terms, at least two for an error.
    """
    total, m = parts.sum(axis=0), len(parts)
    without = np.array([figure(total - part) for part in parts]) if m > 1 else np.array([np.nan])
    error = np.sqrt((m - 1) / m * np.sum((without - without.mean()) ** 2))
    return Estimate(figure(total), float(error))


def log_ratio(
    a: Float[np.ndarray, "sizes draws N"], b: Float[np.ndarray, "sizes draws N"], counts: Int[np.ndarray, " N"]
) -> Estimate:
    """Mean over sizes of ln(sum a / sum b), with its error over draws and over sequences (delta method).

    Draws and sequences are crossed, so their variances add up; what is left over counts twice, on the safe side.

    Args:
        a, b: sums of each sequence, above zero on average, of the same draws on the same sequences.
        counts: tokens of each sequence.
    """
    tokens = int(counts.sum())
    means = [x.sum(axis=(1, 2), keepdims=True) / (x.shape[1] * tokens) for x in (a, b)]
    value = float(np.mean(np.log(means[0] / means[1])))
    influence = np.mean(a / means[0] - b / means[1], axis=0)
    by_draw = mean_of(influence.sum(axis=1) / tokens).error
    by_sequence = ratio(influence.mean(axis=0), counts)[1]
    return Estimate(value, float(np.hypot(by_draw, by_sequence)))
