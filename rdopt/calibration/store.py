"""Second moments on disk: a file per block, so that a model's need not fit in memory, and what they belong to."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from rdopt.calibration.moments import EmbeddingMoments, Moments
from rdopt.checkpoint.atomic import new_file
from rdopt.checkpoint.families import MATRICES, MATRICES_OF
from rdopt.config.errors import UserError
from rdopt.operator.params import PerBlock

_VERSION = "3"
_META = "moments.json"


@dataclass(frozen=True)
class MomentStore:
    """A folder with the second moments of one model on one text.

    Attributes:
        folder: where they lie.
        layers: blocks of the model.
        key: fingerprint of model, text and labels.
        tokens: how many tokens the moments are the mean of.
    """

    folder: Path
    layers: int
    key: str
    tokens: int

    def open(self) -> None:
        """Makes the folder, or empties one of another version or measured on something else."""
        meta = {"version": _VERSION, "key": self.key, "tokens": self.tokens, "layers": self.layers}
        if described(self.folder) == meta:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in (*self.folder.glob("*.safetensors"), self.folder / _META):
            path.unlink(missing_ok=True)
        with new_file(self.folder / _META) as part:
            part.write_text(json.dumps(meta), encoding="utf-8")

    def keep(self, layer: int, sigma: Mapping[str, Any], G: Mapping[str, Any]) -> None:
        """Writes the moments of one block, float32: input group -> (in, in), matrix -> (out, out) or its diagonal."""
        parts = (("sigma", sigma), ("G", G))
        _replace(self._path(layer), {f"{kind}.{k}": v for kind, held in parts for k, v in held.items()})

    def keep_ends(self, moments: EmbeddingMoments) -> None:
        """Writes those of the embedding and the head, float64."""
        _replace(self._ends, moments._asdict())

    @property
    def missing(self) -> list[int]:
        """The blocks that have no file yet."""
        return [layer for layer in range(self.layers) if not self._path(layer).is_file()]

    @property
    def complete(self) -> bool:
        """Whether every block and the ends are there."""
        return self._ends.is_file() and not self.missing

    def moments(self) -> Moments:
        """All of them, float64, those of the blocks read when they are indexed."""

        def view(kind: str, name: str) -> PerBlock:
            return PerBlock(self.layers, self._reader(f"{kind}.{name}"))

        sigma = {group: view("sigma", group) for group in MATRICES_OF}
        G = {name: view("G", name) for name in MATRICES}
        return Moments(sigma, G, self.tokens, EmbeddingMoments(**load_file(str(self._ends))))

    def _reader(self, name: str) -> Callable[[int], Float[np.ndarray, "..."]]:
        def read(layer: int) -> Float[np.ndarray, "..."]:
            with safe_open(str(self._path(layer)), "np") as file:
                return file.get_tensor(name).astype(np.float64)

        return read

    @property
    def _ends(self) -> Path:
        return self.folder / "ends.safetensors"

    def _path(self, layer: int) -> Path:
        return self.folder / f"block-{layer:05d}.safetensors"


def described(folder: Path) -> dict[str, Any] | None:
    """What a folder of moments says of itself, or None where it holds none."""
    try:
        return json.loads((folder / _META).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def open_moments(folder: Path, layers: int, key: str) -> Moments:
    """The finished moments of a folder.

    Raises:
        UserError: it holds none, unfinished ones, or those of another model or text.
    """
    meta = described(folder)
    if meta is None:
        raise UserError(f"{folder} holds no second moments; make them there by rdopt moments MODEL --out {folder}.")
    if (meta.get("version"), meta.get("key")) != (_VERSION, key):
        raise UserError(
            f"{folder} holds the second moments of another model, text or seed; name the ones of this model and give "
            "the same --text, --split-on, --seq-len and --sequences, or measure them by rdopt moments."
        )
    store = MomentStore(folder, layers, key, int(meta["tokens"]))
    if not store.complete:
        raise UserError(f"{folder} is unfinished ({len(store.missing)} of {layers} blocks are missing); run the rdopt "
                        "moments that began it again.")
    return store.moments()


def _replace(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    path.unlink(missing_ok=True)
    with new_file(path) as part:
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, str(part))
