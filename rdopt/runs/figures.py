"""Figures as JSON: what commands and scripts write beside what they print."""

import json
import math
from pathlib import Path
from typing import Any

from rdopt.checkpoint.atomic import new_file


def dumps(value: Any) -> str:
    """JSON text with a final newline; null stands for nan, which JSON does not know."""
    return json.dumps(_without_nan(value), indent=2, allow_nan=False) + "\n"


def write_figures(path: Path, value: Any) -> None:
    """Writes figures as a new JSON file.

    Raises:
        UserError: the file exists or cannot be written.
    """
    with new_file(path) as part:
        part.write_text(dumps(value), encoding="utf-8")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
