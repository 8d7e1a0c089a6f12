"""Claims about structure along the index: what is exactly a function is explained, noise is not, and bits follow."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_functions.bits import bits_at_error, error_at, rate_at, spread_histogram, step_for_bits
from index_functions.channels import blocks_in, gaussian_like, matched_channels, sorted_channels
from index_functions.functions import Corner, LayerModes, LowRank
from index_functions.predictions import INDEX_PREDICTIONS, judge
from index_functions.structure import ORDERED_FAMILIES, cheapest, error_targets, index_structure
from tiny_runs import load_script, strict_json

from rdopt.checkpoint.folder import open_checkpoint
from rdopt.config.errors import UserError
from rdopt.operator.params import load_params
from rdopt.study.predictions import Estimate, Prediction
from rdopt.transforms.matrices.frequency import dct
from rdopt.transforms.matrices.random import random_orthogonal

BUDGETS = (0.01, 0.05, 0.2)
ONE_MATRIX = (Corner, LowRank)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def blocks_of(layers: int = 3, d: int = 8, ffn: int = 12, seed: int = 0) -> dict[str, np.ndarray]:
    shapes = {"q": (d, d), "k": (4, d), "v": (4, d), "o": (d, d), "gate": (ffn, d), "up": (ffn, d), "down": (d, ffn)}
    return {name: normal(layers, *shape, seed=seed + i) for i, (name, shape) in enumerate(shapes.items())}


def structured(family) -> tuple[np.ndarray, int]:
    """A unit that is nearly a function of the index, in its family's sense, and the layers in it."""
    if family is LayerModes:
        return 30 * normal(1, 40, 30) + normal(6, 40, 30), 6
    if family is LowRank:
        return 30 * normal(1, 60, 1) * normal(1, 1, 50, seed=1) + normal(1, 60, 50, seed=2), 1
    smooth = dct(60)[:, :3] @ normal(3, 3) @ dct(50)[:, :3].T
    return 30 * np.sqrt(60 * 50 / 9) * smooth[None] + normal(1, 60, 50, seed=1), 1


@pytest.fixture
def script():
    return load_script("index_structure")


# What families explain


def test_a_stack_of_cosine_modes_of_the_layer_index_is_explained_by_as_many_modes():
    modes = dct(6)[:, :2]
    fit = LayerModes(np.einsum("lm,mij->lij", modes, normal(2, 7, 5) * np.array([2.0, 1.0])[:, None, None]), BUDGETS)
    assert fit.explained(2) == pytest.approx(1, abs=1e-12)
    assert 0.3 < fit.explained(1) < 0.95
    assert fit.numbers(2) == 2 * 7 * 5 and list(fit.sizes) == [1, 2, 3]


def test_one_mode_of_the_layer_index_is_the_mean_over_layers():
    X = normal(5, 6, 4)
    centred = np.sum((X - X.mean(axis=0)) ** 2) / np.sum(X**2)
    assert LayerModes(X, BUDGETS).explained(1) == pytest.approx(1 - centred)
    np.testing.assert_allclose(LayerModes(X, BUDGETS).part(1, -30).f, np.stack([X.mean(axis=0)] * 5), atol=1e-8)


def test_a_matrix_of_rank_two_is_explained_by_rank_two():
    fit = LowRank(normal(1, 20, 2) @ normal(1, 2, 15, seed=1), BUDGETS)
    assert fit.explained(2) == pytest.approx(1, abs=1e-12)
    assert fit.explained(1) < 0.99
    assert fit.numbers(2) == 2 * (20 + 15)


@pytest.mark.parametrize("rows, columns", [(4, 3), (2, 15), (20, 1)])
def test_a_matrix_of_slow_cosines_in_both_or_in_one_index_is_explained_by_its_corner(rows, columns):
    W = dct(20)[:, :rows] @ normal(rows, columns) @ dct(15)[:, :columns].T
    fit = Corner(W[None], BUDGETS)
    assert fit.explained(rows * columns) == pytest.approx(1, abs=1e-12)
    assert fit.explained(rows * columns // 2) < 0.99


@settings(max_examples=20)
@given(st.integers(2, 6), st.integers(2, 12), st.integers(2, 12), st.integers(0, 99))
def test_explained_energy_grows_with_the_numbers_and_ends_at_one(layers, rows, columns, seed):
    X = normal(layers, rows, columns, seed=seed)
    ladders = {LayerModes: range(layers + 1), Corner: range(rows * columns + 1), LowRank: range(min(rows, columns) + 1)}
    for family, sizes in ladders.items():
        fit = family(X if family is LayerModes else X[:1], BUDGETS)
        energies = np.array([fit.explained(size) for size in sizes])
        assert energies[0] == 0 and energies[-1] == pytest.approx(1)
        assert np.all(np.diff(energies) >= -1e-12)


@pytest.mark.parametrize("family, size, fine", [(LayerModes, 2, -20), (Corner, 30, -20), (LowRank, 3, 30)])
def test_what_f_explains_is_what_it_takes_from_the_residual(family, size, fine):
    X = normal(5 if family is LayerModes else 1, 20, 15)
    fit = family(X, BUDGETS)
    left = np.sum((X - fit.part(size, fine).f) ** 2) / np.sum(X**2)
    assert left == pytest.approx(1 - fit.explained(size), abs=1e-6)


# Bits


def test_bits_at_an_error_are_those_of_high_rate():
    x, error = 100 * normal(200, 100), 200 * 100 / 12
    high = 200 * 100 * np.log2(np.sqrt(2 * np.pi * np.e * np.mean(x**2)))
    assert bits_at_error(x, error) == pytest.approx(high, rel=2e-3)


def test_bits_at_the_error_of_a_step_are_those_of_the_step():
    x = normal(60, 40) * np.exp(normal(40))
    counts = spread_histogram(x)
    assert counts.sum() == pytest.approx(x.size)
    step = step_for_bits(counts, 2.5 * x.size)
    assert rate_at(counts, np.log2(step)) == pytest.approx(2.5 * x.size)
    assert bits_at_error(x, error_at(counts, np.log2(step))) == pytest.approx(2.5 * x.size, rel=1e-6)
    assert bits_at_error(x, 1.01 * np.sum(x**2)) == 0


@pytest.mark.parametrize("family", [LayerModes, Corner, LowRank])
def test_f_plus_r_saves_bits_on_structure_and_costs_bits_on_noise(family):
    X, layers = structured(family)
    noise = np.random.default_rng(9).permutation(normal(*X.shape, seed=5).ravel()).reshape(X.shape)
    for unit, saves in ((4 * X, True), (4 * noise, False)):
        errors = np.full(layers, unit[0].size / 12)
        alone = sum(bits_at_error(x, e) for x, e in zip(unit, errors, strict=True))
        size, bits = cheapest(family(unit, BUDGETS), unit, errors)
        assert size >= 1
        assert (bits < alone - 0.2 * unit.size) if saves else (bits > alone)


def test_a_yardstick_takes_its_bits():
    blocks = blocks_of()
    for name, mark in error_targets(blocks, 3.0).items():
        bits = [bits_at_error(x, e) for x, e in zip(blocks[name] / mark.step, mark.errors, strict=True)]
        assert sum(bits) / blocks[name].size == pytest.approx(3, abs=1e-4)


# Channels and controls


def test_the_control_has_the_variances_of_rows_and_columns():
    scale = np.exp(normal(50))[:, None] * np.exp(normal(40, seed=1))
    blocks = {"q": scale * normal(1, 50, 40, seed=2)}
    draws = np.mean([gaussian_like(blocks, np.random.default_rng(s))["q"] ** 2 for s in range(400)], axis=0)
    for axis in (1, 2):
        expected = np.mean(blocks["q"] ** 2, axis=axis)
        np.testing.assert_allclose(draws.mean(axis=axis), expected, rtol=0.35)
        assert np.mean(draws.mean(axis=axis) / expected) == pytest.approx(1, abs=0.03)


def test_matching_undoes_a_shuffle_of_the_hidden_channels():
    one = blocks_of(layers=1)
    orders = [np.arange(12), *(np.random.default_rng(s).permutation(12) for s in (1, 2))]
    shuffled = {name: np.concatenate([W] * 3) for name, W in one.items()}
    for name in ("gate", "up"):
        shuffled[name] = np.stack([one[name][0][order] for order in orders])
    shuffled["down"] = np.stack([one["down"][0][:, order] for order in orders])
    for name, W in matched_channels(shuffled).items():
        np.testing.assert_array_equal(W, np.concatenate([one[name]] * 3))


def test_sorting_only_reorders_and_makes_a_rank_one_stream_monotone():
    blocks = blocks_of()
    direction = normal(8, seed=7)
    blocks = {n: W + 9 * (direction if n not in ("o", "down") else direction[:, None]) for n, W in blocks.items()}
    for name, W in sorted_channels(blocks).items():
        np.testing.assert_allclose(np.sort(W, axis=None), np.sort(blocks[name], axis=None))
    stream = sorted_channels(blocks)["q"].mean(axis=(0, 1))
    assert abs(np.corrcoef(np.argsort(np.argsort(stream)), np.arange(8))[0, 1]) > 0.95


def test_low_rank_and_the_layer_index_cannot_tell_one_rotation_of_the_stream_from_another(tiny_llama):
    checkpoint = open_checkpoint(tiny_llama(num_hidden_layers=4))
    params = load_params(checkpoint)
    systems = [blocks_in(basis, params, checkpoint.arch) for basis in ("identity", "hadamard", "dct", "joint")]
    for family, name in ((LayerModes, "q"), (LayerModes, "down"), (LowRank, "up"), (LowRank, "v")):
        fits = [family(b[name] if family is LayerModes else b[name][:1], BUDGETS) for b in systems]
        np.testing.assert_allclose([fit.explained(2) for fit in fits], fits[0].explained(2), rtol=1e-5)
    corners = [Corner(b["up"][:1], BUDGETS).explained(50) for b in systems]
    assert np.ptp(corners) > 1e-3


def test_rotations_of_layers_share_the_energy_of_their_mean():
    Q = random_orthogonal(0, 12)
    X = normal(1, 20, 12) + normal(5, 20, 12, seed=1)
    assert LayerModes(X @ Q, BUDGETS).explained(1) == pytest.approx(LayerModes(X, BUDGETS).explained(1))


# Verdicts, the whole, and the script


@pytest.mark.parametrize(
    "mean, error, sign, expected",
    [(0.3, 0.1, 1, "supported"), (0.3, 0.1, -1, "refuted"), (-0.3, 0.1, -1, "supported"), (0.3, 0.2, 1, "undecided"),
     (1e-8, 1e-10, 1, "undecided")],
)  # fmt: skip
def test_a_verdict_needs_two_standard_errors_and_the_sign(mean, error, sign, expected):
    assert Prediction("", sign).verdict(Estimate(mean, error), least=1e-6) == expected


def test_a_planted_function_of_the_layer_is_found_and_pays(tiny_llama):
    checkpoint = open_checkpoint(tiny_llama(num_hidden_layers=4))
    params = load_params(checkpoint)
    blocks = {k: np.asarray(v) for k, v in params["blocks"].items()}
    same = {k: (v[:1] + 0.02 * v if v.ndim == 3 else np.ones_like(v)) for k, v in blocks.items()}
    for planted, weights in ((True, same), (False, blocks)):
        model = {**params, "blocks": weights}
        found = index_structure(model, checkpoint.arch, bases=("identity", "hadamard"), budgets=(0.05,), bits=5.0)
        json.dumps(found, allow_nan=False)
        family = found["systems"]["identity"]["families"]["layer index"]
        one = family["sizes"][0]
        assert one["numbers"] == 0.25
        assert (one["excess"] > 0.7) if planted else (abs(one["excess"]) < 0.1)
        assert (family["best"]["difference"] < -0.5) if planted else (family["best"]["difference"] > 0)
        flat = [system["alone"]["flat"] for system in found["systems"].values()]
        np.testing.assert_allclose(flat, flat[0], rtol=1e-4)
        assert found["systems"]["identity"]["alone"]["mean"] < flat[0]


def test_predictions_are_judged_where_their_systems_were_measured():
    def system(energy: float, bits: float) -> dict:
        row = {"numbers": 0.05, "units": [energy, energy + 0.01, energy - 0.01]}
        best = {"units": [bits, bits + 0.01, bits - 0.01]}
        sizes = [{"numbers": 0.5, "units": [9.0] * 3}, row]
        families = {name: {"sizes": sizes, "best": best} for name in ORDERED_FAMILIES}
        return {"families": families, "alone": {"units": [bits + 2, bits + 2.1, bits + 1.9]}}

    judged = judge({"joint": system(0.3, -0.2), "identity": system(0.1, 0.1)})
    assert len(judged) == sum(p.against != "hadamard" for p in INDEX_PREDICTIONS)
    assert {p["verdict"] for p in judged} == {"supported"}
    assert {p["verdict"] for p in judge({"joint": system(0.1, 0.1), "identity": system(0.3, -0.2)})} >= {"refuted"}
    assert judge({"pca": system(0.1, 0.1)}) == []


def test_a_network_of_one_layer_and_axes_of_activations_without_them_are_refused(tiny_llama):
    for layers, bases, sentence in ((1, ("identity",), "two layers"), (2, ("pca-act",), "moments of a text")):
        checkpoint = open_checkpoint(tiny_llama(num_hidden_layers=layers))
        with pytest.raises(UserError, match=sentence):
            index_structure(load_params(checkpoint), checkpoint.arch, bases=bases)


def test_the_script_writes_what_it_prints_and_overwrites_nothing(script, tiny_llama, tmp_path, capsys):
    out, png = tmp_path / "index.json", tmp_path / "index.png"
    words = ["--model", str(tiny_llama()), "--bases", "identity", "joint", "--json", str(out), "--png", str(png)]
    assert script.main(words) == 0
    said = capsys.readouterr().out
    found = strict_json(out)
    assert set(found["systems"]) == {"identity", "joint"} and png.read_bytes()[:4] == b"\x89PNG"
    assert all(p["claim"] in said and p["verdict"] in said for p in found["predictions"])
    assert f"{found['systems']['joint']['alone']['mean']:.4f}" in said
    before = out.read_bytes(), png.read_bytes()
    for more, sentence in (((), "exists already"), (("--seeds", "1"), "two seeds"), (("--budgets", "2"), "not 2.")):
        fresh = ["--json", str(tmp_path / "other.json"), *more] if more else []
        assert script.main(["--model", words[1], *(fresh or words[2:])]) == 2
        said = capsys.readouterr()
        assert sentence in said.err and said.err.count("\n") == 1
    assert not (tmp_path / "other.json").exists()
    assert (out.read_bytes(), png.read_bytes()) == before
