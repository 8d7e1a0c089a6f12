"""Learning the gauges: Adam on J = R + lam D, one pmapped step over all devices of all processes.

The relaxed weights see the same noise on every device, so that the mean gradient over devices is that of one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

from rdopt.align import devices as pool
from rdopt.align import hosts
from rdopt.align.alignment import Alignment, Start, single_precision, trained_records
from rdopt.align.devices import Device
from rdopt.align.objective import Problem, Settings, rate_and_distortion
from rdopt.align.stored_choice import Choice, choose_stored
from rdopt.align.stored_learning import STORED, StoredSettings, StoredStart, stored_settings, stored_start
from rdopt.config.errors import UserError
from rdopt.config.schema import TrainConfig
from rdopt.runs.interrupt import Interrupt
from rdopt.runs.states import StateStore
from rdopt.transforms.gauges.gauges import Gauges, gauges_of
from rdopt.transforms.records import TransformRecord
from rdopt.transforms.stored.rotations import StoredRotations


class State(NamedTuple):
    """What a killed run needs to go on: parameters, optimizer, random key (the step is the checkpoint's name)."""

    params: Any
    optimizer: Any
    key: jax.Array


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


def optimizer(train: TrainConfig) -> optax.GradientTransformation:
    """Adam with a short warm-up and a cosine schedule to a twentieth.

    The warm-up lets the second moments settle before steep pairs of axes are turned by full steps. eps is near
    the smallest gradients that matter: entries of the skew matrices that J does not feel would otherwise walk
    at full speed on rounding noise.
    """
    peak = train.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(peak / 10, peak, train.steps // 10, train.steps, peak / 20)
    return optax.adam(schedule, b2=0.95, eps=1e-6)


@cache
def _compiled(module: Alignment, settings: Settings, train: TrainConfig, devices: tuple[Any, ...]) -> Callable:
    """The pmapped step; cached, so that points of one sweep share one compilation."""
    adam = optimizer(train)

    def step(state: State, problem: Problem, start: Start, tokens: Any, lam: Any, number: Any) -> Any:
        """One Adam step on J = R + lam D, averaged over devices: the new state and its terms."""
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), number)

        def loss(params: Any) -> tuple[jax.Array, Any]:
            variables: Any = module.apply({"params": params}, start, number / train.steps)
            terms = rate_and_distortion(variables, problem, tokens, lam, key, settings)
            return terms.rate + lam * terms.distortion, terms

        (J, terms), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        J, terms, grads = pool.mean_over_devices((J, terms, grads))
        updates, opt = adam.update(grads, state.optimizer, state.params)
        return State(optax.apply_updates(state.params, updates), opt, state.key), (J, *terms)

    return pool.pmapped(step, devices)


def batch_indices(seed: int, step: int, batch: int, sequences: int) -> Int[np.ndarray, " batch"]:
    """The sequences of one step: walks through seeded permutations, so it depends on nothing but its arguments."""
    positions = np.arange(step * batch, (step + 1) * batch)
    epochs = positions // sequences
    orders = {int(e): np.random.default_rng([seed, int(e)]).permutation(sequences) for e in np.unique(epochs)}
    return np.array([orders[int(e)][p % sequences] for e, p in zip(epochs, positions, strict=True)])


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
    arch = settings.arch
    kept = stored_settings(train)
    module = Alignment(arch=arch, sites=train.sites, rate=train.rate, rotation=train.rotation, stored=kept)
    stored = StoredStart() if kept is None else stored_start(kept, problem.params, arch, start)
    begun = Start(single_precision(start, arch), stored.rotations)
    state = _first_state(module, begun, train)
    begin, state, history = hosts.from_primary(partial(_restored, store, state, train.steps))
    compiled: Any = _compiled
    step = compiled(module, settings, _schedule_only(train), tuple(devices))
    problem_copies, start_copies, lam = pool.replicate((problem, begun, np.float32(train.lam)), devices)
    copies = pool.replicate(state, devices)
    with Interrupt() as interrupt:
        for number, batch in _batches(train, begin, tokens):
            shards, index = pool.split(batch, devices), pool.replicate(np.int32(number), devices)
            copies, out = step(copies, problem_copies, start_copies, shards, lam, index)
            history[number] = pool.first(out)
            _require_finite(float(history[number, 0]), number)
            done = number + 1
            stop = hosts.any_process(interrupt.requested) and done < train.steps
            if store is not None and (stop or done % train.checkpoint_every == 0 or done == train.steps):
                store.save(done, {"state": pool.first(copies), "history": history})
            if report is not None:
                report(Progress(done, train.steps, *map(float, history[number])))
            if stop:
                raise KeyboardInterrupt
    rate, distortion = history[-max(1, train.steps // 10) :, 1:].mean(axis=0)
    trained = pool.first(copies).params
    records = trained_records(trained, start, arch, train.rotation)
    choice = None if kept is None else _choice(kept, stored, trained, records, problem, train.lam, settings)
    return Learned(records, float(rate), float(distortion), choice)


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


def _first_state(module: Alignment, start: Start, train: TrainConfig) -> State:
    """The start: every parameter is zero there (see `transforms.gauges.site`): init is not run but shaped."""
    key = jax.random.key(train.seed)
    shapes: Any = jax.eval_shape(module.init, key, start)
    params: Any = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes.get("params", {}))
    return State(params, optimizer(train).init(params), jax.random.key_data(key))


def _restored(store: StateStore | None, state: State, steps: int) -> tuple[int, State, Float[np.ndarray, "steps 3"]]:
    """(steps done, state, J, R and D of every step) of the newest checkpoint, or of the start."""
    history = np.full((steps, 3), np.nan, np.float32)
    found = None if store is None else store.restore({"state": state, "history": history})
    if found is None:
        return 0, state, history
    return found[0], State(*found[1]["state"]), np.array(found[1]["history"])


def _batches(train: TrainConfig, begin: int, tokens: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for number in range(begin, train.steps):
        chosen = batch_indices(train.seed, number, train.batch_sequences, len(tokens))
        yield number, tokens[chosen]


def _require_finite(J: float, step: int) -> None:
    if not np.isfinite(J):
        raise UserError(
            f"the loss is {J} at step {step}; lower train.learning_rate or raise train.damping and start again."
        )


def _schedule_only(train: TrainConfig) -> TrainConfig:
    """The configuration with everything reset that the compiled step does not read."""
    return TrainConfig(steps=train.steps, learning_rate=train.learning_rate)
