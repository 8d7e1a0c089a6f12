"""Room `study`: what weights look like in given coordinates, and what a file, run or folder holds."""

from rdopt.study.inspect import describe, inspect
from rdopt.study.statistics import WeightStatistics, weight_statistics

__all__ = ["WeightStatistics", "describe", "inspect", "weight_statistics"]
