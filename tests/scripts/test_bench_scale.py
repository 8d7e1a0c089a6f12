"""The benchmark that shows how time and memory grow with depth and width."""

from argparse import Namespace

import pytest
from tiny_runs import load_script, strict_json


@pytest.fixture(scope="module")
def bench():
    return load_script("bench_scale")


def rows(bench, seconds, peak):
    """Made-up figures of the shapes that growth is read from."""
    for name in bench.GROWTH:
        shape = bench.SHAPES[name]
        place = {"shape": name, "layers": shape.layers, "hidden": shape.hidden, "stage": "moments"}
        yield place | {"seconds": seconds(shape), "peak_gib": peak(shape)}


def test_slopes_are_the_powers_that_figures_grow_with(bench):
    found = list(rows(bench, lambda s: 3 * s.layers * s.hidden**2.5, lambda s: 2 * s.hidden**1.5))
    both = [(along, slope) for along in ("layers", "hidden") for slope in bench.slopes(found, along)]
    powers = {(along, figure): power for along, (_, figure, power) in both}
    expected = {("layers", "seconds"): 1.0, ("layers", "peak_gib"): 0.0}
    expected |= {("hidden", "seconds"): 2.5, ("hidden", "peak_gib"): 1.5}
    assert powers == pytest.approx(expected)


def test_products_of_the_blocks_are_linear_in_depth_and_text(bench):
    shape = bench.SHAPES["512-2"]
    one = Namespace(sequences=4, context=64, max_tokens=512)
    double = Namespace(sequences=8, context=64, max_tokens=1024)
    head = 4 * 64 * 6 * shape.hidden * shape.vocab
    moments = bench.products(shape, "moments", one)
    assert bench.products(shape, "moments", double) == 2 * moments
    assert bench.products(shape._replace(layers=4), "moments", one) - head == pytest.approx(2 * (moments - head))
    assert bench.products(shape, "eval", double) == 2 * bench.products(shape, "eval", one)
    assert bench.products(shape, "encode", one) is None


@pytest.mark.slow
def test_a_small_model_goes_through_all_stages(bench, tmp_path, monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "tiny", bench.Shape(32, 64, 2, 4, 2, 2048))
    words = ["--work", tmp_path / "work", "--shapes", "tiny", "--sequences", 8, "--context", 32, "--max-tokens", 256]
    argv = [*map(str, words), "--json", str(tmp_path / "scale.json"), "--plot", str(tmp_path / "scale.png")]
    assert bench.main(argv) == 0
    found = strict_json(tmp_path / "scale.json")
    assert [row["stage"] for row in found["rows"]] == list(bench.STAGES)
    assert all(0.1 < row["peak_gib"] < 4 for row in found["rows"])
    assert (tmp_path / "scale.png").is_file() and bench.main(argv) == 2
