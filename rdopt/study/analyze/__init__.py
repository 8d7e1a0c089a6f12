"""`rdopt analyze`: one model in several coordinate systems, and what that says about the project's hypotheses."""

from rdopt.study.analyze.report import report_lines
from rdopt.study.analyze.run import analyze

__all__ = ["analyze", "report_lines"]
