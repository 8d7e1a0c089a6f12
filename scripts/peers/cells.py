"""Finished cells of a comparison on disk: one JSON file each, so that a broken run goes on where it stopped."""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peers.report import Cell
from rdopt.config.errors import UserError


class ForeignCellError(UserError):
    """A cell of another model, text or evaluation lies where one of this table belongs."""


@dataclass(frozen=True, kw_only=True)
class Cells:
    """The cells of one model.

    Attributes:
        folder: where they lie.
        model: its name, the beginning of their names.
        key: fingerprint of model, text and evaluation.
    """

    folder: Path
    model: str
    key: str

    def remembered(self, label: str, begin: Mapping, work: Callable[[], Mapping]) -> Cell:
        """The cell of this label; measured when it is not there or was measured with other settings.

        Args:
            label: its name.
            begin: what identifies it, JSON values.
            work: measures the rest.

        Raises:
            ForeignCellError: the cell belongs to another model, text or evaluation.
        """
        path, begin = self.folder / f"{self.model}--{label}.json", json.loads(json.dumps(begin))
        if path.is_file():
            cell = json.loads(path.read_text(encoding="utf-8"))
            if cell["key"] != self.key:
                raise ForeignCellError(
                    f"{path} was measured on another model, text or evaluation; choose another --cells folder."
                )
            if all(cell.get(name) == value for name, value in begin.items()):
                return cell
        start = time.perf_counter()
        cell = {"key": self.key, "model": self.model, **begin, **work()}
        cell["seconds"] = round(time.perf_counter() - start, 2)
        part = path.with_suffix(f".partial-{os.getpid()}")
        part.write_text(json.dumps(cell), encoding="utf-8")
        part.replace(path)
        return cell


@dataclass(kw_only=True)
class Clock:
    """How long the rest of a table takes, from the cells so far.

    Attributes:
        plan: (arm, size of its model) of every cell of the table, in order; seconds are taken to grow with the size.
        now: reads a clock in seconds.
    """

    plan: Sequence[tuple[str, float]]
    now: Callable[[], float] = time.perf_counter
    _done: int = 0
    _rates: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._last = self.now()

    def tick(self, remembered_seconds: float) -> float:
        """Seconds left after one more cell.

        Args:
            remembered_seconds: what the cell says it took; it took more when settings were tuned before it.
        """
        arm, size = self.plan[self._done]
        seconds = max(self.now() - self._last, remembered_seconds)
        self._last, self._done = self.now(), self._done + 1
        self._rates.setdefault(arm, []).append(seconds / size)
        means = {name: sum(rates) / len(rates) for name, rates in self._rates.items()}
        usual = sum(means.values()) / len(means)
        return sum(size * means.get(arm, usual) for arm, size in self.plan[self._done :])


def minutes(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
