"""What a stored transform of an input group saves at high rate, and what its angles and its order cost.

The gain is half a log2 of the column variances before and after, summed over rows of norm one (Jayant and Noll, Digital
Coding of Waveforms, 1984, ch. 12).
Transforms: block-diagonal rotations (Transform Quantization, 2009.01174; here the joint diagonalisers of the blocks),
layers of learned pairs (after ParoQuant, 2511.10645), a Hadamard before them, a butterfly of Givens rotations.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import lgamma, log
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment

from rdopt.codec.coders.constriction import pack_integers
from rdopt.transforms.matrices.givens import Pairs, apply_givens, butterfly
from rdopt.transforms.matrices.hadamard import hadamard
from rdopt.transforms.matrices.jacobi import joint_cost, joint_diagonalizer
from rdopt.transforms.matrices.joint import row_moments
from rdopt.transforms.stored.angles import angle_codes, blocks_of_angles
from rdopt.transforms.stored.pairing import fitted_angles, learned_pairs, pair_gains, pairing_bits, turned_moments

Grouping = Literal["as they are", "by power", "by correlation"]
PRICED_BITS = (4, 5, 6, 7, 8)  # widths of an angle
BLOCK_WIDTHS = (8, 16, 32, 64)
PAIR_LAYERS = (1, 2, 4)


@dataclass(frozen=True)
class BlockRotations:
    """A rotation of every block of so many channels, which are grouped in one of three ways."""

    width: int
    grouping: Grouping

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"blocks of {self.width}, {self.grouping}"

    def side_information(self, n: int, free_order: bool) -> tuple[int, float]:
        """Number of angles in width n, and the bits that name the channels of every block."""
        stored = not free_order and self.grouping != "as they are"
        return n * (self.width - 1) // 2, grouping_bits(n, self.width) if stored else 0.0


@dataclass(frozen=True)
class PairRotations:
    """Layers of rotations of learned pairs of channels, perhaps behind a Hadamard."""

    layers: int
    behind_hadamard: bool = False

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{'hadamard, ' * self.behind_hadamard}pairs, {self.layers} layer{'s' * (self.layers > 1)}"

    def side_information(self, n: int, free_order: bool) -> tuple[int, float]:
        """Number of angles in width n, and the bits that name the pairs; a free order puts one layer side by side."""
        return self.layers * (n // 2), pairing_bits(n, self.layers - (free_order and not self.behind_hadamard))


@dataclass(frozen=True)
class Butterfly:
    """All layers of a butterfly of Givens rotations."""

    name = "butterfly"

    def side_information(self, n: int, free_order: bool) -> tuple[int, float]:
        """Number of angles in width n; its pairs need no naming."""
        return sum(map(len, butterfly(n))), 0.0


StoredForm = BlockRotations | PairRotations | Butterfly


class InputGroup(NamedTuple):
    """Matrices that share an input.

    Attributes:
        kind: attn, o, mlp or down.
        shapes: (rows, n) of every matrix.
        C, weights: second moments of their rows and how many there are.
        free_order: the order of the channels is a gauge of the network and need not be stored.
    """

    kind: str
    shapes: tuple[tuple[int, int], ...]
    C: Float[np.ndarray, "k n n"]
    weights: Float[np.ndarray, " k"]
    free_order: bool

    @property
    def size(self) -> int:
        """Weights of the group."""
        return sum(rows * n for rows, n in self.shapes)


class TransformFit(NamedTuple):
    """A transform fitted to one group.

    Attributes:
        gain: bits saved in all weights of the group, angles exact.
        rounded: width of an angle in bits -> (bits saved with rounded angles, their codes).
        order: bits that name the blocks' channels or the pairs.
    """

    gain: float
    rounded: Mapping[int, tuple[float, Int[np.ndarray, " p"]]]
    order: float


class TransformPrice(NamedTuple):
    """Transforms of one form of several groups that share a table, in bits/weight unless said.

    Attributes:
        gain: with exact angles; error is its standard error over the groups.
        kept: with rounded angles.
        price: angles, table and order.
        order: the order's share of the price.
        bits: width of an angle.
        angle: coded bits of an angle, its table included.
        angles: how many.
    """

    gain: float
    error: float
    kept: float
    price: float
    order: float
    bits: int
    angle: float
    angles: int

    @property
    def net(self) -> float:
        """What the file saves."""
        return self.kept - self.price


def group_of(kind: str, matrices: Sequence[Float[np.ndarray, "_ n"]], floor: float) -> InputGroup:
    """The group of some matrices; hidden channels of an MLP have no order of their own."""
    C, weights = row_moments(([W] for W in matrices), floor)
    return InputGroup(kind, tuple(W.shape for W in matrices), C, weights, kind == "down")


def chance_group(like: InputGroup, rng: np.random.Generator, floor: float) -> InputGroup:
    """iid Gaussian matrices of the same shapes: what a fit gains on them is chance."""
    return group_of(like.kind, [rng.standard_normal(shape) for shape in like.shapes], floor)


def fit_all(group: InputGroup, steps: int) -> dict[StoredForm, TransformFit]:
    """Every form of transform; `steps` of Adam for the butterfly, without one when zero."""
    C, weights = group.C, group.weights
    fits: dict[StoredForm, TransformFit] = {
        BlockRotations(b, how): fit_blocks(C, weights, b, how, group.free_order)
        for b in BLOCK_WIDTHS for how in get_args(Grouping)
    }
    H = hadamard(C.shape[1])
    flat = H.T @ C @ H
    lost = joint_cost(C, weights) - joint_cost(flat, weights)
    for behind, moments, start in ((False, C, 0.0), (True, flat, lost)):
        pairs, angles = learned_pairs(moments, weights, max(PAIR_LAYERS))
        for layers in PAIR_LAYERS:
            form = PairRotations(layers, behind)
            _, order = form.side_information(C.shape[1], group.free_order)
            fits[form] = fit_givens(moments, weights, pairs[:layers], angles[: layers * len(pairs[0])], order, start)
    if steps:
        pairs = butterfly(C.shape[1])
        fits[Butterfly()] = fit_givens(C, weights, pairs, butterfly_angles(C, weights, steps), 0.0)
    return fits


def fit_blocks(
    C: Float[np.ndarray, "k n n"],
    weights: Float[np.ndarray, " k"],
    block: int,
    grouping: Grouping,
    free_order: bool = False,
) -> TransformFit:
    """Joint diagonalisers of the diagonal blocks, channels grouped in one of the three ways."""
    order = grouped(C, weights, block, grouping)
    parts = diagonal_blocks(C[:, order][:, :, order], block)
    before = sum(_rotated_cost(part, None, weights) for part in parts)
    axes = [np.stack([_axes(part[:, at], weights) for at in range(part.shape[1])]) for part in parts]
    rounded = {}
    for bits in PRICED_BITS:
        codes = [angle_codes(V, bits) for V in axes]
        costs = [_rotated_cost(part, blocks_of_angles(c, bits), weights) for part, c in zip(parts, codes, strict=True)]
        rounded[bits] = (before - sum(costs), np.concatenate([c.ravel() for c in codes]))
    _, order_bits = BlockRotations(block, grouping).side_information(C.shape[1], free_order)
    gain = before - sum(_rotated_cost(part, V, weights) for part, V in zip(parts, axes, strict=True))
    return TransformFit(gain, rounded, order_bits)


def fit_givens(
    C: Float[np.ndarray, "k n n"],
    weights: Float[np.ndarray, " k"],
    pairs: Pairs,
    angles: Float[np.ndarray, " p"],
    order: float,
    start: float = 0.0,
) -> TransformFit:
    """Givens layers as they are; `order` bits name their pairs, `start` bits were gained before them."""
    before, rounded = start + joint_cost(C, weights), {}
    for bits in PRICED_BITS:
        step = 2 * np.pi / 2**bits
        codes = np.rint(angles / step).astype(np.int32)
        rounded[bits] = (before - joint_cost(turned_moments(C, codes * step, pairs), weights), codes)
    return TransformFit(before - joint_cost(turned_moments(C, angles, pairs), weights), rounded, order)


def price_of(fits: Sequence[TransformFit], sizes: Sequence[int]) -> TransformPrice:
    """Gain and price of the same form of transform in several groups, angles of the width that leaves most.

    Args:
        fits: one a group; their angles share a table.
        sizes: weights of the groups.
    """
    total, order = sum(sizes), sum(f.order for f in fits)
    choices = []
    for bits in PRICED_BITS:
        codes = np.concatenate([f.rounded[bits][1] for f in fits])
        kept, coded = sum(f.rounded[bits][0] for f in fits), 8 * len(pack_integers(codes))
        choices.append((kept - coded, kept, coded, bits, len(codes)))
    _, kept, coded, bits, angles = max(choices)
    gains = np.array([f.gain / size for f, size in zip(fits, sizes, strict=True)])
    return TransformPrice(
        gain=sum(f.gain for f in fits) / total,
        error=float(gains.std(ddof=1) / np.sqrt(len(gains))) if len(gains) > 1 else float("nan"),
        kept=kept / total,
        price=(coded + order) / total,
        order=order / total,
        bits=bits,
        angle=coded / angles,
        angles=angles,
    )


def grouped(
    C: Float[np.ndarray, "k n n"], weights: Float[np.ndarray, " k"], block: int, grouping: Grouping
) -> Int[np.ndarray, " n"]:
    """The channels in the order in which consecutive `block` of them share a rotation."""
    n = C.shape[1]
    if grouping == "as they are" or block >= n:
        return np.arange(n)
    if grouping == "by power":
        return np.argsort(-np.einsum("k,kii->i", weights / np.trace(C, axis1=1, axis2=2), C), kind="stable")
    gains = pair_gains(C, weights)[0]
    free, order = np.ones(n, bool), []
    while len(order) < n:
        # The first of a block is the channel whose best free partner promises most.
        ties = np.where(free, gains[:, free].max(axis=1), -1.0)
        for _ in range(min(block, n - len(order))):
            new = int(np.argmax(ties))
            ties = gains[new].copy() if len(order) % block == 0 else ties + gains[new]
            free[new] = False
            ties[~free] = -1.0
            order.append(new)
    return np.array(order)


def grouping_bits(n: int, block: int) -> float:
    """log2 of the number of ways to part n channels into blocks, the last one smaller."""
    full, rest = divmod(n, block)
    return (lgamma(n + 1) - full * lgamma(block + 1) - lgamma(full + 1) - lgamma(rest + 1)) / log(2)


def diagonal_blocks(C: Float[np.ndarray, "k n n"], block: int) -> list[Float[np.ndarray, "k blocks b b"]]:
    """The full blocks on the diagonal, then the smaller last one, if any."""
    k, n, _ = C.shape
    cut = n - n % block
    full = np.einsum("kaiaj->kaij", C[:, :cut, :cut].reshape(k, cut // block, block, cut // block, block))
    return [part for part in (full, C[:, None, cut:, cut:]) if part.size]


def _axes(C: Float[np.ndarray, "k b b"], weights: Float[np.ndarray, " k"]) -> Float[np.ndarray, "b b"]:
    """The joint diagonaliser of a block, its axes in the order nearest to the identity."""
    Q = joint_diagonalizer(np.ascontiguousarray(C), weights)
    return Q[:, linear_sum_assignment(-(Q**2))[1]]


def _rotated_cost(
    part: Float[np.ndarray, "k blocks b b"],
    V: Float[np.ndarray, "blocks b b"] | None,
    weights: Float[np.ndarray, " k"],
) -> float:
    """1/2 sum_k n_k log2 det diag of the blocks rotated by V."""
    V = np.broadcast_to(np.eye(part.shape[-1]), part.shape[1:]) if V is None else V
    power = np.sum((part @ V) * V, axis=2)
    return float(0.5 * np.sum(weights[:, None, None] * np.log2(power)))


def butterfly_angles(
    C: Float[np.ndarray, "k n n"], weights: Float[np.ndarray, " k"], steps: int
) -> Float[np.ndarray, " p"]:
    """Angles of the butterfly: fitted layer by layer, then `steps` of Adam on all of them together."""
    angles = fitted_angles(C, weights, butterfly(C.shape[1]))
    rows = np.linalg.cholesky(C).swapaxes(1, 2)
    arrays = (jnp.asarray(x, jnp.float32) for x in (rows, weights / weights.sum(), angles))
    return np.asarray(_trainer(C.shape[1], steps)(*arrays), np.float64)


@lru_cache
def _trainer(n: int, steps: int) -> Callable[..., jax.Array]:
    """(rows, shares of the matrices, angles) -> the angles after Adam, or before it where it did not help."""
    pairs = butterfly(n)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.03, steps))

    def cost(a: jax.Array, rows: jax.Array, shares: jax.Array) -> jax.Array:
        return jnp.sum(shares[:, None] * jnp.log(jnp.sum(apply_givens(rows, a, pairs) ** 2, axis=1)))

    @jax.jit
    def train(rows: jax.Array, shares: jax.Array, start: jax.Array) -> jax.Array:
        def step(_: int, held: tuple) -> tuple:
            a, state = held
            change, state = optimizer.update(jax.grad(cost)(a, rows, shares), state)
            return optax.apply_updates(a, change), state

        trained, _ = jax.lax.fori_loop(0, steps, step, (start, optimizer.init(start)))
        return jnp.where(cost(trained, rows, shares) < cost(start, rows, shares), trained, start)

    return train
