"""A model read block by block measures and predicts what the model in memory does."""

import numpy as np
import pytest
from conftest import random_tensors, tiny_config

from rdopt.calibration.backward import second_moments
from rdopt.calibration.moments import EmbeddingMoments
from rdopt.calibration.streamed import LayerStore, lazy_params, read_block, run_block, streamed_moments, streams
from rdopt.checkpoint.folder import open_checkpoint
from rdopt.checkpoint.write import write_checkpoint
from rdopt.operator.llama import head_logits, logits
from rdopt.operator.params import load_params


@pytest.mark.parametrize("changes", [{}, {"model_type": "qwen3"}], ids=["llama", "qwen3"])
def test_blocks_in_turn_are_the_network_and_its_moments(tmp_path, changes):
    config = tiny_config(**changes)
    write_checkpoint(tmp_path / "model", config, random_tensors(config, 0).items(), dtype="float32")
    checkpoint = open_checkpoint(tmp_path / "model")
    arch, lazy, whole = checkpoint.arch, lazy_params(checkpoint), load_params(checkpoint)
    tokens = np.random.default_rng(0).integers(0, arch.vocab_size, (11, 12)).astype(np.int32)
    *_, last = streams(lazy, tokens, arch)
    assert np.abs(head_logits(lazy, last, arch) - logits(whole, tokens, arch)).max() < 1e-5
    expected, found = second_moments(whole, arch, tokens), {}
    ends = streamed_moments(lazy, arch, tokens, found.__setitem__)
    for layer in range(arch.num_layers):
        for kind, held in found[layer].items():
            for name, value in held.items():
                exact = getattr(expected, kind)[name][layer]
                assert np.abs(value - exact).max() < 1e-4 * np.abs(exact).max()
    assert expected.embed is not None
    for value, exact in zip(ends, expected.embed, strict=True):
        assert value.shape == exact.shape and np.abs(value - exact).max() < 1e-4 * np.abs(exact).max()


def test_the_stream_behind_a_block_is_that_before_the_next(tmp_path):
    config = tiny_config()
    write_checkpoint(tmp_path / "model", config, random_tensors(config, 1).items(), dtype="float32")
    checkpoint = open_checkpoint(tmp_path / "model")
    lazy = lazy_params(checkpoint)
    tokens = np.random.default_rng(0).integers(0, checkpoint.arch.vocab_size, (3, 5)).astype(np.int32)
    found = list(streams(lazy, tokens, checkpoint.arch))
    assert np.array_equal(run_block(read_block(lazy, 0), found[0], checkpoint.arch), found[1])
    with pytest.raises(IndexError):
        lazy["blocks"]["q"][checkpoint.arch.num_layers]


def test_moments_come_back_from_their_files_one_block_at_a_time(tmp_path):
    store = LayerStore(tmp_path / "moments", 2)
    ends = EmbeddingMoments(np.ones(5), np.eye(2), np.arange(5.0), 2 * np.eye(2))
    groups = ("attn", "o", "mlp", "down")
    for layer in range(2):
        moments = {"sigma": {g: np.full((2, 2), layer, np.float32) for g in groups}, "G": {"q": np.ones(3, np.float32)}}
        store.keep(layer, moments)
    assert not store.complete
    store.keep_ends(ends)
    assert store.complete and all(np.array_equal(a, b) for a, b in zip(store.read_ends(), ends, strict=True))
    assert store.read(1)["G"]["q"].dtype == np.float64
    assert [float(S[0, 0]) for S in store.sigma()["attn"]] == [0.0, 1.0]
    assert store.sigma()["o"].shape == (2, 2, 2)
