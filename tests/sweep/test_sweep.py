"""Claims about sweeps on one tiny model, and about curves against brute force and closed forms."""

import csv
import json
import math
import shutil

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import (
    STEPS,
    TEXT,
    TRAINING,
    WINDOWS,
    make_model,
    make_text,
    rdopt,
    sha256,
    strict_json,
)

from rdopt.checkpoint.folder import open_checkpoint
from rdopt.cli import commands
from rdopt.config.errors import UserError
from rdopt.config.load import load_config
from rdopt.sweep.arms import ARMS as SWEEP_ARMS
from rdopt.sweep.curves import Curve, bd_rate, pareto, saved_bits, saved_bits_with_error
from rdopt.sweep.points import load_point, measure_point
from rdopt.sweep.report import gain_table
from rdopt.sweep.sweep import sweep

ARMS = ("identity", "hadamard", "learned", "blockwise-pca")
LAMS = (10, 60, 360)
RESULTS = ("lam", "bpw", "bpw_estimated", "bpw_all", "kl", "ppl", "bytes", "seconds")


def sweep_words(world, out, *more):
    # A gain's error is a mean over windows left out one at a time.
    text = ("--text", world / "text.jsonl", *TEXT, *WINDOWS, "--max-tokens", "512")
    return ("sweep", world / "model", "--out", out, *text, *TRAINING, *more)


def learned_only(world, out):
    return sweep_words(world, out, "--arms", "learned", "--lams", ",".join(map(str, LAMS)))


def all_arms(world, out):
    return sweep_words(world, out, "--arms", ",".join(ARMS), "--lams", ",".join(map(str, LAMS)))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a model, a text and a finished sweep."""
    world = tmp_path_factory.mktemp("sweep")
    make_model(world / "model")
    make_text(world / "text.jsonl")
    assert rdopt(*all_arms(world, world / "sweep")) == 0
    return world


def test_every_arm_has_a_line_of_its_own():
    assert len({arm.line[0] for arm in SWEEP_ARMS.values()}) == len(SWEEP_ARMS)


def hashes(folder):
    """Hash of each point's JSON and each encoded file."""
    return {p.name: sha256(p) for part in ("points", "files") for p in sorted((folder / part).iterdir())}


def test_curve_json_has_its_one_shape(world):
    curve = strict_json(world / "sweep/curve.json")
    assert list(curve) == ["model", "text", "protocol", "arms"]
    assert [arm["name"] for arm in curve["arms"]] == list(ARMS)
    for arm in curve["arms"]:
        assert list(arm) == ["name", "description", "results"]
        results = arm["results"]
        assert tuple(results) == RESULTS
        assert all(len(values) == len(LAMS) for values in results.values())
        assert results["bpw"] == sorted(results["bpw"])
        assert results["kl"] == sorted(results["kl"], reverse=True)
        assert results["lam"] == pytest.approx(LAMS)
        assert all(b > 0 for b in results["bytes"])


def test_a_sweeps_bytes_are_those_of_its_files(world):
    for arm in strict_json(world / "sweep/curve.json")["arms"]:
        files = [world / f"sweep/files/{arm['name']}-lam{lam}.rdopt.safetensors" for lam in LAMS]
        sizes = [file.stat().st_size for file in files]
        assert arm["results"]["bytes"] == sizes


def test_a_sweep_leaves_a_table_and_a_picture(world):
    rows = list(csv.DictReader((world / "sweep/curve.csv").read_text().splitlines()))
    assert len(rows) == len(ARMS) * len(LAMS)
    arms = {arm["name"]: arm["results"]["kl"] for arm in strict_json(world / "sweep/curve.json")["arms"]}
    assert [float(row["kl"]) for row in rows] == [kl for name in ARMS for kl in arms[name]]
    assert (world / "sweep/curve.png").read_bytes().startswith(b"\x89PNG")
    strict_json(world / "sweep/gains.json")
    for line in (world / "sweep/metrics.jsonl").read_text().splitlines():
        assert "NaN" not in line


def test_only_the_missing_points_are_measured_again(world, tmp_path, monkeypatch):
    shutil.copytree(world / "sweep", tmp_path / "sweep")
    missing = ["hadamard-lam60", "learned-lam60"]
    points = [load_point(tmp_path / "sweep/points", label) for label in missing]
    for label in missing:
        (tmp_path / f"sweep/points/{label}.json").unlink()
    before = hashes(tmp_path / "sweep")
    measured = []
    plain = measure_point

    def measure(bench, arm, source, encode, lam, **rest):
        measured.append(f"{arm}-lam{lam:g}")
        return plain(bench, arm, source, encode, lam, **rest)

    monkeypatch.setattr("rdopt.sweep.sweep.measure_point", measure)
    assert rdopt(*all_arms(world, tmp_path / "sweep")) == 0
    assert measured == missing
    after = hashes(tmp_path / "sweep")
    # The files that were written again have the same bytes; the points differ in their seconds.
    assert {k: v for k, v in after.items() if k.removesuffix(".json") not in missing} == before
    for label, point in zip(missing, points, strict=True):
        again = load_point(tmp_path / "sweep/points", label)
        assert point is not None and again is not None
        assert (again.bpw, again.kl, again.bytes) == (point.bpw, point.kl, point.bytes)


def test_a_sweep_stopped_in_training_comes_to_the_same_points(world, tmp_path, monkeypatch):
    plain = commands.say

    def stop(line):
        plain(line)
        if line.startswith(f"  learned-lam60: step {STEPS * 4 // 5} of {STEPS}"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(commands, "say", stop)
        assert rdopt(*learned_only(world, tmp_path / "sweep")) == 130
    (arm,) = strict_json(tmp_path / "sweep/curve.json")["arms"]  # of what was finished
    assert arm["results"]["lam"] == pytest.approx([360])
    assert [p.name for p in (tmp_path / "sweep/points").iterdir()] == ["learned-lam360.json"]
    assert any((tmp_path / "sweep/state/learned-lam60").iterdir())
    assert rdopt(*learned_only(world, tmp_path / "sweep")) == 0
    unbroken = next(a for a in strict_json(world / "sweep/curve.json")["arms"] if a["name"] == "learned")
    (resumed,) = strict_json(tmp_path / "sweep/curve.json")["arms"]
    for key in ("bpw", "kl", "ppl", "bytes"):
        assert resumed["results"][key] == unbroken["results"][key]


def test_a_sweep_hits_its_target_sizes(world, tmp_path):
    words = sweep_words(world, tmp_path / "sweep", "--arms", "identity,learned", "--target-bpw", "4")
    assert rdopt(*words) == 0
    for arm in strict_json(tmp_path / "sweep/curve.json")["arms"]:
        assert arm["results"]["bpw"] == pytest.approx([4], abs=0.02)


def test_a_point_of_another_version_is_refused_in_one_sentence(world, tmp_path):
    point = json.loads((world / "sweep/points/identity-lam60.json").read_text())
    del point["ppl"]
    (tmp_path / "p.json").write_text(json.dumps(point | {"watts": 1}))
    with pytest.raises(UserError, match=r"p\.json lacks .* the fields ppl, watts: .* remove it"):
        load_point(tmp_path, "p")


def test_devices_that_cannot_share_a_batch_are_refused_before_anything_is_measured(world, tmp_path):
    config = load_config(world / "sweep/config.yaml")
    with pytest.raises(UserError, match="cannot share equally"):
        sweep(config, tmp_path / "out", print, devices=jax.local_devices() * (config.train.batch_sequences + 1))
    assert not (tmp_path / "out").exists()


def test_another_sweep_does_not_fit_into_a_folder(world, capsys):
    assert rdopt(*all_arms(world, world / "sweep"), "--encode.states", "4") == 2
    assert "another configuration" in capsys.readouterr().err


def test_a_finished_sweep_takes_other_arms_and_points(world, tmp_path):
    shutil.copytree(world / "sweep", tmp_path / "sweep")
    before = hashes(tmp_path / "sweep")
    assert rdopt(*sweep_words(world, tmp_path / "sweep", "--arms", "pca,hadamard", "--lams", "60,120")) == 0
    arms = {arm["name"]: arm["results"] for arm in strict_json(tmp_path / "sweep/curve.json")["arms"]}
    assert list(arms) == ["pca", "hadamard"] and all(x["lam"] == pytest.approx([60, 120]) for x in arms.values())
    assert before.items() <= hashes(tmp_path / "sweep").items()


def test_a_learned_point_keeps_its_transforms_and_the_aligned_model_where_asked(world, tmp_path):
    kept = world / "sweep/aligned/learned-lam60"
    assert {path.name for path in kept.iterdir()} == {"transforms.json", "transforms.safetensors"}
    words = sweep_words(world, tmp_path / "sweep", "--arms", "learned", "--lams", "60", "--keep")
    assert rdopt(*words) == 0
    assert open_checkpoint(tmp_path / "sweep/aligned/learned-lam60").num_parameters > 0


points = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12)


@given(points)
def test_the_front_is_what_no_other_point_beats(pairs):
    bpw, kl = np.array(pairs, float).T
    kept = pareto(bpw, kl)
    for i, (x, y) in enumerate(pairs):
        beaten = any(a <= x and b <= y and (a, b) != (x, y) for a, b in pairs)
        assert kept[i] == (not beaten)


def exponential(bpw, shift, sequences=16, noise=0.0, seed=0):
    """KL = 4^-(bpw + shift), spread evenly or unevenly over sequences of 31 tokens."""
    share = np.exp(noise * np.random.default_rng(seed).standard_normal((1, sequences)))
    share /= share.mean()
    kl = 4.0 ** -(np.asarray(bpw) + shift)
    return Curve(np.asarray(bpw, float), 31 * kl[:, None] * share, np.full(sequences, 31))


RATES = np.array([1.0, 2.0, 3.0, 4.0, 5.0])


@given(st.floats(-0.9, 0.9), st.floats(2.0, 4.0))
def test_bits_saved_by_a_shifted_exponential_are_the_shift(shift, at):
    base, arm = exponential(RATES, 0.0), exponential(RATES, shift)
    assert saved_bits((base.bpw, base.kl()), (arm.bpw, arm.kl()), at) == pytest.approx(shift, abs=1e-9)


def test_nothing_is_extrapolated():
    base, arm = exponential(RATES, 0.0), exponential(RATES + 1.5, 0.0)

    def saved(at):
        return saved_bits((base.bpw, base.kl()), (arm.bpw, arm.kl()), at)

    assert math.isnan(saved(0.9)) and math.isnan(saved(5.1))  # outside the baseline
    assert math.isnan(saved(2.4)) and saved(2.6) == pytest.approx(0, abs=1e-9)  # the arm has no such KL
    assert math.isnan(saved_bits((base.bpw[:1], base.kl()[:1]), (arm.bpw, arm.kl()), 1.0))


def test_points_off_the_front_do_not_change_a_gain():
    base, arm = exponential(RATES, 0.0), exponential(RATES, 0.3)
    bpw, kl = np.append(arm.bpw, 4.5), np.append(arm.kl(), 1.0)
    assert saved_bits((base.bpw, base.kl()), (bpw, kl), 3.3) == pytest.approx(0.3, abs=1e-9)


def test_identical_curves_differ_by_nothing_with_certainty():
    curve = exponential(RATES, 0.0, noise=1.0)
    gain, error = saved_bits_with_error(curve, curve, 3.0)
    assert gain == pytest.approx(0, abs=1e-12) and error == pytest.approx(0, abs=1e-12)


def test_the_error_of_a_gain_is_that_of_the_mean_log_ratio():
    """KLs that differ by an independent factor a sequence: the delta method gives the standard error."""
    n = 400
    base = exponential(RATES, 0.0, n)
    factors = np.exp(0.3 * np.random.default_rng(1).standard_normal(n))
    arm = Curve(base.bpw, base.kl_sums * factors, base.counts)
    _, error = saved_bits_with_error(base, arm, 3.0)
    assert error == pytest.approx(factors.std(ddof=1) / factors.mean() / math.sqrt(n) / math.log(4), rel=0.15)


@pytest.mark.parametrize("shift", [-0.4, 0.25])
def test_bd_rate_of_shifted_curves_has_a_closed_form(shift):
    """Equal KL costs r - shift bits; the mean over quality of log(1 - shift / r) is an integral over r."""
    rates = np.linspace(2, 6, 9)
    found = bd_rate(exponential(rates, 0.0), exponential(rates, shift), 0.0)
    # Quality is linear in r, and the overlap is where both curves have it.
    r = np.linspace(max(2, 2 + shift), min(6, 6 + shift), 100_001)
    wanted = 100 * math.expm1(np.trapezoid(np.log(1 - shift / r), r) / (r[-1] - r[0]))
    assert found == pytest.approx(wanted, abs=0.1)
    assert (found < 0) == (shift > 0)


def test_bd_rate_wants_four_points_above_the_floor_and_overlap():
    base = exponential(RATES, 0.0)
    assert math.isnan(bd_rate(base, exponential(RATES[:3], 0.1), 0.0))
    assert math.isnan(bd_rate(base, exponential(RATES, 0.1), 4.0**-3.5))  # three points left
    # Of the bits that either curve covers, both cover 3.1 of 4.9, and 3.5 of 4.5.
    assert math.isnan(bd_rate(base, exponential(RATES + 0.9, 0.0), 0.0))
    assert not math.isnan(bd_rate(base, exponential(RATES + 0.5, 0.0), 0.0))


def test_a_figure_that_the_protocol_does_not_allow_is_not_given():
    row = {"arm": "a", "against": "b", "bd_rate": math.nan, "saved": {}}
    assert gain_table([row]).splitlines()[1].split() == ["a", "b", "n/a", "n/a"]


def test_gains_against_both_baselines_are_recorded(world):
    found = json.loads((world / "sweep/gains.json").read_text())
    assert {(row["arm"], row["against"]) for row in found["gains"]} == {
        ("hadamard", "identity"), ("learned", "identity"), ("blockwise-pca", "identity"),
        ("learned", "hadamard"), ("blockwise-pca", "hadamard"),
    }
    assert all(row["bd_rate"] is None for row in found["gains"])  # three points are too few
