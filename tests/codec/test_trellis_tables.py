"""Claims about parametric tables: totals, closed-form masses, fitting."""

from itertools import product

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from rdopt.codec.tables.frequencies import PRECISION
from rdopt.codec.tables.trellis import (
    OCTAVES,
    TRELLIS_BLENDS,
    TRELLIS_SCALES,
    TRELLIS_ZEROS,
    TrellisShape,
    fit_shape,
    is_shape,
    masses,
    octave_of,
    raw_bits,
    table,
    table_size,
)

counts = TRELLIS_SCALES, TRELLIS_ZEROS, TRELLIS_BLENDS
shapes = st.builds(TrellisShape, *(st.integers(0, count - 1) for count in counts))
spreads = st.tuples(st.integers(-48, 80), st.sampled_from([1, 2, 4, 8])).filter(lambda x: abs(x[0] / x[1]) <= 14)


@given(shape=shapes, grid=st.integers(0, 1), log2_spread=spreads)
def test_tables_hold_every_symbol_and_sum_to_the_total(shape, grid, log2_spread):
    freq = table(shape, grid, log2_spread)
    assert freq.dtype == np.int64 and len(freq) == table_size(log2_spread) + 1
    assert freq.sum() == 1 << PRECISION and freq.min() >= 1


@given(shape=shapes, grid=st.integers(0, 1), log2_spread=spreads)
def test_tables_are_the_real_valued_masses_to_a_unit_and_the_floor(shape, grid, log2_spread):
    freq = table(shape, grid, log2_spread)
    spread, raw = np.array([2.0 ** (log2_spread[0] / log2_spread[1])]), np.array([raw_bits(log2_spread)])
    p = masses([shape], grid, spread, raw, len(freq))[0, 0]
    # 2 units: truncation, and the Gaussian tail's polynomial; the floor of 1 takes len(freq) units in all.
    expected = 1 + ((1 << PRECISION) - len(freq)) * p
    top = np.argmax(freq)
    others = np.arange(len(freq)) != top
    assert np.abs(freq - expected)[others].max(initial=0) <= 2
    assert abs(freq[top] - expected[top]) <= len(freq) + 2


@given(shape=shapes, grid=st.integers(0, 1), log2_spread=spreads.filter(lambda x: raw_bits(x) == 0))
def test_masses_are_those_of_the_blended_densities_on_the_bins_of_the_grid(shape, grid, log2_spread):
    spread = 2.0 ** (log2_spread[0] / log2_spread[1])
    p = masses([shape], grid, np.array([spread]), np.array([0]), 12)[0, 0]
    s, w = spread * 2.0 ** ((shape.scale - 15) / 16), shape.blend / (TRELLIS_BLENDS - 1)
    zero = (shape.zero + 1) / (8 if grid == 0 else 16)
    bounds = np.array([0.0, zero, *(2.0 * np.arange(2, 12) - 1 - grid), np.inf])

    def cdf(x):
        return w * scipy.stats.laplace.cdf(x, scale=s / np.sqrt(2)) + (1 - w) * scipy.stats.norm.cdf(x, scale=s)

    np.testing.assert_allclose(p, 2 * np.diff(cdf(bounds)), atol=1e-12)
    assert p.sum() == pytest.approx(1)


@given(log2_spread=spreads)
def test_wide_classes_code_low_bits_raw_and_keep_their_tables_small(log2_spread):
    octaves = log2_spread[0] / log2_spread[1]
    assert octave_of(log2_spread) == np.clip(np.floor(octaves), *OCTAVES)
    assert 2 <= table_size(log2_spread) < 256
    # A symbol never holds more than an eighth of the spread in raw values, and the table reaches six spreads.
    if raw_bits(log2_spread):
        assert 2 * 2 ** raw_bits(log2_spread) <= 2**octaves / 8
    if octaves >= 0:
        assert 2 * (table_size(log2_spread) << raw_bits(log2_spread)) >= 6 * 2**octaves


@pytest.mark.parametrize("known", [TrellisShape(15, 6, 1), TrellisShape(10, 9, 0), TrellisShape(20, 2, 3)])
@pytest.mark.parametrize("grid", [0, 1])
def test_a_known_shape_is_recovered_from_its_counts(known, grid):
    found, bits, _ = fit_of(known, grid)
    assert found == known and bits > 0


@given(known=shapes, grid=st.integers(0, 1))
def test_a_fit_costs_at_most_a_fiftieth_more_than_the_shape_the_counts_came_from(known, grid):
    """The search may stop beside it, since scale, zero bin and blend trade against one another."""
    _, bits, best = fit_of(known, grid)
    assert best * (1 - 1e-6) <= bits <= 1.02 * best


def fit_of(known, grid):
    """(shape, its bits, bits of the known shape) fitted to the expected counts of a known one."""
    spread, raw = 2.0 ** np.array([0.1, 0.4, 0.8]), np.zeros(3, np.int64)
    p = masses([known], grid, spread, raw, 20)[0]
    best = -np.sum(1e6 * p * np.log2(p + 2.0**-PRECISION))
    return *fit_shape(TrellisShape(), grid, spread, raw, 1e6 * p), best


def test_the_fit_is_the_best_of_its_neighbourhood_on_drawn_values():
    rng = np.random.default_rng(0)
    spread, raw = np.array([1.5]), np.zeros(1, np.int64)
    k = np.rint(np.abs(1.5 * rng.laplace(scale=1 / np.sqrt(2), size=20_000)) / 2).astype(int)
    counts = np.bincount(k, minlength=12)[None, :12].astype(float)
    found, least = fit_shape(TrellisShape(), 0, spread, raw, counts)
    assert found.blend > 4

    def bits(shape):
        return -np.sum(counts * np.log2(masses([shape], 0, spread, raw, 12)[0] + 2.0**-PRECISION))

    assert least == pytest.approx(bits(found)) and least <= bits(TrellisShape())
    for move in product((-1, 0, 1), repeat=3):
        trial = TrellisShape(*(a + b for a, b in zip(found, move, strict=True)))
        if is_shape(*trial):
            assert bits(trial) >= least
