"""What a peer gets and gives: a model in some coordinates, the settings of a method, and the decoded model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from peers.gptq import Order
from peers.peer_file import Tables
from peers.rtn import Rows
from peers.watersic import Shrink
from rdopt.calibration.moments import Moments
from rdopt.checkpoint.families import Architecture
from rdopt.operator.params import Params

Key = tuple[int, str]
Weights = Float[np.ndarray, "out in"]
Moment = Float[np.ndarray, "in in"]
Matrices = Mapping[str, Float[np.ndarray, "_ _"]]  # of unlike shapes


@dataclass(frozen=True, kw_only=True)
class PeerSettings:
    """One peer method and its settings."""

    method: Literal["rtn", "gptq", "watersic"]
    damping: float = 0.0
    """Share of the mean diagonal added to the second moments (RTN reads none)."""
    rows: Rows = "row"
    """RTN, GPTQ: steps follow the rms of the row or of the matrix."""
    order: Order = "given"
    """GPTQ: order of the columns."""
    shrink: Shrink = "rescaled"
    """WaterSIC: which gains."""
    prefix: Literal["none", "inputs", "drift"] = "none"
    """Quantize block by block with the inputs of the model quantized so far, or aim at what the original gives too."""
    tables: Tables = "any"
    """Entropy coding."""
    steps: Literal["published", "sensitivity"] = "published"
    """Whose allocation across matrices."""


class Model(NamedTuple):
    """Weights in some coordinates, the second moments there, and the calibration sequences of a quantized prefix."""

    params: Params
    arch: Architecture
    moments: Moments
    tokens: Int[np.ndarray, "n length"]


class Coded(NamedTuple):
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
