"""Fixtures of all rooms: tiny random checkpoints of each family, the demo model, the shared folders."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach the network; read when the hub client is imported
# Two workers share the cores: more threads of their products would only wait for one another.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Tests compile hundreds of small programs and run each for milliseconds: compiling less well takes a third of the time.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=2"
)

# What one worker or child process has compiled, no other compiles again.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="rdopt-compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import checked_calls
import hypothesis
import numpy as np
import pytest
from jaxtyping import install_import_hook

# Shapes and dtypes in these rooms' signatures are checked while tests run.
CHECKED_ROOMS = (
    *("checkpoint", "operator", "evaluate", "calibration", "transforms", "rate", "runs", "align", "codec", "encode"),
)
checked_calls.install()
install_import_hook([f"rdopt.{room}" for room in CHECKED_ROOMS], "beartype.beartype")

from rdopt.calibration.backward import second_moments  # noqa: E402 - after the hook
from rdopt.calibration.moments import Moments  # noqa: E402 - after the hook
from rdopt.checkpoint.families import (  # noqa: E402
    INPUT_OF,
    MATRICES,
    Architecture,
    architecture_from_config,
    block_shapes,
    expected_tensors,
)
from rdopt.checkpoint.folder import open_checkpoint  # noqa: E402 - after the hook
from rdopt.checkpoint.write import carried_files, write_checkpoint  # noqa: E402 - after the hook

hypothesis.settings.register_profile("rdopt", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.load_profile("rdopt")

# Files of minutes first, whole files to a worker: those of seconds behind them fill both workers to the end.
LONG = ("notebooks", "tests/cli", "tests/sweep", "tests/align", "tests/study", "tests/encode")


def pytest_configure(config: pytest.Config) -> None:
    """pytest-xdist takes the files as they are collected, not those of many tests first."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the rooms in `LONG` come first."""
    items.sort(key=lambda item: next((i for i, room in enumerate(LONG) if item.nodeid.startswith(room)), len(LONG)))


SHARED = Path(__file__).resolve().parents[2] / "shared"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def _shared(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"shared/{name} is not beside the repository")
    return folder


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """The folder of real trained models."""
    return _shared("models")


@pytest.fixture(scope="session")
def shared_text() -> Path:
    """The folder of real text."""
    return _shared("text")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The folder of the model inside the package."""
    return open_checkpoint("demo").folder


@pytest.fixture(scope="session")
def demo_ends(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the first and the last block of the demo model: trained, and enough for laws of large numbers."""
    demo = open_checkpoint("demo")
    config, last = demo.config | {"num_hidden_layers": 2}, f"layers.{demo.arch.num_layers - 1}."
    folder = tmp_path_factory.mktemp("demo") / "ends"
    names = expected_tensors(architecture_from_config(config))
    tensors = ((name, demo.tensor(name.replace("layers.1.", last))) for name in names)
    write_checkpoint(folder, config, tensors, dtype="bfloat16", files=carried_files(demo.folder))
    return folder


@pytest.fixture(scope="session")
def demo_tokens(demo_ends: Path) -> np.ndarray:
    """(32, 64) tokens of a few modules' docstrings for the demo model."""
    from tiny_runs import library_docstrings

    from rdopt.calibration.tokens import token_batch, tokenize

    stream = tokenize(demo_ends, library_docstrings(), 2048)
    return token_batch(stream, 64, 32, 0)


@pytest.fixture(scope="session")
def demo_moments(demo_ends: Path, demo_tokens: np.ndarray) -> Moments:
    """Second moments of the outer blocks of the demo model on `demo_tokens`."""
    from rdopt.operator.params import load_params

    checkpoint = open_checkpoint(demo_ends)
    return second_moments(load_params(checkpoint), checkpoint.arch, demo_tokens)


def tiny_config(family: str = "llama", **changes: Any) -> dict[str, Any]:
    """A config.json of a network of a few thousand weights; head_dim differs from hidden / heads."""
    config: dict[str, Any] = {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "model_type": family,
        "vocab_size": 96,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family != "qwen2":  # the one family whose heads always split the hidden width
        config["head_dim"] = 8
    if family == "mistral":
        config["sliding_window"] = None
    return config | changes


def random_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Weights that keep activations near one; gains and biases away from their defaults."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in expected_tensors(architecture_from_config(config)).items():
        values = rng.standard_normal(shape, dtype=np.float32)
        if name.endswith("norm.weight"):
            tensors[name] = 1 + 0.2 * values
        elif len(shape) == 1:
            tensors[name] = 0.2 * values
        else:
            tensors[name] = values if "embed" in name else values / np.float32(np.sqrt(shape[1]))
    return tensors


def orthogonality_error(Q: Any) -> float:
    """max |Q^T Q - I|, formed in float64 whatever the precision of Q."""
    exact = np.asarray(Q, dtype=np.float64)
    gram = exact.swapaxes(-1, -2) @ exact
    return float(np.max(np.abs(gram - np.eye(exact.shape[-1])), initial=0.0))


def synthetic_moments(arch: Architecture, seed: int = 0) -> Moments:
    """Moments with spread diagonals and correlated inputs, of the shapes that calibration gives."""
    rng = np.random.default_rng(seed)

    def moment(n: int) -> np.ndarray:
        x = rng.standard_normal((2 * n, n)) * np.exp(rng.standard_normal(n))
        x += 0.5 * rng.standard_normal((2 * n, 1))
        return x.T @ x / len(x)

    shapes, layers = block_shapes(arch), range(arch.num_layers)
    widths = {INPUT_OF[name]: shapes[name][1] for name in MATRICES}
    sigma = {group: np.stack([moment(n) for _ in layers]) for group, n in widths.items()}
    # lambda counts nats of the whole model: sensitivities that give a few bits a weight at lambda 10.
    scale = 100 / sum(np.prod(shapes[name]) for name in MATRICES) / arch.num_layers
    G = {name: scale * np.stack([moment(shapes[name][0]) for _ in layers]) for name in MATRICES}
    return Moments(sigma, G, 1)


@pytest.fixture
def tiny_llama(tmp_path: Path, demo_model: Path) -> Callable[..., Path]:
    """tiny_llama(family="llama", dtype="float32", seed=0, **config) writes a Hugging Face folder, torch-free.

    With vocab_size=2048 it carries the demo model's tokenizer and can read text.
    """

    def make(family: str = "llama", *, dtype: str = "float32", seed: int = 0, **changes: Any) -> Path:
        config = tiny_config(family, **changes)
        out = tmp_path / f"tiny-{family}-{len(list(tmp_path.glob('tiny-*')))}"
        files = carried_files(demo_model) if config["vocab_size"] == 2048 else None
        write_checkpoint(out, config, random_tensors(config, seed).items(), dtype=dtype, files=files)
        return out

    return make
