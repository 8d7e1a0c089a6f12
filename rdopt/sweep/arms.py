"""The arms of a comparison: in which coordinates the same model is encoded."""

from typing import NamedTuple


class Arm(NamedTuple):
    """One choice of coordinates.

    Attributes:
        description: one line for tables and curve.json.
        line: colour, marker and line in curve.png; distinct in lightness as well as in hue, so that they survive a
            grey print and colour blindness.
        basis: the fixed basis, or the one that learning starts from; None: the one that train.init names.
        learned: whether the transforms are trained from there, once per lambda.
        blockwise: whether stored block-wise principal axes and a plain uniform grid are used instead.
    """

    description: str
    line: tuple[str, str, str]
    basis: str | None
    learned: bool = False
    blockwise: bool = False


_BOTH = "the residual stream and the value heads"
ARMS = {
    "identity": Arm("original coordinates", ("#222222", "o", "-"), "identity"),
    "hadamard": Arm(f"randomised Hadamard on {_BOTH}", ("#8a8a8a", "s", "-"), "hadamard"),
    "random": Arm(f"random rotations of {_BOTH}", ("#b5b5b5", "D", ":"), "random"),
    "dct": Arm(f"cosine transform (DCT-II) of {_BOTH}", ("#8c6d31", "<", "--"), "dct"),
    "fourier": Arm(f"real Fourier transform of {_BOTH}", ("#6b4c9a", ">", ":"), "fourier"),
    "pca": Arm("principal axes of the weights: residual stream and value heads", ("#0072b2", "^", "-"), "pca"),
    "pca-act": Arm(
        "principal axes of the activations: residual stream and value heads", ("#56b4e9", "v", "--"), "pca-act"
    ),
    "joint": Arm(
        "joint diagonalisation of all matrices' moments: residual stream and value heads",
        ("#cc79a7", "D", "-"),
        "joint",
    ),
    "learned": Arm(
        "symmetries (train.sites) learned on R + lambda D from train.init", ("#d55e00", "o", "-"), None, learned=True
    ),
    "hadamard+learned": Arm(
        "the same, learned from the Hadamard basis", ("#e69f00", "s", "--"), "hadamard", learned=True
    ),
    "blockwise-pca": Arm(
        "stored principal axes of blocks of 32 input channels, uniform grid without feedback",
        ("#009e73", "P", ":"),
        "identity",
        blockwise=True,
    ),
}
