"""Finetuning after coding: KL(original || decoded) over gains, norms and biases, codes frozen.

What was trained is rounded as a file keeps it, measured on the selection text, and refused when it is no better
there than the file without it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from rdopt.align.devices import Device
from rdopt.checkpoint.families import Architecture
from rdopt.codec.streams.gains import PRECISIONS, Gains, choose_precision, quantize_gains
from rdopt.encode.finetune_model import Trained, kept, log_gains, merged, starting_point, with_turns
from rdopt.encode.finetune_train import REDUNDANT_COLUMNS, FinetuneProgress, FinetuneSettings, Pupil, train
from rdopt.encode.quantize import matrix_shapes
from rdopt.evaluate.divergence import Reference, compare
from rdopt.operator.params import Params
from rdopt.runs.states import StateStore
from rdopt.transforms.stored.rotations import StoredRotations


class Finetuned(NamedTuple):
    """What finetuning found.

    Attributes:
        gains: integer gains of the coded matrices; the given ones when refused.
        params: the decoded model without gains, with norms and biases of 16 bit; the given one when refused.
        kl_before: KL on the selection text of the file as it was, nats/token.
        kl_after: the same with the rounded values that were found.
        accepted: whether kl_after is smaller.
        sentence: what to tell the user.
    """

    gains: Gains | None
    params: Params
    kl_before: float
    kl_after: float
    accepted: bool
    sentence: str


def finetune(
    params: Params,
    arch: Architecture,
    tokens: Int[np.ndarray, "sequences length"],
    selection: Reference,
    settings: FinetuneSettings,
    *,
    devices: Sequence[Device],
    gains: Gains | None = None,
    stored: StoredRotations | None = None,
    store: StateStore | None = None,
    report: Callable[[FinetuneProgress], None] | None = None,
) -> Finetuned:
    """Trains gains, norms and biases of a decoded model on KL.

    Without stored rotations REDUNDANT_COLUMNS keep their column gains.

    Args:
        params: the decoded model without its gains, float32, in the coordinates of `stored` if given.
        arch: its architecture.
        tokens: calibration sequences.
        selection: the original model on the selection text; it is the teacher.
        settings: steps, rates, lambda.
        devices: local devices; the batch is split over them.
        gains: of the file, from which training starts.
        stored: the rotations that the decoder undoes behind the gains.
        store: where checkpoints go; training resumes from its newest one.
        report: called after every step.

    Returns:
        the better of the finetuned and the given model by KL on the selection text. The same input gives the
        same result, also when a run was broken off in between.

    Raises:
        UserError: the loss is not finite, the batch does not divide, or the checkpoint belongs to other input.
        KeyboardInterrupt: after the state was saved.
    """

    def kl(found: Gains | None, changed: Params) -> float:
        return compare(selection, merged(changed, found, stored), arch).kl_mean

    def finest_kl(trained: Trained) -> float:
        finest = quantize_gains(log_gains(trained, "rows"), log_gains(trained, "cols"), PRECISIONS[-1])
        return kl(finest, kept(params, trained))

    before = kl(gains, params)
    fixed = REDUNDANT_COLUMNS if stored is None else ()
    pupil = Pupil(with_turns(params, arch, stored), arch, selection.params, selection.arch, fixed)
    start = starting_point(params, arch, gains)
    best = train(pupil, tokens, settings, start, finest_kl, devices=devices, store=store, report=report).trained
    changed, rows, cols = kept(params, best), log_gains(best, "rows"), log_gains(best, "cols")
    found = choose_precision(rows, cols, matrix_shapes(arch), settings.lam, lambda trial: kl(trial, changed))
    after = kl(found, changed)
    if after >= before:
        return Finetuned(gains, params, before, after, False, _REFUSED.format(before, after))
    return Finetuned(found, changed, before, after, True, _ACCEPTED.format(before, after, 100 * (after / before - 1)))


_REFUSED = "finetuning is refused: on the selection text it takes KL from {:.5f} to {:.5f} nats/token."
_ACCEPTED = "finetuning takes KL on the selection text from {:.5f} to {:.5f} nats/token ({:+.1f} %)."
