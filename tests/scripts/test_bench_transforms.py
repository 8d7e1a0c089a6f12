"""Claims about the table of the transforms' speeds: every figure is there, and products are counted as XLA does."""

import json

import pytest
from tiny_runs import load_script, make_model, make_text


@pytest.fixture(scope="module")
def bench():
    return load_script("bench_transforms")


@pytest.mark.slow
def test_every_table_is_printed_and_written(bench, tmp_path, capsys):
    out, config = tmp_path / "speed.json", tmp_path / "config.yaml"
    text = {"sources": [str(make_text(tmp_path / "text.jsonl"))], "seq_len": 32, "calibration_sequences": 8}
    config.write_text(json.dumps({"text": text}))
    words = ["--widths", "16", "--joint", "6", "--repeats", "1", "--json", str(out)]
    assert bench.main([*words, "--model", str(make_model(tmp_path / "model")), "--config", str(config)]) == 0
    found = json.loads(out.read_text())
    names = {row["name"] for row in found["crossings"]}
    assert names == {"butterfly", "round robin", "Cayley in blocks of 16"}
    assert [row["name"] for row in found["steps"]] == ["matrix", "block"]
    assert [row["n"] for row in found["cayley"] + found["joint"]] == [16, 6]
    assert all(row["ratio"] == pytest.approx(row["seconds"] / row["floor"]) for row in found["steps"])
    # Elementwise work, which XLA counts too, is most of so small a model's.
    assert all(1 < row["xla"] < 10 for row in found["steps"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)

