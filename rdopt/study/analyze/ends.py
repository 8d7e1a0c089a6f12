"""The embedding and the head in one basis: their figures, and what rounding them costs.

Both are (vocab, d), and an error E of either costs D = 1/2 sum_v w_v e_v M e_v^T: in the embedding w is how often a
token is read and M the moment of the gradients there, in the head w_v is the Fisher information of a logit and M the
moment of what the head reads (`rdopt.calibration.EmbeddingMoments`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from rdopt.calibration.moments import EmbeddingMoments
from rdopt.checkpoint.families import EMBED, HEAD
from rdopt.operator.params import Params
from rdopt.study.analyze.figures import concentration, singular_energies
from rdopt.study.analyze.perturb import Around, Inputs
from rdopt.study.analyze.rows import Cost, Row, cost_of, note_error, row_of
from rdopt.study.analyze.variants import ENDS, Variant
from rdopt.transforms.gauges.gauges import Gauges, fold_end_moments, fold_ends


class End(NamedTuple):
    """One of the two.

    Attributes:
        kind: "embed" or "head".
        W: its weights, float32.
        tokens: w, what an error in a token's row counts.
        moment: M, what an error along the channels counts.
    """

    kind: str
    W: Float[np.ndarray, "vocab d"]
    tokens: Float[np.ndarray, " vocab"]
    moment: Float[np.ndarray, "d d"]

    def cost(self, E: Float[np.ndarray, "vocab d"]) -> Cost:
        """Of an error. The output of an embedding is a row as it is, and D knows how often it is read."""
        found = cost_of(E, self.moment, self.tokens)
        return found if self.kind == "head" else found._replace(output=float(self.tokens @ np.sum(E * E, axis=1)))


class Ends(NamedTuple):
    """Both, and the norm before the head."""

    embed: End
    head: End
    final_norm: Float[np.ndarray, " d"]


def ends_in(params: Params, gauges: Gauges, moments: EmbeddingMoments) -> Ends:
    """The ends of a model in other coordinates, from those of the original and their moments."""
    folded = fold_ends(params, gauges)
    frequency, G, fisher, S = (np.asarray(x, np.float32) for x in fold_end_moments(moments, params, gauges))
    embed, head = End("embed", folded["embed"], frequency, G), End("head", folded["head"], fisher, S)
    return Ends(embed, head, folded["final_norm"])


def end_rows(ends: Ends, basis: str, variants: Sequence[Variant]) -> list[Row]:
    """The rows of both in one basis, with the cost of every rounding of the variants.

    "inputs" of their sensitivity are the channels and "outputs" the tokens, as columns and rows are.
    """
    found = []
    for end in (ends.embed, ends.head):
        about = {"name": EMBED if end.kind == "embed" else HEAD, "layer": None, "kind": end.kind, "basis": basis}
        row = row_of(end.W, about, np.diagonal(end.moment), end.tokens)
        row["singular"] = concentration(singular_energies(end.W))
        whole = end.cost(end.W)
        for variant in variants:
            if variant.basis == basis and variant.kind == ENDS[end.kind]:
                note_error(row, variant.about, end.cost(changed_end(end, variant) - end.W), whole)
        found.append(row)
    return found


def changed_end(end: End, variant: Variant) -> Float[np.ndarray, "vocab d"]:
    """The weights of an end in a variant, float32."""
    if variant.perturb is None or variant.kind != ENDS[end.kind]:
        return end.W
    return variant.perturb(Around(end.W, Inputs(end.moment), (variant.seed,)))
