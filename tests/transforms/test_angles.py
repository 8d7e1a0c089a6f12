"""Claims about orthogonal blocks as angles."""

import hypothesis.strategies as st
import numpy as np
import pytest
from conftest import orthogonality_error
from hypothesis import given

from rdopt.transforms.matrices.cayley import block_skew_size
from rdopt.transforms.matrices.random import random_orthogonal
from rdopt.transforms.stored.angles import (
    SINE_BITS,
    angle_codes,
    blocks_of_angles,
    fixed_point_blocks,
    sine_tables,
)


def random_codes(n: int, block: int, bits: int, seed: int = 0) -> np.ndarray:
    """Angles of a random block-diagonal rotation."""
    quarter = 2 ** (bits - 2)
    codes = np.random.default_rng(seed).integers(1 - quarter, quarter + 1, block_skew_size(n, block))
    return codes.astype(np.int32)


def rebuilt(codes: np.ndarray, bits: int, Q: np.ndarray) -> np.ndarray:
    """The blocks of quantized angles with the signs that the columns of Q have."""
    V = blocks_of_angles(codes, bits)
    return V * np.where(np.einsum("kij,kij->kj", V, Q) < 0, -1.0, 1.0)[:, None, :]


@given(st.integers(1, 33), st.integers(2, 10), st.integers(0, 99))
def test_rebuilt_angles_are_orthogonal(b: int, bits: int, seed: int) -> None:
    codes = angle_codes(random_orthogonal(seed, b, (2,)), bits)
    assert orthogonality_error(blocks_of_angles(codes, bits)) < 1e-12


@given(st.integers(1, 33), st.integers(6, 16), st.integers(0, 99))
def test_rebuilt_angles_are_within_the_angle_step_of_the_matrix(b: int, bits: int, seed: int) -> None:
    Q = random_orthogonal(seed, b, (2,))
    codes = angle_codes(Q, bits)
    assert np.abs(codes).max(initial=0) <= 2 ** (bits - 2)
    step, error = 2 * np.pi / 2**bits, rebuilt(codes, bits, Q) - Q
    # b (b - 1) / 2 errors of at most half a step in planes, over b^2 entries.
    assert np.sqrt(np.mean(error**2)) <= step / 2 + 1e-12
    assert np.abs(error).max() <= 2 * step + 1e-12


def test_one_angle_is_the_plane_rotation() -> None:
    a = 2 * np.pi * 3 / 64
    found = blocks_of_angles(np.array([[3]]), 6)[0]
    np.testing.assert_allclose(found, [[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]], atol=1e-15)


def test_rounding_inside_the_elimination_beats_rounding_at_the_end() -> None:
    Q, bits = random_orthogonal(1, 32, (8,)), 6
    fine = angle_codes(Q, 16)
    late = rebuilt(np.rint(fine / 2**10).astype(np.int32), bits, Q)
    codes = angle_codes(Q, bits)
    assert np.mean((rebuilt(codes, bits, Q) - Q) ** 2) < 0.8 * np.mean((late - Q) ** 2)


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
    fixed = fixed_point_blocks(codes, bits)
    assert fixed.dtype == np.int64
    np.testing.assert_allclose(fixed / 2**SINE_BITS, blocks_of_angles(codes, bits), atol=2e-8)
