"""`--dry-run`: matrices, parameters, expected memory and disk of a command, from the headers alone."""

import argparse
import math
from pathlib import Path

from rdopt.checkpoint.families import INPUT_OF, MATRICES, Architecture, block_shapes
from rdopt.checkpoint.folder import open_checkpoint
from rdopt.cli.parser import toy_settings
from rdopt.codec.streams.container import read_container
from rdopt.config.load import load_config
from rdopt.config.schema import Config
from rdopt.study.analyze.networks import networks_of
from rdopt.study.toy.settings import toy_sizes

_FLOAT = 4
# Float32 copies of the model that are alive at once: weights, aligned, on the device, decoded, a temporary.
_COPIES = {"train": 4, "sweep": 5, "encode": 4, "export": 3, "eval": 3, "decode": 2, "inspect": 1}


def sizes(args: argparse.Namespace, config: Config) -> str:
    """What a command would work on, in a few lines; reads no weights.

    Args:
        args: the parsed command line.
        config: the resolved configuration.
    """
    if args.command == "toy":
        return toy_sizes(toy_settings(args))
    source = Path(str(getattr(args, "source", None) or getattr(args, "run", None) or getattr(args, "path", "")))
    coded = Path(str(getattr(args, "file", None) or source))
    if coded.is_file():
        streams, _ = read_container(coded)
        parts = ", ".join(f"{kind} {len(data)}" for kind, data in streams.items())
        return f"{coded}: bytes of {parts}; decoding takes about {10 * len(streams['codes']) / 2**20:.0f} MiB of memory"
    if (source / "config.yaml").is_file():
        config = load_config(source / "config.yaml")
    elif args.command in ("encode", "inspect"):
        return _of_model(str(source), config, args.command)
    return _of_model(config.model, config, args.command)


def _of_model(model: str, config: Config, command: str) -> str:
    checkpoint = open_checkpoint(model)
    arch, shapes = checkpoint.arch, block_shapes(checkpoint.arch)
    weights = arch.num_layers * sum(math.prod(shapes[k]) for k in MATRICES)
    moments = 8 * arch.num_layers * _moment_entries(arch)
    trained = arch.hidden_size * (arch.hidden_size - 1) // 2
    trained += arch.num_layers * arch.num_kv_heads * arch.head_dim * (arch.head_dim - 1) // 2
    cached = min(config.evaluate.max_tokens * arch.vocab_size * _FLOAT, 2**30)
    memory = _streamed(config, arch, weights, moments) if command == "analyze" else (
        _COPIES[command] * _FLOAT * checkpoint.num_parameters + 2 * moments + cached
    )
    # A coded weight takes at most about half a byte at the slopes people use; uncoded ones take two bytes.
    file = 2 * (checkpoint.num_parameters - weights) + weights // 2
    points = len(config.sweep.target_bpw or config.sweep.lams) * len(config.sweep.arms)
    disk = {
        "train": moments + 6 * _FLOAT * trained,
        "sweep": moments + points * (file + _FLOAT * checkpoint.num_parameters),
        "encode": file,
        "export": _FLOAT * checkpoint.num_parameters,
        "analyze": moments // 2,
    }.get(command, 0)
    matrices = ", ".join(f"{k} {shapes[k][0]}x{shapes[k][1]}" for k in MATRICES)
    return (
        f"{model}: {arch.model_type}, {checkpoint.num_parameters} parameters, {weights} to code in "
        f"{arch.num_layers} x ({matrices})\n"
        f"{trained} transform parameters; about {memory / 2**20:.0f} MiB of memory, {disk / 2**20:.1f} MiB of disk"
    )


def _streamed(config: Config, arch: Architecture, weights: int, moments: int) -> int:
    """Bytes of an analysis: one block at a time, the ends in one basis, a stream of every network beside the original.

    Measured peaks lie within a third of this.
    """
    networks = len(networks_of(config.analyze.bases, config.analyze.bits, config.analyze.protected))
    tokens = max(networks * config.evaluate.max_tokens,
                 (arch.num_layers + 1) * config.text.calibration_sequences * config.text.seq_len)
    ends = 2 * arch.vocab_size * arch.hidden_size
    per_block = (6 * weights * _FLOAT + 4 * moments) // arch.num_layers
    return 2**29 + per_block + 3 * _FLOAT * ends + tokens * arch.hidden_size * _FLOAT


def _moment_entries(arch: Architecture) -> int:
    """Numbers in the second moments of one block."""
    shapes = block_shapes(arch)
    widths = {INPUT_OF[k]: shapes[k][1] for k in MATRICES}
    return sum(n * n for n in widths.values()) + sum(shapes[k][0] ** 2 for k in ("v", "o", "down"))
