"""What every command works on: a model, and its text cut into token sequences that it may and may not look at."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Int

from rdopt.calibration.moments import block_bytes
from rdopt.calibration.text import read_documents, split_documents
from rdopt.calibration.tokens import fingerprint, token_batch, tokenize
from rdopt.checkpoint.families import Architecture
from rdopt.checkpoint.folder import Checkpoint, open_checkpoint
from rdopt.config.memory import Cache, memory_budget
from rdopt.config.schema import Config, TextConfig
from rdopt.operator.params import Params, lazy_params, params_to_tensors


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
    """A model: its checkpoint, its float32 weights, read block by block where they are asked for, and their hash."""

    checkpoint: Checkpoint
    params: Params
    fingerprint: str
    cache: Cache = field(default_factory=lambda: Cache(memory_budget(None)))

    @property
    def arch(self) -> Architecture:
        """Its architecture."""
        return self.checkpoint.arch


def load_subject(model: str | Path, memory: float | None = None) -> Subject:
    """Opens a model and reads its weights once, for their hash.

    Args:
        model: a folder, hub name or demo.
        memory: GiB that all that is kept of it may take; see `RunConfig`.

    Raises:
        UserError: it does not exist, is not supported, or is damaged.
    """
    checkpoint = open_checkpoint(model)
    params = lazy_params(checkpoint)
    return Subject(
        checkpoint=checkpoint,
        params=params,
        fingerprint=params_fingerprint(params, checkpoint.arch),
        cache=Cache(max(memory_budget(memory) // 2, block_bytes(checkpoint.arch))),
    )


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
    subject = load_subject(config.model, config.run.memory)
    return subject, load_corpus(config.text, subject.checkpoint.folder, subject.arch.vocab_size)
