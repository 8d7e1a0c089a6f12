"""The hypotheses of the manifold in an analysis: W ~ W0 + J theta along the checkpoints of the model's own training.

Unlike the rest of an analysis this holds the model and all its checkpoints in memory.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rdopt.calibration.subject import Corpus, Subject, load_subject
from rdopt.config.errors import UserError
from rdopt.config.progress import Say
from rdopt.config.schema import Config
from rdopt.runs.export import reference_of
from rdopt.study.analyze.predictions import as_row
from rdopt.study.manifold.manifold import tangent
from rdopt.study.manifold.tangent import DRAWS, PREDICTIONS, SIZES, dimension_estimates, dimensions_of, harm_estimates
from rdopt.study.manifold.trajectory import Trajectory, directions, measure_harm, read_trajectory

MAX_TOKENS = 8192  # of the test text; every draw runs 18 networks over them


class Run(NamedTuple):
    """A trained model and the checkpoints that led to it."""

    subject: Subject
    trajectory: Trajectory


def open_run_of(steps: Path, config: Config) -> Run:
    """Reads the checkpoints of a model's training; see `read_trajectory` for what is refused."""
    subject = load_subject(config.model)
    return Run(subject, read_trajectory(steps, subject))


def judge_trajectory(run: Run, config: Config, corpus: Corpus, say: Say) -> list[dict[str, Any]]:
    """The rows of the predictions about a training run.

    Args:
        run: of `open_run_of`.
        config: its text's seed draws the noise; at most MAX_TOKENS of its test windows are used.
        corpus: the text.
        say: called with a line a draw.

    Raises:
        UserError: checkpoints that span nothing.
    """
    short = replace(config.evaluate, max_tokens=min(config.evaluate.max_tokens, MAX_TOKENS))
    reference = reference_of(run.subject, corpus, replace(config, evaluate=short))
    try:
        J = tangent(run.trajectory.points).J
        noise = directions(J, run.trajectory, config.text.seed, DRAWS)
        found = dimension_estimates(dimensions_of(run.trajectory, config.text.seed))
        harm = measure_harm(reference, run.subject, noise, SIZES,
                            lambda done: say(f"noise along the run's tangent and across it: draw {done} of {DRAWS}"))
    except ValueError as error:
        raise UserError(f"the checkpoints cannot be studied: {error}; name others with --trajectory.") from error
    found |= harm_estimates(harm)
    return [as_row(name, p.claim, f"{len(run.trajectory.names)} checkpoints", p.sign, found[name])
            for name, p in PREDICTIONS.items()]
