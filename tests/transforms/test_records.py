"""Transform records survive JSON and rebuild the very same matrix."""

import json
from typing import Literal

import numpy as np
import pytest
from conftest import orthogonality_error

from rdopt.config.errors import UserError
from rdopt.transforms.matrices.cayley import skew_size
from rdopt.transforms.matrices.pca import pca
from rdopt.transforms.matrices.rotations import rotation_record, rotation_shapes
from rdopt.transforms.records import TransformRecord, rebuild, record_from_dict, record_to_dict

N = 10


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape)


def basis() -> np.ndarray:
    x = normal(40, N)
    return pca(x.T @ x)


def simple(kind: str, shape: tuple[int, ...] = (N, N), **fields) -> TransformRecord:
    return TransformRecord(kind=kind, site="residual", shape=shape, **fields)  # type: ignore[arg-type]


def learned(kind: Literal["cayley", "givens"], batch: tuple[int, ...] = (), base: TransformRecord | None = None):
    parameters = {name: normal(*shape) for name, shape in rotation_shapes(kind, N, batch).items()}
    return rotation_record(kind, parameters, "residual", N, base)


MATRIX = simple("matrix", parameters={"matrix": basis()})
RECORDS = {
    "matrix": MATRIX,
    "cayley": learned("cayley", (2,)),
    "givens": learned("givens", (2,)),
    "composed cayley": learned("cayley", base=MATRIX),
    "composed givens": learned("givens", base=MATRIX),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_survives_json_and_rebuilds_the_identical_matrix(name):
    record = RECORDS[name]
    plain, tensors = record_to_dict(record, "t")
    again = record_from_dict(
        json.loads(json.dumps(plain)), {key: value.copy() for key, value in tensors.items()}
    )
    matrix = rebuild(record)
    np.testing.assert_array_equal(rebuild(again), matrix)
    assert matrix.dtype == np.float64 and matrix.shape == record.shape == again.shape
    assert orthogonality_error(matrix) < 1e-12
    assert (again.kind, again.site, again.precision) == (record.kind, record.site, record.precision)  # fmt: skip


@pytest.mark.parametrize("kind", ["cayley", "givens"])
def test_a_composition_is_its_basis_times_its_rotation(kind):
    record = RECORDS[f"composed {kind}"]
    np.testing.assert_array_equal(rebuild(record), rebuild(record.parts[0]) @ rebuild(record.parts[1]))


def test_parameters_are_held_at_the_precision_the_record_names():
    record = simple("cayley", parameters={"theta": normal(skew_size(N))}, precision="float32")
    assert record.parameters["theta"].dtype == np.float32
    assert orthogonality_error(rebuild(record)) < 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version 99"),
        ({"kind": "wavelet"}, "wavelet"),
        ({"precision": "int3"}, "int3"),
        ({"tensors": {"theta": "elsewhere"}}, "elsewhere"),
    ],
)
def test_a_foreign_record_is_refused_by_name(change, message):
    plain, tensors = record_to_dict(RECORDS["cayley"])
    with pytest.raises(UserError, match=message):
        record_from_dict(plain | change, tensors)


def test_a_record_without_a_field_is_refused_by_the_fields_name():
    plain, tensors = record_to_dict(RECORDS["cayley"])
    del plain["site"]
    with pytest.raises(UserError, match="site"):
        record_from_dict(plain, tensors)


@pytest.mark.parametrize(
    "record",
    [
        simple("cayley", parameters={"theta": normal(7)}),
        simple("givens", parameters={"angles": normal(3), "pairs": np.array([[0, 1]])}, options={"layers": [1]}),
        simple("matrix", parameters={"matrix": normal(3, 3)}),
        simple("composition"),
    ],
)
def test_a_record_whose_parameters_do_not_fit_is_refused(record):
    with pytest.raises(UserError, match="residual"):
        rebuild(record)
