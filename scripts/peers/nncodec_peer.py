"""nncodec (Fraunhofer HHI; ISO/IEC 15938-17): DeepCABAC over dependent quantization, through the package itself.

The package needs numpy 1 and torch, so it runs in a Python of its own. One bitstream holds the coded matrices at the
package's defaults (uniform reconstruction, dependent quantization, rate-optimised context parameters, row skipping);
the quantization parameter qp sets the step, four values an octave.
"""

import math
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from jaxtyping import Float

from peers.allocation import relative_steps
from peers.model import DecodedModel, Key, with_matrices
from peers.settings import PeerSettings
from rdopt.checkpoint.families import coded_matrices, coded_weights
from rdopt.transforms.aligned import Aligned

QPS_PER_OCTAVE = 4
_TRIALS = 6

_WORKER = """
import sys, numpy as np
from nncodec.nn import encode, decode
matrices = dict(np.load("in.npz"))
qps = matrices.pop("qps")
each = {k: int(q) for k, q in zip(matrices, qps)}
data = bytearray(encode(matrices, args={"qp": int(qps[0]), "qp_per_tensor": each if len(set(qps)) > 1 else None,
                                    "verbose": False}))
open("out.nnc", "wb").write(data)
np.savez("out.npz", **decode(data))
"""


def has_nncodec(python: str) -> bool:
    """Whether that Python can import the package."""
    try:
        done = subprocess.run([python, "-c", "import nncodec.nn"], capture_output=True, timeout=120, check=False)
    except OSError:
        return False
    return done.returncode == 0


def nncodec_round_trip(
    matrices: dict[str, Float[np.ndarray, "out in"]], qps: list[int], python: str
) -> tuple[int, dict[str, Float[np.ndarray, "out in"]]]:
    """Bytes of the bitstream, and the matrices decoded from it.

    Args:
        matrices: float32, by name.
        qps: quantization parameter of each.
        python: interpreter that has the package.

    Raises:
        RuntimeError: the package fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "in.npz", qps=np.array(qps), **matrices)  # type: ignore[arg-type]
        done = subprocess.run([python, "-c", _WORKER], cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"nncodec in {python} failed: {done.stderr[-500:]}")
        with np.load(Path(folder) / "out.npz") as arrays:
            decoded = {k: arrays[k].astype(np.float32) for k in matrices}
        return (Path(folder) / "out.nnc").stat().st_size, decoded


def encode_nncodec(model: Aligned, target_bpw: float, python: str, steps: str = "published") -> DecodedModel:
    """The bitstream whose bits/weight are closest to the target; qp is an integer, so it is met to an eighth of a bit.

    Args:
        model: coordinates, moments.
        target_bpw: wanted bits/weight.
        python: interpreter that has the package.
        steps: "published": one qp; "sensitivity": one a matrix, from our allocation.
    """
    keys: list[Key] = list(coded_matrices(model.arch.num_layers))
    matrices = {f"{layer:03d}.{name}": np.asarray(model.block(layer).params[name], np.float32) for layer, name in keys}
    offsets = np.zeros(len(keys), int)
    if steps == "sensitivity":
        logs = np.log2(list(relative_steps(model, PeerSettings(method="rtn")).values()))
        offsets = np.rint(QPS_PER_OCTAVE * (logs - logs.mean())).astype(int)
    tried: dict[int, tuple[float, dict[str, np.ndarray]]] = {}

    def bpw(qp: int) -> float:
        if qp not in tried:
            size, decoded = nncodec_round_trip(matrices, (qp + offsets).tolist(), python)
            tried[qp] = (8 * size / coded_weights(model.arch), decoded)
        return tried[qp][0]

    spread = np.exp2(np.mean([np.log2(np.sqrt(np.mean(W**2))) for W in matrices.values()]))
    qp = round(QPS_PER_OCTAVE * (math.log2(float(spread)) + 2 - target_bpw))
    for _ in range(_TRIALS):
        qp += round(QPS_PER_OCTAVE * (bpw(qp) - target_bpw))  # a step twice as large saves near one bit
        if qp in tried:
            break
    best = min(tried, key=lambda q: abs(tried[q][0] - target_bpw))
    size, decoded = tried[best]
    params = with_matrices(model.network(), dict(zip(keys, decoded.values(), strict=True)))
    return DecodedModel(size, size, params, model.arch)
