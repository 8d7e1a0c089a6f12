"""What the parts of the encoder are worth: the weights of the variants, known losses, and a run on a tiny model."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from conftest import synthetic_moments
from tiny_runs import load_script, make_model, make_text, strict_json

from rdopt.calibration.subject import load_subject
from rdopt.checkpoint.families import INPUT_OF, coded_matrices
from rdopt.transforms.aligned import Aligned, distortion
from rdopt.transforms.bases import starting_gauges

SMALL = ("--sequences", "8", "--context", "32", "--max-tokens", "512", "--targets", "4", "5", "--finetune", "0")


@pytest.fixture(scope="module")
def ablate() -> ModuleType:
    return load_script("ablate_encoder")


@pytest.fixture
def model(tiny_llama: Callable[..., Path]) -> Aligned:
    subject = load_subject(tiny_llama())
    return Aligned(subject=subject, moments=synthetic_moments(subject.arch), tokens=np.zeros((1, 8), np.int32))


def power(model: Aligned, layer: int, name: str) -> float:
    block = model.block(layer)
    W, sigma = np.asarray(block.params[name], np.float64), block.sigma[INPUT_OF[name]]
    return float(np.trace(block.G[name] @ W @ sigma @ W.T)) / W.size


@pytest.mark.parametrize("basis", ["identity", "pca"])
@pytest.mark.parametrize("change", ["equal_error", "equal_matrices"])
def test_without_allocation_every_matrix_has_the_same_power_a_weight_and_the_model_the_same(
    ablate: ModuleType, model: Aligned, change: str, basis: str
):
    gauges = starting_gauges(basis, model.subject.params, model.arch, model.moments)
    model = Aligned(subject=model.subject, moments=model.moments, gauges=gauges)
    changed = getattr(ablate, change)(None, model)
    powers = [power(changed, *key) for key in coded_matrices(model.arch.num_layers)]
    assert powers == pytest.approx([powers[0]] * len(powers))
    assert distortion(changed.blocks(), None) == pytest.approx(distortion(model.blocks(), None))


def test_without_allocation_the_weights_within_a_matrix_stay_and_without_sensitivity_they_are_equal(
    ablate: ModuleType, model: Aligned
):
    for name, G in model.moments.G.items():
        kept, flat = ablate.equal_matrices(None, model).moments.G[name], ablate.equal_error(None, model).moments.G[name]
        for layer, g in enumerate(G):
            assert kept[layer] / np.trace(kept[layer]) == pytest.approx(g / np.trace(g))
            assert flat[layer] == pytest.approx(flat[layer][0, 0] * np.eye(len(g)))


def test_every_variant_differs_from_everything(ablate: ModuleType):
    found = ablate.variants(0)
    assert next(iter(found)) == ablate.EVERYTHING
    full = found.pop(ablate.EVERYTHING)
    assert len(found) >= 10
    assert all(variant != full for variant in found.values())


def test_an_arm_that_needs_a_fifth_of_a_bit_more_loses_a_fifth_of_a_bit(ablate: ModuleType):
    cells, counts = [], np.full(20, 100)
    for variant, shift in ((ablate.EVERYTHING, 0.0), ("part off", 0.2)):
        for bpw in (1.5, 2.0, 2.5, 3.0, 4.0):
            kl = np.full(20, 4.0 ** -(bpw - shift))
            cells.append({
                "model": "m", "arm": "rdopt", "variant": variant, "bpw": bpw, "bpw_ideal": bpw,
                "kl_sums": (kl * counts).tolist(), "counts": counts.tolist(),
            })  # fmt: skip
    rows = {r["variant"]: r for r in ablate.summary(cells, 1e-9)}
    assert rows[ablate.EVERYTHING]["bd_rate"] == pytest.approx(0)
    for at in ("2", "3"):
        assert rows["part off"]["lost_bits"][at] == pytest.approx([0.2, 0.0], abs=1e-6)
    assert rows["part off"]["bd_rate"] > 0
    assert "+0.200 +- 0.000" in "\n".join(ablate.summary_lines(list(rows.values())))


@pytest.mark.slow
def test_a_run_measures_every_variant_and_resumes(
    ablate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    chosen = (
        *(ablate.EVERYTHING, "trellis off: scalar grid", "sensitivity off", "alignment off"),
        *("joint instead of principal axes", "token weights on"),
    )
    every = ablate.variants(0)
    monkeypatch.setattr(ablate, "variants", lambda finetune: {name: every[name] for name in chosen})
    model, text = make_model(tmp_path / "model"), make_text(tmp_path / "text.jsonl")
    words = ["--model", f"{model}:{text}:file", "--cells", str(tmp_path / "cells"), *SMALL]
    words += ["--json", str(tmp_path / "out.json")]
    assert ablate.main(words) == 0
    first = strict_json(tmp_path / "out.json")
    assert [c["variant"] for c in first["cells"]] == [name for name in chosen for _ in range(2)]
    assert len({c["kl"] for c in first["cells"]}) == len(first["cells"])
    assert [r["variant"] for r in first["summary"]] == list(chosen)
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "cells").iterdir()}
    assert ablate.main(words) == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cells").iterdir()} == stamps
    assert strict_json(tmp_path / "out.json") == first
    assert "BD-rate" in capsys.readouterr().out
