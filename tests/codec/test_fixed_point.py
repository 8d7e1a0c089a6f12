"""Claims about undoing stored rotations in integers."""

import hypothesis.strategies as st
import numpy as np
import pytest
from conftest import orthogonality_error
from hypothesis import given

from rdopt.codec.streams.fixed_point import undo_rotation, undo_stored
from rdopt.transforms.matrices.cayley import block_skew_size
from rdopt.transforms.matrices.givens import butterfly, round_robin
from rdopt.transforms.stored.angles import blocks_of_angles, fixed_point_blocks, split_blocks
from rdopt.transforms.stored.rotations import StoredRotation, StoredRotations


def random_codes(n: int, block: int, bits: int, seed: int = 0) -> np.ndarray:
    """Angles of a random block-diagonal rotation."""
    quarter = 2 ** (bits - 2)
    codes = np.random.default_rng(seed).integers(1 - quarter, quarter + 1, block_skew_size(n, block))
    return codes.astype(np.int32)


def dense(codes: np.ndarray, n: int, block: int, bits: int) -> np.ndarray:
    """V as an n x n float64 matrix."""
    V = np.zeros((n, n))
    for columns, part in split_blocks(codes, n, block):
        blocks = blocks_of_angles(part, bits)
        for i, each in enumerate(blocks):
            at = columns.start + i * blocks.shape[1]
            V[at : at + len(each), at : at + len(each)] = each
    return V


def undo_blocks(W: np.ndarray, codes: np.ndarray, block: int, bits: int) -> np.ndarray:
    """W V^T of one block-diagonal V."""
    return undo_rotation(W, StoredRotations("blocks", block, False, bits, {}, {}), StoredRotation(codes))


def layered(structure, n: int, hadamard: bool, bits: int, seed: int) -> tuple[StoredRotations, StoredRotation]:
    """A random rotation by layers of pairs."""
    pairs = tuple(butterfly(n)) if structure == "butterfly" else round_robin(n, 3)
    rng, quarter = np.random.default_rng(seed), 2 ** (bits - 2)
    codes = rng.integers(1 - quarter, quarter + 1, sum(map(len, pairs))).astype(np.int32)
    stored = StoredRotations(structure, 1 if structure == "butterfly" else 3, hadamard, bits, {}, {})
    return stored, StoredRotation(codes, None if structure == "butterfly" else pairs)


@given(st.integers(1, 70), st.integers(1, 9), st.integers(1, 40), st.integers(2, 10), st.integers(-30, 30))
def test_undoing_is_the_float64_product(n: int, out: int, block: int, bits: int, octave: int) -> None:
    W = np.ldexp(np.random.default_rng(n).standard_normal((out, n), dtype=np.float32), octave)
    codes = random_codes(n, block, bits, out)
    found = undo_blocks(W, codes, block, bits)
    exact = W.astype(np.float64) @ dense(codes, n, block, bits).T
    assert found.dtype == np.float32
    # float32 rounding of the result, and 2^-27 of the row's maximum from sines and weights.
    assert np.all(np.abs(found - exact) < 1e-7 * np.abs(exact) + 5e-8 * np.abs(W).max(axis=1, keepdims=True))


@given(st.integers(0, 20), st.integers(0, 99))
def test_undoing_is_bit_equal_for_any_split_and_order_of_the_rows(cut: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    order = rng.permutation(20)
    W = (rng.standard_normal((20, 45)) * np.exp(3 * rng.standard_normal((20, 1)))).astype(np.float32)
    codes = random_codes(45, 16, 6)
    whole = undo_blocks(W, codes, 16, 6)
    parts = [undo_blocks(part, codes, 16, 6) for part in (W[:cut], W[cut:])]
    assert np.concatenate(parts).tobytes() == whole.tobytes()
    assert undo_blocks(np.asfortranarray(W[order]), codes, 16, 6).tobytes() == whole[order].tobytes()


def test_undoing_keeps_its_bytes() -> None:
    # Python integers, one multiplication at a time, in another order than numpy's.
    W = np.random.default_rng(2).standard_normal((3, 7)).astype(np.float32)
    codes = random_codes(7, 4, 6)
    found = undo_blocks(W, codes, 4, 6)
    for columns, part in split_blocks(codes, 7, 4):
        V = fixed_point_blocks(part, 6)[0].tolist()
        for row, w in enumerate(W.tolist()):
            exponent = int(np.frexp(np.abs(W[row]).max())[1]) - 28
            x = [round(v * 2.0**-exponent) for v in w[columns]]
            sums = [sum(a * b for a, b in zip(reversed(x), reversed(v), strict=True)) for v in V]
            expected = [((s + 2**29) >> 30) * 2.0**exponent for s in sums]
            np.testing.assert_array_equal(found[row, columns], np.array(expected, np.float32))


def test_zeros_and_outliers_come_back() -> None:
    W = np.zeros((3, 40), np.float32)
    W[1, 3], W[2, 5] = 3e38, 1e-38
    codes = random_codes(40, 32, 7)
    back = undo_blocks((W @ dense(codes, 40, 32, 7)).astype(np.float32), codes, 32, 7)
    np.testing.assert_allclose(back / [[1], [3e38], [1e-38]], W / [[1], [3e38], [1e-38]], atol=2e-7)


@pytest.mark.parametrize(("angles", "block", "bits"), [(5, 4, 6), (6, 0, 6), (6, 4, 1), (6, 4, 17)])
def test_undoing_refuses_what_does_not_fit(angles: int, block: int, bits: int) -> None:
    with pytest.raises(ValueError, match=r"angles|bits"):
        undo_blocks(np.ones((2, 4), np.float32), np.zeros(angles, np.int32), block, bits)


@given(
    st.sampled_from(["butterfly", "pairs", "blocks"]), st.integers(2, 50), st.booleans(), st.integers(3, 10),
    st.integers(0, 99),
)
def test_every_structure_is_undone_to_the_float64_product(structure, n, hadamard, bits, seed) -> None:
    stored, site = layered("butterfly" if structure == "blocks" else structure, n, hadamard, bits, seed)
    if structure == "blocks":
        stored = StoredRotations("blocks", 8, hadamard, bits, {}, {})
        site = StoredRotation(random_codes(n, 8, bits, seed))
    W = np.random.default_rng(seed).standard_normal((5, n)).astype(np.float32)
    turn = stored.rotation(site, n)
    V = turn.apply(np.eye(n))
    assert orthogonality_error(V) < 1e-12
    np.testing.assert_allclose(turn.undo(turn.apply(W.astype(np.float64))), W, atol=1e-12)
    found, exact = undo_rotation(W, stored, site), W.astype(np.float64) @ V.T
    assert np.all(np.abs(found - exact) < 1e-7 * np.abs(exact) + 4e-7 * np.abs(W).max(axis=1, keepdims=True))
    order = np.random.default_rng(seed + 1).permutation(5)
    assert undo_rotation(W[order], stored, site).tobytes() == found[order].tobytes()


def test_layers_keep_their_bytes() -> None:
    # Python integers, one pair at a time.
    stored, site = layered("butterfly", 4, True, 5, 3)
    W = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    found = undo_rotation(W, stored, site)
    sine = [round(2**30 * np.sin(2 * np.pi * k / 32)) for k in range(32)]
    for row, w in enumerate(W.tolist()):
        exponent = int(np.frexp(np.abs(W[row]).max())[1]) - 28
        x, at = [round(v * 2.0**-exponent) for v in w], len(site.codes)
        for layer in reversed(butterfly(4)):
            at -= len(layer)
            for k, (i, j) in enumerate(layer.tolist()):
                code = int(site.codes[at + k])
                c, s = sine[(code + 8) % 32], sine[code % 32]
                x[i], x[j] = (c * x[i] + s * x[j] + 2**29) >> 30, (c * x[j] - s * x[i] + 2**29) >> 30
        signs = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
        sums = [np.rint(sum(a * b for a, b in zip(x, h, strict=True)) / 2) for h in signs]
        np.testing.assert_array_equal(found[row], np.float32(np.ldexp(np.array(sums), exponent)))


def test_both_sides_are_undone() -> None:
    stored, V = layered("butterfly", 12, False, 6, 0)
    U = layered("butterfly", 8, False, 6, 1)[1]
    both = stored._replace(inputs={(0, "mlp"): V}, outputs={(0, "up"): U})
    W = np.random.default_rng(0).standard_normal((8, 12))
    turned = both.sides(0, "up", W.shape).fold(W)
    exact = stored.rotation(U, 8).apply(np.eye(8)).T @ W @ stored.rotation(V, 12).apply(np.eye(12))
    np.testing.assert_allclose(turned, exact, atol=1e-12)
    np.testing.assert_allclose(both.sides(0, "up", W.shape).unfold(turned), W, atol=1e-12)
    np.testing.assert_allclose(undo_stored(both, 0, "up", "mlp", turned.astype(np.float32)), W, atol=2e-6)
    assert both.sides(1, "up", W.shape).fold(W) is W
