"""The comparison of methods: its gains on curves with a known answer, and a run that resumes from its cells."""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from peers.benchmark import Cells, ForeignCellError, model_and_text
from peers.report import PUBLISHED, TUNED, TUNED_ALLOCATED, best_of, curves, row, summary, summary_lines
from peers.table import Clock
from tiny_runs import load_script, make_model, make_text, strict_json

from rdopt.config.errors import UserError

SMALL = ("--sequences", "8", "--context", "32", "--max-tokens", "512", "--targets", "4", "5")


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load_script("bench_arms")


def cells_of(arm: str, variant: str, shift: float) -> list[dict[str, Any]]:
    """A curve KL = 2^-2(bits - shift): it needs `shift` bits more than the curve of shift 0 at every KL."""
    rng = np.random.default_rng(0)
    noise, counts = rng.uniform(0.5, 1.5, 20), np.full(20, 100)
    found = []
    for bpw in (1.5, 2.0, 2.5, 3.0, 4.0, 5.0):
        kl = 4.0 ** -(bpw - shift) * noise / noise.mean()
        found.append({
            "model": "m", "arm": arm, "variant": variant, "target": bpw, "settings": {}, "bpw": bpw,
            "bpw_ideal": bpw - 0.1, "kl": float(kl.mean()), "kl_se": 0.0, "ppl": 1.0,
            "kl_sums": (kl * counts).tolist(), "counts": counts.tolist(),
        })  # fmt: skip
    return found


def test_gains_are_the_known_distances_between_curves():
    cells = [
        *cells_of("gptq", PUBLISHED, 0.5), *cells_of("gptq", TUNED, 0.4), *cells_of("gptq", TUNED_ALLOCATED, 0.2),
        *cells_of("watersic-column", PUBLISHED, 0.7), *cells_of("rdopt-scalar", "default", 0.1),
        *cells_of("rdopt-other", "default", 0.0),
    ]  # fmt: skip
    rows = {(r["arm"], r["variant"]): r for r in summary(cells, 1e-9, resamples=10)}
    own = rows["rdopt-other", "default"]
    assert own["best_other"] == "gptq tuned"
    expected = {
        "best other": 0.4, "best other with allocation": 0.2, "watersic-column published": 0.7, "rdopt-scalar": 0.1,
    }  # fmt: skip
    assert own["saved_bits"].keys() == expected.keys()
    for label, gain in expected.items():
        for at in ("2.5", "3", "4"):
            assert own["saved_bits"][label][at] == pytest.approx(gain, abs=1e-6)
            assert 0 <= own["standard_errors"][label][at] < 0.01
            assert own["saved_bits_ideal"][label][at] == pytest.approx(gain, abs=1e-6)
    assert own["bd_rate_vs_best_other"] < 0 < rows["gptq", PUBLISHED]["bd_rate_vs_best_other"]
    assert rows["gptq", TUNED]["best_other"] == "gptq published"
    text = "\n".join(summary_lines(list(rows.values())))
    assert "saved against watersic-column published [watersic-column published]" in text


def test_the_best_other_is_neither_our_own_nor_itself():
    cells = [*cells_of("gptq", PUBLISHED, 0.3), *cells_of("rdopt-scalar", "default", 0.0)]
    found = curves(cells, "bpw")
    assert best_of(found, ("rdopt-scalar", "default"), (PUBLISHED,)) == ("gptq", PUBLISHED)
    assert best_of(found, ("gptq", PUBLISHED), (PUBLISHED,)) is None


def test_a_size_out_of_reach_is_said_and_left_out_of_the_curve():
    cell = {"model": "m", "arm": "gptq", "variant": PUBLISHED, "target": 0.1, "unreachable": "too small"}
    assert row(cell).endswith("too small")
    assert list(curves([cell, *cells_of("gptq", PUBLISHED, 0.0)], "bpw")) == [("gptq", PUBLISHED)]


def test_a_model_is_named_alone_or_with_text_and_split():
    assert model_and_text("demo", 32, 8)[1].sources == ("builtin",)
    model, text = model_and_text("here:there.txt:line", 32, 8)
    assert (model, text.sources, text.split_on, text.seq_len) == ("here", ("there.txt",), "line", 32)
    with pytest.raises(UserError, match="2 parts"):
        model_and_text("here:there.txt", 32, 8)


def test_a_cell_is_measured_once_and_anew_with_other_settings(tmp_path: Path):
    cells, calls = Cells(folder=tmp_path, model="m", key="k"), []

    def work() -> dict[str, int]:
        calls.append(0)
        return {"found": len(calls)}

    assert cells.remembered("x", {"a": (1, 2)}, work)["found"] == 1
    assert cells.remembered("x", {"a": (1, 2)}, work)["found"] == 1
    assert cells.remembered("x", {"a": (1, 3)}, work)["found"] == 2
    with pytest.raises(ForeignCellError, match="another model"):
        Cells(folder=tmp_path, model="m", key="other").remembered("x", {"a": (1, 3)}, work)


def test_time_left_grows_with_the_size_of_the_models_and_knows_the_arms():
    times = iter([0.0, 3.0, 3.0, 8.0, 8.0, 8.0, 8.0])
    clock = Clock(plan=[("a", 1.0), ("b", 1.0), ("a", 4.0), ("b", 4.0)], now=lambda: next(times))
    assert clock.tick(3.0) == pytest.approx(3 * (1 + 4 + 4))
    assert clock.tick(1.0) == pytest.approx(4 * 3 + 4 * 5)
    assert clock.tick(12.0) == pytest.approx(4 * 5)


@pytest.mark.slow
def test_a_run_resumes_from_its_cells_and_refuses_those_of_another_text(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(bench, "PEERS", {k: bench.PEERS[k] for k in ("rtn", "watersic-pooled")})
    choices = {"rtn": (("rows", ("tensor",)),), "watersic": (("damping", (1e-2,)),)}
    monkeypatch.setattr("peers.tuning.CHOICES", choices)
    own = ("rdopt-scalar", "rdopt-aligned")
    arms = bench.own_arms(0)
    monkeypatch.setattr(bench, "own_arms", lambda finetune: {k: arms[k] for k in own})
    model, text = make_model(tmp_path / "model"), make_text(tmp_path / "text.jsonl")
    words = ["--model", f"{model}:{text}:file", "--cells", str(tmp_path / "cells"), *SMALL]

    def run(*more: str) -> int:
        return bench.main([*words, "--json", str(tmp_path / "out.json"), "--nncodec-python", "/nowhere/python", *more])

    assert run() == 0
    first = strict_json(tmp_path / "out.json")
    names = {(c["arm"], c["variant"]) for c in first["cells"]}
    peers = {(a, v) for a in ("rtn", "watersic-pooled", "watersic-column") for v in (PUBLISHED, TUNED, TUNED_ALLOCATED)}
    assert names == peers | {(a, "default") for a in own}
    assert not first["failed"]
    for cell in first["cells"]:
        near = {"rtn": 0.02, "rdopt-scalar": 0.02, "watersic-pooled": 0.1}.get(cell["arm"], 1.0)
        assert cell["bpw"] == pytest.approx(cell["target"], abs=near)
        assert cell["bpw_ideal"] <= cell["bpw"] + 1e-9
        assert cell["kl"] > 0
    assert "nncodec: not installed in /nowhere/python" in capsys.readouterr().out

    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "cells").iterdir()}
    assert run() == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cells").iterdir()} == stamps
    assert strict_json(tmp_path / "out.json") == first

    def broken(*args: Any) -> None:
        raise RuntimeError("no codes today")

    monkeypatch.setattr(bench, "encode_own", broken)
    assert run("--targets", "5", "6") == 1
    last = strict_json(tmp_path / "out.json")
    assert len(last["failed"]) == len(own)
    assert all("6 failed: RuntimeError: no codes today" in line for line in last["failed"])
    assert {(c["arm"], c["variant"]) for c in last["cells"] if c["target"] == 6} == peers

    assert run("--max-tokens", "256") == 2
    assert "choose another --cells folder" in capsys.readouterr().err


