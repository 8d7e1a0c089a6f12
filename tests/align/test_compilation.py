"""Claims about compilation: points of one curve share the compiled step."""

import jax
import numpy as np
import pytest
from conftest import random_tensors, synthetic_moments, tiny_config

from rdopt.align.learn import learn
from rdopt.align.problem import make_problem
from rdopt.calibration.subject import load_subject
from rdopt.checkpoint.write import write_checkpoint
from rdopt.config.schema import Config, TrainConfig
from rdopt.transforms.bases import starting_gauges

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compilations():
    """The list that an entry is added to whenever XLA compiles a program."""
    found: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILED:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def test_another_lambda_compiles_nothing(tmp_path, compilations):
    folder = tmp_path / "tiny"
    write_checkpoint(folder, tiny_config(), random_tensors(tiny_config()).items(), dtype="float32")
    subject = load_subject(folder)
    moments = synthetic_moments(subject.arch)
    tokens = np.random.default_rng(0).integers(0, subject.arch.vocab_size, (8, 16)).astype(np.int32)
    counts, results = [], []
    for lam in (20.0, 60.0):
        train = TrainConfig(steps=3, batch_sequences=4, lam=lam, init="random", learning_rate=0.0123)
        problem, settings = make_problem(subject, moments, Config(model=str(folder), train=train))
        start = starting_gauges(train.init, subject.params, subject.arch, moments, train.seed)
        before = len(compilations)
        results.append(learn(problem, settings, tokens, start, train, devices=jax.devices("cpu")[:1]))
        counts.append(len(compilations) - before)
    assert counts[0] > 0 and counts[1] == 0
    assert results[0].rate < results[1].rate
