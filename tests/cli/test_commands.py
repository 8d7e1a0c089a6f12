"""Claims about the commands on one tiny model, from train to inspect, and about what survives a kill."""

import importlib.util
import random
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny_runs import (
    STEPS,
    TEXT,
    WINDOWS,
    killed_after,
    make_model,
    make_text,
    metrics,
    rdopt,
    sha256,
    shape_of,
    signalled,
    strict_json,
    train_words,
)

from rdopt import __version__
from rdopt.checkpoint.folder import open_checkpoint
from rdopt.cli import commands
from rdopt.codec.decoder import decode_file, open_file
from rdopt.integrations.model_card import decoded_card
from rdopt.integrations.transformers_loader import load_compressed
from rdopt.operator.llama import logits
from rdopt.operator.params import load_params, params_from_tensors
from rdopt.runs.export import restore

HAS_TORCH = importlib.util.find_spec("torch") is not None
NEEDS_TORCH = pytest.mark.skipif(not HAS_TORCH, reason="parity is measured against torch")
EVAL_SHAPE = {
    "perplexity": dict.fromkeys(("value", "stderr", "nll", "tokens", "context", "stride")),
    "kl": dict.fromkeys(("mean", "median", "p90", "noise_floor_bf16")),
}
PARTS = ("codes", "tables", "scales", "structured", "gains", "transforms", "headers", "embeddings", "uncoded")
LOGITS = """
import sys, numpy as np, torch, transformers
tokens = torch.tensor(np.load(sys.argv[1]))
for folder in sys.argv[2:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        np.save(folder + "/logits.npy", model(tokens).logits.numpy())
assert "rdopt" not in sys.modules
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a model, a text, a finished run, its export, its file and the decoded folder."""
    world = tmp_path_factory.mktemp("commands")
    make_model(world / "model")
    make_text(world / "text.jsonl")
    assert rdopt(*train_words(world, world / "run")) == 0
    assert rdopt("export", world / "run", "--out", world / "aligned") == 0
    assert rdopt("encode", world / "run", "--out", world / "a.rdopt.safetensors", "--lam", "100") == 0
    assert rdopt("decode", world / "a.rdopt.safetensors", "--out", world / "decoded") == 0
    return world


def evaluated(world, candidate, out):
    """The JSON of rdopt eval against the tiny model."""
    text = ("--text", world / "text.jsonl", *TEXT, *WINDOWS)
    assert rdopt("eval", candidate, "--reference", world / "model", "--json", out, *text) == 0
    return strict_json(out)


def test_a_run_folder_tells_what_was_run_with_what(world):
    run = world / "run"
    facts = strict_json(run / "run.json")
    assert facts["kind"] == "train" and facts["seed"] == 0
    assert facts["versions"]["rdopt"] == __version__ and facts["versions"]["jax"] == jax.__version__
    assert len(facts["devices"]) == jax.local_device_count() and "cpu:0" in facts["devices"][0]
    assert f"steps: {STEPS}\n" in (run / "config.yaml").read_text()
    assert [record["step"] for record in metrics(run)] == list(range(1, STEPS + 2))


def test_training_lowers_the_objective(world):
    last = metrics(world / "run")[-1]
    assert last["J"] < last["start_J"]


@NEEDS_TORCH
def test_plain_transformers_computes_the_originals_logits_from_the_export(world):
    tokens = np.random.default_rng(0).integers(0, 2048, (2, 48))
    np.save(world / "tokens.npy", tokens)
    folders = [str(world / "model"), str(world / "aligned")]
    words = [sys.executable, "-I", "-c", LOGITS, str(world / "tokens.npy"), *folders]
    subprocess.run(words, check=True, capture_output=True, timeout=300)
    original, aligned = (np.load(f"{folder}/logits.npy") for folder in folders)
    assert np.abs(original - aligned).max() < 1e-4
    name = "model.layers.0.self_attn.q_proj.weight"
    before, after = (open_checkpoint(folder).tensor(name) for folder in folders)
    assert np.abs(before - after).max() > 0.01  # in other coordinates indeed


def test_an_export_leads_back_to_the_original_weights(world):
    params, arch = restore(world / "aligned")
    original = open_checkpoint(world / "model")
    assert arch == original.arch
    for found, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(load_params(original)), strict=True):
        rms = np.sqrt(np.mean(np.square(wanted, dtype=np.float64)))
        assert np.abs(found - wanted).max() < 1e-6 * rms


def test_rotations_learned_by_givens_angles_go_all_the_way_to_a_decoded_folder(world, tmp_path):
    run, aligned, file = (tmp_path / name for name in ("run", "aligned", "a.rdopt.safetensors"))
    assert rdopt(*train_words(world, run), "--steps", 4, "--train.rotation", "givens") == 0
    last = metrics(run)[-1]
    assert last["J"] < last["start_J"]
    assert rdopt("export", run, "--out", aligned) == 0
    sites = strict_json(aligned / "transforms.json")["sites"]
    assert {part["kind"] for site in sites.values() for part in site["parts"]} == {"matrix", "givens"}
    params, _ = restore(aligned)
    original = load_params(open_checkpoint(world / "model"))
    np.testing.assert_allclose(params["blocks"]["up"], original["blocks"]["up"], atol=1e-6)
    assert rdopt("encode", run, "--out", file, "--lam", "100", "--encode.drift", "none") == 0
    assert rdopt("decode", file, "--out", tmp_path / "decoded") == 0
    decoded, plain = (open_checkpoint(folder) for folder in (tmp_path / "decoded", world / "model"))
    found, wanted = (logits(load_params(x), np.arange(32)[None], x.arch) for x in (decoded, plain))
    assert np.mean(np.square(found - wanted)) < 0.1 * np.mean(np.square(wanted))


@pytest.mark.parametrize("threads", [1, 4])
def test_decoding_gives_the_same_bytes_again_for_any_number_of_threads(world, threads, tmp_path):
    source = world / "a.rdopt.safetensors"
    assert rdopt("decode", source, "--out", tmp_path / "again", "--threads", threads) == 0
    names = sorted(p.name for p in (world / "decoded").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "again").iterdir())
    assert "model.safetensors" in names and "tokenizer.json" in names
    assert all(sha256(world / "decoded" / name) == sha256(tmp_path / "again" / name) for name in names)


def test_encoding_gives_the_same_bytes_again_for_any_number_of_threads(world, tmp_path):
    out = tmp_path / "a.rdopt.safetensors"
    assert rdopt("encode", world / "run", "--out", out, "--lam", "100", "--threads", "1") == 0
    assert out.read_bytes() == (world / "a.rdopt.safetensors").read_bytes()


def test_evaluating_a_file_or_its_decoded_folder_gives_the_same_figures(world, tmp_path):
    of_file = evaluated(world, world / "a.rdopt.safetensors", tmp_path / "file.json")
    of_folder = evaluated(world, world / "decoded", tmp_path / "folder.json")
    assert of_file == of_folder
    assert shape_of(of_file) == EVAL_SHAPE
    assert of_file["perplexity"]["value"] == pytest.approx(np.exp(of_file["perplexity"]["nll"]))
    assert of_file["perplexity"]["tokens"] == 2048 // 32 * 31
    # What rdopt encode measured on the run's own text, which is this one.
    assert strict_json(world / "a.rdopt.json")["kl"] == pytest.approx(of_file["kl"]["mean"], rel=1e-6)
    assert 0 < of_file["kl"]["noise_floor_bf16"] < of_file["kl"]["mean"]


def test_a_model_has_no_distance_from_itself(world, tmp_path):
    assert evaluated(world, world / "model", tmp_path / "itself.json")["kl"]["mean"] == 0


def test_inspect_accounts_for_every_bit_of_a_file(world, tmp_path):
    file = world / "a.rdopt.safetensors"
    assert rdopt("inspect", file, "--json", tmp_path / "i.json") == 0
    found = strict_json(tmp_path / "i.json")
    assert list(found) == ["version", "model_type", "weights_coded", "weights_all", "bytes", "bpw", "tensors"]
    assert tuple(found["bpw"]) == PARTS
    assert found["bytes"] == file.stat().st_size
    assert sum(found["bpw"].values()) * found["weights_coded"] == pytest.approx(8 * found["bytes"])
    original = open_checkpoint(world / "model")
    assert found["weights_all"] == original.num_parameters
    assert found["weights_coded"] == sum(np.prod(t["shape"]) for t in found["tensors"])
    assert {t["name"] for t in found["tensors"]} == {n for n in original.names() if "_proj" in n}
    codes = sum(t["bpw_codes"] * np.prod(t["shape"]) for t in found["tensors"])
    assert codes == pytest.approx(found["bpw"]["codes"] * found["weights_coded"])


@pytest.mark.parametrize("source", ["run", "aligned"])
def test_a_target_size_is_hit(world, source, tmp_path):
    out = tmp_path / "target.rdopt.safetensors"
    text = ("--text", world / "text.jsonl", *TEXT, *WINDOWS) if source == "aligned" else ()
    assert rdopt("encode", world / source, "--out", out, "--target-bpw", "4", *text) == 0
    rdopt("inspect", out, "--json", tmp_path / "i.json")
    bpw = strict_json(tmp_path / "i.json")["bpw"]
    assert sum(v for k, v in bpw.items() if k != "uncoded") == pytest.approx(4, abs=0.02)
    assert strict_json(tmp_path / "target.rdopt.json")["bpw"] == pytest.approx(4, abs=0.02)


def test_inspect_reads_runs_and_folders_too(world, tmp_path):
    for name in ("run", "model"):
        assert rdopt("inspect", world / name, "--json", tmp_path / f"{name}.json") == 0
    run, model = strict_json(tmp_path / "run.json"), strict_json(tmp_path / "model.json")
    assert run["run"]["finished"] and set(run["run"]["transforms"]) == {"residual", "value"}
    assert model["weights_coded"] == run["weights_coded"] and len(model["tensors"]) == 14


def test_a_dry_run_writes_nothing(world, tmp_path, capsys):
    assert rdopt(*train_words(world, tmp_path / "run"), "--dry-run") == 0
    assert "GiB" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_killed_run_continues_to_the_same_transforms_metrics_and_file(world, tmp_path):
    """The first kill falls into the opening of the run."""
    words, out = train_words(world, tmp_path / "run"), tmp_path / "a.rdopt.safetensors"
    killed_after(words, str(world / "model"), 1.0)
    # Step 18 lies three steps behind the last checkpoint.
    killed = signalled(signal.SIGKILL, "step 18 of", words)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(metrics(tmp_path / "run")) == 18
    assert rdopt(*words) == 0
    assert_same_run(world, tmp_path / "run", out)


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_in_the_same_file(world, tmp_path):
    """The first kill falls into the opening of the run, the others behind steps that mostly were not saved."""
    rng, words, out = random.Random(10), train_words(world, tmp_path / "run"), tmp_path / "a.rdopt.safetensors"
    killed_after(words, str(world / "model"), rng.uniform(0, 2))
    for step in sorted(rng.sample(range(1, 23), 9)):
        moment = rng.uniform(0, 0.1)
        killed_after(words, f"step {step} of", moment)
        print(f"killed {moment:.3f} s behind step {step}, {len(metrics(tmp_path / 'run'))} steps told")
    assert rdopt(*words) == 0
    assert_same_run(world, tmp_path / "run", out)


def assert_same_run(world, run, out):
    """The run, and the file that it is encoded to, are those of the unbroken one."""
    assert sha256(run / "transforms.safetensors") == sha256(world / "run/transforms.safetensors")
    assert metrics(run) == metrics(world / "run")
    assert rdopt("encode", run, "--out", out, "--lam", "100") == 0
    assert out.read_bytes() == (world / "a.rdopt.safetensors").read_bytes()


def test_ctrl_c_saves_and_says_how_to_continue(world, tmp_path, monkeypatch, capsys):
    words, plain = train_words(world, tmp_path / "run"), commands.say

    def interrupt(line):
        plain(line)
        if line.startswith("step 12 of"):
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(commands, "say", interrupt)
        assert rdopt(*words) == 130
    errors = capsys.readouterr().err
    said = [line for line in errors.splitlines() if line.startswith("rdopt:")]
    assert len(said) == 1 and "again to continue" in said[0] and "Traceback" not in errors
    saved = max(int(p.name) for p in (tmp_path / "run/state").iterdir() if p.name.isdigit())
    assert saved == len(metrics(tmp_path / "run")) == 13
    assert rdopt(*words) == 0
    assert sha256(tmp_path / "run/transforms.safetensors") == sha256(world / "run/transforms.safetensors")


@NEEDS_TORCH
@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_a_file_loads_as_a_torch_model_with_the_operators_logits(world):
    import torch

    tokens = np.random.default_rng(1).integers(0, 2048, (2, 40))
    model = load_compressed(world / "a.rdopt.safetensors")
    with torch.no_grad():
        found = model(torch.tensor(tokens)).logits.numpy()
    decoded = decode_file(world / "a.rdopt.safetensors")
    wanted = logits(params_from_tensors(decoded.tensors, decoded.arch), tokens, decoded.arch)
    assert type(model).__name__ == "LlamaForCausalLM" and not model.training
    assert np.abs(found - np.asarray(wanted)).max() < 1e-4


def test_a_model_card_tells_what_the_file_costs(world):
    file = world / "a.rdopt.safetensors"
    figures = strict_json(world / "a.rdopt.json")
    card = decoded_card(open_file(file))
    for figure in (f"{figures['bpw']:.3f}", f"{figures['bpw_all']:.3f}", f"{file.stat().st_size} bytes"):
        assert figure in card
    assert "| KL(original, this) | not measured |" in card


def test_moments_made_once_serve_any_number_of_files_and_no_other_text(world, tmp_path, capsys):
    text = ("--text", world / "text.jsonl", *TEXT)
    assert rdopt("moments", world / "model", "--out", tmp_path / "m", *text) == 0
    for lam in (30, 100):
        for name, more in (("with", ("--moments", tmp_path / "m")), ("without", ())):
            out = tmp_path / f"{name}-{lam}.rdopt.safetensors"
            assert rdopt("encode", world / "model", "--out", out, "--lam", lam, *text, *WINDOWS, *more) == 0
        files = (tmp_path / f"{name}-{lam}.rdopt.safetensors" for name in ("with", "without"))
        assert len({sha256(file) for file in files}) == 1
    assert not list(tmp_path.glob("*.work"))
    out = tmp_path / "other.rdopt.safetensors"
    other = ("--text", world / "text.jsonl", "--seq-len", "32", "--sequences", "8", "--moments", tmp_path / "m")
    capsys.readouterr()
    assert rdopt("encode", world / "model", "--out", out, *other) == 2
    assert "holds the second moments of another model, text or seed" in capsys.readouterr().err
    assert not out.exists()


def folder_words(world):
    """An encoding of the folder, which measures its moments itself."""
    return ("encode", world / "model", "--lam", 60, "--text", world / "text.jsonl", *TEXT, *WINDOWS)


@pytest.fixture(scope="module")
def unbroken(world):
    """The file of an encoding of the folder that nothing stopped."""
    assert rdopt(*folder_words(world), "--out", world / "unbroken.rdopt.safetensors") == 0
    return world / "unbroken.rdopt.safetensors"


@pytest.mark.parametrize("line", ["second moments: pass 3", "encode: matrix 7", "encode: matrix 14"])
def test_a_killed_encoding_of_a_folder_goes_on_to_the_same_file(world, unbroken, tmp_path, line):
    words, broken = folder_words(world), tmp_path / "broken.rdopt.safetensors"
    killed_after((*words, "--out", broken), line, 0)
    assert not broken.exists() and (tmp_path / "broken.rdopt.safetensors.work").is_dir()
    assert rdopt(*words, "--out", broken) == 0
    assert sha256(broken) == sha256(unbroken) and not list(tmp_path.glob("*.work"))
