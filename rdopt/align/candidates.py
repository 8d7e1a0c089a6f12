"""Several starting bases and what was learned from each: the best by J is kept, a start itself included."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from rdopt.align.alignment import single_precision
from rdopt.align.learn import Learned
from rdopt.align.objective import Settings, Variables
from rdopt.align.passes import matrix_terms
from rdopt.align.problem import Problem
from rdopt.transforms.gauges.coordinates import Gauges, fixed_records, gauges_of
from rdopt.transforms.stored.rotations import StoredRotations

Cost = Callable[..., float]  # of gauges and, after them, stored rotations or None


class Candidate(NamedTuple):
    """Coordinates, by the name of the start and whether they were learned from it, and their J."""

    name: str
    learned: Learned
    J: float


def relaxed_terms(problem: Problem, settings: Settings, lam: float, gauges: Gauges) -> tuple[float, float]:
    """(R in bits/weight, D in nats/token) of coordinates by the analytic rate, over the moments of all matrices."""
    variables = Variables(single_precision(gauges, settings.arch, ()))
    bits, D = matrix_terms(variables, problem, lam, settings)
    rate, distortion = (sum(float(np.sum(np.asarray(x, np.float64))) for x in part.values()) for part in (bits, D))
    return rate / settings.weights, distortion


def relaxed_J(problem: Problem, settings: Settings, lam: float) -> Cost:
    """J of coordinates in bits/weight by the relaxed terms, stored rotations left aside."""

    def cost(gauges: Gauges, stored: StoredRotations | None = None) -> float:
        rate, distortion = relaxed_terms(problem, settings, lam, gauges)
        return rate + lam * distortion

    return cost


def candidates(starts: Mapping[str, Gauges], learn: Callable[[str, Gauges], Learned], cost: Cost) -> list[Candidate]:
    """Every start and what is learned from it, the best first.

    Args:
        starts: name -> basis.
        learn: from a name and a basis.
        cost: J of coordinates and stored rotations.
    """
    ranked = []
    for name, start in starts.items():
        still = Learned(fixed_records(start), float("nan"), float("nan"))
        ranked.append(Candidate(name, still, cost(start, None)))
        learned = learn(name, start)
        ranked.append(Candidate(f"learned from {name}", learned, cost(gauges_of(learned.records), learned.stored)))
    return sorted(ranked, key=lambda x: x.J)
