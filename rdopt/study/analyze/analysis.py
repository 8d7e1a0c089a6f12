"""What an analysis holds: a row of figures for every matrix in every basis, the KL of every network, and judgements."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from rdopt.study.analyze.figures import energy_concentration, matrix_figures
from rdopt.study.analyze.networks import Network, Rounding
from rdopt.study.predictions import Judgement

# One matrix in one basis: the JSON values of `row_of`. A row's layer is None for the embedding and the head.
Row = dict[str, Any]


class Analysis(NamedTuple):
    """One model in several coordinate systems.

    Attributes:
        model: its name.
        text: what it was measured on, in words.
        tokens: how many were scored.
        rows: of all matrices in all bases.
        kl: mean KL(original || network) of every network, nats/token.
        judgements: the predictions with what was found.
    """

    model: str
    text: str
    tokens: int
    rows: Sequence[Row]
    kl: Mapping[Network, float]
    judgements: Sequence[Judgement]

    def rows_of(self, part: str, basis: str | None = None) -> list[Row]:
        """The rows of the "blocks", of "embed" or of "head", in one basis or in all of them."""
        own = (row for row in self.rows if part == ("blocks" if row["layer"] is not None else row["kind"]))
        return [row for row in own if basis in (None, row["basis"])]

    @property
    def bases(self) -> list[str]:
        """The coordinate systems in their order."""
        return list(dict.fromkeys(row["basis"] for row in self.rows_of("blocks")))

    @property
    def roundings(self) -> list[Rounding]:
        """How the blocks were rounded, in order."""
        changes = dict.fromkeys(network.change for network in self.kl)
        return [change for change in changes if isinstance(change, Rounding) and change.part == "blocks"]

    def to_json(self) -> dict[str, Any]:
        """What analysis.json holds."""
        return {
            "model": self.model,
            "text": self.text,
            "tokens": self.tokens,
            "tensors": self.rows,
            "networks": [
                {
                    "basis": network.basis,
                    "kind": "folded" if network.change is None else network.change.kind,
                    "about": "" if network.change is None else network.change.label,
                    "seed": network.seed,
                    "kl": kl,
                }
                for network, kl in self.kl.items()
            ],
            "predictions": [judgement.to_json() for judgement in self.judgements],
        }


def row_of(
    W: Float[np.ndarray, "out in"],
    place: Mapping[str, Any],
    inputs: Float[np.ndarray, " in"],
    outputs: Float[np.ndarray, " out"],
    singular: Mapping[str, float],
) -> Row:
    """The figures of a matrix; `note_error` adds to them.

    Args:
        W: in the basis.
        place: name, layer, kind and basis.
        inputs: power that comes in along each column, the diagonal of sigma.
        outputs: power of the gradient at each row, the diagonal of G.
        singular: concentration of its energy over singular directions.
    """
    inputs, outputs = np.maximum(inputs, 0), np.maximum(outputs, 0)
    return {
        **place,
        "shape": list(W.shape),
        **matrix_figures(W),
        "inputs": energy_concentration(inputs),
        "outputs": energy_concentration(outputs),
        "curvature": curvature_rank(W, outputs, inputs),
        "output_error": {},
        "kl_estimated": {},
        "singular": singular,
    }


class ErrorCost(NamedTuple):
    """What an error of a matrix does.

    Attributes:
        output: mean squared error of its output, tr(E sigma E^T).
        kl: estimate of KL(original || changed), 1/2 tr(G E sigma E^T), nats/token.
    """

    output: float
    kl: float


def error_cost(
    E: Float[np.ndarray, "out in"], sigma: Float[np.ndarray, "in in"], G: Float[np.ndarray, "..."]
) -> ErrorCost:
    """The cost of an error E, sigma the second moment of the inputs, G that of the gradients or its diagonal."""
    reached = E @ sigma
    pulled = E * G[:, None] if G.ndim == 1 else G @ E
    return ErrorCost(float(np.vdot(reached, E)), 0.5 * float(np.vdot(reached, pulled)))


def note_error(row: Row, rounding: Rounding, error: ErrorCost, whole: ErrorCost) -> None:
    """Adds what a rounding of the matrix costs to its row; `whole` is what its loss would cost."""
    row["output_error"][rounding.label] = error.output / whole.output
    row["kl_estimated"][rounding.label] = error.kl


def curvature_rank(
    W: Float[np.ndarray, "out in"], G: Float[np.ndarray, " out"], power: Float[np.ndarray, " in"], sample: int = 100_000
) -> float:
    """Spearman's correlation of |W_ij| with the curvature G_ii sigma_jj there, over at most `sample` entries."""
    from scipy.stats import spearmanr

    chosen = np.random.default_rng(0).choice(W.size, min(sample, W.size), replace=False, shuffle=False)
    i, j = np.unravel_index(chosen, W.shape)
    correlation: Any = spearmanr(np.abs(W[i, j]), G[i] * power[j])  # its type has no attributes to a type checker
    return float(correlation.statistic)
