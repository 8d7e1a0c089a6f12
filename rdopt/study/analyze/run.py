"""`rdopt analyze`: moments, coordinates, one pass over the blocks, predictions judged."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from rdopt.align.train import train
from rdopt.calibration.moments import Moments
from rdopt.calibration.subject import load_corpus, load_subject
from rdopt.checkpoint.families import Architecture
from rdopt.checkpoint.folder import Checkpoint
from rdopt.config.errors import UserError
from rdopt.config.load import config_yaml
from rdopt.config.progress import Say, ticker
from rdopt.config.schema import Config
from rdopt.evaluate.divergence import token_kl
from rdopt.evaluate.perplexity import windows
from rdopt.operator.blockwise import last_stream
from rdopt.operator.llama import head_logits
from rdopt.runs import folder as run_folder
from rdopt.runs.figures import dumps
from rdopt.runs.moments import MOMENTS, moments_of
from rdopt.study.analyze.blocks import BlockPass
from rdopt.study.analyze.ends import ends_in
from rdopt.study.analyze.networks import networks_of
from rdopt.study.analyze.plot import plot_analysis
from rdopt.study.analyze.predictions import judge_all
from rdopt.study.analyze.report import Analysis, report_lines
from rdopt.study.manifold.hypotheses import judge_trajectory
from rdopt.study.manifold.trajectory import read_trajectory
from rdopt.transforms.bases import starting_gauges
from rdopt.transforms.files import load_alignment
from rdopt.transforms.gauges.coordinates import Gauges, gauges_of

JSON, TEXT, WORK, LEARNED = "analysis.json", "analysis.txt", "work", "learned"


def analyze(config: Config, out: Path, learned: Path | None, say: Say, *, trajectory: Path | None = None) -> Analysis:
    """Looks at a model in every basis and judges the hypotheses.

    Args:
        config: model, text, evaluation, and what to look at.
        out: folder that gets analysis.json, analysis.txt and three PNGs; an unfinished one is continued.
        learned: finished run of rdopt train whose coordinates are "learned"; None: they are trained here.
        say: called with lines of progress.
        trajectory: folder of checkpoints step-* of the model's training, for the hypotheses of the manifold; None:
            they are left out.

    Raises:
        UserError: bad input, or a folder that holds something else.
    """
    subject = load_subject(config.model, config.run.memory)
    checkpoint, arch = subject.checkpoint, subject.arch
    run_folder.open_run(out, config, "analyze", jax.local_devices())
    corpus = load_corpus(config.text, checkpoint.folder, arch.vocab_size)
    tokens, scored = windows(corpus.test, config.evaluate.context, config.evaluate.stride, config.evaluate.max_tokens)
    training = None if trajectory is None else read_trajectory(trajectory, subject)
    moments = moments_of(out / WORK / MOMENTS, subject, corpus, config, ticker(say, "second moments: pass"))
    bases = coordinate_systems(
        config.analyze.bases, subject.params, arch, moments, _learned(config, out, learned, checkpoint)
    )
    networks = networks_of(config.analyze.bases, config.analyze.bits, config.analyze.protected)
    say(f"{len(bases)} coordinate systems, {len(networks)} networks beside the original on {tokens.size} tokens")
    blocks = BlockPass(subject.params, arch, bases, networks, moments, config.evaluate.batch)
    state = blocks.run(tokens, out / WORK / "state", config_yaml(config), say)
    kl = divergences(blocks, state.streams, tokens, scored)
    judgements = judge_all(state.rows, networks, kl, scored.sum(axis=1), config.analyze)
    if training is not None:
        judgements += judge_trajectory(subject, training, config, corpus, say)
    analysis = Analysis(
        Path(config.model).name, corpus.description, int(scored.sum()), state.rows,
        {network: float(sums.sum() / scored.sum()) for network, sums in zip(networks, kl, strict=True)}, judgements,
    )
    plot_analysis(analysis, out)
    (out / TEXT).write_text("\n".join(report_lines(analysis)) + "\n", encoding="utf-8")
    (out / JSON).write_text(dumps(analysis.to_json()), encoding="utf-8")
    (out / run_folder.DONE).touch()
    shutil.rmtree(out / WORK)
    return analysis


def coordinate_systems(
    names: Sequence[str], params: Mapping[str, Any], arch: Architecture, moments: Moments, learned: Gauges | None
) -> dict[str, Gauges]:
    """Gauges by name, norm gains folded into the consumers in all of them, so that none can move the L2 norm.

    "learned" are the coordinates of a finished training.
    """
    systems = {}
    for name in names:
        gauges = learned if name == LEARNED else starting_gauges(name, dict(params), arch, moments)
        assert gauges is not None
        systems[name] = gauges if gauges.residual is not None else gauges._replace(residual=np.eye(arch.hidden_size))
    return systems


def _learned(config: Config, out: Path, run: Path | None, checkpoint: Checkpoint) -> Gauges | None:
    """The coordinates of a training run."""
    if LEARNED not in config.analyze.bases:
        return None
    folder = run or out / LEARNED
    if run is None and not (folder / run_folder.DONE).exists():
        train(config, folder)
    alignment = load_alignment(folder)
    if alignment.original["parameters"] != checkpoint.num_parameters:
        raise UserError(
            f"{folder} aligned a model of {alignment.original['parameters']} parameters, but {checkpoint.folder} has "
            f"{checkpoint.num_parameters}: name the run of this model."
        )
    return gauges_of(alignment.records)


def divergences(
    blocks: BlockPass,
    streamed: Sequence[Float[np.ndarray, "n T d"]],
    tokens: Int[np.ndarray, "n T"],
    scored: Bool[np.ndarray, "n T"],
) -> Float[np.ndarray, "networks n"]:
    """Summed KL(original || network) of every sequence over its scored tokens, nats.

    `streamed` are the streams behind the last block of all networks that have one of their own.
    """
    params, arch, networks = blocks.params, blocks.arch, blocks.networks
    last = dict(zip((network for network in networks if network.has_stream), streamed, strict=True))
    original, untied = {k: v for k, v in params.items() if k != "blocks"}, replace(arch, tied=False)
    original, moments = jax.device_put(original), blocks.moments.embed
    assert moments is not None
    whole = last_stream(params, tokens, arch, blocks.batch)
    sums = np.zeros((len(networks), len(tokens)))
    for basis, gauges in blocks.bases.items():
        # One basis after the other: the head of a large vocabulary is most of the memory.
        ends = ends_in(dict(params), gauges, moments)
        own = [k for k, network in enumerate(networks) if network.basis == basis]
        plain = [k for k in own if networks[k].has_stream]
        for group in (plain, *([k] for k in own if k not in plain)):
            W = ends.head.changed(networks[group[0]])
            head = jax.device_put({"head": W, "final_norm": ends.final_norm})
            for i in range(len(tokens)):
                logp = _log_probabilities(original, whole[i : i + 1, :-1], arch)
                for k in group:
                    x = last[networks[k].streamed][i : i + 1, :-1]
                    kl = token_kl(logp, _log_probabilities(head, x, untied))
                    sums[k, i] = float(np.sum(np.asarray(kl, np.float64)[0] * scored[i, 1:]))
    return sums


@jax.jit(static_argnames="arch")
def _log_probabilities(ends: Mapping[str, Any], x: Any, arch: Architecture) -> Any:
    return jax.nn.log_softmax(head_logits(dict(ends), x, arch), axis=-1)
