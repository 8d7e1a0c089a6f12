"""`rdopt encode`: runs and folders to files.

What is done of a file lies beside it in a folder `.work` until it is written: moments, checkpoints of finetuning, and
the journal of blocks that `_behind_prefix` of `trellis_model.py` goes on from. Other grids quantize anew after a kill.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from rdopt.calibration.subject import Corpus, Subject, load_corpus, load_subject
from rdopt.checkpoint.atomic import refuse_existing
from rdopt.codec.encoder import Encoded
from rdopt.codec.streams.container import write_container
from rdopt.config.progress import Tick
from rdopt.config.schema import Config, EncodeConfig
from rdopt.encode.finetune import Finetuned
from rdopt.encode.judge import Judge, Report, finetune_file
from rdopt.encode.model import encode_at_step
from rdopt.encode.source import Source, make_source
from rdopt.encode.target import search_file, size_goal
from rdopt.evaluate.divergence import Reference
from rdopt.evaluate.perplexity import windows
from rdopt.rate.steps import base_step
from rdopt.runs.export import open_trained
from rdopt.runs.moments import MOMENTS, moments_of
from rdopt.transforms.aligned import Aligned
from rdopt.transforms.files import load_alignment
from rdopt.transforms.gauges.coordinates import gauges_of


class Prepared(NamedTuple):
    """A model ready to be encoded at any slope, the configuration that applies, and what it was made from."""

    source: Source
    config: Config
    subject: Subject
    corpus: Corpus


def prepare(path: Path, config: Config, work: Path, progress: Tick | None = None) -> Prepared:
    """Reads a run folder or a model folder.

    Args:
        path: a finished run of rdopt train, or a Hugging Face folder (exported or not).
        config: its text measures the moments of a folder; a run brings its own text.
        work: folder where they, and what is done of the file, are kept meanwhile.
        progress: called with (passes through a block, of how many) while moments are measured.

    Raises:
        UserError: neither, or unfinished.
    """
    if (path / "run.json").is_file():
        return _prepare_run(path, config, work, progress)
    subject = load_subject(path if path.is_dir() else str(path), config.run.memory)
    folder = subject.checkpoint.folder
    corpus = load_corpus(config.text, folder, subject.arch.vocab_size)
    moments = moments_of(work / MOMENTS, subject, corpus, config, progress)
    alignment = load_alignment(folder) if (folder / "transforms.json").is_file() else None
    stored = None if alignment is None else alignment.stored
    aligned = Aligned(subject=subject, moments=moments, stored=stored, tokens=corpus.calibration)
    parameters = None if alignment is None else int(alignment.original["parameters"])
    return Prepared(make_source(aligned, config.encode, parameters, work), config, subject, corpus)


def _prepare_run(path: Path, asked: Config, work: Path, progress: Tick | None) -> Prepared:
    config, subject, corpus, alignment = open_trained(path, asked.run)
    encode = asked.encode
    if encode.lam is None and not encode.targeted:
        encode = replace(encode, lam=config.train.lam)
    aligned = Aligned(
        subject=subject,
        moments=moments_of(path / MOMENTS, subject, corpus, config, progress),
        gauges=gauges_of(alignment.records),
        stored=alignment.stored,
        tokens=corpus.calibration,
    )
    return Prepared(make_source(aligned, encode, work=work), replace(config, encode=encode), subject, corpus)


def encode_source(
    source: Source,
    encode: EncodeConfig,
    lam: float,
    judge: Judge | None = None,
    progress: Tick | None = None,
    report: Report | None = None,
) -> tuple[Encoded, Finetuned | None]:
    """The file at a slope or at the target that `encode` names, finetuned if it says so.

    Args:
        source: the model.
        encode: its configuration.
        lam: slope, or the first guess of a search.
        judge: texts, needed to aim at KL or perplexity and to finetune.
        progress: called with (matrices, of how many).
        report: called after every step of finetuning.

    Raises:
        UserError: a target out of reach.
        ValueError: no judge where one is needed.
    """

    def whole(c: float) -> Encoded:
        return encode_at_step(source, c, encode, progress)

    needs = encode.finetune or encode.target_kl is not None or encode.target_ppl is not None
    if needs and judge is None:
        raise ValueError("aiming at KL or perplexity, and finetuning, need a text to judge by")
    c = base_step(lam, source.weights)
    if encode.target_bpw is not None:
        goal = size_goal(encode.target_bpw)
        encoded = search_file(
            source, encode, goal, c, whole, lambda x: x.bpw, lambda part, coded, _: part.bits_per_weight(coded)
        )
    elif judge is not None and (encode.target_kl is not None or encode.target_ppl is not None):
        goal, value = judge.goal(encode)
        encoded = search_file(source, encode, goal, c, whole, value, judge.expected)
    else:
        encoded = whole(c)
    if not encode.finetune or judge is None:
        return encoded, None
    return finetune_file(source, encoded, encode, judge, report)


def make_judge(subject: Subject, corpus: Corpus, config: Config, folder: Path | None = None) -> Judge:
    """The original on the selection text in the windows of `config.evaluate`, and the calibration sequences."""
    evaluate = config.evaluate
    inputs, scored = windows(corpus.selection, evaluate.context, evaluate.stride, evaluate.max_tokens)
    return Judge(Reference(subject.params, subject.arch, inputs, scored, evaluate.batch), corpus.calibration, folder)


def encode(
    path: Path,
    out: Path,
    config: Config,
    progress: Tick | None = None,
    report: Report | None = None,
    measuring: Tick | None = None,
) -> tuple[Prepared, Encoded, Finetuned | None]:
    """Encodes a run or a folder into a file.

    Args:
        path: a run of rdopt train or a model folder.
        out: the file to be, never overwritten.
        config: slope or target, grid, text.
        progress: called with (matrices done, of how many).
        report: called after every step of finetuning; its checkpoints lie beside the file until it is written.
        measuring: called with (passes through a block done, of how many) while moments are measured.

    Returns:
        what was encoded, the file's bytes and parts, and what finetuning found.

    Raises:
        UserError: bad input, a target out of reach, or an existing output.
    """
    refuse_existing(out)
    work = out.with_name(out.name + ".work")
    prepared = prepare(path, config, work, measuring)
    settings = prepared.config.encode
    judge, folder = None, work / "finetune"
    if settings.finetune or settings.target_kl is not None or settings.target_ppl is not None:
        judge = make_judge(prepared.subject, prepared.corpus, prepared.config, folder)
    lam = settings.lam or prepared.config.train.lam
    encoded, tuned = encode_source(prepared.source, settings, lam, judge, progress, report)
    write_container(out, encoded.data)
    shutil.rmtree(work, ignore_errors=True)
    return prepared, encoded, tuned
