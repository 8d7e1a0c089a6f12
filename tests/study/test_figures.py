"""Effective dimensions and entropies are their closed forms."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdopt.study.figures import entropy_dimension, entropy_of_counts, participation_ratio, weight_statistics


@given(st.integers(1, 40), st.integers(0, 20), st.floats(1e-6, 1e6))
def test_k_equal_powers_have_dimension_k(k: int, zeros: int, power: float):
    powers = np.array([power] * k + [0.0] * zeros)
    assert participation_ratio(powers) == pytest.approx(k)
    assert entropy_dimension(powers) == pytest.approx(k)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30))
def test_the_participation_ratio_is_never_above_the_entropy_dimension(powers: list[float]):
    v = np.array(powers)
    assert 1 - 1e-9 <= participation_ratio(v) <= entropy_dimension(v) + 1e-9 <= len(v) + 2e-9


def test_the_effective_columns_of_a_matrix_are_the_entropy_dimension_of_their_energies():
    W = np.random.default_rng(0).standard_normal((30, 20)) * np.exp(np.random.default_rng(1).standard_normal(20))
    expected = entropy_dimension(np.square(W).sum(axis=0)) / 20
    assert weight_statistics(W).effective_columns == pytest.approx(expected)
    assert set(weight_statistics(np.zeros((2, 3)))) == {0.0}


def test_the_entropy_of_powers_of_two_is_exact():
    assert entropy_of_counts(np.array([8, 4, 0, 2, 1, 1])) == 1.875
