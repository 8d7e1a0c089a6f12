"""rdopt's encoder as an arm of a comparison, at a size that it meets roughly but in few trials."""

from dataclasses import replace

from peers.benchmark import Benchmark
from peers.model import DecodedModel
from rdopt.codec.decoder import decode_model
from rdopt.config.schema import EncodeConfig
from rdopt.encode.judge import Judge, finetune_file
from rdopt.encode.model import encode_at_step
from rdopt.encode.source import make_source
from rdopt.encode.target import search_step, size_goal
from rdopt.operator.params import params_from_tensors
from rdopt.rate.steps import base_step
from rdopt.transforms.aligned import Aligned

NEAR = 0.05  # bits/weight; curves are read between their points
_TRIALS = 3
_LAM = 50.0


def encode_own(benchmark: Benchmark, model: Aligned, encode: EncodeConfig, target_bpw: float) -> DecodedModel:
    """The file of rdopt near a wanted size, decoded.

    Args:
        benchmark: whose model it is.
        model: the same in the coordinates that are coded.
        encode: settings without a size.
        target_bpw: bits/weight in file bytes.

    Raises:
        UserError: the size cannot be reached.
    """
    c = scalar_base_step(model, encode, target_bpw)
    if encode.grid == "trellis":
        c = trellis_base_step(model, encode, target_bpw, c)
    source = make_source(model, encode)
    encoded = encode_at_step(source, c, encode)
    if encode.finetune:
        encoded, _ = finetune_file(source, encoded, encode, Judge(benchmark.selection, benchmark.calibration))
    decoded = decode_model(encoded.data, benchmark.cells.model)
    weights = params_from_tensors(decoded.tensors, decoded.arch)
    parts = {"bits": {name: bits / source.weights for name, bits in encoded.bits.items()}}
    return DecodedModel(encoded.bpw, encoded.bpw_estimated, weights, decoded.arch, parts)


def scalar_base_step(model: Aligned, encode: EncodeConfig, target_bpw: float) -> float:
    """The base step at which a scalar grid has the wanted size: exact for scalar grids, close for the trellis."""
    scalar = replace(encode, grid="round" if encode.grid == "round" else "feedback")
    source = make_source(model, scalar)
    start = base_step(_LAM, source.weights)
    return search_step(
        lambda c: encode_at_step(source, c, scalar), lambda encoded: encoded.bpw, size_goal(target_bpw), start
    ).c


def trellis_base_step(model: Aligned, encode: EncodeConfig, target_bpw: float, c: float) -> float:
    """The base step near the wanted size with few states and no drift, which change the size little; from c."""
    quick = replace(encode, states=min(encode.states, 4), drift="none", finetune=0)
    source = make_source(model, quick)
    for _ in range(_TRIALS):
        miss = encode_at_step(source, c, quick).bpw - target_bpw
        c *= 2.0**miss  # a bit is an octave of steps
        if abs(miss) <= NEAR:
            break
    return c
