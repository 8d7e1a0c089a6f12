"""Arrays that are needed again later: in memory as far as a budget goes, behind it in files that go with the object."""

import errno
import shutil
import tempfile
import weakref
from collections.abc import Hashable
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int

from rdopt.config.errors import UserError


class Spill:
    """Arrays by key.

    Args:
        budget: bytes kept in memory; what is beyond goes to the system's folder of temporary files (TMPDIR).
    """

    def __init__(self, budget: int) -> None:
        self._left, self._count = budget, 0
        self._held: dict[Hashable, np.ndarray] = {}
        self._files: dict[Hashable, tuple[Path, np.dtype]] = {}
        self._folder: Path | None = None

    def keep(self, key: Hashable, x: np.ndarray) -> None:
        """Keeps an array, or replaces the one of this key.

        Raises:
            UserError: the disk is full.
        """
        self.drop(key)
        if x.nbytes <= self._left:
            self._held[key], self._left = x, self._left - x.nbytes
            return
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="rdopt-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._count += 1
        path = self._folder / f"{self._count}.npy"
        try:
            np.save(path, x)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"the disk of temporary files at {self._folder.parent} is full; free some space, set TMPDIR to a "
                "folder on another disk, or raise run.memory so that less is kept there."
            ) from error
        self._files[key] = path, x.dtype

    def read(self, key: Hashable) -> np.ndarray:
        """The array of a key, as it was kept."""
        return self._held[key] if key in self._held else self._open(key)

    def rows(self, key: Hashable, chosen: Int[np.ndarray, " some"]) -> np.ndarray:
        """Some rows of the array of a key; no others are read."""
        return (self._held[key] if key in self._held else self._open(key, "r"))[chosen]

    def take(self, key: Hashable) -> np.ndarray:
        """The same, kept no longer."""
        x = self.read(key)
        self.drop(key)
        return x

    def drop(self, key: Hashable) -> None:
        """Keeps the array of a key no longer, if there is one."""
        if key in self._held:
            self._left += self._held.pop(key).nbytes
        elif key in self._files:
            self._files.pop(key)[0].unlink()

    def _open(self, key: Hashable, mode: Literal["r"] | None = None) -> np.ndarray:
        path, kind = self._files[key]
        return np.load(path, mmap_mode=mode).view(kind)  # numpy does not know bfloat16 when it reads it
