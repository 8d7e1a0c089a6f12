"""Perplexity of a token stream, cut into windows so that every target is scored once, and its standard error.

The windows are the sliding ones of Hugging Face's perplexity guide, with the last one moved back instead of padded; a
figure per token is a ratio of sums over sequences with the delta method's error (Cochran, Sampling Techniques, 1977,
ch. 6).
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from rdopt.config.errors import UserError


class Perplexity(NamedTuple):
    """exp of nll, the mean negative log-likelihood of a scored token in nats, and its standard error."""

    value: float
    stderr: float
    nll: float
    tokens: int


def windows(
    tokens: Int[np.ndarray, " n"], context: int, stride: int, max_tokens: int
) -> tuple[Int[np.ndarray, "N context"], Bool[np.ndarray, "N context"]]:
    """Windows of `context` tokens every `stride`, over the first `max_tokens` of the stream.

    A token is a target in the first window that holds it together with the token before it. With
    stride = context the first token of each window has nothing to be predicted from and is no target;
    with a smaller stride every token but the very first is a target exactly once. The last window
    is moved back to end with the stream.

    Returns:
        inputs, int32, and scored: True where inputs[i, t] is a target, predicted from inputs[i, :t].

    Raises:
        UserError: fewer tokens than one window, or a stride outside 1 .. context.
    """
    used = np.asarray(tokens)[:max_tokens]
    if context < 2 or not 1 <= stride <= context:
        raise UserError(f"context {context} must be at least 2 and stride {stride} between 1 and the context.")
    if len(used) < context:
        raise UserError(
            f"Evaluation has {len(used)} tokens but one window needs {context}; give more text, raise "
            "evaluate.max_tokens or lower evaluate.context."
        )
    starts = np.arange(0, len(used) - context + 1, stride)
    if starts[-1] + context < len(used):
        starts = np.append(starts, len(used) - context)
    position = starts[:, None] + np.arange(context)[None, :]
    seen = np.concatenate([[0], starts[:-1] + context])
    scored = (position >= seen[:, None]) & (np.arange(context) > 0)[None, :]
    keep = scored.any(axis=1)
    return used[position[keep]].astype(np.int32), scored[keep]


def per_token(sums: Float[np.ndarray, " N"], counts: Int[np.ndarray, " N"]) -> tuple[float, float]:
    """Mean per token of per-sequence sums, and its standard error over sequences (nan for one sequence)."""
    n, tokens = len(sums), int(counts.sum())
    mean = float(sums.sum()) / tokens
    if n < 2:
        return mean, math.nan
    residual = sums - mean * counts
    return mean, math.sqrt(n / (n - 1) * float(residual @ residual)) / tokens


def perplexity(nll: Float[np.ndarray, " N"], counts: Int[np.ndarray, " N"]) -> Perplexity:
    """Perplexity from each sequence's summed NLL (float64, nats) and number of scored tokens."""
    mean, stderr = per_token(nll, counts)
    value = math.exp(min(mean, 700.0))  # a hopeless model must not overflow float64
    return Perplexity(value, value * stderr, mean, int(counts.sum()))
