"""Prints the SHA-256 of everything that rdopt writes for the demo model, to show that a change changes no byte.

Every command runs as a user runs it, small enough that all take less than five minutes on two cores: sweeps at two
slopes of all arms with the trellis and of three on the uniform grid, files of every coder, grid and option, a run, its
export, a decoded folder, and the figures of `inspect`, `analyze` and `toy` without their seconds. The numbers belong to
one machine: products of matrices are summed in another order elsewhere. Record before a change, compare behind it:

    python scripts/fingerprint_outputs.py --json before.json
    python scripts/fingerprint_outputs.py --against before.json
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from rdopt.cli.main import main as rdopt

TEXT = ("--seq-len", "64", "--sequences", "8")
WINDOWS = ("--context", "64", "--stride", "64", "--max-tokens", "1024")
QUICK = (*TEXT, *WINDOWS, "--encode.drift_sequences", "4")
TRAINING = ("--steps", "2", "--train.batch_sequences", "2")
ARMS = "identity,hadamard,random,dct,fourier,pca,pca-act,joint,learned,hadamard+learned,blockwise-pca"
UNIFORM_ARMS = "identity,learned,blockwise-pca"  # what the others' coordinates are, the trellis's files tell
FILES = {
    "coded-embeddings": ("--encode.embeddings", "coded"),
    "huffman": ("--encode.coder", "huffman"),
    "binary": ("--encode.coder", "binary"),
    "64-states-error-only": ("--encode.states", "64", "--encode.rdo", "0"),
    "one-sided-no-gains-no-drift": (
        *("--encode.output", "diagonal", "--encode.gains", "none", "--encode.drift", "none"),
    ),
    "structured": ("--encode.structured", "svd"),
    "lloyd": ("--grid", "lloyd"),
    "rounded-dead-zone": ("--grid", "round", "--encode.dead_zone", "0.1"),
    "target-bpw": ("--grid", "feedback", "--target-bpw", "2.5"),
    "finetuned": ("--finetune", "2"),
}


def main() -> int:
    """Runs the commands and prints a line for each output; the exit code is 1 where one differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of the names of the groups to run")
    parser.add_argument("--json", type=Path, help="file to write the hashes to")
    parser.add_argument("--against", type=Path, help="hashes of an earlier run to compare with")
    args = parser.parse_args()
    before = {} if args.against is None else json.loads(args.against.read_text())
    now: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as work:
        for group, run in GROUPS.items():
            if args.only not in group:
                continue
            begun = time.perf_counter()
            for name, value in run(Path(work) / group):
                now[f"{group}/{name}"] = value
            print(f"# {group}: {time.perf_counter() - begun:.0f} s", flush=True)
    differing = [k for k, v in now.items() if before and before.get(k) != v]
    gone = [k for k in before if k.split("/")[0] in {x.split("/")[0] for x in now} and k not in now]
    for name, value in now.items():
        print(f"{value}  {name}" + ("  DIFFERS" if name in differing else ""))
    for name in gone:
        print(f"{before[name]}  {name}  GONE")
    if args.json is not None:
        args.json.write_text(json.dumps(now, indent=1))
    if before:
        print(f"{len(now)} outputs, {len(differing)} differ, {len(gone)} gone")
    return 1 if differing or gone else 0


def command(*words: object) -> None:
    """Runs a command quietly; what it said is shown where it fails."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = rdopt([str(word) for word in words])
    if code:
        raise SystemExit(f"rdopt {' '.join(map(str, words))} ended with {code}:\n{said.getvalue()}")


def sweep(grid: str, arms: str) -> Callable[[Path], Iterator[tuple[str, str]]]:
    """Files and points of arms at two slopes."""

    def run(out: Path) -> Iterator[tuple[str, str]]:
        command("sweep", "demo", "--out", out, "--arms", arms, "--lams", "20,200", "--encode.grid", grid, *QUICK,
                *TRAINING)
        yield from hashes(out, ("files/*", "points/*.json", "gains.json"))

    return run


def trained(out: Path) -> Iterator[tuple[str, str]]:
    """A run with every learned symmetry and stored pairs, its export, file and decoded folder."""
    out.mkdir()
    run, folder, file = out / "run", out / "exported", out / "stored.rdopt.safetensors"
    command("train", "demo", "--out", run, "--lam", "60", *TEXT, *TRAINING, "--evaluate.max_tokens", "1024",
            "--train.sites", "[residual, value, stretch, query, norm, hidden]", "--train.stored", "pairs",
            "--train.stored_size", "2", "--encode.drift_sequences", "4")
    command("export", run, "--out", folder)
    command("encode", run, "--out", file)
    command("decode", file, "--out", out / "decoded", "--dtype", "bfloat16")
    command("inspect", file, "--json", out / "inspect-file.json")
    command("inspect", folder, "--json", out / "inspect-folder.json")
    command("inspect", run, "--json", out / "inspect-run.json")
    yield from hashes(out, ("run/transforms*", "exported/*", "*.safetensors", "*.json", "decoded/*"))


def files(out: Path) -> Iterator[tuple[str, str]]:
    """Files of the original coordinates with every option of the encoder."""
    out.mkdir()
    for name, options in FILES.items():
        slope = () if "--target-bpw" in options else ("--lam", "60")
        command("encode", "demo", "--out", out / f"{name}.rdopt.safetensors", *slope, *options, *QUICK)
    yield from hashes(out, ("*",))


def analyze(out: Path) -> Iterator[tuple[str, str]]:
    """Figures of the study."""
    command("analyze", "demo", "--out", out, "--bases", "identity,hadamard,pca", "--analyze.bits", "4", *TEXT,
            *("--context", "64", "--stride", "64", "--max-tokens", "512"))
    yield from hashes(out, ("analysis.json", "analysis.txt"))


def toy(out: Path) -> Iterator[tuple[str, str]]:
    """Figures of the experiment with signals."""
    command("toy", "--out", out, "--seeds", "2", "--steps", "100", "--width", "16", "--turn-steps", "5")
    yield from hashes(out, ("toy.json",))


GROUPS: dict[str, Callable[[Path], Iterator[tuple[str, str]]]] = {
    "sweep-uniform": sweep("feedback", UNIFORM_ARMS),
    "sweep-trellis": sweep("trellis", ARMS),
    "trained": trained,
    "files": files,
    "analyze": analyze,
    "toy": toy,
}


def hashes(folder: Path, patterns: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(name, SHA-256) of the files that match; JSON without its seconds and without where it lies."""
    for pattern in patterns:
        for path in sorted(x for x in folder.glob(pattern) if x.is_file()):
            data = path.read_bytes()
            if path.suffix == ".json":
                plain = untimed(json.loads(data))
                data = json.dumps(plain, sort_keys=True).replace(str(folder), "").encode()
            yield str(path.relative_to(folder)), hashlib.sha256(data).hexdigest()


def untimed(value: Any) -> Any:
    """JSON without the keys that a clock fills."""
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if not k.endswith("seconds")}
    return [untimed(x) for x in value] if isinstance(value, list) else value


if __name__ == "__main__":
    sys.exit(main())
