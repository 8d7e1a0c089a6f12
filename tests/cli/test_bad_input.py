"""Claims about refusals: exit code 2, one sentence with the mend, no traceback, nothing half-written."""

import errno
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_runs import TEXT, WINDOWS, make_text, rdopt

from rdopt.cli.main import COMMANDS
from rdopt.config.load import load_config
from rdopt.integrations.transformers_loader import load_compressed
from rdopt.runs.folder import open_run

MATRIX = "model.layers.1.self_attn.v_proj.weight"


@pytest.fixture
def text(tmp_path):
    """Options that name a small text."""
    return ("--text", make_text(tmp_path / "text.jsonl"), *TEXT)


@pytest.fixture
def model(tiny_llama):
    """A sound model that can read text."""
    return tiny_llama(vocab_size=2048)


@pytest.fixture(scope="module")
def coded(tmp_path_factory, demo_model):
    """The bytes of a sound file."""
    from tiny_runs import make_model

    folder = tmp_path_factory.mktemp("coded")
    out = folder / "a.rdopt.safetensors"
    words = ("--text", make_text(folder / "text.jsonl"), *TEXT, *WINDOWS)
    assert rdopt("encode", make_model(folder / "model"), "--out", out, *words) == 0
    return out.read_bytes()


@pytest.fixture
def refused(tmp_path, capfd):
    """refused(*words) -> the sentence of a command that must fail and leave the folder as it was."""

    def run(*words) -> str:
        before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
        capfd.readouterr()
        assert rdopt(*words) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("rdopt: error: ") and line.endswith((".", "?")) and "Traceback" not in line
        assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before
        return line

    return run


def rewrite(model: Path, change) -> None:
    """Changes the tensors of a model in place."""
    tensors = load_file(str(model / "model.safetensors"))
    change(tensors)
    save_file(tensors, str(model / "model.safetensors"), metadata={"format": "pt"})


def reconfigure(model: Path, **changes) -> None:
    """Changes config.json in place."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


def commands_on(model, text, out):
    """Every command that reads a model."""
    return [
        ("train", model, "--out", out, *text),
        ("encode", model, "--out", out, *text),
        ("eval", model, "--reference", model, *text, *WINDOWS),
        ("sweep", model, "--out", out, *text, *WINDOWS),
    ]


def test_a_missing_tensor_is_named(model, text, refused, tmp_path):
    rewrite(model, lambda tensors: tensors.pop(MATRIX))
    for words in commands_on(model, text, tmp_path / "out"):
        assert f"{MATRIX} is missing" in refused(*words)


def test_nan_in_the_weights_is_named(model, text, refused, tmp_path):
    def spoil(tensors):
        tensors[MATRIX][3, 4] = np.nan

    rewrite(model, spoil)
    for words in commands_on(model, text, tmp_path / "out"):
        sentence = refused(*words)
        assert MATRIX in sentence and "NaN" in sentence


def test_an_unsupported_architecture_is_answered_with_the_supported_ones(model, text, refused, tmp_path):
    reconfigure(model, model_type="gpt2")
    for words in commands_on(model, text, tmp_path / "out"):
        sentence = refused(*words)
        assert "gpt2" in sentence and all(f in sentence for f in ("llama", "mistral", "qwen2", "qwen3"))


def test_a_model_that_is_not_there_is_named(refused, text, tmp_path):
    assert "nowhere" in refused("train", tmp_path / "nowhere", "--out", tmp_path / "out", *text)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--train.step", "3"), "train.steps"),
        (("--evaluate.contxt", "3"), "evaluate.context"),
        (("--train.steps", "many"), "'many'"),
        (("--steps", "1.5"), "1.5"),
        (("--train.init", "best"), "'best'"),
        (("--train.steps", "0"), "0"),
        (("--train.steps",), "no value"),
        (("more",), "'more'"),
    ],
)
def test_a_wrong_flag_is_answered_with_the_right_one(model, refused, tmp_path, words, expected):
    assert expected in refused("train", model, "--out", tmp_path / "out", *words)


def test_a_wrong_key_in_a_file_is_answered_with_the_nearest(model, refused, tmp_path):
    (tmp_path / "run.yaml").write_text("train:\n  learning_rat: 0.1\n")
    words = ("train", model, "--out", tmp_path / "out", "--config", tmp_path / "run.yaml")
    assert "train.learning_rate" in refused(*words)


def test_a_command_that_does_not_exist_is_answered_with_those_that_do(refused):
    assert "sweep" in refused("swep")


@pytest.mark.parametrize("damage", ["truncated", "extended", "altered", "empty", "no file at all"])
def test_a_damaged_file_is_refused_by_every_command(coded, model, text, refused, tmp_path, damage):
    file = tmp_path / "damaged.rdopt.safetensors"
    middle = len(coded) // 2
    contents = {
        "truncated": coded[:-7],
        "extended": coded + b"\0",
        "altered": coded[:middle] + bytes([coded[middle] ^ 1]) + coded[middle + 1 :],
        "empty": b"",
    }
    if damage in contents:
        file.write_bytes(contents[damage])
    for words in (
        ("decode", file, "--out", tmp_path / "out"),
        ("inspect", file),
        ("eval", file, "--reference", model, *text, *WINDOWS),
    ):
        assert str(file) in refused(*words)


def test_a_text_shorter_than_a_sequence_is_refused_with_the_counts(model, refused, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Four words, no more.")
    for words in commands_on(model, ("--text", short, *TEXT), tmp_path / "out"):
        assert "tokens" in refused(*words)


def test_training_is_refused_before_it_starts_when_the_selection_text_is_too_short(model, refused, tmp_path):
    lines = [f"Document {i} has a few words." for i in range(40)]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    words = ("--text", tmp_path / "lines.txt", "--split-on", "line", "--seq-len", "120", "--sequences", "1")
    assert "selection text" in refused("train", model, "--out", tmp_path / "out", *words)


def test_text_that_does_not_exist_is_named(model, refused, tmp_path):
    for words in commands_on(model, ("--text", tmp_path / "nothing.txt"), tmp_path / "out"):
        assert "nothing.txt" in refused(*words)


def test_models_of_two_vocabularies_are_not_compared(model, tiny_llama, text, refused):
    other = tiny_llama(vocab_size=96)
    sentence = refused("eval", other, "--reference", model, *text, *WINDOWS)
    assert "2048 and 96" in sentence


def test_a_tokenizer_of_another_vocabulary_is_refused(model, tiny_llama, text, refused):
    other = tiny_llama(vocab_size=96)
    (other / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    assert "96" in refused("eval", model, "--reference", other, *text, *WINDOWS)


def test_existing_outputs_are_never_overwritten(coded, model, text, refused, tmp_path):
    file = tmp_path / "a.rdopt.safetensors"
    file.write_bytes(coded)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/mine.txt").write_text("mine")
    (tmp_path / "b.rdopt.json").write_text("{}")
    for words in (
        ("train", model, "--out", tmp_path / "folder", *text),
        ("train", model, "--out", file, *text),
        ("sweep", model, "--out", tmp_path / "folder", *text, *WINDOWS),
        ("encode", model, "--out", file, *text),
        ("encode", model, "--out", tmp_path / "b.rdopt.safetensors", *text),
        ("decode", file, "--out", tmp_path / "folder"),
        ("inspect", file, "--json", tmp_path / "b.rdopt.json"),
    ):
        assert "already exists" in refused(*words)


def test_a_report_never_takes_the_place_of_its_file(model, text, refused, tmp_path):
    assert "a.json" in refused("encode", model, "--out", tmp_path / "a.json", *text)


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_told_and_leaves_nothing(coded, model, text, refused, tmp_path, monkeypatch):
    file = tmp_path / "a.rdopt.safetensors"
    file.write_bytes(coded)
    monkeypatch.setattr("rdopt.checkpoint.atomic._sync", no_space)
    for words in (
        ("decode", file, "--out", tmp_path / "folder"),
        ("encode", model, "--out", tmp_path / "b.rdopt.safetensors", *text),
    ):
        assert "full" in refused(*words)
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]


def test_a_full_disk_is_told_wherever_it_fills(model, text, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("pathlib.Path.write_text", no_space)
    assert rdopt("train", model, "--out", tmp_path / "run", *text) == 2
    sentence = capfd.readouterr().err
    assert "disk is full" in sentence and "None" not in sentence and len(sentence.splitlines()) == 1


def run_of(model, out, text):
    """A run folder as a killed `rdopt train` leaves it."""
    pairs = [("model", str(model)), ("text.sources", f"['{text[1]}']"), ("train.steps", "9")]
    config = load_config(None, pairs)
    open_run(out, config, "train", jax.local_devices())
    return out


def test_a_run_refuses_another_text_than_its_own(refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    out = tmp_path / "a.rdopt.safetensors"
    assert "--text does not apply" in refused("encode", tmp_path / "run", "--out", out, "--text", "builtin")


def test_an_unfinished_run_is_neither_exported_nor_encoded(model, text, refused, tmp_path):
    run = run_of(model, tmp_path / "run", text)
    for command in ("export", "encode"):
        assert "not finished" in refused(command, run, "--out", tmp_path / "out")


def test_what_is_no_run_is_not_exported(model, refused, tmp_path):
    assert "no run" in refused("export", model, "--out", tmp_path / "out")


def test_a_run_is_not_continued_with_another_configuration(model, text, refused, tmp_path):
    run = run_of(model, tmp_path / "run", text)
    sentence = refused("train", model, "--out", run, *text, "--steps", "10")
    assert "steps: 9" in sentence
    assert "train run" in refused("sweep", model, "--out", run, *text, *WINDOWS)


def test_debug_shows_where_it_happened(tmp_path, capfd):
    assert rdopt("inspect", tmp_path / "nowhere", "--debug") == 2
    err = capfd.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("rdopt: error: ")


@pytest.mark.parametrize("words", [(), *((name,) for name in COMMANDS)], ids=lambda w: " ".join(w) or "rdopt")
def test_help_fits_a_screen_and_shows_an_example(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        rdopt(*words, "--help")
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert len(said.splitlines()) <= 40
    assert "xample" in said and f"rdopt {' '.join(words)}".strip() in said.lower().split("xample")[1]


def test_a_torch_model_without_torch_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(Exception, match=r"rdopt\[torch\]") as caught:
        load_compressed(tmp_path / "a.rdopt.safetensors")
    assert type(caught.value).__name__ == "UserError"
