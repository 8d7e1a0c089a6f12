"""What a method makes of a model: the decoded weights and their size."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from rdopt.checkpoint.families import Architecture
from rdopt.operator.params import Params

Key = tuple[int, str]
Weights = Float[np.ndarray, "out in"]
Moment = Float[np.ndarray, "in in"]


class DecodedModel(NamedTuple):
    """What a method made of a model.

    Attributes:
        bpw: bits/weight of the coded matrices, file bytes.
        bpw_ideal: with ideal code lengths, as publications count; scales and headers at their real size.
        params: decoded weights, everything else untouched.
        arch: their architecture.
        more: what else a table should keep, JSON values.
    """

    bpw: float
    bpw_ideal: float
    params: Params
    arch: Architecture
    more: Mapping[str, Any] = {}


def with_matrices(params: Params, matrices: Mapping[Key, Float[np.ndarray, "_ _"]]) -> Params:
    """The same model with its coded matrices replaced."""
    names = {name for _, name in matrices}
    layers = 1 + max(layer for layer, _ in matrices)
    stacked = {name: np.stack([matrices[layer, name] for layer in range(layers)]) for name in names}
    return {**params, "blocks": {**params["blocks"], **stacked}}
