"""The Llama forward pass: RMSNorm, RoPE (plain and llama3), grouped-query attention, SwiGLU.

Follows transformers' modeling_llama, _mistral, _qwen2 and _qwen3; which matrices a block has is said in
checkpoint/families.py MATRICES. The compute type is the parameters' type. Float32 products ask for the highest
precision, because a GPU would otherwise round them to TF32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rdopt.checkpoint.families import MATRICES_OF, Architecture
from rdopt.config.errors import UserError
from rdopt.operator.params import Params

NumpyOrJax = Array | np.ndarray
BlockParams = Mapping[str, Any]
Rope = tuple[Any, Any]
_EXACT = jax.lax.Precision.HIGHEST


# The hook where probes and quantized weights attach: linear(name, p, x) is called once for each of MATRICES
# with its short name, the block's parameters and the layer's input (B, T, in), and returns (B, T, out).
Linear = Callable[[str, BlockParams, NumpyOrJax], Array]

# A block goes from the input of one group of matrices to that of the next, and from the last to its end.
STAGES = (*MATRICES_OF, "end")


def rope_tables(
    arch: Architecture, length: int
) -> tuple[Float[np.ndarray, "T head_dim"], Float[np.ndarray, "T head_dim"]]:
    """Cosines and sines of the rotary angles of positions 0 .. length - 1, float32 (Su et al. 2104.09864).

    Raises:
        UserError: the sequence is longer than the model's sliding window.
    """
    if arch.sliding_window is not None and length > arch.sliding_window:
        raise UserError(
            f"Sequences of {length} tokens exceed the model's sliding window of {arch.sliding_window}, which "
            "rdopt does not compute; choose a context within the window."
        )
    # Frequencies and angles are rounded to float32 where transformers rounds them.
    angle = np.arange(length, dtype=np.float32)[:, None] * _frequencies(arch)[None, :]
    angle = np.concatenate([angle, angle], axis=1).astype(np.float64)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def linear(name: str, p: BlockParams, x: Float[NumpyOrJax, "B T in"]) -> Float[Array, "B T out"]:
    """x W^T, plus the bias where the block has one."""
    y = jnp.einsum("bti,oi->bto", x, p[name], precision=_EXACT)
    bias = p.get(f"{name}_bias")
    return y if bias is None else y + bias[None, None, :]


def rms_norm(x: Float[NumpyOrJax, "*n d"], gain: Float[NumpyOrJax, " d"], eps: float) -> Float[Array, "*n d"]:
    """gain * x / sqrt(mean(x^2) + eps) over the last axis, the quotient in float32 (Zhang 1910.07467)."""
    x = jnp.asarray(x)
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * jnp.asarray(gain).reshape((1,) * (x.ndim - 1) + (-1,))


def attention(
    q: Float[Array, "B T heads h"], k: Float[Array, "B T kv h"], v: Float[Array, "B T kv h"]
) -> Float[Array, "B T heads*h"]:
    """Causal grouped-query attention: query head i reads key/value head i // (heads / kv)."""
    batch, length, heads, h = q.shape
    grouped = q.reshape(batch, length, k.shape[2], -1, h)
    score = jnp.einsum("btkgh,bskh->bkgts", grouped, k, precision=_EXACT).astype(jnp.float32) / math.sqrt(h)
    causal = np.tril(np.ones((length, length), bool))[None, None, None]
    score = jnp.where(causal, score, jnp.finfo(jnp.float32).min)
    weight = jax.nn.softmax(score, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weight, v, precision=_EXACT).reshape(batch, length, heads * h)


def block(
    p: BlockParams, x: Float[NumpyOrJax, "B T d"], rope: Rope, arch: Architecture, linear: Linear = linear
) -> Float[Array, "B T d"]:
    """One transformer block: its stages one after another.

    Args:
        p: the block's parameters by short name, without the layer axis.
        x: the residual stream, (B, T, d).
        rope: the tables of `rope_tables` for T positions.
        arch: the architecture (static).
        linear: called as linear(name, p, x) for each of the seven matrices.

    Returns:
        The residual stream after the block, (B, T, d), in x's type.
    """
    stream = inputs = jnp.asarray(x)
    for stage in STAGES:
        stream, inputs = run_stage(stage, p, stream, inputs, rope, arch, linear)
    return stream


def run_stage(
    stage: str,
    p: BlockParams,
    stream: Float[NumpyOrJax, "B T d"],
    inputs: Float[NumpyOrJax, "B T in"],
    rope: Rope,
    arch: Architecture,
    linear: Linear = linear,
) -> tuple[Float[Array, "B T d"], Float[Array, "B T out"]]:
    """From the input of one group of matrices to that of the next.

    This is the only place that says how a block is put together: the whole model, the drift's correction and the
    statistics of activations all go through it.

    Args:
        stage: one of STAGES: the group whose input comes out, or "end".
        p: the block's parameters.
        stream: the residual stream at the group before.
        inputs: what the matrices of the group before read; the stream itself at the start of a block.
        rope: the tables of `rope_tables` for T positions.
        arch: the architecture (static).
        linear: see `block`.

    Returns:
        (residual stream, input of the group's matrices); behind the block the stream twice.
    """
    stream, inputs = jnp.asarray(stream), jnp.asarray(inputs)
    if stage == "attn":
        return stream, rms_norm(stream, p["attn_norm"], arch.norm_eps)
    if stage == "o":
        q, k, v = (_heads(linear(name, p, inputs), arch) for name in ("q", "k", "v"))
        if arch.qk_norm:
            q, k = rms_norm(q, p["q_norm"], arch.norm_eps), rms_norm(k, p["k_norm"], arch.norm_eps)
        return stream, attention(_rotate(q, rope), _rotate(k, rope), v)
    if stage == "mlp":
        stream = stream + linear("o", p, inputs)
        return stream, rms_norm(stream, p["mlp_norm"], arch.norm_eps)
    if stage == "down":  # SwiGLU, 2002.05202
        return stream, jax.nn.silu(linear("gate", p, inputs)) * linear("up", p, inputs)
    stream = stream + linear("down", p, inputs)
    return stream, stream


def run_blocks(
    blocks: BlockParams, x: Float[NumpyOrJax, "B T d"], rope: Rope, arch: Architecture, linear: Linear = linear
) -> Float[Array, "B T d"]:
    """All blocks in order; `blocks` has a leading layer axis on every array."""
    stacked = jax.tree.map(jnp.asarray, dict(blocks))
    return jax.lax.scan(lambda x, p: (block(p, x, rope, arch, linear), None), jnp.asarray(x), stacked)[0]


def embed_tokens(params: Params, tokens: Int[NumpyOrJax, "B T"]) -> Float[Array, "B T d"]:
    """The embedding rows of the tokens."""
    return jnp.take(jnp.asarray(params["embed"]), tokens, axis=0)


def head_logits(params: Params, x: Float[NumpyOrJax, "B T d"], arch: Architecture) -> Float[Array, "B T V"]:
    """Final norm and head; the head is the embedding when tied. Computed in x's type, returned as float32."""
    x = rms_norm(x, jnp.asarray(params["final_norm"]), arch.norm_eps)
    head = params["embed"] if arch.tied else params["head"]
    return jnp.einsum("btd,vd->btv", x, head, precision=_EXACT).astype(jnp.float32)


def logits(
    params: Params, tokens: Int[NumpyOrJax, "B T"], arch: Architecture, linear: Linear = linear
) -> Float[Array, "B T V"]:
    """Float32 logits of every next token; pure, so jit it with `arch` (and `linear`) static."""
    rope = rope_tables(arch, tokens.shape[1])
    x = run_blocks(params["blocks"], embed_tokens(params, tokens), rope, arch, linear)
    return head_logits(params, x, arch)


def _frequencies(arch: Architecture) -> Float[np.ndarray, " pairs"]:
    exponent = np.arange(0, arch.head_dim, 2, dtype=np.float32) / np.float32(arch.head_dim)
    power = (arch.rope_theta ** exponent.astype(np.float64)).astype(np.float32)
    frequency = np.float32(1) / power
    return frequency if arch.rope_scaling is None else _llama3(frequency, dict(arch.rope_scaling))


def _llama3(frequency: Float[np.ndarray, " n"], scaling: dict[str, float]) -> Float[np.ndarray, " n"]:
    """Stretches long wavelengths by `factor`, keeps short ones, interpolates between (Llama 3.1)."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    wavelength = 2 * np.pi / frequency
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * frequency / factor + smooth * frequency
    stretched = np.where(wavelength > context / low, frequency / factor, frequency)
    medium = (wavelength >= context / high) & (wavelength <= context / low)
    return np.where(medium, between, stretched).astype(np.float32)


def _heads(x: Float[Array, "B T width"], arch: Architecture) -> Float[Array, "B T n h"]:
    return x.reshape(*x.shape[:2], -1, arch.head_dim)


def _rotate(x: Float[Array, "B T n h"], rope: Rope) -> Float[Array, "B T n h"]:
    """Entries i and i + h/2 of each head are one rotary pair."""
    cos, sin = (jnp.asarray(table)[None, :, None, :].astype(x.dtype) for table in rope)
    half = x.shape[-1] // 2
    turned = jnp.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    return x * cos + turned * sin
