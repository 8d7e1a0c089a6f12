"""Verdicts of predictions, and standard errors beside what they are by other means."""

import math

import numpy as np
import pytest

from rdopt.study.predictions import Estimate, Prediction, jackknife, log_ratio_of_sums, mean_log_ratio, mean_of


def test_a_verdict_needs_two_standard_errors_and_can_go_either_way():
    above = Prediction("x", 1)
    assert above.verdict(Estimate(2.1, 1.0)) == "supported"
    assert above.verdict(Estimate(-2.1, 1.0)) == "refuted"
    assert above.verdict(Estimate(1.9, 1.0)) == above.verdict(Estimate(5.0, np.nan)) == "undecided"
    assert Prediction("x", -1).verdict(Estimate(-2.1, 1.0)) == "supported"


def test_the_jackknife_of_a_mean_is_its_standard_error():
    x = np.random.default_rng(0).standard_normal(30)
    estimate = jackknife(lambda total: float(total[0] / total[1]), np.stack([x, np.ones(30)], axis=1))
    assert estimate == pytest.approx(mean_of(x))


def test_log_ratios_find_a_factor_and_their_errors_cover_it():
    rng, counts = np.random.default_rng(0), np.full(12, 100)
    inside = []
    for _ in range(60):
        draws, texts = np.exp(0.3 * rng.standard_normal((8, 1))), np.exp(0.5 * rng.standard_normal(12))
        b = np.stack([size * draws * texts for size in (1.0, 4.0)])
        a = 3 * b * np.exp(0.2 * rng.standard_normal((8, 1))) * np.exp(0.2 * rng.standard_normal(12))
        found = mean_log_ratio(a, b, counts)
        inside.append(abs(found.value - np.log(3)) < 2 * found.error)
        assert mean_log_ratio(b, b, counts) == pytest.approx(Estimate(0.0, 0.0), abs=1e-12)
    assert 0.8 < np.mean(inside) < 1


def test_a_common_factor_of_all_sequences_has_no_error():
    b = np.random.default_rng(0).uniform(1, 2, (1, 9))
    ratio = log_ratio_of_sums(3 * b, b)
    assert ratio.value == pytest.approx(math.log(3)) and ratio.error < 1e-12
