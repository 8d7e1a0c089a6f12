"""What the thesis predicts of structure along the index, written before measuring, and how it is judged.

The thesis: in aligned coordinates W = f(alpha) + r with f predictable from the layer or channel index and r small, so
that coding f + r takes fewer bits than coding r alone. Each prediction has a sign; two standard errors over the units
(matrices, or kinds of matrices for the layer index) decide.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from rdopt.study.predictions import Prediction, mean_of

ALIGNED_BASIS = "joint"
_BUDGET = 0.05  # of the numbers; the excess is read at the size next to it
_ROUNDING = 1e-6  # shares and bits/weight; the folded weights are float32, so that less says nothing


class IndexPrediction(NamedTuple):
    """A prediction about one figure of one family.

    Attributes:
        claim: the sentence.
        figure: explained energy beyond chance, bits/weight of f + r less those of r alone, or bits/weight of r alone.
        family: of f, one of ORDERED_FAMILIES; none for r alone.
        system: the coordinate system.
        against: another one whose figure is subtracted, unit by unit.
        sign: of the mean, as the thesis has it.
    """

    claim: str
    figure: Literal["excess", "difference", "alone"]
    family: str | None
    system: str
    against: str | None
    sign: Literal[-1, 1]


_FAMILIES = (
    *("layer index", "layer index, hidden channels matched"),
    *("channel index", "channel index, channels sorted", "low rank"),
)
_BEYOND = f"explains more beyond chance in {ALIGNED_BASIS} axes than in"
INDEX_PREDICTIONS = (
    *(IndexPrediction(f"{f}: {_BEYOND} original ones", "excess", f, ALIGNED_BASIS, "identity", 1) for f in _FAMILIES),
    *(IndexPrediction(f"{f}: {_BEYOND} flattened ones", "excess", f, ALIGNED_BASIS, "hadamard", 1) for f in _FAMILIES),
    *(
        IndexPrediction(f"{f}: explains more than chance in {ALIGNED_BASIS} axes", "excess", f, ALIGNED_BASIS, None, 1)
        for f in _FAMILIES
    ),
    *(
        IndexPrediction(f"{f}: f + r saves bits in {ALIGNED_BASIS} axes", "difference", f, ALIGNED_BASIS, None, -1)
        for f in _FAMILIES
    ),
    *(
        IndexPrediction(
            f"{f}: f + r saves more in {ALIGNED_BASIS} axes than in original ones", "difference", f,
            ALIGNED_BASIS, "identity", -1,
        )
        for f in _FAMILIES
    ),
    # What the encoder does already: the spread, not the weight, is a function of the channel.
    *(
        IndexPrediction(
            f"spreads by channel: r alone takes fewer bits in {ALIGNED_BASIS} axes than in {other} ones", "alone", None,
            ALIGNED_BASIS, basis, -1,
        )
        for other, basis in (("original", "identity"), ("flattened", "hadamard"))
    ),
)  # fmt: skip


def judge(systems: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every prediction whose coordinate systems were measured, with mean, standard error and verdict."""
    judged = []
    for p in INDEX_PREDICTIONS:
        if p.system not in systems or p.against not in (None, *systems):
            continue
        values = _figure(systems[p.system], p)
        if p.against is not None:
            values = values - _figure(systems[p.against], p)
        estimate = mean_of(values)
        verdict = Prediction(p.claim, p.sign).verdict(estimate, least=_ROUNDING)
        judged.append({**p._asdict(), "mean": estimate.value, "error": estimate.error, "verdict": verdict})
    return judged


def _figure(system: Mapping[str, Any], p: IndexPrediction) -> Float[np.ndarray, " units"]:
    if p.family is None:
        return np.array(system["alone"]["units"])
    family = system["families"][p.family]
    if p.figure == "difference":
        return np.array(family["best"]["units"])
    size = min(family["sizes"], key=lambda s: abs(s["numbers"] - _BUDGET))
    return np.array(size["units"])
