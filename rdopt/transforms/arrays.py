"""One spelling for jax.numpy (training) and numpy (export, float64): each transform is written once."""

from types import ModuleType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    AnyArray = Any  # what goes in comes out, which a union of the two cannot say
else:
    AnyArray = jax.Array | np.ndarray


def namespace(x: AnyArray) -> ModuleType:
    """The array module that owns ``x``: numpy for numpy arrays, else jax.numpy."""
    return np if isinstance(x, np.ndarray) else jnp


def matmul(a: AnyArray, b: AnyArray) -> AnyArray:
    """``a @ b`` at full precision; by default accelerators round float32 operands to ten bits."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return np.matmul(a, b)
    return jnp.matmul(a, b, precision="highest")


def eye_like(x: AnyArray, batch: tuple[int, ...], n: int) -> AnyArray:
    """Identities of shape (*batch, n, n) in the array module and dtype of ``x``."""
    xp = namespace(x)
    return xp.broadcast_to(xp.eye(n, dtype=x.dtype), (*batch, n, n))
