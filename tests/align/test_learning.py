"""Claims about learning: gradients, the relaxed encoder and the real one, units, resume, devices, errors."""

import functools
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from conftest import orthogonality_error, random_tensors, synthetic_moments, tiny_config
from tiny_sources import fold_moments
from whole_model import terms

from rdopt.align import devices as pool
from rdopt.align.alignment import Alignment, Start, single_precision, trained_records
from rdopt.align.cholesky import cholesky_and_inverse
from rdopt.align.coordinates import (
    MatrixCoordinates,
    OutputDamping,
    diagonal_metric,
    feedback_metric,
    input_metrics,
    output_metric,
)
from rdopt.align.learn import learn
from rdopt.align.loop import batch_indices
from rdopt.align.objective import Variables
from rdopt.align.passes import judged_terms
from rdopt.align.problem import make_problem
from rdopt.align.relaxation import analytic_distortion, relax, weight_error
from rdopt.calibration.subject import load_subject
from rdopt.checkpoint.families import INPUT_OF, MATRICES
from rdopt.checkpoint.folder import open_checkpoint
from rdopt.checkpoint.write import write_checkpoint
from rdopt.codec.coders.constriction import encode_indices
from rdopt.codec.decoder import decode_model
from rdopt.codec.tables.trellis import rates_of, starting_plan
from rdopt.codec.tables.uniform import choose_plan, table_classes
from rdopt.config.errors import UserError
from rdopt.config.schema import Config, EncodeConfig, TrainConfig
from rdopt.encode.feedback import quantize_feedback, quantize_rounding
from rdopt.encode.model import encode_model
from rdopt.encode.source import make_source
from rdopt.encode.wavefront import quantize_wavefront
from rdopt.operator.llama import logits
from rdopt.operator.params import load_params, stacked
from rdopt.runs.states import StateStore
from rdopt.transforms.aligned import Aligned
from rdopt.transforms.bases import starting_gauges
from rdopt.transforms.gauges.coordinates import Gauges, gauges_of, sides_of
from rdopt.transforms.gauges.fold import fold
from rdopt.transforms.gauges.registry import changed_sides
from rdopt.transforms.maps import Map, Sides
from rdopt.transforms.matrices.random import random_orthogonal
from rdopt.transforms.records import record_to_dict

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


SITES = ("residual", "value", "stretch", "query", "norm", "hidden")


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_trial_coordinates_are_those_of_the_fold(tiny_llama, family):
    """Random parameters at every site, as training sees them and as the records fold them in float64."""
    folder = tiny_llama(family)
    problem, settings, _, start = tiny_problem(folder, replace(TRAIN, sites=SITES))
    subject, arch = load_subject(folder), settings.arch
    module, rng = Alignment(arch=arch, sites=SITES, rate="analytic"), np.random.default_rng(0)
    begin = Start(single_precision(start, arch))
    params: Any = module.init(jax.random.key(0), begin)["params"]
    params = jax.tree.map(lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), jnp.float32), params)
    gauges = gauges_of(trained_records(params, start, arch))
    trial: Any = module.apply({"params": params}, begin)
    for found, expected in zip(trial.gauges, single_precision(gauges, arch), strict=True):
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            np.testing.assert_allclose(found, expected, atol=2e-5)
    folded, _ = fold(subject.params, subject.arch, gauges)
    moments = fold_moments(synthetic_moments(subject.arch), subject.params, subject.arch, gauges)
    block = jax.tree.map(lambda x: x[1], trial.gauges.stacked(arch)).with_shared(trial.gauges)
    turns = {k: MatrixCoordinates(sides_of(k, (None, None), arch, block)) for k in MATRICES}
    own = problem.block(1)
    sides = input_metrics({k: jnp.asarray(v) for k, v in own.sigma.items()}, turns, 0.02, feedback=True)
    for name in MATRICES:
        W = jnp.asarray(own.params[name])
        turned = turns[name].fold(W)
        np.testing.assert_allclose(turned, folded["blocks"][name][1], atol=1e-4)
        np.testing.assert_allclose(turns[name].unfold(turned), W, atol=1e-4)
        assert (turns[name].gauges.outputs == Map()) == (name not in changed_sides(SITES, arch)[0])
        check_side(sides[INPUT_OF[name]], moments.sigma[INPUT_OF[name]][1], 0.02)
        if name in own.G:
            side = output_metric(jnp.asarray(own.G[name]), turns[name], OutputDamping(0.02, 0.05))
            check_side(side, moments.G[name][1], 0.05)
        else:
            L = np.linalg.cholesky(damped(moments.G[name][1], 0.05))
            np.testing.assert_allclose(own.outputs[name].weights, np.diagonal(L), rtol=1e-3)


def damped(S, damping):
    return S + damping * np.mean(np.diagonal(S)) * np.eye(len(S))


def check_side(side, S, damping):
    """The factor of a side is that of the damped moment."""
    L, inverse = side.factor
    np.testing.assert_allclose(L @ L.T, damped(S, damping), atol=1e-3 * np.abs(S).max())
    np.testing.assert_allclose(L @ inverse, np.eye(len(S)), atol=1e-3)
    np.testing.assert_array_equal(side.weights, np.diagonal(L))


def test_outputs_without_feedback_cost_by_the_turned_diagonal():
    rng = np.random.default_rng(0)
    A, root = random_orthogonal(1, 12), rng.standard_normal((12, 12))
    G = root @ root.T
    turn = MatrixCoordinates(Sides(Map(dense=(jnp.asarray(A), jnp.asarray(A.T))), Map()))
    side = output_metric(jnp.asarray(G, jnp.float32), turn, OutputDamping(0.02, None))
    diagonal = np.diagonal(A @ G @ A.T)
    assert side.factor is None
    np.testing.assert_allclose(side.weights**2, diagonal + 0.02 * diagonal.mean(), rtol=1e-3)


ACCURACY = [(0.4, 0.02, 0.05), (1.5, 0.02, 0.05), (4.0, 0.15, 0.15)]


def synthetic_matrix(rows=256, columns=192):
    """W with rank-1 spreads, a moment's factor, row sensitivities."""
    rng = np.random.default_rng(0)
    W = np.outer(np.exp(0.4 * rng.standard_normal(rows)), np.exp(0.4 * rng.standard_normal(columns)))
    W = (W * rng.standard_normal((rows, columns))).astype(np.float32)
    return W, synthetic_factor(rng, columns), np.exp(rng.standard_normal(rows))


def synthetic_factor(rng, n):
    """L of a moment with a decaying spectrum and one direction in common."""
    x = rng.standard_normal((4 * n, n)) * np.exp(0.5 * rng.standard_normal(n))
    x = x @ np.linalg.qr(rng.standard_normal((n, n)))[0] + 0.3 * x[:, :1]
    return np.linalg.cholesky(x.T @ x / len(x))


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
    W, L, g, c = arguments
    S = L @ L.T
    rows = diagonal_metric(g, 0.0)
    cols = feedback_metric(S, 0.0) if feedback else diagonal_metric(jnp.diagonal(S), 0.0)
    relaxed = jax.jit(relax, static_argnums=4)(W, rows, cols, c, "gaussian")
    assert float(relaxed.rate.sum()) == pytest.approx(bits, rel=bits_within)
    assert float(analytic_distortion(relaxed, jnp.float32(c))) == pytest.approx(D, rel=distortion_within)


@pytest.mark.parametrize(("over_rows", "over_columns"), [(True, True), (False, True), (False, False)])
def test_relaxed_weight_errors_have_the_analytic_distortion(over_rows, over_columns):
    W, L, g = synthetic_matrix()
    c = jnp.float32(0.4)
    S, M = L @ L.T, synthetic_factor(np.random.default_rng(2), len(W))
    G = M @ M.T
    row_costs = jnp.asarray(G if over_rows else g, jnp.float32)
    rows = feedback_metric(row_costs, 0.0) if over_rows else diagonal_metric(row_costs, 0.0)
    cols = jnp.asarray(S, jnp.float32)
    cols = feedback_metric(cols, 0.0) if over_columns else diagonal_metric(jnp.diagonal(cols), 0.0)
    relaxed = relax(jnp.asarray(W), rows, cols, c, "gaussian")
    noise = jnp.asarray(np.random.default_rng(1).uniform(-0.5, 0.5, W.shape), jnp.float32)
    E = np.asarray(weight_error(noise, rows, cols, c), np.float64)
    weighted = G @ E if over_rows else g[:, None] * E
    found = 0.5 * np.sum(weighted * (E @ S))
    assert found == pytest.approx(float(analytic_distortion(relaxed, c)), rel=0.05)


@pytest.mark.parametrize(("c", "within"), [(0.4, 0.01), (1.5, 0.03)])
def test_the_relaxed_encoder_feeds_errors_back_over_both_sides_as_the_real_one_does(c, within):
    """Against the scalar grid (a trellis of one state) behind feedback over rows and columns."""
    W, L, _ = synthetic_matrix()
    M = synthetic_factor(np.random.default_rng(2), len(W))
    row, col = 1 / np.diagonal(M), c / np.diagonal(L)
    rates = rates_of(starting_plan([(np.ones(len(row)), np.ones(len(col)))]), 0.0)[0]
    z = quantize_wavefront(W, L, M, row, col / 2, rates, 1).values / 2
    error = M.T @ (W - np.outer(row, col) * z) @ L / c
    rows, cols = (feedback_metric(jnp.asarray(X @ X.T, jnp.float32), 0.0) for X in (M, L))
    relaxed = relax(jnp.asarray(W), rows, cols, jnp.float32(c), "gaussian")
    assert float(relaxed.error.sum()) == pytest.approx(np.sum(error**2), rel=within)
    alike, y = [diagonal_metric(jnp.ones(n), 0.0) for n in W.shape], jnp.asarray(z + error, jnp.float32)
    fitted = relax(y, alike[0], alike[1], jnp.float32(1.0), "gaussian")
    assert float(relaxed.rate.sum()) == pytest.approx(float(fitted.rate.sum()), rel=within)


def test_batches_walk_through_every_sequence_once_an_epoch():
    seen = np.concatenate([batch_indices(3, step, 4, 10) for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    np.testing.assert_array_equal(batch_indices(3, 2, 4, 10), seen[8:12])


# the objective on a trained model


@pytest.fixture(scope="module")
def demo(demo_ends, demo_tokens, demo_moments):
    """(subject, moments, tokens) of the outer blocks of the demo model."""
    return load_subject(demo_ends), demo_moments, demo_tokens


def terms_of(demo, lam, **changes):
    subject, moments, tokens = demo
    config = Config(train=TrainConfig(lam=lam), encode=EncodeConfig(grid="feedback"))
    problem, settings = make_problem(subject, moments, config)
    variables = Variables(single_precision(Gauges(), settings.arch))
    return terms(variables, problem, tokens[:16], lam, replace(settings, **changes))


@pytest.mark.slow
def test_the_three_distortions_and_the_encoded_files_kl_agree_in_nats_per_token(demo):
    lam = 70.0
    found = {k: float(terms_of(demo, lam, distortion=k).distortion) for k in ("matrix", "block", "model")}
    subject, moments, tokens = demo
    encode = EncodeConfig(grid="feedback")
    # The gains are folded in training; the file is of the same coordinates.
    aligned = Aligned(subject=subject, moments=moments, gauges=Gauges(np.eye(subject.arch.hidden_size)))
    params, arch = stacked(aligned.network()), aligned.arch
    source = make_source(aligned, encode)
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
    return {k: [arch.tensor_name(i, k) for i in range(arch.num_layers)] for k in MATRICES}


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
    code = "import sys, test_learning; test_learning.learn_on_all_devices(*sys.argv[1:])"
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    here, out = Path(__file__).parents[1], tiny_folder.parent / "four.npz"
    path = os.pathsep.join(map(str, (Path(__file__).parent, here, here.parent)))
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
    for Q in (gauges.residual, gauges.value):
        assert Q is not None and Q.dtype == np.float64
        assert orthogonality_error(Q) < 1e-9
        assert orthogonality_error(Q.astype(np.float32)) <= 1e-5


def test_givens_angles_learn_rotations_as_good_as_cayleys(whole, tiny_folder):
    train, seen = replace(TRAIN, rotation="givens"), []
    learned = learn(*tiny_problem(tiny_folder, train), train, devices=CPU, report=seen.append)
    cayley = whole[1]
    assert pytest.approx(cayley[0].J, rel=1e-5) == seen[0].J  # both start on the basis
    assert seen[-1].J < seen[0].J - 0.5 * (cayley[0].J - cayley[-1].J)
    assert [part.kind for part in learned.records["residual"].parts] == ["matrix", "givens"]
    for Q in (learned.gauges.residual, learned.gauges.value):
        assert Q.dtype == np.float64 and orthogonality_error(Q) < 1e-9


def test_learning_at_every_site_lowers_the_cost_and_keeps_the_network(tiny_llama):
    folder, train = tiny_llama("qwen2"), replace(TRAIN, sites=SITES)
    problem, settings, tokens, start = tiny_problem(folder, train)
    settings = replace(settings, distortion="matrix")
    learned = learn(problem, settings, tokens, start, train, devices=CPU)
    gauges = gauges_of(learned.records)
    assert set(learned.records) == {"residual", "value", "query", "norm", "hidden"}
    query: Any = gauges.query
    assert np.iscomplexobj(query) and bool(np.any(query.imag))
    J = []
    for each in (start, gauges):
        found = terms(Variables(single_precision(each, settings.arch)), problem, tokens, 20, settings)
        J.append(float(found.rate + 20 * found.distortion))
    assert J[1] < J[0] - 0.02
    subject = load_subject(folder)
    folded, folded_arch = fold(subject.params, subject.arch, gauges)
    forward = jax.jit(logits, static_argnames="arch")
    np.testing.assert_allclose(
        forward(folded, tokens, folded_arch), forward(stacked(subject.params), tokens, subject.arch), atol=1e-3
    )


def test_a_run_is_judged_by_the_distortions_that_it_could_have_trained_on(tiny_folder):
    problem, settings, tokens, start = tiny_problem(tiny_folder)
    variables = Variables(single_precision(start, settings.arch))
    judged, kl = judged_terms(variables, problem, tokens, 20.0, jax.random.key(0), settings)
    block, model = (
        terms(variables, problem, tokens, 20, replace(settings, distortion=d)) for d in ("block", "model")
    )
    assert judged.rate == pytest.approx(float(block.rate), rel=1e-6)
    assert judged.distortion == pytest.approx(float(block.distortion), rel=1e-4)
    assert kl == pytest.approx(float(model.distortion), rel=1e-3)


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
    problem.block(1).params["up"][0, 0] = np.nan
    with pytest.raises(UserError, match=r"the loss is nan at step 0; lower train\.learning_rate"):
        learn(problem, settings, tokens, start, TRAIN, devices=CPU)


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
