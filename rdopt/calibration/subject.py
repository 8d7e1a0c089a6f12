"""What every command works on: a model, and its text cut into token sequences that it may and may not look at."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from rdopt.calibration.backward import second_moments
from rdopt.calibration.moments import EmbeddingMoments, Moments
from rdopt.calibration.text import read_documents, split_documents
from rdopt.calibration.tokens import fingerprint, token_batch, tokenize
from rdopt.checkpoint.atomic import new_file
from rdopt.checkpoint.families import Architecture
from rdopt.checkpoint.folder import Checkpoint, open_checkpoint
from rdopt.config.progress import Tick
from rdopt.config.schema import Config, TextConfig
from rdopt.operator.params import Params, load_params, params_to_tensors

# Of saved moments; those of another version are measured again.
_VERSION = "2"


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Token ids of the three parts of a text.

    Attributes:
        calibration: sequences that moments and transforms are made from, (n, seq_len).
        selection: stream for tuning.
        test: stream for reported figures only.
        description: sources and token counts in one line.
        fingerprint: hash of the calibration sequences.
    """

    calibration: Int[np.ndarray, "n seq_len"]
    selection: Int[np.ndarray, " selection"]
    test: Int[np.ndarray, " test"]
    description: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model in memory: its checkpoint, float32 weights and their hash."""

    checkpoint: Checkpoint
    params: Params
    fingerprint: str

    @property
    def arch(self) -> Architecture:
        """Its architecture."""
        return self.checkpoint.arch


def load_subject(model: str | Path) -> Subject:
    """Reads a model.

    Raises:
        UserError: it does not exist, is not supported, or is damaged.
    """
    checkpoint = open_checkpoint(model)
    params = load_params(checkpoint)
    return Subject(checkpoint=checkpoint, params=params, fingerprint=params_fingerprint(params, checkpoint.arch))


def params_fingerprint(params: Params, arch: Architecture) -> str:
    """Hash of all weights of a model."""
    parts = "".join(name + fingerprint(value) for name, value in params_to_tensors(params, arch))
    return fingerprint(np.frombuffer(parts.encode(), np.uint8))


def load_corpus(text: TextConfig, folder: Path, vocab_size: int) -> Corpus:
    """Reads, splits and tokenizes a text, `folder` the Hugging Face folder with the tokenizer.

    Raises:
        UserError: unreadable or too short a text, or a tokenizer that does not fit the model.
    """
    split = split_documents(read_documents(text.sources, text.split_on))
    streams = {part: tokenize(folder, documents, vocab_size) for part, documents in vars(split).items()}
    batch = token_batch(streams["calibration"], text.seq_len, text.calibration_sequences, text.seed)
    names = ", ".join(Path(s).name for s in text.sources)
    counts = ", ".join(f"{part} {len(stream)}" for part, stream in streams.items())
    return Corpus(
        calibration=batch,
        selection=streams["selection"],
        test=streams["test"],
        description=f"{names} split on {text.split_on}; tokens: {counts}",
        fingerprint=fingerprint(batch),
    )


def open_subject(config: Config) -> tuple[Subject, Corpus]:
    """The model and the text of a configuration."""
    subject = load_subject(config.model)
    return subject, load_corpus(config.text, subject.checkpoint.folder, subject.arch.vocab_size)


def corpus_moments(subject: Subject, corpus: Corpus, text: TextConfig, progress: Tick | None = None) -> Moments:
    """`second_moments` of a model on its calibration sequences."""
    return second_moments(subject.params, subject.arch, corpus.calibration, seed=text.seed, progress=progress)


def save_moments(path: Path, moments: Moments, key: str) -> None:
    """Writes moments in float64 with the fingerprint of what they were measured on."""
    parts: dict[str, dict[str, Any]] = {"sigma": moments.sigma, "G": moments.G}
    if moments.embed is not None:
        parts["embed"] = moments.embed._asdict()
    arrays = {f"{part}.{k}": np.ascontiguousarray(v) for part, held in parts.items() for k, v in held.items()}
    with new_file(path) as part:
        save_file(arrays, str(part), metadata={"version": _VERSION, "key": key, "tokens": str(moments.tokens)})


def load_moments(path: Path, key: str) -> Moments | None:
    """The saved moments, or None when there are none, of another version or measured on something else."""
    if not path.is_file():
        return None
    with safe_open(str(path), "np") as file:
        meta: dict[str, str] = file.metadata()
    if (meta.get("version"), meta.get("key")) != (_VERSION, key):
        return None
    parts: dict[str, dict[str, Any]] = {"sigma": {}, "G": {}, "embed": {}}
    for name, value in load_file(str(path)).items():
        kind, which = name.split(".")
        parts[kind][which] = value
    embed = EmbeddingMoments(**parts["embed"]) if parts["embed"] else None
    return Moments(parts["sigma"], parts["G"], int(meta["tokens"]), embed)
