"""Second moments of every block in files of their own, so that a model's need not fit in memory."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from rdopt.calibration.moments import EmbeddingMoments
from rdopt.checkpoint.atomic import new_file
from rdopt.checkpoint.families import INPUT_OF, MATRICES


@dataclass(frozen=True)
class LayerStore:
    """A folder with a file per block."""

    folder: Path
    layers: int

    def keep(self, layer: int, moments: Mapping[str, Any]) -> None:
        """Writes the moments of one block, float32."""
        arrays = {f"{kind}.{k}": np.ascontiguousarray(v) for kind, held in moments.items() for k, v in held.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write(self.path(layer), arrays)

    def keep_ends(self, moments: EmbeddingMoments) -> None:
        """Writes those of the embedding and the head, float64."""
        self._write(self._ends, {k: np.ascontiguousarray(v) for k, v in moments._asdict().items()})

    def _write(self, path: Path, arrays: Mapping[str, np.ndarray]) -> None:
        path.unlink(missing_ok=True)
        with new_file(path) as part:
            save_file(dict(arrays), str(part))

    @property
    def _ends(self) -> Path:
        return self.folder / "ends.safetensors"

    @property
    def complete(self) -> bool:
        """Whether every block and the ends are there."""
        return self._ends.is_file() and all(self.path(layer).is_file() for layer in range(self.layers))

    def read_ends(self) -> EmbeddingMoments:
        """What `keep_ends` wrote."""
        return EmbeddingMoments(**load_file(str(self._ends)))

    def read(self, layer: int) -> dict[str, dict[str, Float[np.ndarray, "..."]]]:
        """{"sigma": group -> moment, "G": matrix -> moment or diagonal}, float64."""
        found: dict[str, dict[str, Any]] = {"sigma": {}, "G": {}}
        for name, value in load_file(str(self.path(layer))).items():
            kind, which = name.split(".")
            found[kind][which] = value.astype(np.float64)
        return found

    def lazy(self, kind: str) -> dict[str, Any]:
        """The moments of one kind by name, each a sequence over the blocks that is read when it is indexed."""
        names = dict.fromkeys(INPUT_OF[k] for k in MATRICES) if kind == "sigma" else MATRICES
        return {name: _Held(self, kind, name) for name in names}

    def path(self, layer: int) -> Path:
        """The file of one block."""
        return self.folder / f"block-{layer:04d}.safetensors"


@dataclass(frozen=True)
class _Held:
    """One moment in every block."""

    store: LayerStore
    kind: str
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.store.layers, *self[0].shape)

    def __getitem__(self, layer: int) -> Float[np.ndarray, "..."]:
        if not 0 <= layer < self.store.layers:
            raise IndexError(layer)
        with safe_open(str(self.store.path(layer)), "np") as file:
            return file.get_tensor(f"{self.kind}.{self.name}").astype(np.float64)

    def __iter__(self) -> Iterator[Float[np.ndarray, "..."]]:
        return (self[layer] for layer in range(self.store.layers))
