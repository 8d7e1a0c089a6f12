"""The comparison of transforms: other criteria do what they say, known curves give known rows, a tiny run resumes."""

from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import orthogonality_error, synthetic_moments
from tiny_runs import load_script, make_model, make_text, strict_json
from transform_arms.arms import TELLING_ARMS, TransformArms, column_powers, rotation_angles
from transform_arms.criteria import (
    FAKE_BITS,
    activations,
    fake_rounded,
    fourth_powers,
    kurtosis_of_activations,
    learn_criterion,
    rounded_cross_entropy,
)

from rdopt.calibration.subject import load_subject
from rdopt.checkpoint.families import MATRICES
from rdopt.operator.llama import logits
from rdopt.transforms.aligned import Aligned
from rdopt.transforms.bases import starting_gauges
from rdopt.transforms.gauges.coordinates import Gauges
from rdopt.transforms.gauges.fold import fold

SMALL = ("--sequences", "8", "--context", "32", "--max-tokens", "512", "--targets", "8", "30", "--steps", "3")


@pytest.fixture(scope="module")
def ablate() -> ModuleType:
    return load_script("ablate_transforms")


@pytest.fixture
def benchmark(tiny_llama):
    """(subject, gain-folded params on the device, their architecture, identity gauges, tokens) of a tiny model."""
    subject = load_subject(tiny_llama())
    params, arch = fold(subject.params, subject.arch, Gauges(residual=np.eye(subject.arch.hidden_size)))
    heads = (arch.num_layers, arch.num_kv_heads)
    value = np.broadcast_to(np.eye(arch.head_dim), (*heads, arch.head_dim, arch.head_dim))
    gauges = Gauges(jnp.eye(arch.hidden_size), jnp.asarray(value, jnp.float32))
    tokens = np.random.default_rng(0).integers(0, arch.vocab_size, (4, 16)).astype(np.int32)
    return subject, jax.tree.map(jnp.asarray, params), arch, gauges, tokens


def test_the_criteria_are_their_formulas_where_nothing_is_turned(benchmark):
    _, params, arch, gauges, tokens = benchmark
    matrices = [np.asarray(W, np.float64) for k in MATRICES for W in params["blocks"][k]]
    expected = sum(np.mean(W**4) / np.mean(W**2) ** 2 for W in matrices)
    assert float(fourth_powers(params, arch, gauges)) == pytest.approx(expected, rel=1e-4)
    inputs = activations(params, tokens, arch)
    kinds = [*np.asarray(inputs.streams, np.float64), *np.asarray(inputs.values, np.float64)]
    kurtosis = [np.mean((x - x.mean()) ** 4) / np.var(x) ** 2 for x in kinds]
    expected = np.mean(np.abs(np.array(kurtosis) - 1.8))
    assert float(kurtosis_of_activations(inputs, gauges)) == pytest.approx(expected, rel=1e-3)
    W = params["blocks"]["q"][0]
    step = np.abs(W).max(axis=1, keepdims=True) / (2 ** (FAKE_BITS - 1) - 1)
    np.testing.assert_allclose(fake_rounded(W), np.round(W / step) * step, atol=1e-6)
    rounded = {k: jnp.stack([fake_rounded(W) for W in params["blocks"][k]]) for k in MATRICES}
    logp = jax.nn.log_softmax(logits({**params, "blocks": {**params["blocks"], **rounded}}, tokens, arch))
    truth = -np.mean(np.take_along_axis(np.asarray(logp[:, :-1]), tokens[:, 1:, None], axis=2))
    assert float(rounded_cross_entropy(params, arch, gauges, jnp.asarray(tokens))) == pytest.approx(truth, rel=1e-4)


@pytest.mark.parametrize("criterion", ["fourth powers", "kurtosis", "cross-entropy"])
def test_a_criterion_falls_and_its_rotations_stay_orthogonal(benchmark, criterion):
    subject, params, arch, _, tokens = benchmark
    predict = jax.jit(lambda x: jnp.argmax(logits(params, x, arch), axis=-1))
    for at in range(tokens.shape[1] - 1):  # text that the network predicts, so that rounding its weights does harm
        tokens[:, at + 1] = np.asarray(predict(tokens))[:, at]
    start = starting_gauges("hadamard", subject.params, subject.arch, synthetic_moments(subject.arch))
    found = learn_criterion(criterion, subject.params, subject.arch, start, tokens, steps=25, learning_rate=0.02)
    assert found.residual is not None and found.value is not None
    assert max(orthogonality_error(found.residual), orthogonality_error(found.value)) < 1e-5
    inputs = activations(params, tokens, arch)
    losses = {
        "fourth powers": lambda g: fourth_powers(params, arch, g),
        "kurtosis": lambda g: kurtosis_of_activations(inputs, g),
        "cross-entropy": lambda g: rounded_cross_entropy(params, arch, g, jnp.asarray(tokens)),
    }
    before, after = (
        float(losses[criterion](jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), g))) for g in (start, found)
    )
    assert after < before


def test_angles_and_column_powers_are_those_of_known_matrices(benchmark):
    c, s = np.cos(0.3), np.sin(0.3)
    Q = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    np.testing.assert_allclose(rotation_angles(Q), np.degrees([0.3, 0.3, 0]), atol=1e-9)
    powers = column_powers(Aligned(subject=benchmark[0]).blocks())
    assert powers == sorted(powers, reverse=True)
    assert np.mean(powers) == pytest.approx(1.0)


def test_known_costs_give_the_rank_correlation_and_the_error_of_the_rate(ablate: ModuleType):
    cells, names = [], list(ablate.LEARNED_ARMS)[:4]
    for lam in (8.0, 30.0):
        for i, name in enumerate(names):
            hard = {"codes": 2.0 + 0.1 * i, "rate": 2.5 + 0.1 * i, "distortion": 0.01}
            relaxed = {"rate": 1.02 * hard["codes"], "distortion": 0.01}
            cells.append({"model": "m", "variant": name, "target": lam, "hard": hard, "relaxed": relaxed})
    found = ablate.prediction(cells)
    assert found["configurations"] == 8
    assert found["rank_correlation"] == pytest.approx(1.0, abs=0.01)
    assert found["ordered"] == {"0": (12, 12), "0.002": (12, 12), "0.005": (12, 12)}
    assert found["rate_error_mean"] == pytest.approx(0.02)
    assert found["rate_error_worst"] == pytest.approx(0.02)
    for cell in cells:
        cell["relaxed"] = {**cell["relaxed"], "rate": 5.0 - cell["relaxed"]["rate"]}
    turned = ablate.prediction(cells)
    assert turned["rank_correlation"] == pytest.approx(-1.0, abs=0.01) and turned["ordered"]["0.005"] == (0, 12)


@pytest.mark.slow
def test_a_run_measures_every_arm_draws_it_and_resumes(
    ablate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    chosen = ("identity", "kurtosis (KurTail-like)", "all gauges", "all gauges + a layer of stored pairs")
    assert set(TELLING_ARMS) <= set(TransformArms.names())
    monkeypatch.setattr(ablate, "TELLING_ARMS", chosen)
    model, text = make_model(tmp_path / "model"), make_text(tmp_path / "text.jsonl")
    words = ["--model", f"{model}:{text}:file", "--cells", str(tmp_path / "cells"), *SMALL, "--arms", "telling"]
    words += ["--json", str(tmp_path / "out.json"), "--plots", str(tmp_path / "plots")]
    assert ablate.main(words) == 0
    first = strict_json(tmp_path / "out.json")
    assert [c["variant"] for c in first["cells"]] == [name for name in chosen for _ in range(2)]
    assert all(c["hard"]["codes"] > 0 for c in first["cells"])
    stored = [c for c in first["cells"] if c["variant"] == chosen[-1]]
    assert all(c["stored"]["price"] > 0 for c in stored)
    assert {p.name.split("-")[-1] for p in (tmp_path / "plots").iterdir()} == {
        "spectrum.png", "angles.png", "training.png", "relaxed.png"
    }  # fmt: skip
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "cells").iterdir()}
    assert ablate.main(words) == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cells").iterdir()} == stamps
    assert strict_json(tmp_path / "out.json") == first
    assert "rank correlation" in capsys.readouterr().out
