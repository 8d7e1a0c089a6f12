"""The settings of a peer: as published, and chosen by KL on the selection text.

Tuning takes the damping, then each further choice that a method has, one by one.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from peers.gptq import ColumnOrder, StepScope
from peers.peer_file import AllowedTables
from peers.watersic import GainRule

_DAMPINGS = (1e-2, 3e-2, 1e-1, 3e-1)
TUNED_CHOICES: dict[str, tuple[tuple[str, tuple[float | str, ...]], ...]] = {
    "rtn": (("rows", ("row", "tensor")),),
    "gptq": (
        ("damping", _DAMPINGS),
        ("prefix", ("none", "inputs", "drift")),
        ("rows", ("row", "tensor")),
        ("order", ("given", "activation")),
    ),
    "watersic": (
        ("damping", _DAMPINGS),
        ("prefix", ("none", "drift")),
        ("shrink", ("rescaled", "lmmse", "none")),
    ),
}


@dataclass(frozen=True, kw_only=True)
class PeerSettings:
    """One peer method and its settings."""

    method: Literal["rtn", "gptq", "watersic"]
    damping: float = 0.0
    """Share of the mean diagonal added to the second moments (RTN reads none)."""
    rows: StepScope = "row"
    """RTN, GPTQ: steps follow the rms of the row or of the matrix."""
    order: ColumnOrder = "given"
    """GPTQ: order of the columns."""
    shrink: GainRule = "rescaled"
    """WaterSIC: which gains."""
    prefix: Literal["none", "inputs", "drift"] = "none"
    """Quantize block by block with the inputs of the model quantized so far, or aim at what the original gives too."""
    tables: AllowedTables = "any"
    """Entropy coding."""
    steps: Literal["published", "sensitivity"] = "published"
    """Whose allocation across matrices."""


def tune(start: PeerSettings, loss: Callable[[PeerSettings], float]) -> PeerSettings:
    """The settings that coordinate search finds, from the published ones.

    Args:
        start: published settings.
        loss: KL on the selection text at one size of the file; called once for each settings that differ.
    """
    known: dict[PeerSettings, float] = {}

    def cached(settings: PeerSettings) -> float:
        if settings not in known:
            known[settings] = loss(settings)
        return known[settings]

    best = start
    for name, values in TUNED_CHOICES[start.method]:
        best = min((best, *(replace(best, **{name: value}) for value in values)), key=cached)
    return best
