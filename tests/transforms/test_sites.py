"""Claims about the one object per symmetry: what it needs to know, and that nothing else needs to know it."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config

import rdopt
from rdopt.align.alignment import single_precision
from rdopt.checkpoint.families import MATRICES, architecture_from_config
from rdopt.config.schema import RotationKind, SiteName
from rdopt.transforms.gauges.coordinates import Gauges, fixed_records, gauges_of, sides_of
from rdopt.transforms.gauges.registry import OWNERS, SITES, changed_sides

ARCH = architecture_from_config(tiny_config("qwen2"))
LEARNED = [site for site in SITES if site.parameters(ARCH, "cayley")]


def test_what_can_be_learned_is_what_a_configuration_may_name():
    assert {site.name for site in LEARNED} == set(get_args(SiteName))


@pytest.mark.parametrize("rotation", get_args(RotationKind))
@pytest.mark.parametrize("site", LEARNED, ids=lambda site: site.name)
def test_zero_parameters_leave_every_matrix_as_it_is(site, rotation):
    zeros = {k: jnp.zeros(shape) for k, shape in site.parameters(ARCH, rotation).items()}
    start = getattr(single_precision(Gauges(), ARCH), site.field)
    gauges = Gauges(**{site.field: site.learned(zeros, start, ARCH, rotation)})
    rebuilt = gauges_of({site.field: site.record(zeros, None, ARCH, rotation)})
    rng = np.random.default_rng(0)
    for layer in range(ARCH.num_layers):
        for name in MATRICES:
            for each in (gauges, rebuilt):
                sides = sides_of(name, (None, None), ARCH, each.block(layer, ARCH))
                shape = rng.standard_normal(8), rng.standard_normal(8)
                W = np.asarray(sides.fold(matrix(name, *shape)))
                np.testing.assert_allclose(W, matrix(name, *shape), atol=1e-6)


def matrix(name, rows, cols):
    """A matrix of the right shape that repeats two short patterns."""
    from rdopt.checkpoint.families import block_shapes

    out, width = block_shapes(ARCH)[name]
    return np.outer(np.resize(rows, out), np.resize(cols, width)).astype(np.float32)


@pytest.mark.parametrize("field", OWNERS)
def test_a_gauge_changes_the_outputs_that_its_site_names_and_no_other(field):
    gauges = gauges_of(fixed_records(Gauges(**{field: random_gauge(field)})))
    for name in MATRICES:
        sides = sides_of(name, (None, None), ARCH, gauges.block(0, ARCH))
        assert any(x is not None for x in sides.outputs) == (name in OWNERS[field].outputs_changed)


def random_gauge(field) -> Any:
    rng, layers = np.random.default_rng(0), ARCH.num_layers
    kv, h = ARCH.num_kv_heads, ARCH.head_dim
    return {
        "residual": np.linalg.qr(rng.standard_normal((ARCH.hidden_size, ARCH.hidden_size)))[0],
        "value": rng.standard_normal((layers, kv, h, h)),
        "norm": np.exp(rng.standard_normal((2 * layers + 1, ARCH.hidden_size))),
        "hidden": np.exp(rng.standard_normal((layers, ARCH.ffn_size))),
        "query": np.exp(1j * rng.standard_normal((layers, kv, h // 2))),
        "channels": np.stack([rng.permutation(ARCH.ffn_size) for _ in range(layers)]),
        "heads": np.tile(np.arange(ARCH.num_heads), (layers, 1)),
    }[field]


def test_training_changes_the_sides_of_its_sites_and_of_those_with_bases_to_start_from():
    assert changed_sides((), ARCH) == ({"o", "down", "v"}, {"attn", "mlp", "o"})
    assert changed_sides((), ARCH, tied=True) == ({"v"}, {"o"})
    assert changed_sides(("query", "hidden"), ARCH) == (
        {"o", "down", "v", "q", "k", "up"}, {"attn", "mlp", "o", "down"}
    )


def test_no_other_module_of_these_rooms_names_a_site():
    """They loop over sites: neither strings nor fields nor keywords are the name of one."""
    root, names = Path(rdopt.__file__).parent, {site.name for site in SITES} | set(OWNERS)
    own = {"stretch"}  # what a record of symmetric matrices is called, too
    for room in ("transforms", "runs", "align", "encode", "sweep"):
        for file in (root / room).rglob("*.py"):
            if file.parent.name == "gauges":
                continue
            for node in ast.walk(ast.parse(file.read_text())):
                text = node.value if isinstance(node, ast.Constant) else None
                word = node.attr if isinstance(node, ast.Attribute) else text
                word = node.arg if isinstance(node, ast.keyword) else word
                assert word not in names - {"value", "norm"} - own, f"{file}:{getattr(node, 'lineno', 0)} names {word}"


def test_one_more_symmetry_takes_one_class_and_one_entry(tiny_llama):
    """In a process of its own, for the entry has to be there before the gauges are."""
    script = Path(__file__).with_name("one_more_site.py")
    subprocess.run([sys.executable, str(script), str(tiny_llama())], check=True)
