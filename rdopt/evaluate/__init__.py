"""Room evaluate: perplexity and KL divergence of a candidate against its original, with their errors."""

from rdopt.evaluate.divergence import (
    Comparison,
    Reference,
    as_eval_json,
    compare,
    noise_floor_bf16,
)
from rdopt.evaluate.perplexity import Perplexity, perplexity
from rdopt.evaluate.windows import windows

__all__ = [
    "Comparison",
    "Perplexity",
    "Reference",
    "as_eval_json",
    "compare",
    "noise_floor_bf16",
    "perplexity",
    "windows",
]
