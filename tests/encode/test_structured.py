"""Claims about structured components: exact sums, found where they pay, priced in their bytes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdopt.codec.grids.steps import dequantize, exp_steps
from rdopt.codec.streams.structured import (
    MAX_FACTOR,
    SHIFTS,
    Structured,
    combine,
    component,
    finer,
    pack_structured,
    product,
    unpack_structured,
)
from rdopt.encode.structured import coded_cost, fit_structured

M, N = 48, 40


def steps(seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(-8, 8, M).astype(np.int32), rng.integers(-8, 8, N).astype(np.int32)


def low_rank_plus_noise(rank, strength, seed=0):
    rng = np.random.default_rng(seed)
    f = rng.standard_normal((M, rank)) @ rng.standard_normal((rank, N))
    return strength * f + 2 * rng.standard_normal((M, N))


def random_component(seed, rank=2, shift=1):
    rng = np.random.default_rng(seed)
    return Structured(rng.integers(-9, 10, (M, rank)), rng.integers(-9, 10, (N, rank)), shift)


def test_a_strong_component_is_found_at_its_rank():
    found = fit_structured(low_rank_plus_noise(2, 20.0), np.ones(M), np.ones(N))
    assert found is not None
    f, gain = found
    assert f.rank == 2
    assert gain.saved > 0.5 * M * N


def test_noise_has_no_component():
    assert fit_structured(low_rank_plus_noise(1, 0.0), np.ones(M), np.ones(N)) is None


def test_zeros_have_no_component():
    assert fit_structured(np.zeros((M, N)), np.ones(M), np.ones(N)) is None


def test_steps_only_scale_the_matrix():
    row, col = (exp_steps(k).astype(np.float64) for k in steps())
    x = low_rank_plus_noise(1, 20.0)
    plain, scaled = (fit_structured(*a) for a in ((x, np.ones(M), np.ones(N)), (x * np.outer(row, col), row, col)))
    assert plain is not None
    assert scaled is not None
    assert scaled[1].saved == pytest.approx(plain[1].saved, rel=1e-6)


def test_the_gain_counts_the_bytes_of_the_component():
    found = fit_structured(low_rank_plus_noise(1, 20.0), np.ones(M), np.ones(N))
    assert found is not None
    f, gain = found
    assert gain.side == 8 * len(pack_structured({(0, "q"): f}, {(0, "q"): (M, N)}))
    assert 0 < gain.saved < gain.before - gain.after - gain.side


def test_the_residual_is_small_where_the_component_is_all_there_is():
    x = low_rank_plus_noise(1, 0.0) * 0 + 40 * np.outer(np.sin(np.arange(M)), np.cos(np.arange(N)))
    found = fit_structured(x, np.ones(M), np.ones(N))
    assert found is not None
    f, _ = found
    assert np.std(x - product(f) / 2.0**f.shift) < 0.05 * np.std(x)


def test_cost_at_high_rate_is_entropy_plus_the_slope():
    """r = h - log2 step and d = step^2 / 12: a bit costs 2 ln2 d, so the distortion counts 1 / (2 ln2) bits."""
    x = 60 * np.random.default_rng(0).standard_normal((300, 200))
    expected = 0.5 * np.log2(2 * np.pi * np.e) + np.log2(60) + 1 / (2 * np.log(2))
    assert coded_cost(x) / x.size == pytest.approx(expected, abs=0.02)


def test_cost_of_tiny_entries_is_their_power():
    x = 0.02 * np.random.default_rng(1).standard_normal((300, 200))
    assert coded_cost(x) == pytest.approx(float(np.sum(x**2)) / (2 * np.log(2) / 12), rel=0.1)


def test_cost_follows_rows_and_columns():
    rng = np.random.default_rng(2)
    x = 40 * rng.standard_normal((200, 200))
    rows, cols = np.exp2(rng.uniform(-2, 2, 200)), np.exp2(rng.uniform(-2, 2, 200))
    shift = (np.log2(rows).mean() + np.log2(cols).mean()) * x.size
    assert coded_cost(x * np.outer(rows, cols)) - coded_cost(x) == pytest.approx(shift, abs=0.02 * x.size)


@given(st.integers(0, 50), st.integers(1, 3), st.sampled_from(SHIFTS))
def test_values_and_component_add_exactly(seed, rank, shift):
    f = random_component(seed, rank, shift)
    values = np.random.default_rng(seed).integers(-5, 6, (M, N)).astype(np.int32)
    exact = values + (f.left @ f.right.T) / 2.0**shift
    assert np.array_equal(combine(values, f) / 2.0**shift, exact)


def test_decoded_weights_are_residual_plus_component():
    f, (row, col) = random_component(3), steps()
    step = float(np.float32(0.013))
    values = np.random.default_rng(3).integers(-5, 6, (M, N)).astype(np.int32)
    whole = dequantize(combine(values, f), row, col, finer(step, f))
    parts = dequantize(values, row, col, step).astype(np.float64) + component(f, row, col, step)
    np.testing.assert_allclose(whole, parts, rtol=1e-6, atol=1e-6)
    assert whole.dtype == np.float32


def test_components_come_back_in_the_order_of_the_matrices():
    shapes = {(0, "q"): (M, N), (0, "k"): (N, M), (1, "q"): (M, N)}
    found = {(1, "q"): random_component(4, 1, 0), (0, "q"): random_component(5, 3, 4)}
    back = unpack_structured(pack_structured(found, shapes), shapes)
    assert set(back) == set(found)
    for key, f in found.items():
        assert back[key].shift == f.shift
        assert np.array_equal(back[key].left, f.left)
        assert np.array_equal(back[key].right, f.right)


def test_no_components_are_no_bytes():
    assert pack_structured({}, {(0, "q"): (M, N)}) == b""
    assert unpack_structured(b"", {(0, "q"): (M, N)}) == {}


def test_smooth_factors_cost_less_than_rough_ones():
    rng = np.random.default_rng(6)
    smooth = np.rint(30 * np.cos(np.pi * (np.arange(400) + 0.5) / 400)).astype(np.int64)[:, None]
    rough = rng.permutation(smooth)
    shapes = {(0, "q"): (400, 400)}
    lengths = [len(pack_structured({(0, "q"): Structured(z, z, 0)}, shapes)) for z in (smooth, rough)]
    assert lengths[0] < 0.4 * lengths[1]


def test_factors_beyond_their_limit_are_refused():
    f = random_component(7)._replace(left=np.full((M, 2), 2 * MAX_FACTOR))
    with pytest.raises(ValueError, match="factor"):
        unpack_structured(pack_structured({(0, "q"): f}, {(0, "q"): (M, N)}), {(0, "q"): (M, N)})


def test_damaged_components_are_refused():
    shapes = {(0, "q"): (M, N)}
    data = pack_structured({(0, "q"): random_component(8)}, shapes)
    with pytest.raises(ValueError):
        unpack_structured(data + b"\0", shapes)
    for cut in range(1, len(data), 5):
        with pytest.raises(ValueError):
            unpack_structured(data[:cut], shapes)
    with pytest.raises(ValueError, match="rank"):
        unpack_structured(b"\x00\x00\xff\xff\xff", shapes)
