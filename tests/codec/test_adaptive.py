"""Claims about the entropy coders of trellis indices: adaptive binary, rANS, and the streams all of them share."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_huffman import MIDDLES, blank_of, coder_of, lanes_of

from rdopt.codec.coders.adaptive import CUT, Binary, starting_contexts
from rdopt.codec.coders.bits import BitReader, BitWriter
from rdopt.codec.coders.order import Order, restart
from rdopt.codec.coders.rans import LARGEST, Lanes, Rans, bits_of_lanes
from rdopt.codec.coders.registry import CODERS
from rdopt.codec.grids.trellis import TrellisPath, next_states, walk_lanes
from rdopt.codec.streams.paths import pack_trellis, unpack_trellis
from rdopt.codec.tables.classes import rank1_spreads
from rdopt.codec.tables.frequencies import PRECISION
from rdopt.codec.tables.trellis import fit_plan, starting_plan
from rdopt.config.errors import UserError
from rdopt.config.schema import EncodeConfig

every_coder = pytest.mark.parametrize("name", list(CODERS))


def paths_of(shapes, states=8):
    rng, paths = np.random.default_rng(0), []
    for shape in shapes:
        k = np.rint(3 * rng.standard_normal(shape) * np.exp(rng.standard_normal(shape[1]))).astype(np.int32)
        values, grids = walk_lanes(np.ascontiguousarray(k.T), states, restart("columns"))
        paths.append(TrellisPath(k, values.T, grids.T, values.T.astype(np.float32)))
    return paths


def fitted(paths):
    orders: list[Order] = ["columns"] * len(paths)
    return fit_plan([x.k for x in paths], orders, 8, [rank1_spreads(x.values) for x in paths])


def unpacked(packed, plan, shapes):
    head = BitWriter()
    head.gammas(packed.numbers)
    return unpack_trellis(packed.codes, packed.tables, plan.spreads, BitReader(head.bytes()), shapes, 1)


@every_coder
@pytest.mark.parametrize("states", [1, 8, 64])
def test_segments_come_back(name, states):
    coder = CODERS[name](coder_of())
    parts = [lanes_of(1, states=states), lanes_of(2, (1, 1), states), lanes_of(3, (3, 257), states)]
    blanks = [blank_of(part) for part in parts]
    coder.decode(coder.encode(parts), blanks, next_states(states))
    for part, blank in zip(parts, blanks, strict=True):
        np.testing.assert_array_equal(blank.k, part.k)


@every_coder
def test_matrices_come_back_from_their_streams(name):
    shapes = [(300, 9), (7, 40), (1, 1)]
    paths = paths_of(shapes)
    plan = fitted(paths)
    packed = pack_trellis([x.k for x in paths], ["columns", "columns", "columns"], plan, 8, 1, name)
    for path, found in zip(paths, unpacked(packed, plan, shapes), strict=True):
        np.testing.assert_array_equal(found.indices, path.k)
        np.testing.assert_array_equal(found.values, path.values)


@every_coder
@given(st.integers(0, 2**32), st.integers(1, 20))
def test_damage_raises_or_gives_indices_that_fit(name, seed, flips):
    coder, lanes = CODERS[name](coder_of()), lanes_of(5, (9, 60))
    rng = np.random.default_rng(seed)
    data = bytearray(coder.encode([lanes])[: None if flips % 2 else int(rng.integers(0, 300))])
    for at in rng.integers(0, max(len(data), 1), flips if data else 0):
        data[at] ^= int(rng.integers(1, 256))
    blank = blank_of(lanes)
    try:
        coder.decode(bytes(data), [blank], next_states(8))
    except ValueError:
        return
    assert np.abs(blank.k.astype(np.int64)).max() <= LARGEST


@every_coder
def test_random_bytes_raise_or_give_indices_that_fit(name):
    rng, coder, lanes = np.random.default_rng(0), CODERS[name](coder_of()), lanes_of(6, (9, 40))
    for _ in range(200):
        blank = blank_of(lanes)
        try:
            coder.decode(rng.bytes(2 * int(rng.integers(0, 600))), [blank], next_states(8))
        except ValueError:
            continue
        assert np.abs(blank.k.astype(np.int64)).max() <= LARGEST


@every_coder
def test_a_shorter_segment_is_refused(name):
    coder, lanes = CODERS[name](coder_of()), lanes_of(7)
    data = coder.encode([lanes])
    for keep in (0, 4, len(data) // 4 * 2, len(data) - 2):
        with pytest.raises(ValueError, match="segment of the codes"):
            coder.decode(data[:keep], [blank_of(lanes)], next_states(8))


def test_an_unknown_coder_number_is_refused():
    paths = paths_of([(20, 5)])
    plan = fitted(paths)
    packed = pack_trellis([x.k for x in paths], ["columns"], plan, 8, 1)
    index = (*packed.numbers[:3], len(CODERS), *packed.numbers[4:])
    with pytest.raises(ValueError, match="entropy coder number 3"):
        unpacked(packed._replace(numbers=index), plan, [(20, 5)])


def test_spreads_beyond_any_table_are_refused_as_a_sentence():
    paths = paths_of([(20, 5)])
    plan = starting_plan([(np.full(20, 2.0**40), np.ones(5))])
    with pytest.raises(UserError, match="too fine"):
        pack_trellis([x.k for x in paths], ["columns"], plan, 8, 1)
    packed = pack_trellis([x.k for x in paths], ["columns"], fitted(paths), 8, 1)
    with pytest.raises(ValueError, match=r"2\^40 steps"):
        wide = plan._replace(precision=1, spreads=[s._replace(row=s.row // 4) for s in plan.spreads])
        unpacked(packed._replace(numbers=(3, *packed.numbers[1:])), wide, [(20, 5)])


def test_starting_contexts_are_the_conditional_probabilities_of_the_tables():
    coder, contexts = coder_of(), starting_contexts(coder_of())
    assert len(contexts) == 2 * len(MIDDLES)
    for row, symbols in enumerate(coder.symbols):
        p = np.diff(coder.start[row, : symbols + 1].astype(np.int64)) / (1 << PRECISION)
        for place in range(min(CUT, symbols)):
            expected = p[place] / p[place:].sum()
            assert contexts[row, place] == pytest.approx(np.clip(expected, 1e-3, 1 - 1e-3) * 65536, abs=2)
        if symbols > CUT + 5:  # the prefix's first flag: exactly CUT; the bit behind the second: CUT + 1 or + 2
            assert contexts[row, CUT] == pytest.approx(65536 * p[CUT] / p[CUT:].sum(), abs=1)
            one, two = p[CUT + 1], p[CUT + 2]
            assert contexts[row, CUT + 9] == pytest.approx(65536 * one / (one + two), abs=1)


def drawn(scale):
    """Indices drawn from the tables themselves, at one class, with the tables' spread times `scale`."""
    rng, coder = np.random.default_rng(8), coder_of()
    classes = np.full((64, 2000), 2, np.int16)
    k = np.rint(rng.standard_normal(classes.shape) * scale * 2.0 ** (9 / 4 - 1)).astype(np.int32)
    return coder, Lanes(k, classes, walk_lanes(k, 1, 256)[1])


def test_contexts_that_learn_beat_tables_that_do_not_fit():
    coder, lanes = drawn(0.4)
    assert len(Binary(coder).encode([lanes])) < 0.9 * len(Rans(coder).encode([lanes]))


def test_contexts_that_learn_cost_little_where_the_tables_fit():
    coder, lanes = drawn(1.0)
    assert len(Binary(coder).encode([lanes])) < 1.01 * len(Rans(coder).encode([lanes]))


def test_rans_takes_the_bits_its_tables_promise():
    coder, lanes = drawn(1.0)
    rans = Rans(coder)
    bits = bits_of_lanes(*lanes, rans.lengths(), coder.symbols, coder.shift)
    assert 8 * len(rans.encode([lanes])) == pytest.approx(bits, rel=0.002)


def test_the_configuration_names_the_coders():
    assert EncodeConfig().coder == "rans"
    assert [EncodeConfig(coder=name).coder for name in CODERS] == list(CODERS)
    with pytest.raises(UserError, match=r"encode\.coder"):
        EncodeConfig(coder="zip")  # pyright: ignore[reportArgumentType]
