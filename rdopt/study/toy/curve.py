"""Bits at a given signal-to-noise ratio between measured points, and means with their standard errors."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Point(NamedTuple):
    """One coded file.

    Attributes:
        snr: dB, of the mean error power at steps near the file's. One grid is one draw of an error with few degrees
            of freedom, and its own SNR scatters by several dB.
        decoded_snr: dB, of what the file itself decodes to.
        bits: of the file, stored axes included.
        ideal: of an ideal entropy coder in its place, side information included.
    """

    snr: float
    decoded_snr: float
    bits: float
    ideal: float


class Mean(NamedTuple):
    """A mean over seeds, its standard error, and over how many; nan where there are too few."""

    mean: float
    error: float
    count: int


def bits_at(points: Sequence[Point], snr: float) -> float:
    """Bits at an SNR, linear in dB between the points that no smaller file reaches; nan beyond their range.

    At high rate bits are linear in dB: one bit a coefficient for 6.02 dB.
    """
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.bits, -p.snr)):
        if not front or point.snr > front[-1].snr:
            front.append(point)
    if not front:
        return float("nan")
    x, y = [p.snr for p in front], [p.bits for p in front]
    return float(np.interp(snr, x, y, left=np.nan, right=np.nan))


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and standard error of the values that are not nan."""
    known = np.array([v for v in values if not np.isnan(v)], np.float64)
    if not len(known):
        return Mean(float("nan"), float("nan"), 0)
    error = known.std(ddof=1) / np.sqrt(len(known)) if len(known) > 1 else np.nan
    return Mean(float(known.mean()), float(error), len(known))
