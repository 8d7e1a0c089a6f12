"""`rdopt eval`: perplexity and KL of a folder or a file against a reference model on the test text."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from rdopt.calibration.subject import load_subject, open_subject
from rdopt.checkpoint.families import Architecture
from rdopt.config.schema import Config
from rdopt.encode.encode import decode_file
from rdopt.evaluate.divergence import Comparison, Reference, as_eval_json, compare, noise_floor_bf16
from rdopt.operator.params import Params, params_from_tensors
from rdopt.runs.export import reference_of


def load_candidate(path: str) -> tuple[Params, Architecture]:
    """A decoded file, or a model folder or hub name, in memory."""
    if Path(path).is_file():
        decoded = decode_file(Path(path))
        return params_from_tensors(decoded.tensors, decoded.arch), decoded.arch
    subject = load_subject(path)
    return subject.params, subject.arch


def evaluate(path: str, config: Config) -> tuple[dict[str, Any], Comparison, Reference]:
    """Compares a candidate with the reference model `config.model`.

    Args:
        path: a file of rdopt encode, a Hugging Face folder, or a hub name.
        config: reference model, text (its test part is used), windows.

    Returns:
        (the eval JSON, the comparison, the reference).

    Raises:
        UserError: bad input, or vocabularies that differ.
    """
    params, arch = load_candidate(path)
    subject, corpus = open_subject(config)
    reference = reference_of(subject, corpus, config)
    found = compare(reference, params, arch)
    floor = noise_floor_bf16(reference)
    return as_eval_json(found, floor, config.evaluate.context, config.evaluate.stride), found, reference


def measure_file(path: Path, source: Path, config: Config) -> tuple[Comparison, Params, float]:
    """A file against what it was encoded from: a run's original model, or the folder itself.

    Returns:
        (comparison, decoded weights, bf16 noise floor).
    """
    params, arch = load_candidate(str(path))
    model = config.model if (source / "run.json").is_file() else str(source)
    subject, corpus = open_subject(replace(config, model=model))
    reference = reference_of(subject, corpus, config)
    return compare(reference, params, arch), params, noise_floor_bf16(reference)
