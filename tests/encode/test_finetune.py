"""Claims about finetuning after coding: the student, what a file keeps, what is refused, resume, devices."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import random_tensors, tiny_config
from stored_oracle import fold_stored

from rdopt.checkpoint.families import MATRICES, architecture_from_config, matrix_shapes
from rdopt.codec.streams.gains import Gains
from rdopt.codec.streams.uncoded import sixteen_bit
from rdopt.config.errors import UserError
from rdopt.encode.blockwise_pca import blockwise_pca
from rdopt.encode.finetune import (
    Distillation,
    FinetuneSettings,
    LearningRates,
    check_steps,
    decoded_params,
    distill,
    divergence,
    finetune,
    gained_linear,
    log_gains,
    rounded_params,
    starting_point,
    student_params,
    with_rotations,
)
from rdopt.evaluate.divergence import Reference, compare
from rdopt.operator.llama import logits
from rdopt.operator.params import params_from_tensors
from rdopt.runs.states import StateStore

CPU = jax.devices("cpu")[:1]
RATES = LearningRates(rows=0.02, cols=0.02, norms=0.02, biases=0.02)
SETTINGS = FinetuneSettings(steps=24, lam=10.0, batch_sequences=4, rates=RATES, checkpoint_every=5)


def tiny(family="llama"):
    """(params, arch) of a random network; its norms and biases are what a file can hold."""
    config = tiny_config(family)
    arch = architecture_from_config(config)
    tensors = {k: sixteen_bit(x) for k, x in random_tensors(config).items()}
    return params_from_tensors(tensors, arch), arch


def damaged(params, seed=0):
    """The network with rounded matrices, whose rows and columns are off by a factor each."""
    rng = np.random.default_rng(seed)
    blocks = dict(params["blocks"])
    for name in MATRICES:
        layers, out, n = blocks[name].shape
        coarse = np.rint(12 * blocks[name]) / 12
        a, b = np.exp2(0.2 * rng.standard_normal((layers, out, 1))), np.exp2(0.2 * rng.standard_normal((layers, 1, n)))
        blocks[name] = np.asarray(coarse * a * b, np.float32)
    return {**params, "blocks": blocks}


def tiny_tokens(seed, sequences=16):
    return np.random.default_rng(seed).integers(0, 96, (sequences, 16)).astype(np.int32)


def reference(params, arch, seed=1):
    inputs = tiny_tokens(seed)
    return Reference(params, arch, inputs, np.broadcast_to(np.arange(16) > 0, inputs.shape), 8)


def tuned(world, settings, **options):
    """`finetune` of a world on one device."""
    params, arch, tokens, selection = world
    return finetune(params, arch, tokens, selection, settings, devices=CPU, **options)


def tiny_gains(arch, seed=0):
    rng, shapes = np.random.default_rng(seed), matrix_shapes(arch)
    rows, cols = (
        {key: rng.integers(-9, 9, shape[i]).astype(np.int32) for key, shape in shapes.items()} for i in (0, 1)
    )
    del rows[1, "k"], cols[0, "down"]
    return Gains(32, rows, cols)


# the student


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_student_starts_as_the_model_that_the_file_decodes_to(family):
    params, arch = tiny(family)
    gains, tokens = tiny_gains(arch), tiny_tokens(0, 2)
    start = starting_point(params, arch, gains)
    found = logits(student_params(params, start), tokens, arch, gained_linear)
    expected = logits(decoded_params(params, gains, None), tokens, arch)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    plain = logits(student_params(params, starting_point(params, arch, None)), tokens, arch, gained_linear)
    np.testing.assert_allclose(plain, logits(params, tokens, arch), atol=1e-5)


@pytest.mark.parametrize("block", [8, 7])
def test_gains_act_before_stored_rotations_are_undone(block):
    original, arch = tiny()
    stored = blockwise_pca(original, arch, block=block, bits=6)
    params = fold_stored(original, stored)
    gains, tokens = tiny_gains(arch), tiny_tokens(0, 2)
    trained = starting_point(params, arch, gains)
    found = logits(student_params(with_rotations(params, arch, stored), trained), tokens, arch, gained_linear)
    np.testing.assert_allclose(found, logits(decoded_params(params, gains, stored), tokens, arch), atol=1e-4)
    again = logits(decoded_params(params, None, stored), tokens, arch)
    np.testing.assert_allclose(again, logits(original, tokens, arch), atol=1e-4)


def test_the_loss_is_the_kl_that_evaluation_measures():
    params, arch = tiny()
    other, tokens = damaged(params), tiny_tokens(1)
    scored = np.ones_like(tokens, bool)
    scored[:, 0] = False
    start = starting_point(other, arch, None)
    # Evaluation scores all positions but the last: give the loss one token more.
    measured = compare(Reference(params, arch, tokens, scored, 8), other, arch).kl_mean
    found = divergence(params, arch, student_params(other, start), arch, jnp.asarray(tokens[:, :-1]))
    assert float(found) == pytest.approx(measured, rel=1e-4)


def test_values_of_sixteen_bit_stay_as_they_are():
    rng = np.random.default_rng(0)
    for kind in (np.float16, ml_dtypes.bfloat16):
        x = rng.standard_normal(50).astype(kind).astype(np.float32)
        np.testing.assert_array_equal(sixteen_bit(x), x)
    np.testing.assert_allclose(sixteen_bit(np.array([1.0, 1e6], np.float32)), [1, 1e6], rtol=2.0**-8)
    x = rng.standard_normal(50).astype(np.float32)
    np.testing.assert_allclose(sixteen_bit(x), x, rtol=2.0**-11)


def test_what_is_kept_of_the_start_is_the_start():
    params, arch = tiny("qwen3")
    gains = tiny_gains(arch)
    start = starting_point(params, arch, gains)
    jax.tree.map(np.testing.assert_array_equal, rounded_params(params, start), params)
    for part in ("rows", "cols"):
        logs, held = log_gains(start, part), getattr(gains, part)
        assert list(logs) == [key for name in MATRICES for i in range(2) if (key := (i, name)) in held]
        for key, values in logs.items():
            np.testing.assert_array_equal(values, held[key] / 32)


# training


@pytest.fixture(scope="module")
def world():
    """(damaged params, arch, calibration tokens, reference of the original)."""
    params, arch = tiny()
    return damaged(params), arch, tiny_tokens(2), reference(params, arch)


@pytest.fixture(scope="module")
def two_devices(tmp_path_factory):
    """A process with two devices that trains beside the tests of one, and the file it will write."""
    code = "import sys, test_finetune; test_finetune.train_on_all_devices(sys.argv[1])"
    here, out = Path(__file__).parents[1], tmp_path_factory.mktemp("devices") / "two.npz"
    path = os.pathsep.join(map(str, (Path(__file__).parent, here, here.parent)))
    flags = "--xla_force_host_platform_device_count=2"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(out)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        yield process, out
        process.kill()


@pytest.fixture(scope="module")
def whole(world, two_devices):
    """(finetuned, progress) of an unbroken run."""
    seen = []
    return tuned(world, SETTINGS, report=seen.append), seen


def test_finetuning_lowers_kl_on_its_text_and_on_the_selection_text(whole):
    found, seen = whole
    assert found.accepted
    assert found.kl_after < 0.8 * found.kl_before
    assert np.mean([p.kl for p in seen[-4:]]) < 0.8 * seen[0].kl
    assert [p.step for p in seen if p.selection is not None] == check_steps(24) == [6, 12, 18, 24]
    assert "-" in found.sentence and f"{found.kl_after:.5f}" in found.sentence


def test_the_reported_kl_is_that_of_the_rounded_values(whole, world):
    found, _ = whole
    params, arch, _, selection = world
    assert found.kl_before == compare(selection, params, arch).kl_mean
    assert found.kl_after == compare(selection, decoded_params(found.params, found.gains, None), arch).kl_mean
    for name in MATRICES:
        np.testing.assert_array_equal(found.params["blocks"][name], params["blocks"][name])
    for name in ("attn_norm", "mlp_norm"):
        for norm in found.params["blocks"][name]:
            np.testing.assert_array_equal(sixteen_bit(norm), norm)


@pytest.mark.parametrize("fixed", [(), ("v", "down")])
def test_what_has_a_rate_of_zero_or_is_fixed_stays_and_all_else_moves(fixed):
    params, arch = tiny("qwen2")
    other = damaged(params)
    models = Distillation(other, arch, params, arch, fixed)
    start = starting_point(other, arch, tiny_gains(arch))
    settings = replace(SETTINGS, steps=4, rates=RATES._replace(rows=0.0))
    best = distill(models, tiny_tokens(2), settings, start, lambda trained: 1.0, devices=CPU)
    for kind, parts in best.values.items():
        for name, value in parts.items():
            stays = kind == "rows" or (kind == "cols" and name in fixed)
            assert np.array_equal(value, start[kind][name]) == stays, (kind, name)


def test_redundant_column_gains_change_nothing_that_rows_and_norms_could_not():
    params, arch = tiny()
    rng, tokens = np.random.default_rng(0), tiny_tokens(0, 2)
    shift = {name: 0.3 * rng.standard_normal((2, n)).astype(np.float32) for name, n in (("attn", 24), ("down", 40))}
    columns, moved = (starting_point(params, arch, None) for _ in range(2))
    columns["cols"] |= {"v": shift["attn"], "down": shift["down"]}
    moved["norms"]["attn_norm"] = shift["attn"]
    moved["cols"] |= {"q": -shift["attn"], "k": -shift["attn"]}
    moved["rows"]["up"] = shift["down"]
    expected, found = (logits(student_params(params, x), tokens, arch, gained_linear) for x in (columns, moved))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_best_values_on_the_selection_text_are_kept(world):
    params, arch, tokens, selection = world
    start, seen = starting_point(params, arch, None), []

    def rises_after_the_second(trained):
        seen.append(trained)
        return [3.0, 1.0, 2.0, 4.0][len(seen) - 1]

    models = Distillation(params, arch, selection.params, arch)
    best = distill(models, tokens, SETTINGS, start, rises_after_the_second, devices=CPU)
    assert best.kl == 1.0 and len(seen) == 4
    jax.tree.map(np.testing.assert_array_equal, best.values, seen[1])


def test_finetuning_that_does_harm_is_refused_and_gives_back_its_input(world):
    params, arch, _, selection = world
    wild = replace(SETTINGS, rates=LearningRates(1.0, 1.0, 1.0, 1.0))
    gains = Gains(32, {(0, "q"): np.ones(32, np.int32)}, {})
    found = tuned(world, wild, gains=gains)
    assert not found.accepted and found.kl_after > found.kl_before
    assert found.gains is gains and found.params is params
    assert found.kl_before == compare(selection, decoded_params(params, gains, None), arch).kl_mean
    assert found.sentence.startswith("finetuning is refused: on the selection text it takes KL from")


def test_a_killed_run_resumes_to_the_same_bits(whole, world, tmp_path):
    class Killed(Exception):
        pass

    def die(progress):
        if progress.step == 13:
            raise Killed

    store = StateStore(tmp_path / "state", {"file": "a"})
    with pytest.raises(Killed):
        tuned(world, SETTINGS, store=store, report=die)
    store.close()
    assert_goes_on_to_the_same_bits(whole, world, tmp_path, 10)


def test_ctrl_c_saves_and_the_run_goes_on_to_the_same_bits(whole, world, tmp_path):
    before = signal.getsignal(signal.SIGINT)

    def interrupt(progress):
        if progress.step == 7:
            signal.raise_signal(signal.SIGINT)

    store = StateStore(tmp_path / "state", {"file": "a"})
    with pytest.raises(KeyboardInterrupt):
        tuned(world, SETTINGS, store=store, report=interrupt)
    store.close()
    assert signal.getsignal(signal.SIGINT) is before
    assert_goes_on_to_the_same_bits(whole, world, tmp_path, 8)


def assert_goes_on_to_the_same_bits(whole, world, folder, done):
    seen = []
    store = StateStore(folder / "state", {"file": "a"})
    found = tuned(world, SETTINGS, store=store, report=seen.append)
    store.close()
    assert seen == whole[1][done:]
    jax.tree.map(np.testing.assert_array_equal, found[:5], whole[0][:5])


def test_a_checkpoint_of_another_file_is_refused(world, tmp_path):
    store = StateStore(tmp_path / "state", {"file": "a"})
    tuned(world, SETTINGS, store=store)
    store.close()
    other = StateStore(tmp_path / "state", {"file": "b"})
    with pytest.raises(UserError, match="made with other file;"):
        tuned(world, SETTINGS, store=other)
    other.close()


def test_a_loss_that_is_not_finite_is_refused(world):
    settings = replace(SETTINGS, rates=RATES._replace(rows=float("nan")))
    with pytest.raises(UserError, match="the KL of finetuning is nan at step 1; "):
        tuned(world, settings)


def test_two_devices_train_what_one_trains(whole, two_devices):
    process, out = two_devices
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    found, one = np.load(out), whole[0]
    assert int(found["devices"]) == 2
    assert found["kl"] == pytest.approx([one.kl_before, one.kl_after], rel=1e-3)
    for name, expected in arrays(one).items():
        # A gain on the border of two integers may fall to either side.
        assert np.abs(found[name] - expected).max() <= (1 if expected.dtype == np.int32 else 2e-3), name


def arrays(found):
    """Gains and norms by name."""
    gains = [(part, key, x) for part in ("rows", "cols") for key, x in getattr(found.gains, part).items()]
    named = {f"{part}.{layer}.{name}": x for part, (layer, name), x in gains}
    blocks = {k: v for k, v in found.params["blocks"].items() if k.endswith("_norm")}
    return named | blocks | {"final_norm": found.params["final_norm"]}


def train_on_all_devices(out):
    """Run by the test above in a process with two devices."""
    params, arch = tiny()
    devices = jax.local_devices()
    found = finetune(damaged(params), arch, tiny_tokens(2), reference(params, arch), SETTINGS, devices=devices)
    np.savez(out, devices=len(devices), kl=[found.kl_before, found.kl_after], **arrays(found))
