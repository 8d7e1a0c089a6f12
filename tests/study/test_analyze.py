"""What `rdopt analyze` measures against closed forms, and the command on a tiny model."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import TEXT, make_model, make_text, rdopt, strict_json

from rdopt.config.schema import AnalyzeConfig
from rdopt.study.analyze import blocks
from rdopt.study.analyze.ends import End
from rdopt.study.analyze.figures import (
    counts_of,
    energy_concentration,
    error_cost,
    huffman_bits,
    matrix_figures,
    singular_concentration,
)
from rdopt.study.analyze.networks import (
    NOISE,
    Inputs,
    Network,
    Noise,
    Rounding,
    gaussian,
    largest,
    networks_of,
)
from rdopt.study.analyze.predictions import CONCEPT_PREDICTIONS, protection_worth
from rdopt.study.figures import entropy_of_counts
from rdopt.transforms.matrices.random import random_orthogonal

RNG = np.random.default_rng(0)
BASES = "identity,hadamard,pca"


def test_figures_of_a_gaussian_matrix_are_its_closed_forms():
    found = matrix_figures(RNG.standard_normal((600, 800)))
    assert abs(found["kurtosis"] - 3) < 0.03
    edges = [0.5 * math.erf((k - 0.5) * 0.5 / math.sqrt(2)) for k in range(-20, 22)]  # a step of half the rms
    masses = [b - a for a, b in pairwise(edges) if b > a]
    assert abs(found["entropy_step"] + sum(p * math.log2(p) for p in masses)) < 0.003
    assert abs(found["zeros"] - math.erf(1 / math.sqrt(2))) < 0.003  # within one rms
    assert found["columns"]["participation"] > 0.99 and abs(found["columns"]["top 10"] - 0.1) < 0.02
    assert found["entropy_step"] <= found["huffman_step"] < found["entropy_step"] + 0.1


def test_bins_over_the_range_get_finer_by_what_the_range_shrinks():
    W = RNG.standard_normal((400, 400))
    W[0, 0] = 40.0
    spiky, W[0, 0] = matrix_figures(W), 0.0
    flat = matrix_figures(W)
    assert abs((flat["entropy_bins"] - spiky["entropy_bins"]) - math.log2(spiky["l_inf"] / flat["l_inf"])) < 0.05
    assert abs(flat["entropy_step"] - spiky["entropy_step"]) < 0.02


@given(st.integers(1, 60), st.integers(0, 5))
def test_one_direction_or_all_alike(n, seed):
    one = energy_concentration(np.eye(n)[seed % n])
    assert one["top 1"] == 1 and one["participation"] == pytest.approx(1 / n)
    flat = energy_concentration(np.ones(n))
    assert flat["entropy dimension"] == pytest.approx(1) and flat["participation"] == pytest.approx(1)


def test_entropy_and_huffman_of_powers_of_two_agree():
    counts = np.array([8, 4, 2, 1, 1])
    assert entropy_of_counts(counts) == huffman_bits(counts) == 1.875
    assert huffman_bits(np.array([7])) == 1
    assert counts_of(np.array([[-1.0, 0.1], [0.9, 2.2]]), 1.0).tolist() == [1, 1, 1, 1]


def test_a_rotation_moves_neither_norm_nor_singular_values():
    W, Q = RNG.standard_normal((20, 30)), random_orthogonal(0, 30)
    assert matrix_figures(W @ Q)["l2"] == pytest.approx(matrix_figures(W)["l2"], rel=1e-12)
    exact = energy_concentration(np.linalg.svd(W, compute_uv=False) ** 2)
    assert singular_concentration(W @ Q) == pytest.approx(exact)


def test_a_matrix_of_zeros_has_no_figures():
    with pytest.raises(ValueError, match="zeros"):
        matrix_figures(np.zeros((3, 3)))


@given(st.integers(2, 8), st.integers(1, 12), st.integers(1, 12))
def test_rounding_stays_within_half_a_step_of_every_row(bits, rows, columns):
    W = np.random.default_rng(rows).standard_normal((rows, columns)).astype(np.float32)
    coded = Rounding("blocks", bits).apply(W, Inputs(np.eye(columns)), (0,))
    step = np.abs(W).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1)
    assert np.all(np.abs(coded - W) <= step / 2 * (1 + 1e-5))
    assert all(len(np.unique(row)) <= 2**bits - 1 for row in coded)


def test_protected_weights_keep_sixteen_bits_and_do_not_stretch_the_scale():
    W = RNG.standard_normal((40, 50)).astype(np.float32)
    W[3, 4] = 100.0
    coded = Rounding("blocks", 4, 0.0005).apply(W, Inputs(np.eye(50)), (0,))
    assert coded[3, 4] == 100
    assert np.abs(coded - W).max() < 0.5 * np.delete(np.abs(W).ravel(), 3 * 50 + 4).max() / 7 * (1 + 1e-5)
    assert largest(W, 0.0).sum() == 0 and largest(W, 0.01).sum() == 20


@pytest.mark.parametrize("where", ["largest", "random"])
def test_noise_on_entries_has_its_norm_and_its_places(where):
    W = RNG.standard_normal((30, 40)).astype(np.float32)
    moved = Noise(where, 0.05).apply(W, Inputs(np.eye(40)), (1, 2)) - W
    assert np.count_nonzero(moved) == 60
    assert np.linalg.norm(moved) == pytest.approx(NOISE * np.linalg.norm(W), rel=1e-4)
    assert np.array_equal(moved != 0, largest(W, 0.05)) == (where == "largest")


def test_noise_is_split_between_weak_and_strong_inputs_at_their_mean_power():
    axes = random_orthogonal(3, 16)
    sigma = (axes * np.arange(1.0, 17.0)) @ axes.T
    W = RNG.standard_normal((8, 16)).astype(np.float32)
    noise = gaussian((0,), W.shape)
    kept = noise @ axes * (8.5 / (8.5 + np.arange(1.0, 17.0)))
    assert np.allclose(Inputs(sigma).weak(noise) @ axes, kept, atol=1e-5)
    parts = {Noise("weak"): kept, Noise("strong"): noise @ axes - kept, Noise("all"): noise @ axes}
    for part, expected in parts.items():
        moved = (part.apply(W, Inputs(sigma), (0,)) - W) @ axes
        assert np.linalg.norm(moved) == pytest.approx(NOISE * np.linalg.norm(W), rel=1e-4)
        assert np.allclose(moved / np.linalg.norm(moved), expected / np.linalg.norm(expected), atol=1e-5)


def test_protection_is_worth_what_its_bits_would_gain():
    assert protection_worth(0.5, 15) == pytest.approx(2 * math.log(2) * (0.5 + 1))


@pytest.mark.parametrize("G", [np.diag([1.0, 2.0, 0.5]), np.array([1.0, 2.0, 0.5])], ids=["whole", "diagonal"])
def test_an_error_costs_its_output_and_half_its_curvature(G):
    X, E = RNG.standard_normal((500, 4)), RNG.standard_normal((3, 4))
    y = X @ E.T
    found = error_cost(E, X.T @ X / len(X), G)
    assert found.output == pytest.approx(np.mean(np.sum(y**2, axis=1)))
    assert found.kl == pytest.approx(0.5 * np.mean(y**2 @ [1.0, 2.0, 0.5]))


def test_an_error_of_the_embedding_counts_where_its_token_is_read():
    E, g = RNG.standard_normal((5, 3)), RNG.standard_normal((200, 3))
    seen = RNG.integers(0, 5, 200)
    frequency = np.bincount(seen, minlength=5) / 200
    G = g.T @ g / 200
    found = End("embed", E, frequency, G).cost(E)
    assert found.output == pytest.approx(np.mean(np.sum(E[seen] ** 2, axis=1)))
    assert found.kl == pytest.approx(0.5 * np.mean(np.einsum("ti,ij,tj->t", E[seen], G, E[seen])))
    head = End("head", E, frequency, G).cost(E)
    assert head.kl == pytest.approx(found.kl) and head.output == pytest.approx(np.sum(np.square(g @ E.T)) / 200)


def test_every_network_has_its_basis_and_a_partner():
    networks = networks_of(("identity", "hadamard"), (3, 4), 0.005)
    assert {n.part for n in networks} == {None, "blocks", "embed", "head"} and Network("hadamard") in networks
    assert {n.change.kind for n in networks if n.change is not None and not n.has_stream} == {"rounded head"}
    assert all(n.streamed in networks and n.streamed.has_stream for n in networks)
    assert len(set(networks)) == len(networks)
    labels = [n.change.label for n in networks if n.change is not None and n.part == "blocks" and n.basis == "hadamard"]
    assert labels == ["3 bits", "3 bits, protected", "4 bits", "4 bits, protected"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_model(folder / "model")
    make_text(folder / "text.jsonl")
    # Windows of all positions that the model has: every network is compared one window at a time.
    windows = ("--context", "64", "--stride", "64", "--max-tokens", "512")
    words = ("--text", folder / "text.jsonl", *TEXT, *windows, "--analyze.bits", "4,8")
    command = ("analyze", folder / "model", "--bases", BASES, *words)
    assert rdopt(*command, "--out", folder / "whole") == 0
    return folder, command


def test_an_analysis_holds_every_matrix_in_every_basis(world):
    found = strict_json(world[0] / "whole" / "analysis.json")
    blocks = [r for r in found["tensors"] if r["layer"] is not None]
    names = {r["name"] for r in blocks}
    assert len(blocks) == len(names) * 3
    for name in names:
        norms = [r["l2"] for r in blocks if r["name"] == name]
        assert np.ptp(norms) < 1e-6 * norms[0]
    assert {r["kind"] for r in found["tensors"] if r["layer"] is None} == {"embed", "head"}
    kl = {(n["basis"], n["kind"], n["about"]): n["kl"] for n in found["networks"]}
    assert all(kl[basis, "folded", ""] < 1e-6 for basis in BASES.split(","))
    assert all(kl[b, "rounded", "8 bits"] < kl[b, "rounded", "4 bits"] for b in BASES.split(","))
    for kind in ("rounded embed", "rounded head"):
        assert all(0 < kl[b, kind, "8 bits"] < kl[b, kind, "4 bits"] for b in BASES.split(","))
    assert {p["name"] for p in found["predictions"]} == set(CONCEPT_PREDICTIONS)
    for p in found["predictions"]:
        signed = p["value"] * (1 if p["predicted"] == "above 0" else -1)
        decided = "supported" if signed > 2 * p["error"] else "refuted" if signed < -2 * p["error"] else "undecided"
        assert p["verdict"] == decided


@pytest.mark.parametrize("kind", ["rounded", "rounded embed", "rounded head"])
def test_the_estimate_of_fine_rounding_is_the_divergence_that_is_measured(world, kind):
    found = strict_json(world[0] / "whole" / "analysis.json")
    for basis in BASES.split(","):
        kl = next(n["kl"] for n in found["networks"] if (n["basis"], n["kind"], n["about"]) == (basis, kind, "8 bits"))
        own = [r for r in found["tensors"] if r["basis"] == basis and (r["layer"] is None) == (kind != "rounded")]
        rows = [r for r in own if kind == "rounded" or kind.endswith(r["kind"])]
        assert sum(r["kl_estimated"]["8 bits"] for r in rows) == pytest.approx(kl, rel=0.2)


def test_pictures_and_page_lie_beside_and_what_they_came_from_is_gone(world):
    held = {p.name for p in (world[0] / "whole").iterdir()}
    pictures = {"outliers.png", "concentration.png", "rounding.png"}
    assert {"analysis.txt", *pictures} <= held and "work" not in held
    page = (world[0] / "whole" / "analysis.txt").read_text()
    assert page.count("predicted") == len(CONCEPT_PREDICTIONS)


def test_a_finished_analysis_is_never_overwritten(world, capsys):
    assert rdopt(*world[1], "--out", world[0] / "whole") == 2
    assert "finished" in capsys.readouterr().err


def test_a_broken_analysis_goes_on_and_ends_alike(world, monkeypatch):
    folder, command = world
    monkeypatch.setattr(blocks, "SAVE_AFTER", 0.0)
    plain, steps = blocks.BlockPass.step, []

    def step(self, state):
        steps.append(state.done)
        if len(steps) == 2:
            raise KeyboardInterrupt
        plain(self, state)

    monkeypatch.setattr(blocks.BlockPass, "step", step)
    assert rdopt(*command, "--out", folder / "broken") == 130
    assert rdopt(*command, "--out", folder / "broken") == 0
    assert steps[:3] == [0, 1, 1]
    whole, broken = (json.loads((folder / k / "analysis.json").read_text()) for k in ("whole", "broken"))
    assert whole == broken


def test_identity_and_hadamard_have_to_be_there(capsys):
    assert rdopt("analyze", "demo", "--out", "nowhere", "--bases", "identity,pca") == 2
    assert "hadamard" in capsys.readouterr().err
    assert AnalyzeConfig().bases[0] == "identity"
