"""Claims about bits, tables, entropy coding and allocation; entropies and exact integers as oracles."""

from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rdopt.codec.coders.bits import BitReader, BitWriter, unzigzag, zigzag
from rdopt.codec.coders.constriction import (
    decode_indices,
    encode_indices,
    pack_integers,
    pack_lists,
    unpack_integers,
    unpack_lists,
)
from rdopt.codec.grids.steps import STEPS_PER_OCTAVE, exp_steps, log_steps
from rdopt.codec.tables.classes import Spreads, classes_of, log2_spread, pack_spreads, quantize_spreads, rank1_spreads
from rdopt.codec.tables.frequencies import (
    PRECISION,
    ideal_bits,
    normalize,
    probabilities,
    read_table,
    symmetric,
    write_table,
)
from rdopt.codec.tables.uniform import (
    CHOICES,
    UNIFORM_BLENDS,
    UNIFORM_SCALES,
    UniformPlan,
    UniformShape,
    choose_plan,
    derived_table,
    read_tables,
    table_classes,
    write_tables,
)
from rdopt.config.errors import UserError


def matrices(limit=300):
    shapes = hnp.array_shapes(min_dims=2, max_dims=2, max_side=12)
    return hnp.arrays(np.int32, shapes, elements=st.integers(-limit, limit))


def spread_indices(rows=96, columns=80, seed=0, scale=3.0):
    """Indices whose spread is a row scale times a column scale."""
    rng = np.random.default_rng(seed)
    spread = np.outer(np.exp(0.7 * rng.standard_normal(rows)), np.exp(0.7 * rng.standard_normal(columns)))
    return np.rint(scale * spread * rng.standard_normal((rows, columns))).astype(np.int32)


def code(z, plan, i=0):
    return encode_indices(z, table_classes(plan.spreads[i], plan.width), plan.tables)


# bits


@given(values=st.lists(st.integers(0, 2**40)))
def test_gamma_codes_read_back_and_have_their_textbook_length(values):
    out = BitWriter()
    out.gammas(values)
    data = out.bytes()
    length = sum(2 * (v + 1).bit_length() - 1 for v in values)
    assert len(data) == -(-length // 8)
    source = BitReader(data)
    assert source.gammas(len(values)) == values
    assert source.bytes_read == len(data)


def test_small_gamma_codes_are_those_of_elias():
    for value, bits in [(0, "1"), (1, "010"), (2, "011"), (3, "00100"), (7, "0001000")]:
        out = BitWriter()
        out.gamma(value)
        assert int.from_bytes(out.bytes()) == int(bits.ljust(8, "0"), 2)


@given(data=st.binary(max_size=20))
def test_reading_past_the_end_of_any_bytes_is_a_value_error(data):
    source = BitReader(data)
    with pytest.raises(ValueError, match="ends before"):
        source.gammas(8 * len(data) + 1)


@given(value=st.integers(-(2**40), 2**40))
def test_zigzag_is_a_bijection_onto_the_naturals(value):
    assert zigzag(value) >= 0
    assert unzigzag(zigzag(value)) == value
    assert sorted(zigzag(v) for v in range(-5, 5)) == list(range(10))


# tables


counts_lists = hnp.arrays(np.int64, st.integers(1, 300), elements=st.integers(0, 10**6)).filter(np.any)


@given(counts=counts_lists, precision=st.sampled_from([9, 12, 14]))
def test_normalized_tables_sum_to_the_total_and_keep_every_symbol_that_occurs(counts, precision):
    freq = normalize(counts, precision)
    assert freq.sum() == 1 << precision
    np.testing.assert_array_equal(freq > 0, counts > 0)


@given(counts=hnp.arrays(np.int64, st.integers(1, 60), elements=st.integers(4000, 10**6)))
def test_normalized_tables_are_the_counts_to_a_unit_where_none_is_rare(counts):
    assert np.abs(normalize(counts) - counts * 2.0**PRECISION / counts.sum()).max() <= 1


@pytest.mark.parametrize("counts", [np.zeros(3, np.int64), np.ones(513, np.int64)])
def test_a_table_that_cannot_be_is_a_value_error(counts):
    with pytest.raises(ValueError, match="does not fit"):
        normalize(counts, 9)


@given(counts=counts_lists)
def test_the_ideal_length_is_the_entropy_plus_the_divergence_of_the_table(counts):
    freq = normalize(counts)
    n, p, q = counts.sum(), counts / counts.sum(), freq / freq.sum()
    used = counts > 0
    expected = n * (scipy.stats.entropy(p, base=2) + scipy.stats.entropy(p[used], q[used], base=2))
    assert ideal_bits(counts, freq) == pytest.approx(expected, rel=1e-9, abs=1e-6)


@given(counts=counts_lists, low=st.integers(-1000, 1000))
def test_a_table_reads_back(counts, low):
    freq = normalize(counts)
    out = BitWriter()
    write_table(out, low, freq)
    found_low, found = read_table(BitReader(out.bytes()))
    assert found_low == low
    np.testing.assert_array_equal(found, freq)


def test_a_table_of_another_total_is_refused():
    out = BitWriter()
    write_table(out, 0, np.array([1, 2, 3]))
    with pytest.raises(ValueError, match="sums to 6"):
        read_table(BitReader(out.bytes()))


trimmed = counts_lists.map(lambda c: np.trim_zeros(c, "b"))


@given(
    found=st.dictionaries(st.integers(-60, 60), trimmed, max_size=6),
    shape=st.builds(UniformShape, st.integers(0, UNIFORM_BLENDS - 1), st.integers(0, UNIFORM_SCALES - 1)),
    derive=st.booleans(),
)
def test_the_tables_of_a_file_read_back(found, shape, derive):
    explicit = frozenset(found if not derive else list(found)[::2])
    tables = {
        key: normalize(counts) if key in explicit else derived_table(shape, log2_spread(key, 4, 2), len(counts))
        for key, counts in found.items()
    }
    again = read_tables(write_tables(UniformPlan(4, 2, shape, [], tables, explicit, 0.0)), 4, 2)
    assert sorted(again) == sorted(tables)
    for key, freq in tables.items():
        np.testing.assert_array_equal(again[key], freq)


@given(data=st.binary(max_size=60))
def test_arbitrary_bytes_are_tables_or_a_value_error(data):
    try:
        tables = read_tables(data, 4, 1)
    except ValueError:
        return
    assert all(freq.sum() == 1 << PRECISION for freq in tables.values())


@pytest.mark.parametrize("blend", [0, 3, 7])
@pytest.mark.parametrize("key", [-9, 0, 11])
def test_derived_tables_are_the_blend_integrated_over_the_bins(blend, key):
    shape = UniformShape(blend, UNIFORM_SCALES // 2)
    octaves = Fraction(*log2_spread(key, 4, 1))
    s, w, size = 2.0 ** float(octaves), blend / UNIFORM_BLENDS, 200
    edges = np.arange(size) + 0.5
    tail = w * np.exp(-edges / s * np.sqrt(2)) + (1 - w) * 2 * scipy.stats.norm.sf(edges / s)
    mass = np.concatenate([1 - tail[:1], -np.diff(tail)])
    freq = derived_table(shape, log2_spread(key, 4, 1), size)
    assert freq.sum() == 1 << PRECISION and freq.min() >= 1
    np.testing.assert_allclose(freq[1:] - 1, ((1 << PRECISION) - size) * mass[1:], atol=1.1)


@given(freq=counts_lists.map(normalize))
def test_probabilities_are_symmetric_and_sum_to_one_exactly(freq):
    both = probabilities(symmetric(freq))
    assert both.sum() == 1
    np.testing.assert_array_equal(both, both[::-1])
    assert both[len(freq) - 1] == freq[0] / freq.sum()


# entropy


@given(found=st.lists(matrices(), min_size=1, max_size=4), kind=st.sampled_from([np.int16, np.int32]))
def test_decoding_returns_the_indices_of_any_shape_and_range(found, kind):
    found = [z.astype(kind) for z in found]
    plan = choose_plan(found)
    for i, z in enumerate(found):
        data = code(z, plan, i)
        assert len(data) % 4 == 0
        again = decode_indices(data, table_classes(plan.spreads[i], plan.width), plan.tables)
        np.testing.assert_array_equal(again, z)


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0, 30.0, 300.0])
def test_real_code_bytes_are_the_ideal_length(scale):
    z = spread_indices(scale=scale)
    plan = choose_plan([z])
    assert abs(len(code(z, plan)) - plan.bits / 8) <= 0.005 * plan.bits / 8 + 16


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_the_ideal_length_of_a_plan_is_the_sum_over_its_entries(scale):
    z = spread_indices(40, 30, scale=scale)
    plan = choose_plan([z])
    classes = table_classes(plan.spreads[0], plan.width)
    expected = 0.0
    for value, key in zip(z.ravel(), classes.ravel(), strict=True):
        mass = plan.tables[key][abs(value)] / 2**PRECISION
        expected += -np.log2(mass) + (value != 0)
    assert plan.bits == pytest.approx(expected, rel=1e-9)


def test_an_all_zero_matrix_costs_no_code_bytes():
    z = np.zeros((20, 30), np.int32)
    assert code(z, choose_plan([z])) == b""


@given(z=matrices(20), extra=st.binary(min_size=4, max_size=4))
def test_a_stream_with_bytes_added_or_missing_is_a_value_error(z, extra):
    plan = choose_plan([z])
    classes = table_classes(plan.spreads[0], plan.width)
    data = code(z, plan)
    for damaged in (data + extra, data[:-4]):
        if damaged == data:
            continue
        try:
            again = decode_indices(damaged, classes, plan.tables)
        except ValueError:
            continue
        assert not np.array_equal(again, z)  # a shorter stream may be whole, but then it is another matrix


def test_a_class_without_a_table_is_a_value_error():
    with pytest.raises(ValueError, match="class 1 has no table"):
        decode_indices(b"", np.ones((1, 1), np.int32), {})


integer_lists = hnp.arrays(np.int32, st.integers(1, 60), elements=st.integers(-1500, 1500))


@given(values=integer_lists, tail=st.binary(max_size=5))
def test_integers_read_back_and_leave_the_bytes_behind_them(values, tail):
    again, rest = unpack_integers(pack_integers(values) + tail, len(values))
    np.testing.assert_array_equal(again, values)
    assert rest == tail


@given(lists=st.lists(integer_lists, min_size=1, max_size=5), tail=st.binary(max_size=5))
def test_lists_of_integers_read_back_and_leave_the_bytes_behind_them(lists, tail):
    again, rest = unpack_lists(pack_lists(lists) + tail, [len(x) for x in lists])
    for found, expected in zip(again, lists, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert rest == tail


@given(lists=st.lists(integer_lists, min_size=1, max_size=3), data=st.data())
def test_lists_cut_short_are_a_value_error(lists, data):
    packed = pack_lists(lists)
    cut = data.draw(st.integers(0, len(packed) - 1))
    with pytest.raises(ValueError):
        unpack_lists(packed[:cut], [len(x) for x in lists])


def test_lists_cost_their_entropy():
    rng = np.random.default_rng(0)
    lists = [np.rint(2 * rng.standard_normal(4000)).astype(np.int32) + 100 * i for i in range(4)]
    joint = np.concatenate([x - 100 * i for i, x in enumerate(lists)])
    _, counts = np.unique(joint, return_counts=True)
    ideal = joint.size * scipy.stats.entropy(counts, base=2) / 8
    assert len(pack_lists(lists)) <= 1.005 * ideal + 64


# allocation and classes


@given(z=matrices(40), precision=st.integers(0, 8), width=st.integers(1, 3))
def test_classes_are_sums_of_a_row_and_a_column_integer(z, precision, width):
    spreads = quantize_spreads(*rank1_spreads(z), precision)
    classes = classes_of(spreads)
    corner = classes[:1, :1] + classes - classes[:, :1] - classes[:1, :]
    assert classes.shape == z.shape and not corner.any()
    np.testing.assert_array_equal(table_classes(spreads, width), np.floor(classes / width).astype(int))
    if precision == 0:
        assert np.ptp(classes) == 0


def test_spreads_recover_the_scales_that_made_the_indices():
    rng = np.random.default_rng(1)
    rho, kappa = np.exp(0.6 * rng.standard_normal(200)), 30 * np.exp(0.6 * rng.standard_normal(150))
    z = np.rint(np.outer(rho, kappa) * rng.standard_normal((200, 150))).astype(np.int32)
    found = np.outer(*rank1_spreads(z))
    error = np.log2(found / np.outer(rho, kappa))
    sampling = np.sqrt(1 / (2 * 150) + 1 / (2 * 200)) / np.log(2)  # of two root mean squares
    assert error.std() < 1.2 * sampling and np.abs(error).max() < 5 * sampling


def test_spreads_are_the_maximum_of_the_gaussian_likelihood():
    z = spread_indices(50, 40, scale=20.0)
    rho, kappa = rank1_spreads(z, iterations=200)
    ratio = z.astype(float) ** 2 / np.outer(rho, kappa) ** 2
    np.testing.assert_allclose(ratio.mean(axis=0), 1, atol=1e-6)  # both gradients of the likelihood vanish
    np.testing.assert_allclose(ratio.mean(axis=1), 1, atol=1e-6)


def test_the_chosen_plan_is_the_cheapest_in_real_bytes():
    found = [spread_indices(seed=s) for s in range(3)]
    best = choose_plan(found)

    def price(precision, width):
        spreads = [quantize_spreads(*rank1_spreads(z), precision) for z in found]
        joint: dict[int, list[int]] = {}
        for z, s in zip(found, spreads, strict=True):
            for value, key in zip(z.ravel(), table_classes(s, width).ravel(), strict=True):
                joint.setdefault(int(key), []).append(int(value))
        tables = {key: normalize(np.bincount(np.abs(v))) for key, v in joint.items()}
        pairs = zip(found, spreads, strict=True)
        codes = b"".join(encode_indices(z, table_classes(s, width), tables) for z, s in pairs)
        explicit = UniformPlan(precision, width, UniformShape(0, 0), spreads, tables, frozenset(tables), 0.0)
        return len(codes) + len(write_tables(explicit)) + len(pack_spreads(spreads))

    cheapest = min(price(*choice) for choice in CHOICES)
    codes = b"".join(
        encode_indices(z, table_classes(s, best.width), best.tables)
        for z, s in zip(found, best.spreads, strict=True)
    )
    # Derived tables are taken only where they save bits, so all-explicit plans are never cheaper.
    assert len(codes) + len(write_tables(best)) + len(pack_spreads(best.spreads)) <= cheapest + 16


def test_classes_pay_where_spreads_differ_and_are_dropped_where_they_do_not():
    flat = np.rint(3 * np.random.default_rng(0).standard_normal((96, 80))).astype(np.int32)
    assert choose_plan([flat]).precision == 0
    assert choose_plan([spread_indices()]).precision > 0


@pytest.mark.parametrize("scale", [1e4, 1e8])
def test_steps_too_fine_for_any_table_are_a_user_error(scale):
    z = np.rint(scale * np.random.default_rng(0).standard_normal((300, 300))).astype(np.int32)
    with pytest.raises(UserError, match=r"an index reaches \d+, .* lower encode\.lam"):
        choose_plan([z])


def test_packed_spreads_read_back():
    rng = np.random.default_rng(0)
    shapes = ((5, 7), (3, 2))
    spreads = [Spreads(*(rng.integers(-9, 9, n).astype(np.int32) for n in shape)) for shape in shapes]
    rows, rest = unpack_lists(pack_spreads(spreads), [5, 3])
    cols, rest = unpack_lists(rest, [7, 2])
    assert rest == b""
    for s, row, col in zip(spreads, rows, cols, strict=True):
        np.testing.assert_array_equal(s.row, row)
        np.testing.assert_array_equal(s.col, col)


# steps


@given(k=st.integers(-400, 400))
def test_a_step_is_the_fourth_root_of_a_power_of_two_rounded_down(k):
    """m = 2^23 step / 2^octave satisfies m^4 <= 2^(92 + rest) < (m + 1)^4, in exact integers."""
    octave, rest = divmod(k, STEPS_PER_OCTAVE)
    step = exp_steps(np.array([k], np.int32))
    assert step.dtype == np.float32
    m = int(float(step[0]) * 2.0**23 / 2.0**octave)
    assert m * 2.0 ** (octave - 23) == float(step[0])
    assert m**4 <= 2 ** (92 + rest) < (m + 1) ** 4


def test_steps_are_powers_of_two_to_float32_and_their_logarithms_invert_them():
    k = np.arange(-200, 201, dtype=np.int32)
    np.testing.assert_allclose(exp_steps(k), 2.0 ** (k / STEPS_PER_OCTAVE), rtol=1.2e-7)
    np.testing.assert_array_equal(log_steps(exp_steps(k).astype(np.float64)), k)


@given(scale=hnp.arrays(np.float64, st.integers(1, 20), elements=st.floats(1e-9, 1e9)))
def test_a_rounded_step_is_within_an_eighth_octave(scale):
    ratio = exp_steps(log_steps(scale)) / scale
    assert np.abs(np.log2(ratio)).max() <= 0.5 / STEPS_PER_OCTAVE + 1e-6
