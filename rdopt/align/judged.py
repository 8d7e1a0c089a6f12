"""What a finished run is judged by: R, D of the blocks' outputs, and KL of the whole model, in one program."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rdopt.align.objective import (
    Problem,
    RateDistortion,
    Settings,
    Variables,
    block_distortion,
    block_terms,
    layers_of,
    model_divergence,
    with_errors,
)
from rdopt.operator.llama import block, embed_tokens, rope_tables
from rdopt.rate.steps import base_step


@partial(jax.jit, static_argnames="settings")
def judged_terms(
    variables: Variables, problem: Problem, tokens: Int[Array, "batch length"], lam: Float[Array, ""], key: Array,
    settings: Settings,
) -> tuple[RateDistortion, Float[Array, ""]]:
    """(R and D of the blocks' outputs, KL of the model whose weights are all relaxed), float32, in one program.

    The arguments are those of `rate_and_distortion`; of the settings neither distortion nor activations are read.
    """
    arch, static = settings.arch, replace(settings, distortion="model")
    c, rope = base_step(lam, settings.weights), rope_tables(arch, tokens.shape[1])

    def body(carry: tuple[Array, Array], layer: Any) -> tuple[tuple[Array, Array], RateDistortion]:
        terms, errors = block_terms(layer, variables, c, static)
        noisy = with_errors(errors, layer.params)
        clean = block(layer.params, carry[0], rope, arch)
        D = block_distortion(block(noisy, carry[0], rope, arch) - clean, layer.G["down"])
        return (clean, block(noisy, carry[1], rope, arch)), RateDistortion(sum(terms.rate.values()), D)

    x = embed_tokens(problem.params, tokens)
    end, terms = jax.lax.scan(body, (x, x), layers_of(variables, problem, key, arch))
    rate = (jnp.sum(terms.rate) + variables.angle_bits) / settings.weights
    return RateDistortion(rate, jnp.sum(terms.distortion)), model_divergence(problem.params, *end, arch)
