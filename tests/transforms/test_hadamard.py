"""Hadamard matrices of any width by construction."""

import numpy as np
import pytest
import scipy.linalg
from conftest import orthogonality_error
from hypothesis import given, settings
from hypothesis import strategies as st

from rdopt.transforms.matrices.hadamard import (
    hadamard,
    hadamard_orders,
    jacobsthal,
    paley,
    prime_power,
)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200))
def test_hadamard_is_orthogonal_and_flat_for_any_width(n):
    H = hadamard(n)
    assert orthogonality_error(H) < 1e-13
    assert np.abs(H).max() <= np.sqrt(2 / n) + 1e-12
    if hadamard_orders(n) is not None:
        np.testing.assert_allclose(np.abs(H), 1 / np.sqrt(n), rtol=1e-13)


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_hadamard_of_a_power_of_two_is_sylvesters(n):
    np.testing.assert_allclose(hadamard(n) * np.sqrt(n), scipy.linalg.hadamard(n), atol=1e-13)


@pytest.mark.parametrize("n", [4, 8, 12, 20, 28, 36, 44, 52, 76, 100, 148, 344])
def test_paley_matrices_are_hadamard_over_prime_and_prime_power_fields(n):
    H = paley(n)
    assert set(np.unique(H)) == {-1, 1}
    np.testing.assert_array_equal(H @ H.T, n * np.eye(n, dtype=int))


@pytest.mark.parametrize("q", [3, 5, 9, 25, 27, 49])
def test_the_quadratic_character_obeys_jacobsthals_identity(q):
    M = jacobsthal(q)
    np.testing.assert_array_equal(M @ M.T, q * np.eye(q, dtype=int) - 1)
    np.testing.assert_array_equal(M.sum(axis=1), 0)
    np.testing.assert_array_equal(M.T, M if q % 4 == 1 else -M)


def test_prime_powers_are_recognised():
    assert [q for q in range(2, 33) if prime_power(q)] == [
        2, 3, 4, 5, 7, 8, 9, 11, 13, 16, 17, 19, 23, 25, 27, 29, 31, 32
    ]  # fmt: skip
    assert prime_power(343) == (7, 3) and prime_power(1) is None


def test_every_multiple_of_four_up_to_88_is_reached():
    assert all(hadamard_orders(n) is not None for n in range(4, 89, 4))


@pytest.mark.parametrize("width", [768, 896, 1536, 3072, 3584, 4864, 8960, 11008, 13824, 14336, 18944, 29568])
def test_common_model_widths_are_fully_flat(width):
    orders = hadamard_orders(width)
    assert orders is not None and np.prod(orders) == width
