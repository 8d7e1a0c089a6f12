"""The grids: every name has its traits and its way into a file."""

from typing import get_args

from rdopt.config.schema import GridName
from rdopt.encode.model import METHODS
from rdopt.rate.grids import GRIDS


def test_every_grid_has_traits_and_a_method() -> None:
    assert set(get_args(GridName)) == set(GRIDS) == set(METHODS)
