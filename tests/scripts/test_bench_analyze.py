"""The benchmark that shows how much memory an analysis takes."""

import numpy as np
import pytest
from synthetic_llama import llama_config, synthetic
from tiny_runs import load_script, strict_json

from rdopt.checkpoint.families import architecture_from_config, expected_tensors

SIZES = {"hidden": 32, "ffn": 64, "layers": 2, "heads": 4, "kv-heads": 2, "vocab": 2048, "context": 32}


@pytest.fixture(scope="module")
def bench():
    return load_script("bench_analyze")


def test_the_synthetic_model_has_its_shape_and_outliers_and_keeps_its_scale():
    config = llama_config(256, 64, 2, 4, 2, 2048)
    found = dict(synthetic(config, 0))
    assert {k: v.shape for k, v in found.items()} == expected_tensors(architecture_from_config(config))
    W = found["model.layers.0.mlp.gate_proj.weight"]
    assert 0.2 < np.linalg.norm(W, axis=1).mean() < 2
    assert np.abs(W).max() > 6 * np.sqrt(np.mean(np.square(W)))
    again = dict(synthetic(config, 0))
    assert all(np.array_equal(found[k], again[k]) for k in found)


@pytest.mark.slow
def test_a_small_model_is_analyzed_and_its_peak_printed(bench, tmp_path, capsys):
    sizes = [word for k, n in SIZES.items() for word in (f"--{k}", str(n))]
    words = ["--work", str(tmp_path / "work"), "--bases", "identity,hadamard", "--bits", "4", "--max-tokens", "64"]
    assert bench.main([*words, *sizes, "--json", str(tmp_path / "found.json")]) == 0
    found = strict_json(tmp_path / "found.json")
    assert 0.1 < found["peak_gib"] < 4 and found["networks"] == 27
    assert f"peak {found['peak_gib']:.2f} GiB" in capsys.readouterr().out
    assert bench.main([*words, *sizes, "--json", str(tmp_path / "found.json")]) == 2
