"""MatrixStacks in chosen coordinates, the orders of their channels, and Gaussian blocks like them.

The order of the hidden channels, and of the stream's, is a symmetry of the network, so that smoothness in a channel's
number means nothing before an order is chosen. Two are tried: by the leading principal coordinate of the channels,
which puts like channels next to each other, and, for the layer index, hidden channels matched to the layer before.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment

from rdopt.calibration.moments import Moments
from rdopt.checkpoint.families import MATRICES, Architecture
from rdopt.operator.params import Params
from rdopt.transforms.bases import starting_gauges
from rdopt.transforms.gauges.fold import fold

# Matrix -> (layers, out, in), float64.
MatrixStacks = Mapping[str, Float[np.ndarray, "layers out in"]]
_READERS = ("q", "k", "v", "gate", "up")


def blocks_in(basis: str, params: Params, arch: Architecture, moments: Moments | None = None) -> MatrixStacks:
    """The matrices in a fixed basis, norm gains folded into them in every basis, so that only the basis differs."""
    gauges = starting_gauges(basis, params, arch, moments or Moments({}, {}, 0))
    if gauges.residual is None:
        gauges = gauges._replace(residual=np.eye(arch.hidden_size))
    folded, _ = fold(params, arch, gauges)
    return {name: np.asarray(folded["blocks"][name], np.float64) for name in MATRICES}


def gaussian_like(blocks: MatrixStacks, rng: np.random.Generator) -> MatrixStacks:
    """Independent Gaussian matrices with the variances of rows and columns of the blocks' matrices."""
    out = {}
    for name, W in blocks.items():
        power = np.square(W)
        rows, columns, all_ = (np.mean(power, axis=axis, keepdims=True) for axis in (2, 1, (1, 2)))
        variance = rows * columns / np.where(all_ > 0, all_, 1.0)
        out[name] = rng.standard_normal(W.shape) * np.sqrt(variance)
    return out


def as_they_are(blocks: MatrixStacks) -> MatrixStacks:
    """The blocks."""
    return blocks


def sorted_channels(blocks: MatrixStacks) -> MatrixStacks:
    """Stream and hidden channels by their leading principal coordinates, the hidden ones in every layer anew."""
    # One row a weight of a stream channel: the rows of its readers, the columns of its writers.
    facing = [W if name in _READERS else np.swapaxes(W, 1, 2) for name, W in blocks.items()]
    stream = np.concatenate([W.reshape(-1, W.shape[2]) for W in facing])
    order = np.argsort(_leading(stream.T @ stream), kind="stable")
    out = {name: W[:, :, order] if name in _READERS else W[:, order] for name, W in blocks.items()}
    return _reordered(out, [np.argsort(_leading(x), kind="stable") for x in _hidden(out)])


def matched_channels(blocks: MatrixStacks) -> MatrixStacks:
    """Hidden channels in the order in which they are most alike those of the layer before: largest sum of cosines."""
    features = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30) for x in _hidden(blocks)]
    orders = [np.arange(len(features[0]))]
    for before, x in pairwise(features):
        orders.append(linear_sum_assignment(before[orders[-1]] @ x.T, maximize=True)[1])
    return _reordered(blocks, orders)


ORDERS: Mapping[str, Callable[[MatrixStacks], MatrixStacks]] = {
    "as they are": as_they_are,
    "sorted": sorted_channels,
    "matched": matched_channels,
}


def _leading(x: Float[np.ndarray, "channels features"]) -> Float[np.ndarray, " channels"]:
    """The channels' coordinates along the principal axis of their second moment."""
    return np.linalg.svd(x, full_matrices=False)[0][:, 0]


def _hidden(blocks: MatrixStacks) -> list[Float[np.ndarray, "ffn features"]]:
    """What each hidden channel reads and writes, one array a layer."""
    down = np.swapaxes(blocks["down"], 1, 2)
    return list(np.concatenate([blocks["gate"], blocks["up"], down], axis=2))


def _reordered(blocks: MatrixStacks, orders: list[Int[np.ndarray, " ffn"]]) -> MatrixStacks:
    """The blocks with the hidden channels of every layer in an order."""
    rows = {k: np.stack([W[o] for W, o in zip(blocks[k], orders, strict=True)]) for k in ("gate", "up")}
    down = np.stack([W[:, o] for W, o in zip(blocks["down"], orders, strict=True)])
    return {**blocks, **rows, "down": down}
