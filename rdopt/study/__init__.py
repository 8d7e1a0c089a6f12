"""Room `study`: what weights look like in given coordinates, and what a file, run or folder holds."""

from rdopt.study.analyze import analyze, report_lines
from rdopt.study.inspect import describe, inspect
from rdopt.study.statistics import WeightStatistics, weight_statistics

__all__ = ["WeightStatistics", "analyze", "describe", "inspect", "report_lines", "weight_statistics"]
