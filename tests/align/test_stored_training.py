"""Claims about stored rotations in training, the tie of embeddings, candidates and trial encodings."""

from dataclasses import replace
from itertools import product

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import synthetic_moments
from hypothesis import given
from stored_oracle import fold_stored, fold_stored_moments
from test_learning import CPU, TRAIN, tiny_problem
from tiny_sources import fold_moments

from rdopt.align.alignment import single_precision
from rdopt.align.candidates import candidates, relaxed_J
from rdopt.align.learn import Learned, learn
from rdopt.align.objective import Variables
from rdopt.align.passes import matrix_terms
from rdopt.align.problem import make_problem
from rdopt.align.stored_choice import LayerPlace, _cheapest, _rounded, _stored, rotations_of
from rdopt.align.stored_learning import (
    EXPECTED_ANGLE_BITS,
    StoredSettings,
    expected_angle_bits,
    parameter_name,
    stored_settings,
    stored_start,
)
from rdopt.align.tie import settle_tie
from rdopt.calibration.subject import load_subject
from rdopt.checkpoint.families import MATRICES, MATRICES_OF
from rdopt.codec.decoder import decode_model
from rdopt.config.schema import Config, EncodeConfig
from rdopt.encode.measure import file_distortion
from rdopt.encode.model import encode_model
from rdopt.encode.source import make_source
from rdopt.encode.trial import hard_cost
from rdopt.operator.params import params_from_tensors
from rdopt.rate.relaxed import annealed_rate, noise_rate, straight_through_rate
from rdopt.transforms.aligned import Aligned
from rdopt.transforms.bases import starting_gauges
from rdopt.transforms.files import alignment_of, load_alignment, save_alignment
from rdopt.transforms.gauges.coordinates import Gauges
from rdopt.transforms.gauges.fold import fold
from rdopt.transforms.matrices.random import random_orthogonal
from rdopt.transforms.stored.rotation import Rotation
from rdopt.transforms.stored.rotations import angle_count

CHOSEN = [
    StoredSettings("blocks", 8, False, ("inputs", "outputs")),
    StoredSettings("butterfly", 1, True, ("inputs",)),
    StoredSettings("pairs", 2, False, ("inputs", "outputs")),
]


def trained(chosen: StoredSettings, arch, seed=0):
    """Random parameters of every rotation."""
    rng = np.random.default_rng(seed)
    counts = {place: angle_count(chosen.structure, chosen.size, n) for place, n in chosen.widths(arch).items()}
    return {parameter_name(k): 0.1 * rng.standard_normal((arch.num_layers, n)) for k, n in counts.items()}


def rounded(chosen, problem, arch, start, theta):
    """Rotations with angles of nine bits: (as a file holds them, on the device)."""
    params = [block.params for block in problem.blocks()]
    every = _rounded(chosen, 9, stored_start(chosen, params, arch, start), theta)
    turns = [rotations_of(chosen, 9, every, layer, arch) for layer in range(arch.num_layers)]
    return _stored(chosen, 9, every), jax.tree.map(lambda *x: jnp.stack(x), *turns)


@pytest.mark.parametrize("chosen", CHOSEN, ids=lambda p: p.structure)
def test_trained_rotations_cost_what_the_folded_model_costs(tiny_llama, chosen):
    """R and D in training are those of the weights and moments that a file codes."""
    folder = tiny_llama()
    train = replace(TRAIN, stored=chosen.structure, stored_sides=chosen.sides, stored_size=chosen.size)
    problem, settings, _, start = tiny_problem(folder, train)
    whole, rotations = rounded(chosen, problem, settings.arch, start, trained(chosen, settings.arch))
    gauges = single_precision(start, settings.arch)
    found = matrix_terms(Variables(gauges, rotations), problem, jnp.float32(20), settings)
    subject = load_subject(folder)
    params, arch = fold(subject.params, subject.arch, start)
    moments = fold_moments(synthetic_moments(subject.arch), subject.params, subject.arch, start)
    turned = replace_problem(subject, arch, fold_stored(params, whole), fold_stored_moments(moments, whole), folder)
    expected = matrix_terms(Variables(single_precision(Gauges(), arch)), turned, jnp.float32(20), settings)
    for ours, theirs in zip(found, expected, strict=True):
        for name in MATRICES:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-3)


def replace_problem(subject, arch, params, moments, folder):
    """The problem of a model that is already where it is coded."""
    config = Config(model=str(folder), train=replace(TRAIN, sites=("residual", "value", "query", "hidden")))
    gains = {**params, "blocks": {**params["blocks"], "attn_norm": np.ones_like(params["blocks"]["attn_norm"])}}
    gains["blocks"]["mlp_norm"] = np.ones_like(params["blocks"]["mlp_norm"])
    checkpoint = replace(subject.checkpoint, arch=arch)
    return make_problem(replace(subject, params=gains, checkpoint=checkpoint), moments, config)[0]


def test_expected_angle_bits_are_the_entropy_of_gaussian_angles():
    rng = np.random.default_rng(0)
    angles = 0.4 * rng.standard_normal((2, 300))
    both = np.stack([angles, -angles], axis=2).reshape(2, 1, 600)
    turn = Rotation(None, None, np.zeros((2, 1, 600), int), jnp.asarray(both))
    step = 2 * np.pi / 2**EXPECTED_ANGLE_BITS
    entropy = 600 * (0.5 * np.log2(2 * np.pi * np.e * 0.4**2) - np.log2(step))
    assert float(expected_angle_bits(turn, 300)) == pytest.approx(entropy, rel=0.03)
    still = Rotation(None, None, turn.partner, jnp.zeros(both.shape))
    assert float(expected_angle_bits(still, 300)) == 0.0


@given(st.integers(0, 10**6), st.booleans(), st.booleans())
def test_the_cheapest_sites_are_those_of_brute_force(seed, inputs, outputs):
    rng = np.random.default_rng(seed)
    sides = [(a, b) for a, b in product((False, True), (False, True)) if a <= inputs and b <= outputs]
    costs = {on: {name: rng.uniform(0, 4, 1) for name in MATRICES} for on in sides}
    price: dict[LayerPlace, float] = {(("inputs", g), 0): rng.uniform(0, 2) for g in MATRICES_OF} if inputs else {}
    price |= {(("outputs", name), 0): rng.uniform(0, 2) for name in MATRICES} if outputs else {}
    chosen, saved = _cheapest(costs, price)
    best = 0.0
    for group, names in MATRICES_OF.items():
        totals = []
        for on in (False, True)[: 1 + inputs]:
            for each in product((False, True)[: 1 + outputs], repeat=len(names)):
                total = price.get((("inputs", group), 0), 0) * on
                for name, out in zip(names, each, strict=True):
                    total += costs[on, out][name][0] + price.get((("outputs", name), 0), 0) * out
                totals.append(total)
        best += sum(costs[False, False][name][0] for name in names) - min(totals)
    assert saved == pytest.approx(best)
    spent = sum(price[site] for site in chosen)
    kept = sum(
        costs[(("inputs", group), 0) in chosen, (("outputs", name), 0) in chosen][name][0]
        for group, names in MATRICES_OF.items()
        for name in names
    )
    bare = sum(x[0] for x in costs[False, False].values())
    assert bare - kept - spent == pytest.approx(best)


@pytest.fixture(scope="module")
def turned_folder(tmp_path_factory):
    """A tiny model whose MLP inputs were turned in pairs, so that stored rotations pay."""
    from conftest import random_tensors, tiny_config

    from rdopt.checkpoint.write import write_checkpoint

    config = tiny_config(intermediate_size=256)
    tensors = random_tensors(config, 0)
    d = config["hidden_size"]
    turn = np.eye(d)
    for i in range(0, d - d % 8, 8):
        turn[i : i + 8, i : i + 8] = random_orthogonal(i, 8)
    powers = np.exp2(np.tile(np.linspace(3, -5, 8), d // 8 + 1)[:d])
    for name, W in tensors.items():
        if "gate_proj" in name or "up_proj" in name:
            tensors[name] = (W * powers @ turn.T).astype(np.float32)
    folder = tmp_path_factory.mktemp("turned") / "model"
    write_checkpoint(folder, config, tensors.items(), dtype="float32")
    return folder


def test_rotations_that_pay_are_kept_and_decoded(turned_folder, tmp_path):
    subject = load_subject(turned_folder)
    train = replace(TRAIN, init="identity", sites=("hidden",), stored="blocks", stored_size=8, steps=8)
    problem, settings, tokens, start = tiny_problem(turned_folder, train)
    seen = []
    learned = learn(problem, settings, tokens, start, train, devices=CPU, report=seen.append)
    choice, stored = learned.choice, learned.stored
    assert choice is not None and stored is not None
    assert choice.gain > choice.price > 0
    assert {(layer, "mlp") for layer in range(subject.arch.num_layers)} <= set(stored.inputs)
    moments, encode = synthetic_moments(subject.arch), EncodeConfig(threads=1)
    with_them, without = (
        hard_cost(Aligned(subject=subject, moments=moments, gauges=learned.gauges, stored=kept), encode, train.lam)
        for kept in (stored, None)
    )
    assert with_them.J < without.J
    assert pytest.approx(choice.saved, rel=0.5) == without.J - with_them.J
    alignment = alignment_of(learned.records, subject.params, subject.checkpoint, subject.fingerprint, stored)
    save_alignment(tmp_path, alignment)
    back = load_alignment(tmp_path).stored
    assert back is not None and list(back.inputs) == list(stored.inputs)
    aligned = Aligned(subject=subject, moments=moments, gauges=learned.gauges, stored=back)
    source = make_source(aligned, encode)
    file = encode_model(source, train.lam, encode)
    assert file.bits["transforms"] > 0
    decoded = decode_model(file.data)
    found = params_from_tensors(decoded.tensors, decoded.arch)
    D = file_distortion(aligned, found)
    assert pytest.approx(with_them.distortion, rel=0.1) == D


@pytest.mark.slow
def test_rotations_that_do_not_pay_are_dropped(tiny_llama):
    train = replace(TRAIN, stored="butterfly", steps=3)
    learned = learn(*tiny_problem(tiny_llama(), train), train, devices=CPU)
    assert learned.choice is not None
    assert learned.choice.price > learned.choice.gain
    assert learned.choice.saved >= 0
    sites = 0 if learned.stored is None else len(learned.stored.inputs)
    assert sites < 2 * len(MATRICES_OF)


def test_annealed_noise_begins_soft_and_ends_hard():
    key, W = jax.random.key(0), jnp.asarray(np.random.default_rng(0).standard_normal((6, 5)), jnp.float32)
    soft, hard = (annealed_rate(W, 0.5, 1.0, key, h) for h in (0.0, 1.0))
    np.testing.assert_allclose(soft, noise_rate(W, 0.5, 1.0, key), rtol=1e-6)
    np.testing.assert_allclose(hard, straight_through_rate(W, 0.5, 1.0), rtol=1e-5)


# the tie, candidates, trials


def test_a_tie_is_kept_where_a_second_table_costs_more(tiny_llama):
    folder = tiny_llama("qwen3", tie_word_embeddings=True)
    subject = load_subject(folder)
    config = Config(model=str(folder), train=TRAIN)
    moments = synthetic_moments(subject.arch)
    problem, settings = make_problem(subject, moments, config)
    start = starting_gauges("pca", subject.params, subject.arch, moments)
    cost = relaxed_J(problem, settings, TRAIN.lam)
    train, kept, tie = settle_tie(subject, config, start, cost)
    assert tie is not None
    table = 16 * subject.arch.vocab_size * subject.arch.hidden_size
    assert tie.untie - table == pytest.approx(settings.weights * cost(start))
    assert tie.keep == pytest.approx(settings.weights * cost(start.tied()))
    assert (kept.residual is None) == (tie.keep <= tie.untie) == ("residual" not in train.sites)
    assert not kept.unties or tie.untie < tie.keep
    forced, untied, _ = settle_tie(subject, replace(config, train=replace(TRAIN, tie="untie")), start, cost)
    assert forced.sites == TRAIN.sites and untied.unties
    held, same, _ = settle_tie(subject, replace(config, train=replace(TRAIN, tie="keep")), start, cost)
    assert held.sites == ("value",) and not same.unties
    assert fold(subject.params, subject.arch, same)[1].tied
    assert "tied embeddings" in tie.sentence


def test_the_best_of_starts_and_results_comes_first():
    def learned(name, start):
        return Learned({}, 1.0, 0.5)

    costs = iter([3.0, 2.0, 1.0, 4.0])
    found = candidates({"pca": Gauges(), "joint": Gauges()}, learned, lambda gauges, stored: next(costs))
    assert [x.name for x in found] == ["joint", "learned from pca", "pca", "learned from joint"]
    assert found[0].learned.records == {}


def test_a_trial_encoding_costs_what_a_file_costs(tiny_llama):
    folder = tiny_llama()
    subject, encode = load_subject(folder), EncodeConfig(threads=1, drift="none", gains="none")
    moments = synthetic_moments(subject.arch)
    start = starting_gauges("pca", subject.params, subject.arch, moments)
    aligned = Aligned(subject=subject, moments=moments, gauges=start)
    trial = hard_cost(aligned, encode, 20.0)
    source = make_source(aligned, encode)
    file = encode_model(source, 20.0, encode)
    decoded = decode_model(file.data)
    headers = file.bits["headers"] / source.weights
    assert trial.rate == pytest.approx(file.bpw_estimated - headers)
    D = file_distortion(aligned, params_from_tensors(decoded.tensors, decoded.arch))
    assert trial.distortion == pytest.approx(D, rel=1e-6)
    assert pytest.approx(trial.rate + 20 * trial.distortion) == trial.J


def test_a_start_of_stored_rotations_lowers_the_cost_of_its_rows(turned_folder):
    train = replace(TRAIN, stored="blocks", stored_size=8, init="identity")
    problem, settings, _, start = tiny_problem(turned_folder, train)
    chosen = stored_settings(train)
    assert chosen is not None
    still = {k: np.zeros_like(x) for k, x in trained(chosen, settings.arch).items()}
    _, turns = rounded(chosen, problem, settings.arch, start, still)
    gauges = single_precision(start, settings.arch)
    assert gauges.residual.shape == (settings.arch.hidden_size,) * 2
    before, after = (
        matrix_terms(v, problem, jnp.float32(20), settings)[0] for v in (Variables(gauges), Variables(gauges, turns))
    )
    for name in ("gate", "up"):
        assert np.all(np.asarray(after[name]) < np.asarray(before[name]))
