"""An encoding that was killed goes on at the block where it was and ends with the same bytes."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import random_tensors, synthetic_moments, tiny_config
from tiny_sources import aligned_of

from rdopt.checkpoint.families import MATRICES
from rdopt.checkpoint.folder import open_checkpoint
from rdopt.checkpoint.write import write_checkpoint
from rdopt.config.schema import EncodeConfig
from rdopt.encode.journal import Journal
from rdopt.encode.model import encode_at_step
from rdopt.encode.source import make_source
from rdopt.operator.params import load_params

ENCODE = EncodeConfig(drift_sequences=3)
LAYERS = 3


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny model with calibration tokens."""
    folder, config = tmp_path_factory.mktemp("journal") / "model", tiny_config(num_hidden_layers=LAYERS)
    write_checkpoint(folder, config, random_tensors(config, 0).items(), dtype="float32")
    checkpoint = open_checkpoint(folder)
    tokens = np.random.default_rng(0).integers(0, checkpoint.arch.vocab_size, (3, 16)).astype(np.int32)
    params, moments = load_params(checkpoint), synthetic_moments(checkpoint.arch)
    return make_source(aligned_of(params, checkpoint.arch, moments, config, tokens=tokens), ENCODE)


@pytest.fixture(scope="module")
def whole(source):
    """The bytes of an encoding that nothing stopped."""
    return encode_at_step(source, 0.05, ENCODE).data


@pytest.mark.parametrize("blocks", range(LAYERS))
def test_a_killed_encoding_goes_on_and_writes_the_same_bytes(source, whole, tmp_path, blocks):
    broken = replace(source, work=tmp_path / "work")

    def kill(done, total):
        if done > blocks * len(MATRICES):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_at_step(broken, 0.05, ENCODE, kill)
    kept = {path.stem for path in (tmp_path / "work" / "indices").glob("*-*.safetensors")}
    assert len(kept) >= blocks
    assert encode_at_step(broken, 0.05, ENCODE).data == whole
    before = {path: path.read_bytes() for path in (tmp_path / "work" / "indices").glob("*-*.safetensors")}
    assert encode_at_step(broken, 0.05, ENCODE).data == whole  # all of it is read back
    assert before == {path: path.read_bytes() for path in before} and len(before) == LAYERS


def test_another_step_or_configuration_begins_anew(source, tmp_path):
    broken = replace(source, work=tmp_path / "work")
    encode_at_step(broken, 0.05, ENCODE)
    for c, encode in ((0.1, ENCODE), (0.1, replace(ENCODE, gains="none"))):
        assert encode_at_step(broken, c, encode).data == encode_at_step(source, c, encode).data


def test_a_journal_keeps_what_is_written_under_its_key_only(tmp_path):
    x = {"a": np.arange(3), "b": np.ones((2, 2), np.float32).T}
    Journal(tmp_path / "j", "one").write("x", x)
    again = Journal(tmp_path / "j", "one").read("x")
    assert again is not None and all(np.array_equal(again[k], x[k]) for k in x)
    assert Journal(tmp_path / "j", "one").read("y") is None
    assert Journal(tmp_path / "j", "two").read("x") is None
    Journal(None, "").write("x", x)
    assert Journal(None, "").read("x") is None
