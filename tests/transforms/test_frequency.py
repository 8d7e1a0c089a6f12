"""Claims about the frequency bases: orthonormal at any width, and the transforms that everybody else computes."""

import numpy as np
import pytest
import scipy.fft
from conftest import orthogonality_error
from hypothesis import given
from hypothesis import strategies as st

from rdopt.transforms.matrices.frequency import dct, fourier

widths = st.integers(1, 300)


@pytest.mark.parametrize("basis", [dct, fourier])
@given(n=widths)
def test_a_frequency_basis_is_orthonormal_for_any_width(basis, n):
    assert orthogonality_error(basis(n)) < 1e-13


@pytest.mark.parametrize("basis", [dct, fourier])
def test_a_frequency_basis_stays_orthonormal_at_the_width_of_a_large_model(basis):
    assert orthogonality_error(basis(1536)) < 1e-13


@given(n=widths, seed=st.integers(0, 99))
def test_the_cosine_basis_gives_scipys_transform(n, seed):
    x = np.random.default_rng(seed).standard_normal((3, n))
    np.testing.assert_allclose(x @ dct(n), np.asarray(scipy.fft.dct(x, norm="ortho")), atol=1e-12)


@given(n=widths, seed=st.integers(0, 99))
def test_the_fourier_basis_holds_the_energies_and_phases_of_numpys_rfft(n, seed):
    x = np.random.default_rng(seed).standard_normal(n)
    c, F = x @ fourier(n), np.fft.rfft(x, norm="ortho")
    pairs = (n - 1) // 2
    expected = np.concatenate([F[:1].real, np.sqrt(2) * np.stack([F.real, -F.imag], 1)[1 : 1 + pairs].ravel()])
    expected = np.append(expected, F[-1:].real) if n % 2 == 0 else expected
    np.testing.assert_allclose(c, expected, atol=1e-12)
    energies = np.add.reduceat(c**2, np.unique(np.minimum(np.maximum(2 * np.arange(len(F)) - 1, 0), n - 1)))
    doubled = np.where((np.arange(len(F)) == 0) | (2 * np.arange(len(F)) == n), 1, 2)
    np.testing.assert_allclose(energies, doubled * np.abs(F) ** 2, atol=1e-11)


@pytest.mark.parametrize("basis", [dct, fourier])
def test_a_constant_row_has_one_coefficient(basis):
    np.testing.assert_allclose(np.ones(7) @ basis(7), [np.sqrt(7), *[0] * 6], atol=1e-14)
