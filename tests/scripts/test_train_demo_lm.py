"""The trainer: batches are a function of the step, a killed run ends where an unkilled one does, and the
folder it writes is the model it measured."""

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import ROOT, load_script
from tokenizers import Tokenizer

from rdopt.calibration.text import read_documents, split_documents
from rdopt.calibration.tokens import tokenize
from rdopt.checkpoint.folder import open_checkpoint

SCRIPT = ROOT / "scripts" / "train_demo_lm.py"
TINY = {
    "--split-on": "line", "--tokens": 1280, "--batch": 2, "--context": 16, "--hidden": 16, "--layers": 2,
    "--heads": 2, "--kv-heads": 1, "--head-dim": 8, "--ffn": 24, "--save-every": 16, "--lr": 0.02,
    "--dtype": "float32", "--vocab": 270,
}


def loaded() -> ModuleType:
    return load_script("train_demo_lm")


script = loaded()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines of a few made-up words, easy to learn."""
    words = random.Random(0).choices(["red", "fox", "runs", "home", "slowly"], k=1200)
    lines = (" ".join(words[12 * i : 12 * i + 12]) + f" {i}" for i in range(100))
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(lines))
    return path


def command(text: Path, out: Path, *more: str) -> list[str]:
    """A run of 40 tiny steps."""
    settings = [str(word) for pair in TINY.items() for word in pair]
    return ["--text", str(text), "--out", str(out), "--train-tokenizer", *settings, *more]


def losses(printed: str) -> list[float]:
    return [float(row.split("loss ")[1].split()[0]) for row in printed.splitlines() if row.startswith("step")]


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An undisturbed run: its folder and what it printed."""
    out = tmp_path_factory.mktemp("whole") / "model"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert script.main(command(text, out)) == 0
    return out, printed.getvalue()


def weights(folder: Path) -> dict[str, np.ndarray]:
    model = open_checkpoint(folder)
    return {name: model.tensor(name) for name in model.names()}


def recipe(**changes: object) -> object:
    plain = {"optimizer": "adamw", "steps": 9, "batch": 3, "context": 8, "lr": 1e-3, "seed": 0}
    return script.Recipe(**plain | changes)


def test_a_run_killed_and_started_again_ends_with_the_same_weights(
    text: Path, whole: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "killed"
    line = [sys.executable, str(SCRIPT), *command(text, out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert any(row.startswith("step 20/40") for row in process.stdout)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not out.exists()
    assert script.main(command(text, out)) == 0
    assert "resumed at step " in capsys.readouterr().out
    for (name, one), other in zip(weights(out).items(), weights(whole[0]).values(), strict=True):
        assert np.array_equal(one, other), name
    assert [path.name for path in tmp_path.iterdir()] == ["killed"]


def test_transformers_measures_the_reported_held_out_loss(text: Path, whole: tuple[Path, str]) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    out, printed = whole
    reported = printed.partition("held-out loss ")[2].split()
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    test = tokenize(out, split_documents(read_documents([text], "line")).test, model.config.vocab_size)
    cut = torch.from_numpy(script.sequences(test, 16).astype(np.int64))
    with torch.no_grad():
        logits = model(cut[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), cut[:, 1:].flatten())
    assert abs(float(reported[0]) - loss.item()) < 2e-4 and int(reported[3]) == cut[:, 1:].numel()
    words = "red fox, 한국어\n\ttab"
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer.encode(words, add_special_tokens=False)) == words


def test_adamw_learns(whole: tuple[Path, str]) -> None:
    assert losses(whole[1])[-1] < losses(whole[1])[0] - 1


def test_muon_learns_and_the_trajectory_can_be_kept(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(command(text, tmp_path / "model", "--optimizer", "muon", "--keep-checkpoints")) == 0
    found = losses(capsys.readouterr().out)
    assert found[-1] < found[0] - 1
    steps = sorted((tmp_path / "model.steps").iterdir())
    assert [step.name for step in steps] == ["step-000016", "step-000032", "step-000040"]
    last, model = weights(steps[-1]), weights(tmp_path / "model")
    assert all(np.array_equal(last[name], model[name]) for name in model)
    assert not (tmp_path / "model.training").exists()


@given(st.integers(2, 20), st.integers(0, 60), st.integers(0, 99))
def test_each_token_after_the_first_is_predicted_once(context: int, length: int, start: int) -> None:
    stream = np.arange(length + start + 1)
    cut = script.sequences(stream, context, start)
    count = length // context
    assert cut.shape == (count, context + 1)
    assert np.array_equal(cut[:, 1:].ravel(), start + 1 + np.arange(count * context))


@given(st.integers(25, 200), st.integers(0, 9))
def test_an_epoch_repeats_no_sequence_and_batches_do_not_depend_on_the_past(length: int, seed: int) -> None:
    stream = np.arange(length)
    batches = script.Batches(stream, recipe(seed=seed, batch=1))
    epoch = np.concatenate([batches(step) for step in range(batches.per_epoch)])
    assert len(np.unique(epoch[:, 1:])) == epoch[:, 1:].size
    late = batches.per_epoch + 3
    assert np.array_equal(batches(late), script.Batches(stream, recipe(seed=seed, batch=1))(late))


def test_a_trained_tokenizer_has_the_asked_size_and_loses_no_byte(tmp_path: Path) -> None:
    script.train_tokenizer(["red fox runs home " * 9, "slowly"], 270, 16, tmp_path / "tokenizer")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 270 and tokenizer.token_to_id("<s>") == 1
    assert tokenizer.decode(tokenizer.encode("naïve 한국어 \x00\n").ids) == "naïve 한국어 \x00\n"


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--vocab", "100"], "--vocab is 100, but bytes and special tokens alone take 259"),
        (["--tokens", "0"], "--tokens is 0.0, but it must be above 0"),
        (["--lr", "nan"], "--lr is nan, but it must be above 0"),
        (["--kv-heads", "-1"], "--kv-heads is -1, but it must be above 0"),
        (["--seed", "-1"], "--seed is -1, but it must be at least 0"),
        (["--context", "100000"], "held-out text has"),
    ],
)
def test_a_bad_setting_is_refused_in_a_sentence_before_training(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], sentence: str
) -> None:
    assert script.main(command(text, tmp_path / "model", *more)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and sentence in said and said.count("\n") == 1


def test_an_existing_folder_is_never_overwritten(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(command(text, tmp_path)) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_missing_tokenizer_is_refused(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--text", str(text), "--out", str(tmp_path / "a"), "--tokenizer", str(tmp_path)]) == 2
    assert "has no tokenizer.json" in capsys.readouterr().err


def test_a_run_is_not_continued_with_other_settings(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "model.training"
    work.mkdir()
    (work / "run.json").write_text(json.dumps({"seed": 0}))
    assert script.main(command(text, tmp_path / "model", "--seed", "1")) == 2
    assert "holds a run with other settings" in capsys.readouterr().err
