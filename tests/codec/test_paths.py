"""Claims about the streams of trellis-coded matrices: they read back, plans are described in a few bytes."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rdopt.codec.coders.bits import BitReader, BitWriter
from rdopt.codec.coders.order import Order, from_lanes, restart, to_lanes
from rdopt.codec.coders.rans import INTERLEAVED_LANES
from rdopt.codec.grids.trellis import STATES, TrellisPath, walk_lanes
from rdopt.codec.streams import paths as stream
from rdopt.codec.streams.paths import pack_trellis, segments, unpack_trellis
from rdopt.codec.tables.classes import rank1_spreads
from rdopt.codec.tables.trellis import (
    SPREAD_PRECISIONS,
    TrellisPlan,
    fit_plan,
    rate_table,
    read_shapes,
    starting_plan,
    write_shapes,
)

SHAPES = [(1, 1), (24, 9), (9, 24), (300, 17), (40, 33)]
ORDERS: list[Order] = ["columns", "diagonals", "columns", "columns", "diagonals"]


def random_path(rng, shape, order, states, scale=3.0):
    """Indices whose spread varies by row and column, with the values and grids of the trellis."""
    spread = scale * np.exp(0.5 * rng.standard_normal(shape[0])[:, None] + 0.5 * rng.standard_normal(shape[1]))
    k = to_lanes(np.rint(spread * rng.standard_normal(shape) / 2).astype(np.int32), order)
    values, grids = walk_lanes(k, states, restart(order))
    return TrellisPath(*(from_lanes(x, order) for x in (k, values, grids, values.astype(np.float32))))


def fitted(paths, orders, states=8):
    return fit_plan([x.k for x in paths], orders, states, [rank1_spreads(x.values) for x in paths])


@functools.cache
def packed(scale=3.0):
    rng = np.random.default_rng(0)
    paths = [random_path(rng, *x, 8, scale) for x in zip(SHAPES, ORDERS, strict=True)]
    plan = fitted(paths, ORDERS)
    return paths, plan, pack_trellis([x.k for x in paths], ORDERS, plan, 8, 1)


def unpacked(found, plan, index=None, threads=1, shapes=SHAPES, **streams):
    out = BitWriter()
    out.gammas(found.numbers if index is None else index)
    codes, tables = streams.get("codes", found.codes), streams.get("tables", found.tables)
    return unpack_trellis(codes, tables, plan.spreads, BitReader(out.bytes()), shapes, threads)


# segments


@given(
    shapes=st.lists(st.tuples(st.integers(1, 900), st.integers(1, 900)), min_size=1, max_size=6),
    size=st.integers(1, 5000),
)
def test_segments_hold_every_lane_once_in_order_and_are_no_larger_than_told(shapes, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "SEGMENT_SIZE", size)
        cuts = segments(shapes)
    lanes = [(p.matrix, lane) for pieces in cuts for p in pieces for lane in range(p.first, p.last)]
    assert lanes == [(i, lane) for i, (_, n) in enumerate(shapes) for lane in range(n)]
    sizes = [sum((p.last - p.first) * shapes[p.matrix][0] for p in pieces) for pieces in cuts]
    assert all(x >= size for x in sizes[:-1])
    assert max(sizes) < size + (INTERLEAVED_LANES + 1) * max(m for m, _ in shapes)
    # All pieces of a matrix but its last are whole groups of lanes that are coded in turn.
    assert all((p.last - p.first) % INTERLEAVED_LANES == 0 or p.last == shapes[p.matrix][1] for c in cuts for p in c)


# round trips


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("size", [100, 1 << 18])
def test_matrices_of_any_shape_and_order_read_back_for_any_number_of_threads(monkeypatch, states, size):
    monkeypatch.setattr(stream, "SEGMENT_SIZE", size)
    rng, plan = np.random.default_rng(states), packed()[1]
    paths = [random_path(rng, *x, states) for x in zip(SHAPES, ORDERS, strict=True)]
    one, four = (pack_trellis([x.k for x in paths], ORDERS, plan, states, threads) for threads in (1, 4))
    assert one == four
    for threads in (1, 4):
        for path, found in zip(paths, unpacked(one, plan, threads=threads), strict=True):
            np.testing.assert_array_equal(found.indices, path.k)
            np.testing.assert_array_equal(found.values, path.values)
    assert sum(x.bits for x in unpacked(one, plan)) == pytest.approx(8 * len(one.codes))


@pytest.mark.parametrize("scale", [0.05, 1.0, 50.0, 3000.0])
def test_codes_are_near_their_ideal_length_at_any_spread(scale):
    paths, plan, found = packed(scale=scale)
    states = 4 * INTERLEAVED_LANES
    assert 8 * (len(found.codes) - states) == pytest.approx(found.bits, rel=0.01, abs=16 * INTERLEAVED_LANES)
    for path, matrix in zip(paths, unpacked(found, plan), strict=True):
        np.testing.assert_array_equal(matrix.indices, path.k)


def test_codes_are_not_longer_than_the_entropy_of_gaussian_indices_on_known_spreads():
    """Both grids have spacing two: the entropy of a bin of a Gaussian, by its closed form at high rate."""
    rng = np.random.default_rng(0)
    paths = []
    for scale in (8.0, 20.0):
        k = np.rint(scale * rng.standard_normal((512, 128)) / 2).astype(np.int32).T.copy()
        values, grids = walk_lanes(k, 8, restart("columns"))
        paths.append(TrellisPath(k.T, values.T, grids.T, values.T.astype(np.float32)))
    orders: list[Order] = ["columns", "columns"]
    found = pack_trellis([x.k for x in paths], orders, fitted(paths, orders), 8, 1)
    entropy = np.mean([0.5 * np.log2(2 * np.pi * np.e) + np.log2(s / 2) for s in (8.0, 20.0)])
    bits = 8 * (len(found.codes) + len(found.tables)) / sum(p.k.size for p in paths)
    assert bits == pytest.approx(entropy, rel=0.01)


# damage


@given(kind=st.sampled_from(["codes", "tables"]), at=st.integers(0, 10**6), flip=st.integers(1, 255))
@settings(max_examples=100)
def test_damaged_streams_are_a_value_error_or_other_indices_of_the_same_shape(kind, at, flip):
    _, plan, found = packed(scale=1.0)
    bad = bytearray(getattr(found, kind))
    bad[at % len(bad)] ^= flip
    try:
        matrices = unpacked(found._replace(**{kind: bytes(bad)}), plan)
    except ValueError:
        return
    assert [m.values.shape for m in matrices] == SHAPES


def test_codes_of_another_length_are_a_value_error():
    _, plan, found = packed()
    for codes in (b"", found.codes[:-2], found.codes + b"\0\0", found.codes[2:]):
        with pytest.raises(ValueError, match="the codes"):
            unpacked(found, plan, codes=codes)


def test_an_index_of_another_trellis_is_a_value_error():
    _, plan, found = packed()
    precision, states, *rest = found.numbers
    assert (precision, states) == (SPREAD_PRECISIONS.index(plan.precision), 8)
    for index, match in (((99, 8, *rest), "precision"), ((precision, 7, *rest), "7 states"), ((precision,), "ends")):
        with pytest.raises(ValueError, match=match):
            unpacked(found, plan, index=index)


# plans


def test_the_chosen_precision_is_the_one_with_the_fewest_bits():
    """Spreads that vary deserve classes, spreads that do not deserve none."""
    rng = np.random.default_rng(0)
    varied = [random_path(rng, (200, 150), "columns", 8)]
    assert fitted(varied, ["columns"]).precision > 0
    k = np.rint(1.5 * rng.standard_normal((60, 50))).astype(np.int32)
    values, grids = walk_lanes(k.T.copy(), 8, restart("columns"))
    path = TrellisPath(k, values.T, grids.T, values.T.astype(np.float32))
    assert fitted([path], ["columns"]).precision == 0


def test_shapes_read_back_and_damaged_ones_are_a_value_error():
    _, plan, found = packed()
    bare = TrellisPlan(plan.precision, plan.spreads, {})
    assert read_shapes(write_shapes(plan), bare).shapes == plan.shapes
    for bad in (b"", found.tables[:1], b"\0" * 8, b"\1" * len(found.tables)):
        with pytest.raises(ValueError):
            read_shapes(bad, bare)


def test_the_trellis_sees_the_code_lengths_of_the_integer_tables():
    _, plan, _ = packed(scale=1.0)
    bits, low = rate_table(plan)
    coder, keys = plan.coder(), plan.keys()
    assert low == keys[0] and bits.shape[:2] == (keys[-1] - keys[0] + 1, 2)
    for place, key in enumerate(keys):
        for grid in range(2):
            row = 2 * place + grid
            freq = np.diff(coder.start[row].astype(np.int64))[: coder.symbols[row] - 1]
            if key >= 5 * max(plan.precision, 1):
                assert not bits[key - low, grid].any()
                continue
            common = np.flatnonzero(freq > 100)
            expected = 14 - np.log2(freq[common]) + (common > 0)
            np.testing.assert_allclose(bits[key - low, grid, common], expected, atol=0.05)


def test_a_plan_before_the_first_pass_has_classes_of_the_expected_spreads():
    rho, kappa = np.array([1.0, 2.0, 0.5]), np.array([4.0, 1.0])
    plan = starting_plan([(rho, kappa)])
    expected = plan.precision * np.log2(np.outer(rho, kappa))
    keys = plan.keys()
    np.testing.assert_array_equal(np.array(keys)[plan.tables_of(0, keys, "columns")], expected.T)
