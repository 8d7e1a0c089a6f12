"""`rdopt export`: the aligned model as a plain checkpoint, with the transforms that lead back to the original."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from rdopt.calibration.subject import Corpus, Subject, load_subject, open_subject
from rdopt.checkpoint.atomic import new_folder
from rdopt.checkpoint.families import Architecture
from rdopt.checkpoint.write import carried_files, write_checkpoint
from rdopt.config.errors import UserError
from rdopt.config.load import load_config
from rdopt.config.schema import Config, RunConfig
from rdopt.evaluate.divergence import Reference, compare
from rdopt.evaluate.perplexity import windows
from rdopt.operator.params import Params, map_params, stacked
from rdopt.transforms.aligned import Aligned
from rdopt.transforms.files import AlignmentFiles, architecture_of_original, load_alignment, save_alignment
from rdopt.transforms.gauges.coordinates import gauges_of
from rdopt.transforms.gauges.fold import unfold

KL_LIMIT = 1e-6


class Exported(NamedTuple):
    """KL(original || aligned) in nats/token: in float32, and with the aligned weights rounded to bfloat16."""

    kl: float
    kl_bf16: float


class Run(NamedTuple):
    """A finished training run with its model and text."""

    config: Config
    subject: Subject
    corpus: Corpus
    alignment: AlignmentFiles


def open_trained(run: Path, machine: RunConfig) -> Run:
    """Reads a run folder, its model and its text.

    Args:
        run: the folder.
        machine: what the command at hand may take; not what the training was given.

    Raises:
        UserError: the run is unfinished, or its model is not the one it was trained on.
    """
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is no run of rdopt train; name the folder given to its --out.")
    if not (run / "done").is_file():
        raise UserError(f"the run in {run} is not finished; start rdopt train again with the same arguments.")
    config = replace(load_config(run / "config.yaml"), run=machine)
    alignment = load_alignment(run)
    subject, corpus = open_subject(config)
    if alignment.original["fingerprint"] != subject.fingerprint:
        raise UserError(f"the weights of {config.model} changed since {run} was trained; train it again.")
    return Run(config, subject, corpus, alignment)


def reference_of(subject: Subject, corpus: Corpus, config: Config) -> Reference:
    """The original model on the test windows."""
    inputs, scored = windows(
        corpus.test, config.evaluate.context, config.evaluate.stride, config.evaluate.max_tokens
    )
    return Reference(subject.params, subject.arch, inputs, scored, config.evaluate.batch)


def check_alignment(reference: Reference, aligned: Aligned) -> float:
    """KL(original || aligned) in float32, nats/token.

    Raises:
        UserError: it exceeds KL_LIMIT: the transforms are not exact.
    """
    kl = compare(reference, aligned.network(), aligned.arch).kl_mean
    if not kl <= KL_LIMIT:
        raise UserError(
            f"KL(original || aligned) is {kl:.2e} nats/token, above {KL_LIMIT:g}: the transforms are not "
            "orthogonal to working precision; train them again."
        )
    return kl


def export(run: Path, out: Path, machine: RunConfig) -> Exported:
    """Writes the aligned checkpoint of a run, float32, and its transforms.

    Args:
        run: a finished run folder.
        out: a new folder that plain transformers loads.
        machine: what it may take.

    Raises:
        UserError: the run is unfinished, the fold is not exact, or `out` exists.
    """
    config, subject, corpus, alignment = open_trained(run, machine)
    aligned = Aligned(subject=subject, gauges=gauges_of(alignment.records))
    reference = reference_of(subject, corpus, config)
    kl = check_alignment(reference, aligned)
    rounded = compare(reference, map_params(_brain, aligned.network()), aligned.arch).kl_mean
    write_aligned(out, aligned, alignment)
    return Exported(kl, rounded)


def _brain(x: np.ndarray) -> np.ndarray:
    return np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float32)


def write_aligned(out: Path, aligned: Aligned, alignment: AlignmentFiles) -> None:
    """Writes the checkpoint and the transforms as one folder that appears complete or not at all."""
    with new_folder(out) as folder:
        inner = folder / "model"
        write_checkpoint(
            inner,
            aligned.config,
            aligned.tensors(),
            dtype="float32",
            files=carried_files(aligned.subject.checkpoint.folder),
        )
        for path in sorted(inner.iterdir()):
            path.rename(folder / path.name)
        inner.rmdir()
        save_alignment(folder, alignment)


def restore(folder: Path) -> tuple[Params, Architecture]:
    """The original weights of an exported folder, from its aligned weights and its transforms.

    Returns:
        float32 params and the original architecture.
    """
    aligned = load_subject(folder)
    alignment = load_alignment(folder)
    arch = architecture_of_original(aligned.arch, alignment.original)
    return unfold(stacked(aligned.params), arch, gauges_of(alignment.records), alignment.gains), arch

