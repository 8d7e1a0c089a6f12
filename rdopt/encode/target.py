"""The base step that makes a file of a wanted size, KL or perplexity: secant searches on log2 of the step.

A step twice as large saves about one bit/weight and quadruples the KL, so both are near lines in log2(c). The step is
first sought on a tenth of the rows; only then is the whole model encoded.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np

from rdopt.checkpoint.families import MATRICES, group_widths, matrix_shapes
from rdopt.codec.decoder import MatrixReader
from rdopt.codec.encoder import Coded, Encoded, coded_index, coded_streams
from rdopt.codec.streams.stored import pack_stored
from rdopt.config.errors import UserError
from rdopt.config.schema import EncodeConfig
from rdopt.encode.model import code_matrices
from rdopt.encode.source import Source, part_of
from rdopt.operator.params import Params

TOLERANCE = 0.02
_PATIENCE = 3  # trials behind which the tolerance will do: KL jumps by some percent between neighbouring base steps
SHARE = 10
_FEWEST = 48  # rows of a matrix that the search looks at, at least
T = TypeVar("T")


class Goal(NamedTuple):
    """What a file is searched for.

    Attributes:
        name: in the user's words.
        value: the wanted value.
        slope: how the value moves per doubling of the step, to begin with.
        aim: a trial this close ends the search.
        tolerance: the closest trial within it is accepted.
        shown: from a value to the figure that the user knows.
    """

    name: str
    value: float
    slope: float
    aim: float
    tolerance: float
    shown: Callable[[float], float] = float


def size_goal(bpw: float) -> Goal:
    """A file of `bpw` bits/weight."""
    return Goal(f"{bpw:g} bits/weight", bpw, -1.0, TOLERANCE / 4, TOLERANCE)


def divergence_goal(name: str, nats: float, shown: Callable[[float], float]) -> Goal:
    """A file whose KL (or loss above the original's) is `nats` per token, sought in log2 and within 7 %."""
    return Goal(name, math.log2(nats), 2.0, 0.03, 0.1, lambda value: shown(2.0**value))


def search_step(
    encode: Callable[[float], T], value: Callable[[T], float], goal: Goal, start: float, trials: int = 12
) -> T:
    """The result of `encode(c)` whose value lies closest to the goal.

    Args:
        encode: from a base step to a file.
        value: of a file.
        goal: wanted value and tolerance.
        start: first base step.
        trials: at most.

    Raises:
        UserError: no trial came within the tolerance.
    """
    log_c, slope = math.log2(start), goal.slope
    best: tuple[float, T] | None = None
    last: tuple[float, float] | None = None
    for trial in range(1, trials + 1):
        result = encode(2.0**log_c)
        miss = value(result) - goal.value
        if best is None or abs(miss) < abs(best[0]):
            best = (miss, result)
        if abs(miss) <= goal.aim or (trial >= _PATIENCE and abs(best[0]) <= goal.tolerance):
            break
        if last is not None and log_c != last[0]:
            secant = (miss - last[1]) / (log_c - last[0])
            slope = secant if secant * goal.slope > 0.05 else slope
        last = (log_c, miss)
        log_c -= max(-4.0, min(4.0, miss / slope))
    assert best is not None
    if abs(best[0]) > goal.tolerance:
        raise UserError(
            f"{goal.name} cannot be reached: the closest file has {goal.shown(goal.value + best[0]):.4g}; "
            "ask for another (tables and scales alone cost some bits, the coarsest steps leave some loss)."
        )
    return best[1]


class Part(NamedTuple):
    """A tenth of the rows of a model's matrices, for estimates of what the whole would give.

    Attributes:
        whole: the model.
        source: the same with these rows only.
    """

    whole: Source
    source: Source

    def bits_per_weight(self, coded: Coded) -> float:
        """Bits/weight of the whole model: codes as in the part, scales by the number of rows and columns."""
        part, whole = self.source, self.whole
        bits = {name: 8 * len(x) for name, x in coded_streams(coded, part.arch).items()}
        lines = [sum(sum(s.block(0).params[k].shape) for k in MATRICES) for s in (part, whole)]
        side = (bits["scales"] + bits["gains"] + bits["structured"]) * lines[1] / lines[0]
        transforms = 8 * len(pack_stored(whole.stored, whole.arch))
        return bits["codes"] / part.weights + (side + bits["tables"] + transforms) / whole.weights

    def model(self, coded: Coded) -> Params:
        """The whole model with the part's rows as a file would give them back, all others as they were."""
        whole, chosen = self.whole, self.source.chosen
        index = coded_index(coded, self.source.parameters)
        shapes = {key: (len(chosen[key[1]]), n) for key, (_, n) in matrix_shapes(whole.arch).items()}
        reader = MatrixReader(coded_streams(coded, whole.arch), index, shapes, group_widths(whole.arch))
        decoded = {key: x.weights for key, x in reader.read(shapes).items()}
        network = whole.aligned.network()
        blocks = dict(network["blocks"])
        for name, rows in chosen.items():
            matrices = []
            for layer in range(whole.arch.num_layers):
                W = np.array(whole.block(layer).params[name])
                W[rows] = decoded[layer, name]
                matrices.append(whole.undone((layer, name), W))
            blocks[name] = np.stack(matrices)
        return {**network, "blocks": blocks}


def search_file(
    source: Source,
    encode: EncodeConfig,
    goal: Goal,
    start: float,
    whole: Callable[[float], Encoded],
    value: Callable[[Encoded], float],
    rough: Callable[[Part, Coded, float], float],
) -> Encoded:
    """The file that meets a goal: a search on a tenth of the rows, then on whole files from there.

    Args:
        source: the model.
        encode: its configuration.
        goal: wanted value and tolerance.
        start: first base step.
        whole: from a base step to the file.
        value: of a file.
        rough: the value of the whole file, expected from a part coded at a base step.

    Raises:
        UserError: no file came within the tolerance.
    """
    if min(len(source.block(0).params[k]) for k in MATRICES) >= 2 * _FEWEST:
        part = some_rows(source, encode)
        _, start = search_step(
            lambda c: (rough(part, code_matrices(part.source, c, encode), c), c),
            lambda trial: trial[0],
            goal._replace(aim=goal.tolerance, tolerance=math.inf),
            start,
        )
    return search_step(whole, value, goal, start)


def some_rows(source: Source, encode: EncodeConfig) -> Part:
    """Every tenth row of the matrices, but enough of them; without the correction of the drift."""
    heights = {name: len(source.block(0).params[name]) for name in MATRICES}
    chosen = {name: np.arange(0, n, max(1, min(SHARE, n // _FEWEST))) for name, n in heights.items()}
    return Part(source, part_of(source, chosen, encode))
