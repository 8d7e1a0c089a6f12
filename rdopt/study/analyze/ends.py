"""The embedding and the head in one basis: their figures, and what rounding them costs.

Both are (vocab, d), and an error E of either costs D = 1/2 sum_v w_v e_v M e_v^T: in the embedding w is how often a
token is read and M the moment of the gradients there, in the head w_v is the Fisher information of a logit and M the
moment of what the head reads (`rdopt.calibration.moments.EmbeddingMoments`).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from rdopt.calibration.moments import EmbeddingMoments
from rdopt.checkpoint.families import EMBED, HEAD
from rdopt.operator.params import Params
from rdopt.study.analyze.figures import ErrorCost, Row, error_cost, note_error, row_of, singular_concentration
from rdopt.study.analyze.networks import Inputs, Network, Rounding
from rdopt.transforms.gauges.coordinates import Gauges
from rdopt.transforms.gauges.fold import fold_end_moments, fold_ends


class End(NamedTuple):
    """One of the two.

    Attributes:
        kind: which.
        W: its weights, float32.
        tokens: w, what an error in a token's row counts.
        moment: M, what an error along the channels counts.
    """

    kind: Literal["embed", "head"]
    W: Float[np.ndarray, "vocab d"]
    tokens: Float[np.ndarray, " vocab"]
    moment: Float[np.ndarray, "d d"]

    def cost(self, E: Float[np.ndarray, "vocab d"]) -> ErrorCost:
        """Of an error. The output of an embedding is a row as it is, and D knows how often it is read."""
        cost = error_cost(E, self.moment, self.tokens)
        return cost if self.kind == "head" else cost._replace(output=float(self.tokens @ np.sum(E * E, axis=1)))

    def changed(self, network: Network) -> Float[np.ndarray, "vocab d"]:
        """Its weights in a network, float32; the same array where the network leaves it as it is."""
        if network.change is None or network.part != self.kind:
            return self.W
        return network.change.apply(self.W, Inputs(self.moment), (network.seed,))


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


def end_rows(ends: Ends, basis: str, networks: Sequence[Network]) -> list[Row]:
    """The rows of both in one basis, with the cost of every rounding of the networks.

    "inputs" of their sensitivity are the channels and "outputs" the tokens, as columns and rows are.
    """
    rows = []
    for end in (ends.embed, ends.head):
        place = {"name": EMBED if end.kind == "embed" else HEAD, "layer": None, "kind": end.kind, "basis": basis}
        singular = singular_concentration(end.W)
        row = row_of(end.W, place, np.diagonal(end.moment), end.tokens, singular)
        whole = end.cost(end.W)
        for network in networks:
            if network.basis == basis and network.part == end.kind and isinstance(network.change, Rounding):
                note_error(row, network.change, end.cost(end.changed(network) - end.W), whole)
        rows.append(row)
    return rows
