"""Other methods, at their published settings, with real bytes: what a comparison measures rdopt against."""

from rdopt.study.peers.encode import encode_peer, hadamard_model
from rdopt.study.peers.gptq import gptq
from rdopt.study.peers.model import Coded, Model, PeerSettings, weight_count
from rdopt.study.peers.nncodec_peer import encode_nncodec, has_nncodec
from rdopt.study.peers.peer_file import PeerMatrix, pack, unpack
from rdopt.study.peers.rtn import rtn
from rdopt.study.peers.tuning import tune
from rdopt.study.peers.watersic import watersic

__all__ = [
    "Coded",
    "Model",
    "PeerMatrix",
    "PeerSettings",
    "encode_nncodec",
    "encode_peer",
    "gptq",
    "hadamard_model",
    "has_nncodec",
    "pack",
    "rtn",
    "tune",
    "unpack",
    "watersic",
    "weight_count",
]
