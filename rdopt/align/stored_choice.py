"""Which trained rotations a file keeps, and with how many bits an angle: by J, bits of the angles included.

R and D are sums over matrices, and a matrix feels only its input group's rotation and its own output's, so that the
best set of sites follows from every matrix's bits and distortion with either, both and none of them.
"""

from collections.abc import Iterator, Mapping
from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from rdopt.align.objective import Problem, Settings, Variables, matrix_terms
from rdopt.align.stored_sites import NO_SITES, STORED, Plan, Sites, Starts, site_angles, site_turn, site_widths
from rdopt.checkpoint.families import MATRICES_OF
from rdopt.transforms.gauges.gauges import Gauges
from rdopt.transforms.stored.angles import angle_codes
from rdopt.transforms.stored.pairing import pairing_bits
from rdopt.transforms.stored.rotation import Rotation
from rdopt.transforms.stored.rotations import StoredRotation, StoredRotations

WIDTHS = (4, 5, 6, 7, 8, 9)
Key = tuple[int, str]
Costs = Mapping[tuple[bool, bool], Mapping[str, Float[np.ndarray, " layers"]]]


class Choice(NamedTuple):
    """What was kept.

    Attributes:
        stored: the rotations, or None where none pays.
        saved: J saved by them, bits/weight, their own bits included.
        gain: J that all sites together would save without the bits of angles, bits/weight.
        price: the bits of all angles, bits/weight.
    """

    stored: StoredRotations | None
    saved: float
    gain: float
    price: float


def choose_stored(
    plan: Plan,
    starts: Starts,
    theta: Mapping[str, Float[np.ndarray, "layers p"]],
    gauges: Gauges,
    problem: Problem,
    lam: float,
    settings: Settings,
) -> Choice:
    """The cheapest width of angles with the sites that lower J.

    Args:
        plan: structure and sides.
        starts: where the sites started, and their pairs.
        theta: what was trained, by "stored_SIDE_KEY".
        gauges: the trained symmetries, single precision.
        problem: model and moments.
        lam: the slope.
        settings: static choices of the objective.
    """
    terms = jax.jit(matrix_terms, static_argnames="settings")

    def costs(sites: Sites) -> Mapping[str, Float[np.ndarray, " layers"]]:
        bits, D = terms(Variables(gauges, sites), problem, jnp.float32(lam), settings=settings)
        return {k: np.asarray(bits[k], np.float64) + lam * settings.weights * np.asarray(D[k]) for k in bits}

    bare, best = costs(NO_SITES), None
    for bits in WIDTHS:
        whole = _rounded(plan, bits, starts, theta, settings)
        turns = _turns(plan, whole, settings)
        found = {(False, False): bare}
        for on in ((True, False), (False, True), (True, True)):
            if on[0] <= ("inputs" in plan.sides) and on[1] <= ("outputs" in plan.sides):
                found[on] = costs(Sites(turns.inputs if on[0] else {}, turns.outputs if on[1] else {}))
        price = _prices(plan, whole, settings)
        chosen, saved = _cheapest(found, price)
        if best is None or saved > best.saved * settings.weights:
            everything = found["inputs" in plan.sides, "outputs" in plan.sides]
            gain = sum(float(np.sum(bare[k] - everything[k])) for k in bare)
            inputs = {k: x for k, x in whole.inputs.items() if ("inputs", k) in chosen}
            outputs = {k: x for k, x in whole.outputs.items() if ("outputs", k) in chosen}
            some = whole._replace(inputs=inputs, outputs=outputs) if chosen else None
            best = Choice(some, *(x / settings.weights for x in (saved, gain, sum(price.values()))))
    assert best is not None
    return best


def _rounded(
    plan: Plan,
    bits: int,
    starts: Starts,
    theta: Mapping[str, Float[np.ndarray, "layers p"]],
    settings: Settings,
) -> StoredRotations:
    """All trained rotations with angles of so many bits."""
    found: dict[str, dict[Key, StoredRotation]] = {"inputs": {}, "outputs": {}}
    for side, key in _sites(plan, settings):
        start, moved = getattr(starts.sites, side)[key], jnp.asarray(theta[f"{STORED}{side}_{key}"])
        if plan.structure == "blocks":
            blocks = site_turn(plan, start, moved).blocks
            assert blocks is not None
            codes = [
                np.concatenate([angle_codes(np.asarray(B[layer]), bits)[0].ravel() for B in blocks])
                for layer in range(len(blocks[0]))
            ]
        else:
            half = 2 ** (bits - 2)
            angles = np.asarray(site_angles(start, moved), np.float64) / (2 * np.pi / 2**bits)
            codes = list(np.clip(np.rint(angles), 1 - half, half).astype(np.int32))
        for layer, each in enumerate(codes):
            own = starts.pairs[layer, f"{side} {key}"] if plan.structure == "pairs" else None
            found[side][layer, key] = StoredRotation(each, own)
    size = 1 if plan.structure == "butterfly" else plan.size
    return StoredRotations(plan.structure, size, plan.hadamard, bits, found["inputs"], found["outputs"])


def _turns(plan: Plan, stored: StoredRotations, settings: Settings) -> Sites:
    """The rotations of the rounded angles on the device, stacked over the layers."""
    turns, widths = Sites({}, {}), site_widths(plan, settings.arch)
    for side, key in _sites(plan, settings):
        n, held = getattr(widths, side)[key], getattr(stored, side)
        layers = [stored.rotation(held[layer, key], n) for layer in range(settings.arch.num_layers)]
        stacked: Rotation = jax.tree.map(_single, layers[0], *layers[1:])
        getattr(turns, side)[key] = stacked
    return turns


def _single(*parts: np.ndarray) -> jax.Array:
    x = np.stack(parts)
    return jnp.asarray(x, jnp.int32 if np.issubdtype(x.dtype, np.integer) else jnp.float32)


def _sites(plan: Plan, settings: Settings) -> Iterator[tuple[str, str]]:
    widths = site_widths(plan, settings.arch)
    return ((side, key) for side in plan.sides for key in getattr(widths, side))


def _prices(plan: Plan, stored: StoredRotations, settings: Settings) -> dict[tuple[str, Key], float]:
    """Bits of every site: its angles under the frequencies of all, and its pairing."""
    held = {("inputs", k): x for k, x in stored.inputs.items()} | {("outputs", k): x for k, x in stored.outputs.items()}
    every: Int[np.ndarray, " p"] = np.concatenate([x.codes for x in held.values()])
    values, counts = np.unique(every, return_counts=True)
    length = dict(zip(values.tolist(), -np.log2(counts / every.size), strict=True))
    widths = site_widths(plan, settings.arch)
    prices = {}
    for (side, key), site in held.items():
        pairing = pairing_bits(getattr(widths, side)[key[1]], plan.size) if plan.structure == "pairs" else 0.0
        prices[side, key] = float(sum(length[k] for k in site.codes.tolist())) + pairing
    return prices


def _cheapest(found: Costs, price: Mapping[tuple[str, Key], float]) -> tuple[set[tuple[str, Key]], float]:
    """The set of sites of least cost, and how many bits it saves."""
    chosen: set[tuple[str, Key]] = set()
    saved, layers = 0.0, len(next(iter(found[False, False].values())))
    options = {True: [on for on in found if on[0]], False: [on for on in found if not on[0]]}
    for layer, (group, names) in product(range(layers), MATRICES_OF.items()):
        bare = sum(found[False, False][name][layer] for name in names)
        best: tuple[float, set[tuple[str, Key]]] = (bare, set())
        for inputs in (False, True):
            if not options[inputs]:
                continue
            total = price["inputs", (layer, group)] if inputs else 0.0
            kept = {("inputs", (layer, group))} if inputs else set()
            for name in names:
                cost, on = min(
                    (found[on][name][layer] + (price["outputs", (layer, name)] if on[1] else 0.0), on)
                    for on in options[inputs]
                )
                total += cost
                kept |= {("outputs", (layer, name))} if on[1] else set()
            best = min(best, (total, kept), key=lambda x: x[0])
        saved, chosen = saved + bare - best[0], chosen | best[1]
    return chosen, float(saved)

