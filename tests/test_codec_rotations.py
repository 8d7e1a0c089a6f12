"""Claims about orthogonal blocks as angles and about undoing them in integers."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from rdopt.codec.rotations import (
    SINE_BITS,
    angle_codes,
    angle_count,
    rebuild,
    rebuild_fixed_point,
    sine_tables,
    split_blocks,
    undo_fixed_point,
)
from rdopt.transforms import orthogonality_error, random_orthogonal


def random_codes(n: int, block: int, bits: int, seed: int = 0) -> np.ndarray:
    """Angles of a random block-diagonal rotation."""
    quarter = 2 ** (bits - 2)
    codes = np.random.default_rng(seed).integers(1 - quarter, quarter + 1, angle_count(n, block))
    return codes.astype(np.int32)


def dense(codes: np.ndarray, n: int, block: int, bits: int) -> np.ndarray:
    """V as an n x n float64 matrix."""
    V = np.zeros((n, n))
    for columns, part in split_blocks(codes, n, block):
        blocks = rebuild(part, bits)
        for i, each in enumerate(blocks):
            at = columns.start + i * blocks.shape[1]
            V[at : at + len(each), at : at + len(each)] = each
    return V


@given(st.integers(1, 33), st.integers(2, 10), st.integers(0, 99))
def test_rebuilt_angles_are_orthogonal(b: int, bits: int, seed: int) -> None:
    codes, signs = angle_codes(random_orthogonal(seed, b, (2,)), bits)
    assert orthogonality_error(rebuild(codes, bits, signs)) < 1e-12


@given(st.integers(1, 33), st.integers(6, 16), st.integers(0, 99))
def test_rebuilt_angles_are_within_the_angle_step_of_the_matrix(b: int, bits: int, seed: int) -> None:
    Q = random_orthogonal(seed, b, (2,))
    codes, signs = angle_codes(Q, bits)
    assert np.abs(codes).max(initial=0) <= 2 ** (bits - 2)
    step, error = 2 * np.pi / 2**bits, rebuild(codes, bits, signs) - Q
    # b (b - 1) / 2 errors of at most half a step in planes, over b^2 entries.
    assert np.sqrt(np.mean(error**2)) <= step / 2 + 1e-12
    assert np.abs(error).max() <= 2 * step + 1e-12


def test_one_angle_is_the_plane_rotation() -> None:
    a = 2 * np.pi * 3 / 64
    found = rebuild(np.array([[3]]), 6)[0]
    np.testing.assert_allclose(found, [[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]], atol=1e-15)


def test_rounding_inside_the_elimination_beats_rounding_at_the_end() -> None:
    Q, bits = random_orthogonal(1, 32, (8,)), 6
    fine, signs = angle_codes(Q, 16)
    late = rebuild(np.rint(fine / 2**10).astype(np.int32), bits, signs)
    codes, signs = angle_codes(Q, bits)
    assert np.mean((rebuild(codes, bits, signs) - Q) ** 2) < 0.8 * np.mean((late - Q) ** 2)


@pytest.mark.parametrize("bits", [2, 5, 8, 13])
def test_integer_sines_are_rounded_sines(bits: int) -> None:
    angle = 2 * np.pi * np.arange(2**bits) / 2**bits
    for table, exact in zip(sine_tables(bits), (np.cos(angle), np.sin(angle)), strict=True):
        scaled = exact * 2**SINE_BITS
        clear = np.abs(scaled - np.floor(scaled) - 0.5) > 1e-4  # float64 is certain about the rounding
        assert clear.mean() > 0.99
        np.testing.assert_array_equal(table[clear], np.rint(scaled[clear]).astype(np.int64))


@given(st.integers(1, 32), st.integers(2, 10), st.integers(0, 99))
def test_the_integer_rotation_is_the_float64_one(b: int, bits: int, seed: int) -> None:
    codes = random_codes(3 * b, b, bits, seed).reshape(3, -1)
    fixed = rebuild_fixed_point(codes, bits)
    assert fixed.dtype == np.int64
    np.testing.assert_allclose(fixed / 2**SINE_BITS, rebuild(codes, bits), atol=2e-8)


@given(st.integers(1, 70), st.integers(1, 9), st.integers(1, 40), st.integers(2, 10), st.integers(-30, 30))
def test_undoing_is_the_float64_product(n: int, out: int, block: int, bits: int, octave: int) -> None:
    W = np.ldexp(np.random.default_rng(n).standard_normal((out, n), dtype=np.float32), octave)
    codes = random_codes(n, block, bits, out)
    found = undo_fixed_point(W, codes, block, bits)
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
    whole = undo_fixed_point(W, codes, 16, 6)
    parts = [undo_fixed_point(part, codes, 16, 6) for part in (W[:cut], W[cut:])]
    assert np.concatenate(parts).tobytes() == whole.tobytes()
    assert undo_fixed_point(np.asfortranarray(W[order]), codes, 16, 6).tobytes() == whole[order].tobytes()


def test_undoing_keeps_its_bytes() -> None:
    # Python integers, one multiplication at a time, in another order than numpy's.
    W = np.random.default_rng(2).standard_normal((3, 7)).astype(np.float32)
    codes = random_codes(7, 4, 6)
    found = undo_fixed_point(W, codes, 4, 6)
    for columns, part in split_blocks(codes, 7, 4):
        V = rebuild_fixed_point(part, 6)[0].tolist()
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
    back = undo_fixed_point((W @ dense(codes, 40, 32, 7)).astype(np.float32), codes, 32, 7)
    np.testing.assert_allclose(back / [[1], [3e38], [1e-38]], W / [[1], [3e38], [1e-38]], atol=2e-7)


@pytest.mark.parametrize(("angles", "block", "bits"), [(5, 4, 6), (6, 0, 6), (6, 4, 1), (6, 4, 17)])
def test_undoing_refuses_what_does_not_fit(angles: int, block: int, bits: int) -> None:
    with pytest.raises(ValueError, match=r"angles|bits"):
        undo_fixed_point(np.ones((2, 4), np.float32), np.zeros(angles, np.int32), block, bits)
