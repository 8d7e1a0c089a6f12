"""Room `codec`: grids, feedback, entropy coding and the container; a model to a file and back."""

from rdopt.codec.blockwise import blockwise_pca
from rdopt.codec.container import read_container, write_container
from rdopt.codec.decoder import Decoded, decode_model
from rdopt.codec.embeddings import embedding_distortion
from rdopt.codec.encode import (
    Prepared,
    aligned_source,
    decode,
    decode_file,
    encode,
    encode_source,
    make_judge,
    prepare,
)
from rdopt.codec.encoder import Encoded, coded_bits, encode_at_step, encode_model, structure_saved
from rdopt.codec.finetune_train import FinetuneProgress
from rdopt.codec.quantize import estimated_distortion
from rdopt.codec.source import Source, make_source
from rdopt.codec.steps import base_step, lam_of_base_step
from rdopt.codec.target import search_step
from rdopt.codec.trial import HardCost, hard_cost

__all__ = [
    "HardCost",
    "hard_cost",
    "blockwise_pca",
    "Prepared",
    "aligned_source",
    "decode",
    "decode_file",
    "encode",
    "embedding_distortion",
    "encode_source",
    "estimated_distortion",
    "prepare",
    "search_step",
    "Decoded",
    "Encoded",
    "FinetuneProgress",
    "Source",
    "base_step",
    "coded_bits",
    "decode_model",
    "encode_at_step",
    "encode_model",
    "lam_of_base_step",
    "make_judge",
    "make_source",
    "read_container",
    "structure_saved",
    "write_container",
]
