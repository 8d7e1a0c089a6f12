"""Synthetic Llamas of any size: heavy-tailed weights with outlier channels, written one tensor at a time."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from rdopt.checkpoint.families import architecture_from_config, expected_tensors
from rdopt.checkpoint.folder import open_checkpoint
from rdopt.checkpoint.write import carried_files, write_checkpoint

_SPREAD = 0.5  # of the logarithm of the columns' spreads
_LARGE, _FACTOR = 1e-5, 20.0  # share of the entries that are outliers, and how large


def llama_config(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    """config.json of a synthetic model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }


def synthetic(config: dict[str, Any], seed: int) -> Iterator[tuple[str, Float[np.ndarray, "..."]]]:
    """Tensors one at a time, float32; the output of a matrix keeps the power of its input."""
    for i, (name, shape) in enumerate(expected_tensors(architecture_from_config(config)).items()):
        rng = np.random.default_rng((seed, i))
        if len(shape) == 1:
            yield name, np.exp(0.1 * rng.standard_normal(shape, np.float32))
            continue
        W = rng.standard_normal(shape, np.float32) * np.exp(_SPREAD * rng.standard_normal(shape[1], np.float32))
        W.ravel()[rng.integers(W.size, size=math.ceil(_LARGE * W.size))] *= _FACTOR
        yield name, W * np.float32(0.5 / math.sqrt(shape[1]))


def write_synthetic(folder: Path, config: dict[str, Any], seed: int = 0) -> None:
    """A synthetic model in bfloat16 with the demo's tokenizer, unless it lies there already."""
    if not folder.exists():
        print(f"writing {folder}", flush=True)
        demo = carried_files(open_checkpoint("demo").folder)
        write_checkpoint(folder, config, synthetic(config, seed), dtype="bfloat16", files=demo, shard_bytes=1e9)
