"""The whole model behind its stored rotations, in stacked arrays: the oracle of `Aligned.coded`."""

import numpy as np
from jaxtyping import Float

from rdopt.calibration.moments import Moments
from rdopt.checkpoint.families import MATRICES
from rdopt.operator.params import Params
from rdopt.transforms.stored.rotations import StoredRotation, StoredRotations


def fold_stored(params: Params, stored: StoredRotations) -> Params:
    """The matrices as they are coded, U^T W V, float32; all else as it was."""
    blocks = dict(params["blocks"])
    for name in MATRICES:
        held = np.asarray(blocks[name], np.float64)
        turned = [stored.sides(layer, name, W.shape).fold(W) for layer, W in enumerate(held)]
        blocks[name] = np.stack(turned).astype(np.float32)
    return {**params, "blocks": blocks}


def fold_stored_moments(moments: Moments, stored: StoredRotations) -> Moments:
    """The moments there: V^T sigma V and U^T G U, float64.

    Raises:
        ValueError: an output is turned of whose G only the diagonal is held.
    """
    sigma = {
        group: np.stack([_turned(S, stored, stored.inputs.get((layer, group))) for layer, S in enumerate(held)])
        for group, held in moments.sigma.items()
    }
    G = {
        name: np.stack([_turned(g, stored, stored.outputs.get((layer, name))) for layer, g in enumerate(held)])
        for name, held in moments.G.items()
    }
    return moments._replace(sigma=sigma, G=G)


def _turned(
    S: Float[np.ndarray, "..."], stored: StoredRotations, site: StoredRotation | None
) -> Float[np.ndarray, "..."]:
    if site is None:
        return S
    if S.ndim == 1:
        raise ValueError("a rotation of the outputs needs the whole moment of their gradients, not its diagonal")
    return stored.rotation(site, len(S)).moment(S)
