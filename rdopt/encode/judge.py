"""What may be looked at while a file is made: the original on the selection text, and calibration text to train on."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from rdopt.calibration.tokens import fingerprint
from rdopt.checkpoint.families import MATRICES, Architecture
from rdopt.codec.decoder import decode_model
from rdopt.codec.encoder import Coded, Encoded, assemble
from rdopt.config.errors import UserError
from rdopt.config.schema import EncodeConfig
from rdopt.encode.finetune import Finetuned, FinetuneProgress, FinetuneSettings, finetune
from rdopt.encode.source import Source
from rdopt.encode.target import Goal, Part, divergence_goal
from rdopt.evaluate.divergence import Reference, compare
from rdopt.operator.params import Params, params_from_tensors, params_to_tensors
from rdopt.rate.steps import lam_of_base_step
from rdopt.runs.states import StateStore

Report = Callable[[FinetuneProgress], None]


class Judge(NamedTuple):
    """Texts for decisions.

    Attributes:
        selection: the original model on the selection text.
        tokens: calibration sequences.
        folder: where finetuning keeps its checkpoints; none are kept without one.
    """

    selection: Reference
    tokens: Int[np.ndarray, "n length"]
    folder: Path | None = None

    def divergence(self, params: Params, arch: Architecture) -> float:
        """KL of a model on the selection text, nats/token."""
        return compare(self.selection, params, arch).kl_mean

    def excess(self, params: Params, arch: Architecture) -> float:
        """Loss of a model above the original's on the selection text, nats/token."""
        comparison = compare(self.selection, params, arch)
        return comparison.perplexity.nll - comparison.reference_perplexity.nll

    def goal(self, encode: EncodeConfig) -> tuple[Goal, Callable[[Encoded], float]]:
        """The search that encode.target_kl or encode.target_ppl asks for: (goal, log2 of the value of a file).

        Raises:
            UserError: the wanted perplexity is not above the original's.
        """
        if encode.target_kl is not None:
            name = f"a KL of {encode.target_kl:g} nats/token"
            return divergence_goal(name, encode.target_kl, float), lambda x: math.log2(self.divergence(*_model(x)))
        assert encode.target_ppl is not None
        before = self.selection.perplexity
        excess = math.log(encode.target_ppl) - before.nll
        if excess <= 0:
            raise UserError(
                f"encode.target_ppl is {encode.target_ppl:g}, but the original's perplexity on the selection text is "
                f"{before.value:.4g}; ask for more than that."
            )
        goal = divergence_goal(
            f"a perplexity of {encode.target_ppl:g}", excess, lambda nats: math.exp(before.nll + nats)
        )
        return goal, lambda x: math.log2(max(self.excess(*_model(x)), 1e-9))

    def expected(self, part: Part, coded: Coded, c: float) -> float:
        """log2 of the KL that a whole file would have, by what its part does to the model.

        Errors of different rows add up in KL. A loss above the original's is expected to equal it: the excess of a
        tenth of the errors would drown in the noise of the labels.
        """
        nats = self.divergence(part.model(coded), part.whole.arch)
        return math.log2(nats * part.whole.weights / part.source.weights)


def _model(encoded: Encoded) -> tuple[Params, Architecture]:
    decoded = decode_model(encoded.data)
    return params_from_tensors(decoded.tensors, decoded.arch), decoded.arch


def finetune_file(
    source: Source, encoded: Encoded, encode: EncodeConfig, judge: Judge, report: Report | None = None
) -> tuple[Encoded, Finetuned]:
    """The file with its gains, norms and biases trained on KL, codes frozen; itself where that is refused."""
    decoded = decode_model(encoded.data)
    params = params_from_tensors(decoded.tensors, decoded.arch)
    layers = range(decoded.arch.num_layers)
    plain = {name: np.stack([decoded.plain[i, name] for i in layers]) for name in MATRICES}
    params = {**params, "blocks": {**params["blocks"], **plain}}
    lam = lam_of_base_step(encoded.c, source.weights)
    store = None
    if judge.folder is not None:
        hashes = {
            "file": fingerprint(np.frombuffer(encoded.data, np.uint8)),
            "calibration text": fingerprint(judge.tokens),
            "steps": str(encode.finetune),
        }
        store = StateStore(judge.folder, hashes)
    tuned = finetune(
        params,
        decoded.arch,
        judge.tokens,
        judge.selection,
        FinetuneSettings(steps=encode.finetune, lam=lam),
        devices=jax.local_devices(),
        gains=decoded.gains,
        stored=decoded.stored,
        store=store,
        report=report,
    )
    if store is not None:
        store.close()
    if not tuned.accepted:
        return encoded, tuned
    coded = encoded.coded._replace(gains=tuned.gains)
    tensors = params_to_tensors(tuned.params, source.arch)
    return assemble(coded, tensors, source.arch, source.files, source.parameters), tuned
