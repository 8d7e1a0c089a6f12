"""The objective over all blocks at once, for tests that look at it without a training run."""

import jax
import jax.numpy as jnp
import numpy as np

from rdopt.align.feed import Streams
from rdopt.align.objective import Text, rate_and_distortion


def read(problem, settings, tokens):
    """(all blocks stacked, what the distortion reads of the original on the tokens)."""
    layers = range(settings.arch.num_layers)
    if settings.distortion == "matrix":
        return problem.some(layers), Text()
    streams = Streams(problem, np.asarray(tokens), settings, len(tokens))
    text = Text(jnp.asarray(streams.read(layers, np.arange(len(tokens)))), problem.ends)
    return problem.some(layers), text


def terms(variables, problem, tokens, lam, settings):
    """R and D of the whole model."""
    run = jax.jit(rate_and_distortion, static_argnames="settings")
    blocks, text = read(problem, settings, tokens)
    keys = jax.random.split(jax.random.key(0), settings.arch.num_layers)
    return run(variables, blocks, text, jnp.float32(lam), keys, settings=settings)
