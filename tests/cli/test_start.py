"""Claims about what a command loads: nothing to print its help, no JAX to read a file."""

import json
import subprocess
import sys

import pytest
from tiny_runs import ROOT, TEXT, WINDOWS, make_model, make_text, rdopt

ARRAYS = {"numpy", "numba", "scipy"}
LEARNING = {"jax", "optax", "orbax", "flax", "transformers", "torch", "matplotlib", "huggingface_hub"}
# Runs a command, then prints which packages it loaded.
PROBE = """
import json, sys
from rdopt.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:  # of --help and --version
    code = end.code
print(json.dumps([code, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def loaded(*words):
    """The packages that a command loads, in a process of its own."""
    argv = [sys.executable, "-c", PROBE, *map(str, words)]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    code, packages = json.loads(done.stdout.splitlines()[-1])
    assert code == 0, done.stderr
    return set(packages)


@pytest.mark.parametrize("words", [("--version",), ("--help",), ("encode", "--help"), ("toy", "--help")], ids=" ".join)
def test_help_loads_neither_arrays_nor_learning(words):
    assert not loaded(*words) & (ARRAYS | LEARNING)


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    """A file of a tiny model."""
    folder = tmp_path_factory.mktemp("coded")
    words = ("--text", make_text(folder / "text.jsonl"), *TEXT, *WINDOWS, "--out", folder / "a.rdopt.safetensors")
    assert rdopt("encode", make_model(folder / "model"), *words) == 0
    return folder / "a.rdopt.safetensors"


def test_decoding_loads_nothing_that_learns(coded, tmp_path):
    assert not loaded("decode", coded, "--out", tmp_path / "decoded") & LEARNING


def test_inspecting_loads_nothing_that_learns(coded):
    assert not loaded("inspect", coded) & LEARNING
    assert not loaded("inspect", coded.parent / "model") & LEARNING
