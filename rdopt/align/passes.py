"""Passes over all blocks of a model, one at a time: the figures that starts, results and stored rotations go by."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rdopt.align.objective import (
    BlockProblem,
    Own,
    RateDistortion,
    Settings,
    Variables,
    block_distortion,
    block_terms,
    own_of,
    predicted_kl,
    with_errors,
)
from rdopt.align.problem import Problem
from rdopt.checkpoint.families import MATRICES
from rdopt.evaluate.divergence import SLICE_BYTES
from rdopt.operator.blockwise import padded_batches
from rdopt.operator.llama import block, rope_tables
from rdopt.rate.steps import base_step

OfMatrices = dict[str, Float[np.ndarray, " layers"]]


@partial(jax.jit, static_argnames="settings")
def block_matrix_terms(own: Own, block: BlockProblem, lam: Float[Array, ""], settings: Settings) -> RateDistortion:
    """Bits and D in nats/token of every matrix of a block by the analytic rate, without the bits of angles."""
    static, c = replace(settings, rate="analytic", distortion="matrix"), base_step(lam, settings.weights)
    return block_terms(own, block, jax.random.key(0), 0.0, c, static)[0]


def matrix_terms(
    variables: Variables, problem: Problem, lam: float | Float[Array, ""], settings: Settings
) -> tuple[OfMatrices, OfMatrices]:
    """(bits, D in nats/token) of every matrix by the analytic rate, without the bits of angles; float32."""
    terms = [block_matrix_terms(own, each, jnp.float32(lam), settings) for own, each in _owned(variables, problem)]
    rate, distortion = ({k: np.array([getattr(x, kind)[k] for x in terms]) for k in MATRICES}
                        for kind in ("rate", "distortion"))
    return rate, distortion


def judged_terms(
    variables: Variables,
    problem: Problem,
    tokens: Int[np.ndarray, "batch length"],
    lam: float | Float[Array, ""],
    key: Array,
    settings: Settings,
) -> tuple[RateDistortion, float]:
    """What a finished run is judged by: R and D of the blocks' outputs, and KL of the model whose weights are relaxed.

    The arguments are those of `rate_and_distortion`; of the settings neither distortion nor activations are read.
    """
    arch, params = settings.arch, problem.plain.subject.params
    clean = noisy = np.asarray(params["embed"])[tokens]
    bits = D = 0.0
    for (own, each), own_key in zip(_owned(variables, problem), jax.random.split(key, arch.num_layers), strict=True):
        c = base_step(jnp.float32(lam), settings.weights)
        clean, noisy, terms = _judged_block(own, each, own_key, clean, noisy, c, settings)
        bits, D = bits + float(terms.rate), D + float(terms.distortion)
    ends = problem.ends
    size = max(1, SLICE_BYTES // (4 * arch.vocab_size))
    slices = (padded_batches(np.asarray(x).reshape(-1, arch.hidden_size), size) for x in (clean, noisy))
    parts = [np.asarray(_predicted_kl(ends, *each, arch)) for each in zip(*slices, strict=True)]
    kl = np.concatenate(parts)[: tokens.size].mean(dtype=np.float64)
    return RateDistortion((bits + float(variables.angle_bits)) / settings.weights, D), float(kl)


_predicted_kl = jax.jit(predicted_kl, static_argnames="arch")


@partial(jax.jit, static_argnames="settings")
def _judged_block(
    own: Own, problem: BlockProblem, key: Array, clean: Array, noisy: Array, c: Array, settings: Settings
) -> tuple[Array, Array, RateDistortion]:
    """(stream of the original, of the relaxed model, bits and D of the block's output)."""
    arch, p, rope = settings.arch, problem.params, rope_tables(settings.arch, clean.shape[1])
    terms, errors = block_terms(own, problem, key, 0.0, c, replace(settings, distortion="model"))
    relaxed = with_errors(errors, p)
    behind = block(p, clean, rope, arch)
    D = block_distortion(block(relaxed, clean, rope, arch) - behind, problem.G["down"])
    return behind, block(relaxed, noisy, rope, arch), RateDistortion(sum(terms.rate.values()), D)


def _owned(variables: Variables, problem: Problem) -> Iterator[tuple[Own, BlockProblem]]:
    """What belongs to every block, and the block, in order."""
    owned = own_of(variables, problem.plain.arch)
    for layer, each in enumerate(problem.blocks()):
        own = _picked(owned, layer)
        yield own._replace(gauges=own.gauges.with_shared(variables.gauges)), each


_picked = jax.jit(lambda own, layer: jax.tree.map(lambda x: x[layer], own))
