"""Perplexity and its standard error over sequences.

A ratio of sums with the delta method's error (Cochran, Sampling Techniques, 1977, ch. 6).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """exp of the mean negative log-likelihood of a token, in nats, and how sure it is."""

    value: float
    stderr: float
    nll: float
    """Mean over scored tokens, nats."""
    nll_stderr: float
    tokens: int


def ratio(sums: Float[np.ndarray, " N"], counts: Int[np.ndarray, " N"]) -> tuple[float, float]:
    """Mean per token of per-sequence sums, and its standard error over sequences (nan for one sequence)."""
    n, tokens = len(sums), int(counts.sum())
    mean = float(sums.sum()) / tokens
    if n < 2:
        return mean, math.nan
    residual = sums - mean * counts
    return mean, math.sqrt(n / (n - 1) * float(residual @ residual)) / tokens


def perplexity(nll: Float[np.ndarray, " N"], counts: Int[np.ndarray, " N"]) -> Perplexity:
    """Perplexity from each sequence's summed NLL (float64, nats) and number of scored tokens."""
    mean, stderr = ratio(nll, counts)
    value = math.exp(min(mean, 700.0))  # a hopeless model must not overflow float64
    return Perplexity(
        value=value, stderr=value * stderr, nll=mean, nll_stderr=stderr, tokens=int(counts.sum())
    )
