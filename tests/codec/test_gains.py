"""Claims about fine gains: their numbers, their bytes and their precision."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdopt.codec.grids.steps import exact_exp2
from rdopt.codec.streams.gains import (
    GAIN_PRECISIONS,
    Gains,
    choose_precision,
    pack_gains,
    quantize_gains,
    unpack_gains,
)
from rdopt.encode.gain_fit import rounding_variance

SHAPES = {(0, "q"): (5, 7), (0, "down"): (3, 11), (1, "q"): (5, 7), (1, "down"): (3, 11)}
precisions = pytest.mark.parametrize("precision", GAIN_PRECISIONS)


def random_gains(seed, precision=16, spread=3.0, shapes=SHAPES):
    rng = np.random.default_rng(seed)

    def logs(n):
        return np.rint(spread * rng.standard_normal(n)).astype(np.int32)

    rows = {key: logs(shape[0]) for key, shape in shapes.items()}
    return Gains(precision, rows, {key: logs(shape[1]) for key, shape in shapes.items()})


def without_zeros(part):
    return {key: x.tolist() for key, x in part.items() if np.any(x)}


# numbers


@precisions
def test_gains_are_powers_of_two_to_float32_rounding(precision):
    k = np.arange(-9 * precision, 9 * precision + 1, dtype=np.int32)
    found = exact_exp2(k, precision)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.exp2(k / precision), rtol=2.0**-22)
    np.testing.assert_array_equal(found[:: 9 * precision], [2.0**-9, 1, 2.0**9])


@pytest.mark.parametrize("precision", GAIN_PRECISIONS[:-1])
def test_a_finer_precision_holds_the_same_numbers(precision):
    k = np.arange(-70, 70, dtype=np.int32)
    np.testing.assert_array_equal(exact_exp2(k, precision), exact_exp2(2 * k, 2 * precision))


def test_zero_and_missing_gains_leave_every_bit_as_it_is():
    W = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    zeros = np.zeros(5, np.int32), np.zeros(7, np.int32)
    for rows, cols in ((None, None), zeros, (zeros[0], None), (None, zeros[1])):
        gains = Gains(32, *({} if k is None else {(0, "q"): k} for k in (rows, cols)))
        np.testing.assert_array_equal(gains.apply((0, "q"), W), W)


def test_gains_scale_rows_and_columns():
    W = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    gains = random_gains(1)
    rows, cols = gains.rows[0, "q"], gains.cols[0, "q"]
    expected = np.diag(np.exp2(rows / 16)) @ W @ np.diag(np.exp2(cols / 16))
    np.testing.assert_allclose(gains.apply((0, "q"), W), expected, rtol=1e-6)
    np.testing.assert_array_equal(gains.apply((9, "q"), W), W)


# bytes


@given(
    seed=st.integers(0, 99),
    precision=st.sampled_from(GAIN_PRECISIONS),
    spread=st.floats(0, 40),
    left_out=st.sets(st.tuples(st.booleans(), st.sampled_from(list(SHAPES)))),
)
def test_gains_come_back_from_their_bytes(seed, precision, spread, left_out):
    gains = random_gains(seed, precision, spread)
    for of_rows, key in left_out:
        del (gains.rows if of_rows else gains.cols)[key]
    found = unpack_gains(pack_gains(gains, SHAPES), SHAPES)
    assert found is not None and found.precision == precision
    for part in ("rows", "cols"):
        assert {k: x.tolist() for k, x in getattr(found, part).items()} == without_zeros(getattr(gains, part))


def test_no_gains_take_no_bytes_and_zeros_take_their_flags():
    assert pack_gains(None, SHAPES) == b"" and unpack_gains(b"", SHAPES) is None
    data = pack_gains(random_gains(0, spread=0.0), SHAPES)
    assert len(data) == 2
    assert unpack_gains(data, SHAPES) == Gains(16, {}, {})


def test_kinds_of_matrices_that_spread_differently_get_tables_of_their_own():
    shapes = {(i, name): (400, 400) for i in range(2) for name in ("q", "down")}
    wide, narrow = random_gains(0, spread=12.0, shapes=shapes), random_gains(0, spread=0.4, shapes=shapes)

    def mixed(is_wide):
        rows = {k: (wide if is_wide("rows", k) else narrow).rows[k] for k in shapes}
        return Gains(16, rows, {k: (wide if is_wide("cols", k) else narrow).cols[k] for k in shapes})

    codings = [lambda part, k: True, lambda part, k: part == "rows", lambda part, k: k[1] == "q"]
    assert [pack_gains(mixed(chosen), shapes)[:1] for chosen in codings] == [b"\x03", b"\x04", b"\x05"]


@given(
    cut=st.integers(0, 200),
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=3),
    behind=st.binary(max_size=3),
)
def test_damaged_bytes_decode_or_are_refused(cut, flips, behind):
    data = bytearray(pack_gains(random_gains(3), SHAPES))
    for at, mask in flips:
        data[at % len(data)] ^= mask
    try:
        found = unpack_gains(bytes(data[: max(1, len(data) - cut)]) + behind, SHAPES)
    except ValueError:
        return
    assert found is not None
    for part, axis in ((found.rows, 0), (found.cols, 1)):
        assert all(len(x) == SHAPES[key][axis] for key, x in part.items())


def test_bytes_behind_the_last_gain_and_a_cut_are_refused():
    data = pack_gains(random_gains(3), SHAPES)
    for bad in (data + b"\0", data[:-1], data[:1], bytes([99]) + data[1:]):
        with pytest.raises(ValueError, match=r"gain|integers|table|entry"):
            unpack_gains(bad, SHAPES)


# precision


def test_the_precision_minimises_bits_and_distortion():
    rng = np.random.default_rng(0)
    rows = {key: 0.2 * rng.standard_normal(shape[0]) for key, shape in SHAPES.items()}
    cols = {key: 0.2 * rng.standard_normal(shape[1]) for key, shape in SHAPES.items()}
    weights = sum(out * n for out, n in SHAPES.values())

    def distortion(gains):
        return 16 * rounding_variance(gains.precision)

    def J(gains, lam):
        return 8 * len(pack_gains(gains, SHAPES)) / weights + lam * distortion(gains)

    chosen = []
    for lam in (0.0, 10.0, 100.0, 1e4, 1e9):
        found = choose_precision(rows, cols, SHAPES, lam, distortion)
        assert J(found, lam) == min(J(quantize_gains(rows, cols, p), lam) for p in GAIN_PRECISIONS)
        chosen.append(found.precision)
    assert chosen == sorted(chosen) and chosen[0] == 8 and chosen[-1] == 64


@precisions
def test_rounded_gains_are_the_nearest_and_add_the_distortion_of_their_model(precision):
    rng = np.random.default_rng(0)
    W, g = rng.standard_normal((80, 60)), rng.uniform(0.5, 2, 80)
    sigma = np.cov(rng.standard_normal((60, 240)))
    signal, added = 0.5 * np.sum(g[:, None] * (W @ sigma) * W), []
    for _ in range(20):
        rows, cols = {(0, "q"): rng.normal(0, 0.5, 80)}, {(0, "q"): rng.normal(0, 0.5, 60)}
        gains = quantize_gains(rows, cols, precision)
        errors = [gains.rows[0, "q"] / precision - rows[0, "q"], gains.cols[0, "q"] / precision - cols[0, "q"]]
        assert max(np.abs(e).max() for e in errors) <= 0.5 / precision + 1e-12
        E = W * (np.exp2(errors[0])[:, None] * np.exp2(errors[1])[None, :] - 1)
        added.append(0.5 * np.sum(g[:, None] * (E @ sigma) * E))
    assert np.mean(added) == pytest.approx(2 * signal * rounding_variance(precision), rel=0.1)
