"""Extrapolation of a few measured points by a constant or a line, with its standard error (least squares)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

# A slope has to be this sure before it is followed: one asks for many at a time, and far beyond the points.
CONFIDENCE = 0.99


class Extrapolation(NamedTuple):
    """A prediction.

    Attributes:
        value, error: of one new point, and its standard error: the scatter of the points and of their fit.
        slope, slope_error: of the line, whether or not it was used.
    """

    value: float
    error: float
    slope: float
    slope_error: float


def extrapolate(x: Sequence[float], y: Sequence[float], at: float) -> Extrapolation:
    """a + s (x - mean x) where the slope differs from zero by Student's test at CONFIDENCE, else the mean.

    Args:
        x: at least three abscissas, not all alike.
        y: the measured values.
        at: the abscissa of the prediction.
    """
    t, values, count = np.asarray(x, float) - np.mean(x), np.asarray(y, float), len(x)
    spread, mean = float(np.sum(t**2)), float(np.mean(values))
    slope = float(np.sum(t * values)) / spread
    residual = float(np.sum((values - mean - slope * t) ** 2)) / (count - 2)
    slope_error, away = (residual / spread) ** 0.5, at - float(np.mean(x))
    if abs(slope) > student.ppf((1 + CONFIDENCE) / 2, count - 2) * slope_error:
        error = (residual * (1 + 1 / count + away**2 / spread)) ** 0.5
        return Extrapolation(mean + slope * away, error, slope, slope_error)
    scatter = float(np.var(values, ddof=1))
    return Extrapolation(mean, (scatter * (1 + 1 / count)) ** 0.5, slope, slope_error)
