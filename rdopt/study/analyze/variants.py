"""The networks whose outputs are compared with the original's: one basis each, and what happens to its matrices."""

from collections.abc import Sequence
from typing import NamedTuple

from rdopt.study.analyze.perturb import Perturbation, along_inputs, on_entries, rounded

SHARES = (0.005, 0.05)  # of the entries that are moved
SIZES = {"entries": 0.1, "inputs": 0.1}  # norm of the noise over that of its matrix
SEEDS = 3
PARTS = ("weak", "all", "strong")
ENDS = {"embed": "rounded embed", "head": "rounded head"}  # kinds of networks whose blocks are left as they are


class Variant(NamedTuple):
    """One network to be run beside the original.

    Attributes:
        basis: the coordinates it is perturbed in.
        kind: "folded" (not perturbed), "rounded" (all blocks), one of ENDS, "entries" or "inputs".
        about: what distinguishes it from others of its kind.
        seed: of its noise.
        perturb: of every matrix of every block, or of an end; None for none.
    """

    basis: str
    kind: str
    about: str = ""
    seed: int = 0
    perturb: Perturbation | None = None

    @property
    def of_blocks(self) -> bool:
        """Whether the matrices of the blocks are perturbed."""
        return self.perturb is not None and self.kind not in ENDS.values()

    @property
    def of_stream(self) -> bool:
        """Whether it has a residual stream of its own; a changed head reads that of the folded model."""
        return self.kind != ENDS["head"]


def variants(bases: Sequence[str], bits: Sequence[int], protected: float) -> list[Variant]:
    """All networks of an analysis.

    Args:
        bases: the coordinate systems; noise is added in the first one.
        bits: lengths of codes.
        protected: share of the weights that outlier protection keeps in 16 bits.
    """
    found = [Variant(basis, "folded") for basis in bases]
    for basis in bases:
        for b in bits:
            for kind in ("rounded", *ENDS.values()):
                found += [
                    Variant(basis, kind, f"{b} bits", 0, rounded(b)),
                    Variant(basis, kind, f"{b} bits, protected", 0, rounded(b, protected)),
                ]
    for seed in range(SEEDS):
        for share in SHARES:
            for where in ("largest", "random"):
                noise = on_entries(share, where, SIZES["entries"])
                found.append(Variant(bases[0], "entries", f"{where} {100 * share:g} %", seed, noise))
        found += [
            Variant(bases[0], "inputs", part, seed, along_inputs(part, SIZES["inputs"])) for part in PARTS
        ]
    return found
