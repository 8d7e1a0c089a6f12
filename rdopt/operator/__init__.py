"""Room operator: the Llama family in JAX, one block or the whole model, with a hook at every matrix."""

from rdopt.operator.llama import (
    Linear,
    attend,
    block,
    embed_tokens,
    gated,
    head_logits,
    linear,
    logits,
    rms_norm,
    rope_tables,
    run_blocks,
)
from rdopt.operator.params import Params, load_params, params_from_tensors, params_to_tensors

__all__ = [
    "Linear",
    "Params",
    "attend",
    "block",
    "embed_tokens",
    "gated",
    "head_logits",
    "linear",
    "load_params",
    "logits",
    "params_from_tensors",
    "params_to_tensors",
    "rms_norm",
    "rope_tables",
    "run_blocks",
]
