"""Cuts a token stream into evaluation windows so that every target is scored once.

The sliding evaluation of Hugging Face's perplexity guide, with the last window moved back instead of padded.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int

from rdopt.config.errors import UserError


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
        raise UserError(
            f"context {context} must be at least 2 and stride {stride} between 1 and the context."
        )
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
