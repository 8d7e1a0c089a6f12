"""Learning the gauges: Adam on J = R + lam D, one pmapped step over all devices of all processes.

The relaxed weights see the same noise on every device, so that the mean gradient over devices is that of one.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Int

from rdopt.align import devices as pool
from rdopt.align.alignment import Alignment, Start, single_precision, trained_records
from rdopt.align.devices import Device
from rdopt.align.loop import Schedule, State, adam, run_steps
from rdopt.align.objective import Problem, Settings, rate_and_distortion
from rdopt.align.stored_choice import Choice, choose_stored
from rdopt.align.stored_learning import STORED, StoredSettings, StoredStart, stored_settings, stored_start
from rdopt.config.schema import TrainConfig
from rdopt.runs.states import StateStore
from rdopt.transforms.gauges.coordinates import Gauges, gauges_of
from rdopt.transforms.records import TransformRecord
from rdopt.transforms.stored.rotations import StoredRotations

_NOT_FINITE = "the loss is {loss} at step {step}; lower train.learning_rate or raise train.damping and start again."


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

    problem: Problem
    start: Start
    lam: Any
    seed: Any


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
) -> tuple[optax.GradientTransformation, Callable[..., Any]]:
    """(optimizer, pmapped step) of a run; cached, so that points of one sweep share one compilation."""
    optimizer = adam(learning_rate, steps, eps=1e-6)

    def step(state: State, constants: Constants, tokens: Any, number: Any) -> tuple[State, tuple[Any, ...]]:
        """One Adam step on J = R + lam D, averaged over devices: the new state, and J, R and D before it."""
        problem, start, lam, seed = constants
        key = jax.random.fold_in(jax.random.wrap_key_data(seed), number)

        def loss(params: Any) -> tuple[jax.Array, Any]:
            variables: Any = module.apply({"params": params}, start, number / steps)
            terms = rate_and_distortion(variables, problem, tokens, lam, key, settings)
            return terms.rate + lam * terms.distortion, terms

        (J, terms), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        J, terms, grads = pool.mean_over_devices((J, terms, grads))
        updates, moments = optimizer.update(grads, state.optimizer, state.params)
        return State(optax.apply_updates(state.params, updates), moments), (J, *terms)

    return optimizer, pool.pmapped(step, devices)


def learn(
    problem: Problem,
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
        problem: gain-folded model and moments, float32.
        settings: static choices (made from the same configuration).
        tokens: calibration sequences.
        start: the basis that is rotated; float64.
        train: lambda, steps, learning rate, seed.
        devices: those of all processes; the batch is split over them.
        store: where checkpoints go; training resumes from its newest one. Process 0 alone has one.
        report: called after every step.

    Returns:
        the records of the learned transforms and the mean R and D of the last tenth of the steps.

    Raises:
        UserError: the loss is not finite, the batch does not divide, or the checkpoint belongs to other input.
        KeyboardInterrupt: after the state was saved.
    """
    arch, kept = settings.arch, stored_settings(train)
    module = Alignment(arch=arch, sites=train.sites, rate=train.rate, rotation=train.rotation, stored=kept)
    stored = StoredStart() if kept is None else stored_start(kept, problem.params, arch, start)
    begun = Start(single_precision(start, arch), stored.rotations)
    compiled: Any = compiled_step  # Flax modules are hashable, which their type does not say
    optimizer, step = compiled(module, settings, train.steps, train.learning_rate, tuple(devices))
    params, key = _first_params(module, begun, train.seed)

    def after(done: int, figures: Sequence[float], _: Any, history: np.ndarray) -> tuple[np.ndarray, Progress]:
        history = np.array(history)
        history[done - 1] = figures
        return history, Progress(done, train.steps, *figures)

    state, history = run_steps(
        step,
        State(params, optimizer.init(params)),
        np.full((train.steps, 3), np.nan, np.float32),
        Constants(problem, begun, np.float32(train.lam), jax.random.key_data(key)),
        tokens,
        _schedule(train),
        after,
        devices=devices,
        not_finite=_NOT_FINITE,
        store=store,
        report=report,
    )
    rate, distortion = history[-max(1, train.steps // 10) :, 1:].mean(axis=0)
    records = trained_records(state.params, start, arch, train.rotation)
    choice = None if kept is None else _choice(kept, stored, state.params, records, problem, train.lam, settings)
    return Learned(records, float(rate), float(distortion), choice)


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
