"""Claims about gain and price of stored transforms: what can be undone is found, nothing costs nothing, bits add up."""

import json
from math import comb, log2
from typing import get_args

import numpy as np
import pytest
from safetensors.numpy import save_file
from stored_price import price as stored_price
from stored_price.price import (
    PRICED_BITS,
    BlockRotations,
    Butterfly,
    Grouping,
    InputGroup,
    PairRotations,
    TransformFit,
    butterfly_angles,
    fit_all,
    fit_blocks,
    grouped,
    grouping_bits,
    price_of,
)
from stored_price.wide import extrapolate
from tiny_runs import load_script

from rdopt.codec.coders.constriction import pack_integers
from rdopt.transforms.maps import block_diagonal
from rdopt.transforms.matrices.givens import as_pairs, butterfly
from rdopt.transforms.matrices.jacobi import joint_cost
from rdopt.transforms.matrices.random import random_orthogonal
from rdopt.transforms.stored.pairing import learned_pairs, turned_moments

WEIGHTS = np.array([3.0, 5.0])


@pytest.fixture(scope="module")
def price_stored():
    return load_script("price_stored")


def spectra(n: int, seed: int = 0) -> np.ndarray:
    """Two diagonal moments."""
    return np.exp2(np.random.default_rng(seed).uniform(-3, 3, (2, n)))[:, :, None] * np.eye(n)


def turned_in_blocks(C: np.ndarray, block: int) -> np.ndarray:
    Q = block_diagonal(random_orthogonal(1, block, (C.shape[1] // block,)))
    return Q @ C @ Q.T


@pytest.mark.parametrize("n", [12, 14])
def test_what_rotated_blocks_lost_is_recovered(n):
    C = spectra(n)
    C[:, :12, :12] = turned_in_blocks(C[:, :12, :12], 4)
    fit = fit_blocks(C, WEIGHTS, 4, "as they are")
    assert fit.gain == pytest.approx(joint_cost(C, WEIGHTS) - joint_cost(spectra(n), WEIGHTS), rel=1e-3)
    assert fit.order == 0
    losses = [fit.gain - fit.rounded[bits][0] for bits in PRICED_BITS]
    assert losses[-1] < 0.02 * fit.gain and losses[-1] < losses[0]


def test_scattered_blocks_are_gathered_by_correlation():
    scatter = np.random.default_rng(2).permutation(12)
    C = turned_in_blocks(spectra(12), 4)[:, scatter][:, :, scatter]
    order = grouped(C, WEIGHTS, 4, "by correlation")
    assert sorted(sorted(scatter[part] // 4) for part in order.reshape(3, 4)) == [[k] * 4 for k in range(3)]
    lost = joint_cost(C, WEIGHTS) - joint_cost(spectra(12), WEIGHTS)
    assert fit_blocks(C, WEIGHTS, 4, "by correlation").gain == pytest.approx(lost, rel=1e-3)


@pytest.mark.parametrize("grouping", get_args(Grouping))
def test_a_grouping_is_an_order_of_all_channels(grouping):
    assert sorted(grouped(turned_in_blocks(spectra(15), 5), WEIGHTS, 4, grouping)) == list(range(15))


def test_diagonal_moments_gain_nothing_and_a_hadamard_is_at_best_undone():
    group = InputGroup("attn", ((3, 16), (5, 16)), spectra(16), WEIGHTS, False)
    for form, fit in fit_all(group, 2).items():
        if isinstance(form, PairRotations) and form.behind_hadamard:
            # Four layers of pairs reach back through a Hadamard of 16.
            assert fit.gain == pytest.approx(0, abs=1e-9) if form.layers == 4 else fit.gain < -1
        else:
            assert fit.gain == pytest.approx(0, abs=1e-4)
            assert not fit.rounded[4][1].any() or form == Butterfly()


def test_learned_pairs_of_a_layer_are_disjoint():
    pairs, _ = learned_pairs(turned_in_blocks(spectra(12), 4), WEIGHTS, 3)
    assert as_pairs(pairs, 12)


def test_training_a_butterfly_never_loses_what_fitting_it_gained():
    C, pairs = turned_in_blocks(spectra(16), 16), butterfly(16)
    fitted, trained = (turned_moments(C, butterfly_angles(C, WEIGHTS, steps), pairs) for steps in (1, 30))
    assert joint_cost(trained, WEIGHTS) < joint_cost(fitted, WEIGHTS) < joint_cost(C, WEIGHTS)


def test_a_price_is_the_coded_angles_and_the_order():
    rng = np.random.default_rng(0)
    codes = [rng.integers(-3, 4, 400).astype(np.int32) for _ in range(2)]
    rounded = [{b: (40.0 + i + (b == 6), x) for b in PRICED_BITS} for i, x in enumerate(codes)]
    fits = [TransformFit(50.0 + i, by_width, 7.0) for i, by_width in enumerate(rounded)]
    price = price_of(fits, [1000, 3000])
    coded = 8 * len(pack_integers(np.concatenate(codes)))
    assert price.bits == 6 and price.angles == 800
    assert price.price == pytest.approx((coded + 14) / 4000) and price.order == pytest.approx(14 / 4000)
    assert price.gain == pytest.approx(101 / 4000) and price.net == pytest.approx((83 - coded - 14) / 4000)
    assert 800 * log2(7) < coded < 800 * log2(7) * 1.1


@pytest.mark.parametrize(("n", "block", "ways"), [(4, 2, 3), (6, 3, 10), (5, 3, comb(5, 3)), (7, 3, 70)])
def test_groupings_are_counted(n, block, ways):
    assert grouping_bits(n, block) == pytest.approx(log2(ways), abs=1e-9)


def test_blocks_have_half_b_minus_one_angles_a_channel_and_a_butterfly_half_a_log():
    angles, order = BlockRotations(32, "as they are").side_information(4096, False)
    assert 5 * angles / (4096 * 6144) == pytest.approx(2.5 * 31 / 6144) and order == 0
    assert Butterfly().side_information(16, False) == (16 / 2 * 4, 0.0)


def test_a_line_is_continued_and_scatter_about_a_mean_is_not():
    line = extrapolate([6.0, 7.0, 8.0, 9.0], [1.0, 1.5, 2.0, 2.5], 12.0)
    assert line.value == pytest.approx(4.0) and line.slope == pytest.approx(0.5) and line.error < 1e-6
    flat = extrapolate([6.0, 7.0, 8.0, 9.0], [1.0, -1.0, -1.0, 1.0], 12.0)
    assert flat.value == 0 and flat.error == pytest.approx((4 / 3 * 5 / 4) ** 0.5)


def test_the_table_of_a_bert_is_measured_once_and_kept(price_stored, tmp_path, capsys, monkeypatch):
    for module in (price_stored, stored_price):
        monkeypatch.setattr(module, "BLOCK_WIDTHS", (8,))
    rng, out = np.random.default_rng(0), tmp_path / "price.json"
    names = ("attention.self.query", "attention.self.key", "attention.self.value", "output.dense")
    tensors = {f"encoder.layer.0.{k}.weight": rng.standard_normal((64, 64)).astype(np.float32) for k in names}
    tensors["pooler.weight"] = np.ones((64, 64), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    command = ["--tensors", str(tmp_path / "model.safetensors"), "--json", str(out), "--steps", "0"]
    assert price_stored.main(command) == 0
    rows = json.loads(out.read_text())["measured"]
    assert {(r["kind"], r["rows"]) for r in rows} == {("attn", 192), ("down", 64)}
    first = capsys.readouterr().out
    assert price_stored.main(command) == 0 and capsys.readouterr().out == first
    with pytest.raises(SystemExit, match="measured with"):
        price_stored.main([*command, "--seed", "1"])
