"""A model whose blocks are read one after the other computes what the model in memory does."""

import errno
import gc
import os
import tempfile

import numpy as np
import pytest
from conftest import random_tensors, tiny_config

from rdopt.checkpoint.folder import open_checkpoint
from rdopt.checkpoint.spill import Spill
from rdopt.checkpoint.write import write_checkpoint
from rdopt.config.errors import UserError
from rdopt.operator.blockwise import last_stream, run_block, streams
from rdopt.operator.llama import head_logits, logits
from rdopt.operator.params import lazy_params, load_params, read_block, stacked


@pytest.mark.parametrize("changes", [{}, {"model_type": "qwen3"}], ids=["llama", "qwen3"])
def test_blocks_in_turn_are_the_network(tmp_path, changes):
    config = tiny_config(**changes)
    write_checkpoint(tmp_path / "model", config, random_tensors(config, 0).items(), dtype="float32")
    checkpoint = open_checkpoint(tmp_path / "model")
    arch, lazy, whole = checkpoint.arch, lazy_params(checkpoint), load_params(checkpoint)
    tokens = np.random.default_rng(0).integers(0, arch.vocab_size, (11, 12)).astype(np.int32)
    last = last_stream(lazy, tokens, arch, 4)
    assert np.abs(head_logits(lazy, last, arch) - logits(whole, tokens, arch)).max() < 1e-5
    for short, held in whole["blocks"].items():
        assert np.array_equal(stacked(lazy)["blocks"][short], held)


def test_the_stream_behind_a_block_is_that_before_the_next(tmp_path):
    config = tiny_config()
    write_checkpoint(tmp_path / "model", config, random_tensors(config, 1).items(), dtype="float32")
    checkpoint = open_checkpoint(tmp_path / "model")
    lazy = lazy_params(checkpoint)
    tokens = np.random.default_rng(0).integers(0, checkpoint.arch.vocab_size, (3, 5)).astype(np.int32)
    found = list(streams(lazy, tokens, checkpoint.arch, 2))
    assert np.array_equal(run_block(read_block(lazy, 0), found[0], checkpoint.arch, 2), found[1])
    with pytest.raises(IndexError):
        lazy["blocks"]["q"][checkpoint.arch.num_layers]


def test_a_full_disk_of_temporary_files_is_a_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    def full(path, x):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(np, "save", full)
    spill = Spill(budget=0)
    with pytest.raises(UserError, match=f"{tmp_path} is full; free some space, set TMPDIR .* raise run.memory"):
        spill.keep(0, np.zeros(3))
    del spill
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_arrays_beyond_the_budget_come_back_from_files_that_go_with_them():
    rng = np.random.default_rng(0)
    arrays = {key: rng.integers(-9, 9, (5, key + 1)).astype(np.int8) for key in range(6)}
    spill = Spill(budget=30)  # the first three
    for key, x in arrays.items():
        spill.keep(key, x)
    folder = spill._folder
    assert folder is not None and len(list(folder.iterdir())) == 3
    for key, x in arrays.items():
        assert np.array_equal(spill.read(key), x) and spill.read(key).dtype == np.int8
    spill.keep(0, arrays[5])
    assert np.array_equal(spill.take(0), arrays[5])
    with pytest.raises(KeyError):
        spill.read(0)
    del spill
    gc.collect()
    assert not folder.exists()
