"""Claims about steps that draw some blocks: which, that J stays unbiased, that others rest, resuming, memory."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations
from typing import Any

import jax
import numpy as np
import pytest
from conftest import random_tensors, synthetic_moments, tiny_config
from test_learning import CPU, TRAIN, arrays, assert_same, tiny_tokens

from rdopt.align import devices as pool
from rdopt.align.alignment import Alignment, Start, single_precision
from rdopt.align.feed import Drawn, Feed, Streams, drawn_blocks
from rdopt.align.learn import Constants, compiled_step, first_memories, learn
from rdopt.align.loop import State, draws
from rdopt.align.problem import make_problem
from rdopt.calibration.subject import load_subject
from rdopt.checkpoint.families import architecture_from_config
from rdopt.checkpoint.write import write_checkpoint
from rdopt.config.errors import UserError
from rdopt.config.memory import Cache
from rdopt.config.schema import Config, TrainConfig
from rdopt.runs.states import StateStore
from rdopt.transforms.bases import starting_gauges

LAYERS = 3
SITES: Any = ("residual", "value", "norm", "hidden")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, config = tmp_path_factory.mktemp("drawn") / "model", tiny_config(num_hidden_layers=LAYERS)
    write_checkpoint(folder, config, random_tensors(config).items(), dtype="float32")
    return folder


def given(folder, train, budget=2**30):
    """(problem, settings, tokens, start) of the model."""
    subject = replace(load_subject(folder), cache=Cache(budget))
    moments = synthetic_moments(subject.arch)
    problem, settings = make_problem(subject, moments, Config(model=str(folder), train=train))
    start = starting_gauges(train.init, subject.params, subject.arch, moments, train.seed)
    return problem, settings, tiny_tokens(subject.arch), start


@pytest.mark.parametrize(("count", "of"), [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5), (2, 6)])
def test_an_epoch_draws_every_block_once_and_no_step_one_twice(count, of):
    found = draws(3, 60, count, of)
    for step in found:
        assert np.all(np.diff(step) > 0)
    seen = np.bincount(found.ravel(), minlength=of)
    assert seen.max() - seen.min() <= 1
    if of % count == 0:
        epochs = found.reshape(-1, of)
        assert all(sorted(each) == list(range(of)) for each in epochs)
        assert count == of or len({tuple(each) for each in epochs}) > 1
    np.testing.assert_array_equal(draws(3, 17, count, of), found[:17])
    assert count == of or not np.array_equal(draws(4, 60, count, of), found)


@pytest.fixture(scope="module")
def steps(folder):
    """From a state and the drawn blocks to the state after a step."""
    train = replace(TRAIN, sites=SITES)
    problem, settings, _, start = given(folder, train)
    begun, arch = Start(single_precision(start, settings.arch)), settings.arch
    constants = Constants(begun, None, np.float32(train.lam), jax.random.key_data(jax.random.key(0)))
    whole = Alignment(arch=arch, sites=SITES, rate=train.rate)
    compiled: Any = compiled_step

    def step(state, layers, number):
        module = whole.clone(arch=replace(arch, num_layers=len(layers)))
        run = compiled(module, settings, train.steps, train.learning_rate, tuple(CPU))
        drawn = Drawn(np.array(layers), problem.some(layers))
        words = pool.replicate((state, constants, drawn), CPU)
        return pool.first(run(*words, None, pool.replicate(np.int32(number), CPU)))

    shapes: Any = jax.eval_shape(whole.init, jax.random.key(0), begun)
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes["params"])
    return step, State(params, jax.device_get(first_memories(params, arch)))


def each(tree, layers):
    """The leaves' entries of some blocks."""
    return [x[list(layers)] for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("count", [1, 2])
def test_the_mean_over_draws_is_the_step_of_all_blocks(steps, count):
    """Adam's running mean after the first step is a tenth of the gradient."""
    step, begin = steps
    all_blocks, figures = step(begin, range(LAYERS), 0)
    found = [(layers, *step(begin, layers, 0)) for layers in combinations(range(LAYERS), count)]
    np.testing.assert_allclose(np.mean([x[2] for x in found], axis=0), figures, rtol=1e-5)
    means = [np.asarray(state.optimizer.shared.mean["residual"]["theta"]) for _, state, _ in found]
    wanted = all_blocks.optimizer.shared.mean["residual"]["theta"]
    assert np.linalg.norm(np.mean(means, axis=0) - wanted) <= 1e-4 * np.linalg.norm(wanted)
    assert np.linalg.norm(means[0] - wanted) > 0.1 * np.linalg.norm(wanted)
    for layers, state, _ in found:
        parts = zip(each(state.optimizer.own.mean, layers), each(all_blocks.optimizer.own.mean, layers), strict=True)
        for ours, theirs in parts:
            assert np.linalg.norm(ours - theirs) <= 1e-4 * np.linalg.norm(theirs)


def test_blocks_that_are_not_drawn_stay_as_they_are_to_the_bit(steps):
    step, state = steps
    state, _ = step(state, range(LAYERS), 0)
    after, _ = step(state, (0, 2), 1)
    before, now = ([*(x.params[k] for k in SITES[1:]), x.optimizer.own] for x in (state, after))
    for old, new in zip(before, now, strict=True):
        for a, b in zip(each(old, [1]), each(new, [1]), strict=True):
            np.testing.assert_array_equal(a, b)
        assert all(np.any(a != b) for a, b in zip(each(old, [0]), each(new, [0]), strict=True))
    assert after.optimizer.own.count.tolist() == [2, 1, 2] and after.optimizer.shared.count == 2


@pytest.fixture(scope="module")
def train():
    return replace(TRAIN, blocks=2, sites=("residual", "value"))


@pytest.fixture(scope="module")
def unbroken(folder, train):
    seen = []
    return learn(*given(folder, train), train, devices=CPU, report=seen.append), seen


def test_a_killed_run_goes_on_with_the_same_draws(folder, train, unbroken, tmp_path):
    def die(progress):
        if progress.step == 8:
            raise ZeroDivisionError

    store = StateStore(tmp_path / "state", {})
    with pytest.raises(ZeroDivisionError):
        learn(*given(folder, train), train, devices=CPU, store=store, report=die)
    store.close()
    store, seen = StateStore(tmp_path / "state", {}), []
    learned = learn(*given(folder, train), train, devices=CPU, store=store, report=seen.append)
    store.close()
    assert seen == unbroken[1][5:]
    assert_same(learned, unbroken[0])


def test_no_result_depends_on_the_memory_that_blocks_may_take(folder, train, unbroken):
    assert_same(learn(*given(folder, train, budget=0), train, devices=CPU), unbroken[0])


def test_some_blocks_a_step_lower_the_cost_nearly_as_all_do(folder, train, unbroken):
    """In the mean over the last epoch: a step's own J is that of its blocks."""
    every = replace(train, blocks=None)
    seen = []
    learn(*given(folder, every), every, devices=CPU, report=seen.append)
    first, last = seen[0].J, seen[-1].J
    J = [p.J for p in unbroken[1]]
    assert np.mean(J[-LAYERS:]) < first - 0.5 * (first - last)


def test_the_distortion_of_blocks_reads_the_originals_streams(folder, train, tmp_path):
    """From disk as from memory, of the batch and the blocks drawn, in the type of the activations."""
    block = replace(train, distortion="block", activations="bfloat16")
    problem, settings, tokens, _ = given(folder, block)
    inside = Streams(problem, tokens, settings, 4).read(range(LAYERS), np.arange(8))
    problem, *_ = given(folder, block, budget=0)
    outside = Streams(problem, tokens, settings, 4).read((0, 2), np.array([5, 1]))
    assert outside.dtype == inside.dtype and outside.itemsize == 2
    np.testing.assert_array_equal(outside, inside[[5, 1]][:, [0, 2]])
    with ThreadPoolExecutor(1) as thread:
        feed = Feed(problem, settings, tokens, block, CPU, thread)
        for number in range(3):
            drawn, streams = feed(number)
            layers = draws(block.seed, block.steps, 2, LAYERS)[number]
            assert streams.shape[:3] == (1, 4, 2)
            np.testing.assert_array_equal(drawn.layers[0], layers)
            for at, layer in enumerate(layers):
                np.testing.assert_array_equal(drawn.blocks.params["up"][0][at], problem.block(int(layer)).params["up"])
    learned = learn(*given(folder, block), block, devices=CPU)
    assert np.all([np.isfinite(x).all() for x in arrays(learned).values()])


def test_how_many_blocks_a_step_draws():
    arch = architecture(num_hidden_layers=30)
    assert drawn_blocks(TrainConfig(), arch) == 8
    assert drawn_blocks(TrainConfig(), architecture(num_hidden_layers=6)) == 6
    wide = architecture(num_hidden_layers=32, hidden_size=4096, intermediate_size=14336)
    assert drawn_blocks(TrainConfig(), wide) == 1
    assert drawn_blocks(TrainConfig(blocks=40), arch) == 30
    assert drawn_blocks(TrainConfig(distortion="model"), arch) == 30
    with pytest.raises(UserError, match=r"train\.blocks is 4, but train\.distortion model runs all 30 blocks"):
        drawn_blocks(TrainConfig(distortion="model", blocks=4), arch)


def architecture(**changes):
    return architecture_from_config(tiny_config(**changes))
