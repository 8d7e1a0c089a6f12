"""One spelling for jax.numpy (training) and numpy (export, float64): each transform is written once.

JAX is imported only where an array of it comes in, so that what works on numpy arrays alone starts without it.
"""

from types import ModuleType
from typing import Any

import numpy as np

AnyArray = Any  # what goes in comes out, which a union of numpy's and JAX's arrays cannot say


def namespace(x: AnyArray) -> ModuleType:
    """The array module that owns ``x``: numpy for numpy arrays, else jax.numpy."""
    if isinstance(x, np.ndarray):
        return np
    import jax.numpy as jnp

    return jnp


def matmul(a: AnyArray, b: AnyArray) -> AnyArray:
    """``a @ b`` at full precision; by default accelerators round float32 operands to ten bits."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return np.matmul(a, b)
    import jax.numpy as jnp

    return jnp.matmul(a, b, precision="highest")


def eye_like(x: AnyArray, batch: tuple[int, ...], n: int) -> AnyArray:
    """Identities of shape (*batch, n, n) in the array module and dtype of ``x``."""
    xp = namespace(x)
    return xp.broadcast_to(xp.eye(n, dtype=x.dtype), (*batch, n, n))
