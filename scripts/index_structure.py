"""How much of each matrix a function of the layer index, the channel index or a low rank predicts: W = f + r.

Prints, per coordinate system, explained energy against the numbers spent, beside chance, bits/weight of f + r against
r alone at equal squared error, and the verdicts on the predictions. Existing files are never overwritten.

    python scripts/index_structure.py --model demo --json index.json --png index.png
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from index_functions.report import index_lines, plot_index
from index_functions.structure import BUDGETS, SYSTEMS, index_structure
from outputs import check_new, exit_code, write_json

from rdopt.calibration.subject import load_subject
from rdopt.checkpoint.atomic import new_file
from rdopt.transforms.bases import BASES


def measure_structure(args: argparse.Namespace) -> None:
    """Reads, measures, prints, writes."""
    check_new((args.json, args.png))
    begun = time.perf_counter()
    subject = load_subject(args.model)
    result = index_structure(
        subject.params, subject.arch, bases=args.bases, budgets=args.budgets, bits=args.bits, seeds=args.seeds,
        progress=lambda basis: print(f"{time.perf_counter() - begun:5.0f} s  {basis}", flush=True),
    )  # fmt: skip
    result = {"model": Path(args.model).name, **result}
    print(*index_lines(result), f"{time.perf_counter() - begun:.0f} s", sep="\n")
    write_json(args.json, result)
    if args.png is not None:
        with new_file(args.png) as part:
            plot_index(result, part)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures one model; the exit code is 2 for an error of the user's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, a Hugging Face folder, or a hub name")
    known = [basis for basis in BASES if basis != "pca-act"]
    parser.add_argument("--bases", nargs="+", default=list(SYSTEMS), choices=known, help="coordinate systems")
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS), help="sizes of f, shares, rising")
    parser.add_argument("--bits", type=float, default=3.0, help="bits/weight of r alone in original coordinates")
    parser.add_argument("--seeds", type=int, default=3, help="Gaussian controls, two at least")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--png", type=Path, help="file to draw them in")
    return exit_code(measure_structure, parser.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
