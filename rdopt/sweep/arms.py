"""The arms of a comparison: in which coordinates the same model is encoded."""

from typing import NamedTuple


class Arm(NamedTuple):
    """One choice of coordinates.

    Attributes:
        description: one line for tables and curve.json.
        basis: the fixed basis, or the one that learning starts from; None: the one that train.init names.
        learned: whether the transforms are trained from there, once per lambda.
        blockwise: whether stored block-wise principal axes and a plain uniform grid are used instead.
    """

    description: str
    basis: str | None
    learned: bool = False
    blockwise: bool = False


ARMS = {
    "identity": Arm("original coordinates", "identity"),
    "hadamard": Arm("randomised Hadamard on the residual stream and the value heads", "hadamard"),
    "random": Arm("random rotations of the residual stream and the value heads", "random"),
    "dct": Arm("cosine transform (DCT-II) of the residual stream and the value heads", "dct"),
    "fourier": Arm("real Fourier transform of the residual stream and the value heads", "fourier"),
    "pca": Arm("principal axes of the weights: residual stream and value heads", "pca"),
    "pca-act": Arm("principal axes of the activations: residual stream and value heads", "pca-act"),
    "joint": Arm("joint diagonalisation of all matrices' moments: residual stream and value heads", "joint"),
    "learned": Arm("symmetries (train.sites) learned on R + lambda D from train.init", None, learned=True),
    "hadamard+learned": Arm("the same, learned from the Hadamard basis", "hadamard", learned=True),
    "blockwise-pca": Arm(
        "stored principal axes of blocks of 32 input channels, uniform grid without feedback",
        "identity",
        blockwise=True,
    ),
}
