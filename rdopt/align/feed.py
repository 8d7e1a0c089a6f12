"""What training steps read of a model: the blocks drawn for them, and the original's streams before those blocks.

Process 0 reads, the blocks of the next step while a step is computed, and tells the other processes.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from rdopt.align import devices as pool
from rdopt.align import hosts
from rdopt.align.devices import Device
from rdopt.align.loop import batch_indices, draws
from rdopt.align.objective import BlockProblem, Settings
from rdopt.align.problem import Problem
from rdopt.checkpoint.families import Architecture, coded_weights
from rdopt.checkpoint.spill import Spill
from rdopt.config.errors import UserError
from rdopt.config.schema import TrainConfig
from rdopt.operator.blockwise import streams
from rdopt.operator.params import map_params

# Where a configuration does not say how many blocks a step draws: so many, of wide ones fewer.
DRAWN = 8
DRAWN_WEIGHTS = 2**27
_SHARE = 4  # of the budget goes to streams


def drawn_blocks(train: TrainConfig, arch: Architecture) -> int:
    """How many blocks a step draws.

    Raises:
        UserError: some of them for a distortion that needs all.
    """
    layers, count = arch.num_layers, train.blocks
    if train.distortion == "model":
        if count is not None and count < layers:
            raise UserError(
                f"train.blocks is {count}, but train.distortion model runs all {layers} blocks in every step; leave "
                "train.blocks out, or measure the distortion by matrix or block."
            )
        return layers
    if count is None:
        count = min(DRAWN, max(1, DRAWN_WEIGHTS * layers // coded_weights(arch)))
    return min(count, layers)


class Drawn(NamedTuple):
    """The blocks of a step: which they are, rising, and what training reads of them, stacked."""

    layers: Any
    blocks: BlockProblem


class Streams:
    """The original's residual streams on all calibration sequences, within a budget and behind it on disk.

    Args:
        problem: the model.
        tokens: the sequences.
        settings: the type of the activations; which streams the distortion reads (see `objective.Text`).
        batch: sequences on the device at once.
    """

    def __init__(
        self, problem: Problem, tokens: Int[np.ndarray, "sequences length"], settings: Settings, batch: int
    ) -> None:
        layers, subject = settings.arch.num_layers, problem.plain.subject
        self._ends = (0, layers) if settings.distortion == "model" else None
        self._spill = Spill(problem.cache.budget // _SHARE)
        params = map_params(lambda x: np.asarray(x).astype(jnp.dtype(settings.activations)), subject.params)
        for layer, x in enumerate(streams(params, tokens, subject.arch, batch)):
            if layer in (self._ends or range(layers)):
                self._spill.keep(layer, x)

    def read(self, layers: Sequence[int], sequences: Int[np.ndarray, " batch"]) -> Float[np.ndarray, "batch k T d"]:
        """Those of some sequences before some blocks."""
        return np.stack([self._spill.rows(layer, sequences) for layer in self._ends or layers], axis=1)


class Feed:
    """Feeds `loop.run_steps`: from a step's number to (`Drawn` on every device, its streams split over them or None).

    Args:
        problem: the model. Process 0 alone has it.
        settings: static choices.
        tokens: calibration sequences.
        train: the seed of the draws, how many blocks a step draws, how many steps there are.
        devices: those of all processes.
        thread: reads ahead.
    """

    def __init__(
        self,
        problem: Problem | None,
        settings: Settings,
        tokens: Int[np.ndarray, "sequences length"],
        train: TrainConfig,
        devices: Sequence[Device],
        thread: ThreadPoolExecutor,
    ) -> None:
        self._problem, self._train, self._devices, self._thread = problem, train, devices, thread
        self._draws = draws(train.seed, train.steps, drawn_blocks(train, settings.arch), settings.arch.num_layers)
        self._sequences, self._runs = len(tokens), settings.distortion != "matrix"
        self._reading: dict[tuple[int, ...], Future[BlockProblem]] = {}
        self._layers: tuple[int, ...] = ()
        self._drawn: Any = None
        self._streams: Streams | None = None

        def run() -> None:
            self._streams = Streams(_here(problem), tokens, settings, train.batch_sequences)

        if self._runs:
            hosts.from_primary(run)

    def __call__(self, number: int) -> tuple[Any, Any]:
        layers = self._of(number)
        if layers != self._layers:
            self._layers, self._drawn = layers, None  # the blocks of the step before make room
            blocks = hosts.from_primary(lambda: self._read(number))
            self._drawn = pool.replicate(Drawn(np.array(layers), blocks), self._devices)
        return self._drawn, self._text(number) if self._runs else None

    def _of(self, number: int) -> tuple[int, ...]:
        return tuple(self._draws[number].tolist())

    def _read(self, number: int) -> BlockProblem:
        """The blocks of a step; those of the next one are begun."""
        problem, layers = _here(self._problem), self._of(number)
        begun = self._reading.pop(layers, None)
        blocks = problem.some(layers) if begun is None else begun.result()
        if number + 1 < len(self._draws) and (following := self._of(number + 1)) != layers:
            self._reading = {following: self._thread.submit(problem.some, following)}
        return blocks

    def _text(self, number: int) -> Any:
        chosen = batch_indices(self._train.seed, number, self._train.batch_sequences, self._sequences)

        def read() -> Float[np.ndarray, "batch k T d"]:
            assert self._streams is not None
            return self._streams.read(self._layers, chosen)

        return pool.split(hosts.from_primary(read), self._devices)


def _here(problem: Problem | None) -> Problem:
    """The model, in process 0."""
    assert problem is not None
    return problem
