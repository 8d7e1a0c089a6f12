"""Claims about the checks of annotations while tests run: no call with other types or shapes escapes them."""

import checked_calls
import numpy as np
import pytest
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float, TypeCheckError

checked = checked_calls._jaxtyped(typechecker=beartype)


@checked
def product(x: Float[np.ndarray, "n m"], y: Float[np.ndarray, "m"], shown: str = "") -> Float[np.ndarray, "n"]:
    return x if shown == "whole" else x @ y


def test_shapes_are_checked_behind_a_call_that_passed():
    for _ in range(2):
        assert product(np.ones((2, 3)), np.ones(3)).tolist() == [3, 3]
        with pytest.raises(TypeCheckError, match="parameters of"):
            product(np.ones((2, 3)), np.ones(2))
        with pytest.raises(TypeCheckError, match="parameters of"):
            product(np.ones((2, 3), int), np.ones(3, int))
        with pytest.raises(TypeCheckError, match="return value of"):
            product(np.ones((2, 3)), np.ones(3), shown="whole")


def test_a_result_of_another_shape_is_checked_where_the_arguments_are_alike():
    results = [np.ones(2), np.ones(2), np.ones((2, 2)), np.ones(2)]

    @checked
    def next_of(x: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
        return results.pop()

    next_of(np.ones(2))
    with pytest.raises(TypeCheckError, match="return value of"):
        next_of(np.ones(2))
    assert [len(next_of(np.ones(2))) for _ in range(2)] == [2, 2]


def test_what_containers_hold_is_checked_at_every_call():
    @checked
    def total(parts: list[Float[np.ndarray, "n"]], numbers: dict[str, int]) -> float:
        return float(sum(map(np.sum, parts))) + sum(numbers.values())

    for _ in range(2):
        assert total([np.ones(2), np.ones(2)], {"a": 1}) == 5
        with pytest.raises(TypeCheckError):
            total([np.ones((2, 2))], {"a": 1})
        with pytest.raises(TypeCheckError):
            total([np.ones(2)], {"a": "1"})  # type: ignore[dict-item]


def test_functions_made_anew_keep_what_they_enclose():
    def adder(a: int):
        @checked
        def add(b: int) -> int:
            return a + b

        return add

    assert [adder(a)(1) for a in range(3)] == [1, 2, 3]
    with pytest.raises(BeartypeCallHintViolation):
        adder(1)(1.0)


def test_annotations_that_are_strings_name_arrays_too():
    @checked
    def length(x: "Float[np.ndarray, 'n']", y: "Float[np.ndarray, 'n']") -> int:
        return len(x)

    assert length(np.ones(2), np.ones(2)) == 2
    with pytest.raises(TypeCheckError):
        length(np.ones(2), np.ones(3))
