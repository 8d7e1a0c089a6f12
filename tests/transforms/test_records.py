"""Transform records survive JSON and rebuild the very same matrix."""

import json

import numpy as np
import pytest

from rdopt.config.errors import UserError
from rdopt.transforms.matrices.cayley import block_cayley_size, skew_size
from rdopt.transforms.matrices.compose import orthogonality_error
from rdopt.transforms.matrices.givens import butterfly, pair_count, round_robin
from rdopt.transforms.matrices.modules import CayleyRotation, GivensRotation, record_of
from rdopt.transforms.matrices.pca import pca
from rdopt.transforms.records import TransformRecord, rebuild, record_from_dict, record_to_dict

N = 10


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape)


def basis() -> np.ndarray:
    x = normal(40, N)
    return pca(x.T @ x)


def simple(kind: str, shape: tuple[int, ...] = (N, N), **fields) -> TransformRecord:
    return TransformRecord(kind=kind, site="residual", shape=shape, **fields)  # type: ignore[arg-type]


RECORDS = {
    "identity": simple("identity", (3, N, N)),
    "hadamard": simple("hadamard"),
    "dct": simple("dct"),
    "fourier": simple("fourier", (3, N, N)),
    "random": simple("random", (2, N, N), options={"seed": 5}),
    "pca": simple("pca", parameters={"matrix": basis()}),
    "matrix": simple("matrix", parameters={"matrix": basis()}),
    "cayley": record_of(CayleyRotation(n=N, batch=(2,)), {"theta": normal(2, skew_size(N))}, site="value"),
    "block": record_of(CayleyRotation(n=N, block=4), {"theta": normal(block_cayley_size(N, 4))}, site="in"),
    "butterfly": record_of(GivensRotation(n=N), {"angles": normal(pair_count(butterfly(N)))}, site="in"),
    "pairs": record_of(GivensRotation(n=N, pairs=round_robin(N, 3)), {"angles": normal(15)}, site="in"),
    "composed": record_of(
        CayleyRotation(n=N),
        {"theta": normal(skew_size(N))},
        site="residual",
        base=simple("pca", parameters={"matrix": basis()}),
    ),
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
    assert (again.kind, again.site, again.precision, again.version) == (
        record.kind, record.site, record.precision, record.version
    )  # fmt: skip


def test_a_composition_is_its_basis_times_its_rotation():
    record = RECORDS["composed"]
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
        simple("cayley_block", parameters={"theta": normal(7)}),
        simple("pca", parameters={"matrix": normal(3, 3)}),
        simple("random"),
        simple("composition"),
    ],
)
def test_a_record_whose_parameters_do_not_fit_is_refused(record):
    with pytest.raises(UserError, match="residual"):
        rebuild(record)
