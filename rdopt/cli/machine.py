"""How fast this machine is at what commands spend their time on: a calibration of a few seconds."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rdopt.codec.grids.trellis import TRELLIS_STEP
from rdopt.codec.tables.trellis import rates_of, starting_plan
from rdopt.config.parallel import cores
from rdopt.encode.wavefront import quantize_wavefront

_PRODUCT, _MATRIX = 1024, (96, 512)  # widths of the matrices that are multiplied, shape of the one that is quantized
_WRITTEN = 2**25  # bytes


def machine_speed(near: Path) -> dict[str, float]:
    """Operations a second.

    Args:
        near: a path that is to be written; its disk is tried by a file without a name.

    Returns:
        "float32", "float64": operations of matrix products on the default device and of numpy; "trellis": weights that
        all cores quantize; "disk": bytes written and synced.
    """
    x = np.random.default_rng(0).standard_normal((_PRODUCT, _PRODUCT))
    single, product = jnp.asarray(x, jnp.float32), jax.jit(lambda x: x @ x)
    return {
        "float32": 2 * _PRODUCT**3 / _seconds(lambda: product(single).block_until_ready()),
        "float64": 2 * _PRODUCT**3 / _seconds(lambda: x @ x),
        "trellis": cores() * _MATRIX[0] * _MATRIX[1] / _seconds(_quantize),
        "disk": _WRITTEN / _seconds(lambda: _write(near)),
    }


def _seconds(work: Callable[[], object]) -> float:
    """The shorter time of two, behind one that compiles."""
    work()
    taken = []
    for _ in range(2):
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return min(taken)


def _quantize() -> None:
    m, n = _MATRIX
    W = np.random.default_rng(1).standard_normal(_MATRIX)
    rows, cols = np.ones(m), np.full(n, 0.5 * TRELLIS_STEP)
    (rates,) = rates_of(starting_plan([(np.full(m, 4.0), np.ones(n))]), 0.1)
    quantize_wavefront(W, np.eye(n), np.eye(m), rows, cols, rates, 8)


def _write(near: Path) -> None:
    folder = next(x for x in (near.absolute(), *near.absolute().parents) if x.is_dir())
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(_WRITTEN))
        file.flush()
        os.fsync(file.fileno())
