"""Claims about the entropy coder of trellis indices: round trips, lengths near ideal, damage."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdopt.codec.coders.rans import INTERLEAVED_LANES, Blank, Coder, Lanes, Rans, bits_of_lanes, make_coder
from rdopt.codec.grids.trellis import STATES, next_states, walk_lanes
from rdopt.codec.tables.frequencies import PRECISION

ENDLESS = 1 << 30


def some_coder(rng, classes=3, shifts=(0, 0, 0)) -> Coder:
    """Random tables, two a class, the last symbol of each an escape."""
    tables = []
    for size in rng.integers(2, 40, 2 * classes):
        freq = 1 + rng.multinomial((1 << PRECISION) - size, rng.dirichlet(np.full(size, 0.5)))
        tables.append(freq.astype(np.int64))
    return make_coder(tables, [shift for shift in shifts for _ in range(2)])


def some_lanes(rng, k, states, restart, classes=3) -> Lanes:
    """The lanes of indices with random classes."""
    k = np.ascontiguousarray(k, np.int32)
    return Lanes(k, rng.integers(0, classes, k.shape).astype(np.int16), walk_lanes(k, states, restart)[1])


def decoded(rans, data, parts, states, restart):
    blanks = [Blank(np.full_like(x.k, 77), x.classes, restart) for x in parts]
    rans.decode(data, blanks, next_states(states))
    return [x.k for x in blanks]


@given(
    shapes=st.lists(st.tuples(st.integers(1, 2 * INTERLEAVED_LANES + 1), st.integers(1, 12)), min_size=1, max_size=3),
    states=st.sampled_from(STATES),
    restart=st.sampled_from([1, 5, ENDLESS]),
    shifts=st.tuples(*[st.integers(0, 12)] * 3),
    scale=st.sampled_from([0.3, 3.0, 300.0, 1e6]),
    seed=st.integers(0, 1000),
)
def test_decoding_inverts_encoding(shapes, states, restart, shifts, scale, seed):
    """Any number of lanes and pieces, escapes, raw bits, huge magnitudes."""
    rng = np.random.default_rng(seed)
    rans = Rans(some_coder(rng, shifts=shifts))
    parts = [some_lanes(rng, np.rint(scale * rng.standard_cauchy(s)).clip(-1e9, 1e9), states, restart) for s in shapes]
    data = rans.encode(parts)
    for part, k in zip(parts, decoded(rans, data, parts, states, restart), strict=True):
        np.testing.assert_array_equal(k, part.k)


@pytest.mark.parametrize("value", [1, 255, 65_535, 65_536, 10**9, (1 << 30) - 1])
@pytest.mark.parametrize("shift", [0, 3, 16])
def test_magnitudes_up_to_the_largest_survive(value, shift):
    rng = np.random.default_rng(0)
    rans = Rans(some_coder(rng, shifts=(shift,) * 3))
    lanes = some_lanes(rng, np.array([[value, -value, 0], [0, value - 1, 1 - value]]), 8, ENDLESS)
    np.testing.assert_array_equal(decoded(rans, rans.encode([lanes]), [lanes], 8, ENDLESS)[0], lanes.k)


@pytest.mark.parametrize("shape", [(1, 1 << 18), (1 << 9, 1 << 9), (INTERLEAVED_LANES + 3, 1 << 14)])
@pytest.mark.parametrize("shift", [0, 2])
def test_the_bytes_are_the_ideal_length_within_half_a_percent(shape, shift):
    rng = np.random.default_rng(0)
    coder = some_coder(rng, shifts=(shift,) * 3)
    rans = Rans(coder)
    lanes = some_lanes(rng, np.rint(3 * rng.standard_normal(shape)), 8, ENDLESS)
    ideal = bits_of_lanes(*lanes, rans.lengths(), coder.symbols, coder.shift)
    # 32 bits a state begin the string, 16 of them hold symbols.
    assert 8 * len(rans.encode([lanes])) == pytest.approx(ideal, rel=0.005)


def test_the_ideal_length_is_the_sum_over_symbols():
    rng = np.random.default_rng(1)
    coder = some_coder(rng, shifts=(0, 1, 5))
    lanes = some_lanes(rng, np.rint(20 * rng.standard_cauchy((5, 40))), 8, ENDLESS)
    expected = 0.0
    for k, c, grid in zip(*(x.ravel().tolist() for x in lanes), strict=True):
        table = 2 * c + grid
        freq = np.diff(coder.start[table].astype(np.int64))
        symbol, last = abs(k) >> coder.shift[table], coder.symbols[table] - 1
        expected += coder.shift[table] + (k != 0) + PRECISION - np.log2(freq[min(symbol, last)])
        if symbol >= last:
            expected += 5 + int(symbol - last + 1).bit_length() - 1
    assert bits_of_lanes(*lanes, Rans(coder).lengths(), coder.symbols, coder.shift) == pytest.approx(expected)


def test_symbols_of_their_tables_cost_their_entropy():
    """Magnitudes drawn from the tables themselves: bits an index = entropy + sign."""
    rng = np.random.default_rng(2)
    freq = np.array([6000, 5000, 3000, 2000, 383, 1])
    coder = make_coder([freq, freq], [0, 0])
    magnitude = rng.choice(5, (64, 4096), p=freq[:5] / freq[:5].sum())
    lanes = some_lanes(rng, magnitude * rng.choice([-1, 1], magnitude.shape), 8, ENDLESS, classes=1)
    p = freq / freq.sum()
    entropy = -np.sum(p * np.log2(p)) + 1 - p[0]
    assert 8 * len(Rans(coder).encode([lanes])) / lanes.k.size == pytest.approx(entropy, rel=0.005)


# damage


def sound():
    rng = np.random.default_rng(3)
    rans = Rans(some_coder(rng, shifts=(0, 2, 0)))
    lanes = some_lanes(rng, np.rint(4 * rng.standard_normal((11, 30))), 8, ENDLESS)
    return rans, rans.encode([lanes]), lanes


def test_every_missing_or_extra_word_is_a_value_error():
    rans, data, lanes = sound()
    damaged = [data[:length] for length in range(0, len(data), 2)]
    for bad in (*damaged, data + b"\0\0", data + b"\1\0", data + data):
        with pytest.raises(ValueError, match="segment of the codes"):
            decoded(rans, bad, [lanes], 8, ENDLESS)


@given(at=st.integers(0, 10**6), flip=st.integers(1, 255))
def test_a_flipped_byte_is_a_value_error_or_other_indices(at, flip):
    """The states at the end must be those that the encoder began with, which damage rarely hits."""
    rans, data, lanes = sound()
    bad = bytearray(data)
    bad[at % len(data)] ^= flip
    try:
        (k,) = decoded(rans, bytes(bad), [lanes], 8, ENDLESS)
    except ValueError:
        return
    assert (k != lanes.k).any()


def test_zeros_and_ones_are_no_segment():
    rans, data, lanes = sound()
    for fill in (b"\0", b"\xff"):
        with pytest.raises(ValueError, match="segment of the codes"):
            decoded(rans, fill * len(data), [lanes], 8, ENDLESS)
