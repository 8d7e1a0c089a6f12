"""What coordinates really cost: the matrices coded hard at one slope, without the passes over text that a file takes.

Relaxed objectives are trusted to rank coordinates only as far as this agrees.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from rdopt.checkpoint.families import MATRICES, Key, group_widths, matrix_shapes
from rdopt.codec.decoder import MatrixParts, MatrixReader
from rdopt.codec.encoder import coded_index, coded_streams
from rdopt.config.schema import EncodeConfig
from rdopt.encode.model import code_matrices
from rdopt.encode.source import make_source
from rdopt.rate.steps import base_step
from rdopt.transforms.aligned import Aligned, distortion


class HardCost(NamedTuple):
    """A trial encoding.

    Attributes:
        codes: bits/weight of the indices, ideal code length.
        rate: of everything that rebuilds the matrices but headers, stored transforms included.
        distortion: D of the real errors, nats/token.
        J: rate + lambda distortion.
    """

    codes: float
    rate: float
    distortion: float
    J: float


def hard_cost(aligned: Aligned, encode: EncodeConfig, lam: float) -> HardCost:
    """J of a model's matrices in given coordinates; gains and the drift's correction, which D does not see, are off.

    Args:
        aligned: the model in the coordinates, with its moments.
        encode: the encoder's configuration.
        lam: the slope.
    """
    quick = replace(encode, drift="none", gains="none", finetune=0, structured="none", states=min(encode.states, 8))
    source = make_source(aligned, quick)
    c = base_step(lam, source.weights)
    coded = code_matrices(source, c, quick)
    streams = coded_streams(coded, source.arch)
    side = 8 * sum(len(data) for name, data in streams.items() if name != "codes")
    shapes, widths = matrix_shapes(source.arch), group_widths(source.arch)
    index = coded_index(coded, source.parameters)
    reader = MatrixReader(streams, index, shapes, widths, quick.threads)
    held: dict[int, dict[Key, MatrixParts]] = {}  # of the last layer asked for

    def decoded(layer: int, name: str) -> Float[np.ndarray, "out in"]:
        if layer not in held:
            held.clear()
            held[layer] = reader.read([(layer, other) for other in MATRICES])
        return held[layer][layer, name].weights

    D = distortion(source.blocks(), decoded)
    rate = (coded.indices.bits + side) / source.weights
    return HardCost(coded.indices.bits / source.weights, rate, D, rate + lam * D)
