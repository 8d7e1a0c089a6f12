"""Several processes that train as one: how they find each other, and what process 0 broadcasts.

Process 0 alone reads the model and the text and writes the run. What it computes reaches the others as bytes (float64
too, which JAX would round on the way to a device), so that all of them start from the same numbers to the last bit.
"""

import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import UInt8

from rdopt.config.errors import UserError

T = TypeVar("T")
Broadcast = Callable[[Any], None]
AUTO = "auto"
# Exit code of a process that another one left alone.
LOST = 3
# Bytes of one message: its copies have to fit into a device's memory beside each other.
_PIECE = 2**28


class _Stopped(NamedTuple):
    """Broadcast instead of a value when process 0 stops."""

    sentence: str
    interrupted: bool


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Makes this process one of several; to be called before JAX computes anything. Nothing given: it stays alone.

    Args:
        coordinator: HOST:PORT where process 0 listens, or "auto" on SLURM and TPU pods, which know all of this.
        processes: how many there are.
        process: which of them this one is, from 0.

    Raises:
        UserError: an incomplete or impossible place, or "auto" where nothing is known.
    """
    if coordinator is None and processes is None and process is None:
        return
    _require_place(coordinator, processes, process)
    # Its handler would keep SIGTERM from ending a process; a killed run resumes without it.
    jax.config.update("jax_enable_preemption_service", False)
    if coordinator != AUTO:
        jax.distributed.initialize(coordinator, processes, process)
        return
    try:
        jax.distributed.initialize()
    except ValueError as error:
        raise UserError(
            f"--coordinator is auto, but no cluster was found ({error}); name HOST:PORT, --processes and --process."
        ) from error


def _require_place(coordinator: str | None, processes: int | None, process: int | None) -> None:
    if coordinator == AUTO:
        if processes is not None or process is not None:
            raise UserError("--coordinator auto finds --processes and --process by itself; leave them out.")
        return
    host, _, port = (coordinator or "").rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator is {coordinator}, but several processes need HOST:PORT of process 0, or auto.")
    if processes is None or process is None:
        raise UserError(f"--coordinator {coordinator} needs --processes N and --process I too.")
    if not 0 <= process < processes:
        raise UserError(f"--process is {process}, but {processes} processes are numbered 0 to {processes - 1}.")


def is_primary() -> bool:
    """Whether this is process 0, which alone reads input, writes files and speaks."""
    return jax.process_index() == 0


@contextmanager
def abort_on_error() -> Iterator[None]:
    """Ends this process at once on an error that the others do not have, such as the loss of one of them.

    An orderly end would wait for the others, who wait for this one in a step.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if jax.process_count() == 1:
            raise
        what = f"process {jax.process_index()} of {jax.process_count()} cannot go on: {error!r}"
        print(f"rdopt: error: {what}; start all of them again to go on from the last checkpoint.", file=sys.stderr)
        sys.stderr.flush()
        os._exit(LOST)


@contextmanager
def broadcasting() -> Iterator[Broadcast]:
    """Yields the function by which process 0 answers one `receive` of all others; an error inside is an answer, too."""
    try:
        yield _send
    except BaseException as error:
        sentence = str(error) if isinstance(error, UserError) else f"process 0 stopped: {error!r}"
        _send(_Stopped(sentence, isinstance(error, KeyboardInterrupt)))
        raise


def receive() -> Any:
    """What process 0 broadcasts, in every other process.

    Raises:
        UserError: process 0 stopped with an error.
        KeyboardInterrupt: it was interrupted.
    """
    value = _receive()
    if isinstance(value, _Stopped):
        raise KeyboardInterrupt if value.interrupted else UserError(value.sentence)
    return value


def from_primary(make: Callable[[], T]) -> T:
    """What `make` gives in process 0, where alone it is called, in every process."""
    if not is_primary():
        return receive()
    with broadcasting() as broadcast:
        made = make()
        broadcast(made)
    return made


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; all of them must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def _send(value: Any) -> None:
    if jax.process_count() == 1:
        return
    buffers: list[pickle.PickleBuffer] = []
    body = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    parts = [np.frombuffer(x, np.uint8) for x in (body, *(b.raw() for b in buffers))]
    sizes = np.array([x.size for x in parts], np.int64)
    _spread(np.frombuffer(np.int64(sizes.size).tobytes(), np.uint8))
    for part in (sizes.view(np.uint8), *parts):
        _spread(part)


def _receive() -> Any:
    count = _spread(np.zeros(8, np.uint8)).view(np.int64)[0]
    sizes = _spread(np.zeros(8 * count, np.uint8)).view(np.int64)
    body, *buffers = (_spread(np.zeros(size, np.uint8)) for size in sizes)
    return pickle.loads(body.data, buffers=buffers)


def _spread(data: UInt8[np.ndarray, " n"]) -> UInt8[np.ndarray, " n"]:
    """The bytes of process 0 in every process; elsewhere only the size of `data` counts."""
    out = np.empty_like(data)
    for start in range(0, data.size, _PIECE):
        piece = data[start : start + _PIECE]
        # Every size is a program of its own; powers of two are few.
        padded = np.zeros(1 << (piece.size - 1).bit_length(), np.uint8)
        padded[: piece.size] = piece
        out[start : start + piece.size] = multihost_utils.broadcast_one_to_all(padded)[: piece.size]
    return out
