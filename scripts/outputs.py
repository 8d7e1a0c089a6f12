"""What the scripts share: exit codes, new JSON files and new pictures of column width, never over old ones."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

from rdopt.checkpoint.atomic import new_file
from rdopt.config.errors import UserError
from rdopt.runs.figures import dumps

WIDTH = 3.4  # inches, of a column


def exit_code(run: Callable[[Any], None], arguments: Any) -> int:
    """Runs a script; 0, or 2 after a sentence on standard error."""
    try:
        run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def check_new(paths: Iterable[Path | None]) -> None:
    """Refuses to begin what could not be written in the end.

    Raises:
        UserError: one of the files exists.
    """
    for path in paths:
        if path is not None and path.exists():
            raise UserError(f"{path} exists already: remove it or choose another file.")


def write_json(path: Path | None, found: Any) -> None:
    """A new JSON file, or nothing without a path."""
    if path is not None:
        with new_file(path) as part:
            part.write_text(dumps(found), encoding="utf-8")


def save_picture(path: Path | None, draw: Callable[[Any], None], height: float) -> None:
    """A new PNG of column width, or nothing without a path.

    Args:
        path: of the picture.
        draw: draws into an empty matplotlib figure.
        height: inches.
    """
    if path is None:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"font.size": 7, "axes.spines.top": False, "axes.spines.right": False}):
        fig = plt.figure(figsize=(WIDTH, height), dpi=250, layout="constrained")
        draw(fig)
        with new_file(path) as part:
            fig.savefig(part, format="png")
        plt.close(fig)
