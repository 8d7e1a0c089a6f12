"""Stored transforms at width 4096: gains extrapolated over the width of the layer, chance simulated, prices counted."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student

from stored_price.price import InputGroup, PairRotations, StoredForm, chance_group, fit_all

PriceRow = dict[str, Any]  # JSON values: one form of transform in one kind of group of one model
# Group of matrices that share an input -> (rows, columns) of each in a network of 8 billion weights.
WIDE_LAYER = {
    "attn": ((4096, 4096), (1024, 4096), (1024, 4096)),
    "o": ((4096, 4096),),
    "mlp": ((14336, 4096), (14336, 4096)),
    "down": ((4096, 14336),),
}
CHANCE_COLUMNS = 1024  # of the wide layers, in which chance is simulated
# A slope has to be this sure before it is followed: one asks for many at a time, and far beyond the points.
SLOPE_CONFIDENCE = 0.99


class Extrapolation(NamedTuple):
    """A prediction.

    Attributes:
        value, error: of one new point, and its standard error: the scatter of the points and of their fit.
        slope, slope_error: of the line, whether or not it was used.
    """

    value: float
    error: float
    slope: float
    slope_error: float


def extrapolate(x: Sequence[float], y: Sequence[float], at: float) -> Extrapolation:
    """a + s (x - mean x) where the slope differs from zero by Student's test at SLOPE_CONFIDENCE, else the mean.

    Args:
        x: at least three abscissas, not all alike.
        y: the measured values.
        at: the abscissa of the prediction.
    """
    t, values, count = np.asarray(x, float) - np.mean(x), np.asarray(y, float), len(x)
    spread, mean = float(np.sum(t**2)), float(np.mean(values))
    slope = float(np.sum(t * values)) / spread
    residual = float(np.sum((values - mean - slope * t) ** 2)) / (count - 2)
    slope_error, away = (residual / spread) ** 0.5, at - float(np.mean(x))
    if abs(slope) > student.ppf((1 + SLOPE_CONFIDENCE) / 2, count - 2) * slope_error:
        error = (residual * (1 + 1 / count + away**2 / spread)) ** 0.5
        return Extrapolation(mean + slope * away, error, slope, slope_error)
    scatter = float(np.var(values, ddof=1))
    return Extrapolation(mean, (scatter * (1 + 1 / count)) ** 0.5, slope, slope_error)


def wide_rows(rows: Sequence[PriceRow], floor: float, seed: int) -> Iterator[PriceRow]:
    """Each form at width 4096: gain above chance extrapolated, chance simulated, price by the cost of an angle."""
    for kind, shapes in WIDE_LAYER.items():
        of_kind = [r for r in rows if r["kind"] == kind]
        if len({r["source"] for r in of_kind}) < 3 or len({r["n"] for r in of_kind}) < 2:
            continue
        n, m = shapes[0][1], sum(rows for rows, _ in shapes)
        for form, chance in wide_chance(kind, floor, seed).items():
            own = [r for r in of_kind if r["transform"] == form.name]
            fit = extrapolate([np.log2(r["n"]) for r in own], [r["gain"] - r["chance"] for r in own], np.log2(n))
            angles, order = form.side_information(n, kind == "down")
            price = (angles * float(np.mean([angle_cost(r, m) for r in own])) + order) / (m * n)
            yield {
                "kind": kind, "transform": form.name, "n": n, "rows": m, **fit._asdict(), "chance": chance,
                "price": price, "net": fit.value + chance - price,
            }  # fmt: skip


def whole_layer_rows(wide: Sequence[PriceRow]) -> Iterator[PriceRow]:
    """Each form in all matrices of a wide layer; errors of the groups add up, for the same models made them."""
    for name in dict.fromkeys(r["transform"] for r in wide):
        own = [r for r in wide if r["transform"] == name]
        share = np.array([r["n"] * r["rows"] for r in own], float)
        mean = {
            key: float(np.average([r[key] for r in own], weights=share))
            for key in ("value", "error", "slope", "slope_error", "chance", "price", "net")
        }
        yield {"kind": "all", "transform": name, "n": 0, "rows": 0, **mean}


def wide_chance(kind: str, floor: float, seed: int) -> dict[StoredForm, float]:
    """What each form gains by chance in the wide layer, without those that start with a Hadamard."""
    narrow = tuple((m, CHANCE_COLUMNS) for m, _ in WIDE_LAYER[kind])
    like = InputGroup(kind, narrow, np.zeros((0, 0, 0)), np.zeros(0), kind == "down")
    sample = chance_group(like, np.random.default_rng(seed), floor)
    return {
        form: fit.gain / sample.size
        for form, fit in fit_all(sample, 0).items()
        if not (isinstance(form, PairRotations) and form.behind_hadamard)
    }


def angle_cost(r: PriceRow, rows: int) -> float:
    """Bits of an angle with what its rounding loses; the best width grows by half a bit when the rows double."""
    lost = r["price"] - r["order"] + r["gain"] - r["kept"]
    return lost * r["weights"] / r["angles"] + 0.5 * np.log2(rows / r["rows"])
