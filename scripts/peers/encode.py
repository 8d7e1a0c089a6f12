"""A whole model through a peer: quantization, the file, and the weights that the file holds.

One number leads: the search moves it until the file has the wanted bits/weight. How it sets the step of every matrix
is in `peers.allocation`.

Matrices are quantized alone, or one by one in the order of the computation, each behind what is already quantized:
GPTQ's reference code measures the second moments S^ of a block on the activations of the quantized blocks before it;
WaterSIC (2603.04956; its options "qronos" and "residual_compensation") also moves the targets, so that they undo the
drift of the inputs and of the residual stream (`rdopt.encode.drift`). The search for a mixture of both moments and the
attention-weighted moments of its authors are left out.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import NamedTuple

import numpy as np

from peers.allocation import relative_steps, watersic_steps
from peers.gptq import gptq, row_rms, rtn
from peers.model import DecodedModel, Key, Moment, Weights, with_matrices
from peers.peer_file import COARSE_SCALES, FINE_SCALES, PeerFile, PeerMatrix, pack_peer, snap_scales, unpack_peer
from peers.settings import PeerSettings
from peers.watersic import watersic, weighted_matrix
from rdopt.checkpoint.families import INPUT_OF, MATRICES_OF, coded_matrices, coded_weights, input_groups
from rdopt.encode.drift import Prefix
from rdopt.encode.target import search_step, size_goal
from rdopt.transforms.aligned import Aligned

# Bits/weight by which a file may miss its size: curves are read between their points. Behind a prefix a trial is dear.
SEARCH_AIM, PREFIX_AIM, PREFIX_TOLERANCE = 0.015, 0.05, 0.1
# First guesses for the lead at zero bits: the step of a Gaussian of unit spread has sqrt(2 pi e) 2^-R.
_GAUSSIAN = math.sqrt(2 * math.pi * math.e)


# From a matrix, its target and the second moment of its input to indices and scales.
Quantize = Callable[[Key, Weights, Moment], PeerMatrix]


class PeerMethod(NamedTuple):
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


class SizeTrial(NamedTuple):
    """A trial of the search."""

    lead: float
    matrices: list[PeerMatrix]
    packed: PeerFile


def encode_peer(model: Aligned, settings: PeerSettings, target_bpw: float) -> DecodedModel:
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

    def file_at(lead: float, behind: bool) -> SizeTrial:
        quantized = _behind_prefix(model, settings, method, lead) if behind else quantize_alone(model, method, lead)
        matrices = [quantized[k] for k in keys]
        return SizeTrial(lead, matrices, pack_peer(matrices, method.base(lead), method.density, settings.tables))

    def bpw(trial: SizeTrial) -> float:
        return 8 * len(trial.packed.data) / weights

    start = 2.0**-target_bpw * method.start
    file = search_step(partial(file_at, behind=False), bpw, goal._replace(aim=SEARCH_AIM), start)
    if settings.prefix != "none":  # which costs much time and changes the size little
        near = goal._replace(aim=PREFIX_AIM, tolerance=PREFIX_TOLERANCE)
        file = search_step(partial(file_at, behind=True), bpw, near, file.lead)
    decoded = unpack_peer(file.packed.data, [model.block(layer).params[name].shape for layer, name in keys])
    params = with_matrices(model.network(), dict(zip(keys, decoded, strict=True)))
    more = {}
    if settings.tables == "pooled":  # the same codes with the other tables: a second arm for nothing
        other = pack_peer(file.matrices, method.base(file.lead), method.density, "per-column")
        more["per_column"] = {"bpw": 8 * len(other.data) / weights, "bpw_ideal": other.ideal_bits / weights}
    return DecodedModel(bpw(file), file.packed.ideal_bits / weights, params, model.arch, more)


def quantize_alone(model: Aligned, method: PeerMethod, lead: float) -> dict[Key, PeerMatrix]:
    """All matrices with the original model's inputs."""
    keys = list(coded_matrices(model.arch.num_layers))

    def one(key: Key) -> PeerMatrix:
        layer, name = key
        block = model.block(layer)
        return method.quantize(lead, key, block.params[name], block.sigma[INPUT_OF[name]])

    for _ in model.blocks():  # folded once, before the threads ask for them
        pass
    with ThreadPoolExecutor() as threads:
        return dict(zip(keys, threads.map(one, keys), strict=True))


def _behind_prefix(model: Aligned, settings: PeerSettings, method: PeerMethod, lead: float) -> dict[Key, PeerMatrix]:
    return quantize_behind_prefix(model, settings, method.base(lead), partial(method.quantize, lead))


def quantize_behind_prefix(
    model: Aligned, settings: PeerSettings, base: float, quantize: Quantize
) -> dict[Key, PeerMatrix]:
    """All coded matrices, each with the inputs of the model quantized so far.

    Args:
        model: coordinates, calibration sequences.
        settings: prefix "inputs" keeps the weights as targets, "drift" moves them; damping.
        base: factor of all weights.
        quantize: one matrix.
    """
    assert model.tokens is not None
    prefix = Prefix(model, model.tokens, settings.damping)
    quantized: dict[Key, PeerMatrix] = {}
    done: dict[str, np.ndarray] = {}
    for layer, group in input_groups(model.arch.num_layers):
        names = MATRICES_OF[group]
        sums = prefix.sums(layer, group, done)
        if settings.prefix == "drift":
            targets = prefix.targets_of(sums, layer, group)
        else:
            targets = {name: model.block(layer).params[name] for name in names}
        for name in names:
            z, row, col = quantized[layer, name] = quantize((layer, name), targets[name], sums.S)
            done[name] = (z * np.outer(row, base * col)).astype(np.float32)
        if group == "down":
            prefix.advance(layer, done)
            done = {}
    return quantized


def uniform(model: Aligned, settings: PeerSettings) -> PeerMethod:
    """RTN and GPTQ: one step a row, the lead times a shape that is fixed beforehand."""
    relative = relative_steps(model, settings) if settings.steps == "sensitivity" else None

    @cache
    def shape(key: Key) -> np.ndarray:
        layer, name = key
        rms = row_rms(model.block(layer).params[name], settings.rows)
        return snap_scales(rms if relative is None else relative[key] * rms / np.sqrt(np.mean(rms**2)))

    def base(lead: float) -> float:
        return float(np.float32(lead))

    def quantize(lead: float, key: Key, W: Weights, sigma: Moment) -> PeerMatrix:
        step = base(lead) * shape(key)
        if settings.method == "rtn":
            z = rtn(W, step)
        else:
            z = gptq(W, sigma, step, damping=settings.damping, order=settings.order)
        return PeerMatrix(z, shape(key), np.ones(W.shape[1]))

    return PeerMethod(base, quantize, COARSE_SCALES, _GAUSSIAN)


def interference_cancellation(model: Aligned, settings: PeerSettings) -> PeerMethod:
    """WaterSIC: a step per column; its fitted scales are rounded to the file's grid here."""
    step = watersic_steps(model, settings)
    density = COARSE_SCALES if settings.shrink == "none" else FINE_SCALES

    def quantize(lead: float, key: Key, W: Weights, sigma: Moment) -> PeerMatrix:
        matrix = weighted_matrix(W, sigma, settings.damping)
        z, row, col = watersic(matrix, step(key, matrix, lead), settings.shrink)
        return PeerMatrix(z, snap_scales(row, density), snap_scales(col, density))

    return PeerMethod(lambda lead: 1.0, quantize, density, 1.0)
