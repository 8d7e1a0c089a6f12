"""Matrices of a peer one by one in the order of the computation, each behind what is already quantized.

GPTQ's reference code measures the second moments S^ of a block on the activations of the quantized blocks before it;
WaterSIC (2603.04956; its options "qronos" and "residual_compensation") also moves the targets, so that they undo the
drift of the inputs and of the residual stream (`rdopt.encode.drift`). The search for a mixture of both moments and the
attention-weighted moments of its authors are left out.
"""

from collections.abc import Callable

import numpy as np

from peers.model import Key, Model, Moment, PeerSettings, Weights
from peers.peer_file import PeerMatrix
from rdopt.checkpoint.families import MATRICES_OF
from rdopt.encode.drift import Prefix
from rdopt.encode.quantize import input_groups

# From a matrix, its target and the second moment of its input to indices and scales.
Quantize = Callable[[Key, Weights, Moment], PeerMatrix]


def quantize_behind_prefix(
    model: Model, settings: PeerSettings, base: float, quantize: Quantize
) -> dict[Key, PeerMatrix]:
    """All coded matrices, each with the inputs of the model quantized so far.

    Args:
        model: coordinates, calibration sequences.
        settings: prefix "inputs" keeps the weights as targets, "drift" moves them; damping.
        base: factor of all weights.
        quantize: one matrix.
    """
    prefix = Prefix(model.params, model.arch, model.tokens, settings.damping)
    found: dict[Key, PeerMatrix] = {}
    done: dict[str, np.ndarray] = {}
    for layer, group in input_groups(model.arch.num_layers):
        names = MATRICES_OF[group]
        sums = prefix.sums(layer, group, done)
        if settings.prefix == "drift":
            targets = prefix.targets_of(sums, layer, group)
        else:
            targets = {name: model.params["blocks"][name][layer] for name in names}
        for name in names:
            z, row, col = found[layer, name] = quantize((layer, name), targets[name], sums.S)
            done[name] = (z * np.outer(row, base * col)).astype(np.float32)
        if group == "down":
            prefix.advance(layer, done)
            done = {}
    return found
