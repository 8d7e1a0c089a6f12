"""Which trained rotations a file keeps, and with how many bits an angle: by J, bits of the angles included.

R and D are sums over matrices, and a matrix feels only its input group's rotation and its own output's, so that the
best set of rotations follows from every matrix's bits and distortion with either, both and none of them.
"""

from collections.abc import Mapping
from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from rdopt.align.objective import BlockProblem, Own, Settings
from rdopt.align.passes import block_matrix_terms
from rdopt.align.problem import Problem
from rdopt.align.stored_learning import Place, StoredSettings, StoredStart, parameter_name
from rdopt.checkpoint.families import MATRICES, MATRICES_OF, Architecture
from rdopt.transforms.gauges.coordinates import Gauges
from rdopt.transforms.stored.angles import angle_codes
from rdopt.transforms.stored.pairing import pairing_bits
from rdopt.transforms.stored.rotation import Rotation
from rdopt.transforms.stored.rotations import StoredRotation, StoredRotations

WIDTHS = (4, 5, 6, 7, 8, 9)
LayerPlace = tuple[Place, int]  # which rotation of a block, and the layer
# Whether inputs and outputs are rotated -> cost of every matrix in bits.
Costs = Mapping[tuple[bool, bool], Mapping[str, Float[np.ndarray, " layers"]]]


class Choice(NamedTuple):
    """What was kept.

    Attributes:
        stored: the rotations, or None where none pays.
        saved: J saved by them, bits/weight, their own bits included.
        gain: J that all rotations together would save without the bits of angles, bits/weight.
        price: the bits of all angles, bits/weight.
    """

    stored: StoredRotations | None
    saved: float
    gain: float
    price: float


def choose_stored(
    chosen: StoredSettings,
    start: StoredStart,
    theta: Mapping[str, Float[np.ndarray, "layers p"]],
    gauges: Gauges,
    problem: Problem,
    lam: float,
    settings: Settings,
) -> Choice:
    """The cheapest width of angles with the rotations that lower J.

    Args:
        chosen: structure and sides.
        start: where the rotations started, and their pairs.
        theta: what was trained, by `parameter_name`.
        gauges: the trained symmetries, single precision.
        problem: model and moments.
        lam: the slope.
        settings: static choices of the objective.
    """
    widths, best = chosen.widths(settings.arch), None
    rounded = {bits: _rounded(chosen, bits, start, theta) for bits in WIDTHS}
    found = [_block_costs(chosen, rounded, layer, block, gauges, lam, settings)
             for layer, block in enumerate(problem.blocks())]
    for bits in WIDTHS:
        by_sides = {on: {k: np.array([each[bits][on][k] for each in found]) for k in MATRICES}
                    for on in found[0][bits]}
        price = _prices(chosen, rounded[bits], widths)
        keys, saved = _cheapest(by_sides, price)
        if best is None or saved > best.saved * settings.weights:
            plain = by_sides[False, False]
            every = by_sides["inputs" in chosen.sides, "outputs" in chosen.sides]
            gain = sum(float(np.sum(plain[k] - every[k])) for k in plain)
            some = _stored(chosen, bits, {k: x for k, x in rounded[bits].items() if k in keys}) if keys else None
            best = Choice(some, *(x / settings.weights for x in (saved, gain, sum(price.values()))))
    assert best is not None
    return best


def _block_costs(
    chosen: StoredSettings,
    rounded: Mapping[int, Mapping[LayerPlace, StoredRotation]],
    layer: int,
    block: BlockProblem,
    gauges: Gauges,
    lam: float,
    settings: Settings,
) -> dict[int, dict[tuple[bool, bool], dict[str, float]]]:
    """The cost of every matrix of one block in bits, by width of angles and by what is rotated."""
    arch, block = settings.arch, jax.device_put(block)

    def costs(rotations: Mapping[Place, Rotation]) -> dict[str, float]:
        own = Own(gauges.block(layer, arch), rotations)
        bits, D = block_matrix_terms(own, block, jnp.float32(lam), settings)
        return {k: float(bits[k]) + lam * settings.weights * float(D[k]) for k in bits}

    plain, found = costs({}), {}
    for bits, each in rounded.items():
        rotations = rotations_of(chosen, bits, each, layer, arch)
        found[bits] = {(False, False): plain}
        for on in ((True, False), (False, True), (True, True)):
            if on[0] <= ("inputs" in chosen.sides) and on[1] <= ("outputs" in chosen.sides):
                wanted = {side for side, used in zip(("inputs", "outputs"), on, strict=True) if used}
                found[bits][on] = costs({place: x for place, x in rotations.items() if place[0] in wanted})
    return found


def rotations_of(
    chosen: StoredSettings, bits: int, rounded: Mapping[LayerPlace, StoredRotation], layer: int, arch: Architecture
) -> dict[Place, Rotation]:
    """One block's rotations of rounded angles, single precision."""
    stored, widths = _stored(chosen, bits, rounded), chosen.widths(arch)
    return {place: jax.tree.map(_single, stored.rotation(rounded[place, layer], n)) for place, n in widths.items()}


def _rounded(
    chosen: StoredSettings, bits: int, start: StoredStart, theta: Mapping[str, Float[np.ndarray, "layers p"]]
) -> dict[LayerPlace, StoredRotation]:
    """All trained rotations with angles of so many bits."""
    rounded = {}
    for place, own in start.rotations.items():
        moved = jnp.asarray(theta[parameter_name(place)])
        if chosen.structure == "blocks":
            blocks = own.moved(moved).blocks
            assert blocks is not None
            codes = [
                np.concatenate([angle_codes(np.asarray(B[layer]), bits).ravel() for B in blocks])
                for layer in range(len(blocks[0]))
            ]
        else:
            half = 2 ** (bits - 2)
            angles = np.asarray(own.moved_angles(moved), np.float64) / (2 * np.pi / 2**bits)
            codes = list(np.clip(np.rint(angles), 1 - half, half).astype(np.int32))
        for layer, each in enumerate(codes):
            pairs = start.pairs[place][layer] if chosen.structure == "pairs" else None
            rounded[place, layer] = StoredRotation(each, pairs)
    return rounded


def _stored(chosen: StoredSettings, bits: int, rounded: Mapping[LayerPlace, StoredRotation]) -> StoredRotations:
    """Rounded rotations as a file holds them."""
    inputs, outputs = (
        {(layer, name): x for ((side, name), layer), x in rounded.items() if side == wanted}
        for wanted in ("inputs", "outputs")
    )
    size = 1 if chosen.structure == "butterfly" else chosen.size
    return StoredRotations(chosen.structure, size, chosen.hadamard, bits, inputs, outputs)


def _single(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x, jnp.int32 if np.issubdtype(x.dtype, np.integer) else jnp.float32)


def _prices(
    chosen: StoredSettings, rounded: Mapping[LayerPlace, StoredRotation], widths: Mapping[Place, int]
) -> dict[LayerPlace, float]:
    """Bits of every rotation: its angles under the frequencies of all, and its pairing."""
    every: Int[np.ndarray, " p"] = np.concatenate([x.codes for x in rounded.values()])
    values, counts = np.unique(every, return_counts=True)
    length = dict(zip(values.tolist(), -np.log2(counts / every.size), strict=True))
    prices = {}
    for (place, layer), rotation in rounded.items():
        pairing = pairing_bits(widths[place], chosen.size) if chosen.structure == "pairs" else 0.0
        prices[place, layer] = float(sum(length[k] for k in rotation.codes.tolist())) + pairing
    return prices


def _cheapest(by_sides: Costs, price: Mapping[LayerPlace, float]) -> tuple[set[LayerPlace], float]:
    """The set of rotations of least cost, and how many bits it saves."""
    keys: set[LayerPlace] = set()
    saved, layers = 0.0, len(next(iter(by_sides[False, False].values())))
    options = {True: [on for on in by_sides if on[0]], False: [on for on in by_sides if not on[0]]}
    for layer, (group, names) in product(range(layers), MATRICES_OF.items()):
        plain = sum(by_sides[False, False][name][layer] for name in names)
        best: tuple[float, set[LayerPlace]] = (plain, set())
        for inputs in (False, True):
            if not options[inputs]:
                continue
            total = price[("inputs", group), layer] if inputs else 0.0
            some: set[LayerPlace] = {(("inputs", group), layer)} if inputs else set()
            for name in names:
                cost, on = min(
                    (by_sides[on][name][layer] + (price[("outputs", name), layer] if on[1] else 0.0), on)
                    for on in options[inputs]
                )
                total += cost
                some |= {(("outputs", name), layer)} if on[1] else set()
            best = min(best, (total, some), key=lambda x: x[0])
        saved, keys = saved + plain - best[0], keys | best[1]
    return keys, float(saved)
