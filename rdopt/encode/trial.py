"""What coordinates really cost: the matrices coded hard at one slope, without the passes over text that a file takes.

Relaxed objectives are trusted to rank coordinates only as far as this agrees.
"""

from dataclasses import replace
from typing import NamedTuple

from rdopt.calibration.moments import Moments
from rdopt.calibration.subject import Subject
from rdopt.checkpoint.families import group_widths, matrix_shapes
from rdopt.codec.decoder import decode_matrices
from rdopt.codec.encoder import coded_index, coded_streams
from rdopt.config.schema import EncodeConfig
from rdopt.encode.encode import aligned_source
from rdopt.encode.model import code_matrices
from rdopt.encode.quantize import estimated_distortion
from rdopt.rate.steps import base_step
from rdopt.transforms.gauges.fold import fold, fold_moments
from rdopt.transforms.gauges.gauges import Gauges
from rdopt.transforms.stored.rotations import StoredRotations


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


def hard_cost(
    subject: Subject,
    moments: Moments,
    encode: EncodeConfig,
    lam: float,
    gauges: Gauges,
    stored: StoredRotations | None = None,
) -> HardCost:
    """J of a model's matrices in given coordinates; gains and the drift's correction, which D does not see, are off.

    Args:
        subject: the original.
        moments: its second moments.
        encode: the encoder's configuration.
        lam: the slope.
        gauges: the coordinates.
        stored: and the rotations that the file keeps.
    """
    quick = replace(encode, drift="none", gains="none", finetune=0, structured="none", states=min(encode.states, 8))
    params, arch = fold(subject.params, subject.arch, gauges)
    folded = fold_moments(moments, subject.params, subject.arch, gauges)
    source = aligned_source(subject, params, arch, folded, quick, stored=stored)
    c = base_step(lam, source.weights)
    coded = code_matrices(source, c, quick)
    streams = coded_streams(coded, arch)
    side = 8 * sum(len(data) for name, data in streams.items() if name != "codes")
    index = coded_index(coded, source.parameters)
    found = decode_matrices(streams, index, matrix_shapes(arch), group_widths(arch), quick.threads).weights
    truth = source.coded_params()
    blocks = {**truth["blocks"], **{k: [found[i, k] for i in range(arch.num_layers)] for _, k in found}}
    D = estimated_distortion(truth, {**truth, "blocks": blocks}, source.coded)
    rate = (coded.indices.bits + side) / source.weights
    return HardCost(coded.indices.bits / source.weights, rate, D, rate + lam * D)
