"""`rdopt analyze`: moments, coordinates, one pass over the blocks, predictions judged."""

import shutil
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from rdopt.align.train import train
from rdopt.calibration.moments import Moments
from rdopt.calibration.streamed import LayerStore, lazy_params, streamed_moments, streams
from rdopt.calibration.subject import load_corpus
from rdopt.checkpoint.families import Architecture
from rdopt.checkpoint.folder import Checkpoint, open_checkpoint
from rdopt.config.errors import UserError
from rdopt.config.load import config_yaml
from rdopt.config.progress import Say
from rdopt.config.schema import Config
from rdopt.evaluate.divergence import token_kl
from rdopt.evaluate.perplexity import windows
from rdopt.operator.llama import head_logits
from rdopt.runs import folder as run_folder
from rdopt.runs.figures import dumps
from rdopt.study.analyze.analysis import Analysis
from rdopt.study.analyze.blocks import BlockPass, pass_all_blocks, stream_of_each
from rdopt.study.analyze.ends import Ends, ends_in
from rdopt.study.analyze.networks import Network, networks_of
from rdopt.study.analyze.plot import plot_analysis
from rdopt.study.analyze.predictions import judge_all
from rdopt.study.analyze.report import report_lines
from rdopt.study.manifold.hypotheses import judge_training_run, open_training_run
from rdopt.transforms.bases import starting_gauges
from rdopt.transforms.files import load_alignment
from rdopt.transforms.gauges.coordinates import Gauges, gauges_of

JSON, TEXT, WORK, LEARNED = "analysis.json", "analysis.txt", "work", "learned"


def analyze(
    config: Config, out: Path, learned: Path | None, say: Say, *, trajectory: Path | None = None
) -> Analysis:
    """Looks at a model in every basis and judges the hypotheses.

    Args:
        config: model, text, evaluation, and what to look at.
        out: folder that gets analysis.json, analysis.txt and three PNGs; an unfinished one is continued.
        learned: finished run of rdopt train whose coordinates are "learned"; None: they are trained here.
        say: called with lines of progress.
        trajectory: folder of checkpoints step-* of the model's training, for the hypotheses of the manifold; None:
            they are left out.

    Returns:
        what was measured; analysis.json holds its `to_json`.

    Raises:
        UserError: bad input, or a folder that holds something else.
    """
    checkpoint = open_checkpoint(config.model)
    arch, params = checkpoint.arch, lazy_params(checkpoint)
    run_folder.open_run(out, config, "analyze", jax.local_devices())
    corpus = load_corpus(config.text, checkpoint.folder, arch.vocab_size)
    tokens, scored = windows(corpus.test, config.evaluate.context, config.evaluate.stride, config.evaluate.max_tokens)
    training = None if trajectory is None else open_training_run(trajectory, config)
    store = LayerStore(out / WORK, arch.num_layers)
    if not store.complete:
        say(f"second moments of {corpus.calibration.size} tokens, block by block")
        store.keep_ends(streamed_moments(params, arch, corpus.calibration, store.keep, seed=config.text.seed))
    bases = coordinate_systems(config.analyze.bases, params, arch, store, _learned(config, out, learned, checkpoint))
    networks = networks_of(config.analyze.bases, config.analyze.bits, config.analyze.protected)
    say(f"{len(bases)} coordinate systems, {len(networks)} networks beside the original on {tokens.size} tokens")
    steps = BlockPass(params, arch, bases, networks, store)
    state = pass_all_blocks(steps, tokens, arch.num_layers, out / WORK / "state", config_yaml(config), say)
    moments = store.read_ends()
    ends = {basis: partial(ends_in, dict(params), gauges, moments) for basis, gauges in bases.items()}
    kl = divergences(params, arch, ends, networks, stream_of_each(networks, state.streams), tokens, scored)
    judgements = judge_all(state.rows, networks, kl, scored.sum(axis=1), config.analyze)
    if training is not None:
        judgements += judge_training_run(training, config, corpus, say)
    analysis = Analysis(
        Path(config.model).name, corpus.description, int(scored.sum()), state.rows,
        {network: float(sums.sum() / scored.sum()) for network, sums in zip(networks, kl, strict=True)}, judgements,
    )
    _write(out, analysis)
    return analysis


def coordinate_systems(
    names: Sequence[str], params: Mapping[str, Any], arch: Architecture, store: LayerStore, learned: Gauges | None
) -> dict[str, Gauges]:
    """Gauges by name, norm gains folded into the consumers in all of them, so that none can move the L2 norm.

    Args:
        names: of fixed bases, or "learned".
        params: of `lazy_params`.
        arch: of the model.
        store: its moments.
        learned: the coordinates of a finished training, if asked for.
    """
    moments = Moments(store.sigma(), {}, 0)
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
    params: Mapping[str, Any],
    arch: Architecture,
    ends: Mapping[str, Callable[[], Ends]],
    networks: Sequence[Network],
    last: Sequence[Float[np.ndarray, "n T d"]],
    tokens: Int[np.ndarray, "n T"],
    scored: Bool[np.ndarray, "n T"],
) -> Float[np.ndarray, "networks n"]:
    """Summed KL(original || network) of every sequence, nats.

    Args:
        params: the original.
        arch: its architecture.
        ends: by basis, what makes its embedding and head; called one after the other, since the head of a large
            vocabulary is most of the memory.
        networks: which basis each stream is in.
        last: stream behind the last block of every network.
        tokens: the sequences.
        scored: which of their tokens are targets.
    """
    original = jax.device_put({k: v for k, v in params.items() if k != "blocks"})
    untied = replace(arch, tied=False)
    whole = deque(streams(params, tokens, arch), maxlen=1).pop()
    sums = np.zeros((len(networks), len(tokens)))
    for basis, make in ends.items():
        both = make()
        own = [k for k, network in enumerate(networks) if network.basis == basis]
        plain = [k for k in own if networks[k].has_stream]
        for group in (plain, *([k] for k in own if k not in plain)):
            W = both.head.changed(networks[group[0]])
            head = jax.device_put({"head": W, "final_norm": both.final_norm})
            for i in range(len(tokens)):
                logp = _log_probabilities(original, arch, whole[i : i + 1])
                for k in group:
                    kl = token_kl(logp, _log_probabilities(head, untied, last[k][i : i + 1]))
                    sums[k, i] = float(np.sum(np.asarray(kl, np.float64)[0] * scored[i, 1:]))
    return sums


def _log_probabilities(ends: Mapping[str, Any], arch: Architecture, x: Float[np.ndarray, "1 T d"]) -> Any:
    return _normalised(ends, x[:, :-1], arch)


@jax.jit(static_argnames="arch")
def _normalised(ends: Mapping[str, Any], x: Any, arch: Architecture) -> Any:
    return jax.nn.log_softmax(head_logits(dict(ends), x, arch), axis=-1)


def _write(out: Path, analysis: Analysis) -> None:
    """The report's files; what they were made from goes."""
    plot_analysis(analysis, out)
    (out / TEXT).write_text("\n".join(report_lines(analysis)) + "\n", encoding="utf-8")
    (out / JSON).write_text(dumps(analysis.to_json()), encoding="utf-8")
    (out / run_folder.DONE).touch()
    shutil.rmtree(out / WORK)
