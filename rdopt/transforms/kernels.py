"""The decorator of every compiled kernel: numba's machine code, kept where this user may write.

numba keeps what it compiled in the folder that NUMBA_CACHE_DIR names, else beside the package, else in the user's
cache folder, whichever can be written to first; where none can, it refuses to compile at all.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from numba import njit


def kernel(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compiles a function at its first call, once per machine where the code can be kept, else once per process.

    Kernels release the interpreter's lock, so that threads run them side by side.

    Args:
        options: of numba.njit, such as inline or fastmath.
    """
    compiler = partial(njit, nogil=True, **options)

    def compiled(function: Callable[..., Any]) -> Any:
        try:
            return compiler(cache=True)(function)
        except RuntimeError:  # no folder for the cache: a container's user without a home, a read-only disk
            return compiler()(function)

    return compiled
