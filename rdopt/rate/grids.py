"""What every grid of `encode.grid` does, for all who model its bits or make them.

A new grid is a row here and a name in `config.schema.GridName`; its levels are a file of `codec/grids/`, how the
encoder puts a model on it is a function in `encode/model.py` METHODS, and what a decoder reads one in
`codec/decoder.py` METHODS under a number that `codec/streams/index.py` knows; between them its indices are a
`MatrixCodes` (`code_scalar` in `codec/encoder.py`; fixed-length codes would be a function beside it). Every file has a
step a row and a step a column of each matrix (`codec/streams/scales.py`); steps of another kind would be a stream of
their own, in `container.STREAMS`, whose bits `index.py` counts, and another `container.VERSION`.
"""

from typing import Literal, NamedTuple

from rdopt.config.schema import GridName


class GridTraits(NamedTuple):
    """What distinguishes grids from each other.

    Attributes:
        feeds_columns: the error of a column is passed on to the columns before it (GPTQ order).
        feeds_rows: errors are passed on over the rows of a matrix too, where `encode.output` is full.
        follows_drift: targets follow the part quantized so far, where `encode.drift` is prefix.
        curve: its operational curve, where it is not that of uniform steps on `train.density`.
    """

    feeds_columns: bool
    feeds_rows: bool = False
    follows_drift: bool = False
    curve: Literal["trellis"] | None = None


GRIDS: dict[GridName, GridTraits] = {
    "trellis": GridTraits(feeds_columns=True, feeds_rows=True, follows_drift=True, curve="trellis"),
    "lloyd": GridTraits(feeds_columns=True),
    "feedback": GridTraits(feeds_columns=True),
    "round": GridTraits(feeds_columns=False),
}
