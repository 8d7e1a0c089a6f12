"""One model with everything that the arms of a comparison share: moments, text, references and finished cells.

A finished cell is a JSON file, so that a broken run goes on where it stopped.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from peers.model import DecodedModel
from peers.report import Cell
from rdopt.calibration.subject import open_subject
from rdopt.calibration.tokens import fingerprint
from rdopt.config.errors import UserError
from rdopt.config.schema import Config, EvaluateConfig, TextConfig
from rdopt.evaluate.divergence import Comparison, Reference, compare, noise_floor_bf16
from rdopt.evaluate.perplexity import windows
from rdopt.runs.export import reference_of
from rdopt.runs.moments import moments_of
from rdopt.transforms.aligned import Aligned
from rdopt.transforms.bases import starting_gauges

SELECTION_TOKENS = 16384
DRIFT_SEQUENCES = 64  # for every arm alike


class ForeignCellError(UserError):
    """A cell of another model, text or evaluation lies where one of this table belongs."""


@dataclass(frozen=True, kw_only=True)
class Cells:
    """The cells of one model.

    Attributes:
        folder: where they lie.
        model: its name, the beginning of their names.
        key: fingerprint of model, text and evaluation.
    """

    folder: Path
    model: str
    key: str

    def remembered(self, label: str, begin: Mapping, work: Callable[[], Mapping]) -> Cell:
        """The cell of this label; measured when it is not there or was measured with other settings.

        Args:
            label: its name.
            begin: what identifies it, JSON values.
            work: measures the rest.

        Raises:
            ForeignCellError: the cell belongs to another model, text or evaluation.
        """
        path, begin = self.folder / f"{self.model}--{label}.json", json.loads(json.dumps(begin))
        if path.is_file():
            cell = json.loads(path.read_text(encoding="utf-8"))
            if cell["key"] != self.key:
                raise ForeignCellError(
                    f"{path} was measured on another model, text or evaluation; choose another --cells folder."
                )
            if all(cell.get(name) == value for name, value in begin.items()):
                return cell
        start = time.perf_counter()
        cell = {"key": self.key, "model": self.model, **begin, **work()}
        cell["seconds"] = round(time.perf_counter() - start, 2)
        part = path.with_suffix(f".partial-{os.getpid()}")
        part.write_text(json.dumps(cell), encoding="utf-8")
        part.replace(path)
        return cell


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A model, its text and its references.

    Attributes:
        plain: the model in its own coordinates; its tokens are those of the drift.
        calibration: all calibration sequences, for finetuning.
        reference: on the test text, for reported figures only.
        selection: on the selection text, for tuning.
        cells: what is already measured.
    """

    plain: Aligned
    calibration: Int[np.ndarray, "n length"]
    reference: Reference
    selection: Reference
    cells: Cells

    def in_basis(self, basis: str) -> Aligned:
        """The model in a fixed basis."""
        subject, moments = self.plain.subject, self.plain.moments
        gauges = starting_gauges(basis, subject.params, subject.arch, moments)
        return Aligned(subject=subject, moments=moments, gauges=gauges, tokens=self.plain.tokens)

    @cached_property
    def rotated(self) -> Aligned:
        """Behind QuaRot's offline rotations (2404.00456, stages 1a and 1c): residual stream and value heads.

        The online Hadamard transforms of QuaRot quantize activations; weights alone do not need them.
        """
        return self.in_basis("hadamard")

    @cached_property
    def aligned(self) -> Aligned:
        """In the principal axes of the weights."""
        return self.in_basis("pca")

    @cached_property
    def floor(self) -> float:
        """KL of the model against its own bfloat16 forward pass."""
        return self.cells.remembered("floor", {}, lambda: {"kl": noise_floor_bf16(self.reference)})["kl"]

    def cell(self, label: str, begin: Mapping[str, Any], arm: Callable[[], DecodedModel]) -> Cell:
        """One file of one arm on the test text; a size that an arm cannot reach is a result, too."""

        def work() -> Cell:
            try:
                coded = arm()
            except UserError as error:
                return {"unreachable": str(error)}
            scores = _scores(compare(self.reference, coded.params, coded.arch))
            return {"bpw": coded.bpw, "bpw_ideal": coded.bpw_ideal, **coded.more, **scores}

        return self.cells.remembered(label, begin, work)


def _scores(result: Comparison) -> Cell:
    scores = {"kl": result.kl_mean, "kl_se": result.kl_stderr, "ppl": result.perplexity.value}
    return {**scores, "kl_sums": result.kl_sums.tolist(), "counts": result.counts.tolist()}


def open_benchmark(model: str, text: TextConfig, evaluate: EvaluateConfig, folder: Path) -> Benchmark:
    """Reads a model and its text, measures the moments and both references.

    Args:
        model: a folder or demo.
        text: of calibration, selection and test.
        evaluate: windows of the test text.
        folder: of the cells; the moments are kept there too.

    Raises:
        UserError: bad input.
    """
    config = Config(model=model, text=text, evaluate=evaluate)
    subject, corpus = open_subject(config)
    name = Path(model).name
    mark = f"{evaluate.context}.{evaluate.stride}.{evaluate.max_tokens}"
    key = "-".join((subject.fingerprint, corpus.fingerprint, fingerprint(corpus.test), mark))
    moments = moments_of(folder / f"{name}--moments", subject, corpus, config)
    chosen = min(SELECTION_TOKENS, evaluate.max_tokens)
    picked = windows(corpus.selection, evaluate.context, evaluate.stride, chosen)
    return Benchmark(
        plain=Aligned(subject=subject, moments=moments, tokens=corpus.calibration[:DRIFT_SEQUENCES]),
        calibration=corpus.calibration,
        reference=reference_of(subject, corpus, config),
        selection=Reference(subject.params, subject.arch, *picked, evaluate.batch),
        cells=Cells(folder=folder, model=name, key=key),
    )


def model_and_text(spec: str, context: int, sequences: int) -> tuple[str, TextConfig]:
    """MODEL[:TEXT:SPLIT] as a model and its text.

    Raises:
        UserError: another number of parts, or a split that does not exist.
    """
    parts = spec.split(":")
    if len(parts) not in (1, 3):
        raise UserError(f"--model {spec} has {len(parts)} parts; give MODEL or MODEL:TEXT:SPLIT.")
    plain = TextConfig(seq_len=context, calibration_sequences=sequences)
    if len(parts) == 1:
        return spec, plain
    split: Any = parts[2]
    return parts[0], replace(plain, sources=(parts[1],), split_on=split)
