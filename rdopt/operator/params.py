"""Checkpoint tensors as one pytree, blocks stacked on a leading layer axis so that lax.scan runs over them.

{"embed": (V, d), "blocks": {short: (L, ...)}, "final_norm": (d,), "head": (V, d) unless tied}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float

from rdopt.checkpoint.families import EMBED, FINAL_NORM, HEAD, Architecture, block_shapes
from rdopt.checkpoint.folder import Checkpoint
from rdopt.config.errors import UserError

Params = dict[str, Any]


@dataclass(frozen=True)
class PerBlock(Sequence[Float[np.ndarray, "..."]]):
    """One array of every block, each made when it is indexed: stands where a stack would lie in memory."""

    layers: int
    read: Callable[[int], Float[np.ndarray, ...]]

    def __len__(self) -> int:
        return self.layers

    def __getitem__(self, layer: Any) -> Any:
        return self.read(range(self.layers)[layer])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all blocks stacked."""
        return (self.layers, *self[0].shape)


def lazy_params(checkpoint: Checkpoint) -> Params:
    """A checkpoint's weights, float32, with those of the blocks left in the file until they are indexed.

    Raises:
        UserError: a tensor is missing, truncated or not finite, or a tied head differs from the embedding.
    """
    arch = checkpoint.arch

    def tensor(short: str, layer: int) -> Float[np.ndarray, ...]:
        return checkpoint.tensor(arch.tensor_name(layer, short))

    params: Params = {
        "embed": checkpoint.tensor(EMBED),
        "blocks": {short: PerBlock(arch.num_layers, partial(tensor, short)) for short in block_shapes(arch)},
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


def load_params(checkpoint: Checkpoint) -> Params:
    """Every weight of a checkpoint as float32 numpy arrays.

    Raises:
        UserError: see `lazy_params`.
    """
    return stacked(lazy_params(checkpoint))


def stacked(params: Mapping[str, Any]) -> Params:
    """All weights in memory at once, for what runs the whole network in one program."""
    return {**params, "blocks": {short: _stack(held) for short, held in params["blocks"].items()}}


def read_block(params: Mapping[str, Any], layer: int) -> dict[str, Float[np.ndarray, ...]]:
    """The parameters of one block by short name."""
    return {short: np.asarray(held[layer]) for short, held in params["blocks"].items()}


def map_params(change: Callable[[np.ndarray], np.ndarray], params: Mapping[str, Any]) -> Params:
    """The model with every array changed, those of the blocks when they are indexed."""

    def view(held: Any) -> PerBlock:
        return PerBlock(len(held), lambda layer: change(held[layer]))

    ends = {k: change(x) for k, x in params.items() if k != "blocks"}
    return {**ends, "blocks": {short: view(held) for short, held in params["blocks"].items()}}


def _stack(held: Any) -> Float[np.ndarray, "L ..."]:
    if not isinstance(held, PerBlock):
        return np.asarray(held)
    first = np.asarray(held[0])
    stack = np.empty((len(held), *first.shape), first.dtype)
    stack[0] = first
    for layer in range(1, len(held)):
        stack[layer] = held[layer]
    return stack


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
