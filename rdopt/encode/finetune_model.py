"""The student of finetuning: a decoded model whose gains, norms and biases move while its codes stay.

Gains act on activations, y = U (a * (W (b * V^T x))), so that no gradient of the size of a matrix is formed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rdopt.checkpoint.families import INPUT_OF, MATRICES, Architecture
from rdopt.codec.streams.fixed_point import undo_stored
from rdopt.codec.streams.gains import Gains
from rdopt.codec.streams.uncoded import sixteen_bit
from rdopt.encode.quantize import matrix_shapes
from rdopt.evaluate.divergence import token_kl
from rdopt.operator.llama import embed_tokens, head_logits, linear, rope_tables, run_blocks
from rdopt.operator.params import Params
from rdopt.transforms.stored.rotation import Rotation
from rdopt.transforms.stored.rotations import StoredRotations

FINAL_NORM = "final_norm"
# kind ("rows", "cols", "norms", "biases") -> parameter -> (layers, n): log2 gains, and biases as they are;
# the final norm has no layer axis.
Trained = dict[str, dict[str, Any]]


def starting_point(params: Params, arch: Architecture, gains: Gains | None) -> Trained:
    """No change: the given log2 gains or zeros, norms scaled by 2^0, biases as they are."""
    blocks, shapes = params["blocks"], matrix_shapes(arch)

    def logs(part: str, axis: int, name: str) -> Float[np.ndarray, "layers n"]:
        held = {} if gains is None else getattr(gains, part)
        per_octave = 1 if gains is None else gains.precision
        none = np.zeros(shapes[0, name][axis])
        rows = [held.get((i, name), none) / per_octave for i in range(arch.num_layers)]
        return np.stack(rows).astype(np.float32)

    norms = {k: np.zeros_like(v) for k, v in blocks.items() if k.endswith("_norm")}
    return {
        "rows": {name: logs("rows", 0, name) for name in MATRICES},
        "cols": {name: logs("cols", 1, name) for name in MATRICES},
        "norms": {**norms, FINAL_NORM: np.zeros_like(params[FINAL_NORM])},
        "biases": {k: np.array(v) for k, v in blocks.items() if k.endswith("_bias")},
    }


def with_turns(params: Params, arch: Architecture, stored: StoredRotations | None) -> Params:
    """The model with its stored rotations, dense, beside the weights, for `gained_linear`."""
    if stored is None:
        return params
    blocks = dict(params["blocks"])
    for name, (m, n) in {name: shape for (_, name), shape in matrix_shapes(arch).items()}.items():
        sides = [stored.sides(i, name, (m, n)) for i in range(arch.num_layers)]
        blocks[f"{INPUT_OF[name]}_turn"] = _dense([s.inputs for s in sides], n)
        blocks[f"{name}_turned"] = _dense([s.outputs for s in sides], m)
    return {**params, "blocks": blocks}


def _dense(turns: Sequence[Rotation | None], n: int) -> Float[np.ndarray, "layers n n"]:
    eye = np.eye(n)
    return np.stack([eye if turn is None else turn.apply(eye) for turn in turns]).astype(np.float32)


def student(params: Params, trained: Mapping[str, Mapping[str, Any]]) -> Params:
    """The model whose forward pass through `gained_linear` has the trained values."""
    blocks = dict(params["blocks"]) | dict(trained["biases"])
    for name, shift in trained["norms"].items():
        if name != FINAL_NORM:
            blocks[name] = blocks[name] * jnp.exp2(shift)
    for part in ("rows", "cols"):
        blocks |= {f"{name}_{part}": logs for name, logs in trained[part].items()}
    return {
        **params,
        "blocks": blocks,
        FINAL_NORM: params[FINAL_NORM] * jnp.exp2(trained["norms"][FINAL_NORM]),
    }


def gained_linear(name: str, p: Mapping[str, Any], x: Float[Array | np.ndarray, "B T in"]) -> Float[Array, "B T out"]:
    """U (a * (W (b * V^T x))) plus the bias; V and U only in blocks of `with_turns`."""
    V, U = p.get(f"{INPUT_OF[name]}_turn"), p.get(f"{name}_turned")
    x = x if V is None else jnp.matmul(x, V, precision="highest")
    y = linear(name, {name: p[name]}, x * jnp.exp2(p[f"{name}_cols"])[None, None, :])
    y = y * jnp.exp2(p[f"{name}_rows"])[None, None, :]
    y = y if U is None else jnp.matmul(y, U.T, precision="highest")
    bias = p.get(f"{name}_bias")
    return y if bias is None else y + bias[None, None, :]


def divergence(
    teacher: Params,
    teacher_arch: Architecture,
    params: Params,
    arch: Architecture,
    tokens: Int[Array, "batch length"],
) -> Float[Array, ""]:
    """Mean KL(teacher || student) over all positions, nats/token; logits of one sequence at a time."""
    rope = rope_tables(arch, tokens.shape[1])
    true = run_blocks(teacher["blocks"], embed_tokens(teacher, tokens), rope, teacher_arch)
    ours = run_blocks(params["blocks"], embed_tokens(params, tokens), rope, arch, gained_linear)

    @jax.checkpoint
    def one(states: tuple[Array, Array]) -> Float[Array, ""]:
        logp = jax.nn.log_softmax(head_logits(teacher, states[0][None], teacher_arch))
        logq = jax.nn.log_softmax(head_logits(params, states[1][None], arch))
        return jnp.mean(token_kl(logp, logq))

    return jnp.mean(jax.lax.map(one, (jax.lax.stop_gradient(true), ours)))


def log_gains(trained: Trained, part: str) -> dict[tuple[int, str], Float[np.ndarray, " n"]]:
    """(layer, matrix) -> float log2 gains of "rows" or "cols"; matrices whose gains are all one are left out."""
    return {
        (i, name): logs.astype(np.float64)
        for name, of_layers in trained[part].items()
        for i, logs in enumerate(np.asarray(of_layers))
        if np.any(logs)
    }


def kept(params: Params, trained: Trained) -> Params:
    """The decoded model with the trained norms and biases, as a file keeps them."""
    blocks = dict(params["blocks"])
    for name, value in trained["biases"].items():
        blocks[name] = np.stack([sixteen_bit(x) for x in np.asarray(value)])
    for name, shift in trained["norms"].items():
        if name != FINAL_NORM:
            scaled = np.asarray(blocks[name]) * np.exp2(np.asarray(shift, np.float64))
            blocks[name] = np.stack([sixteen_bit(x) for x in scaled])
    final = np.asarray(params[FINAL_NORM]) * np.exp2(np.asarray(trained["norms"][FINAL_NORM], np.float64))
    return {**params, "blocks": blocks, FINAL_NORM: sixteen_bit(final)}


def merged(params: Params, gains: Gains | None, stored: StoredRotations | None) -> Params:
    """The model that a decoder makes: gains applied, stored rotations undone."""
    blocks = dict(params["blocks"])
    for name in MATRICES:
        layers = []
        for i, W in enumerate(np.asarray(params["blocks"][name])):
            W = W if gains is None else gains.apply((i, name), W)
            layers.append(W if stored is None else undo_stored(stored, i, name, INPUT_OF[name], W))
        blocks[name] = np.stack(layers)
    return {**params, "blocks": blocks}

