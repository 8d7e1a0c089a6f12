"""The 16-bit form of tensors that are not coded: float16 or bfloat16, whichever is closer to the tensor."""

from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float

_HALF_LIMIT = 6e4


def sixteen_bit_type(x: Float[np.ndarray, "*shape"]) -> Any:
    """float16 where its rounding error is no larger and nothing overflows, else bfloat16."""
    if np.abs(x).max(initial=0) >= _HALF_LIMIT:
        return ml_dtypes.bfloat16
    half, brain = (
        np.sum((x.astype(kind).astype(np.float32) - x) ** 2, dtype=np.float64)
        for kind in (np.float16, ml_dtypes.bfloat16)
    )
    return np.float16 if half <= brain else ml_dtypes.bfloat16


def sixteen_bit(x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """x as the file gives it back, float32."""
    return x.astype(sixteen_bit_type(x)).astype(np.float32)
