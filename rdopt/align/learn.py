"""Learning the gauges: Adam on J = R + lam D, one pmapped step over all devices of all processes.

J is a sum over blocks: a step draws some of them and touches no others. What belongs to a block is learned by that
block alone; what all blocks share, by a gradient that is J's in the mean over draws. The relaxed weights see the same
noise on every device, so that the mean gradient over devices is that of one.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from rdopt.align import devices as pool
from rdopt.align import hosts
from rdopt.align.adam import Memory, adam_step, first_memory
from rdopt.align.alignment import Alignment, Start, single_precision, trained_records
from rdopt.align.devices import Device
from rdopt.align.feed import Drawn, Feed, drawn_blocks
from rdopt.align.loop import Schedule, State, run_steps
from rdopt.align.loop import learning_rate as learning_rate_at
from rdopt.align.objective import Settings, Text, rate_and_distortion
from rdopt.align.problem import Problem
from rdopt.align.stored_choice import Choice, choose_stored
from rdopt.align.stored_learning import STORED, StoredSettings, StoredStart, stored_settings, stored_start
from rdopt.checkpoint.families import Architecture
from rdopt.config.schema import TrainConfig
from rdopt.operator.params import Params
from rdopt.runs.states import StateStore
from rdopt.transforms.gauges.coordinates import Gauges, gauges_of
from rdopt.transforms.gauges.registry import SITES
from rdopt.transforms.records import TransformRecord
from rdopt.transforms.stored.rotations import StoredRotations

_NOT_FINITE = "the loss is {loss} at step {step}; lower train.learning_rate or raise train.damping and start again."
_SHARED = frozenset(site.name for site in SITES if site.shared)


class Progress(NamedTuple):
    """One step's numbers: J in bits/weight, R in bits/weight, D in nats/token."""

    step: int
    steps: int
    J: float
    rate: float
    distortion: float

    def __str__(self) -> str:
        return (
            f"step {self.step} of {self.steps}  J {self.J:.4f}  R {self.rate:.4f} bits/weight  "
            f"D {self.distortion:.5f} nats/token"
        )


class Constants(NamedTuple):
    """What a step reads and does not change; the random key as its data."""

    start: Start
    ends: Any
    lam: Any
    seed: Any


class Memories(NamedTuple):
    """What Adam remembers of what all blocks share, and of what is each block's own."""

    shared: Memory
    own: Memory


class Learned(NamedTuple):
    """The result: records by site, the last steps' mean R (bits/weight) and D (nats/token), stored rotations."""

    records: dict[str, TransformRecord]
    rate: float
    distortion: float
    choice: Choice | None = None

    @property
    def gauges(self) -> Gauges:
        """The symmetries, float64."""
        return gauges_of(self.records)

    @property
    def stored(self) -> StoredRotations | None:
        """The rotations that the file keeps, if any."""
        return None if self.choice is None else self.choice.stored


@cache
def compiled_step(
    module: Alignment, settings: Settings, steps: int, learning_rate: float, devices: tuple[Device, ...]
) -> Callable[..., Any]:
    """The pmapped step of a run; cached, so that points of one sweep share one compilation.

    `module` is of a model with as many blocks as a step draws.
    """
    rate_at: Any = learning_rate_at(learning_rate, steps)
    arch = settings.arch
    # J of the drawn blocks times this is J of the model in the mean over draws.
    weight = arch.num_layers / module.arch.num_layers

    def step(state: State, constants: Constants, drawn: Drawn, streams: Any, number: Any) -> tuple[State, Any]:
        """One Adam step on J = R + lam D, averaged over devices: the new state, and J, R and D before it."""
        start, ends, lam, seed = constants
        layers: Any = drawn.layers if weight > 1 else slice(None)
        key = jax.random.fold_in(jax.random.wrap_key_data(seed), number)
        keys, begun = jax.random.split(key, arch.num_layers)[layers], start.drawn(layers, arch)
        shared, every = _shared_and_own(state.params)
        own = jax.tree.map(lambda x: x[layers], every)

        def loss(params: Any) -> tuple[jax.Array, Any]:
            variables: Any = module.apply({"params": params}, begun, number / steps)
            terms = rate_and_distortion(variables, drawn.blocks, Text(streams, ends), lam, keys, settings)
            terms = jax.tree.map(lambda x: weight * x, terms)
            return terms.rate + lam * terms.distortion, terms

        (J, terms), grads = jax.value_and_grad(loss, has_aux=True)({**shared, **own})
        J, terms, grads = pool.mean_over_devices((J, terms, grads))
        slopes, own_slopes = _shared_and_own(grads)
        own_slopes = jax.tree.map(lambda x: x / weight, own_slopes)
        memory, rate = state.optimizer, rate_at(number)
        some = jax.tree.map(lambda x: x[layers], memory.own)
        shared, shared_memory = adam_step(shared, slopes, memory.shared, rate)
        moved = adam_step(own, own_slopes, some, rate)
        every, own_memory = jax.tree.map(lambda x, new: x.at[layers].set(new), (every, memory.own), moved)
        return State({**shared, **every}, Memories(shared_memory, own_memory)), (J, *terms)

    return pool.pmapped(step, devices)


def learn(
    problem: Problem | None,
    settings: Settings,
    tokens: Int[np.ndarray, "sequences length"],
    start: Gauges,
    train: TrainConfig,
    *,
    devices: Sequence[Device],
    store: StateStore | None = None,
    report: Callable[[Progress], None] | None = None,
) -> Learned:
    """Learns the gauges from a starting basis.

    Args:
        problem: model and moments. Process 0 alone has them.
        settings: static choices (made from the same configuration).
        tokens: calibration sequences.
        start: the basis that is rotated; float64.
        train: lambda, steps, learning rate, seed, how many blocks a step draws.
        devices: those of all processes; the batch is split over them.
        store: where checkpoints go; training resumes from its newest one. Process 0 alone has one.
        report: called after every step.

    Returns:
        the records of the learned transforms, and the mean R and D of the last tenth of the steps, or of as many as
        draw all blocks; in process 0 which stored rotations are kept.

    Raises:
        UserError: the loss is not finite, the batch does not divide, the distortion needs more blocks than a step
            draws, or the checkpoint belongs to other input.
        KeyboardInterrupt: after the state was saved.
    """
    arch, kept, count = settings.arch, stored_settings(train), drawn_blocks(train, settings.arch)
    pool.require_share(train.batch_sequences, devices)
    stored, ends = hosts.from_primary(lambda: _from_weights(problem, kept, start, train))
    begun = Start(single_precision(start, arch, train.sites), stored.rotations)
    whole = Alignment(arch=arch, sites=train.sites, rate=train.rate, rotation=train.rotation, stored=kept)
    compiled: Any = compiled_step  # Flax modules are hashable, which their type does not say
    drawn = whole.clone(arch=replace(arch, num_layers=count))
    step = compiled(drawn, settings, train.steps, train.learning_rate, tuple(devices))
    params, key = _first_params(whole, begun, train.seed)
    with ThreadPoolExecutor(1) as thread:
        state, history = run_steps(
            step,
            State(params, first_memories(params, arch)),
            np.full((train.steps, 3), np.nan, np.float32),
            Constants(begun, ends, np.float32(train.lam), jax.random.key_data(key)),
            Feed(problem, settings, tokens, train, devices, thread),
            _schedule(train),
            _recorded,
            devices=devices, not_finite=_NOT_FINITE, store=store, report=report,
        )
    last = max(train.steps // 10, -(-arch.num_layers // count))
    rate, distortion = history[-last:, 1:].mean(axis=0)
    records = trained_records(state.params, start, arch, train.rotation)
    choice = None
    if kept is not None and problem is not None:
        choice = _choice(kept, stored, state.params, records, problem, train.lam, settings)
    return Learned(records, float(rate), float(distortion), choice)


def _recorded(done: int, figures: Sequence[float], _: Any, history: np.ndarray) -> tuple[np.ndarray, Progress]:
    """The history with the figures of one more step, and the progress."""
    history = np.array(history)
    history[done - 1] = figures
    return history, Progress(done, len(history), *figures)


def _from_weights(
    problem: Problem | None, kept: StoredSettings | None, start: Gauges, train: TrainConfig
) -> tuple[StoredStart, Params | None]:
    """(where stored rotations start, what makes predictions if the distortion reads them), in process 0."""
    assert problem is not None
    stored = StoredStart()
    if kept is not None:
        stored = stored_start(kept, (block.params for block in problem.blocks()), problem.plain.arch, start)
    return stored, problem.ends if train.distortion == "model" else None


def first_memories(params: Mapping[str, Any], arch: Architecture) -> Memories:
    """Adam's before the first step."""
    shared, own = _shared_and_own(params)
    return Memories(first_memory(shared), first_memory(own, arch.num_layers))


def _shared_and_own(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters that all blocks share, and those with a leading layer axis."""
    return {k: x for k, x in params.items() if k in _SHARED}, {k: x for k, x in params.items() if k not in _SHARED}


def _schedule(train: TrainConfig) -> Schedule:
    return Schedule(
        steps=train.steps,
        batch_sequences=train.batch_sequences,
        seed=train.seed,
        checkpoint_every=train.checkpoint_every,
    )


def _choice(
    chosen: StoredSettings,
    start: StoredStart,
    trained: Mapping[str, Any],
    records: Mapping[str, TransformRecord],
    problem: Problem,
    lam: float,
    settings: Settings,
) -> Choice:
    """Which of the trained rotations the file keeps."""
    gauges = single_precision(gauges_of(records), settings.arch)
    theta = {k: x for k, x in trained.items() if k.startswith(STORED)}
    return choose_stored(chosen, start, theta, gauges, problem, lam, settings)


def _first_params(module: Alignment, start: Start, seed: int) -> tuple[Any, jax.Array]:
    """(parameters, key). Every parameter starts at zero (see `transforms.gauges.site`), so init only shapes."""
    key = jax.random.key(seed)
    shapes: Any = jax.eval_shape(module.init, key, start)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes.get("params", {})), key
