"""How far a file or a folder is from its original on the test text: KL, perplexity, and where the bits went."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rdopt.calibration.subject import load_subject, open_subject
from rdopt.checkpoint.families import Architecture, block_shapes
from rdopt.codec.decoder import OpenFile, open_file
from rdopt.codec.encoder import Encoded, structure_saved
from rdopt.config.schema import Config
from rdopt.encode.embeddings import embedding_distortion
from rdopt.encode.encode import Prepared
from rdopt.evaluate.divergence import Comparison, as_eval_json, compare, noise_floor_bf16
from rdopt.operator.params import Params, PerBlock
from rdopt.runs.export import reference_of
from rdopt.transforms.aligned import Aligned, distortion


class Measured(NamedTuple):
    """A candidate beside its reference: their comparison, the candidate's weights, KL of the bf16 reference."""

    comparison: Comparison
    params: Params
    noise_floor: float


def file_params(file: OpenFile) -> Params:
    """The weights of a file, those of a block decoded when they are indexed."""

    def parameter(short: str) -> PerBlock:
        return PerBlock(file.arch.num_layers, lambda layer: file.layer(layer)[short])

    return {**file.ends, "blocks": {short: parameter(short) for short in block_shapes(file.arch)}}


def read_model(path: str) -> tuple[Params, Architecture]:
    """What is to be measured, its blocks not yet read: a file of rdopt encode, a Hugging Face folder, or a hub name."""
    if Path(path).is_file():
        file = open_file(Path(path))
        return file_params(file), file.arch
    subject = load_subject(path)
    return subject.params, subject.arch


def measure(path: str, config: Config) -> Measured:
    """Compares a candidate with the model `config.model` on the test part of its text.

    Args:
        path: a file of rdopt encode, a Hugging Face folder, or a hub name.
        config: reference model, text, windows.

    Raises:
        UserError: bad input, or vocabularies that differ.
    """
    params, arch = read_model(path)
    subject, corpus = open_subject(config)
    reference = reference_of(subject, corpus, config)
    return Measured(compare(reference, params, arch), params, noise_floor_bf16(reference))


def eval_figures(measured: Measured, config: Config) -> dict[str, Any]:
    """The JSON of `rdopt eval`."""
    window = config.evaluate
    return as_eval_json(measured.comparison, measured.noise_floor, window.context, window.stride)


def file_distortion(aligned: Aligned, decoded: Params) -> float:
    """D of all errors of a file, embedding and head included, nats/token.

    Args:
        aligned: the model before quantization.
        decoded: the weights of the file, in the coordinates in which the network runs.
    """
    matrices = distortion(aligned.blocks(), lambda layer, name: decoded["blocks"][name][layer])
    return matrices + embedding_distortion(aligned, decoded)


def encode_figures(path: Path, made_from: Path, prepared: Prepared, encoded: Encoded) -> dict[str, Any]:
    """The JSON of `rdopt encode`: a written file against what it was encoded from.

    Args:
        path: the file.
        made_from: a run, whose original model it is compared with, or a model folder.
        prepared: what was encoded.
        encoded: the file's bytes and parts.

    Returns:
        "bpw..." in bits/weight, "parts" in bits per coded weight, "kl" and "distortion_estimated" in nats/token.
    """
    source, config = prepared.source, prepared.config
    model = config.model if (made_from / "run.json").is_file() else str(made_from)
    measured = measure(str(path), replace(config, model=model))
    scales, low_rank = structure_saved(encoded, source.arch)
    return {
        "bpw": encoded.bpw,
        "bpw_estimated": encoded.bpw_estimated,
        "bpw_all": encoded.bpw_all,
        "bytes": len(encoded.data),
        "parts": {k: v / source.weights for k, v in encoded.bits.items()},
        "structure_saved": {"scales": scales, "low_rank": low_rank},
        "distortion_estimated": file_distortion(source.aligned, measured.params),
        "kl": measured.comparison.kl_mean,
        "perplexity_before": measured.comparison.reference_perplexity.value,
        "perplexity_after": measured.comparison.perplexity.value,
        "noise_floor_bf16": measured.noise_floor,
    }
