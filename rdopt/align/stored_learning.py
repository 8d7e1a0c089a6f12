"""Stored rotations while they train: where they start, how parameters turn them, what their angles cost.

A rotation starts from what diagonalises the moments of its rows best within its structure, in the starting coordinates.
The bits of its angles are part of R: in training as those of Gaussian angles of its own spread, in the end as the
entropy of the rounded ones.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rdopt.checkpoint.families import MATRICES, MATRICES_OF, Architecture, block_shapes
from rdopt.config.schema import SideName, TrainConfig
from rdopt.operator.llama import BlockParams
from rdopt.transforms.arrays import matmul
from rdopt.transforms.gauges.coordinates import Gauges, sides_of
from rdopt.transforms.matrices.cayley import block_cayley
from rdopt.transforms.matrices.givens import Pairs, butterfly
from rdopt.transforms.matrices.jacobi import joint_diagonalizer
from rdopt.transforms.matrices.joint import row_moments
from rdopt.transforms.matrices.pca import near_identity
from rdopt.transforms.stored.pairing import fitted_angles, learned_pairs
from rdopt.transforms.stored.rotation import Rotation, pair_gathers
from rdopt.transforms.stored.rotations import Structure, flattening

STORED = "stored_"  # begins the names of the parameters
EXPECTED_ANGLE_BITS = 6  # of an angle, while its cost is only expected

# Which rotation of a block: ("inputs", input group) or ("outputs", matrix).
Place = tuple[SideName, str]


class StoredSettings(NamedTuple):
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

    def widths(self, arch: Architecture) -> dict[Place, int]:
        """The width of every rotation of a block."""
        shapes, widths = block_shapes(arch), {}
        if "inputs" in self.sides:
            widths |= {("inputs", group): shapes[names[0]][1] for group, names in MATRICES_OF.items()}
        if "outputs" in self.sides:
            widths |= {("outputs", name): shapes[name][0] for name in MATRICES}
        return widths


def stored_settings(train: TrainConfig) -> StoredSettings | None:
    """The stored rotations that a configuration trains."""
    if train.stored == "none":
        return None
    return StoredSettings(train.stored, train.stored_size, train.stored_base == "hadamard", train.stored_sides)


def parameter_name(place: Place) -> str:
    """What the parameters of a rotation are called."""
    return STORED + "_".join(place)


class RotationStart(NamedTuple):
    """One rotation in all layers before training, float32: see `Rotation`; angles and gathers of layers of pairs.

    The Hadamard matrix is one for all.
    """

    hadamard: Float[Array, "n n"] | None
    blocks: tuple[Float[Array, "layers k b b"], Float[Array, "layers 1 r r"]] | None = None
    angles: Float[Array, "layers p"] | None = None
    partner: Int[Array, "layers L n"] | None = None
    index: Int[Array, "layers L n"] | None = None
    sign: Int[Array, "layers L n"] | None = None

    def drawn(self, layers: Any) -> "RotationStart":
        """That of some layers alone."""
        own = jax.tree.map(lambda x: x[layers], self._replace(hadamard=None))
        return own._replace(hadamard=self.hadamard)

    def moved(self, theta: Float[Array, "layers p"]) -> Rotation:
        """The rotations with a leading layer axis: the start, turned on by theta."""
        H = None if self.hadamard is None else jnp.broadcast_to(self.hadamard, (len(theta), *self.hadamard.shape))
        if self.blocks is not None:
            size = self.blocks[0].shape[-1]
            n = self.blocks[0].shape[1] * size + self.blocks[1].shape[-1]
            full, last = block_cayley(theta, n, size)
            return Rotation(H, (matmul(self.blocks[0], full), matmul(self.blocks[1], last[:, None])))
        spread = jax.vmap(lambda a, at, sign: a[at] * sign)(self.moved_angles(theta), self.index, self.sign)
        return Rotation(H, None, self.partner, spread)

    def moved_angles(self, theta: Float[Array, "layers p"]) -> Float[Array, "layers p"]:
        """The angles of layers of pairs, radians."""
        assert self.angles is not None
        return self.angles + theta


class StoredStart(NamedTuple):
    """Where all rotations start, on the device, and the pairs that stay as they are, one entry a layer."""

    rotations: Mapping[Place, RotationStart] = {}
    pairs: Mapping[Place, Sequence[Pairs]] = {}


def expected_angle_bits(rotation: Rotation, count: int) -> Float[Array, ""]:
    """Bits of the angles over all layers: p/2 log2(1 + 2 pi e v / step^2), v their mean square in a layer.

    The entropy of rounded Gaussian angles, made to vanish with them (Cover and Thomas, theorem 8.3.1).

    Args:
        rotation: with a leading layer axis.
        count: p, angles of a layer.
    """
    if rotation.blocks is not None:
        skew = [(B - B.swapaxes(-1, -2)) / 2 for B in rotation.blocks]
        power = sum(jnp.sum(S * S, axis=(1, 2, 3)) for S in skew) / 2
    else:
        assert rotation.angle is not None
        power = jnp.sum(rotation.angle**2, axis=(1, 2)) / 2  # each angle stands at both coordinates of its pair
    step = 2 * np.pi / 2**EXPECTED_ANGLE_BITS
    return jnp.sum(count / 2 * jnp.log2(1 + 2 * np.pi * np.e * power / (max(count, 1) * step**2)))


def stored_start(
    settings: StoredSettings, blocks: Iterable[BlockParams], arch: Architecture, start: Gauges
) -> StoredStart:
    """Where every rotation starts, from the weights in the coordinates of `start`.

    Args:
        settings: structure and sides.
        blocks: the gain-folded weights of every block in order.
        arch: their architecture.
        start: the gauges.
    """
    widths = settings.widths(arch)
    layers: dict[Place, list[_Fitted]] = {place: [] for place in widths}
    for layer, params in enumerate(blocks):
        gauges = start.block(layer, arch)
        W = {k: sides_of(k, (None, None), arch, gauges).fold(np.asarray(params[k], np.float64)) for k in MATRICES}
        for side, key in widths:
            rows = [W[name] for name in MATRICES_OF[key]] if side == "inputs" else [W[key].T]
            layers[side, key].append(_fit(settings, rows))
    rotations = {place: _stacked(settings, n, layers[place]) for place, n in widths.items()}
    return StoredStart(rotations, {place: [fitted.pairs for fitted in each] for place, each in layers.items()})


class _Fitted(NamedTuple):
    """What starts one rotation of one layer: blocks, or angles of layers of pairs."""

    blocks: tuple[Float[np.ndarray, "k b b"], Float[np.ndarray, "1 r r"]] | None
    angles: Float[np.ndarray, " p"] | None = None
    pairs: Pairs = ()


def _fit(settings: StoredSettings, matrices: Sequence[Float[np.ndarray, "_ n"]]) -> _Fitted:
    """The rotation that turns the rows of these matrices best."""
    C, weights = row_moments([W] for W in matrices)
    n, size = C.shape[1], settings.size
    if settings.hadamard:
        H = flattening(n)
        C = H.T @ C @ H
    if settings.structure == "blocks":
        cut = n - n % size
        axes = [_axes(C[:, i : i + size, i : i + size], weights) for i in range(0, n, size)]
        full = np.stack(axes[: cut // size]) if cut else np.zeros((0, size, size))
        return _Fitted((full, axes[-1][None] if cut < n else np.zeros((1, 0, 0))))
    if settings.structure == "butterfly":
        return _Fitted(None, fitted_angles(C, weights, butterfly(n)), butterfly(n))
    pairs, angles = learned_pairs(C, weights, size)
    return _Fitted(None, angles, pairs)


def _axes(C: Float[np.ndarray, "k b b"], weights: Float[np.ndarray, " k"]) -> Float[np.ndarray, "b b"]:
    """Joint axes in the order and with the signs nearest to the identity, where angles are cheap."""
    V = near_identity(joint_diagonalizer(np.ascontiguousarray(C), weights)[None])[0]
    return V * np.where(np.diagonal(V) < 0, -1.0, 1.0)


def _stacked(settings: StoredSettings, n: int, layers: Sequence[_Fitted]) -> RotationStart:
    H = None
    if settings.hadamard:
        H = jnp.asarray(flattening(n), jnp.float32)
    if settings.structure == "blocks":
        full, last = (jnp.asarray(np.stack([x.blocks[i] for x in layers if x.blocks]), jnp.float32) for i in range(2))
        return RotationStart(H, (full, last))
    gathers = [pair_gathers(x.pairs, n) for x in layers]
    partner, index, sign = (jnp.asarray(np.stack([g[i] for g in gathers]), jnp.int32) for i in range(3))
    angles = jnp.asarray(np.stack([x.angles for x in layers if x.angles is not None]), jnp.float32)
    return RotationStart(H, None, angles, partner, index, sign)
