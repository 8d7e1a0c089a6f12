"""`--dry-run`: matrices, parameters, expected memory and disk of a command, from the headers alone."""

import math

from rdopt.checkpoint import MATRICES, block_shapes, open_checkpoint
from rdopt.config import Config

_FLOAT = 4


def dry_run(config: Config, command: str, model: str | None = None) -> str:
    """What a command would work on, in a few lines; reads no weights.

    Args:
        config: the resolved configuration.
        command: train, export, encode, eval or sweep.
        model: another model than the configuration's.
    """
    checkpoint = open_checkpoint(model or config.model)
    arch, shapes = checkpoint.arch, block_shapes(checkpoint.arch)
    sizes = {name: shapes[name] for name in MATRICES}
    weights = arch.num_layers * sum(math.prod(s) for s in sizes.values())
    trained = arch.hidden_size * (arch.hidden_size - 1) // 2
    trained += arch.num_layers * arch.num_kv_heads * arch.head_dim * (arch.head_dim - 1) // 2
    inputs = [sizes[k][1] for k in ("q", "o", "gate", "down")]
    outputs = [sizes[k][0] for k in ("v", "o", "down")]
    moments = 8 * arch.num_layers * sum(n * n for n in (*inputs, *outputs))
    cached = config.evaluate.max_tokens * arch.vocab_size * _FLOAT
    copies = {"train": 4, "sweep": 5, "encode": 4, "export": 3, "eval": 2}[command]
    memory = copies * _FLOAT * checkpoint.num_parameters + 2 * moments + min(cached, 2**30)
    uncoded = 2 * (checkpoint.num_parameters - weights)
    points = len(config.sweep.target_bpw or config.sweep.lams) * len(config.sweep.arms)
    disk = {
        "train": moments + 2 * 3 * _FLOAT * trained,
        "sweep": moments + points * (uncoded + weights // 2),
        "encode": uncoded + weights // 2,
        "export": _FLOAT * checkpoint.num_parameters,
        "eval": 0,
    }[command]
    matrices = ", ".join(f"{name} {out}x{width}" for name, (out, width) in sizes.items())
    return (
        f"{model or config.model}: {arch.model_type}, {checkpoint.num_parameters} parameters, {weights} to code in "
        f"{arch.num_layers} x ({matrices})\n"
        f"{trained} transform parameters; about {memory / 2**20:.0f} MiB of memory and {disk / 2**20:.1f} MiB of disk"
    )
