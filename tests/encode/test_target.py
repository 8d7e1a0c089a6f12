"""Claims about files searched by size, KL or perplexity, and about finetuning inside rdopt encode."""

import importlib
import math

import numpy as np
import pytest
from tiny_runs import TEXT, WINDOWS, make_model, make_text, rdopt, sha256, strict_json

from rdopt.calibration.backward import second_moments
from rdopt.calibration.subject import load_subject
from rdopt.calibration.text import builtin_documents
from rdopt.calibration.tokens import token_batch, tokenize
from rdopt.checkpoint.families import MATRICES
from rdopt.checkpoint.folder import open_checkpoint
from rdopt.codec.decoder import decode_file, decode_model
from rdopt.config.errors import UserError
from rdopt.config.schema import EncodeConfig
from rdopt.encode.encode import encode_source
from rdopt.encode.judge import Judge
from rdopt.encode.model import code_matrices, encode_at_step
from rdopt.encode.source import make_source
from rdopt.encode.target import Goal, divergence_goal, search_step, size_goal, some_rows
from rdopt.evaluate.divergence import Reference
from rdopt.evaluate.perplexity import windows
from rdopt.operator.params import load_params, stacked
from rdopt.transforms.aligned import Aligned

FEEDBACK = EncodeConfig(grid="feedback")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a model and a text."""
    world = tmp_path_factory.mktemp("targets")
    make_model(world / "model")
    make_text(world / "text.jsonl")
    return world


def encode(world, name, *words):
    """The report of rdopt encode."""
    out = world / f"{name}.rdopt.safetensors"
    text = ("--text", world / "text.jsonl", *TEXT, *WINDOWS)
    assert rdopt("encode", world / "model", "--out", out, *text, *words) == 0
    return strict_json(world / f"{name}.rdopt.json")


def test_a_search_finds_the_step_of_a_size_on_any_falling_curve():
    calls = []

    def bits(c):
        calls.append(c)
        return 0.1 + math.log2(1 + 1 / c)

    found = search_step(bits, float, size_goal(2.0), 1e-3)
    assert abs(found - 2.0) <= 0.005 and len(calls) <= 8


def test_a_search_finds_the_step_of_a_divergence():
    found = search_step(lambda c: 3 * c**1.7, math.log2, divergence_goal("x", 0.02, float), 1.0)
    assert abs(math.log2(found / 0.02)) <= 0.03


def test_a_goal_out_of_reach_is_refused_with_what_was_closest():
    with pytest.raises(UserError, match=r"1 bits/weight cannot be reached: the closest file has 1\.5"):
        search_step(lambda c: 1.5 + 0 * c, float, size_goal(1.0), 1.0)
    goal = Goal("a perplexity of 9", 1.0, 2.0, 0.1, 0.1, lambda value: 2 * value)
    with pytest.raises(UserError, match=r"a perplexity of 9 cannot be reached: the closest file has 6"):
        search_step(lambda c: 3.0, float, goal, 1.0)


def searched(folder, tokens, moments):
    """(source, judge) of a model whose matrices are wide enough for searches on a part."""
    subject, length = load_subject(folder), tokens.shape[1]
    source = make_source(Aligned(subject=subject, moments=moments), FEEDBACK)
    inputs, scored = windows(tokens.reshape(-1), length, length, tokens.size)
    return source, Judge(Reference(subject.params, subject.arch, inputs, scored, 8), tokens)


@pytest.fixture(scope="module")
def demo(demo_ends, demo_tokens, demo_moments):
    """Of the outer blocks of the demo model."""
    return searched(demo_ends, demo_tokens, demo_moments)


def test_the_part_gives_some_rows_as_the_whole_file_does_and_leaves_the_others(demo):
    aligned, c = demo[0].aligned, 0.01
    flat = {name: np.ones_like(G[..., 0]) for name, G in aligned.moments.G.items()}  # so that rows do not share damping
    source = make_source(Aligned(subject=aligned.subject, moments=aligned.moments._replace(G=flat)), FEEDBACK)
    part = some_rows(source, FEEDBACK)
    found = part.model(code_matrices(part.source, c, FEEDBACK))
    whole = decode_model(encode_at_step(source, c, FEEDBACK).data).plain
    assert 0.08 < part.source.weights / source.weights < 0.3
    for name in MATRICES:
        rows, original = part.source.chosen[name], stacked(source.aligned.network())["blocks"][name]
        others = np.setdiff1d(np.arange(original.shape[1]), rows)
        np.testing.assert_array_equal(found["blocks"][name][:, others], original[:, others])
        for layer in range(source.arch.num_layers):
            np.testing.assert_array_equal(found["blocks"][name][layer, rows], whole[layer, name][rows])
            assert len(np.unique(whole[layer, name])) > 9


def whole_files(monkeypatch, source, judge, **target):
    """How often a search codes the whole model."""
    found = []
    room = importlib.import_module("rdopt.encode.encode")  # the package has a function of this name
    monkeypatch.setattr(room, "encode_at_step", lambda *args: found.append(1) or encode_at_step(*args))
    encode_source(source, EncodeConfig(grid="feedback", **target), 1000.0, judge)
    return len(found)


@pytest.mark.parametrize("target", [{"target_bpw": 3.0}, {"target_kl": 0.05}])
def test_a_search_codes_few_whole_files(demo, target, monkeypatch):
    assert whole_files(monkeypatch, *demo, **target) <= 3


def test_a_search_for_a_perplexity_codes_few_whole_files(demo_model, monkeypatch):
    """Of the whole demo model on more text, where a perplexity scatters less."""
    checkpoint = open_checkpoint(demo_model)
    tokens = token_batch(tokenize(demo_model, builtin_documents()[::20], 2048), 128, 32, 0)
    moments = second_moments(load_params(checkpoint), checkpoint.arch, tokens)
    source, judge = searched(demo_model, tokens, moments)
    target = 1.1 * judge.selection.perplexity.value
    assert whole_files(monkeypatch, source, judge, target_ppl=target) <= 3


@pytest.mark.parametrize("bpw", [3.0, 5.0])
def test_a_file_has_the_size_asked_for(world, bpw):
    report = encode(world, f"size{bpw:g}", "--target-bpw", bpw)
    assert report["bpw"] == pytest.approx(bpw, abs=0.02)


def test_a_file_has_the_divergence_asked_for_on_the_selection_text(world):
    sizes = [encode(world, f"kl{kl:g}", "--target-kl", kl)["bpw"] for kl in (0.2, 0.02)]
    assert sizes[0] < sizes[1]


def test_a_perplexity_below_the_originals_is_refused(world, capsys):
    text = ("--text", world / "text.jsonl", *TEXT, *WINDOWS)
    out = world / "never.rdopt.safetensors"
    assert rdopt("encode", world / "model", "--out", out, *text, "--target-ppl", 2) != 0
    assert "ask for more than that" in capsys.readouterr().err
    assert not out.exists()


def test_only_one_goal_can_lead():
    with pytest.raises(UserError, match="only one of them can lead"):
        EncodeConfig(target_bpw=3.0, target_kl=0.1)


def test_finetuning_keeps_the_codes_and_cleans_up(world):
    plain, tuned = encode(world, "plain", "--lam", 30), encode(world, "tuned", "--lam", 30, "--finetune", 4)
    files = [decode_file(world / f"{name}.rdopt.safetensors") for name in ("plain", "tuned")]
    for key, k in files[0].indices.items():
        np.testing.assert_array_equal(k, files[1].indices[key])
    assert plain["parts"]["codes"] == tuned["parts"]["codes"]
    assert not any((world / f"{name}.rdopt.safetensors.work").exists() for name in ("plain", "tuned"))
    again = encode(world, "again", "--lam", 30, "--finetune", 4)
    assert again["bpw"] == tuned["bpw"]
    assert sha256(world / "again.rdopt.safetensors") == sha256(world / "tuned.rdopt.safetensors")
