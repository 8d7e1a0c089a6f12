"""Claims about what is known of a matrix before it goes through the trellis."""

import numpy as np
import pytest
from test_wavefront import problem

from rdopt.codec.tables.classes import rank1_spreads
from rdopt.codec.tables.trellis import TrellisShape, rates_of, starting_plan
from rdopt.config.schema import EncodeConfig
from rdopt.encode.trellis_matrix import expected_spreads, narrowed, quantize_matrix, sample_matrix, sampled_plan


@pytest.mark.parametrize("two_sided", [False, True])
def test_spreads_are_known_before_anything_is_quantized(two_sided):
    """Closer than by the weights alone, which do not know of the errors that are fed back."""
    W, L, M, row, col = problem(160, 120, c=0.5)
    M, row = (M, row) if two_sided else (None, np.ones(len(W)))
    expected = expected_spreads(W, L, M, row, col)
    (rates,) = rates_of(starting_plan([expected]), 0.0)
    path = quantize_matrix(W, L, M, row, col, rates, 8)
    found = rank1_spreads(path.targets)
    power, real = (np.mean(np.outer(*x) ** 2) for x in (expected, found))
    alone = np.mean((W / np.outer(row, col)) ** 2)
    assert abs(power / real - 1) < min(0.025, 0.5 * abs(alone / real - 1))
    for ours, theirs in zip(expected, found, strict=True):
        assert np.std(np.log2(ours) - np.log2(theirs)) < 0.15


def test_weights_of_zero_have_spreads_whatever_the_metric():
    """A metric whose coordinates do not mix takes nothing back, and rounding must not make that less than nothing."""
    L = np.diag(np.sqrt(np.linspace(0.1, 3, 200)))
    for spread in expected_spreads(np.zeros((3, 200)), L, None, np.ones(3), np.ones(200)):
        assert np.isfinite(spread).all() and (spread > 0).all()


def test_a_sample_of_all_rows_is_the_matrix():
    W, L, M, row, col = problem(40, 30)
    sample = sample_matrix(W, L, M, row, col, EncodeConfig())
    assert sample.indices.shape == W.shape
    for ours, theirs in zip(sample.spread, sample.expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_shapes_are_fitted_to_samples_and_classes_to_all_rows():
    W, L, M, row, col = problem(200, 50, c=2.0)
    samples = [sample_matrix(W, L, factor, row, col, EncodeConfig()) for factor in (M, None)]
    plan = sampled_plan(samples, ["diagonals", "columns"], 8)
    assert [len(s.row) for s in plan.spreads] == [200, 200]
    assert [len(x.indices) for x in samples] == [64, 64]
    assert set(plan.shapes) == set(starting_plan([x.spread for x in samples]).shapes)
    assert any(shape != TrellisShape() for shape in plan.shapes.values())


@pytest.mark.parametrize(("largest", "kind"), [(127, np.int8), (-128, np.int16), (40000, np.int32)])
def test_indices_take_the_bytes_they_need(largest, kind):
    k = narrowed(np.array([[0, largest]], np.int32))
    assert k.dtype == kind and k[0, 1] == largest
