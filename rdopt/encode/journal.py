"""What is done of a file that is being made, block by block, so that an encoding that was killed goes on."""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from rdopt.checkpoint.atomic import new_file

_KEY = "key"


class Journal:
    """Arrays by name in a folder; without a folder nothing is kept.

    Args:
        folder: beside the file to be; what another encoding left there is removed.
        key: says of what it is the journal.
    """

    def __init__(self, folder: Path | None, key: str) -> None:
        self._folder = folder
        if folder is None or ((folder / _KEY).is_file() and (folder / _KEY).read_text(encoding="utf-8") == key):
            return
        shutil.rmtree(folder, ignore_errors=True)
        with new_file(folder / _KEY) as part:
            part.write_text(key, encoding="utf-8")

    def read(self, name: str) -> dict[str, np.ndarray] | None:
        """What was written under a name, if anything."""
        path = self._path(name)
        return load_file(str(path)) if path is not None and path.is_file() else None

    def write(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keeps arrays under a name, in place of those before.

        Raises:
            UserError: the disk is full.
        """
        path = self._path(name)
        if path is None:
            return
        with new_file(path.with_suffix(".new")) as part:
            save_file({k: np.ascontiguousarray(x) for k, x in arrays.items()}, str(part))
        path.with_suffix(".new").replace(path)

    def _path(self, name: str) -> Path | None:
        return None if self._folder is None else self._folder / f"{name}.safetensors"


def digest(*parts: str | np.ndarray) -> str:
    """A hash of texts and arrays."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else np.ascontiguousarray(part).tobytes())
    return found.hexdigest()
