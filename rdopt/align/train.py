"""`rdopt train`: a model and a text to learned transforms in a run folder."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from rdopt.align import hosts
from rdopt.align.alignment import single_precision
from rdopt.align.candidates import Candidate, Cost, candidates, relaxed_J
from rdopt.align.devices import Device, require_share
from rdopt.align.learn import Learned, Progress, learn
from rdopt.align.objective import Settings, Variables
from rdopt.align.passes import judged_terms
from rdopt.align.problem import Problem, make_problem
from rdopt.align.tie import Tie, settle_tie
from rdopt.calibration.moments import Moments
from rdopt.calibration.subject import Corpus, Subject, open_subject
from rdopt.calibration.tokens import fingerprint, token_batch
from rdopt.config.load import config_yaml
from rdopt.config.progress import Tick
from rdopt.config.schema import Config, RunConfig, TrainConfig
from rdopt.runs import folder as run_folder
from rdopt.runs.moments import MOMENTS, moments_of
from rdopt.runs.states import StateStore
from rdopt.transforms.aligned import Aligned
from rdopt.transforms.bases import starting_gauges
from rdopt.transforms.files import alignment_of, save_alignment
from rdopt.transforms.gauges.coordinates import Gauges, gauges_of
from rdopt.transforms.stored.rotations import StoredRotations

Trial = Callable[[Aligned], float]


class Trained(NamedTuple):
    """What a training run found.

    Attributes:
        bpw_relaxed: R of the last steps, bits/weight.
        distortion: D on selection text, nats/token.
        kl: KL(original || relaxed model) on the same text, nats/token.
        start_J: J in the starting coordinates.
        J: J at the end.
        kept: which coordinates were the best: a start, or what was learned from one.
        costs: J of all of them, by a trial encoding where there was one.
        tie: what keeping or breaking a tie of the embeddings takes; empty where there is none.
    """

    bpw_relaxed: float
    distortion: float
    kl: float
    start_J: float
    J: float
    kept: str = ""
    costs: Mapping[str, float] = MappingProxyType({})
    tie: str = ""



def train(
    config: Config,
    out: Path,
    *,
    devices: Sequence[Device] | None = None,
    report: Callable[[Progress], None] | None = None,
    progress: Tick | None = None,
    trial: Trial | None = None,
) -> Trained:
    """Learns the transforms of a model at one lambda; called alike in every process of the run.

    Args:
        config: model, text and training.
        out: the run folder; an unfinished one of the same configuration is continued. Process 0 alone uses it.
        devices: those of all processes by default.
        report: called after every step, in process 0.
        progress: called with (sequences, of how many) while moments are measured, there too.
        trial: J of coordinates by an encoding, in process 0; the best of starts and results by it is kept.

    Raises:
        UserError: bad input, another configuration in the folder, or a loss that is not finite.
        KeyboardInterrupt: after the state was saved.
    """
    pool = tuple(devices or jax.devices())
    if not hosts.is_primary():
        heard: _Inputs = hosts.receive()
        for start in heard.starts.values():
            learn(None, heard.settings, heard.tokens, start, heard.train, devices=pool)
        return hosts.receive()
    with hosts.broadcasting() as broadcast:
        context, inputs = _open(config, out, pool, progress)
        broadcast(inputs)
    ranked = candidates(inputs.starts, _learner(context, inputs, pool, report), _cost(context, inputs, trial))
    with hosts.broadcasting() as broadcast:
        trained = _finish(context, inputs, ranked, config)
        broadcast(trained)
    return trained


class _RunContext(NamedTuple):
    """What process 0 has before it: the model, its text, its moments, and the run's files."""

    subject: Subject
    corpus: Corpus
    moments: Moments
    problem: Problem
    out: Path
    metrics: run_folder.Metrics
    marks: dict[str, str]
    tie: Tie | None


class _Inputs(NamedTuple):
    """What all processes learn from."""

    settings: Settings
    tokens: Int[np.ndarray, "sequences length"]
    starts: dict[str, Gauges]
    train: TrainConfig


def _open(
    config: Config, out: Path, pool: Sequence[Device], progress: Tick | None
) -> tuple[_RunContext, _Inputs]:
    """Reads the model and the text, opens the run folder and measures the moments."""
    require_share(config.train.batch_sequences, pool)
    subject, corpus = open_subject(config)
    # What `measure_training` needs at the end is refused now.
    token_batch(corpus.selection, config.text.seq_len, 1, config.text.seed, part="selection")
    run_folder.open_run(out, config, "train", pool)
    moments = moments_of(out / MOMENTS, subject, corpus, config, progress)
    problem, settings = make_problem(subject, moments, config)
    settled, starts, tie = config.train, {}, None
    for name in dict.fromkeys((config.train.init, *(config.train.rivals or ()))):
        start = starting_gauges(name, subject.params, subject.arch, moments, config.train.seed)
        settled, starts[name], tie = settle_tie(subject, config, start, relaxed_J(problem, settings, config.train.lam))
    if settled.sites != config.train.sites:
        problem, settings = make_problem(subject, moments, replace(config, train=settled), tied=True)
    context = _RunContext(
        subject, corpus, moments, problem, out, run_folder.Metrics(out), fingerprints(subject, corpus, config), tie
    )
    return context, _Inputs(settings, corpus.calibration, starts, settled)


def _learner(
    context: _RunContext, inputs: _Inputs, pool: Sequence[Device], report: Callable[[Progress], None] | None
) -> Callable[[str, Gauges], Learned]:
    """Learns from one start after the other; steps are counted over all of them."""
    order, steps = list(inputs.starts), inputs.train.steps

    def run(name: str, start: Gauges) -> Learned:
        """Learns from one start, with checkpoints of its own."""
        before = order.index(name) * steps

        def step(p: Progress) -> None:
            counted = p._replace(step=before + p.step, steps=len(order) * steps)
            context.metrics.write(counted._asdict())
            if report is not None:
                report(counted)

        store = StateStore(context.out / (f"state-{name}" if before else "state"), context.marks)
        learned = learn(
            context.problem, inputs.settings, inputs.tokens, start, inputs.train, devices=pool, store=store, report=step
        )
        store.close()
        return learned

    return run


def _cost(context: _RunContext, inputs: _Inputs, trial: Trial | None) -> Cost:
    """J by a trial encoding, or the relaxed one without it."""
    if trial is None:
        return relaxed_J(context.problem, inputs.settings, inputs.train.lam)

    def cost(gauges: Gauges, stored: StoredRotations | None = None) -> float:
        return trial(Aligned(subject=context.subject, moments=context.moments, gauges=gauges, stored=stored))

    return cost


def _finish(context: _RunContext, inputs: _Inputs, ranked: Sequence[Candidate], config: Config) -> Trained:
    """Writes the transforms and what they are worth."""
    subject, best = context.subject, ranked[0]
    alignment = alignment_of(
        best.learned.records, subject.params, subject.checkpoint, subject.fingerprint, best.learned.stored
    )
    save_alignment(context.out, alignment)
    start = next(iter(inputs.starts.values()))
    trained = measure_training(context.problem, inputs.settings, context.corpus, start, best.learned, config)
    tie = "" if context.tie is None else context.tie.sentence
    trained = trained._replace(kept=best.name, tie=tie, costs={x.name: x.J for x in ranked})
    context.metrics.write({"step": len(inputs.starts) * config.train.steps + 1, **trained._asdict()})
    run_folder.finish_run(context.out)
    return trained


def fingerprints(subject: Subject, corpus: Corpus, config: Config) -> dict[str, str]:
    """Hashes of everything that a training result depends on."""
    text = config_yaml(replace(config, model="", run=RunConfig()))
    return {
        "weights": subject.fingerprint,
        "text": corpus.fingerprint,
        "configuration": fingerprint(np.frombuffer(text.encode(), np.uint8)),
    }


def measure_training(
    problem: Problem, settings: Settings, corpus: Corpus, start: Gauges, learned: Learned, config: Config
) -> Trained:
    """J before and after, and D beside the KL of the model with all its weights relaxed, on selection text."""
    length = config.text.seq_len
    count = min(config.train.batch_sequences, len(corpus.selection) // length)
    tokens = corpus.selection[: count * length].reshape(count, length)
    lam, key = config.train.lam, jax.random.key(config.train.seed)
    static = replace(settings, rate="analytic")

    def judged(gauges: Gauges) -> tuple[float, float, float]:
        variables = Variables(single_precision(gauges, settings.arch))
        terms, kl = judged_terms(variables, problem, tokens, lam, key, static)
        return terms.rate, terms.distortion, kl

    (*before, _), (*after, kl) = judged(start), judged(gauges_of(learned.records))
    J = [rate + config.train.lam * D for rate, D in (before, after)]
    rate = after[0] if math.isnan(learned.rate) else learned.rate  # a start that was kept was not learned
    return Trained(rate, after[1], kl, J[0], J[1])
