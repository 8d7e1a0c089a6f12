"""The base step of a slope: how finely all weights are quantized at the optimum of R + lam D.

With steps a_ij = c / (sqrt(G_ii) L_jj) every entry of the weighted error has the variance c^2 / 12, so that at high
rate D = N c^2 / 24 nats/token while R falls by one bit/weight an octave of c. Their sum is least at

    c^2 = 12 / (N ln2 lam).
"""

from typing import Any, overload

import numpy as np
from jaxtyping import Array, Float


@overload
def base_step(lam: float, weights: int) -> float: ...
@overload
def base_step(lam: Float[Array, ""], weights: int) -> Float[Array, ""]: ...
def base_step(lam: Any, weights: int) -> Any:
    """The base step c of the optimum of R + lam D.

    Args:
        lam: bits/weight per nat/token; a plain number, or a float32 scalar of JAX inside a compiled function.
        weights: N, the number of coded weights of the model.

    Returns:
        for a plain number the float32 value that a file holds, as a plain number; else a scalar like lam.
    """
    plain = isinstance(lam, int | float)
    xp = np if plain else lam.__array_namespace__()
    c = xp.sqrt(12.0 / (weights * xp.log(2.0) * lam))
    return float(np.float32(c)) if plain else c


def lam_of_base_step(c: float, weights: int) -> float:
    """The lambda whose base step is c (inverse of `base_step`)."""
    return 12.0 / (weights * np.log(2.0) * c * c)
