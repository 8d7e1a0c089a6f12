"""Peers: each method against a closed form or another derivation of it, and files that decode to what was quantized."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from conftest import synthetic_moments
from hypothesis import given
from hypothesis import strategies as st
from peers.allocation import relative_steps
from peers.encode import (
    encode_peer,
    interference_cancellation,
    quantize_alone,
    quantize_behind_prefix,
)
from peers.gptq import gptq, inverse_factor, row_rms, rtn
from peers.nncodec_peer import encode_nncodec, has_nncodec
from peers.peer_file import (
    COARSE_SCALES,
    FINE_SCALES,
    AllowedTables,
    PeerMatrix,
    exp_scales,
    index_entropy_bits,
    log_scales,
    pack_peer,
    snap_scales,
    unpack_peer,
)
from peers.settings import TUNED_CHOICES, PeerSettings, tune
from peers.watersic import cancel, high_rate_step, rescale, watersic, weighted_matrix

from rdopt.calibration.backward import second_moments
from rdopt.calibration.subject import load_subject
from rdopt.checkpoint.families import INPUT_OF, coded_matrices
from rdopt.codec.grids.steps import damped_cholesky
from rdopt.encode.feedback import quantize_feedback
from rdopt.operator.llama import logits
from rdopt.operator.params import stacked
from rdopt.transforms.aligned import Aligned
from rdopt.transforms.bases import starting_gauges


def correlated(seed: int, n: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4 * n, n)) * np.exp(rng.standard_normal(n)) + rng.standard_normal((4 * n, 1))
    return x.T @ x / len(x)


def gaussian(seed: int, m: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((m, n))


def output_error(E: np.ndarray, sigma: np.ndarray) -> float:
    return float(np.sum((E @ sigma) * E))


@pytest.fixture
def model(tiny_llama: Callable[..., Path]) -> Aligned:
    subject = load_subject(tiny_llama(hidden_size=32, intermediate_size=64))
    tokens = np.random.default_rng(0).integers(0, subject.arch.vocab_size, (8, 32)).astype(np.int32)
    return Aligned(subject=subject, moments=synthetic_moments(subject.arch), tokens=tokens)


# Rounding and GPTQ


def test_rtn_errs_by_at_most_half_a_step():
    W, step = gaussian(0, 5, 7), np.linspace(0.1, 0.9, 5)
    assert np.all(np.abs(W - step[:, None] * rtn(W, step)) <= step[:, None] / 2 * (1 + 1e-12))


def test_row_rms_of_the_matrix_is_the_root_of_the_mean_power_of_its_rows():
    W = gaussian(1, 4, 6) * np.arange(4)[:, None]
    rows = row_rms(W, "row")
    assert rows[0] == 0
    assert row_rms(W, "tensor") == pytest.approx(np.sqrt(np.mean(rows**2)))


def test_inverse_factor_is_upper_triangular_and_squares_to_the_inverse():
    H = correlated(2, 9)
    U = inverse_factor(H)
    assert np.allclose(np.tril(U, -1), 0)
    assert np.allclose(U.T @ U @ H, np.eye(9), atol=1e-9)


def test_gptq_is_successive_interference_cancellation_from_the_other_end():
    # Chen et al. 2507.18553: GPTQ is Babai's nearest-plane algorithm on the columns in reverse.
    W, sigma, step = gaussian(3, 6, 80), correlated(3, 80), np.linspace(0.2, 0.5, 6)
    L = damped_cholesky(sigma[::-1, ::-1], 0.01)
    babai = quantize_feedback(W[:, ::-1].astype(np.float32), L, step, np.ones(80))
    assert np.array_equal(gptq(W.astype(np.float32), sigma, step)[:, ::-1], babai)


def test_gptq_with_uncorrelated_inputs_is_rounding():
    W, step = gaussian(4, 3, 8), np.full(3, 0.3)
    assert np.array_equal(gptq(W, np.diag(np.arange(1.0, 9)), step), rtn(W, step))


def test_gptq_loses_to_rounding_on_weights_and_wins_on_outputs():
    W, sigma, step = gaussian(5, 16, 24), correlated(5, 24), np.full(16, 0.5)
    mine, plain = W - step[:, None] * gptq(W, sigma, step), W - step[:, None] * rtn(W, step)
    assert np.sum(mine**2) > np.sum(plain**2)
    assert output_error(mine, sigma) < output_error(plain, sigma)


def test_activation_order_is_the_given_order_of_sorted_columns():
    W, sigma, step = gaussian(6, 5, 12), correlated(6, 12), np.full(5, 0.4)
    way = np.argsort(-np.diagonal(sigma))
    sorted_first = gptq(W[:, way], sigma[np.ix_(way, way)], step, order="given")
    assert np.array_equal(gptq(W, sigma, step, order="activation")[:, way], sorted_first)


@pytest.mark.parametrize("method", ["gptq", "watersic"])
def test_a_column_that_no_input_reaches_becomes_zero(method: str):
    W, sigma = gaussian(7, 6, 10), correlated(7, 10)
    sigma[3], sigma[:, 3] = 0, 0
    live = np.arange(10) != 3
    z = gptq(W, sigma, np.full(6, 0.4)) if method == "gptq" else watersic(weighted_matrix(W, sigma), 0.4).z
    assert not z[:, 3].any()
    assert z[:, live].any()


# WaterSIC


def test_watersic_without_gains_is_feedback_with_the_column_steps_c_over_L():
    W, sigma = gaussian(8, 7, 75), correlated(8, 75)
    problem = weighted_matrix(W, sigma)
    found = watersic(problem, 0.7, "none")
    L = damped_cholesky(sigma, 1e-4)
    assert found.col == pytest.approx(snap_scales(0.7 / np.diagonal(L)))
    assert np.array_equal(found.z, quantize_feedback(W, L, np.ones(7), found.col))


def test_gains_leave_an_error_orthogonal_to_the_indices_of_every_column():
    W, sigma = gaussian(9, 40, 70), correlated(9, 70)
    problem = weighted_matrix(W, sigma)
    z, alpha, gamma = cancel(problem, 2.0, "lmmse")
    E = (W - z * alpha * gamma) @ problem.L
    assert np.sum(z * E, axis=0) == pytest.approx(np.zeros(70), abs=1e-9)


def test_rescalers_are_a_stationary_point_of_the_output_error_and_lower_it():
    W, sigma = gaussian(10, 30, 14), correlated(10, 14)
    problem = weighted_matrix(W, sigma)
    z, alpha, gamma = cancel(problem, 1.5, "lmmse")
    t, g = rescale(problem, z * alpha, gamma)

    def error(t: np.ndarray, g: np.ndarray) -> float:
        return output_error(W - t[:, None] * z * alpha * g, sigma)

    least = error(t, g)
    assert least < error(np.ones(30), gamma)
    assert np.mean(np.abs(t)) == pytest.approx(1)
    for factor in (0.98, 1.02):
        for i in range(30):
            assert error(np.where(np.arange(30) == i, factor * t, t), g) > least * (1 - 3e-4)
        for j in range(14):
            assert error(t, np.where(np.arange(14) == j, factor * g, g)) > least * (1 - 3e-4)


def test_the_step_at_a_rate_has_that_rate_at_high_resolution():
    # sqrt(12) L_jj sigma 2^-R differs from the entropy of a Gaussian by log2 sqrt(2 pi e / 12) = 0.254 bit.
    problem = weighted_matrix(gaussian(11, 4000, 6), correlated(11, 6))
    z, _, _ = cancel(problem, high_rate_step(problem, 5.0), "none")
    expected = 5.0 + 0.5 * np.log2(2 * np.pi * np.e / 12)
    assert index_entropy_bits(z, "column") / z.size == pytest.approx(expected, abs=0.05)


def test_negative_scales_move_into_the_indices():
    W, sigma = gaussian(12, 25, 9), correlated(12, 9)
    problem = weighted_matrix(W, sigma)
    for c in (1.0, 4.0, 12.0):
        z, row, col = watersic(problem, c)
        raw, alpha, gamma = cancel(problem, c, "rescaled")
        t, g = rescale(problem, raw * alpha, gamma)
        assert min(row.min(), col.min()) >= 0
        assert row[:, None] * z * col == pytest.approx(t[:, None] * raw * alpha * g)


def test_published_watersic_gives_every_matrix_the_same_rate(model: Aligned):
    settings = PeerSettings(method="watersic", damping=1e-4, tables="pooled")
    method = interference_cancellation(model, settings)
    assert method.base(0.1) == 1
    for z, row, col in quantize_alone(model, method, 2.0**-4).values():
        rate = (index_entropy_bits(z, "matrix") + 16 * (len(row) + len(col))) / z.size
        assert rate == pytest.approx(4, abs=0.05)


# The quantized prefix


def finely(key, W, sigma):
    return PeerMatrix(np.rint(W / 2.0**-20).astype(np.int32), np.full(len(W), 2.0**-20), np.ones(W.shape[1]))


@pytest.mark.parametrize("prefix", ["inputs", "drift"])
def test_behind_a_prefix_without_error_inputs_and_targets_are_those_of_the_original(model: Aligned, prefix: Any):
    assert model.tokens is not None
    moments, seen = second_moments(model.subject.params, model.arch, model.tokens), {}

    def quantize(key, W, sigma):
        seen[key] = (W, sigma)
        return finely(key, W, sigma)

    settings = PeerSettings(method="gptq", damping=0.01, prefix=prefix)
    found = quantize_behind_prefix(model, settings, 1.0, quantize)
    assert found.keys() == seen.keys() == set(coded_matrices(model.arch.num_layers))
    for (layer, name), (W, sigma) in seen.items():
        original, expected = model.subject.params["blocks"][name][layer], moments.sigma[INPUT_OF[name]][layer]
        assert np.abs(W - original).max() < 1e-3 * np.abs(original).max()
        assert sigma == pytest.approx(expected, abs=1e-3 * np.abs(expected).max())


def test_a_matrix_behind_a_zeroed_one_sees_the_inputs_that_are_left(model: Aligned):
    def quantize(key, W, sigma):
        z, row, col = finely(key, W, sigma)
        if key == (0, "down"):
            inputs.append(sigma)
        return PeerMatrix(z * (key not in ((0, "up"),)), row, col)

    inputs: list[np.ndarray] = []
    quantize_behind_prefix(model, PeerSettings(method="gptq", prefix="inputs"), 1.0, quantize)
    assert not inputs[0].any()  # gate(x) * 0


# Files


@given(
    st.integers(0, 2**32 - 1), st.sampled_from(get_args(AllowedTables)), st.sampled_from([COARSE_SCALES, FINE_SCALES])
)
def test_a_file_holds_what_was_packed(seed: int, tables: Any, density: int):
    rng = np.random.default_rng(seed)
    shapes = [(int(m), int(n)) for m, n in rng.integers(1, 12, (rng.integers(1, 4), 2))]
    matrices = [
        PeerMatrix(
            np.rint(rng.standard_normal(s) * rng.choice([0, 0.3, 3, 40])).astype(np.int32),
            *(exp_scales(rng.integers(-90, 90, n), density) for n in s),
        )
        for s in shapes
    ]
    packed = pack_peer(matrices, 0.125, density, tables)
    for W, (z, row, col) in zip(unpack_peer(packed.data, shapes), matrices, strict=True):
        assert np.allclose(W, 0.125 * row[:, None] * z * col, rtol=1e-6, atol=0)
    assert packed.ideal_bits <= 8 * len(packed.data)


def test_a_file_of_gaussian_indices_comes_within_two_percent_of_their_entropy():
    z = np.rint(3 * gaussian(13, 300, 200)).astype(np.int32)
    packed = pack_peer([PeerMatrix(z, np.ones(300), np.ones(200))], 1.0, COARSE_SCALES, "any")
    assert 8 * len(packed.data) == pytest.approx(index_entropy_bits(z, "matrix"), rel=0.02)


def test_columns_of_unlike_spread_cost_less_by_columns_than_pooled():
    z = np.rint(gaussian(14, 400, 60) * np.exp2(np.arange(60) % 6)).astype(np.int32)
    matrix = [PeerMatrix(z, np.ones(400), np.ones(60))]
    pooled, columns = (pack_peer(matrix, 1.0, COARSE_SCALES, tables) for tables in ("pooled", "per-column"))
    assert len(columns.data) < 0.9 * len(pooled.data)
    assert columns.classes == "spread"


def test_a_tail_of_bytes_is_refused():
    packed = pack_peer([PeerMatrix(np.arange(12, dtype=np.int32).reshape(3, 4), np.ones(3), np.ones(4))], 1, 4, "any")
    with pytest.raises(ValueError):
        unpack_peer(packed.data + bytes(8), [(3, 4)])


def test_entropy_of_four_equal_symbols_is_two_bits_and_of_constant_columns_none():
    z = np.tile(np.arange(-2, 2, dtype=np.int32), (8, 1))
    assert index_entropy_bits(z, "matrix") == pytest.approx(2 * z.size)
    assert index_entropy_bits(z, "column") == 0


def test_scales_come_back_within_half_a_grid_point_and_zeros_as_the_median():
    x = np.array([0.3, 0.0, 5.0, 1.0])
    back = exp_scales(log_scales(x, FINE_SCALES), FINE_SCALES)
    assert np.all(np.abs(np.log2(back[[0, 2, 3]] / x[[0, 2, 3]])) <= 0.5 / FINE_SCALES)
    assert back[1] == 1.0


# Models


@pytest.mark.parametrize("settings", [
    PeerSettings(method="rtn"),
    PeerSettings(method="gptq", damping=0.01, rows="tensor", steps="sensitivity"),
    PeerSettings(method="watersic", damping=1e-4, tables="per-column"),
    PeerSettings(method="gptq", damping=0.01, prefix="inputs"),
    PeerSettings(method="watersic", damping=1e-4, prefix="drift", tables="pooled"),
    PeerSettings(method="watersic", damping=1e-2, shrink="none", steps="sensitivity"),
], ids=lambda s: f"{s.method}-{s.steps}-{s.prefix}")  # fmt: skip
def test_a_peer_hits_its_size_and_touches_only_coded_matrices(model: Aligned, settings: PeerSettings):
    coded = encode_peer(model, settings, 4.0)
    assert coded.bpw == pytest.approx(4.0, abs=0.02 if settings.prefix == "none" else 0.1)
    assert coded.bpw_ideal <= coded.bpw
    assert np.array_equal(coded.params["embed"], model.subject.params["embed"])
    assert np.array_equal(*(stacked(x)["blocks"]["mlp_norm"] for x in (coded.params, model.subject.params)))
    for name in ("q", "down"):
        W, found = (stacked(x)["blocks"][name] for x in (model.subject.params, coded.params))
        assert 0 < np.mean((W - found) ** 2) < 0.1 * np.mean(W**2)


def test_our_allocation_halves_the_step_of_a_matrix_that_matters_four_times_as_much(model: Aligned):
    G = {k: np.array(v) for k, v in model.moments.G.items()}
    G["gate"][1] *= 4
    settings = PeerSettings(method="rtn", steps="sensitivity")
    before = relative_steps(model, settings)
    after = relative_steps(Aligned(subject=model.subject, moments=model.moments._replace(G=G)), settings)
    ratio = {k: after[k] / before[k] for k in before}
    assert ratio.pop((1, "gate")) == pytest.approx(ratio[0, "q"] / 2)
    assert list(ratio.values()) == pytest.approx([ratio[0, "q"]] * len(ratio))


def test_the_rotated_model_is_the_same_function(model: Aligned):
    gauges = starting_gauges("hadamard", model.subject.params, model.arch, model.moments)
    rotated = Aligned(subject=model.subject, moments=model.moments, gauges=gauges)
    tokens = np.arange(20).reshape(2, 10)
    original, turned = stacked(model.subject.params), stacked(rotated.network())
    before, after = logits(original, tokens, model.arch), logits(turned, tokens, rotated.arch)
    assert np.asarray(after) == pytest.approx(np.asarray(before), abs=1e-4)
    assert np.abs(turned["blocks"]["q"] - original["blocks"]["q"]).max() > 0.1


def test_tuning_finds_the_best_of_each_choice_and_keeps_the_published_one_in_a_tie():
    published = PeerSettings(method="gptq", damping=0.01)
    calls: list[PeerSettings] = []

    def loss(settings: PeerSettings) -> float:
        calls.append(settings)
        return abs(settings.damping - 0.03) + (settings.rows == "row")

    assert tune(published, loss) == replace(published, damping=0.03, rows="tensor")
    assert len(calls) == len(set(calls)) == 1 + sum(len(values) - 1 for _, values in TUNED_CHOICES["gptq"])
    assert tune(published, lambda settings: 0.0) == published


def test_an_interpreter_that_does_not_exist_has_no_nncodec():
    assert not has_nncodec("/nowhere/python")


def test_nncodec_bits_fall_with_the_target(model: Aligned):
    if not has_nncodec(sys.executable):
        pytest.skip("nncodec is not installed")
    fine, coarse = (encode_nncodec(model, target, sys.executable) for target in (5.0, 3.0))
    assert fine.bpw > coarse.bpw
