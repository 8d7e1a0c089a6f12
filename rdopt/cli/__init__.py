"""Room `cli`: thin commands; each parses, calls one function and prints."""

from rdopt.cli.main import main, run

__all__ = ["main", "run"]
