"""Room `codec`: grids, feedback, entropy coding and the container; a model to a file and back."""

from rdopt.codec.container import read_container, write_container
from rdopt.codec.decoder import Decoded, decode_model
from rdopt.codec.encoder import Encoded, Source, encode_at_step, encode_model, make_source
from rdopt.codec.steps import base_step, lam_of_base_step

__all__ = [
    "Decoded",
    "Encoded",
    "Source",
    "base_step",
    "decode_model",
    "encode_at_step",
    "encode_model",
    "lam_of_base_step",
    "make_source",
    "read_container",
    "write_container",
]
