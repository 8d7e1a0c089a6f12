"""The training loop: one pmapped step over the devices of all processes, which a kill or Ctrl-C only pauses.

A checkpoint holds all that the rest of a run depends on, and the batches follow from their number: a run that was
broken off and started again ends in the same bits as one that never was.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import optax
from jaxtyping import Int

from rdopt.align import devices as pool
from rdopt.align import hosts
from rdopt.align.adam import B2
from rdopt.align.devices import Device
from rdopt.config.errors import UserError
from rdopt.runs.interrupt import Interrupt
from rdopt.runs.states import StateStore

R = TypeVar("R")
P = TypeVar("P")


class State(NamedTuple):
    """What a step changes: the parameters, and what the optimizer remembers of their gradients."""

    params: Any
    optimizer: Any


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How often a step is repeated, and on which sequences.

    Attributes:
        steps: how many there are.
        batch_sequences: sequences of a step.
        seed: of their order.
        checkpoint_every: steps from one checkpoint to the next.
    """

    steps: int
    batch_sequences: int
    seed: int
    checkpoint_every: int


def adam(peak: float, steps: int, eps: float) -> optax.GradientTransformation:
    """Adam on `learning_rate`."""
    return optax.adam(learning_rate(peak, steps), b2=B2, eps=eps)


def learning_rate(peak: float, steps: int) -> optax.Schedule:
    """A short warm-up and a cosine to a twentieth of the peak.

    The warm-up lets the second moments settle before the steepest parameters are moved by full steps.
    """
    return optax.warmup_cosine_decay_schedule(peak / 10, peak, steps // 10, steps, peak / 20)


def batch_indices(seed: int, step: int, batch: int, sequences: int) -> Int[np.ndarray, " batch"]:
    """The sequences of one step: walks through seeded permutations, so it depends on nothing but its arguments."""
    positions = np.arange(step * batch, (step + 1) * batch)
    epochs = positions // sequences
    orders = {int(e): np.random.default_rng([seed, int(e)]).permutation(sequences) for e in np.unique(epochs)}
    return np.array([orders[int(e)][p % sequences] for e, p in zip(epochs, positions, strict=True)])


def draws(seed: int, steps: int, count: int, of: int) -> Int[np.ndarray, "steps count"]:
    """Which `count` of `of` things every step draws, rising: walks through seeded permutations, no thing twice a step.

    The draws of a step depend on nothing but the seed and the number of steps before it.
    """
    walk: list[int] = []
    for epoch in range(-(-steps * count // of)):
        order = np.random.default_rng([seed, epoch]).permutation(of).tolist()
        # A step across the border of two epochs takes what it does not have yet.
        begun = walk[len(walk) - len(walk) % count :]
        first = [x for x in order if x not in begun][: -len(begun) % count]
        walk += first + [x for x in order if x not in first]
    return np.sort(np.array(walk[: steps * count]).reshape(steps, count), axis=1)


Feed = Callable[[int], tuple[Any, ...]]  # from a step's number to what it reads beside the constants, on all devices


def batches(tokens: Int[np.ndarray, "sequences length"], schedule: Schedule, devices: Sequence[Device]) -> Feed:
    """Feeds every step its sequences, split over the devices."""

    def feed(number: int) -> tuple[Any, ...]:
        chosen = batch_indices(schedule.seed, number, schedule.batch_sequences, len(tokens))
        return (pool.split(tokens[chosen], devices),)

    return feed


def run_steps(
    step: Callable[..., Any],
    state: State,
    record: R,
    constants: Any,
    feed: Feed,
    schedule: Schedule,
    after: Callable[[int, tuple[float, ...], Callable[[], State], R], tuple[R, P]],
    *,
    devices: Sequence[Device],
    not_finite: str,
    store: StateStore | None = None,
    report: Callable[[P], None] | None = None,
) -> tuple[State, R]:
    """Repeats a step; called alike in every process of the run.

    Args:
        step: of `devices.pmapped`: (state, constants, *fed, number) to (state, figures), the loss the first figure.
        state: the first one.
        record: what else a resumed run needs: a tree of numbers on the host.
        constants: a tree of arrays that no step changes.
        feed: what a step reads; called in order.
        schedule: how many steps there are.
        after: called behind every step with (steps done, figures, how to get the state, record): (record, progress).
        devices: those of all processes; each batch is split over them.
        not_finite: what to tell the user where the loss is not finite; a format of `loss` and `step`.
        store: where checkpoints go; the run resumes from its newest one. Process 0 alone has one.
        report: called behind every step with its progress, when the checkpoint is written.

    Returns:
        the last state, on the host, and record.

    Raises:
        UserError: the loss is not finite, the batch does not divide, or the checkpoint belongs to other input.
        KeyboardInterrupt: after the state was saved.
    """
    begin, state, record = hosts.from_primary(partial(_restored, store, state, record))
    constants, states = pool.replicate(constants, devices), pool.replicate(state, devices)
    current = partial(pool.first, states)
    with Interrupt() as interrupt:
        for number in range(begin, schedule.steps):
            index = pool.replicate(np.int32(number), devices)
            states, figures = step(states, constants, *feed(number), index)
            current, figures = partial(pool.first, states), tuple(map(float, pool.first(figures)))
            if not np.isfinite(figures[0]):
                raise UserError(not_finite.format(loss=figures[0], step=number))
            done = number + 1
            record, progress = after(done, figures, current, record)
            # All processes stop behind the same step, or the next one would wait for those that did.
            stop = hosts.any_process(interrupt.requested) and done < schedule.steps
            if store is not None and (stop or done % schedule.checkpoint_every == 0 or done == schedule.steps):
                store.save(done, {"state": current(), "record": record})
            if report is not None:
                report(progress)
            if stop:
                raise KeyboardInterrupt
    return current(), record


def _restored(store: StateStore | None, state: State, record: R) -> tuple[int, State, R]:
    """(steps done, state, record) of the newest checkpoint, or of the start."""
    template = {"state": state, "record": record}
    checkpoint = None if store is None else store.restore(template)
    if checkpoint is None:
        return 0, state, record
    done, tree = checkpoint
    # Orbax gives tuples back as lists in some places: the template knows what they were.
    restored = jax.tree.unflatten(jax.tree.structure(template), jax.tree.leaves(tree))
    return done, restored["state"], restored["record"]
