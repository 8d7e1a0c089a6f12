"""The command line: ten commands, short flags for the usual keys, --SECTION.KEY VALUE for every other."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rdopt import __version__
from rdopt.config.errors import UserError
from rdopt.config.load import load_config
from rdopt.config.schema import Config, options
from rdopt.study.toy.settings import ToySettings

# Short flag -> configuration key, shared by the commands that name them.
SHORT = {
    "text": "text.sources",
    "split-on": "text.split_on",
    "seq-len": "text.seq_len",
    "sequences": "text.calibration_sequences",
    "steps": "train.steps",
    "init": "train.init",
    "seed": "train.seed",
    "lams": "sweep.lams",
    "arms": "sweep.arms",
    "grid": "encode.grid",
    "finetune": "encode.finetune",
    "threads": "encode.threads",
    "context": "evaluate.context",
    "stride": "evaluate.stride",
    "max-tokens": "evaluate.max_tokens",
    "bases": "analyze.bases",
    "memory": "run.memory",
    "moments": "run.moments",
}
TEXT = ("text", "split-on", "seq-len", "sequences", "seed")
WINDOWS = ("context", "stride", "max-tokens")
MACHINE = ("memory", "moments")

TOY = {
    "seeds": (int, "signals and MLPs, of which the errors are taken (6)"),
    "seed": (int, "the first of them (0)"),
    "steps": (int, "steps of Adam on the MLP (2000)"),
    "width": (int, "units of its hidden layers (48)"),
    "sinusoids": (int, "summed in a signal (8)"),
    "cycles": (float, "highest frequency over the domain (8)"),
    "turn-steps": (int, "steps of Adam on the learned rotations (100)"),
}


class Parser(argparse.ArgumentParser):
    """Errors of usage as one sentence, like every other."""

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage."""
        raise UserError(f"{message}; see {self.prog} --help.")


def build_parser() -> Parser:
    """The parser of all commands."""
    top = Parser(
        prog="rdopt",
        description="Compress a language model by choosing its coordinates.",
        epilog="Every key of the configuration is also a flag: --train.learning_rate 0.003. "
        "Example: rdopt sweep demo --out runs/demo",
    )
    top.add_argument("--version", action="version", version=f"rdopt {__version__}")
    commands = top.add_subparsers(dest="command", required=True, parser_class=Parser)
    moments = _command(commands, "moments", "measure second moments", "rdopt moments demo --out runs/moments")
    _model(moments)
    moments.add_argument("--out", required=True, type=Path, help="folder to make; an unfinished one is continued")
    _keys(moments, (*TEXT, "memory"))
    train = _command(commands, "train", "learn transforms", "rdopt train demo --out runs/a --lam 50")
    _model(train)
    train.add_argument("--out", required=True, type=Path, help="run folder; an unfinished one is continued")
    train.add_argument("--lam", help="bits/weight that one nat/token of distortion is worth")
    _keys(train, (*TEXT, "steps", "init", *MACHINE))
    _place(train)
    export = _command(commands, "export", "write the aligned model", "rdopt export runs/a --out aligned")
    export.add_argument("run", type=Path, help="finished run of rdopt train")
    export.add_argument("--out", required=True, type=Path, help="folder to make")
    encode = _command(
        commands, "encode", "quantize and entropy-code", "rdopt encode runs/a --out a.rdopt.safetensors --lam 50"
    )
    encode.add_argument("source", type=Path, help="run of rdopt train, or a model folder")
    encode.add_argument("--out", required=True, type=Path, help="file to make")
    size = encode.add_mutually_exclusive_group()
    size.add_argument("--lam", help="slope; the run's own by default")
    size.add_argument("--target-bpw", metavar="VALUE", help="bits/weight of the file instead")
    size.add_argument("--target-kl", metavar="VALUE", help="KL on the selection text instead")
    size.add_argument("--target-ppl", metavar="VALUE", help="its perplexity instead")
    _keys(encode, (*TEXT, "grid", "finetune", "threads", *WINDOWS, *MACHINE))
    decode = _command(commands, "decode", "file to plain folder", "rdopt decode a.rdopt.safetensors --out decoded")
    decode.add_argument("file", type=Path)
    decode.add_argument("--out", required=True, type=Path, help="folder to make")
    decode.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    _keys(decode, ("threads",))
    evaluate = _command(
        commands, "eval", "perplexity and KL", "rdopt eval a.rdopt.safetensors --reference demo --json eval.json"
    )
    evaluate.add_argument("candidate", help="file of rdopt encode, or a model folder")
    evaluate.add_argument("--reference", required=True, help="demo, a Hugging Face folder, or a hub name")
    evaluate.add_argument("--json", type=Path, help="file to write the figures to")
    _keys(evaluate, (*TEXT, *WINDOWS, "memory"))
    sweep = _command(
        commands, "sweep", "a rate-distortion curve", "rdopt sweep demo --out runs/demo --lams 10,30,100,300,1000"
    )
    _model(sweep)
    sweep.add_argument("--out", required=True, type=Path, help="sweep folder; what it holds is not measured again")
    sweep.add_argument("--target-bpw", help="sizes such as 2,3,4 instead of slopes")
    sweep.add_argument("--keep", action="store_true", help="keep a plain folder of every learned point's model")
    _keys(sweep, ("lams", "arms", *TEXT, "steps", *WINDOWS, *MACHINE))
    _study(commands)
    return top


def _study(commands: argparse._SubParsersAction) -> None:
    """The commands that look instead of compressing."""
    analyze = _command(
        commands, "analyze", "weights in several coordinate systems", "rdopt analyze demo --out runs/study --bases "
        "identity,hadamard,pca"
    )
    _model(analyze)
    analyze.add_argument("--out", required=True, type=Path, help="folder to make; an unfinished one is continued")
    analyze.add_argument(
        "--run", dest="learned", type=Path, help="finished run of rdopt train: its coordinates are the learned ones"
    )
    analyze.add_argument(
        "--trajectory", type=Path, help="folder of step-* that train_demo_lm.py --keep-checkpoints left for this model"
    )
    _keys(analyze, ("bases", *TEXT, "steps", *WINDOWS, *MACHINE))
    look = _command(commands, "inspect", "what a file, run or folder holds", "rdopt inspect a.rdopt.safetensors")
    look.add_argument("path")
    look.add_argument("--json", type=Path, help="file to write the figures to")
    toy = _command(commands, "toy", "the signal experiment: Fourier against an MLP", "rdopt toy --out runs/toy")
    toy.add_argument("--out", required=True, type=Path, help="folder to make, with toy.json and toy.png")
    for name, (kind, text) in TOY.items():
        toy.add_argument(f"--{name}", dest=f"toy_{name.replace('-', '_')}", type=kind, metavar="N", help=text)


def _command(commands: argparse._SubParsersAction, name: str, what: str, example: str) -> Parser:
    parser = commands.add_parser(name, help=what, description=what, epilog=f"example: {example}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("--config", type=Path, help="YAML file of settings (configs/ ships some)")
    parser.add_argument("--dry-run", action="store_true", help="say what it will take, and do nothing")
    return parser


def _model(parser: Parser) -> None:
    """The model by position or by name; the configuration's when neither is given."""
    parser.add_argument("model", nargs="?", help="demo, a Hugging Face folder, or a hub name")
    parser.add_argument("--model", dest="named_model", help=argparse.SUPPRESS)


def _place(parser: Parser) -> None:
    """Where this process stands among several that run the same command."""
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT", help="process 0's, of a run of several processes; auto on SLURM and TPUs"
    )
    parser.add_argument("--processes", type=int, metavar="N", help="how many run this command")
    parser.add_argument("--process", type=int, metavar="I", help="which of them this one is, from 0")


def _keys(parser: Parser, flags: Sequence[str]) -> None:
    helps = {option.name: option.text.replace("%", "%%") for option in options()}
    for flag in flags:
        many, shown = ("+", "T") if flag == "text" else (None, "VALUE")
        parser.add_argument(f"--{flag}", nargs=many, help=helps[SHORT[flag]], metavar=shown)


def overrides_of(args: argparse.Namespace, rest: Sequence[str]) -> list[tuple[str, str]]:
    """Configuration overrides from the short flags and the --SECTION.KEY VALUE words, in this order."""
    pairs = []
    for flag, key in SHORT.items():
        value = getattr(args, flag.replace("-", "_"), None)
        if value is not None:
            pairs.append((key, _list(value) if isinstance(value, list) else value))
    words = iter(rest)
    for word in words:
        if not word.startswith("--"):
            raise UserError(f"the argument {word!r} has no place; see rdopt {args.command} --help.")
        key, sign, value = word[2:].partition("=")
        if not sign:
            value = next(words, None)
            if value is None:
                raise UserError(f"the flag --{key} has no value; write --{key} VALUE.")
        pairs.append((key.replace("-", "_") if "." in key else key, value))
    return pairs


def _list(values: Sequence[str]) -> str:
    """File names as a YAML list in absolute form, so that a run folder can be used from anywhere."""
    return "[" + ", ".join(f"'{absolute(v)}'".replace("\\", "/") for v in values) + "]"


def absolute(name: str) -> str:
    """An existing path as an absolute one; other names (demo, builtin, hub names) as they are."""
    path = Path(name)
    return str(path.resolve()) if path.exists() else name


def resolve(args: argparse.Namespace, rest: Sequence[str]) -> Config:
    """The configuration of a command: file, then flags."""
    if args.command == "toy" and (rest or args.config is not None):
        named = rest[0] if rest else "--config"
        raise UserError(f"{named} does not apply to rdopt toy, which has its own flags; see rdopt toy --help.")
    pairs = overrides_of(args, rest)
    model = next((m for k in ("model", "named_model", "reference") if (m := getattr(args, k, None))), None)
    if model is not None:
        pairs.append(("model", absolute(model)))
    if args.command == "train" and args.lam is not None:
        pairs.append(("train.lam", args.lam))
    if args.command == "encode":
        pairs += [("encode.lam", args.lam)] if args.lam is not None else []
        for key in ("target_bpw", "target_kl", "target_ppl"):
            value = getattr(args, key, None)
            pairs += [(f"encode.{key}", value)] if value is not None else []
    if args.command == "sweep":
        pairs += [("sweep.target_bpw", args.target_bpw)] if args.target_bpw is not None else []
        pairs += [("sweep.keep", "true")] if args.keep else []
    return load_config(args.config, pairs)


def toy_settings(args: argparse.Namespace) -> ToySettings:
    """The settings of `rdopt toy`; what no flag gives keeps its default."""
    given = {k.removeprefix("toy_"): v for k, v in vars(args).items() if k.startswith("toy_") and v is not None}
    return ToySettings(**given)
