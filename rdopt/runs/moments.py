"""The second moments of a run: measured once on its calibration text and kept in its folder."""

import math
from pathlib import Path

from rdopt.calibration.backward import measure_moments
from rdopt.calibration.moments import Moments, block_bytes
from rdopt.calibration.store import MomentStore, open_moments
from rdopt.calibration.subject import Corpus, Subject
from rdopt.checkpoint.families import Architecture
from rdopt.config.errors import UserError
from rdopt.config.memory import MACHINE_SHARE, memory_budget
from rdopt.config.progress import Tick
from rdopt.config.schema import Config

MOMENTS = "moments"
_STREAMS = 4  # a share of the budget goes to residual streams while moments are measured


def moments_key(subject: Subject, corpus: Corpus, seed: int) -> str:
    """What moments are measured on: the model, its calibration sequences and the seed of the labels."""
    return f"{subject.fingerprint} {corpus.fingerprint} {seed}"


def refuse_small(arch: Architecture, memory: float | None) -> None:
    """Refuses a budget that one block exceeds: its moments and factors are held together all the same.

    Args:
        arch: of the model.
        memory: `run.memory`.

    Raises:
        UserError: the budget is too small.
    """
    budget, least = memory_budget(memory), block_bytes(arch)
    if budget < least:
        of = "" if memory is not None else f" ({MACHINE_SHARE:.0%} of this machine's)"
        raise UserError(
            f"run.memory is {budget / 2**30:.3g} GiB{of}, but one block takes {least / 2**30:.3g} GiB with "
            f"its second moments and their factors; give --memory {math.ceil(least / 2**30 * 100) / 100:g} or more."
        )


def moments_of(
    folder: Path, subject: Subject, corpus: Corpus, config: Config, progress: Tick | None = None
) -> Moments:
    """The moments of a model on its calibration text.

    Args:
        folder: of the moments, unless `run.moments` names another; those of another model or text are measured again,
            unfinished ones go on.
        subject: the model.
        corpus: its text.
        config: the text's seed, which draws the labels, and the memory that may be used.
        progress: called with (passes through a block, of how many) while they are measured.

    Raises:
        UserError: the folder that `run.moments` names holds no finished moments of this model and text, or one block
            exceeds the budget.
    """
    refuse_small(subject.arch, config.run.memory)
    tokens, layers, key = corpus.calibration, subject.arch.num_layers, moments_key(subject, corpus, config.text.seed)
    if config.run.moments is not None:
        return open_moments(Path(config.run.moments), layers, key)
    store = MomentStore(folder, layers, key, tokens.size)
    store.open()
    if not store.complete:
        budget = memory_budget(config.run.memory) // _STREAMS
        measure_moments(
            subject.params, subject.arch, tokens, store, seed=config.text.seed, budget=budget, progress=progress
        )
    return store.moments()
