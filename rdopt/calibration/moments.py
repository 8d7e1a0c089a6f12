"""Second moments of inputs and of output gradients of every matrix and of the embedding: the values.

sigma is the uncentred mean of x x^T over tokens at a matrix's input; G that of g g^T at its output, g the gradient
of the sum of a sequence's log-likelihood under labels sampled from the model itself, one per position (the Fisher
information, Martens 1412.1193). D = 1/2 tr(G E sigma E^T) is then in nats/token. The input of an embedding is one
token, so its sigma is the diagonal of the token frequencies; the G of a head is the Fisher information of the logits,
diag(p) - p p^T, whose diagonal is known without sampling.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from rdopt.checkpoint.families import INPUT_OF, MATRICES, Architecture, block_shapes

# Outputs that a gauge can rotate always need the full G. For the others it is kept up to this width, for feedback
# over the rows; beyond it the memory of a layer's square matrices outgrows that of its weights.
ROTATED = ("q", "k", "v", "o", "down")
FULL_WIDTH = 4096


class EmbeddingMoments(NamedTuple):
    """What errors of the embedding and of the head cost, float64.

    Attributes:
        frequency: f, the share of each token in the text, its occurrences weighted by |g|^2.
        G: mean of g g^T at the embedding's output.
        fisher: h, mean of p_v (1 - p_v) over tokens, p the model's prediction.
        S: mean of y y^T at the head's input, behind the final norm.
    """

    frequency: Float[np.ndarray, " vocab"]
    G: Float[np.ndarray, "d d"]
    fisher: Float[np.ndarray, " vocab"]
    S: Float[np.ndarray, "d d"]


# One array a block: stacked in memory, or read when it is indexed.
OfBlocks = Sequence[Float[np.ndarray, "..."]] | Float[np.ndarray, "layers ..."]


class Moments(NamedTuple):
    """Second moments of a model on a calibration text, float64.

    Attributes:
        sigma: input group (attn, o, mlp, down) -> (in, in) of every block.
        G: matrix -> (out, out) of every block; (out,), the diagonal, for very wide gate and up.
        tokens: how many tokens they are the mean of.
        embed: those of the embedding and the head.
    """

    sigma: Mapping[str, OfBlocks]
    G: Mapping[str, OfBlocks]
    tokens: int
    embed: EmbeddingMoments | None = None

    def diag_G(self, name: str, layer: int) -> Float[np.ndarray, " out"]:
        """Diagonal of G of one matrix."""
        G = self.G[name][layer]
        return G if G.ndim == 1 else np.diagonal(G)


def full_G(name: str, width: int) -> bool:
    """Whether the whole G of a matrix with `width` outputs is measured, or its diagonal."""
    return name in ROTATED or width <= FULL_WIDTH


def moment_entries(arch: Architecture) -> int:
    """Numbers in the second moments of one block."""
    shapes = block_shapes(arch)
    widths = {INPUT_OF[k]: shapes[k][1] for k in MATRICES}
    heights = {k: shapes[k][0] for k in MATRICES}
    return sum(n * n for n in widths.values()) + sum(m * m if full_G(k, m) else m for k, m in heights.items())


def block_bytes(arch: Architecture) -> int:
    """What is held of a block that is quantized, whatever the budget.

    Its weights before and behind it, float32, its second moments and their Cholesky factors, float64.
    """
    weights = sum(math.prod(shape) for shape in block_shapes(arch).values())
    return 2 * 4 * weights + 2 * 8 * moment_entries(arch)
