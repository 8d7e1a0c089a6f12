"""Predictions of the project's concept, their signs written down before anything is measured, and their verdicts.

Two standard errors decide; see `rdopt.study.predictions`.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from rdopt.study.predictions import Estimate, mean_of, verdict


class Prediction(NamedTuple):
    """One claim.

    Attributes:
        claim: of the concept, in a sentence.
        figure: what is measured, with its unit.
        sign: +1 or -1, what the claim says of the figure.
    """

    claim: str
    figure: str
    sign: int


PREDICTIONS = {
    "outliers": Prediction(
        "A rotation removes outliers", "log2 of max/rms, Hadamard less original, over matrices", -1
    ),
    "tails": Prediction(
        "A rotation removes heavy tails", "excess kurtosis, |Hadamard| less |original|, over matrices", -1
    ),
    "lossless": Prediction(
        "at no loss", "KL of the rotated model less 1e-6 nats/token, which float32 rounding stays below", -1
    ),
    "entropy at fixed range": Prediction(
        "Flattening lowers the entropy at fixed range",
        "bits with 256 bins over the range, Hadamard less original, over matrices", -1,
    ),
    "entropy at fixed distortion": Prediction(
        "but not at fixed distortion", "bits at a step of half the rms, Hadamard less original, over matrices", 1
    ),
    "concentration": Prediction(
        "Aligned coordinates concentrate energy",
        "share of the top 10 % of the columns, {aligned} less the larger of original and Hadamard, over matrices", 1,
    ),
    "dead zone": Prediction(
        "A dead zone appears in aligned coordinates",
        "share of zeros at a step of two rms, {aligned} less Hadamard, over matrices", 1,
    ),
    "large weights": Prediction(
        "Large weights are not the sensitive ones",
        "log of KL, noise on the largest 0.5 % less equal noise on random 0.5 %", -1,
    ),
    "low sensitivity": Prediction(
        "The network is robust to noise along directions of low sensitivity",
        "log of KL, noise along weak input directions less equal noise along all", -1,
    ),
    "curvature": Prediction(
        "Outliers lie where curvature projects on few axes",
        "rank correlation of |W_ij| with G_ii sigma_jj in original coordinates, over matrices", 1,
    ),
    "curvature spread": Prediction(
        "and a rotation dissolves that", "the same, |Hadamard| less |original|, over matrices", -1
    ),
    "protection": Prediction(
        "In {aligned} coordinates nothing needs protection",
        "log of KL at 4 bits, unprotected less protected, less what the protection's bits are worth", -1,
    ),
    "protection rotated": Prediction(
        "nor behind a rotation", "the same in Hadamard coordinates", -1
    ),
}


def log_ratio(a: Float[np.ndarray, "seeds n"], b: Float[np.ndarray, "seeds n"]) -> Estimate:
    """log(sum a / sum b), its error by the delta method over sequences and, where there are several, over seeds.

    Args:
        a: KL sums by seed of the noise and sequence.
        b: of the other network on the same sequences.
    """
    sequences = a.sum(axis=0) / a.sum() - b.sum(axis=0) / b.sum()
    variance = float(np.sum(sequences**2))
    if len(a) > 1:
        variance += mean_of(np.log(a.sum(axis=1) / b.sum(axis=1))).error ** 2
    return Estimate(float(np.log(a.sum() / b.sum())), variance**0.5)


def judged(name: str, found: Estimate, aligned: str) -> dict[str, Any]:
    """One of the predictions above as a line of the summary."""
    p = PREDICTIONS[name]
    return as_row(name, p.claim.format(aligned=aligned), p.figure.format(aligned=aligned), p.sign, found)


def as_row(name: str, claim: str, figure: str, sign: int, found: Estimate) -> dict[str, Any]:
    """One line of the summary as a dict."""
    return {
        "name": name,
        "claim": claim,
        "figure": figure,
        "predicted": "above 0" if sign > 0 else "below 0",
        "value": found.value,
        "error": found.error,
        "verdict": verdict(sign, *found),
    }
