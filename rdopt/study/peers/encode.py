"""A whole model through a peer: steps of every matrix, quantization, the file, and the weights that the file holds.

One number leads: the search moves it until the file has the wanted bits/weight. Without allocation it is the step
relative to the weights (RTN, GPTQ: the same relative error for every matrix) or the rate (WaterSIC: the same for every
matrix). With allocation ("sensitivity") every matrix takes the step that end-to-end sensitivity asks for at high rate,
1 / sqrt(mean diag G_k) in the metric of its input; that part is ours, not the peers'.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from rdopt.calibration import INPUT_OF, Moments
from rdopt.checkpoint import Architecture
from rdopt.codec import search_step
from rdopt.codec.quantize import coded_matrices
from rdopt.codec.steps import damped_cholesky
from rdopt.operator import Params
from rdopt.study.peers.gptq import Order, gptq
from rdopt.study.peers.peer_file import Packed, PeerMatrix, Tables, entropy_bits, pack, unpack
from rdopt.study.peers.rtn import Rows, row_rms, rtn
from rdopt.study.peers.scales import COARSE, FINE, snap
from rdopt.study.peers.watersic import Problem, Shrink, cancel, make_problem, step_at_rate, watersic
from rdopt.transforms import fold, fold_moments, starting_gauges

Key = tuple[int, str]
_RATE_TOLERANCE, _RATE_TRIALS = 0.01, 8
_SCALE_BITS = 16  # what the WaterSIC paper counts for a row and for a column


@dataclass(frozen=True, kw_only=True)
class PeerSettings:
    """One peer method and its settings."""

    method: Literal["rtn", "gptq", "watersic"]
    damping: float = 0.0
    """Share of the mean diagonal added to the second moments (RTN reads none)."""
    rows: Rows = "row"
    """RTN, GPTQ: steps follow the rms of the row or of the matrix."""
    order: Order = "given"
    """GPTQ: order of the columns."""
    shrink: Shrink = "rescaled"
    """WaterSIC: which gains."""
    tables: Tables = "any"
    """Entropy coding."""
    steps: Literal["published", "sensitivity"] = "published"
    """Whose allocation across matrices."""


class Model(NamedTuple):
    """Weights in some coordinates and the second moments there."""

    params: Params
    arch: Architecture
    moments: Moments


class Coded(NamedTuple):
    """What a method made of a model.

    Attributes:
        bpw: bits/weight of the coded matrices, file bytes.
        bpw_ideal: with ideal code lengths, as publications count; scales and headers at their real size.
        params: decoded weights, everything else untouched.
        arch: their architecture.
    """

    bpw: float
    bpw_ideal: float
    params: Params
    arch: Architecture


def hadamard_model(model: Model, seed: int = 0) -> Model:
    """The model behind QuaRot's offline rotations (2404.00456, stages 1a and 1c): residual stream and value heads.

    The online Hadamard transforms of QuaRot quantize activations; weights alone do not need them.
    """
    gauges = starting_gauges("hadamard", model.params, model.arch, model.moments, seed)
    params, arch = fold(model.params, model.arch, gauges)
    return Model(params, arch, fold_moments(model.moments, model.params, model.arch, gauges))


def weight_count(model: Model) -> int:
    """Number of coded weights."""
    return sum(model.params["blocks"][name][layer].size for layer, name in coded_matrices(model.arch.num_layers))


def encode_peer(model: Model, settings: PeerSettings, target_bpw: float) -> Coded:
    """The file of a model at a wanted size, and what a decoder gets from it.

    Args:
        model: coordinates, moments.
        settings: method.
        target_bpw: bits/weight in file bytes.

    Raises:
        UserError: the size cannot be reached, or the moments are singular.
    """
    keys = list(coded_matrices(model.arch.num_layers))
    quantize = {"rtn": _uniform, "gptq": _uniform, "watersic": _watersic}[settings.method](model, settings)
    fitted = settings.method == "watersic" and settings.shrink != "none"
    density, weights = FINE if fitted else COARSE, weight_count(model)

    def file_at(lead: float) -> Packed:
        matrices, base = quantize(lead)
        return pack(matrices, base, density, settings.tables)

    packed = search_step(file_at, lambda f: 8 * len(f.data) / weights, target_bpw, 2.0**-target_bpw * _start(settings))
    decoded = unpack(packed.data, [model.params["blocks"][name][layer].shape for layer, name in keys])
    params = with_matrices(model.params, dict(zip(keys, decoded, strict=True)))
    return Coded(8 * len(packed.data) / weights, packed.ideal_bits / weights, params, model.arch)


def _start(settings: PeerSettings) -> float:
    """A first guess for the lead at zero bits: the step of a Gaussian of unit spread has sqrt(2 pi e) 2^-R."""
    return 1.0 if settings.method == "watersic" else math.sqrt(2 * math.pi * math.e)


def with_matrices(params: Params, matrices: dict[Key, Float[np.ndarray, "out in"]]) -> Params:
    """The same model with its coded matrices replaced."""
    names = {name for _, name in matrices}
    layers = 1 + max(layer for layer, _ in matrices)
    stacked = {name: np.stack([matrices[layer, name] for layer in range(layers)]) for name in names}
    return {**params, "blocks": {**params["blocks"], **stacked}}


Quantizer = Callable[[float], tuple[list[PeerMatrix], float]]


def _uniform(model: Model, settings: PeerSettings) -> Quantizer:
    """RTN and GPTQ: one step a row, the lead times a shape that is fixed beforehand."""
    keys = list(coded_matrices(model.arch.num_layers))
    relative = {key: 1.0 for key in keys}
    if settings.steps == "sensitivity":
        relative = relative_steps(model, settings)
    shapes = {}
    for key in keys:
        W = model.params["blocks"][key[1]][key[0]]
        rms = row_rms(W, settings.rows)
        shapes[key] = snap(rms if settings.steps == "published" else relative[key] * rms / np.sqrt(np.mean(rms**2)))

    def quantize(lead: float) -> tuple[list[PeerMatrix], float]:
        base = float(np.float32(lead))
        found = []
        for layer, name in keys:
            W, step = model.params["blocks"][name][layer], base * shapes[layer, name]
            if settings.method == "rtn":
                z = rtn(W, step)
            else:
                sigma = model.moments.sigma[INPUT_OF[name]][layer]
                z = gptq(W, sigma, step, damping=settings.damping, order=settings.order)
            found.append(PeerMatrix(z, shapes[layer, name], np.ones(W.shape[1])))
        return found, base

    return quantize


def relative_steps(model: Model, settings: PeerSettings) -> dict[Key, float]:
    """1 / sqrt(mean diag G_k s_k) over its geometric mean, relative to the matrices' rms.

    s_k is the error that a unit of index noise leaves at the output: mean L_jj^2 with feedback, mean diag sigma
    without. Normalised so that the lead keeps its size.
    """
    logs, rms = {}, {}
    for layer, name in coded_matrices(model.arch.num_layers):
        sigma = model.moments.sigma[INPUT_OF[name]][layer]
        if settings.method == "gptq":
            power = float(np.mean(np.diagonal(damped_cholesky(sigma, settings.damping)) ** 2))
        else:
            power = float(np.mean(np.diagonal(sigma)))
        logs[layer, name] = -0.5 * math.log2(power * float(np.mean(model.moments.diag_G(name, layer))))
        rms[layer, name] = math.log2(float(np.sqrt(np.mean(model.params["blocks"][name][layer] ** 2))))
    shift = float(np.mean([rms[k] - logs[k] for k in logs]))
    return {k: 2.0 ** (v + shift) for k, v in logs.items()}


def _watersic(model: Model, settings: PeerSettings) -> Quantizer:
    """WaterSIC: the lead is 2^-rate, or the step c of all matrices before their sensitivities."""
    problems: dict[Key, Problem] = {}
    for layer, name in coded_matrices(model.arch.num_layers):
        W, sigma = model.params["blocks"][name][layer], model.moments.sigma[INPUT_OF[name]][layer]
        problems[layer, name] = make_problem(W, sigma, settings.damping)
    if settings.steps == "sensitivity":
        logs = {k: -0.5 * math.log2(float(np.mean(model.moments.diag_G(k[1], k[0])))) for k in problems}
        # Centred on the steps of equal rate, so that the lead stays near 2^-rate.
        shift = np.mean([math.log2(step_at_rate(p, 0.0)) - logs[k] for k, p in problems.items()])

        def step(key: Key, lead: float) -> float:
            return lead * 2.0 ** float(logs[key] + shift)
    else:
        step = _EqualRate(problems, settings.shrink)

    def quantize(lead: float) -> tuple[list[PeerMatrix], float]:
        found = [watersic(p, step(key, lead), settings.shrink) for key, p in problems.items()]
        return [PeerMatrix(*scaled) for scaled in found], 1.0

    return quantize


class _EqualRate:
    """The step at which a matrix has the wanted rate, indices at their entropy and 16 bits a scale.

    Remembers how far each matrix lay from the high-resolution formula, so that a search over rates starts close.
    """

    def __init__(self, problems: dict[Key, Problem], shrink: Shrink) -> None:
        self._problems = problems
        self._shrink: Shrink = shrink
        self._offset = dict.fromkeys(problems, 0.0)

    def __call__(self, key: Key, lead: float) -> float:
        problem, rate = self._problems[key], -math.log2(lead)
        rows = len(problem.W)
        entries = rows * len(problem.live)
        wanted = (rate * entries - _SCALE_BITS * (rows + len(problem.live))) / entries
        log_c, slope = math.log2(step_at_rate(problem, wanted)) + self._offset[key], -1.0
        last: tuple[float, float] | None = None
        for _ in range(_RATE_TRIALS):
            z, _, _ = cancel(problem, 2.0**log_c, self._shrink)
            miss = entropy_bits(z, "matrix") / entries - wanted
            if abs(miss) < _RATE_TOLERANCE:
                break
            if last is not None and log_c != last[0]:
                slope = min(-0.1, (miss - last[1]) / (log_c - last[0]))
            last = (log_c, miss)
            log_c -= max(-2.0, min(2.0, miss / slope))
        self._offset[key] = log_c - math.log2(step_at_rate(problem, wanted))
        return 2.0**log_c
