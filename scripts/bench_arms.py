"""Prints what other methods and rdopt make of the same models: file bits/weight against KL on text never calibrated on.

Every arm codes the same matrices with the same second moments at several sizes; its file is decoded and compared with
the original on the test text. Peers run at their published settings, with their damping and other choices tuned by KL
on the selection text, and tuned with rdopt's allocation across matrices, to show what is whose. Finished cells lie in
--cells and are not measured twice.

    python scripts/bench_arms.py --cells cells --json table.json \\
        --model ref-llama:docs_valid.txt:blank2 --model stories260k:stories_sampled.txt:line
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rdopt.calibration import Subject, fingerprint, load_moments, open_subject, save_moments, second_moments
from rdopt.codec import aligned_source, decode_model, encode_source
from rdopt.config import Config, EncodeConfig, EvaluateConfig, TextConfig, UserError
from rdopt.evaluate import Comparison, Reference, compare, noise_floor_bf16, windows
from rdopt.export import reference_of
from rdopt.operator import params_from_tensors
from rdopt.study.peers import (
    Coded,
    Model,
    PeerSettings,
    encode_nncodec,
    encode_peer,
    hadamard_model,
    has_nncodec,
    tune,
)
from rdopt.study.peers.report import PUBLISHED, TUNED, TUNED_ALLOCATED, Cell, row, summary, summary_lines
from rdopt.sweep import dumps

TARGETS = (1.5, 2.0, 2.5, 3.0, 4.0)
TUNED_AT = 2.5
PEERS = {
    "rtn": PeerSettings(method="rtn"),
    "gptq": PeerSettings(method="gptq", damping=0.01),
    "hadamard+gptq": PeerSettings(method="gptq", damping=0.01),
    "watersic-pooled": PeerSettings(method="watersic", damping=1e-4, tables="pooled"),
    "watersic-column": PeerSettings(method="watersic", damping=1e-4, tables="per-column"),
}

@dataclass(frozen=True, kw_only=True)
class World:
    """One model with everything that its arms share."""

    name: str
    subject: Subject
    model: Model
    rotated: Model
    reference: Reference
    selection: Reference
    cells: Path
    key: str
    python: str


Arm = Callable[[World, float], Coded]


def rdopt_scalar(world: World, target: float) -> Coded:
    """rdopt's encoder in the original coordinates on the scalar grid."""
    return _own(world, EncodeConfig(grid="feedback", target_bpw=target))


def _own(world: World, encode: EncodeConfig) -> Coded:
    params, arch, moments = world.model
    source = aligned_source(world.subject, params, arch, moments, encode)
    encoded = encode_source(source, encode, 50.0)
    decoded = decode_model(encoded.data, world.name)
    weights = params_from_tensors(decoded.tensors, decoded.arch)
    return Coded(encoded.bpw(source), encoded.bpw_estimated(source), weights, decoded.arch)


OWN_ARMS: dict[str, Arm] = {"rdopt-scalar": rdopt_scalar}


def arms_of(world: World) -> Iterator[tuple[str, str, dict[str, Any], Arm]]:
    """(arm, variant, settings, function) of every curve of a model; tunes the peers on the way."""
    for name, settings in PEERS.items():
        for variant, chosen in variants(world, name, settings):
            yield name, variant, asdict(chosen), partial(_peer, name=name, settings=chosen)
    if world.python:
        for variant, steps in ((PUBLISHED, "published"), (TUNED_ALLOCATED, "sensitivity")):
            yield "nncodec", variant, {"steps": steps}, partial(_nncodec, steps=steps)
    for name, arm in OWN_ARMS.items():
        yield name, "default", {}, arm


def variants(world: World, name: str, published: PeerSettings) -> Iterator[tuple[str, PeerSettings]]:
    """A peer's published settings, the tuned ones, and those with our allocation, tuned with it."""
    yield PUBLISHED, published
    yield TUNED, tune(published, partial(_selection_kl, world, name))
    yield TUNED_ALLOCATED, tune(replace(published, steps="sensitivity"), partial(_selection_kl, world, name))


def _peer(world: World, target: float, *, name: str, settings: PeerSettings) -> Coded:
    return encode_peer(_coordinates(world, name), settings, target)


def _nncodec(world: World, target: float, *, steps: str) -> Coded:
    return encode_nncodec(world.model, target, world.python, steps)


def _coordinates(world: World, name: str) -> Model:
    return world.rotated if name.startswith("hadamard") else world.model


def _selection_kl(world: World, name: str, settings: PeerSettings) -> float:
    """KL on the selection text, remembered in a cell."""
    tag = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode()).hexdigest()[:12]

    def work() -> Cell:
        coded = encode_peer(_coordinates(world, name), settings, TUNED_AT)
        kl = compare(world.selection, coded.params, coded.arch).kl_mean
        return {"arm": name, "settings": asdict(settings), "bpw": coded.bpw, "selection_kl": kl}

    coordinates = "rotated" if name.startswith("hadamard") else "plain"
    return remembered(world, f"select--{coordinates}--{tag}", work)["selection_kl"]


def remembered(world: World, label: str, work: Callable[[], Cell]) -> Cell:
    """The cell of this label, measured when it is not there.

    Raises:
        UserError: the cell belongs to another model, text or evaluation.
    """
    path = world.cells / f"{world.name}--{label}.json"
    if path.is_file():
        cell = json.loads(path.read_text(encoding="utf-8"))
        if cell["key"] != world.key:
            raise UserError(f"{path} was measured on another model, text or evaluation; choose another --cells folder.")
        return cell
    begun = time.perf_counter()
    cell = {"key": world.key, "model": world.name, **work()}
    cell["seconds"] = round(time.perf_counter() - begun, 2)
    part = path.with_suffix(f".partial-{os.getpid()}")
    part.write_text(json.dumps(cell), encoding="utf-8")
    part.replace(path)
    return cell


def measure(world: World, targets: Sequence[float], say: Callable[[str], None]) -> list[Cell]:
    """All cells of a model."""
    found = []
    for name, variant, settings, arm in arms_of(world):
        for target in targets:
            begin = {"arm": name, "variant": variant, "settings": settings, "target": target}
            work = partial(_cell, world, arm, begin)
            cell = remembered(world, f"{name}--{variant}--{target:g}", work)
            if cell["settings"] != settings:
                raise UserError(f"a cell of {name} {variant} in {world.cells} has other settings; remove it.")
            found.append(cell)
            say(row(cell))
    return found


def _cell(world: World, arm: Arm, begin: Cell) -> Cell:
    try:
        coded = arm(world, begin["target"])
    except UserError as error:  # a size below an arm's side information is a result, not a failure
        return {**begin, "unreachable": str(error)}
    result = compare(world.reference, coded.params, coded.arch)
    return {**begin, "bpw": coded.bpw, "bpw_ideal": coded.bpw_ideal, **_scores(result)}


def _scores(result: Comparison) -> Cell:
    scores = {"kl": result.kl_mean, "kl_se": result.kl_stderr, "ppl": result.perplexity.value}
    return {**scores, "kl_sums": result.kl_sums.tolist(), "counts": result.counts.tolist()}


def make_world(model: str, text: TextConfig, evaluate: EvaluateConfig, cells: Path, python: str) -> World:
    """Reads a model and its text, measures the moments and both references."""
    config = Config(model=model, text=text, evaluate=evaluate)
    subject, corpus = open_subject(config)
    name = Path(model).name
    key = "-".join((subject.fingerprint, corpus.fingerprint, fingerprint(corpus.test), _mark(evaluate)))
    path, inputs = cells / f"{name}--moments.safetensors", f"{subject.fingerprint}-{corpus.fingerprint}"
    moments = load_moments(path, inputs)
    if moments is None:
        path.unlink(missing_ok=True)
        moments = second_moments(subject.params, subject.arch, corpus.calibration, seed=text.seed)
        save_moments(path, moments, inputs)
    picked = windows(corpus.selection, evaluate.context, evaluate.stride, evaluate.max_tokens)
    plain = Model(subject.params, subject.arch, moments)
    return World(
        name=name,
        subject=subject,
        model=plain,
        rotated=hadamard_model(plain),
        reference=reference_of(subject, corpus, config),
        selection=Reference(subject.params, subject.arch, *picked, evaluate.batch),
        cells=cells,
        key=key,
        python=python,
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


def _mark(evaluate: EvaluateConfig) -> str:
    return f"{evaluate.context}.{evaluate.stride}.{evaluate.max_tokens}"


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", metavar="MODEL[:TEXT:SPLIT]", help="default: demo:builtin:file")
    parser.add_argument("--targets", type=float, nargs="+", default=list(TARGETS), help="bits/weight of the files")
    parser.add_argument("--cells", type=Path, default=Path("cells"), help="folder of finished cells")
    parser.add_argument("--json", type=Path, default=None, help="where the rows and the summary go")
    parser.add_argument("--sequences", type=int, default=256, help="calibration sequences")
    parser.add_argument("--context", type=int, default=256, help="tokens in a sequence and in a window")
    parser.add_argument("--max-tokens", type=int, default=65536, help="test tokens")
    parser.add_argument("--nncodec-python", default=sys.executable, help="a Python that can import nncodec")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what is missing, prints the table and the gains, and writes JSON on request."""
    args = _parsed(argv)
    args.cells.mkdir(parents=True, exist_ok=True)
    python = args.nncodec_python if has_nncodec(args.nncodec_python) else ""
    if not python:
        print(f"nncodec: not installed in {args.nncodec_python}")
    evaluate = EvaluateConfig(context=args.context, stride=args.context, max_tokens=args.max_tokens)
    say = partial(print, flush=True)
    cells: list[Cell] = []
    rows: list[Cell] = []
    try:
        for spec in args.model or ["demo:builtin:file"]:
            model, text = model_and_text(spec, args.context, args.sequences)
            world = make_world(model, text, evaluate, args.cells, python)
            found = measure(world, args.targets, say)
            floor = remembered(world, "floor", lambda w=world: {"kl": noise_floor_bf16(w.reference)})["kl"]
            cells, rows = cells + found, rows + summary(found, floor)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(summary_lines(rows)))
    if args.json is not None:
        hidden = ("kl_sums", "counts", "key")
        table = [{k: v for k, v in cell.items() if k not in hidden} for cell in cells]
        args.json.write_text(dumps({"cells": table, "summary": rows}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
