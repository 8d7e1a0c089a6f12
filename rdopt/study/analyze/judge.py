"""From the figures of an analysis to its verdicts."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from rdopt.config.schema import AnalyzeConfig
from rdopt.study.analyze.predictions import judged, log_ratio
from rdopt.study.analyze.rows import Row
from rdopt.study.analyze.variants import Variant
from rdopt.study.predictions import Estimate, mean_of

ALIGNED = ("learned", "joint", "pca", "pca-act")  # the best aligned basis at hand, in this order
LOSS_LIMIT = 1e-6  # nats/token; float32 rounding of a rotated model stays below, a changed network does not


def judge_all(
    rows: Sequence[Row],
    networks: Sequence[Variant],
    kl: Float[np.ndarray, "networks n"],
    counts: Int[np.ndarray, " n"],
    config: AnalyzeConfig,
) -> list[dict[str, Any]]:
    """Every prediction with its figure, error and verdict.

    Args:
        rows: figures of all matrices in all bases.
        networks: the perturbed networks.
        kl: their summed KL by sequence.
        counts: scored tokens of the sequences.
        config: bases and rounding.
    """
    aligned = next((b for b in ALIGNED if b in config.bases), "hadamard")
    matrices = _Matrices(rows)
    sums = _Sums(networks, kl)
    found = {
        "outliers": mean_of(np.log2(matrices("peak", "hadamard") / matrices("peak", "identity"))),
        "tails": mean_of(np.abs(matrices("kurtosis", "hadamard") - 3) - np.abs(matrices("kurtosis", "identity") - 3)),
        "lossless": _lossless(sums("hadamard", "folded", ""), counts),
        "entropy at fixed range": mean_of(matrices("entropy_bins", "hadamard") - matrices("entropy_bins", "identity")),
        "entropy at fixed distortion": mean_of(
            matrices("entropy_step", "hadamard") - matrices("entropy_step", "identity")
        ),
        "concentration": mean_of(
            matrices("columns", aligned, "top 10")
            - np.maximum(matrices("columns", "identity", "top 10"), matrices("columns", "hadamard", "top 10"))
        ),
        "dead zone": mean_of(matrices("zeros", aligned) - matrices("zeros", "hadamard")),
        "large weights": log_ratio(
            sums("identity", "entries", "largest 0.5 %"), sums("identity", "entries", "random 0.5 %")
        ),
        "low sensitivity": log_ratio(sums("identity", "inputs", "weak"), sums("identity", "inputs", "all")),
        "curvature": mean_of(matrices("curvature", "identity")),
        "curvature spread": mean_of(
            np.abs(matrices("curvature", "hadamard")) - np.abs(matrices("curvature", "identity"))
        ),
    }
    if 4 in config.bits:
        found["protection"] = _protection(sums, aligned, config.protected)
        found["protection rotated"] = _protection(sums, "hadamard", config.protected)
    return [judged(name, measured, aligned) for name, measured in found.items()]


class _Matrices:
    """A figure of all matrices of the blocks, in one order for all bases."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = [r for r in rows if r["layer"] is not None]

    def __call__(self, figure: str, basis: str, part: str | None = None) -> Float[np.ndarray, " matrices"]:
        held = {r["name"]: r[figure] if part is None else r[figure][part] for r in self._rows if r["basis"] == basis}
        return np.array([held[name] for name in sorted(held)], np.float64)


class _Sums:
    """KL sums of the networks of one kind, by seed and sequence."""

    def __init__(self, networks: Sequence[Variant], kl: Float[np.ndarray, "networks n"]) -> None:
        self._networks, self._kl = networks, kl

    def __call__(self, basis: str, kind: str, about: str) -> Float[np.ndarray, "seeds n"]:
        wanted = (basis, kind, about)
        return np.array([k for v, k in zip(self._networks, self._kl, strict=True) if v[:3] == wanted])


def _lossless(sums: Float[np.ndarray, "1 n"], counts: Int[np.ndarray, " n"]) -> Estimate:
    mean = float(sums.sum() / counts.sum())
    spread = mean_of(sums[0] / counts).error if len(counts) > 1 else 0.0
    return Estimate(mean - LOSS_LIMIT, spread)


def _protection(sums: _Sums, basis: str, share: float) -> Estimate:
    """What protection gains in log KL beyond what its bits would gain if codes were longer."""
    found = log_ratio(sums(basis, "rounded", "4 bits"), sums(basis, "rounded", "4 bits, protected"))
    return Estimate(found.value - protection_worth(share, 4), found.error)


def protection_worth(share: float, bits: int) -> float:
    """The log KL that longer codes would gain for the bits of protection: KL falls by 2^(-2 bits).

    A protected weight takes 16 bits instead of `bits`, and its place the entropy of a coin that falls with `share`.
    """
    place = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
    return 2 * math.log(2) * ((16 - bits) * share + place)
