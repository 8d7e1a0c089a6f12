"""From one leading number to the step of every matrix.

Published: RTN and GPTQ give every matrix the same step relative to its rows (the same relative error), WaterSIC the
same rate. "sensitivity" gives every matrix the step that end-to-end sensitivity asks for at high rate,
1 / sqrt(mean diag G_k) in the metric of its input; that part is ours, not the peers'.
"""

import math
from collections.abc import Callable

import numpy as np

from peers.model import Key
from peers.peer_file import index_entropy_bits
from peers.settings import PeerSettings
from peers.watersic import GainRule, WeightedMatrix, cancel, high_rate_step, weighted_matrix
from rdopt.checkpoint.families import INPUT_OF, coded_matrices
from rdopt.codec.grids.steps import damped_cholesky
from rdopt.transforms.aligned import Aligned

StepOf = Callable[[Key, WeightedMatrix, float], float]
_RATE_TOLERANCE, _RATE_TRIALS = 0.01, 8
_SCALE_BITS = 16  # what the WaterSIC paper counts for a row and for a column


def relative_steps(model: Aligned, settings: PeerSettings) -> dict[Key, float]:
    """1 / sqrt(mean diag G_k s_k) over its geometric mean, relative to the matrices' rms.

    s_k is the error that a unit of index noise leaves at the output: mean L_jj^2 with feedback, mean diag sigma
    without. Normalised so that the lead keeps its size.
    """
    logs, rms = {}, {}
    for layer, name in coded_matrices(model.arch.num_layers):
        block = model.block(layer)
        sigma = block.sigma[INPUT_OF[name]]
        if settings.method == "gptq":
            power = float(np.mean(np.diagonal(damped_cholesky(sigma, settings.damping)) ** 2))
        else:
            power = float(np.mean(np.diagonal(sigma)))
        logs[layer, name] = -0.5 * math.log2(power * float(np.mean(block.diag_G(name))))
        rms[layer, name] = math.log2(float(np.sqrt(np.mean(block.params[name] ** 2))))
    shift = float(np.mean([rms[k] - logs[k] for k in logs]))
    return {k: 2.0 ** (v + shift) for k, v in logs.items()}


def watersic_steps(model: Aligned, settings: PeerSettings) -> StepOf:
    """WaterSIC's step c of a matrix: the lead is 2^-rate, or the step of all matrices before their sensitivities."""
    if settings.steps == "published":
        return _EqualRate(settings.shrink)
    logs, centre = {}, []
    for layer, name in coded_matrices(model.arch.num_layers):
        block = model.block(layer)
        W, sigma = block.params[name], block.sigma[INPUT_OF[name]]
        logs[layer, name] = -0.5 * math.log2(float(np.mean(block.diag_G(name))))
        centre.append(math.log2(high_rate_step(weighted_matrix(W, sigma, settings.damping), 0.0)) - logs[layer, name])
    shift = float(np.mean(centre))  # on the steps of equal rate, so that the lead stays near 2^-rate
    return lambda key, matrix, lead: lead * 2.0 ** (logs[key] + shift)


class _EqualRate:
    """The step at which a matrix has the wanted rate, indices at their entropy and 16 bits a scale.

    Remembers how far each matrix lay from the high-resolution formula, so that a search over rates starts close.
    """

    def __init__(self, gains: GainRule) -> None:
        self._gains: GainRule = gains
        self._offset: dict[Key, float] = {}

    def __call__(self, key: Key, matrix: WeightedMatrix, lead: float) -> float:
        rows = len(matrix.W)
        entries = rows * len(matrix.live)
        wanted = (-math.log2(lead) * entries - _SCALE_BITS * (rows + len(matrix.live))) / entries
        formula = math.log2(high_rate_step(matrix, wanted))
        log_c, slope = formula + self._offset.get(key, 0.0), -1.0
        last: tuple[float, float] | None = None
        for _ in range(_RATE_TRIALS):
            z, _, _ = cancel(matrix, 2.0**log_c, self._gains)
            miss = index_entropy_bits(z, "matrix") / entries - wanted
            if abs(miss) < _RATE_TOLERANCE:
                break
            if last is not None and log_c != last[0]:
                slope = min(-0.1, (miss - last[1]) / (log_c - last[0]))
            last = (log_c, miss)
            log_c -= max(-2.0, min(2.0, miss / slope))
        self._offset[key] = log_c - formula
        return 2.0**log_c
