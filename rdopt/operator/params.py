"""Checkpoint tensors as one pytree, blocks stacked on a leading layer axis so that lax.scan runs over them.

{"embed": (V, d), "blocks": {short: (L, ...)}, "final_norm": (d,), "head": (V, d) unless tied}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from rdopt.checkpoint.families import EMBED, FINAL_NORM, HEAD, Architecture, block_shapes
from rdopt.checkpoint.folder import Checkpoint
from rdopt.config.errors import UserError

Params = dict[str, Any]


def load_params(checkpoint: Checkpoint) -> Params:
    """Every weight of a checkpoint as float32 numpy arrays.

    Raises:
        UserError: a tensor is missing, truncated or not finite, or a tied head differs from the embedding.
    """
    arch = checkpoint.arch
    params: Params = {
        "embed": checkpoint.tensor(EMBED),
        "blocks": {short: _stacked(checkpoint, short, shape) for short, shape in block_shapes(arch).items()},
        "final_norm": checkpoint.tensor(FINAL_NORM),
    }
    if not arch.tied:
        params["head"] = checkpoint.tensor(HEAD)
    elif HEAD in checkpoint.entries and not np.array_equal(checkpoint.tensor(HEAD), params["embed"]):
        raise UserError(
            f"{checkpoint.folder} holds a {HEAD} that differs from {EMBED} although config.json ties them; "
            "set tie_word_embeddings to false in config.json or remove the tensor."
        )
    return params


def params_from_tensors(tensors: Mapping[str, Float[np.ndarray, " ..."]], arch: Architecture) -> Params:
    """The pytree of tensors held by their checkpoint names (inverse of `params_to_tensors`)."""
    blocks = {}
    for short in block_shapes(arch):
        blocks[short] = np.stack([tensors[arch.tensor_name(i, short)] for i in range(arch.num_layers)])
    params: Params = {
        "embed": tensors[EMBED],
        "blocks": blocks,
        "final_norm": tensors[FINAL_NORM],
    }
    return params if arch.tied else params | {"head": tensors[HEAD]}


def params_to_tensors(params: Params, arch: Architecture) -> Iterator[tuple[str, Float[np.ndarray, " ..."]]]:
    """(checkpoint name, array) pairs, one at a time, in the order of `expected_tensors`."""
    yield EMBED, np.asarray(params["embed"])
    for layer in range(arch.num_layers):
        for short in block_shapes(arch):
            yield arch.tensor_name(layer, short), np.asarray(params["blocks"][short][layer])
    yield FINAL_NORM, np.asarray(params["final_norm"])
    if not arch.tied:
        yield HEAD, np.asarray(params["head"])


def _stacked(checkpoint: Checkpoint, short: str, shape: tuple[int, ...]) -> Float[np.ndarray, "L ..."]:
    layers = checkpoint.arch.num_layers
    stacked = np.empty((layers, *shape), np.float32)
    for layer in range(layers):
        stacked[layer] = checkpoint.tensor(checkpoint.arch.tensor_name(layer, short))
    return stacked
