"""What tests of commands and scripts share: a tiny model, a small text, settings that compile once, a loader."""

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import ModuleType

from conftest import random_tensors, tiny_config

from rdopt.calibration.text import _docstrings
from rdopt.checkpoint.folder import open_checkpoint
from rdopt.checkpoint.write import carried_files, write_checkpoint
from rdopt.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
STEPS = 30
WINDOWS = ("--context", "32", "--stride", "32", "--max-tokens", "2048")
# rdopt train has no short flags for the windows that its later commands use.
WINDOW_KEYS = (
    *("--evaluate.context", "32", "--evaluate.stride", "32"),
    *("--evaluate.max_tokens", "2048"),
)
TEXT = ("--seq-len", "32", "--sequences", "16")
TRAINING = ("--steps", STEPS, "--train.checkpoint_every", "5", "--train.batch_sequences", "8")
_LIBRARY = ("argparse", "statistics", "typing", "threading", "_pydecimal")

# Runs a command that sends itself a signal when a printed line begins with a text.
_SIGNALLED = """
import os, signal, sys
from rdopt.cli import commands
from rdopt.cli.main import main
line, number, *words = sys.argv[1:]
plain = commands.say
def say(text):
    plain(text)
    if text.startswith(line):
        os.kill(os.getpid(), int(number))
commands.say = say
sys.exit(main(words))
"""


def load_script(name: str) -> ModuleType:
    """A file of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def make_model(folder: Path, seed: int = 0, **changes) -> Path:
    """A model of ten thousand weights with the demo model's tokenizer."""
    config = tiny_config(vocab_size=2048, **changes)
    files = carried_files(open_checkpoint("demo").folder)
    write_checkpoint(folder, config, random_tensors(config, seed).items(), dtype="float32", files=files)
    return folder


def library_docstrings() -> list[str]:
    """Docstrings of a few modules of the standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    return [d for name in _LIBRARY for d in _docstrings(library / f"{name}.py")]


def make_text(path: Path) -> Path:
    """Docstrings of a few modules of the standard library, one document each."""
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in library_docstrings()))
    return path


def rdopt(*words) -> int:
    """One command, its exit code."""
    return main([str(word) for word in words])


def train_words(world: Path, out: Path) -> tuple:
    """The training run that all tests share; `world` holds `model` and `text.jsonl`."""
    text = ("--text", world / "text.jsonl", *TEXT, *WINDOW_KEYS)
    return ("train", world / "model", "--out", out, *text, *TRAINING)


def signalled(number: int, line: str, words: tuple) -> subprocess.CompletedProcess:
    """A command in a process of its own that gets a signal behind a printed line."""
    argv = [sys.executable, "-c", _SIGNALLED, line, str(int(number)), *map(str, words)]
    return subprocess.run(argv, env=_here(), capture_output=True, text=True, timeout=300, check=False)


def killed_after(words: tuple, line: str, seconds: float) -> None:
    """A command in a process of its own that is killed some time behind a printed line."""
    argv = [sys.executable, "-c", "from rdopt.cli.main import run; run()", *map(str, words)]
    with subprocess.Popen(argv, env=_here(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(said.startswith(line) for said in process.stdout)
        time.sleep(seconds)
        process.kill()
    assert process.returncode == -signal.SIGKILL


def _here() -> dict[str, str]:
    """The environment of a process that finds the package."""
    return os.environ | {"PYTHONPATH": str(ROOT)}


def sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def strict_json(path: Path):
    """JSON without NaN or infinity, which other readers refuse."""

    def refuse(name: str):
        raise AssertionError(f"{path} holds {name}")

    return json.loads(path.read_text(), parse_constant=refuse)


def shape_of(value):
    """The keys of nested dicts."""
    return {k: shape_of(v) for k, v in value.items()} if isinstance(value, dict) else None


def metrics(run: Path) -> list:
    """The records of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
