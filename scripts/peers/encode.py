"""A whole model through a peer: quantization, the file, and the weights that the file holds.

One number leads: the search moves it until the file has the wanted bits/weight. How it sets the step of every matrix
is in `allocation`, what a matrix knows of the quantized ones before it in `prefix`.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import NamedTuple

import numpy as np

from peers.allocation import relative_steps, watersic_steps
from peers.gptq import gptq
from peers.model import Coded, Key, Model, Moment, PeerSettings, Weights, with_matrices
from peers.peer_file import Packed, PeerMatrix, pack, unpack
from peers.prefix import quantize_behind_prefix
from peers.rtn import row_rms, rtn
from peers.scales import COARSE, FINE, snap
from peers.watersic import make_problem, watersic
from rdopt.checkpoint.families import INPUT_OF, coded_weights
from rdopt.encode.quantize import coded_matrices
from rdopt.encode.target import search_step, size_goal
from rdopt.transforms.bases import starting_gauges
from rdopt.transforms.gauges.gauges import fold, fold_moments

# Bits/weight by which a file may miss its size: curves are read between their points. Behind a prefix a trial is dear.
SEARCH_AIM, PREFIX_AIM, PREFIX_TOLERANCE = 0.015, 0.05, 0.1
# First guesses for the lead at zero bits: the step of a Gaussian of unit spread has sqrt(2 pi e) 2^-R.
_GAUSSIAN = math.sqrt(2 * math.pi * math.e)


class Method(NamedTuple):
    """A peer made ready for a model.

    Attributes:
        base: from the lead to the factor of all weights.
        quantize: (lead, matrix, target, second moment of the input) to indices and scales on the file's grid.
        density: of that grid.
        start: the lead at zero bits.
    """

    base: Callable[[float], float]
    quantize: Callable[[float, Key, Weights, Moment], PeerMatrix]
    density: int
    start: float


class File(NamedTuple):
    """A trial of the search."""

    lead: float
    matrices: list[PeerMatrix]
    packed: Packed


def hadamard_model(model: Model, seed: int = 0) -> Model:
    """The model behind QuaRot's offline rotations (2404.00456, stages 1a and 1c): residual stream and value heads.

    The online Hadamard transforms of QuaRot quantize activations; weights alone do not need them.
    """
    gauges = starting_gauges("hadamard", model.params, model.arch, model.moments, seed)
    params, arch = fold(model.params, model.arch, gauges)
    moments = fold_moments(model.moments, model.params, model.arch, gauges)
    return model._replace(params=params, arch=arch, moments=moments)


def encode_peer(model: Model, settings: PeerSettings, target_bpw: float) -> Coded:
    """The file of a model at a wanted size, and what a decoder gets from it.

    Args:
        model: coordinates, moments, calibration sequences.
        settings: method.
        target_bpw: bits/weight in file bytes.

    Returns:
        the file near that size; with pooled tables its `more` also tells the size with a table per column.

    Raises:
        UserError: the size cannot be reached, or the moments are singular.
    """
    keys = list(coded_matrices(model.arch.num_layers))
    method = {"rtn": uniform, "gptq": uniform, "watersic": interference_cancellation}[settings.method](model, settings)
    weights, goal = coded_weights(model.arch), size_goal(target_bpw)

    def file_at(lead: float, behind: bool) -> File:
        found = _behind_prefix(model, settings, method, lead) if behind else quantize_alone(model, method, lead)
        matrices = [found[k] for k in keys]
        return File(lead, matrices, pack(matrices, method.base(lead), method.density, settings.tables))

    def bpw(found: File) -> float:
        return 8 * len(found.packed.data) / weights

    start = 2.0**-target_bpw * method.start
    file = search_step(partial(file_at, behind=False), bpw, goal._replace(aim=SEARCH_AIM), start)
    if settings.prefix != "none":  # which costs much time and changes the size little
        near = goal._replace(aim=PREFIX_AIM, tolerance=PREFIX_TOLERANCE)
        file = search_step(partial(file_at, behind=True), bpw, near, file.lead)
    decoded = unpack(file.packed.data, [model.params["blocks"][name][layer].shape for layer, name in keys])
    params = with_matrices(model.params, dict(zip(keys, decoded, strict=True)))
    more = {}
    if settings.tables == "pooled":  # the same codes with the other tables: a second arm for nothing
        other = pack(file.matrices, method.base(file.lead), method.density, "per-column")
        more["per_column"] = {"bpw": 8 * len(other.data) / weights, "bpw_ideal": other.ideal_bits / weights}
    return Coded(bpw(file), file.packed.ideal_bits / weights, params, model.arch, more)


def quantize_alone(model: Model, method: Method, lead: float) -> dict[Key, PeerMatrix]:
    """All matrices with the original model's inputs."""
    keys = list(coded_matrices(model.arch.num_layers))

    def one(key: Key) -> PeerMatrix:
        W, sigma = model.params["blocks"][key[1]][key[0]], model.moments.sigma[INPUT_OF[key[1]]][key[0]]
        return method.quantize(lead, key, W, sigma)

    with ThreadPoolExecutor() as threads:
        return dict(zip(keys, threads.map(one, keys), strict=True))


def _behind_prefix(model: Model, settings: PeerSettings, method: Method, lead: float) -> dict[Key, PeerMatrix]:
    return quantize_behind_prefix(model, settings, method.base(lead), partial(method.quantize, lead))


def uniform(model: Model, settings: PeerSettings) -> Method:
    """RTN and GPTQ: one step a row, the lead times a shape that is fixed beforehand."""
    relative = relative_steps(model, settings) if settings.steps == "sensitivity" else None

    @cache
    def shape(key: Key) -> np.ndarray:
        rms = row_rms(model.params["blocks"][key[1]][key[0]], settings.rows)
        return snap(rms if relative is None else relative[key] * rms / np.sqrt(np.mean(rms**2)))

    def base(lead: float) -> float:
        return float(np.float32(lead))

    def quantize(lead: float, key: Key, W: Weights, sigma: Moment) -> PeerMatrix:
        step = base(lead) * shape(key)
        if settings.method == "rtn":
            z = rtn(W, step)
        else:
            z = gptq(W, sigma, step, damping=settings.damping, order=settings.order)
        return PeerMatrix(z, shape(key), np.ones(W.shape[1]))

    return Method(base, quantize, COARSE, _GAUSSIAN)


def interference_cancellation(model: Model, settings: PeerSettings) -> Method:
    """WaterSIC: a step per column; its fitted scales are rounded to the file's grid here."""
    step = watersic_steps(model, settings)
    density = COARSE if settings.shrink == "none" else FINE

    def quantize(lead: float, key: Key, W: Weights, sigma: Moment) -> PeerMatrix:
        problem = make_problem(W, sigma, settings.damping)
        z, row, col = watersic(problem, step(key, problem, lead), settings.shrink)
        return PeerMatrix(z, snap(row, density), snap(col, density))

    return Method(lambda lead: 1.0, quantize, density, 1.0)
