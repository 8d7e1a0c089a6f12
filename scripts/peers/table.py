"""A table of cells: every curve of every model at every size, measured once, with the time left."""

import argparse
import hashlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from peers.benchmark import Benchmark, ForeignCellError, model_and_text, open_benchmark
from peers.model import DecodedModel
from peers.report import Cell, row
from rdopt.checkpoint.folder import open_checkpoint
from rdopt.config.errors import UserError
from rdopt.config.progress import Say
from rdopt.config.schema import EvaluateConfig
from rdopt.runs.figures import dumps

_TARGETS = (1.5, 2.0, 2.5, 3.0, 4.0)
_FINETUNE_STEPS = 120


@dataclass(kw_only=True)
class Clock:
    """How long the rest of a table takes, from the cells so far.

    Attributes:
        plan: (arm, size of its model) of every cell of the table, in order; seconds are taken to grow with the size.
        now: reads a clock in seconds.
    """

    plan: Sequence[tuple[str, float]]
    now: Callable[[], float] = time.perf_counter
    _done: int = 0
    _rates: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._last = self.now()

    def tick(self, remembered_seconds: float) -> float:
        """Seconds left after one more cell.

        Args:
            remembered_seconds: what the cell says it took; it took more when settings were tuned before it.
        """
        arm, size = self.plan[self._done]
        seconds = max(self.now() - self._last, remembered_seconds)
        self._last, self._done = self.now(), self._done + 1
        self._rates.setdefault(arm, []).append(seconds / size)
        means = {name: sum(rates) / len(rates) for name, rates in self._rates.items()}
        usual = sum(means.values()) / len(means)
        return sum(size * means.get(arm, usual) for arm, size in self.plan[self._done :])


def minutes(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class ArmVariant(NamedTuple):
    """One arm in one variant: what its cells are marked with, and its file at a size."""

    arm: str
    variant: str
    settings: dict[str, Any]
    code: Callable[[float], DecodedModel]


def measure_cells(
    benchmark: Benchmark,
    curves: Iterator[ArmVariant],
    targets: Sequence[float],
    clock: Clock,
    failed: list[str],
    say: Say,
) -> Iterator[Cell]:
    """All cells of a model, each said as it is done; one that fails is said, noted in `failed` and left out.

    A cell whose codes another arm shares ("also": arm -> its sizes) gives a cell of that arm, too.
    """
    for curve in curves:
        for target in targets:
            begin = {"arm": curve.arm, "settings": curve.settings, "target": target}
            label = f"{curve.arm}--{_tag(curve.settings)}--{target:g}"
            try:
                cell = {**benchmark.cell(label, begin, partial(curve.code, target)), "variant": curve.variant}
            except ForeignCellError:
                raise
            except Exception as error:  # one broken arm must not cost an hour of the others
                failed.append(f"{_title(benchmark, curve, target)} failed: {type(error).__name__}: {error}")
                say(failed[-1])
                say(traceback.format_exc())
                clock.tick(0.0)
                continue
            say(f"{row(cell)}  ({minutes(clock.tick(cell['seconds']))} left)")
            yield cell
            for arm, sizes in cell.get("also", {}).items():
                twin = {**cell, "arm": arm, **sizes}
                say(row(twin))
                yield twin


def _tag(settings: Mapping[str, Any]) -> str:
    """Names a cell by what it was measured with, so that two variants with the same settings share it."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _title(benchmark: Benchmark, curve: ArmVariant, target: float) -> str:
    return f"{benchmark.cells.model} {curve.arm} {curve.variant} {target:g}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of every table of cells."""
    parser.add_argument("--model", action="append", metavar="MODEL[:TEXT:SPLIT]", help="default: demo:builtin:file")
    parser.add_argument("--targets", type=float, nargs="+", default=list(_TARGETS), help="bits/weight of the files")
    parser.add_argument("--cells", type=Path, default=Path("cells"), help="folder of finished cells")
    parser.add_argument("--json", type=Path, default=None, help="where the rows and the summary go")
    parser.add_argument("--sequences", type=int, default=256, help="calibration sequences")
    parser.add_argument("--context", type=int, default=256, help="tokens in a sequence and in a window")
    parser.add_argument("--max-tokens", type=int, default=65536, help="test tokens")
    parser.add_argument("--finetune", type=int, default=_FINETUNE_STEPS, help="steps of finetuning after coding")


def run_table(
    args: argparse.Namespace,
    names: Sequence[str],
    curves: Callable[[Benchmark], Iterator[ArmVariant]],
    summarize: Callable[[Sequence[Cell], float], list[Cell]],
    lines: Callable[[Sequence[Cell]], Iterable[str]],
) -> int:
    """`tabulate` with everything printed, the summary by `lines`; the exit code."""
    try:
        rows, failed = tabulate(args, names, curves, summarize, partial(print, flush=True))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join([*lines(rows), *failed]))
    return 1 if failed else 0


def tabulate(
    args: argparse.Namespace,
    names: Sequence[str],
    curves: Callable[[Benchmark], Iterator[ArmVariant]],
    summarize: Callable[[Sequence[Cell], float], list[Cell]],
    say: Say,
) -> tuple[list[Cell], list[str]]:
    """Measures every cell of every model, writes JSON on request.

    Args:
        args: of `add_arguments`.
        names: arms of the curves of a model.
        curves: the curves of a model.
        summarize: (cells of a model, its noise floor) to rows.
        say: prints a line.

    Returns:
        the rows of all summaries, and the sentences of the cells that failed.

    Raises:
        UserError: bad input.
    """
    args.cells.mkdir(parents=True, exist_ok=True)
    evaluate = EvaluateConfig(context=args.context, stride=args.context, max_tokens=args.max_tokens)
    specs = [model_and_text(spec, args.context, args.sequences) for spec in args.model or ["demo:builtin:file"]]
    sizes = [float(open_checkpoint(model).num_parameters) for model, _ in specs]
    clock = Clock(plan=[(name, size) for size in sizes for name in names for _ in args.targets])
    cells: list[Cell] = []
    rows: list[Cell] = []
    failed: list[str] = []
    for model, text in specs:
        benchmark = open_benchmark(model, text, evaluate, args.cells)
        measured = list(measure_cells(benchmark, curves(benchmark), args.targets, clock, failed, say))
        cells, rows = cells + measured, rows + summarize(measured, benchmark.floor)
    if args.json is not None:
        left_out = ("kl_sums", "counts", "key")
        table = [{k: v for k, v in cell.items() if k not in left_out} for cell in cells]
        args.json.write_text(dumps({"cells": table, "summary": rows, "failed": failed}), encoding="utf-8")
    return rows, failed
