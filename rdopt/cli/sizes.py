"""`--dry-run`: matrices, parameters, and what a command will take of this machine, from config.json alone."""

import argparse
from dataclasses import replace
from pathlib import Path

from rdopt.checkpoint.families import MATRICES, Architecture, architecture_from_config, block_shapes, coded_weights
from rdopt.checkpoint.folder import NUMPY_TYPES, read_config
from rdopt.checkpoint.write import DTYPES
from rdopt.cli.machine import machine_speed
from rdopt.cli.needs import LOWERED_BY, NEEDS, Needs, Terms, parameters_of
from rdopt.cli.parser import toy_settings
from rdopt.codec.streams.container import read_container
from rdopt.codec.streams.uncoded import unpack_files
from rdopt.config.load import load_config
from rdopt.config.schema import Config
from rdopt.runs.moments import MOMENTS, refuse_small
from rdopt.study.toy.settings import toy_sizes

_START, _STARTS = 12.0, {"train": 40.0, "sweep": 60.0}  # seconds of importing and compiling
_GIB = 2**30


def sizes(args: argparse.Namespace, config: Config, timed: bool = True) -> str:
    """What a command would work on and take, in a few lines; reads no weights.

    Args:
        args: the parsed command line.
        config: the resolved configuration.
        timed: whether the machine is tried for some seconds, for an estimate of the time.

    Raises:
        UserError: no such model or file, or a budget that one block of the model exceeds.
    """
    if args.command == "toy":
        return toy_sizes(toy_settings(args))
    model, arch, config, file = _subject(args, config)
    shapes = block_shapes(arch)
    matrices = ", ".join(f"{k} {shapes[k][0]}x{shapes[k][1]}" for k in MATRICES)
    lines = [f"{model}: {arch.model_type}, {parameters_of(arch)} parameters, {coded_weights(arch)} to code in "
             f"{arch.num_layers} x ({matrices})"]
    if file is not None:
        streams, _ = read_container(file)
        lines.append(f"{file}: bytes of " + ", ".join(f"{kind} {len(x)}" for kind, x in streams.items() if x))
    if args.command not in ("decode", "eval", "export", "inspect"):
        refuse_small(arch, config.run.memory)
    if args.command in NEEDS:
        needs = _needs(args, arch, config, file)
        lines += _described(needs, config)
        if timed:
            start = {"start": _STARTS.get(args.command, _START)}
            lines.append(_time(start, needs.work, getattr(args, "out", None) or Path()))
    return "\n".join(lines)


def needs_of(args: argparse.Namespace, config: Config) -> Needs:
    """What a command of `NEEDS` takes; the arguments are those of `sizes`."""
    _, arch, applying, file = _subject(args, config)
    return _needs(args, arch, applying, file)


def _needs(args: argparse.Namespace, arch: Architecture, config: Config, file: Path | None) -> Needs:
    size = {} if file is None else {"file": file.stat().st_size}
    if args.command == "decode":
        size["itemsize"] = NUMPY_TYPES[DTYPES[args.dtype]].itemsize
    return NEEDS[args.command](arch, config, **size)


def _subject(args: argparse.Namespace, config: Config) -> tuple[str, Architecture, Config, Path | None]:
    """(what the model is called, its architecture, the configuration that applies, the file that is read)."""
    named = next((str(x) for k in ("source", "run", "path", "file", "candidate") if (x := getattr(args, k, None))), "")
    path = Path(named)
    if args.command == "decode" or path.is_file():
        streams, _ = read_container(path)
        described, _ = unpack_files(streams["files"])
        encode = replace(config.encode, embeddings="coded" if streams["embeddings"] else "16bit")
        return named, architecture_from_config(described), replace(config, encode=encode), path
    if (path / "config.yaml").is_file():
        run = config.run if config.run.moments or not (path / MOMENTS).is_dir() else replace(
            config.run, moments=str(path / MOMENTS))
        config = replace(load_config(path / "config.yaml"), run=run, encode=config.encode)
    elif args.command in ("encode", "inspect"):
        config = replace(config, model=named)
    return config.model, architecture_from_config(read_config(config.model)), config, None


def _described(needs: Needs, config: Config) -> list[str]:
    """Memory and disk of a command in words, GiB."""
    shown = _terms(needs.memory[needs.stage])
    lines = [f"memory: about {needs.peak / _GIB:.2f} GiB, the most for {needs.stage}: {shown}"]
    guessed = any(k.startswith("file") for k in needs.disk) and config.encode.target_bpw is None
    if needs.disk or needs.meanwhile:
        lines.append(f"disk: {sum(needs.disk.values()) / _GIB:.3g} GiB ({_terms(needs.disk)}), "
                     f"{needs.meanwhile / _GIB:.3g} GiB more meanwhile"
                     + ("; files may differ by a bit/weight, only --target-bpw is sure" if guessed else ""))
    return lines


def _terms(terms: Terms) -> str:
    """Terms from the largest on, each with what lowers it."""
    largest = sorted(terms.items(), key=lambda x: -x[1])
    return ", ".join(
        f"{name} {size / _GIB:.2g}" + (f" (lower: {LOWERED_BY[name]})" if name in LOWERED_BY else "")
        for name, size in largest if size > 0.01 * sum(terms.values())
    )


def _time(start: Terms, work: Terms, near: Path) -> str:
    """Time in words, of a machine as busy as it is now."""
    speed = machine_speed(near)
    seconds = {**start, **{kind: work[kind] / speed[kind] for kind in work}}
    total = sum(seconds.values())
    shown = f"{total:.0f} s" if total < 120 else f"{total / 60:.0f} min" if total < 7200 else f"{total / 3600:.1f} h"
    parts = ", ".join(f"{kind} {x / total:.0%}" for kind, x in sorted(seconds.items(), key=lambda x: -x[1]) if x > 0)
    return f"time: about {shown} on this machine as busy as it is now ({parts})"
