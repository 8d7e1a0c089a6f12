"""Records of transforms: kind, site, shape, parameters, precision and version, enough to rebuild the matrix.

A record turns into a dict for JSON plus named arrays and back; rebuilding it always gives the same float64
matrix.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Shaped

from rdopt.config.errors import UserError
from rdopt.transforms.matrices.cayley import cayley
from rdopt.transforms.matrices.givens import Pairs, as_pairs, givens_matrix
from rdopt.transforms.matrices.stretch import stretch

RECORD_VERSION = 1
Kind = Literal["matrix", "cayley", "givens", "composition", "stretch", "scale", "complex", "order"]
Precision = Literal["float32", "float64"]


@dataclass(frozen=True, kw_only=True, eq=False)
class TransformRecord:
    """One transform (or a batch of one kind) as it was applied: a matrix, or a number or a place per entry.

    Attributes:
        kind: the construction, one of Kind.
        site: where in the network it acts, e.g. "residual".
        shape: of the rebuilt matrix, (..., n, n), or of the numbers, (..., n).
        parameters: the arrays that fix it: theta, angles, pairs, matrix, or values (of complex numbers: real, imag).
        options: small facts that fix it: how many pairs each layer of Givens rotations has.
        parts: the factors of a composition, left to right.
        precision: float32 or float64, of the stored parameters; they are cast to it here, before anything is
            rebuilt.
    """

    kind: str
    site: str
    shape: tuple[int, ...]
    parameters: Mapping[str, np.ndarray] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple["TransformRecord", ...] = ()
    precision: str = "float64"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            known = ", ".join(get_args(Kind))
            raise UserError(f"transform kind {self.kind!r} at {self.site!r} is unknown; use one of {known}")
        if self.precision not in get_args(Precision):
            raise UserError(f"transform precision {self.precision!r} is unknown; use float32 or float64")
        stored = {name: _stored(value, self.precision) for name, value in self.parameters.items()}
        object.__setattr__(self, "parameters", stored)
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))


def _stored(value: Any, precision: str) -> np.ndarray:
    array = np.asarray(value)
    return array if np.issubdtype(array.dtype, np.integer) else array.astype(precision)


def composition(site: str, parts: tuple[TransformRecord, ...]) -> TransformRecord:
    """The record of a product of matrices, left to right."""
    return TransformRecord(kind="composition", site=site, shape=parts[-1].shape, parts=parts)


def record_to_dict(
    record: TransformRecord, prefix: str = "transform"
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(dict for JSON, arrays by name): names start with ``prefix``, and the dict says which is which."""
    names = {name: f"{prefix}.{name}" for name in record.parameters}
    tensors = {names[name]: value for name, value in record.parameters.items()}
    parts = []
    for number, part in enumerate(record.parts):
        entry, arrays = record_to_dict(part, f"{prefix}.{number}")
        parts.append(entry)
        tensors |= arrays
    plain = {
        "kind": record.kind,
        "site": record.site,
        "shape": list(record.shape),
        "precision": record.precision,
        "version": RECORD_VERSION,
        "options": dict(record.options),
        "tensors": names,
        "parts": parts,
    }
    return plain, tensors


def record_from_dict(plain: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> TransformRecord:
    """The record that record_to_dict wrote.

    Raises:
        UserError: for a newer version, an unknown kind, a missing field or a missing array.
    """
    if plain.get("version") != RECORD_VERSION:
        raise UserError(
            f"transform metadata version {plain.get('version')!r} cannot be read; this rdopt reads {RECORD_VERSION}"
        )
    if missing := {"kind", "site", "shape", "precision", "options", "tensors", "parts"} - set(plain):
        raise UserError(f"transform metadata lacks {', '.join(sorted(missing))}; export the model again")
    if absent := [name for name in plain["tensors"].values() if name not in tensors]:
        raise UserError(f"transform array {absent[0]!r} is missing; export the model again")
    return TransformRecord(
        kind=plain["kind"],
        site=plain["site"],
        shape=tuple(plain["shape"]),
        parameters={name: np.asarray(tensors[key]) for name, key in plain["tensors"].items()},
        options=dict(plain["options"]),
        parts=tuple(record_from_dict(part, tensors) for part in plain["parts"]),
        precision=plain["precision"],
    )


def pairs_to_fields(pairs: Pairs) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Givens layers as (parameters, options) of a record: all pairs in a row, and how many each layer has."""
    flat = np.concatenate([layer.reshape(-1, 2) for layer in pairs]).astype(np.int32)
    return {"pairs": flat}, {"layers": [len(layer) for layer in pairs]}


def _record_pairs(record: TransformRecord, n: int) -> Pairs:
    cuts = np.cumsum(record.options["layers"])[:-1]
    return as_pairs(np.split(record.parameters["pairs"], cuts), n)


def _exact(record: TransformRecord, name: str) -> np.ndarray:
    return record.parameters[name].astype(np.float64)


_BUILDERS: dict[str, Callable[[TransformRecord, int], np.ndarray]] = {
    "matrix": lambda record, n: _exact(record, "matrix"),
    "cayley": lambda record, n: cayley(_exact(record, "theta"), n),
    "givens": lambda record, n: givens_matrix(_exact(record, "angles"), _record_pairs(record, n), n),
    "composition": lambda record, n: reduce(np.matmul, [rebuild(part) for part in record.parts]),
    "stretch": lambda record, n: stretch(_exact(record, "theta"), n),
    "scale": lambda record, n: _exact(record, "values"),
    "complex": lambda record, n: _exact(record, "real") + 1j * _exact(record, "imag"),
    "order": lambda record, n: record.parameters["values"],
}


def rebuild(record: TransformRecord) -> Shaped[np.ndarray, "..."]:
    """The float64 matrix of a record (or its numbers), the very one that was folded into the weights.

    Raises:
        UserError: when the record's parameters do not fit its kind and shape.
    """
    try:
        matrix = _BUILDERS[record.kind](record, record.shape[-1])
    except (KeyError, ValueError, IndexError, TypeError) as error:
        what = f"transform {record.kind!r} at {record.site!r}"
        raise UserError(f"{what} cannot be rebuilt ({error}); export the model again") from error
    if matrix.shape != record.shape:
        what = f"transform {record.kind!r} at {record.site!r} has shape {matrix.shape}"
        raise UserError(f"{what}, its record says {record.shape}; export the model again")
    return matrix
