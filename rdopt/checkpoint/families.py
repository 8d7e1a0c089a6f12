"""The Llama family: what a config.json says about the network, and the name and shape of every tensor.

Llama, Mistral, Qwen2 and Qwen3; defaults for absent keys are those of transformers' configuration classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rdopt.config.errors import UserError

Key = tuple[int, str]  # (layer, matrix) or (layer, input group)
MatrixShapes = Mapping[Key, tuple[int, int]]  # (out, in) of every coded matrix
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
# Input groups in the order of the computation: matrices of one group read the same activations.
MATRICES_OF = {"attn": ("q", "k", "v"), "o": ("o",), "mlp": ("gate", "up"), "down": ("down",)}
INPUT_OF = {name: group for group, names in MATRICES_OF.items() for name in names}
EMBED = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

LLAMA_MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True, kw_only=True)
class Family:
    """What one model_type means: defaults of keys that config.json may lack, parts of a block, names of its tensors."""

    head_dim: int | None = None
    """Default; None: hidden_size / num_attention_heads."""
    kv_heads: int | None = None
    """Default of num_key_value_heads; None: as many as heads."""
    positions: int = 32768
    """Default of max_position_embeddings."""
    qkv_bias: bool = False
    """Queries, keys and values always have biases."""
    reads_attention_bias: bool = False
    """attention_bias gives biases to all four projections."""
    reads_mlp_bias: bool = False
    """mlp_bias gives biases to the feed-forward layer, which is refused."""
    qk_norm: bool = False
    """Queries and keys of every head are normalised."""
    window: Literal["none", "all layers", "chosen layers"] = "none"
    """Where sliding_window holds; chosen layers: use_sliding_window, and layer_types or max_window_layers."""
    modules: Mapping[str, str] = field(default_factory=lambda: LLAMA_MODULES)
    """Short name -> module in a block of the checkpoint."""


# A family of the same kind is one row here. A network that computes something else begins with MATRICES above; what it
# computes stands in operator/llama.py `run_stage`, through which every pass goes; the symmetries that it keeps in the
# files of transforms/gauges/.
FAMILIES = {
    "llama": Family(positions=2048, reads_attention_bias=True, reads_mlp_bias=True),
    "mistral": Family(kv_heads=8, positions=131072, window="all layers"),
    "qwen2": Family(kv_heads=32, qkv_bias=True, window="chosen layers"),
    "qwen3": Family(head_dim=128, kv_heads=32, reads_attention_bias=True, qk_norm=True, window="chosen layers"),
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The shape and constants of one network; hashable, so it can be a static argument of jit."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    norm_eps: float
    rope_theta: float
    rope_scaling: tuple[tuple[str, float], ...] | None
    """The four llama3 scaling constants as sorted pairs, or None for plain RoPE."""
    tied: bool
    """The head is the embedding."""
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    max_positions: int
    sliding_window: int | None
    """Tokens that any layer may look back on, the present one included; None when unlimited."""

    def tensor_name(self, layer: int, short: str) -> str:
        """A block tensor's name in checkpoints: that of (3, "q") is "model.layers.3.self_attn.q_proj.weight"."""
        module, kind = (short[: -len("_bias")], "bias") if short.endswith("_bias") else (short, "weight")
        return f"model.layers.{layer}.{FAMILIES[self.model_type].modules[module]}.{kind}"


def architecture_from_config(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a config.json describes.

    Raises:
        UserError: an unsupported family, activation, RoPE type, bias or quantization, or a missing key.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or (family := FAMILIES.get(name)) is None:
        raise UserError(f"model_type {name!r} is not supported; supported are {', '.join(FAMILIES)}.")
    _refuse_unsupported(config, family)
    theta, scaling = _rope(config)
    heads = _integer(config, "num_attention_heads")
    hidden = _integer(config, "hidden_size")
    split = hidden // heads
    attention_bias = family.reads_attention_bias and bool(config.get("attention_bias", False))
    arch = Architecture(
        model_type=name,
        vocab_size=_integer(config, "vocab_size"),
        hidden_size=hidden,
        num_layers=_integer(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_integer(config, "num_key_value_heads", family.kv_heads or heads, null=heads),
        head_dim=_integer(config, "head_dim", family.head_dim or split, null=split),
        ffn_size=_integer(config, "intermediate_size"),
        norm_eps=_number("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias or family.qkv_bias,
        o_bias=attention_bias,
        qk_norm=family.qk_norm,
        max_positions=_integer(config, "max_position_embeddings", family.positions),
        sliding_window=_sliding_window(config, family),
    )
    if arch.num_heads % arch.num_kv_heads or arch.head_dim % 2:
        raise UserError(
            f"config.json asks for {arch.num_heads} heads over {arch.num_kv_heads} key/value heads of "
            f"{arch.head_dim}: heads must be a multiple of key/value heads, and their size even; mend it."
        )
    return arch


def block_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """The tensors of one block by short name; matrices are (out, in)."""
    d, f, h = arch.hidden_size, arch.ffn_size, arch.head_dim
    query, kv = arch.num_heads * h, arch.num_kv_heads * h
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (d,),
        "q": (query, d),
        "k": (kv, d),
        "v": (kv, d),
        "o": (d, query),
        "mlp_norm": (d,),
        "gate": (f, d),
        "up": (f, d),
        "down": (d, f),
    }
    if arch.qkv_bias:
        shapes |= {"q_bias": (query,), "k_bias": (kv,), "v_bias": (kv,)}
    if arch.o_bias:
        shapes |= {"o_bias": (d,)}
    if arch.qk_norm:
        shapes |= {"q_norm": (h,), "k_norm": (h,)}
    return shapes


def coded_weights(arch: Architecture) -> int:
    """N, the number of weights in the matrices of all blocks: the denominator of bits/weight."""
    shapes = block_shapes(arch)
    return arch.num_layers * sum(math.prod(shapes[name]) for name in MATRICES)


def coded_matrices(layers: int) -> Iterator[Key]:
    """(layer, matrix) of every matrix of the blocks, in the order of an encoded file."""
    for layer in range(layers):
        for name in MATRICES:
            yield layer, name


def input_groups(layers: int) -> Iterator[Key]:
    """(layer, group) in the order of the computation."""
    for layer in range(layers):
        for group in MATRICES_OF:
            yield layer, group


def matrix_shapes(arch: Architecture) -> dict[Key, tuple[int, int]]:
    """(layer, matrix) -> (out, in) of every matrix of the blocks, in the order of an encoded file."""
    shapes = block_shapes(arch)
    return {(i, name): (shapes[name][0], shapes[name][1]) for i, name in coded_matrices(arch.num_layers)}


def group_widths(arch: Architecture) -> dict[Key, int]:
    """(layer, group) -> input width of every input group, in the order of an encoded file."""
    shapes = block_shapes(arch)
    return {(layer, group): shapes[MATRICES_OF[group][0]][1] for layer, group in input_groups(arch.num_layers)}


def expected_tensors(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint of this architecture, by its checkpoint name, in file order."""
    shapes: dict[str, tuple[int, ...]] = {EMBED: (arch.vocab_size, arch.hidden_size)}
    for layer in range(arch.num_layers):
        shapes |= {arch.tensor_name(layer, short): shape for short, shape in block_shapes(arch).items()}
    shapes[FINAL_NORM] = (arch.hidden_size,)
    if not arch.tied:
        shapes[HEAD] = (arch.vocab_size, arch.hidden_size)
    return shapes


def _integer(config: Mapping[str, Any], key: str, default: int | None = None, null: int | None = None) -> int:
    """A positive integer; `default` when the key is absent, `null` when it is written as null."""
    value = config.get(key, default)
    value = null if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"config.json has {key} = {value!r}, but a positive integer is needed; mend it.")
    return value


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise UserError(f"config.json has {key} = {value!r}, but a positive number is needed; mend it.")
    return float(value)


def _refuse_unsupported(config: Mapping[str, Any], family: Family) -> None:
    if (act := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise UserError(f"hidden_act {act!r} is not supported; rdopt's feed-forward layer is SwiGLU (silu).")
    if config.get("mlp_bias", False) and family.reads_mlp_bias:
        raise UserError("mlp_bias = true is not supported; rdopt knows feed-forward layers without biases.")
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, Mapping) else quantized
        raise UserError(
            f"The checkpoint is already quantized ({method}); give its fp32, bf16 or fp16 original."
        )


def _rope(config: Mapping[str, Any]) -> tuple[float, tuple[tuple[str, float], ...] | None]:
    """Base and scaling, from rope_parameters (transformers 5) or rope_theta and rope_scaling (older)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise UserError(f"config.json has rope parameters {rope!r}, but an object is needed; mend it.")
    rope = dict(rope)
    theta = _number("rope_theta", rope.get("rope_theta", config.get("rope_theta") or 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UserError("partial_rotary_factor is not 1; rdopt knows only RoPE over the whole head.")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(f"RoPE type {kind!r} is not supported; supported are default and llama3.")
    rope.setdefault("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    missing = [key for key in _LLAMA3_KEYS if rope.get(key) is None]
    if missing:
        raise UserError(f"The llama3 RoPE scaling in config.json lacks {', '.join(missing)}; add it.")
    return theta, tuple((key, _number(key, rope[key])) for key in sorted(_LLAMA3_KEYS))


def _sliding_window(config: Mapping[str, Any], family: Family) -> int | None:
    chosen = family.window == "chosen layers"
    if family.window == "none" or (chosen and not config.get("use_sliding_window", False)):
        return None
    if config.get("sliding_window", 4096) is None:
        return None
    window = _integer(config, "sliding_window", 4096)
    if not chosen:
        return window
    layers = config.get("layer_types")
    first = config.get("max_window_layers", 28)
    slides = "sliding_attention" in layers if layers else first < config["num_hidden_layers"]
    return window if slides else None
