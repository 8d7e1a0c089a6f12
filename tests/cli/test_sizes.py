"""`--dry-run` says what a command takes from config.json alone, and refuses budgets that no block fits into."""

import json
import re

import huggingface_hub
import pytest
from conftest import tiny_config
from tiny_runs import TEXT, WINDOWS, make_model, make_text, rdopt

from rdopt.calibration.moments import block_bytes
from rdopt.checkpoint.families import architecture_from_config
from rdopt.cli.machine import machine_speed
from rdopt.cli.needs import NEEDS
from rdopt.cli.parser import build_parser, resolve
from rdopt.cli.sizes import needs_of
from rdopt.config.load import load_config

GIB = 2**30
QWEN_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rms_norm_eps": 1e-6,
}
SMALL = 8.5  # GiB, little more than one of its blocks


def needs(command, memory, layers=28):
    arch = architecture_from_config({**QWEN_7B, "num_hidden_layers": layers})
    config = load_config(None, {"run.memory": str(memory), "run.moments": "m", "text.calibration_sequences": "64"})
    return NEEDS[command](arch, config)


def needs_of_words(*words):
    args, rest = build_parser().parse_known_args([str(w) for w in words])
    return needs_of(args, resolve(args, rest))


@pytest.mark.parametrize("command", NEEDS)
def test_a_larger_budget_never_needs_less_and_a_term_says_where_it_goes(command):
    found = [needs(command, memory) for memory in (SMALL, 20, 100, 1000)]
    peaks = [x.peak for x in found]
    assert peaks == sorted(peaks) and peaks[0] > 0
    for x in found:
        assert x.peak == max(sum(terms.values()) for terms in x.memory.values())
        assert min(size for terms in x.memory.values() for size in terms.values()) >= 0
    # What is kept is bounded by the budget.
    assert peaks[1] - peaks[0] <= 20 * GIB


@pytest.mark.parametrize("command", [c for c in NEEDS if c not in ("decode", "eval", "sweep")])
def test_with_a_small_budget_memory_does_not_grow_with_depth(command):
    # Files are read whole, and what beside embedding and head decoding and measuring take is theirs.
    def grown(layers):
        return max(
            sum(size for name, size in terms.items() if name != "file")
            for terms in needs(command, SMALL, layers).memory.values()
        )

    assert grown(56) < 1.02 * grown(28)


def test_moments_of_seven_billion_parameters_fit_a_machine_of_24_gib():
    assert needs("moments", SMALL).peak < 18 * GIB
    assert 40 * GIB < sum(needs("moments", SMALL).disk.values()) < 50 * GIB


def only_config(folder, config):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("command", ["moments", "train", "encode", "sweep"])
def test_a_folder_without_weights_will_do(tmp_path, capsys, command):
    folder = only_config(tmp_path / "model", tiny_config())
    assert rdopt(command, folder, "--out", tmp_path / "out", "--dry-run") == 0
    said = capsys.readouterr().out
    assert re.search(r"memory: about [\d.]+ GiB, the most for ", said) and "disk: " in said and "time: about " in said
    assert [x.name for x in tmp_path.iterdir()] == ["model"]


def test_of_a_hub_name_config_json_alone_is_fetched(tmp_path, monkeypatch, capsys):
    folder, asked = only_config(tmp_path / "model", tiny_config()), []

    def fetch(name, allow_patterns):
        asked.append((name, allow_patterns))
        return folder

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert rdopt("moments", "owner/model", "--out", tmp_path / "out", "--dry-run") == 0
    assert asked == [("owner/model", ["config.json"])]
    assert capsys.readouterr().out.startswith("owner/model: llama, ")


def test_a_budget_that_a_block_exceeds_is_refused_with_the_least_that_works(tmp_path, capsys):
    model, text = make_model(tmp_path / "model"), make_text(tmp_path / "text.jsonl")
    seven = only_config(tmp_path / "seven", QWEN_7B)
    said = []
    for words in (("moments", seven, "--memory", 4, "--dry-run"), ("encode", seven, "--memory", 4, "--dry-run")):
        assert rdopt(*words, "--out", tmp_path / "out") == 2
        said.append(capsys.readouterr().err)
    assert len(set(said)) == 1
    assert "run.memory is 4 GiB, but one block takes 8.24 GiB with its second moments and their factors" in said[0]
    least = float(said[0].partition("give --memory ")[2].partition(" or more")[0])
    arch = architecture_from_config(QWEN_7B)
    assert 0 <= least * GIB - block_bytes(arch) < 0.02 * GIB
    assert rdopt("moments", seven, "--memory", least, "--dry-run", "--out", tmp_path / "out") == 0
    # The commands themselves refuse before they work.
    for command in ("moments", "encode", "train", "sweep"):
        words = (command, model, "--text", text, *TEXT, "--memory", 1e-5, "--out", tmp_path / "out")
        capsys.readouterr()
        assert rdopt(*words) == 2
        assert "run.memory is 1e-05 GiB, but one block takes" in capsys.readouterr().err
        assert not list(tmp_path.glob("out*/**/*.safetensors"))


def test_disk_is_told_within_a_tenth(tmp_path):
    model, text = make_model(tmp_path / "model", hidden_size=64), make_text(tmp_path / "text.jsonl")
    words = ("--text", text, *TEXT)
    file = tmp_path / "a.rdopt.safetensors"
    assert rdopt("moments", model, "--out", tmp_path / "moments", *words) == 0
    assert rdopt("encode", model, "--out", file, "--target-bpw", 4, *words, *WINDOWS) == 0
    assert rdopt("decode", file, "--out", tmp_path / "decoded", "--dtype", "bfloat16") == 0
    said = {
        "moments": needs_of_words("moments", model, "--out", "x", *words),
        "decoded": needs_of_words("decode", file, "--out", "x", "--dtype", "bfloat16"),
    }
    for folder, x in said.items():
        written = sum(path.stat().st_size for path in (tmp_path / folder).glob("*.safetensors"))
        assert sum(x.disk.values()) == pytest.approx(written, rel=0.1)


def test_the_machine_is_tried_without_a_trace(tmp_path):
    speed = machine_speed(tmp_path / "a" / "b")
    assert set(speed) == {"float32", "float64", "trellis", "disk"} and min(speed.values()) > 1e4
    assert not list(tmp_path.iterdir())
