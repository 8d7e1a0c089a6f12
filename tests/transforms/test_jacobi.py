"""Claims about joint diagonalisation: the basis is found where there is one, the cost never rises, any width works."""

import numpy as np
import pytest
from conftest import orthogonality_error
from hypothesis import given
from hypothesis import strategies as st

from rdopt.transforms.matrices import jacobi
from rdopt.transforms.matrices.jacobi import joint_cost, joint_diagonalizer
from rdopt.transforms.matrices.pca import pca
from rdopt.transforms.matrices.random import random_orthogonal


def moments(seed: int, count: int, n: int) -> np.ndarray:
    """Random positive definite matrices."""
    x = np.random.default_rng(seed).standard_normal((count, 3 * n + 1, n))
    return np.einsum("kti,ktj->kij", x, x) / x.shape[1]


@pytest.mark.parametrize("n", [2, 7, 24])
def test_moments_with_common_axes_become_diagonal(n):
    rng = np.random.default_rng(n)
    axes, spectra = random_orthogonal(n, n), np.exp(rng.standard_normal((5, n)))
    C = np.einsum("ij,kj,lj->kil", axes, spectra, axes)
    turned = _turned(C, joint_diagonalizer(C, np.arange(1.0, 6.0), tolerance=1e-12))
    off = turned - np.einsum("kii->ki", turned)[:, :, None] * np.eye(n)
    assert np.abs(off).max() < 1e-3 * np.abs(C).max()
    # The determinant bounds the diagonal's product from below (Hadamard), and common axes reach it.
    floor = 0.5 * np.sum(np.arange(1.0, 6.0) * np.linalg.slogdet(C)[1]) / np.log(2)
    assert joint_cost(turned, np.arange(1.0, 6.0)) == pytest.approx(floor, abs=1e-4 * n)


def _turned(C: np.ndarray, Q: np.ndarray) -> np.ndarray:
    return Q.T @ C @ Q


@given(st.integers(0, 99), st.integers(1, 5), st.integers(2, 12))
def test_the_basis_is_orthogonal_and_never_costs_more_than_its_start(seed, count, n):
    C, weights = moments(seed, count, n), np.random.default_rng(seed).uniform(0.1, 5, count)
    start = random_orthogonal(seed, n)
    Q = joint_diagonalizer(C, weights, start=start, sweeps=3)
    assert orthogonality_error(Q) < 1e-12
    assert joint_cost(_turned(C, Q), weights) <= joint_cost(_turned(C, start), weights) + 1e-9


def test_one_moment_alone_gives_its_principal_axes():
    C = moments(3, 1, 10)
    Q = joint_diagonalizer(C, np.ones(1), tolerance=1e-12)
    np.testing.assert_allclose(np.abs(Q.T @ pca(C[0])), np.eye(10), atol=1e-2)


def test_no_pair_of_axes_can_be_turned_for_less_at_the_end():
    C, weights = moments(4, 4, 8), np.array([1.0, 2.0, 3.0, 4.0])
    Q = joint_diagonalizer(C, weights, sweeps=100, tolerance=1e-12)
    least = joint_cost(_turned(C, Q), weights)
    for i in range(8):
        for j in range(i):
            for angle in np.linspace(-0.7, 0.7, 15):
                turn = np.eye(8)
                turn[[i, j], [i, j]] = np.cos(angle)
                turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
                assert joint_cost(_turned(C, Q @ turn), weights) >= least - 1e-5


@pytest.mark.parametrize("n", [65, 150])
def test_blocks_find_what_one_block_finds_and_never_raise_the_cost(n, monkeypatch):
    C, weights = alike(n, 6), np.arange(1.0, 7.0)
    Q = joint_diagonalizer(C, weights)
    assert orthogonality_error(Q) < 1e-12
    costs = [joint_cost(_turned(C, joint_diagonalizer(C, weights, sweeps=s)), weights) for s in (1, 2, 3)]
    assert joint_cost(C, weights) > costs[0] > costs[1] > costs[2]
    monkeypatch.setattr(jacobi, "_WIDTH", n)  # all pairs inside one matrix, as Jacobi has it
    plain = joint_diagonalizer(C, weights)
    gap = joint_cost(_turned(C, Q), weights) - joint_cost(_turned(C, plain), weights)
    assert abs(gap) < 1e-3 * n * weights.sum()


def test_the_basis_does_not_depend_on_the_number_of_threads():
    C, weights = alike(130, 3), np.ones(3)
    one, three = (joint_diagonalizer(C, weights, sweeps=3, threads=threads) for threads in (1, 3))
    np.testing.assert_array_equal(one, three)


def alike(n: int, count: int) -> np.ndarray:
    """Moments whose axes differ a little."""
    rng = np.random.default_rng(n)
    axes = random_orthogonal(n, n) + 0.3 * rng.standard_normal((count, n, n)) / np.sqrt(n)
    return np.einsum("kij,kj,klj->kil", axes, np.exp(rng.standard_normal((count, n))), axes) + 0.1 * np.eye(n)
