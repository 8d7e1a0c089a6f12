"""Spectra: gains are their closed forms, chance is chance; savings at equal distortion are exact."""

from types import ModuleType

import numpy as np
import pytest
from conftest import synthetic_moments
from optimizers.equal_distortion import (
    MatrixTerms,
    in_coordinates,
    matrix_names,
    matrix_weights,
    per_weight,
    savings,
    slope_for,
    terms_by_slope,
)
from optimizers.spectra import chance_gain, spectra, spread_gain
from tiny_runs import load_script, make_model, make_text, strict_json

from rdopt.align.candidates import relaxed_terms
from rdopt.align.problem import make_problem
from rdopt.calibration.subject import load_subject
from rdopt.config.schema import Config
from rdopt.study.figures import entropy_dimension
from rdopt.study.predictions import mean_of


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("compare_optimizers")


def test_two_powers_one_sixteenth_of_each_other_gain_their_ratio_of_means():
    assert spread_gain(np.array([1.0, 16.0]), floor=0) == pytest.approx(0.5 * np.log2(8.5 / 4))
    assert spread_gain(np.full(7, 3.0)) == pytest.approx(0, abs=1e-12)
    # all power in one of n columns: (n + f) and n - 1 times f, over their mean 1 + f
    n, f = 10, 0.05
    expected = 0.5 * (np.log2(1 + f) - (np.log2(n + f) + (n - 1) * np.log2(f)) / n)
    assert spread_gain(np.eye(n)[0], floor=f) == pytest.approx(expected)


@pytest.mark.parametrize("rows", [16, 100])
def test_iid_gaussian_columns_gain_the_bias_of_measured_powers_and_no_more(rows: int):
    W = np.random.default_rng(rows).standard_normal((rows, 20000))
    gains = np.array([spread_gain(np.square(part).mean(axis=0), floor=0) for part in np.split(W, 10, axis=1)])
    assert mean_of(gains).value == pytest.approx(chance_gain(rows), abs=4 * mean_of(gains).error)
    assert chance_gain(rows) == pytest.approx(0.5 / rows / np.log(2), rel=0.1)


def test_figures_of_a_gaussian_matrix_are_those_of_a_gaussian_and_of_marchenko_and_pastur():
    found = spectra(np.random.default_rng(0).standard_normal((400, 800)))
    assert found.kurtosis == pytest.approx(3, abs=0.05) and 4 < found.peak < 6
    assert found.columns == pytest.approx(1 - 1 / 400, abs=1e-3)  # chi^2: entropy falls by half the variance, 2 / m
    assert found.columns_pr == pytest.approx(1 / (1 + 2 / 400), abs=1e-3)
    assert found.singular_pr == pytest.approx(1 / (1 + 400 / 800), abs=0.01)  # second moment 1 + c at aspect c
    assert found.column_gain < chance_gain(400) and found.row_gain < chance_gain(800)  # the floor takes from both


def test_singular_figures_do_not_depend_on_the_coordinates_and_column_figures_do():
    rng = np.random.default_rng(0)
    W = rng.standard_normal((30, 20)) * np.exp(rng.standard_normal(20))
    Q = np.linalg.qr(rng.standard_normal((20, 20)))[0]
    plain, flat = spectra(W), spectra(W @ Q)
    assert flat.singular == pytest.approx(plain.singular) and flat.singular_pr == pytest.approx(plain.singular_pr)
    assert flat.column_gain < plain.column_gain and flat.columns > plain.columns
    values = np.linalg.svd(W, compute_uv=False) ** 2
    assert plain.singular == pytest.approx(entropy_dimension(values) / 20)


def high_rate(scale: np.ndarray):
    """Terms whose bits and distortion are those of high rate: 6.02 dB a bit, D inversely proportional to lambda."""

    def at(lam: float) -> MatrixTerms:
        return MatrixTerms(50 * np.log2(lam * scale), np.full(len(scale), 1 / lam / len(scale)))

    return at


def test_savings_at_equal_distortion_of_known_curves():
    base, other = high_rate(np.array([4.0, 4.0])), high_rate(np.array([2.0, 1.0]))
    weights = np.array([100.0, 100.0])
    assert per_weight(savings(base, other, 24.0, weights), weights).value == pytest.approx(0.75)
    assert savings(base, base, 24.0, weights) == pytest.approx(np.zeros(2))

    def louder(lam: float) -> MatrixTerms:
        return MatrixTerms(other(lam).bits, 1.3 * other(lam).distortion)

    slope = slope_for(louder, 1 / 24, 24.0)
    assert slope == pytest.approx(1.3 * 24, rel=0.011)
    expected = 0.75 - 0.5 * np.log2(1.3)  # the same bits buy more distortion
    assert per_weight(savings(base, louder, 24.0, weights), weights).value == pytest.approx(expected, abs=1e-3)


def test_terms_of_a_model_in_coordinates_are_the_relaxed_terms_of_their_gauges(tiny_llama):
    subject = load_subject(tiny_llama())
    moments = synthetic_moments(subject.arch)
    problem = make_problem(subject, moments, Config())
    models = in_coordinates(subject, moments)
    weights = matrix_weights(subject.params)
    for name in ("identity", "joint"):
        gauges = models[name].gauges
        assert gauges is not None
        rate, distortion = relaxed_terms(*problem, 24.0, gauges)
        found = terms_by_slope(models[name])(24.0)
        assert len(found.bits) == len(matrix_names(subject.arch))
        assert found.bits.sum() / weights.sum() == pytest.approx(rate, rel=1e-3), name
        assert found.distortion.sum() == pytest.approx(distortion, rel=1e-3), name


def test_the_comparison_of_two_tiny_models(script, tmp_path, capsys):
    first, later = (make_model(tmp_path / name, seed) for seed, name in enumerate(("first", "later")))
    text = make_text(tmp_path / "text.jsonl")
    specs = [f"{x}:{text}:file" for x in (first, later)]
    words = ["--sequences", "4", "--context", "32", "--lams", "24", "--json", str(tmp_path / "found.json")]
    assert script.main(["--model", specs[0], "--model", specs[1], *words]) == 0
    printed = capsys.readouterr().out
    found = strict_json(tmp_path / "found.json")
    claims = found["predictions"]["first - later"]
    assert len(claims) == 8 and all(f"{x['verdict']:10s}" in printed for x in claims)
    model = load_subject(later)
    kurtosis = found["models"][1]["figures"]["identity"]["kurtosis"][0]
    W = np.asarray(model.params["blocks"]["q"][0] * model.params["blocks"]["attn_norm"][0], np.float64)
    assert kurtosis == pytest.approx(np.mean(W**4) / np.mean(W**2) ** 2, rel=1e-5)
    assert script.main(["--model", specs[0], *words]) == 2
    assert "exists already" in capsys.readouterr().err
    assert script.main(["--model", specs[0], "--lams", "0"]) == 2
    assert "--lams holds 0" in capsys.readouterr().err


def test_models_of_other_shapes_are_not_paired(script, tiny_llama):
    arch, wide = (load_subject(tiny_llama(**x)).arch for x in ({}, {"intermediate_size": 48}))
    one, two = (script.ModelSpectra(str(i), a, {}, {}, np.ones(14) * i) for i, a in ((1, arch), (2, wide)))
    with pytest.raises(script.UserError, match="other shapes"):
        script.differences(one, two)
