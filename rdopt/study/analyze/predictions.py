"""Predictions of the project's concept, their signs written down before anything was measured, and their judgement."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from rdopt.config.schema import AnalyzeConfig
from rdopt.study.analyze.figures import Row
from rdopt.study.analyze.networks import SHARES, Network, Noise, Rounding
from rdopt.study.predictions import Estimate, Judgement, Prediction, log_ratio_of_sums, mean_of

ALIGNED_BASES = ("learned", "joint", "pca", "pca-act")  # the first one that is at hand is the aligned one
LOSS_LIMIT = 1e-6  # nats/token; float32 rounding of a rotated model stays below, a changed network does not
PROTECTED_BITS = 4  # of the codes beside protected weights
CONCEPT_PREDICTIONS: Mapping[str, Prediction] = {
    "outliers": Prediction("A rotation removes outliers", -1, "log2 of max/rms, Hadamard less original, over matrices"),
    "tails": Prediction(
        "A rotation removes heavy tails", -1, "excess kurtosis, |Hadamard| less |original|, over matrices",
    ),
    "lossless": Prediction(
        "at no loss", -1, "KL of the rotated model less 1e-6 nats/token, which float32 rounding stays below",
    ),
    "entropy at fixed range": Prediction(
        "Flattening lowers the entropy at fixed range", -1,
        "bits with 256 bins over the range, Hadamard less original, over matrices",
    ),
    "entropy at fixed distortion": Prediction(
        "but not at fixed distortion", 1, "bits at a step of half the rms, Hadamard less original, over matrices",
    ),
    "concentration": Prediction(
        "Aligned coordinates concentrate energy", 1,
        "share of the top 10 % of the columns, {aligned} less the larger of original and Hadamard, over matrices",
    ),
    "dead zone": Prediction(
        "A dead zone appears in aligned coordinates", 1,
        "share of zeros at a step of two rms, {aligned} less Hadamard, over matrices",
    ),
    "large weights": Prediction(
        "Large weights are not the sensitive ones", -1,
        "log of KL, noise on the largest 0.5 % less equal noise on random 0.5 %",
    ),
    "low sensitivity": Prediction(
        "The network is robust to noise along directions of low sensitivity", -1,
        "log of KL, noise along weak input directions less equal noise along all",
    ),
    "curvature": Prediction(
        "Outliers lie where curvature projects on few axes", 1,
        "rank correlation of |W_ij| with G_ii sigma_jj in original coordinates, over matrices",
    ),
    "curvature spread": Prediction(
        "and a rotation dissolves that", -1, "the same, |Hadamard| less |original|, over matrices",
    ),
    "protection": Prediction(
        "In {aligned} coordinates nothing needs protection", -1,
        "log of KL at 4 bits, unprotected less protected, less what the protection's bits are worth",
    ),
    "protection rotated": Prediction("nor behind a rotation", -1, "the same in Hadamard coordinates"),
}


def judge_all(
    rows: Sequence[Row],
    networks: Sequence[Network],
    kl: Float[np.ndarray, "networks n"],
    counts: Int[np.ndarray, " n"],
    config: AnalyzeConfig,
) -> list[Judgement]:
    """Every prediction with its figure, from the rows of all matrices and the KL sums by network and sequence."""
    aligned = next((b for b in ALIGNED_BASES if b in config.bases), "hadamard")
    of_rows = [row for row in rows if row["layer"] is not None]

    def matrices(basis: str, figure: str, part: str | None = None) -> Float[np.ndarray, " matrices"]:
        """A figure of all matrices of the blocks, in one order for all bases."""
        own = {r["name"]: r[figure] if part is None else r[figure][part] for r in of_rows if r["basis"] == basis}
        return np.array([own[name] for name in sorted(own)], np.float64)

    def rotated_less_plain(figure: str, change: Callable[[np.ndarray], np.ndarray] = np.asarray) -> Estimate:
        return mean_of(change(matrices("hadamard", figure)) - change(matrices("identity", figure)))

    def sums(basis: str, change: Any) -> Float[np.ndarray, "seeds n"]:
        """KL sums of the networks that differ in nothing but their seed."""
        return np.array([k for n, k in zip(networks, kl, strict=True) if (n.basis, n.change) == (basis, change)])

    def protection(basis: str) -> Estimate:
        """What protection gains in log KL beyond what its bits would gain if codes were longer."""
        plain, protected = (sums(basis, Rounding("blocks", PROTECTED_BITS, p)) for p in (None, config.protected))
        gain = log_ratio_of_sums(plain, protected)
        return Estimate(gain.value - protection_worth(config.protected, PROTECTED_BITS), gain.error)

    flat_top = np.maximum(matrices("identity", "columns", "top 10"), matrices("hadamard", "columns", "top 10"))
    (rotated,) = sums("hadamard", None)
    lossless = float(rotated.sum() / counts.sum()), mean_of(rotated / counts).error
    estimates = {
        "outliers": mean_of(np.log2(matrices("hadamard", "peak") / matrices("identity", "peak"))),
        "tails": rotated_less_plain("kurtosis", lambda x: np.abs(x - 3)),
        "lossless": Estimate(lossless[0] - LOSS_LIMIT, lossless[1] if len(counts) > 1 else 0.0),
        "entropy at fixed range": rotated_less_plain("entropy_bins"),
        "entropy at fixed distortion": rotated_less_plain("entropy_step"),
        "concentration": mean_of(matrices(aligned, "columns", "top 10") - flat_top),
        "dead zone": mean_of(matrices(aligned, "zeros") - matrices("hadamard", "zeros")),
        "large weights": log_ratio_of_sums(
            sums("identity", Noise("largest", SHARES[0])), sums("identity", Noise("random", SHARES[0]))
        ),
        "low sensitivity": log_ratio_of_sums(sums("identity", Noise("weak")), sums("identity", Noise("all"))),
        "curvature": mean_of(matrices("identity", "curvature")),
        "curvature spread": rotated_less_plain("curvature", np.abs),
    }
    if PROTECTED_BITS in config.bits:
        estimates["protection"] = protection(aligned)
        estimates["protection rotated"] = protection("hadamard")
    judgements = []
    for name, estimate in estimates.items():
        claim, sign, figure = CONCEPT_PREDICTIONS[name]
        worded = Prediction(claim.format(aligned=aligned), sign, figure.format(aligned=aligned))
        judgements.append(Judgement(name, worded, estimate))
    return judgements


def protection_worth(share: float, bits: int) -> float:
    """The log KL that longer codes would gain for the bits of protection: KL falls by 2^(-2 bits).

    A protected weight takes 16 bits instead of `bits`, and its place the entropy of a coin that falls with `share`.
    """
    place = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
    return 2 * math.log(2) * ((16 - bits) * share + place)
