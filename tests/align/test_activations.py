"""Claims about the activations in training: bfloat16 beside float32, and how many blocks' are held at a time."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_tensors, synthetic_moments, tiny_config
from whole_model import read

from rdopt.align.alignment import Alignment, Start, single_precision
from rdopt.align.objective import rate_and_distortion
from rdopt.align.problem import make_problem
from rdopt.calibration.subject import load_subject
from rdopt.checkpoint.write import write_checkpoint
from rdopt.config.schema import Config, EncodeConfig, TrainConfig
from rdopt.transforms.bases import starting_gauges

# Compiled for one call: code of less speed, in the same buffers.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# One sum or product in bfloat16 is rounded by at most this share.
UNIT = float(jnp.finfo(jnp.bfloat16).eps) / 2


def objective(folder, layers=2, shape=(8, 32), **changes):
    """(R and D of parameters and input, parameters near zero, blocks and text) of a tiny model, uniform grid."""
    config = tiny_config(num_hidden_layers=layers)
    write_checkpoint(folder, config, random_tensors(config).items(), dtype="float32")
    subject, train = load_subject(folder), TrainConfig(lam=20, init="random", sites=("residual",), **changes)
    moments = synthetic_moments(subject.arch)
    encode = EncodeConfig(grid="round", output="diagonal")
    problem, settings = make_problem(subject, moments, Config(model=str(folder), train=train, encode=encode))
    gauges = starting_gauges("random", subject.params, subject.arch, moments, 0)
    start = Start(single_precision(gauges, settings.arch))
    module = Alignment(arch=settings.arch, sites=train.sites, rate=train.rate)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, subject.arch.vocab_size, shape).astype(np.int32)
    shapes: Any = module.init(jax.random.key(0), start)["params"]
    params = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape), jnp.float32), shapes)

    keys = jax.random.split(jax.random.key(1), layers)

    def terms(params, given):
        variables: Any = module.apply({"params": params}, start)
        blocks, text = given
        return rate_and_distortion(variables, blocks, text, jnp.float32(20), keys, settings)

    return terms, params, read(problem, settings, tokens)


def distortion_and_gradient(terms, params, problem):
    """R and D, the gradient of D as one vector, and the types that it came in."""

    def D(params, problem):
        found = terms(params, problem)
        return found.distortion, found

    grads, found = jax.jit(jax.grad(D, has_aux=True), compiler_options=FAST)(params, problem)
    leaves = jax.tree.leaves(grads)
    return found, np.concatenate([np.ravel(x) for x in leaves]), {x.dtype for x in leaves}


@pytest.mark.parametrize("distortion", ["block", pytest.param("model", marks=pytest.mark.slow)])
def test_bfloat16_activations_give_the_float32_objective_and_float32_gradients(tmp_path, distortion):
    """A block rounds a dozen times on the way forward and as often on the way back, by at most a unit each.

    The square of what was rounded a dozen times, and its gradient, move by two dozen units at most.
    """
    exact, wide, _ = distortion_and_gradient(*objective(tmp_path / "a", distortion=distortion))
    narrower: Any = {"distortion": distortion, "activations": "bfloat16"}
    found, narrow, types = distortion_and_gradient(*objective(tmp_path / "b", **narrower))
    assert found.rate == exact.rate
    assert found.distortion != exact.distortion
    assert float(found.distortion) == pytest.approx(float(exact.distortion), rel=24 * UNIT)
    assert np.linalg.norm(narrow - wide) <= 24 * UNIT * np.linalg.norm(wide)
    assert types == {jnp.dtype("float32")} and found.distortion.dtype == jnp.float32


@pytest.mark.slow
def test_rematerialized_gradients_hold_one_blocks_activations_at_a_time(tmp_path):
    """Six blocks need what one needs that keeps everything, and their six input streams."""
    sequences, length, blocks = 16, 64, 6

    def temporary(layers, remat):
        changes: Any = {"distortion": "block", "remat": remat, "layers": layers, "shape": (sequences, length)}
        terms, params, problem = objective(tmp_path / f"{remat}{layers}", **changes)
        lowered = jax.jit(jax.grad(lambda p, q: terms(p, q).distortion)).lower(params, problem)
        memory: Any = lowered.compile(FAST).memory_analysis()
        return memory.temp_size_in_bytes

    one, kept, again = temporary(1, "never"), temporary(blocks, "never"), temporary(blocks, "always")
    streams = 4 * blocks * sequences * length * tiny_config()["hidden_size"]
    assert again <= 1.1 * one + streams
    assert kept >= 3 * again
