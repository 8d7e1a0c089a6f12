"""Settings of a peer chosen by KL on the selection text: its damping, then each further choice it has, one by one."""

from collections.abc import Callable
from dataclasses import replace

from peers.encode import PeerSettings

DAMPINGS = (1e-2, 3e-2, 1e-1, 3e-1)
CHOICES: dict[str, tuple[tuple[str, tuple[float | str, ...]], ...]] = {
    "rtn": (("rows", ("row", "tensor")),),
    "gptq": (
        ("damping", DAMPINGS),
        ("prefix", ("none", "inputs", "drift")),
        ("rows", ("row", "tensor")),
        ("order", ("given", "activation")),
    ),
    "watersic": (
        ("damping", DAMPINGS),
        ("prefix", ("none", "drift")),
        ("shrink", ("rescaled", "lmmse", "none")),
    ),
}


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
    for name, values in CHOICES[start.method]:
        best = min((best, *(replace(best, **{name: value}) for value in values)), key=cached)
    return best
