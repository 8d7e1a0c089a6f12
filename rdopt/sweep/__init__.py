"""Room `sweep`: files at many slopes, curves, Pareto fronts, gains at equal KL, plots."""

from rdopt.sweep.arms import ARMS
from rdopt.sweep.curves import Curve, bd_rate, pareto, saved_bits, saved_bits_with_error
from rdopt.sweep.evaluate import evaluate, load_candidate, measure_file
from rdopt.sweep.points import Bench, Point, load_point, measure_point, save_point
from rdopt.sweep.report import curve_csv, curve_json, dumps, gain_table, gains, point_table
from rdopt.sweep.sweep import sweep

__all__ = [
    "ARMS",
    "Bench",
    "Curve",
    "Point",
    "bd_rate",
    "curve_csv",
    "curve_json",
    "dumps",
    "evaluate",
    "gain_table",
    "gains",
    "load_candidate",
    "load_point",
    "measure_file",
    "measure_point",
    "pareto",
    "point_table",
    "save_point",
    "saved_bits",
    "saved_bits_with_error",
    "sweep",
]
