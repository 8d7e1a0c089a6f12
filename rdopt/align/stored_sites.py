"""Stored rotations while they train: where they start, what their angles cost, and which of them stay.

A site starts from what diagonalises the moments of its rows best within its structure, in the starting coordinates.
The bits of its angles are part of R: in training as those of Gaussian angles of its own spread, in the end as the
entropy of the rounded ones.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rdopt.checkpoint.families import MATRICES, MATRICES_OF, Architecture, block_shapes
from rdopt.config.schema import SideName
from rdopt.operator.params import Params
from rdopt.transforms.arrays import matmul
from rdopt.transforms.bases import row_moments
from rdopt.transforms.gauges.block import sides_of
from rdopt.transforms.gauges.gauges import Gauges
from rdopt.transforms.matrices.cayley import block_cayley_blocks, block_cayley_size
from rdopt.transforms.matrices.givens import Pairs, butterfly, pair_count
from rdopt.transforms.matrices.jacobi import joint_diagonalizer
from rdopt.transforms.matrices.pca import near_identity
from rdopt.transforms.stored.pairing import fitted_angles, learned_pairs
from rdopt.transforms.stored.rotation import Rotation, pair_gathers
from rdopt.transforms.stored.rotations import Structure, flattening

STORED = "stored_"  # begins the names of the parameters
ANGLE_BITS = 6  # of an angle, while its cost is only expected


class Plan(NamedTuple):
    """Which stored rotations are trained; static.

    Attributes:
        structure: "blocks", "butterfly" or "pairs".
        size: width of a block, or layers of pairs.
        hadamard: whether a Hadamard matrix comes first.
        sides: "inputs", "outputs".
    """

    structure: Structure
    size: int
    hadamard: bool
    sides: tuple[SideName, ...]


class SiteStart(NamedTuple):
    """One site of all layers before training, float32: see `Rotation`; angles and gathers of layers of pairs."""

    hadamard: Float[Array, "layers n n"] | None
    blocks: tuple[Float[Array, "layers k b b"], Float[Array, "layers 1 r r"]] | None
    angles: Float[Array, "layers p"] | None
    partner: Int[Array, "layers L n"] | None
    index: Int[Array, "layers L n"] | None
    sign: Int[Array, "layers L n"] | None


class Sites(NamedTuple):
    """Something for every stored site: by input group, and by matrix."""

    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]


NO_SITES = Sites({}, {})


class Starts(NamedTuple):
    """The starting points on the device, and the pairs that stay as they are: (layer, "SIDE KEY") -> pairs."""

    sites: Sites
    pairs: Mapping[tuple[int, str], Pairs]


def site_widths(plan: Plan, arch: Architecture) -> Sites:
    """The width of every site that is trained."""
    shapes = block_shapes(arch)
    inputs = {group: shapes[names[0]][1] for group, names in MATRICES_OF.items()} if "inputs" in plan.sides else {}
    return Sites(inputs, {name: shapes[name][0] for name in MATRICES} if "outputs" in plan.sides else {})


def parameters(plan: Plan, n: int) -> int:
    """Trained numbers of a rotation of width n."""
    if plan.structure == "blocks":
        return block_cayley_size(n, plan.size)
    return pair_count(butterfly(n)) if plan.structure == "butterfly" else plan.size * (n // 2)


def site_turn(plan: Plan, start: SiteStart, theta: Float[Array, "layers p"]) -> Rotation:
    """The rotations of a site with a leading layer axis: the start, turned on by theta."""
    if start.blocks is not None:
        n = start.blocks[0].shape[1] * plan.size + start.blocks[1].shape[-1]
        full, last = block_cayley_blocks(theta, n, plan.size)
        return Rotation(start.hadamard, (matmul(start.blocks[0], full), matmul(start.blocks[1], last[:, None])))
    spread = jax.vmap(lambda a, at, sign: a[at] * sign)(site_angles(start, theta), start.index, start.sign)
    return Rotation(start.hadamard, None, start.partner, spread)


def site_angles(start: SiteStart, theta: Float[Array, "layers p"]) -> Float[Array, "layers p"]:
    """The angles of layers of pairs, radians."""
    assert start.angles is not None
    return start.angles + theta


def expected_angle_bits(turn: Rotation, count: int) -> Float[Array, ""]:
    """Bits of the angles of a site over all layers: p/2 log2(1 + 2 pi e v / step^2), v their mean square in a layer.

    The entropy of rounded Gaussian angles, made to vanish with them (Cover and Thomas, theorem 8.3.1).

    Args:
        turn: with a leading layer axis.
        count: p, angles of a layer.
    """
    if turn.blocks is not None:
        skew = [(B - B.swapaxes(-1, -2)) / 2 for B in turn.blocks]
        power = sum(jnp.sum(S * S, axis=(1, 2, 3)) for S in skew) / 2
    else:
        assert turn.angle is not None
        power = jnp.sum(turn.angle**2, axis=(1, 2)) / 2  # each angle stands at both coordinates of its pair
    step = 2 * np.pi / 2**ANGLE_BITS
    return jnp.sum(count / 2 * jnp.log2(1 + 2 * np.pi * np.e * power / (max(count, 1) * step**2)))


def stored_starts(plan: Plan, params: Params, arch: Architecture, start: Gauges) -> Starts:
    """Where every site starts, from the weights in the coordinates of `start`.

    Args:
        plan: structure and sides.
        params: the gain-folded weights.
        arch: their architecture.
        start: the gauges.
    """
    widths = site_widths(plan, arch)
    found: dict[tuple[str, str], list[tuple[Any, Any, Pairs]]] = {}
    for layer in range(arch.num_layers):
        gauges = start.block(layer, arch)
        W = {k: sides_of(k, (None, None), arch, gauges).fold(np.asarray(params["blocks"][k][layer], np.float64))
             for k in MATRICES}
        rows = {group: [W[name] for name in MATRICES_OF[group]] for group in widths.inputs}
        for side, of in (("inputs", rows), ("outputs", {name: [W[name].T] for name in widths.outputs})):
            for key, matrices in of.items():
                found.setdefault((side, key), []).append(_site_start(plan, matrices))
    starts, pairs = Sites({}, {}), {}
    for (side, key), layers in found.items():
        n = getattr(widths, side)[key]
        getattr(starts, side)[key] = _stacked(plan, n, layers)
        pairs |= {(layer, f"{side} {key}"): x[2] for layer, x in enumerate(layers)}
    return Starts(starts, pairs)


def _site_start(plan: Plan, matrices: Sequence[Float[np.ndarray, "_ n"]]) -> tuple[Any, Any, Pairs]:
    """(blocks, angles, pairs) of one rotation that turns the rows of these matrices."""
    C, weights = row_moments(matrices)
    n = C.shape[1]
    if plan.hadamard:
        H = flattening(n)
        C = H.T @ C @ H
    if plan.structure == "blocks":
        cut = n - n % plan.size
        axes = [_axes(C[:, i : i + plan.size, i : i + plan.size], weights) for i in range(0, n, plan.size)]
        full = np.stack(axes[: cut // plan.size]) if cut else np.zeros((0, plan.size, plan.size))
        return (full, axes[-1][None] if cut < n else np.zeros((1, 0, 0))), None, ()
    if plan.structure == "butterfly":
        return None, fitted_angles(C, weights, butterfly(n)), butterfly(n)
    pairs, angles = learned_pairs(C, weights, plan.size)
    return None, angles, pairs


def _axes(C: Float[np.ndarray, "k b b"], weights: Float[np.ndarray, " k"]) -> Float[np.ndarray, "b b"]:
    """Joint axes in the order and with the signs nearest to the identity, where angles are cheap."""
    V = near_identity(joint_diagonalizer(np.ascontiguousarray(C), weights)[None])[0]
    return V * np.where(np.diagonal(V) < 0, -1.0, 1.0)


def _stacked(plan: Plan, n: int, layers: Sequence[tuple[Any, Any, Pairs]]) -> SiteStart:
    H = None
    if plan.hadamard:
        H = jnp.asarray(np.broadcast_to(flattening(n), (len(layers), n, n)), jnp.float32)
    if plan.structure == "blocks":
        blocks = tuple(jnp.asarray(np.stack([x[0][i] for x in layers]), jnp.float32) for i in range(2))
        return SiteStart(H, (blocks[0], blocks[1]), None, None, None, None)
    gathers = [pair_gathers(x[2], n) for x in layers]
    partner, index, sign = (jnp.asarray(np.stack([g[i] for g in gathers]), jnp.int32) for i in range(3))
    return SiteStart(H, None, jnp.asarray(np.stack([x[1] for x in layers]), jnp.float32), partner, index, sign)

