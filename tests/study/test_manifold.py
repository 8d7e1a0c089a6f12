"""The tangent of a trajectory: projections, norms and dimensions are exact, known curvature is found."""

import contextlib
import io
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest
from tiny_runs import TEXT, load_script, make_model, make_text, rdopt, strict_json

from rdopt.calibration.subject import load_subject
from rdopt.checkpoint.folder import open_checkpoint
from rdopt.checkpoint.write import carried_files, write_checkpoint
from rdopt.config.errors import UserError
from rdopt.operator.params import params_to_tensors
from rdopt.study.manifold.dimension import (
    difference_gram_of_steps,
    difference_grams,
    dimensions_of,
    gram_dimension,
    powers,
    sampled_step_gram,
    step_grams,
)
from rdopt.study.manifold.hypotheses import MANIFOLD_PREDICTIONS, dimension_estimates, harm_estimates
from rdopt.study.manifold.tangent import (
    across,
    across_in_total,
    along,
    matrix_bases,
    norms,
    random_tangent,
    rotated_at_random,
    slices,
    tangent,
)
from rdopt.study.manifold.trajectory import (
    NOISE_ARMS,
    Harm,
    Trajectory,
    directions,
    params_of,
    read_trajectory,
    vector_of,
)

SHAPES = ((12, 20), (10, 40), (30, 30))
SIZES = np.prod(SHAPES, axis=1)
STARTS, N = np.cumsum(SIZES) - SIZES, int(SIZES.sum())


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("study_manifold")


def walk(k: int = 7, seed: int = 0, scales: tuple[float, ...] = (1.0, 3.0, 0.2)) -> np.ndarray:
    """Points whose matrices move at different paces."""
    steps = np.random.default_rng(seed).standard_normal((k, N)) * np.repeat(scales, SIZES)
    return np.cumsum(steps, axis=0)


def test_the_tangent_is_an_orthonormal_basis_of_the_differences_from_the_last_point():
    points = walk()
    J = tangent(points)
    D = (points[:-1] - points[-1]).T
    assert J.shape == (N, 6)
    assert np.allclose(J.T @ J, np.eye(6), atol=1e-12)
    U = np.linalg.svd(D, full_matrices=False)[0]
    assert np.allclose(J @ J.T, U @ U.T, atol=1e-9)  # the projection on their span
    assert np.allclose(np.abs(np.sum(J * U, axis=0)), 1, atol=1e-9)


def test_a_trajectory_on_a_line_has_dimension_one():
    direction = np.random.default_rng(0).standard_normal(N)
    points = 5.0 + np.array([0.0, 1.0, 3.0, 3.5, 7.0])[:, None] * direction
    J = tangent(points)
    assert J.shape == (N, 1) and abs(J[:, 0] @ direction) == pytest.approx(np.linalg.norm(direction))
    grams = difference_grams(points, STARTS)
    assert gram_dimension(grams.sum(axis=0)) == pytest.approx(1)
    assert gram_dimension(step_grams(grams).sum(axis=0)) == pytest.approx(1)
    with pytest.raises(ValueError, match="alike"):
        tangent(np.ones((4, N)))


def test_gram_matrices_are_those_of_differences_and_steps():
    points = walk()
    grams = difference_grams(points, STARTS)
    steps, D = np.diff(points, axis=0), points[:-1] - points[-1]
    for found, place in zip(grams, slices(STARTS, N), strict=True):
        assert np.allclose(found, D[:, place] @ D[:, place].T)
        assert np.allclose(step_grams(found), steps[:, place] @ steps[:, place].T)
    assert np.allclose(difference_gram_of_steps(step_grams(grams)), grams)
    assert powers(grams.sum(axis=0)) == pytest.approx(np.linalg.svd(D, compute_uv=False) ** 2)


def test_noise_along_stays_in_the_tangent_and_noise_across_has_no_component_in_it():
    J, rng = tangent(walk()), np.random.default_rng(1)
    bases = matrix_bases(J, STARTS)
    for _ in range(3):
        inside = along(J, rng)
        outside, total = across(bases, inside, STARTS, rng), across_in_total(J, rng)
        assert np.linalg.norm(J.T @ inside) == pytest.approx(1)
        assert np.allclose(J.T @ outside, 0, atol=1e-12) and np.allclose(J.T @ total, 0, atol=1e-12)
        assert norms(outside, STARTS) == pytest.approx(norms(inside, STARTS))
        assert [np.linalg.norm(x) for x in (total, inside, outside)] == pytest.approx([1, 1, 1])
        assert norms(total, STARTS)[0] != pytest.approx(norms(inside, STARTS)[0], rel=0.1)
    with pytest.raises(ValueError, match="more entries"):
        matrix_bases(np.eye(6)[:, :3], np.array([0, 3]))


def test_turned_noise_keeps_the_singular_values_of_every_matrix_and_nothing_else():
    rng = np.random.default_rng(0)
    x = along(tangent(walk()), rng)
    y = rotated_at_random(x, SHAPES, STARTS, rng)
    for shape, place in zip(SHAPES, slices(STARTS, N), strict=True):
        values = [np.linalg.svd(v[place].reshape(shape), compute_uv=False) for v in (x, y)]
        assert values[0] == pytest.approx(values[1])
    assert abs(x @ y) < 0.15


def test_the_control_moves_every_matrix_as_far_as_the_tangent_in_directions_of_its_own():
    J = tangent(walk())
    control = random_tangent(J, STARTS, np.random.default_rng(0))
    assert np.allclose(control.T @ control, np.eye(6), atol=1e-12)
    assert norms(control, STARTS) == pytest.approx(norms(J, STARTS), rel=0.15)
    assert np.linalg.norm(J.T @ control) < 6 * 6 / np.sqrt(N)


@pytest.mark.parametrize("inside, expected", [(100.0, "supported"), (0.01, "refuted")])
def test_a_quadratic_kl_is_found_curved_along_the_tangent_or_across_it(inside, expected, script):
    points = walk()
    J = tangent(points)
    run = Trajectory(points, STARTS, SHAPES, ())
    counts, tilt = np.full(10, 50), np.random.default_rng(0).uniform(0.5, 1.5, 10)

    def kl(x: np.ndarray) -> np.ndarray:
        """x^T H x / 2 with curvature `inside` in the tangent and 1 across, spread over sequences."""
        part = J.T @ x
        return tilt * (x @ x + (inside - 1) * part @ part) / 2

    draws = list(directions(J, run, 0, 6))
    sums = {arm: np.array([[kl(size * d[arm]) for d in draws] for size in (0.1, 0.2)]) for arm in NOISE_ARMS}
    found = harm_estimates(Harm(sums, counts))
    for name in ("across", "across in total"):
        assert found[name].value == pytest.approx(np.log(inside), abs=1e-6)
    assert MANIFOLD_PREDICTIONS["across"].verdict(found["across"]) == expected
    assert abs(found["control"].value) < 0.3  # random directions meet the tangent by chance only


def test_a_random_walk_has_the_spectrum_of_antognini_and_sohl_dickstein():
    p = 200
    steps = sampled_step_gram(np.ones(p), 200_000, np.random.default_rng(0))
    assert np.diagonal(steps) == pytest.approx(np.ones(p))
    assert gram_dimension(steps) == pytest.approx(p, rel=0.01)
    found = powers(difference_gram_of_steps(steps))
    i = np.arange(1, 6)
    assert found[:5] / found[0] == pytest.approx(1 / (2 * i - 1) ** 2, rel=0.03)
    assert gram_dimension(difference_gram_of_steps(steps)) == pytest.approx(1.5, abs=0.02)


def test_a_random_walk_is_undecided_and_a_turn_back_to_a_plane_is_supported(script):
    free = Trajectory(walk(12, seed=5, scales=(1.0, 1.0, 1.0)), STARTS, SHAPES, ())
    plane = tangent(walk(3))
    flat = Trajectory((free.points - free.points[-1]) @ plane @ plane.T * 9, STARTS, SHAPES, ())
    found = {k: dimension_estimates(dimensions_of(run, 0)) for k, run in (("free", free), ("flat", flat))}
    steps = MANIFOLD_PREDICTIONS["steps"]
    assert abs(found["free"]["steps"].value) < 0.1 and abs(found["free"]["walk"].value) < 0.1
    assert found["flat"]["steps"].value < -1 and steps.verdict(found["flat"]["steps"]) == "supported"
    # the walk compared with keeps the length of every step in every matrix
    found = dimensions_of(free, 0)
    lengths = [np.diagonal(x, axis1=1, axis2=2) for x in (found.steps, found.walk_steps)]
    assert lengths[0] == pytest.approx(lengths[1])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, four checkpoints that lead to it, and a text."""
    folder = tmp_path_factory.mktemp("run")
    make_text(folder / "text.jsonl")
    model = make_model(folder / "model", tie_word_embeddings=True)
    subject = load_subject(model)
    end, rng = vector_of(subject.params), np.random.default_rng(0)
    for step, away in ((4, 0.0), (3, 0.02), (2, 0.04), (1, 0.06)):
        point = end + away * rng.standard_normal(len(end))
        tensors = params_to_tensors(params_of(point, subject.params), subject.arch)
        write_checkpoint(folder / "steps" / f"step-{step:06d}", subject.checkpoint.config, tensors, dtype="float32",
                         files=carried_files(open_checkpoint(model).folder))
    return folder


def words(run: Path, *more: str) -> list[str]:
    plain = ["--model", str(run / "model"), "--steps", str(run / "steps"), "--text", str(run / "text.jsonl")]
    return [*plain, "--context", "32", "--max-tokens", "512", "--draws", "3", "--sizes", "0.05", "0.1", *more]


def test_checkpoints_are_read_in_order_and_vectors_are_networks(run):
    subject = load_subject(run / "model")
    found = read_trajectory(run / "steps", subject, last=3)
    assert found.names == ("step-000002", "step-000003", "step-000004")
    assert np.array_equal(found.points[-1], vector_of(subject.params))
    assert found.sizes.sum() == found.points.shape[1] and len(found.sizes) == 14
    rounded = vector_of(subject.params).astype(ml_dtypes.bfloat16).astype(float)
    assert read_trajectory(run / "steps", replace(subject, params=params_of(rounded, subject.params))).names[0]
    back = params_of(found.points[-1], subject.params)
    assert all(np.array_equal(back["blocks"][k], subject.params["blocks"][k]) for k in back["blocks"])
    last = slice(int(found.starts[-1]), None)
    assert np.array_equal(found.points[-1][last], subject.params["blocks"]["down"][-1].astype(float).ravel())


def test_a_model_of_another_run_or_shape_and_too_few_checkpoints_are_refused(run, tmp_path):
    with pytest.raises(UserError, match="the model lies"):
        read_trajectory(run / "steps", load_subject(make_model(tmp_path / "a", 1, tie_word_embeddings=True)))
    with pytest.raises(UserError, match="0 from step-000003"):
        read_trajectory(run / "steps", load_subject(run / "steps" / "step-000003"))
    with pytest.raises(UserError, match="another network"):
        read_trajectory(run / "steps", load_subject(make_model(tmp_path / "b")))
    shutil.copytree(run / "steps" / "step-000004", tmp_path / "few" / "step-000004")
    with pytest.raises(UserError, match="gives 1 checkpoints"):
        read_trajectory(tmp_path / "few", load_subject(run / "model"))


def test_the_study_of_a_tiny_run_prints_what_it_writes(script, run, tmp_path, capsys):
    out = ["--json", str(tmp_path / "found.json"), "--png", str(tmp_path / "found.png")]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert script.main(words(run, *out)) == 0
    found = strict_json(tmp_path / "found.json")
    assert found["tangent"] == 3 and len(found["kl"]["along"]) == 2 and len(found["kl"]["along"][0]) == 3
    assert all(0 < x < 1 for arm in found["kl"].values() for row in arm for x in row)
    ratio = [np.mean(found["kl"]["along"][i]) / np.mean(found["kl"]["across"][i]) for i in range(2)]
    assert found["predictions"]["across"]["value"] == pytest.approx(np.mean(np.log(ratio)))
    assert all(f"{x['verdict']:10s}" in said.getvalue() for x in found["predictions"].values())
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    for more, sentence in ((out, "exists already"), (["--draws", "1"], "--draws is 1"), (["--last", "2"], "--last is"),
                           (["--sizes", "0"], "--sizes holds 0")):
        assert script.main(words(run, *more)) == 2
        assert sentence in capsys.readouterr().err


def test_an_analysis_judges_the_checkpoints_of_a_run_beside_its_own_hypotheses(run, tmp_path, capsys):
    text = ("--text", run / "text.jsonl", *TEXT, "--context", "64", "--stride", "64", "--max-tokens", "512")
    command = ("analyze", run / "model", "--bases", "identity,hadamard", "--analyze.bits", "8", *text)
    assert rdopt(*command, "--trajectory", run / "steps", "--out", tmp_path / "found") == 0
    rows = {p["name"]: p for p in strict_json(tmp_path / "found" / "analysis.json")["predictions"]}
    assert set(MANIFOLD_PREDICTIONS) < set(rows) and rows["across"]["figure"] == "4 checkpoints"
    assert f"{rows['walk']['value']:+.4g}" in capsys.readouterr().out
    few = dimension_estimates(dimensions_of(read_trajectory(run / "steps", load_subject(run / "model")), 0))["few"]
    assert (rows["few"]["value"], rows["few"]["error"]) == pytest.approx(few)
    assert rdopt(*command, "--trajectory", run / "model", "--out", tmp_path / "none") == 2
    assert "gives 0 checkpoints" in capsys.readouterr().err
