"""Matrices of a peer one by one in the order of the computation, each behind what is already quantized.

GPTQ's reference code measures the second moments S^ of a block on the activations of the quantized blocks before it;
WaterSIC (2603.04956; its options "qronos" and "residual_compensation") also moves the targets, so that they undo the
drift of the inputs and of the residual stream (`rdopt.codec.drift`). The search for a mixture of both moments and the
attention-weighted moments of its authors are left out.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from rdopt.calibration import INPUT_OF
from rdopt.checkpoint import MATRICES, Architecture
from rdopt.codec.drift import Prefix, _inputs, prefix_order
from rdopt.study.peers.model import Key, Matrices, Model, Moment, PeerSettings, Weights
from rdopt.study.peers.peer_file import PeerMatrix

# From a matrix, its target and the second moment of its input to indices and scales.
Quantize = Callable[[Key, Weights, Moment], PeerMatrix]


class QuantizedPrefix(Prefix):
    """A prefix that also tells the second moment of the inputs that the quantized part gives."""

    def input_moment(self, layer: int, group: str, done: Matrices) -> Moment:
        """S^ = E[x^ x^^T] of an input group, float64."""
        _, p_hat = self._blocks(layer, done)
        sums = [np.asarray(_input_sum(p_hat, x, self._arch, group), np.float64) for x in self._quantized]
        return np.sum(sums, axis=0) / self._tokens


@partial(jax.jit, static_argnames=("arch", "group"))
def _input_sum(p: dict, x: Array, arch: Architecture, group: str) -> Array:
    """Sum over tokens of x x^T at the input of a group; the compiler drops the rest of the block."""
    inputs, _ = _inputs(p, x, arch)
    rows = inputs[group].reshape(-1, inputs[group].shape[-1])
    return jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)


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
    prefix = QuantizedPrefix(model.params, model.arch, model.tokens, settings.damping)
    found: dict[Key, PeerMatrix] = {}
    done: dict[str, np.ndarray] = {}
    for layer, group in prefix_order(model.arch.num_layers):
        names = [name for name in MATRICES if INPUT_OF[name] == group]
        S = prefix.input_moment(layer, group, done)
        if settings.prefix == "drift":
            targets = prefix.targets(layer, group, done)
        else:
            targets = {name: model.params["blocks"][name][layer] for name in names}
        for name in names:
            z, row, col = found[layer, name] = quantize((layer, name), targets[name], S)
            done[name] = (z * np.outer(row, base * col)).astype(np.float32)
        if group == "down":
            prefix.advance(layer, done)
            done = {}
    return found
