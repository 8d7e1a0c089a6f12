"""Claims about the table of speeds: every figure is there, for every size, and grows as two sizes say."""

import json
import os

import numpy as np
import pytest
from tiny_runs import load_script, make_model, make_text


@pytest.fixture(scope="module")
def bench_speed():
    return load_script("bench_speed")


def cores():
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


def test_a_table_holds_every_kernel_at_every_size(bench_speed, tmp_path, capsys):
    before, out = cores(), tmp_path / "speed.json"
    assert bench_speed.main(["--sizes", "24", "12", "--model", "none", "--repeats", "1", "--json", str(out)]) == 0
    assert cores() == before
    found = json.loads(out.read_text())
    names = {row["name"] for row in found["rows"]}
    assert len(names) == 14 and found["model"] == {}
    assert {(row["name"], row["n"]) for row in found["rows"]} == {(name, n) for name in names for n in (12, 24)}
    first = {row["name"]: row["seconds"] for row in found["rows"] if row["n"] == 12}
    for row in found["rows"]:
        assert row["weights_per_second"] == pytest.approx(row["n"] ** 2 / row["seconds"])
        if row["n"] == 12:
            assert row["growth"] is None
        else:
            assert row["growth"] == pytest.approx(np.log2(row["seconds"] / first[row["name"]]))
    printed = capsys.readouterr().out
    assert all(printed.count(name) == 2 for name in names)


def test_a_model_is_timed_from_calibration_to_decoding_without_training_if_so_asked(bench_speed, tmp_path):
    out, config = tmp_path / "speed.json", tmp_path / "config.yaml"
    text = {"sources": [str(make_text(tmp_path / "text.jsonl"))], "seq_len": 32, "calibration_sequences": 8}
    config.write_text(json.dumps({"text": text, "evaluate": {"context": 32, "stride": 32}}))
    words = ["--sizes", "--model", str(make_model(tmp_path / "model")), "--config", str(config)]
    assert bench_speed.main([*words, "--steps", "0", "--repeats", "1", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["rows"] == [] and len(found["model"]) == 4
    assert all(value > 0 for value in {**found["model"], **found["references"]}.values())
