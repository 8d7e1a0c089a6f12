"""Tied embeddings: untie them for the sake of the stream's rotation, or keep the tie, whichever takes fewer bits.

Rotating the residual stream folds the final gain into the head alone, so that the file needs a second table. What the
rotation saves in the matrices has to pay for it.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from rdopt.calibration.subject import Subject
from rdopt.checkpoint.families import coded_weights
from rdopt.config.schema import Config, TrainConfig
from rdopt.transforms.gauges.coordinates import Gauges
from rdopt.transforms.gauges.registry import SITES

UNTYING = frozenset(site.name for site in SITES if site.unties)
TABLE_BITS = 16.0  # of an entry of an uncoded table


class Tie(NamedTuple):
    """Both ways in bits of the whole file at equal slope: bits of the matrices + lambda D as bits, + second table."""

    keep: float
    untie: float

    @property
    def sentence(self) -> str:
        """The comparison for a report."""
        better = "keeping the tie" if self.keep <= self.untie else "untying"
        return (
            f"tied embeddings: untied and rotated {self.untie / 8e6:.3f} MB, tie kept {self.keep / 8e6:.3f} MB "
            f"(matrices with lambda times their loss, and the second table): {better} takes less"
        )


def weigh_tie(
    subject: Subject, start: Gauges, cost: Callable[[Gauges], float], table_bits: float = TABLE_BITS
) -> Tie:
    """Total bits of both ways in the starting coordinates.

    Args:
        subject: the model.
        start: the coordinates.
        cost: J of coordinates in bits/weight.
        table_bits: of an entry of the second table.
    """
    weights = coded_weights(subject.arch)
    table = table_bits * subject.arch.vocab_size * subject.arch.hidden_size
    return Tie(weights * cost(start.tied()), weights * cost(start) + table)


def settle_tie(
    subject: Subject, config: Config, start: Gauges, cost: Callable[[Gauges], float]
) -> tuple[TrainConfig, Gauges, Tie | None]:
    """(training and start that follow from `train.tie`, the comparison where there was a tie to weigh).

    A coded second table is taken to cost as many bits an entry as the matrices do.
    """
    train = config.train
    if not subject.arch.tied or not (start.unties or UNTYING & set(train.sites)):
        return train, start, None
    entry = TABLE_BITS if config.encode.embeddings == "16bit" else cost(start)
    tie = weigh_tie(subject, start, cost, entry)
    if train.tie == "untie" or (train.tie == "auto" and tie.untie < tie.keep):
        return train, start, tie
    sites = tuple(site for site in train.sites if site not in UNTYING)
    return replace(train, sites=sites), start.tied(), tie
