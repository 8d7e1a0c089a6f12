"""Claims about the signal experiment: its representations, its coding, its coordinates, its figures, its command."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdopt.cli.main import main
from rdopt.codec.coders.constriction import unpack_integers
from rdopt.config.errors import UserError
from rdopt.study.figures import coefficient_figures, energy_curve
from rdopt.study.toy.coding import (
    CodedPoint,
    TableClasses,
    bits_at,
    cheapest_classes,
    decode_arrays,
    encode_arrays,
    quantized,
    steps_of,
)
from rdopt.study.toy.coordinates import (
    Coordinates,
    hadamard_coordinates,
    high_rate_bits,
    learn_axes,
    pack_angles,
    principal_axes,
    stored_coordinates,
)
from rdopt.study.toy.experiment import representation_of
from rdopt.study.toy.mlp import mean_sensitivities, mlp_shapes, run_mlp, start_mlp, train_mlps
from rdopt.study.toy.predictions import TOY_PREDICTIONS, SeedMean, mean_over_seeds
from rdopt.study.toy.report import mean_cell
from rdopt.study.toy.settings import ToySettings
from rdopt.study.toy.signal import (
    Sinusoids,
    cell_middles,
    draw_sinusoids,
    fit_fourier,
    fit_to_snr,
    fourier_basis,
    snr,
    unit_power,
)

X = cell_middles(64)
SMALL = ("--seeds", "2", "--steps", "300", "--width", "8", "--turn-steps", "5", "--sinusoids", "3", "--cycles", "3")


def matrices(seed=0):
    """A hidden matrix, a row and a column of different spreads."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((12, 8)), 5 * rng.standard_normal((1, 12)), 0.1 * rng.standard_normal((9, 1))]


LOGS = np.array([0, 5, -7], np.int32)


def test_least_squares_recovers_an_on_grid_signal_exactly():
    signal = Sinusoids(np.array([0.7, 0.4]), np.array([2.0, 5.0]), np.array([0.3, -1.1]))
    found = fit_fourier(X, signal.at(X), 6)
    expected = np.zeros(13)
    for a, k, p in zip(*signal, strict=True):
        expected[[2 * int(k) - 1, 2 * int(k)]] = a * np.cos(p) / np.sqrt(2), -a * np.sin(p) / np.sqrt(2)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_every_column_of_the_basis_has_unit_power():
    basis = fourier_basis(X, 7)
    np.testing.assert_allclose(basis.T @ basis / len(X), np.eye(15), atol=1e-12)


def test_the_basis_is_the_smallest_that_reaches_the_snr():
    y = unit_power(draw_sinusoids(np.random.default_rng(1), 5, 6.0).at(X))
    errors = [snr(y, fourier_basis(X, k) @ fit_fourier(X, y, k)) for k in range(32)]
    for least in (3.0, 12.0, errors[20]):
        first = next(k for k, reached in enumerate(errors) if reached >= least - 1e-9)
        assert len(fit_to_snr(X, y, least)) == 2 * first + 1
    assert len(fit_to_snr(X, y, 1e3)) == 2 * 31 + 1


def test_the_snr_of_a_known_error_is_its_closed_form():
    y = np.ones(10)
    assert snr(y, y) == math.inf
    assert snr(y, 1.1 * y) == pytest.approx(20)


def test_the_mlp_computes_what_its_layers_say():
    params = start_mlp(jax.random.key(3), 6, 2)
    assert [p.shape for p in params] == mlp_shapes(6, 2)
    W1, b1, W2, b2, W3, b3 = (np.asarray(p, np.float64) for p in params)
    h = np.maximum(W1 @ (2 * X[None] - 1) + b1.T, 0)
    expected = (W3 @ np.maximum(W2 @ h + b2.T, 0) + b3)[0]
    np.testing.assert_allclose(run_mlp(params, jnp.asarray(X, jnp.float32)), expected, atol=1e-5)


def test_sensitivities_are_mean_squares_of_finite_differences():
    params, x = start_mlp(jax.random.key(0), 5, 2), jnp.asarray(X, jnp.float32)
    found = mean_sensitivities(params, x)
    # The output is linear in the last layer: its slopes are the hidden units, and one for the bias.
    h = 2 * x[:, None] - 1
    for W, b in zip(params[:-2:2], params[1:-2:2], strict=True):
        h = jax.nn.relu(h @ W.T + b)
    np.testing.assert_allclose(found[-2], jnp.mean(h**2), rtol=1e-5)
    np.testing.assert_allclose(found[-1], 1.0, rtol=1e-6)


def test_training_bends_the_mlp_to_a_cosine():
    y = jnp.asarray(np.stack([unit_power(np.cos(2 * np.pi * X))]), jnp.float32)
    x, keys = jnp.asarray(X, jnp.float32), jax.random.split(jax.random.key(0), 1)
    params = train_mlps(keys, x, y, width=8, layers=2, steps=200)
    # No straight line does better than 0 dB.
    assert snr(np.asarray(y[0]), np.asarray(run_mlp([p[0] for p in params], x))) > 10


@pytest.mark.parametrize("classes", [TableClasses(0, 1), TableClasses(1, 1), TableClasses(4, 2)])
def test_decoded_coefficients_are_the_rounded_ones(classes):
    arrays, c = matrices(), 0.05
    decoded = decode_arrays(encode_arrays(arrays, LOGS, c, classes).data)
    for W, back, held, step in zip(arrays, decoded, quantized(arrays, LOGS, c), steps_of(LOGS, c), strict=True):
        assert back.dtype == np.float32
        np.testing.assert_array_equal(back, held)
        assert np.abs(back - W).max() <= step / 2 * (1 + 1e-5)


def test_real_bytes_lie_within_two_words_of_the_ideal_bits():
    arrays = [np.random.default_rng(0).standard_normal((40, 40))]
    zero = np.zeros(1, np.int32)
    coded = encode_arrays(arrays, zero, 0.1, cheapest_classes(arrays, zero, 0.1))
    assert 0 <= 8 * len(coded.data) - coded.ideal <= 64
    # A Gaussian in steps of a tenth has h(x) - log2(step) bits.
    assert coded.ideal / 1600 == pytest.approx(2.047 + math.log2(10), abs=0.15)


def test_altered_bytes_are_refused():
    data = encode_arrays(matrices(), LOGS, 0.05, TableClasses(0, 1)).data
    with pytest.raises(ValueError):
        decode_arrays(data + b"\0\0\0\0")


def test_a_hadamard_undone_gives_the_weights_and_costs_nothing():
    arrays = matrices()
    coordinates = hadamard_coordinates([W.shape for W in arrays], np.random.default_rng(0))
    assert coordinates.data == b""
    rotated = coordinates.rotate(arrays)
    for turned, undone, W in zip(rotated, coordinates.undo(rotated), arrays, strict=True):
        assert np.abs(turned - W).max() > 0.01
        np.testing.assert_allclose(undone, W, atol=1e-12)


def test_a_hadamard_flattens_one_outlier():
    W = np.zeros((16, 16))
    W[3, 5] = 1.0
    (rotated,) = hadamard_coordinates([(16, 16)], np.random.default_rng(0)).rotate([W])
    np.testing.assert_allclose(np.abs(rotated), 1 / 16, atol=1e-12)


def test_principal_axes_leave_orthogonal_columns():
    W = matrices()[0]
    gram = (W @ principal_axes(W)).T @ (W @ principal_axes(W))
    np.testing.assert_allclose(gram, np.diag(np.diagonal(gram)), atol=1e-10)


def test_stored_axes_are_orthogonal_and_their_angles_counted():
    arrays = matrices()
    coordinates = stored_coordinates(arrays, {0: principal_axes(arrays[0])}, np.full(3, 1e-6))
    V = coordinates.V[0]
    assert not coordinates.U and set(coordinates.V) == {0}
    np.testing.assert_allclose(V.T @ V, np.eye(8), atol=1e-12)
    codes, rest = unpack_integers(coordinates.data[1:], 8 * 7 // 2)
    assert rest == b"" and coordinates.data == pack_angles([codes], coordinates.data[0])
    np.testing.assert_allclose(coordinates.undo(coordinates.rotate(arrays))[0], arrays[0], atol=1e-12)


def test_axes_turn_the_named_matrices_only():
    arrays = matrices()
    V = principal_axes(arrays[0])
    turned = Coordinates(V={0: V}).rotate(arrays)
    np.testing.assert_array_equal(turned[0], arrays[0] @ V)
    assert turned[1] is arrays[1] and turned[2] is arrays[2]


def test_high_rate_bits_are_half_a_log2_of_the_variances():
    W = np.array([[2.0, 0.5], [-2.0, 0.5]])
    step = math.sqrt(12) / 8  # the grid's own variance is 1/64
    assert high_rate_bits(W, step) == pytest.approx(2 / 2 * (math.log2(256) + math.log2(16)))
    assert high_rate_bits(W, 1e3) == 0


def test_learned_axes_are_orthogonal_and_undo_a_rotation_of_sparse_weights():
    rng = np.random.default_rng(0)
    sparse = rng.laplace(size=(64, 6)) * np.array([8.0, 4, 2, 1, 0.5, 0.25])
    Q = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    W = sparse @ Q
    V = learn_axes(W, np.eye(6), 0.1, steps=120, seed=0)
    np.testing.assert_allclose(V.T @ V, np.eye(6), atol=1e-10)
    before, after, best = (high_rate_bits(M, 0.1) for M in (W, W @ V, sparse))
    assert after < before - 0.8 * (before - best)


def test_concentration_of_equal_and_of_single_coefficients():
    equal = coefficient_figures([np.full((2, 10), -3.0)], np.ones(1))
    assert equal["participation"] == pytest.approx(20) and equal["entropy_dimension"] == pytest.approx(20)
    assert equal["kurtosis"] == pytest.approx(1) and equal["top"][25] == pytest.approx(0.25) and equal["entropy"] == 0
    one = np.zeros((1, 100))
    one[0, 7] = 4.0
    single = coefficient_figures([one], np.ones(1))
    assert single["participation"] == pytest.approx(1) and single["top"][1] == pytest.approx(1)
    assert single["peak"] == pytest.approx(10) and single["kurtosis"] == pytest.approx(100)
    assert single["beyond_6_sigma"] == pytest.approx(0.01)


def test_energy_curves_and_entropy_agree_with_their_closed_forms():
    np.testing.assert_allclose(energy_curve(np.array([1.0, -3.0, 0.0, 1.0])), np.array([9, 10, 11, 11]) / 11)
    few = coefficient_figures([np.array([[0.3, 2.7, 6.6, 8.7]])], np.array([3.0]))
    assert few["entropy"] == pytest.approx(2)
    assert few["top"][10] == pytest.approx(0.4 * 2.9**2 / (0.1**2 + 0.9**2 + 2.2**2 + 2.9**2))


def test_bits_at_an_snr_are_linear_between_points_and_unknown_beyond():
    points = [CodedPoint(snr, snr, bits, bits) for snr, bits in ((10, 100), (20, 300), (15, 400), (30, 500))]
    assert bits_at(points, 12.5) == pytest.approx(150)
    assert bits_at(points, 25) == pytest.approx(400)  # the point at 15 dB is beaten by a smaller file
    assert math.isnan(bits_at(points, 9)) and math.isnan(bits_at(points, 31)) and math.isnan(bits_at([], 10))


def test_a_mean_leaves_out_what_is_unknown():
    found = mean_over_seeds([1.0, math.nan, 3.0])
    assert found.mean == 2 and found.error == pytest.approx(1) and found.count == 2
    assert mean_over_seeds([math.nan]).count == 0


def test_a_cell_of_the_table_says_how_many_seeds_it_lacks():
    assert mean_cell(SeedMean(2.0, 0.5, 3), 1, 3) == "2.0 +- 0.5"
    assert mean_cell(SeedMean(2.0, 0.5, 2), 1, 3) == "2.0 +- 0.5 (2)"
    assert mean_cell(SeedMean(7.0, 0.0, 3), 0, 3) == "7" and mean_cell(SeedMean(math.nan, math.nan, 0), 0, 3) == "n/a"


def test_steps_follow_the_inverse_root_of_the_sensitivity_and_meet_the_level():
    shown = representation_of([np.zeros((3, 4)), np.zeros((1, 2))], np.array([4.0, 1.0]), lambda arrays: np.zeros(1))
    fine, coarse = shown.steps(20.0)
    assert coarse / fine == pytest.approx(2, rel=1e-6)
    assert (12 * 4 * fine**2 + 2 * coarse**2) / 12 == pytest.approx(0.01, rel=1e-5)


def test_settings_out_of_range_are_refused_in_one_sentence():
    with pytest.raises(UserError, match=r"--seeds is 1"):
        ToySettings(seeds=1)


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """Two runs of the command with the same small settings."""
    world = tmp_path_factory.mktemp("toy")
    for name in ("a", "b"):
        assert main(["toy", "--out", str(world / name), *SMALL]) == 0
    return world


def test_the_same_seed_gives_the_same_json(twice):
    texts = [(twice / name / "toy.json").read_bytes() for name in ("a", "b")]
    assert texts[0] == texts[1]


def test_the_json_holds_settings_points_summary_and_predictions(twice):
    found = json.loads((twice / "a" / "toy.json").read_text())
    assert found["settings"]["width"] == 8 and len(found["seeds"]) == 2
    assert [p["claim"] for p in found["predictions"]] == [p.claim for p in TOY_PREDICTIONS]
    for record in found["seeds"]:
        arms = record["arms"]
        assert arms["fourier"]["snr_unquantized"] >= arms["mlp"]["snr_unquantized"]
        assert arms["hadamard"]["price"] == 0 < arms["pca-stored"]["price"]
        for name, arm in arms.items():
            bits = [p["bits"] for p in arm["points"]]
            assert bits == sorted(bits)
            coders = 1 if name == "fourier" else 8  # each holds two words that need not be full
            assert all(-1e-6 <= p["bits"] - p["ideal"] <= 64 * coders for p in arm["points"])
    means = found["summary"]["mlp"]["snr_unquantized"]
    assert means["mean"] == pytest.approx(np.mean([s["arms"]["mlp"]["snr_unquantized"] for s in found["seeds"]]))


def test_the_figure_is_written(twice):
    assert (twice / "a" / "toy.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_an_existing_output_is_refused_before_anything_runs(twice, capsys):
    before = (twice / "a" / "toy.json").read_bytes()
    assert main(["toy", "--out", str(twice / "a"), *SMALL]) == 2
    said = capsys.readouterr()
    assert "already exists and is never overwritten" in said.err and said.out == ""
    assert (twice / "a" / "toy.json").read_bytes() == before


def test_a_dry_run_says_what_it_would_do_and_does_nothing(tmp_path, capsys):
    assert main(["toy", "--out", str(tmp_path / "out"), "--dry-run", "--seeds", "3"]) == 0
    assert "3 signals of 8 sinusoids" in capsys.readouterr().out and not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [("--train.steps", "5"), ("--config", "x.yaml"), ("--width", "1")])
def test_flags_that_do_not_apply_are_refused(words, tmp_path, capsys):
    assert main(["toy", "--out", str(tmp_path / "out"), *words]) == 2
    assert words[0] in capsys.readouterr().err and not (tmp_path / "out").exists()
