"""How much of a model's matrices a function of the index predicts, in several coordinate systems.

W = f(alpha) + r with alpha the layer index, the channel indices or the places of a low rank: explained energy against
numbers spent, beside chance (Gaussian matrices of the same rows' and columns' variances), and bits of f + r against
bits of r alone at equal squared error. All bases are orthogonal: a matrix's error means the same in each of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from index_functions.bits import bits_at_error, error_at, spread_histogram, step_for_bits
from index_functions.channels import ORDERS, MatrixStacks, blocks_in, gaussian_like
from index_functions.functions import Corner, IndexFamily, LayerModes, LowRank
from index_functions.predictions import judge
from rdopt.calibration.moments import Moments
from rdopt.checkpoint.families import Architecture
from rdopt.config.errors import UserError
from rdopt.operator.params import Params

SYSTEMS = ("identity", "hadamard", "pca", "joint", "dct")
BUDGETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
_Json = dict[str, Any]


class OrderedFamily(NamedTuple):
    """A family of f with an order of the channels.

    Attributes:
        fit: the family.
        order: one of ORDERS.
        stacked: whether a unit is the stack of a kind of matrix over layers, and not one matrix.
    """

    fit: Callable[[Float[np.ndarray, "layers out in"], Sequence[float]], IndexFamily]
    order: str
    stacked: bool


ORDERED_FAMILIES: Mapping[str, OrderedFamily] = {
    "layer index": OrderedFamily(LayerModes, "as they are", True),
    "layer index, hidden channels matched": OrderedFamily(LayerModes, "matched", True),
    "channel index": OrderedFamily(Corner, "as they are", False),
    "channel index, channels sorted": OrderedFamily(Corner, "sorted", False),
    "low rank": OrderedFamily(LowRank, "as they are", False),
}


class ErrorTarget(NamedTuple):
    """At which error a matrix is coded, the same in all coordinate systems.

    Attributes:
        step: of the grid, one for each kind of matrix.
        errors: squared error of every layer's matrix at that step in the original coordinates, in steps squared.
    """

    step: float
    errors: Float[np.ndarray, " layers"]


def index_structure(
    params: Params,
    arch: Architecture,
    moments: Moments | None = None,
    bases: Sequence[str] = SYSTEMS,
    *,
    budgets: Sequence[float] = BUDGETS,
    bits: float = 3.0,
    seeds: int = 3,
    progress: Callable[[str], None] = lambda _: None,
) -> _Json:
    """Measures all families in all coordinate systems.

    Args:
        params: the original weights.
        arch: their architecture, of two layers at least.
        moments: needed by the basis pca-act alone.
        bases: names of BASES.
        budgets: sizes of f, shares of a matrix's numbers, rising.
        bits: bits/weight of r alone in the original coordinates, which fixes every matrix's squared error.
        seeds: of the Gaussian controls.
        progress: told each coordinate system when it begins.

    Returns:
        JSON-able {"settings", "systems": {basis: {"alone", "families": {name: {"sizes", "best"}}}}, "predictions"}:
        shares of numbers and of energy, bits/weight. "alone" has the bits of r alone, its spreads a function of the
        channels; its "flat" those with one spread a matrix.

    Raises:
        UserError: a network of one layer, pca-act without moments, or settings out of range.
    """
    _check(arch, moments, bases, budgets, seeds)
    targets = error_targets(blocks_in("identity", params, arch, moments), bits)
    systems: _Json = {}
    for basis in bases:
        progress(basis)
        systems[basis] = _system(blocks_in(basis, params, arch, moments), targets, budgets, seeds)
    settings = {"budgets": list(budgets), "bits": bits, "seeds": seeds, "layers": arch.num_layers}
    return {"settings": settings, "systems": systems, "predictions": judge(systems)}


def _check(
    arch: Architecture, moments: Moments | None, bases: Sequence[str], budgets: Sequence[float], seeds: int
) -> None:
    if arch.num_layers < 2:
        raise UserError("the layer index needs two layers at least; this model has one.")
    if moments is None and "pca-act" in bases:
        raise UserError("the basis pca-act needs the moments of a text; leave it out or measure them.")
    if seeds < 2:
        raise UserError(f"the spread of chance needs two seeds at least, not {seeds}.")
    if wrong := [share for share in budgets if not 0 < share <= 1]:
        raise UserError(f"a budget is a share of the numbers above 0 and at most 1, not {wrong[0]:g}.")


def error_targets(blocks: MatrixStacks, bits: float) -> dict[str, ErrorTarget]:
    """Steps at which each kind of matrix takes so many bits/weight."""
    targets = {}
    for name, W in blocks.items():
        unit = np.sqrt(np.mean(np.square(W))) or 1.0
        counts = [spread_histogram(x) for x in W / unit]
        step = step_for_bits(np.sum(counts, axis=0), bits * W.size)
        errors = [error_at(c, float(np.log2(step))) / step**2 for c in counts]
        targets[name] = ErrorTarget(step * unit, np.array(errors))
    return targets


def _system(blocks: MatrixStacks, targets: Mapping[str, ErrorTarget], budgets: Sequence[float], seeds: int) -> _Json:
    """All families in one coordinate system."""
    chance = [gaussian_like(blocks, np.random.default_rng(seed)) for seed in range(seeds)]
    alone = {name: [bits_at_error(x, e) for x, e in zip(W / targets[name].step, targets[name].errors, strict=True)]
             for name, W in blocks.items()}  # fmt: skip
    families = {}
    for label, kind in ORDERED_FAMILIES.items():
        arranged, *noise = (ORDERS[kind.order](b) for b in (blocks, *chance))
        sizes = _explained(kind, arranged, noise, budgets)
        families[label] = {"sizes": sizes, "best": _coded(kind, arranged, targets, alone, budgets)}
    units = np.array([bits / W[0].size for name, W in blocks.items() for bits in alone[name]])
    return {"alone": {"mean": float(units.mean()), "error": _error(units), "units": units.tolist(),
                      "flat": _flat(blocks, targets)}, "families": families}  # fmt: skip


def _flat(blocks: MatrixStacks, targets: Mapping[str, ErrorTarget]) -> float:
    """Mean over matrices of the bits/weight under one spread a matrix, which no rotation changes."""
    bits = []
    for name, W in blocks.items():
        for x, error in zip(W / targets[name].step, targets[name].errors, strict=True):
            bits.append(bits_at_error(np.full_like(x, np.sqrt(np.mean(np.square(x)))), error) / x.size)
    return float(np.mean(bits))


def _units(
    kind: OrderedFamily, blocks: MatrixStacks
) -> Iterator[tuple[str, slice, Float[np.ndarray, "layers out in"]]]:
    """Name, layers and stack of every unit."""
    for name, W in blocks.items():
        layers = len(W)
        for part in [slice(0, layers)] if kind.stacked else [slice(i, i + 1) for i in range(layers)]:
            yield name, part, W[part]


def _explained(
    kind: OrderedFamily, blocks: MatrixStacks, noise: Sequence[MatrixStacks], budgets: Sequence[float]
) -> list[_Json]:
    """Per size the share of numbers, of energy, and of the energy of the controls; means over units."""
    ladder = [_ladder(kind, b, budgets) for b in (blocks, *noise)]
    shares, energy = ladder[0]
    chance = np.array([e for _, e in ladder[1:]])
    rows = []
    for i in range(shares.shape[1]):
        excess = energy[:, i] - chance[:, :, i].mean(axis=0)
        rows.append({
            "numbers": float(shares[:, i].mean()), "explained": float(energy[:, i].mean()),
            "chance": float(chance[:, :, i].mean()), "spread": float(chance[:, :, i].mean(axis=1).std(ddof=1)),
            "excess": float(excess.mean()), "error": _error(excess), "units": excess.tolist(),
        })  # fmt: skip
    return rows


def _ladder(kind: OrderedFamily, blocks: MatrixStacks, budgets: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """(shares of numbers, explained energies), both (units, sizes)."""
    shares, energy = [], []
    for _, _, X in _units(kind, blocks):
        fit = kind.fit(X, budgets)
        shares.append([fit.numbers(size) / X.size for size in fit.sizes])
        energy.append([fit.explained(size) for size in fit.sizes])
    return np.array(shares), np.array(energy)


def _coded(
    kind: OrderedFamily, blocks: MatrixStacks, targets: Mapping[str, ErrorTarget], alone: Mapping[str, list[float]],
    budgets: Sequence[float],
) -> _Json:  # fmt: skip
    """Bits/weight of f + r less those of r alone, each unit at the size and precision that cost it least."""
    difference, numbers = [], []
    for name, part, X in _units(kind, blocks):
        step, errors = targets[name]
        x, fit = X / step, kind.fit(X / step, budgets)
        size, bits = cheapest(fit, x, errors[part])
        difference.append((bits - sum(alone[name][part])) / X.size)
        numbers.append(fit.numbers(size) / X.size)
    values = np.array(difference)
    return {
        "difference": float(values.mean()), "error": _error(values), "numbers": float(np.mean(numbers)),
        "units": values.tolist(),
    }  # fmt: skip


def cheapest(
    fit: IndexFamily, x: Float[np.ndarray, "layers out in"], errors: Float[np.ndarray, " layers"]
) -> tuple[int, float]:
    """(size, bits) of the cheapest f + r with an f that has numbers: the best size, then its best precision.

    Args:
        fit: a family fitted to x.
        x: a unit in steps.
        errors: squared error that each of its matrices ends with.
    """

    def total(size: int, precision: int) -> float:
        f, bits = fit.part(size, precision)
        return bits + sum(bits_at_error(r, e) for r, e in zip(x - f, errors, strict=True))

    usual, *others = fit.precisions
    # A matrix too small to pay a rank within the budgets still shows what the first one costs.
    sizes = sorted({size for size in fit.sizes if size}) or [1]
    bits, size = min((total(size, usual), size) for size in sizes)
    return size, min(bits, *(total(size, precision) for precision in others))


def _error(values: Float[np.ndarray, " units"]) -> float:
    """Standard error of the mean over units."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))
