"""Tiny models ready to be encoded, for tests of files."""

from conftest import synthetic_moments

from rdopt.checkpoint.folder import open_checkpoint
from rdopt.config.schema import EncodeConfig
from rdopt.encode.source import make_source
from rdopt.operator.params import load_params

FILES = {"tokenizer.json": b'{"version": "1.0"}', "special_tokens_map.json": b"{}"}


def source_of(folder, encode=EncodeConfig()):  # noqa: B008 - frozen
    """The encoder's input for a folder, with made-up moments."""
    checkpoint = open_checkpoint(folder)
    params, arch = load_params(checkpoint), checkpoint.arch
    moments = synthetic_moments(arch)
    return make_source(params, arch, checkpoint.config, FILES, moments, encode, checkpoint.num_parameters)
