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
from rdopt.calibration.streamed import lazy_params, streamed_moments, streams
from rdopt.calibration.subject import load_corpus
from rdopt.checkpoint.families import Architecture
from rdopt.checkpoint.folder import Checkpoint, open_checkpoint
from rdopt.config.errors import UserError
from rdopt.config.load import config_yaml
from rdopt.config.progress import Say
from rdopt.config.schema import Config
from rdopt.evaluate.divergence import token_kl
from rdopt.evaluate.windows import windows
from rdopt.operator.llama import head_logits
from rdopt.runs import folder as run_folder
from rdopt.runs.figures import dumps
from rdopt.study.analyze.coordinates import LEARNED, coordinate_systems
from rdopt.study.analyze.ends import Ends, changed_end, ends_in
from rdopt.study.analyze.judge import judge_all
from rdopt.study.analyze.plot import plot_analysis
from rdopt.study.analyze.report import report_lines
from rdopt.study.analyze.store import LayerStore
from rdopt.study.analyze.trajectory import judge_trajectory, open_run_of
from rdopt.study.analyze.variants import Variant, variants
from rdopt.study.analyze.walk import Walk, stream_of_each, walk
from rdopt.transforms.files import gauges_of, load_alignment
from rdopt.transforms.gauges.gauges import Gauges

JSON, TEXT, WORK = "analysis.json", "analysis.txt", "work"


def analyze(
    config: Config, out: Path, learned: Path | None, say: Say, *, trajectory: Path | None = None
) -> dict[str, Any]:
    """Looks at a model in every basis and judges the hypotheses.

    Args:
        config: model, text, evaluation, and what to look at.
        out: folder that gets analysis.json, analysis.txt and three PNGs; an unfinished one is continued.
        learned: finished run of rdopt train whose coordinates are "learned"; None: they are trained here.
        say: called with lines of progress.
        trajectory: folder of checkpoints step-* of the model's training, for the hypotheses of the manifold; None:
            they are left out.

    Returns:
        what analysis.json holds: {"model", "text", "tensors": rows, "networks": KL of each, "predictions"}.

    Raises:
        UserError: bad input, or a folder that holds something else.
    """
    checkpoint = open_checkpoint(config.model)
    arch, params = checkpoint.arch, lazy_params(checkpoint)
    run_folder.open_run(out, config, "analyze", jax.local_devices())
    corpus = load_corpus(config.text, checkpoint.folder, arch.vocab_size)
    found = windows(corpus.test, config.evaluate.context, config.evaluate.stride, config.evaluate.max_tokens)
    run = None if trajectory is None else open_run_of(trajectory, config)
    store = LayerStore(out / WORK, arch.num_layers)
    if not store.complete:
        say(f"second moments of {corpus.calibration.size} tokens, block by block")
        store.keep_ends(streamed_moments(params, arch, corpus.calibration, store.keep, seed=config.text.seed))
    gauges = _learned(config, out, learned, checkpoint)
    bases = coordinate_systems(config.analyze.bases, params, arch, store, gauges)
    networks = variants(config.analyze.bases, config.analyze.bits, config.analyze.protected)
    say(f"{len(bases)} coordinate systems, {len(networks)} networks beside the original on {found[0].size} tokens")
    steps = Walk(params, arch, bases, networks, store)
    state = walk(steps, found[0], arch.num_layers, out / WORK / "state", config_yaml(config), say)
    moments = store.read_ends()
    ends = {basis: partial(ends_in, dict(params), gauges, moments) for basis, gauges in bases.items()}
    kl = divergences(params, arch, ends, networks, stream_of_each(networks, state.streams), *found)
    result = {
        "model": Path(config.model).name,
        "text": corpus.description,
        "tokens": int(found[1].sum()),
        "tensors": state.rows,
        "networks": [_network(v, sums, found[1]) for v, sums in zip(networks, kl, strict=True)],
        "predictions": judge_all(state.rows, networks, kl, found[1].sum(axis=1), config.analyze),
    }
    if run is not None:
        result["predictions"] += judge_trajectory(run, config, corpus, say)
    _write(out, result)
    return result


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
    networks: Sequence[Variant],
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
        held = make()
        own = [k for k, network in enumerate(networks) if network.basis == basis]
        plain = [k for k in own if networks[k].of_stream]
        for group in (plain, *([k] for k in own if k not in plain)):
            W = changed_end(held.head, networks[group[0]])
            head = jax.device_put({"head": W, "final_norm": held.final_norm})
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


def _network(v: Variant, sums: Float[np.ndarray, " n"], scored: Bool[np.ndarray, "n T"]) -> dict[str, Any]:
    return {"basis": v.basis, "kind": v.kind, "about": v.about, "seed": v.seed, "kl": float(sums.sum() / scored.sum())}


def _write(out: Path, result: Mapping[str, Any]) -> None:
    """The report's files; what they were made from goes."""
    plot_analysis(result, out)
    (out / TEXT).write_text("\n".join(report_lines(result)) + "\n", encoding="utf-8")
    (out / JSON).write_text(dumps(result), encoding="utf-8")
    (out / run_folder.DONE).touch()
    shutil.rmtree(out / WORK)
