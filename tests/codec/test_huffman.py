"""Claims about Huffman coding of trellis indices: optimal lengths, prefix codes, lossless segments, damage."""

import heapq
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdopt.codec.coders.huffman import MAX_LENGTH, Huffman, code_sizes, make_codes
from rdopt.codec.coders.rans import Blank, Lanes, bits_of_lanes, make_coder
from rdopt.codec.grids.trellis import next_states, walk_lanes
from rdopt.codec.tables.frequencies import PRECISION
from rdopt.codec.tables.trellis import TrellisShape, raw_bits, table

MIDDLES = [(-9, 4), (1, 4), (9, 4), (17, 4), (31, 4)]  # the last one has raw bits


def coder_of():
    tables = [table(TrellisShape(), grid, middle) for middle in MIDDLES for grid in range(2)]
    return make_coder(tables, [raw_bits(middle) for middle in MIDDLES for _ in range(2)])


def lanes_of(seed, shape=(11, 300), states=8, outliers=5):
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, len(MIDDLES), shape).astype(np.int16)
    spread = 2.0 ** np.array([a / b - 1 for a, b in MIDDLES])[classes]
    k = np.rint(rng.standard_normal(shape) * spread).astype(np.int32)
    k.ravel()[rng.integers(0, k.size, outliers)] = rng.integers(-(1 << 20), 1 << 20, outliers)
    return Lanes(k, classes, walk_lanes(k, states, 256)[1])


def blank_of(lanes):
    return Blank(np.full_like(lanes.k, 77), lanes.classes, 256)


def huffman_cost(freq):
    """Cost of the best prefix code without a limit: the sum of all merged weights."""
    heap, cost = [int(f) for f in freq], 0
    heapq.heapify(heap)
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        cost += merged
        heapq.heappush(heap, merged)
    return cost


frequencies = st.lists(st.integers(1, 1 << PRECISION), min_size=2, max_size=230).map(np.array)


@given(frequencies)
def test_lengths_fill_kraft_and_cost_what_huffmans_tree_costs_where_the_limit_does_not_bind(freq):
    sizes = code_sizes(freq)
    assert np.sum(2.0**-sizes) == 1 and sizes.min() >= 1 and sizes.max() <= MAX_LENGTH
    assert np.dot(sizes, freq) >= huffman_cost(freq)
    if sizes.max() < MAX_LENGTH:
        assert np.dot(sizes, freq) == huffman_cost(freq)


def test_the_limit_binds_on_fibonacci_weights_and_costs_little():
    weights = [1, 1]
    while len(weights) < 24:
        weights.append(weights[-1] + weights[-2])
    sizes = code_sizes(np.array(weights))
    assert sizes.max() == MAX_LENGTH and np.sum(2.0**-sizes) == 1
    assert huffman_cost(weights) < np.dot(sizes, weights) < 1.01 * huffman_cost(weights)


def test_no_code_word_begins_another():
    coder = coder_of()
    codes = make_codes(coder)
    for row, symbols in enumerate(coder.symbols):
        words = [format(codes.codes[row, s], f"0{codes.lengths[row, s]}b") for s in range(symbols)]
        ordered = sorted(words)
        assert not any(b.startswith(a) for a, b in itertools.pairwise(ordered))


@pytest.mark.parametrize("states", [1, 8, 64])
def test_segments_come_back(states):
    coder = Huffman(coder_of())
    parts = [lanes_of(1, states=states), lanes_of(2, (1, 1), states), lanes_of(3, (3, 257), states)]
    blanks = [blank_of(part) for part in parts]
    coder.decode(coder.encode(parts), blanks, next_states(states))
    for part, blank in zip(parts, blanks, strict=True):
        np.testing.assert_array_equal(blank.k, part.k)


def test_the_bytes_are_the_code_lengths_rounded_up_to_two():
    coder, tables, lanes = Huffman(coder_of()), coder_of(), lanes_of(4)
    bits = bits_of_lanes(*lanes, coder.lengths(), tables.symbols, tables.shift)
    assert len(coder.encode([lanes])) == 2 * -(-int(bits) // 16)


def test_the_code_is_within_a_bit_of_the_entropy_of_its_tables():
    coder = coder_of()
    p = np.diff(coder.start.astype(np.int64), axis=1) / (1 << PRECISION)
    entropy = -np.sum(p * np.log2(np.where(p > 0, p, 1)), axis=1)
    mean = np.sum(p * Huffman(coder).lengths(), axis=1)
    assert np.all(entropy <= mean) and np.all(mean < entropy + 1)


@given(st.integers(0, 2**32), st.integers(1, 20))
def test_damage_raises_or_gives_indices_that_fit(seed, flips):
    coder, lanes = Huffman(coder_of()), lanes_of(5, (5, 60))
    rng = np.random.default_rng(seed)
    data = bytearray(coder.encode([lanes])[: None if flips % 2 else int(rng.integers(0, 300))])
    for at in rng.integers(0, max(len(data), 1), flips if data else 0):
        data[at] ^= int(rng.integers(1, 256))
    blank = blank_of(lanes)
    try:
        coder.decode(bytes(data), [blank], next_states(8))
    except ValueError:
        return
    assert np.abs(blank.k.astype(np.int64)).max() < 1 << 30


@pytest.mark.parametrize("change", [lambda x: x[:-2], lambda x: x + b"\0\0", lambda x: b"", lambda x: x[:-1]])
def test_a_segment_of_another_length_is_refused(change):
    coder, lanes = Huffman(coder_of()), lanes_of(6)
    with pytest.raises(ValueError, match="last index"):
        coder.decode(change(coder.encode([lanes])), [blank_of(lanes)], next_states(8))
