"""Claims about learning: gradients, the relaxed encoder and the real one, units, resume, devices, errors."""

import functools
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from conftest import random_tensors, synthetic_moments, tiny_config

from rdopt.align import Problem, StateStore, learn, make_problem, rate_and_distortion
from rdopt.align import devices as pool
from rdopt.align.alignment import orthogonality, starting_rotations
from rdopt.align.cholesky import cholesky_and_inverse
from rdopt.align.coordinates import (
    Factor,
    Rotations,
    left_right,
    turn_back,
    turn_weight,
    turned_diag_G,
    turned_factors,
)
from rdopt.align.learn import batch_indices
from rdopt.align.relaxation import analytic_distortion, relax, weight_error
from rdopt.calibration import INPUT_OF, load_subject
from rdopt.checkpoint import MATRICES, hf_name, open_checkpoint, write_checkpoint
from rdopt.codec import decode_model, encode_model, make_source
from rdopt.codec.allocation import choose_plan, table_classes
from rdopt.codec.entropy import encode_indices
from rdopt.codec.feedback import quantize_feedback, quantize_rounding
from rdopt.config import Config, EncodeConfig, TrainConfig
from rdopt.config.errors import UserError
from rdopt.operator import load_params, logits
from rdopt.transforms import (
    Gauges,
    fold,
    fold_moments,
    gauges_of,
    orthogonality_error,
    random_orthogonal,
    record_to_dict,
    starting_gauges,
)

TRAIN = TrainConfig(
    steps=12, learning_rate=0.02, batch_sequences=4, lam=20, init="random", checkpoint_every=5
)
CPU = jax.devices("cpu")[:1]


def tiny_tokens(arch, sequences=8):
    return np.random.default_rng(0).integers(0, arch.vocab_size, (sequences, 16)).astype(np.int32)


def tiny_problem(folder, train=TRAIN):
    """(problem, settings, tokens, start) of a tiny model with synthetic moments."""
    subject = load_subject(folder)
    moments = synthetic_moments(subject.arch)
    problem, settings = make_problem(subject, moments, Config(model=str(folder), train=train))
    start = starting_gauges(train.init, subject.params, subject.arch, moments, train.seed)
    return problem, settings, tiny_tokens(subject.arch), start


def arrays(learned):
    """Every array of the learned records by name."""
    found = {}
    for site, record in learned.records.items():
        found |= record_to_dict(record, site)[1]
    return found


# parts


def test_the_cholesky_gradient_is_that_of_autodiff_in_float64():
    rng = np.random.default_rng(0)
    x, A, B = (rng.standard_normal((7, 7)) for _ in range(3))

    def loss(factor, S):
        L, inverse = factor(0.5 * (S + S.T))
        return jnp.sum(A * L**2) + jnp.sum(B * jnp.sin(inverse))

    def plain(S):
        L = jnp.linalg.cholesky(S)
        return L, jnp.linalg.inv(L)

    with jax.enable_x64(True):
        S = jnp.asarray(x @ x.T + np.eye(7))
        factors = (cholesky_and_inverse, plain)
        ours, theirs = (jax.jit(jax.value_and_grad(functools.partial(loss, f)))(S) for f in factors)
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-12)
        np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-9, atol=1e-10)


def test_trial_coordinates_are_those_of_the_fold(tiny_llama):
    folder = tiny_llama("qwen2")
    problem, settings, _, _ = tiny_problem(folder)
    subject, arch = load_subject(folder), settings.arch
    gauges = Gauges(random_orthogonal(1, arch.hidden_size), random_orthogonal(2, arch.head_dim, (2, 2)))
    folded, _ = fold(subject.params, subject.arch, gauges)
    moments = fold_moments(synthetic_moments(subject.arch), subject.params, subject.arch, gauges)
    R, V = starting_rotations(gauges, arch)
    rotations = Rotations(R, V[1])
    sigma = {k: jnp.asarray(v[1]) for k, v in problem.sigma.items()}
    factors = turned_factors(sigma, rotations, arch, 0.02)
    for name in MATRICES:
        A, B = left_right(name, rotations, arch)
        W = problem.params["blocks"][name][1]
        turned = turn_weight(jnp.asarray(W), A, B)
        np.testing.assert_allclose(turned, folded["blocks"][name][1], atol=1e-5)
        np.testing.assert_allclose(turn_back(turned, A, B), W, atol=1e-5)
        expected = moments.diag_G(name, 1)
        found = turned_diag_G(jnp.asarray(problem.G[name][1]), A, 0.02)
        np.testing.assert_allclose(found, expected + 0.02 * expected.mean(), rtol=1e-3)
        S = moments.sigma[INPUT_OF[name]][1]
        L, inverse = factors[INPUT_OF[name]]
        damped = S + 0.02 * np.mean(np.diagonal(S)) * np.eye(len(S))
        np.testing.assert_allclose(L @ L.T, damped, atol=1e-4 * np.abs(S).max())
        np.testing.assert_allclose(L @ inverse, np.eye(len(S)), atol=1e-3)


ACCURACY = [(0.4, 0.02, 0.05), (1.5, 0.02, 0.05), (4.0, 0.15, 0.15)]


def synthetic_matrix(rows=256, columns=192):
    """W with rank-1 spreads, a moment's factor, row sensitivities."""
    rng = np.random.default_rng(0)
    W = np.outer(np.exp(0.4 * rng.standard_normal(rows)), np.exp(0.4 * rng.standard_normal(columns)))
    W = (W * rng.standard_normal((rows, columns))).astype(np.float32)
    x = rng.standard_normal((4 * columns, columns)) * np.exp(0.5 * rng.standard_normal(columns))
    x = x @ np.linalg.qr(rng.standard_normal((columns, columns)))[0] + 0.3 * x[:, :1]
    L = np.linalg.cholesky(x.T @ x / len(x))
    return W, L, np.exp(rng.standard_normal(rows))


@pytest.mark.parametrize("grid", ["feedback", "round"])
@pytest.mark.parametrize(("c", "bits_within", "distortion_within"), ACCURACY)
def test_the_relaxed_encoder_has_the_real_ones_bits_and_distortion(grid, c, bits_within, distortion_within):
    """3.3 and 1.6 bits to 2 %; at 0.7 bits the noise that feedback is modelled to carry is too large."""
    W, L, g = synthetic_matrix()
    row, feedback = 1 / np.sqrt(g), grid == "feedback"
    if feedback:
        col = c / np.diagonal(L)
        z = quantize_feedback(W, L, row, col)
    else:
        col = c / np.sqrt(np.diagonal(L @ L.T))
        z = quantize_rounding(W, row, col)
    plan = choose_plan([z])
    bits = 8 * len(encode_indices(z, table_classes(plan.spreads[0], plan.width), plan.tables))
    E = W - np.outer(row, col) * z
    D = 0.5 * np.sum(g[:, None] * (E @ L) ** 2)
    arguments = (jnp.asarray(x, jnp.float32) for x in (W, L, g, c))
    relaxed = jax.jit(relax, static_argnums=(4, 5))(*arguments, feedback, "gaussian")
    assert float(relaxed.rate.sum()) == pytest.approx(bits, rel=bits_within)
    assert float(analytic_distortion(relaxed, jnp.float32(c))) == pytest.approx(D, rel=distortion_within)


@pytest.mark.parametrize("feedback", [True, False])
def test_relaxed_weight_errors_have_the_analytic_distortion(feedback):
    W, L, g = synthetic_matrix()
    c = jnp.float32(0.4)
    W, L, g = (jnp.asarray(x, jnp.float32) for x in (W, L, g))
    relaxed = relax(W, L, g, c, feedback, "gaussian")
    noise = jnp.asarray(np.random.default_rng(1).uniform(-0.5, 0.5, W.shape), jnp.float32)
    E = np.asarray(weight_error(noise, Factor(L, jnp.linalg.inv(L)), g, c, feedback), np.float64)
    found = 0.5 * np.sum(np.asarray(g)[:, None] * (E @ np.asarray(L)) ** 2)
    assert found == pytest.approx(float(analytic_distortion(relaxed, c)), rel=0.05)


def test_batches_walk_through_every_sequence_once_an_epoch():
    seen = np.concatenate([batch_indices(3, step, 4, 10) for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    np.testing.assert_array_equal(batch_indices(3, 2, 4, 10), seen[8:12])


# the objective on a trained model


@pytest.fixture(scope="module")
def demo(demo_model, demo_tokens, demo_moments):
    """(subject, moments, tokens) of the demo model."""
    return load_subject(demo_model), demo_moments, demo_tokens


def terms_of(demo, lam, **changes):
    subject, moments, tokens = demo
    problem, settings = make_problem(subject, moments, Config(train=TrainConfig(lam=lam)))
    R, V = starting_rotations(Gauges(), settings.arch)
    run = jax.jit(rate_and_distortion, static_argnames="settings")
    variables = {"R": R, "V": V, "log_scale": {}}
    settings, key = replace(settings, **changes), jax.random.key(0)
    return run(variables, problem, jnp.asarray(tokens[:16]), jnp.float32(lam), key, settings=settings)


def test_the_three_distortions_and_the_encoded_files_kl_agree_in_nats_per_token(demo):
    lam = 70.0
    found = {k: float(terms_of(demo, lam, distortion=k).distortion) for k in ("matrix", "block", "model")}
    subject, moments, tokens = demo
    encode = EncodeConfig(grid="feedback")  # training models the scalar grid
    # The gains are folded in training; the file is of the same coordinates.
    params, arch = fold(subject.params, subject.arch, Gauges(np.eye(subject.arch.hidden_size)))
    moved = fold_moments(moments, subject.params, subject.arch, Gauges(np.eye(subject.arch.hidden_size)))
    source = make_source(params, arch, subject.checkpoint.config, {}, moved, encode, 1)
    encoded = encode_model(source, lam, encode)
    decoded = decode_model(encoded.data)
    weights = {k: np.stack([decoded.tensors[n] for n in names]) for k, names in names_of(arch).items()}
    coded = {**params, "blocks": {**params["blocks"], **weights}}
    found["file"] = measured_kl(params, coded, arch, tokens[:16])
    for kind, value in found.items():
        assert 0.7 < value / found["file"] < 1.4, (kind, found)
    rate = float(terms_of(demo, lam, distortion="matrix").rate)
    assert rate == pytest.approx(encoded.bits["codes"] / source.weights, rel=0.03)


def names_of(arch):
    return {k: [hf_name(i, k) for i in range(arch.num_layers)] for k in MATRICES}


def measured_kl(params, other, arch, tokens):
    """KL(params || other) in float64, the mean over all positions."""
    run = jax.jit(logits, static_argnames="arch")
    scores = (np.asarray(run(x, tokens, arch), np.float64) for x in (params, other))
    p, q = (scipy.special.log_softmax(x, axis=-1) for x in scores)
    return np.sum(np.exp(p) * (p - q)) / tokens.size


def test_at_high_rate_the_distortion_is_what_lambda_asks_for(demo):
    """D = 1 / (2 ln2 lambda): 0.72 nats/token over lambda."""
    found = terms_of(demo, 2000.0, distortion="matrix")
    assert float(found.distortion) == pytest.approx(1 / (2 * np.log(2) * 2000), rel=0.05)
    finer = terms_of(demo, 8000.0, distortion="matrix")
    assert float(finer.rate - found.rate) == pytest.approx(1.0, abs=0.05)


# learning


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("align") / "tiny"
    write_checkpoint(folder, tiny_config(), random_tensors(tiny_config()).items(), dtype="float32")
    return folder


@pytest.fixture(scope="module")
def four_devices(tiny_folder):
    """A process with four devices that learns beside the tests of one, and the file it will write."""
    code = "import sys, test_align; test_align.learn_on_all_devices(*sys.argv[1:])"
    flags = "--xla_force_host_platform_device_count=4"
    here, out = Path(__file__).parent, tiny_folder.parent / "four.npz"
    path = os.pathsep.join([str(here), str(here.parent)])
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    command = [sys.executable, "-c", code, str(tiny_folder), str(out)]
    with subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        yield process, out
        process.kill()


@pytest.fixture(scope="module")
def whole(tiny_folder, four_devices):
    """(learned, progress) of an unbroken run."""
    seen = []
    learned = learn(*tiny_problem(tiny_folder), TRAIN, devices=CPU, report=seen.append)
    return learned, seen


def test_the_cost_falls(whole):
    learned, seen = whole
    assert [p.step for p in seen] == list(range(1, 13))
    assert seen[-1].J < seen[0].J - 0.02
    for p in seen:
        assert p.rate + TRAIN.lam * p.distortion == pytest.approx(p.J, rel=1e-5)
    assert learned.rate == pytest.approx(seen[-1].rate)
    assert learned.distortion == pytest.approx(seen[-1].distortion)


def test_learned_rotations_are_orthogonal_in_float32_and_in_float64(whole):
    gauges = gauges_of(whole[0].records)
    for Q in gauges:
        assert Q is not None and Q.dtype == np.float64
        assert orthogonality_error(Q) < 1e-9
        assert orthogonality(jnp.asarray(Q, jnp.float32)) <= 1e-5


def test_the_learned_network_is_the_original(whole, tiny_folder):
    checkpoint = open_checkpoint(tiny_folder)
    params, arch = load_params(checkpoint), checkpoint.arch
    folded, folded_arch = fold(params, arch, gauges_of(whole[0].records))
    run, tokens = jax.jit(logits, static_argnames="arch"), tiny_tokens(arch)
    np.testing.assert_allclose(run(folded, tokens, folded_arch), run(params, tokens, arch), atol=1e-4)


def test_a_killed_run_resumes_to_the_same_bits(whole, tiny_folder, tmp_path):
    class Killed(Exception):
        pass

    def die(progress):
        if progress.step == 8:
            raise Killed

    store = StateStore(tmp_path / "state", {"weights": "a"})
    with pytest.raises(Killed):
        learn(*tiny_problem(tiny_folder), TRAIN, devices=CPU, store=store, report=die)
    store.close()
    seen = []
    store = StateStore(tmp_path / "state", {"weights": "a"})
    learned = learn(*tiny_problem(tiny_folder), TRAIN, devices=CPU, store=store, report=seen.append)
    store.close()
    assert [p.step for p in seen] == list(range(6, 13))  # the newest checkpoint was after step 5
    assert seen == whole[1][5:]
    assert_same(learned, whole[0])


def assert_same(learned, expected):
    assert (learned.rate, learned.distortion) == (expected.rate, expected.distortion)
    found, wanted = arrays(learned), arrays(expected)
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)


def test_ctrl_c_saves_and_the_run_goes_on_to_the_same_bits(whole, tiny_folder, tmp_path):
    before = signal.getsignal(signal.SIGINT)

    def interrupt(progress):
        if progress.step == 2:
            signal.raise_signal(signal.SIGINT)

    store = StateStore(tmp_path / "state", {})
    with pytest.raises(KeyboardInterrupt):
        learn(*tiny_problem(tiny_folder), TRAIN, devices=CPU, store=store, report=interrupt)
    store.close()
    assert signal.getsignal(signal.SIGINT) is before
    seen = []
    store = StateStore(tmp_path / "state", {})
    learned = learn(*tiny_problem(tiny_folder), TRAIN, devices=CPU, store=store, report=seen.append)
    store.close()
    assert [p.step for p in seen] == list(range(4, 13))
    assert_same(learned, whole[0])


def test_a_checkpoint_of_other_input_is_refused_naming_what_changed(tmp_path):
    state = {"x": np.arange(3.0)}
    store = StateStore(tmp_path / "state", {"weights": "a", "text": "b", "configuration": "c"})
    store.save(4, state)
    step, again = store.restore(state) or (None, None)
    assert step == 4 and again is not None
    np.testing.assert_array_equal(again["x"], state["x"])
    store.close()
    other = StateStore(tmp_path / "state", {"weights": "a", "text": "B", "configuration": "C"})
    with pytest.raises(UserError, match="made with other text and configuration;"):
        other.restore(state)
    other.close()


def test_an_empty_store_has_nothing_to_restore(tmp_path):
    store = StateStore(tmp_path / "state", {})
    assert store.restore({}) is None
    store.close()


def test_a_loss_that_is_not_finite_is_refused(tiny_folder):
    problem, settings, tokens, start = tiny_problem(tiny_folder)
    problem.params["blocks"]["up"][1, 0, 0] = np.nan
    with pytest.raises(UserError, match=r"the loss is nan at step 0; lower train\.learning_rate"):
        learn(Problem(*problem), settings, tokens, start, TRAIN, devices=CPU)


def test_a_batch_that_devices_cannot_share_is_refused():
    with pytest.raises(UserError, match="batch_sequences is 8, which 3 devices cannot share equally"):
        pool.split(np.zeros((8, 4), np.int32), CPU * 3)


def test_four_devices_learn_what_one_learns(whole, four_devices):
    process, out = four_devices
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    found = np.load(out)
    assert int(found["devices"]) == 4
    for name, expected in arrays(whole[0]).items():
        assert np.linalg.norm(found[name] - expected) <= 1e-4 * np.linalg.norm(expected), name


def learn_on_all_devices(folder, out):
    """Run by the test above in a process with four devices."""
    devices = jax.local_devices()
    learned = learn(*tiny_problem(Path(folder)), TRAIN, devices=devices)
    np.savez(out, devices=len(devices), **arrays(learned))
