"""Prints what other methods and rdopt make of the same models: file bits/weight against KL on text never calibrated on.

Every arm codes the same matrices with the same second moments at several sizes; its file is decoded and compared with
the original on the test text. Peers run at their published settings, with their damping and other choices tuned by KL
on the selection text, and with those and rdopt's allocation across matrices, to show what is whose. Finished cells lie
in --cells and are not measured twice.

    python scripts/bench_arms.py --cells cells --json table.json \\
        --model stories260k:stories_sampled.txt:line --model ref-llama:docs_valid.txt:blank2

scripts/results/peers_kl.json and peers_saved.json come from `--targets 1.2 1.5 2 2.5 3 4 5 --nncodec-python PYTHON`.
"""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import NamedTuple

from peers.benchmark import Benchmark, ForeignCellError
from peers.encode import encode_peer
from peers.model import DecodedModel
from peers.nncodec_peer import encode_nncodec, has_nncodec
from peers.own import encode_own
from peers.report import PUBLISHED, TUNED, TUNED_ALLOCATED, Cell, summary, summary_lines
from peers.settings import PeerSettings, tune
from peers.table import ArmVariant, add_arguments, run_table

from rdopt.config.schema import EncodeConfig
from rdopt.evaluate.divergence import compare
from rdopt.transforms.aligned import Aligned

TUNED_AT = 2.5
PEERS = {
    "rtn": PeerSettings(method="rtn"),
    "gptq": PeerSettings(method="gptq", damping=0.01, prefix="inputs"),
    "hadamard+gptq": PeerSettings(method="gptq", damping=0.01, prefix="inputs"),
    "watersic-pooled": PeerSettings(method="watersic", damping=1e-4, prefix="drift", tables="pooled"),
}
PER_COLUMN = {"watersic-pooled": "watersic-column"}  # the same codes with a table per column
PEER_VARIANTS = (PUBLISHED, TUNED, TUNED_ALLOCATED)
NNCODEC = {PUBLISHED: "published", TUNED_ALLOCATED: "sensitivity"}


class Own(NamedTuple):
    """An arm of rdopt: how it encodes, and whether in the principal axes of the weights."""

    encode: EncodeConfig
    aligned: bool = False


def own_arms(finetune: int) -> dict[str, Own]:
    """rdopt's arms, each with more than the one before: trellis, all of the encoder, principal axes, finetuning."""
    encoder = EncodeConfig(grid="trellis", states=64)
    tuned = {"rdopt-everything": Own(replace(encoder, finetune=finetune), aligned=True)} if finetune else {}
    bare = EncodeConfig(grid="trellis", states=64, drift="none", gains="none", rdo=0, output="diagonal")
    return {
        "rdopt-scalar": Own(EncodeConfig(grid="feedback")),
        "rdopt-trellis": Own(bare),
        "rdopt-encoder": Own(encoder),
        "rdopt-aligned": Own(encoder, aligned=True),
        **tuned,
    }


def arm_variants(benchmark: Benchmark, python: str, finetune: int) -> Iterator[ArmVariant]:
    """Every curve of a model; tunes the peers on the way."""
    for name, published in PEERS.items():
        model = benchmark.rotated if name.startswith("hadamard") else benchmark.plain
        for variant in PEER_VARIANTS:
            settings = settings_of(benchmark, name, model, published, variant)
            yield ArmVariant(name, variant, asdict(settings), partial(_peer, name, model, settings))
    if python:
        for variant, steps in NNCODEC.items():
            yield ArmVariant("nncodec", variant, {"steps": steps}, partial(_nncodec, benchmark.plain, python, steps))
    for name, own in own_arms(finetune).items():
        model = benchmark.aligned if own.aligned else benchmark.plain
        settings = {**asdict(own.encode), "aligned": own.aligned}
        yield ArmVariant(name, "default", settings, partial(encode_own, benchmark, model, own.encode))


def names_of(python: str, finetune: int) -> list[str]:
    """The arm of every curve, in the order of `curves_of`."""
    peers = [name for name in PEERS for _ in PEER_VARIANTS]
    return [*peers, *(["nncodec"] * len(NNCODEC) if python else []), *own_arms(finetune)]


def settings_of(benchmark: Benchmark, name: str, model: Aligned, published: PeerSettings, variant: str) -> PeerSettings:
    """A peer's settings in a variant; those with our allocation are tuned without it."""
    if variant == PUBLISHED:
        return published
    tuned = tune(published, partial(_selection_kl, benchmark, name, model))
    return replace(tuned, steps="sensitivity") if variant == TUNED_ALLOCATED else tuned


def _selection_kl(benchmark: Benchmark, name: str, model: Aligned, settings: PeerSettings) -> float:
    """KL on the selection text, remembered in a cell; infinite where the settings do not work."""
    begin = {"settings": asdict(settings), "target": TUNED_AT}
    tag = hashlib.sha256(json.dumps(begin, sort_keys=True).encode()).hexdigest()[:12]

    def work() -> Cell:
        print(f"{benchmark.cells.model:15s} {name:16s} tuning  {_choices(settings)}", flush=True)
        coded = encode_peer(model, settings, TUNED_AT)
        return {"bpw": coded.bpw, "selection_kl": compare(benchmark.selection, coded.params, coded.arch).kl_mean}

    coordinates = "rotated" if model is not benchmark.plain else "plain"
    try:
        return benchmark.cells.remembered(f"select--{coordinates}--{tag}", begin, work)["selection_kl"]
    except ForeignCellError:
        raise
    except Exception as error:  # one choice that breaks must not cost the others
        print(f"{benchmark.cells.model:15s} {name:16s} cannot be tuned with {_choices(settings)}: {error}", flush=True)
        return math.inf


def _choices(settings: PeerSettings) -> str:
    return "  ".join(f"{k} {v}" for k, v in asdict(settings).items() if k not in ("method", "tables", "steps"))


def _peer(name: str, model: Aligned, settings: PeerSettings, target: float) -> DecodedModel:
    coded = encode_peer(model, settings, target)
    if name not in PER_COLUMN:
        return coded
    return coded._replace(more={"also": {PER_COLUMN[name]: coded.more["per_column"]}})


def _nncodec(model: Aligned, python: str, steps: str, target: float) -> DecodedModel:
    return encode_nncodec(model, target, python, steps)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what is missing, prints the table and the gains, and writes JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--nncodec-python", default=sys.executable, help="a Python that can import nncodec")
    args = parser.parse_args(argv)
    python = args.nncodec_python if has_nncodec(args.nncodec_python) else ""
    if not python:
        print(f"nncodec: not installed in {args.nncodec_python}")
    names = names_of(python, args.finetune)

    def variants(benchmark: Benchmark) -> Iterator[ArmVariant]:
        return arm_variants(benchmark, python, args.finetune)

    return run_table(args, names, variants, summary, summary_lines)


if __name__ == "__main__":
    raise SystemExit(main())
