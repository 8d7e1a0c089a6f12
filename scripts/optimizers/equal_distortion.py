"""What coordinates save at equal distortion by the analytic rate: no file, a few evaluations of R and D.

The baseline's slope lambda gives a distortion D; the other coordinates' slope is moved until theirs is D, too.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from optimizers.spectra import Spectra, spectra
from rdopt.align.alignment import single_precision
from rdopt.align.objective import Variables
from rdopt.align.passes import matrix_terms
from rdopt.align.problem import make_problem
from rdopt.calibration.moments import Moments
from rdopt.calibration.subject import Subject
from rdopt.checkpoint.families import MATRICES, Architecture
from rdopt.config.schema import Config
from rdopt.operator.params import Params
from rdopt.study.predictions import Estimate
from rdopt.transforms.aligned import Aligned
from rdopt.transforms.bases import starting_gauges

COORDINATES = ("identity", "hadamard", "pca", "joint")
# Relative, of the distortion: what is missed counts at the price of the slope, so that its square is the error.
EXACT = 1e-2


class MatrixTerms(NamedTuple):
    """Bits and share of the KL in nats/token of every coded matrix, float64, in the order of `matrix_names`."""

    bits: Float[np.ndarray, " m"]
    distortion: Float[np.ndarray, " m"]


TermsAtSlope = Callable[[float], MatrixTerms]  # of a slope lambda


def matrix_names(arch: Architecture) -> list[str]:
    """Names of the coded matrices, kind by kind."""
    return [f"{layer}.{kind}" for kind in MATRICES for layer in range(arch.num_layers)]


def matrix_weights(params: Params) -> Float[np.ndarray, " m"]:
    """Entries of every coded matrix."""
    return np.array([W.size for k in MATRICES for W in params["blocks"][k]], float)


def in_coordinates(subject: Subject, moments: Moments) -> dict[str, Aligned]:
    """The model in every fixed basis by name, norm gains folded in all of them."""
    models = {}
    for name in COORDINATES:
        gauges = starting_gauges(name, subject.params, subject.arch, moments)
        if gauges.residual is None:
            gauges = gauges._replace(residual=np.eye(subject.arch.hidden_size))
        models[name] = Aligned(subject=subject, moments=moments, gauges=gauges)
    return models


def matrix_spectra(model: Aligned) -> list[Spectra]:
    """Figures of every coded matrix."""
    blocks = list(model.blocks())
    return [spectra(block.params[k]) for k in MATRICES for block in blocks]


def terms_by_slope(model: Aligned) -> TermsAtSlope:
    """Analytic bits and distortion of a model in coordinates as a function of the slope."""
    problem, settings = make_problem(model.subject, model.moments, Config())
    assert model.gauges is not None
    variables = Variables(single_precision(model.gauges, settings.arch))

    @cache
    def at(lam: float) -> MatrixTerms:
        terms = matrix_terms(variables, problem, lam, settings)
        return MatrixTerms(*(np.concatenate([np.asarray(part[k], np.float64) for k in MATRICES]) for part in terms))

    return at


def slope_for(terms: TermsAtSlope, distortion: float, start: float) -> float:
    """The slope at which the distortion of all matrices is a given one, by the secant rule on logarithms.

    Args:
        terms: whose distortion falls as the slope grows.
        distortion: nats/token.
        start: a slope nearby.
    """
    x, slope = np.log(start), -1.0  # at high rate D is inversely proportional to lambda
    miss = np.log(terms(start).distortion.sum() / distortion)
    for _ in range(20):
        if abs(miss) < EXACT:
            break
        step = np.clip(-miss / slope, -1.0, 1.0)
        now = np.log(terms(float(np.exp(x + step))).distortion.sum() / distortion)
        slope = min((now - miss) / step, -0.05)
        x, miss = x + step, now
    return float(np.exp(x))


def savings(
    base: TermsAtSlope, other: TermsAtSlope, lam: float, weights: Float[np.ndarray, " m"]
) -> Float[np.ndarray, " m"]:
    """Bits that every matrix saves in other coordinates at the distortion that the baseline has at lambda.

    Some distortion moves between matrices; a nat/token counts lambda bits of every weight, and in the sum over
    matrices these moves cancel.

    Args:
        base, other: the two coordinates.
        lam: slope of the baseline, bits/weight per nat/token.
        weights: entries of every matrix.
    """
    before = base(lam)
    after = other(slope_for(other, float(before.distortion.sum()), lam))
    price = lam * weights.sum()
    return before.bits - after.bits + price * (before.distortion - after.distortion)


def per_weight(bits: Float[np.ndarray, " m"], weights: Float[np.ndarray, " m"]) -> Estimate:
    """Bits/weight of all matrices together and the error over matrices (ratio of sums)."""
    m, mean = len(bits), float(bits.sum() / weights.sum())
    rest = bits - mean * weights
    return Estimate(mean, float(np.sqrt(m / (m - 1) * (rest @ rest)) / weights.sum()))
