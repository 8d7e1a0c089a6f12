"""Fixed coordinates: the bases that learning starts from and is compared with.

identity leaves the weights; hadamard and random flatten (QuaRot 2404.00456); dct and fourier turn to frequencies over
the channel index; pca aligns with the weights (the eigenvectors of the sum of their normalised Gram matrices), pca-act
with the activations (SliceGPT 2401.15024); joint diagonalises the moments of all matrices together as far as one
rotation can (Pham 2001), which is what a rate asks for.
"""

from rdopt.calibration.moments import Moments
from rdopt.checkpoint.families import Architecture
from rdopt.operator.params import Params
from rdopt.transforms.gauges.coordinates import Gauges
from rdopt.transforms.gauges.registry import OWNERS

BASES = ("identity", "hadamard", "random", "dct", "fourier", "pca", "pca-act", "joint")


def starting_gauges(
    kind: str, params: Params, arch: Architecture, moments: Moments | None = None, seed: int = 0
) -> Gauges:
    """The gauges of a fixed basis, float64.

    Args:
        kind: one of BASES.
        params: the original weights (gains not folded).
        arch: their architecture.
        moments: the second moments; pca-act alone needs them.
        seed: of the random rotation and of the Hadamard's signs.

    Returns:
        residual rotation and value rotations; none for identity.
    """
    if kind not in BASES:
        raise ValueError(f"basis {kind!r} is none of {', '.join(BASES)}")
    sigma = {} if moments is None else moments.sigma
    return Gauges(**{field: site.start(kind, params, arch, sigma, seed) for field, site in OWNERS.items()})
