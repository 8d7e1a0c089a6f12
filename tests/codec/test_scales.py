"""Claims about lists of smooth integers: they come back, smoothness and relatives pay, damage is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdopt.codec.coders.constriction import pack_lists
from rdopt.codec.coders.logistic import (
    LEVEL_OF_ONE,
    LEVELS,
    MAX_ENTRY,
    ONE,
    PER_OCTAVE,
    first_energy,
    laws,
    level_of,
)
from rdopt.codec.streams.scales import pack_scales, unpack_scales
from rdopt.codec.streams.smooth_lists import (
    LAGS,
    Model,
    _predictor,
    _running_mean,
    cosine_mode,
    fit_model,
    pack_families,
    unpack_families,
)
from rdopt.codec.tables.classes import Spreads
from rdopt.codec.tables.frequencies import PRECISION

SHAPES = {(layer, name): shape for layer in range(3) for name, shape in {"q": (24, 16), "down": (16, 40)}.items()}
WIDTHS = {(layer, name): n for layer in range(3) for name, n in {"attn": 16, "down": 40}.items()}


def sizes_of(families):
    return [(len(lists), len(lists[0])) for lists in families]


def as_lists(families):
    return [[x.tolist() for x in lists] for lists in families]


def random_scales(seed, spread=4.0):
    rng = np.random.default_rng(seed)

    def ints(n):
        return np.rint(spread * rng.standard_normal(n)).astype(np.int32)

    rows = {key: ints(m) for key, (m, _) in SHAPES.items()}
    cols = {key: ints(n) for key, n in WIDTHS.items()}
    return rows, cols, {key: Spreads(ints(m), ints(n)) for key, (m, n) in SHAPES.items()}


entries = st.one_of(st.integers(-6, 6), st.integers(-MAX_ENTRY // 4, MAX_ENTRY // 4))


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 12)), max_size=4), st.data())
def test_any_families_come_back(sizes, data):
    families = [
        [np.array(data.draw(st.lists(entries, min_size=n, max_size=n)), np.int32) for _ in range(count)]
        for count, n in sizes
    ]
    found, rest = unpack_families(pack_families(families) + b"tail", sizes)
    assert as_lists(found) == as_lists(families)
    assert rest == b"tail"


def test_scales_come_back_by_key():
    rows, cols, spreads = random_scales(0)
    found = unpack_scales(pack_scales(rows, cols, spreads), SHAPES, WIDTHS)
    for part, back in zip((rows, cols), found[:2], strict=True):
        assert list(part) == list(back)
        assert all(np.array_equal(part[key], back[key]) for key in part)
    for key, (row, col) in spreads.items():
        assert np.array_equal(found[2][key].row, row)
        assert np.array_equal(found[2][key].col, col)


def test_the_same_scales_give_the_same_bytes():
    assert pack_scales(*random_scales(1)) == pack_scales(*random_scales(1))


def test_frequencies_fill_their_total_and_leave_no_symbol_out():
    start, reach = laws()
    for level in range(LEVELS):
        symbols = 2 * int(reach[level]) + 3
        freq = np.diff(start[level].astype(np.int64), axis=1)
        assert np.all(freq[:, :symbols] >= 1)
        assert np.all(freq.sum(axis=1) == 1 << PRECISION)


@pytest.mark.parametrize("level", [LEVEL_OF_ONE - PER_OCTAVE, LEVEL_OF_ONE, LEVEL_OF_ONE + 2 * PER_OCTAVE])
def test_laws_are_logistic_with_the_mean_error_of_their_level(level):
    """A logistic density of scale s has E|x| = 2 s ln 2, and F(t) = 1 / (1 + exp(-t / s))."""
    start, reach = laws()
    s = 2.0 ** ((level - LEVEL_OF_ONE) / PER_OCTAVE) / (2 * np.log(2))
    for fraction in (0, 5):
        edges = np.arange(-int(reach[level]), int(reach[level]) + 3) - 0.5 - fraction / ONE
        masses = np.diff(1 / (1 + np.exp(-edges / s)))
        freq = np.diff(start[level, fraction].astype(float))[: len(masses)]
        np.testing.assert_allclose(freq / 2**PRECISION, masses, atol=(len(masses) + 4) / 2**PRECISION)


def test_cosine_modes_are_cosines():
    for n in (1, 7, 192):
        for mode in (1, 2, 3):
            exact = 8 * ONE * np.cos(np.pi * mode * (np.arange(n) + 0.5) / n)
            np.testing.assert_allclose(cosine_mode(mode, n), exact, atol=0.6)


def test_the_running_mean_is_that_of_the_entries_before():
    x = np.array([3, -1, 4, 1, -5, 9, 2, 6, 5, 3, 5])
    expected = [0.0] + [float(np.mean(x[max(0, t - 8) : t])) for t in range(1, len(x))]
    np.testing.assert_allclose(_running_mean(x), expected)


def test_a_family_that_repeats_another_is_predicted_from_it():
    rng = np.random.default_rng(2)
    first = [rng.integers(-9, 10, 50) for _ in range(3)]
    model = fit_model([2 * x for x in first], [first])
    known = _predictor(1, 50, [2 * first[0]], [first], model).known
    assert np.max(np.abs(known / ONE**2 - 2 * first[1])) < 0.5
    assert model.level < LEVEL_OF_ONE


def test_noise_is_predicted_from_nothing():
    rng = np.random.default_rng(3)
    lists = [rng.integers(-9, 10, 60) for _ in range(4)]
    assert fit_model(lists, []).features == ()


def test_all_zeros_cost_next_to_nothing():
    assert len(pack_families([[np.zeros(4000, np.int32)] * 3])) < 16


def test_constant_lists_cost_their_bases():
    assert len(pack_families([[np.full(500, 40 + i, np.int32) for i in range(4)]])) < 24


def test_noise_costs_about_its_entropy():
    rng = np.random.default_rng(4)
    x = np.rint(3 * rng.logistic(size=(4, 2000))).astype(np.int32)
    _, counts = np.unique(x, return_counts=True)
    ideal = float(-np.sum(counts * np.log2(counts / x.size)))
    assert 8 * len(pack_families([list(x)])) < 1.03 * ideal


def test_smooth_lists_and_their_relatives_cost_less_than_differences_to_medians():
    rng = np.random.default_rng(5)
    fall = np.rint(30 * np.exp(-np.arange(192) / 60)).astype(np.int32)
    steps = [fall + rng.integers(-1, 2, 192).astype(np.int32) for _ in range(4)]
    spreads = [-x + rng.integers(-1, 2, 192).astype(np.int32) for x in steps]
    apart = len(pack_lists(steps)) + len(pack_lists(spreads))
    assert len(pack_families([steps, spreads])) < 0.6 * apart
    # The spreads follow the steps of their channel up to three equiprobable values.
    extra = len(pack_families([steps, spreads])) - len(pack_families([steps]))
    assert 8 * extra < 1.25 * 4 * 192 * np.log2(3)


def test_levels_invert_mean_errors():
    for level in range(LEVELS):
        assert level_of(2.0 ** ((level - LEVEL_OF_ONE) / PER_OCTAVE)) == level
    assert first_energy(LEVEL_OF_ONE) == 256
    assert first_energy(LEVEL_OF_ONE + PER_OCTAVE) == 512


def test_lags_are_in_the_units_of_the_other_features():
    model = Model((1 + LAGS.index(2), 1 + len(LAGS)), (8, 16), 40)
    p = _predictor(0, 5, [], [], model)
    assert p.lags.tolist() == [2]
    assert p.weights.tolist() == [8]
    assert p.known.tolist() == [ONE * ONE] * 5


def test_entries_beyond_the_limit_are_refused():
    with pytest.raises(ValueError, match="differ by more"):
        pack_families([[np.array([0, 0, 2 * MAX_ENTRY], np.int64)]])


@given(st.binary(max_size=60))
def test_noise_in_place_of_bytes_is_refused_or_gives_bounded_lists(data):
    try:
        found, _ = unpack_families(data, [(2, 9), (2, 9)])
    except ValueError:
        return
    assert sizes_of(found) == [(2, 9), (2, 9)]


def test_missing_and_surplus_bytes_are_refused():
    data = pack_scales(*random_scales(6))
    with pytest.raises(ValueError):
        unpack_scales(data + b"\0", SHAPES, WIDTHS)
    for cut in range(0, len(data), 7):
        with pytest.raises(ValueError):
            unpack_scales(data[:cut], SHAPES, WIDTHS)


def test_an_altered_word_is_noticed_or_changes_the_lists():
    scales = random_scales(7)
    data = bytearray(pack_scales(*scales))
    data[-9] ^= 0x40
    try:
        rows, cols, _ = unpack_scales(bytes(data), SHAPES, WIDTHS)
    except ValueError:
        return
    old = np.concatenate([*scales[0].values(), *scales[1].values()])
    assert not np.array_equal(old, np.concatenate([*rows.values(), *cols.values()]))
