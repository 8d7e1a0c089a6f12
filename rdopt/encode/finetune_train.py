"""The training loop of finetuning: Adam on KL, one pmapped step over all local devices, resumable.

The values with the smallest KL on the selection text are kept, so that more steps than the text can feed do no harm.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from rdopt.align import devices as pool
from rdopt.align.devices import Device
from rdopt.align.learn import batch_indices
from rdopt.checkpoint.families import Architecture
from rdopt.config.errors import UserError
from rdopt.encode.finetune_model import Trained, divergence, student
from rdopt.operator.params import Params
from rdopt.runs.interrupt import Interrupt
from rdopt.runs.states import StateStore

CHECKS = 4
# Without stored rotations a column gain of down is a row gain of up: leaving it out saves bits at the same KL. The
# norms could take over the columns of v and gate as well, but then 120 steps came 0.4 % less far.
REDUNDANT_COLUMNS = ("down",)


class Rates(NamedTuple):
    """Adam's largest step of each kind; a kind with rate 0 stays as it is.

    Attributes:
        rows: of log2 row gains.
        cols: of log2 column gains.
        norms: of log2 norm gains.
        biases: of biases, in root mean squares of a bias over all layers.
    """

    rows: float = 0.004
    cols: float = 0.004
    norms: float = 0.004
    biases: float = 0.004


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """How a decoded model is finetuned.

    Attributes:
        steps: of Adam, at least 1.
        lam: bits/weight per nat/token; prices the gains' bits when their precision is chosen.
        batch_sequences: calibration sequences in a step.
        rates: step sizes.
        seed: order of the sequences.
        checkpoint_every: steps between two checkpoints.
    """

    steps: int
    lam: float
    batch_sequences: int = 8
    rates: Rates = field(default_factory=Rates)
    seed: int = 0
    checkpoint_every: int = 20


class Pupil(NamedTuple):
    """A decoded model and the original that it learns from.

    Attributes:
        params: the decoded model.
        arch: its architecture.
        teacher: the original.
        teacher_arch: its architecture.
        fixed: matrices whose column gains stay as they are.
    """

    params: Params
    arch: Architecture
    teacher: Params
    teacher_arch: Architecture
    fixed: tuple[str, ...] = REDUNDANT_COLUMNS


class State(NamedTuple):
    """What a step changes."""

    trained: Trained
    optimizer: Any


class Best(NamedTuple):
    """The values with the smallest KL on the selection text so far, and that KL in nats/token."""

    trained: Trained
    kl: Float[Array, ""] | Float[np.ndarray, ""] | np.floating


class FinetuneProgress(NamedTuple):
    """One step: KL of its batch before the step, and on the selection text where it was measured."""

    step: int
    steps: int
    kl: float
    selection: float | None

    def __str__(self) -> str:
        measured = "" if self.selection is None else f"  KL on selection text {self.selection:.5f}"
        return f"step {self.step} of {self.steps}  KL {self.kl:.5f} nats/token{measured}"


def optimizer(steps: int) -> optax.GradientTransformation:
    """Adam of unit rate with a short warm-up and a cosine schedule to a twentieth."""
    schedule = optax.warmup_cosine_decay_schedule(0.1, 1.0, steps // 10, max(steps, 1), 0.05)
    return optax.adam(schedule, b2=0.95, eps=1e-10)


def scales(rates: Rates, start: Trained, fixed: Sequence[str]) -> Trained:
    """The rate of every parameter: that of its kind, times the size of the bias for biases, 0 where fixed."""
    found = {kind: dict.fromkeys(parts, np.float32(getattr(rates, kind))) for kind, parts in start.items()}
    for name, bias in start["biases"].items():
        found["biases"][name] *= np.sqrt(np.mean(bias**2))
    found["cols"] |= dict.fromkeys(fixed, np.float32(0))
    return found


@cache
def _compiled(
    arch: Architecture, teacher_arch: Architecture, steps: int, devices: tuple[Any, ...]
) -> Callable[..., Any]:
    """The pmapped step; cached, so that files of one model share one compilation."""
    adam = optimizer(steps)

    def step(state: State, models: tuple[Params, Params], rates: Trained, tokens: Array) -> tuple[State, Array]:
        """One Adam step, averaged over devices: the new state and the KL before it, nats/token."""
        params, teacher = models

        def loss(trained: Trained) -> Float[Array, ""]:
            return divergence(teacher, teacher_arch, student(params, trained), arch, tokens)

        kl, grads = pool.mean_over_devices(jax.value_and_grad(loss)(state.trained))
        updates, inner = adam.update(grads, state.optimizer)
        updates = jax.tree.map(lambda u, rate: rate * u, updates, rates)
        moved: Any = optax.apply_updates(state.trained, updates)
        return State(moved, inner), kl

    return pool.pmapped(step, devices)


def train(
    pupil: Pupil,
    tokens: Int[np.ndarray, "sequences length"],
    settings: FinetuneSettings,
    start: Trained,
    selection_kl: Callable[[Trained], float],
    *,
    devices: Sequence[Device],
    store: StateStore | None = None,
    report: Callable[[FinetuneProgress], None] | None = None,
) -> Best:
    """Runs all steps; see `finetune`.

    Args:
        pupil: the decoded model (with its turns) and its teacher.
        tokens: calibration sequences.
        settings: steps, rates, seed.
        start: values that training starts from.
        selection_kl: KL on the selection text of given values; measured CHECKS times.
        devices: local devices.
        store: where checkpoints go.
        report: called after every step.

    Returns:
        the best of the values measured; never the start.
    """
    steps, compiled = settings.steps, _compiled
    begin, state, best = _restored(store, start, steps)
    step: Any = compiled(pupil.arch, pupil.teacher_arch, steps, tuple(devices))
    rates = scales(settings.rates, start, pupil.fixed)
    models, rates = pool.replicate(((pupil.params, pupil.teacher), rates), devices)
    copies = pool.replicate(state, devices)
    with Interrupt() as interrupt:
        for number in range(begin, steps):
            chosen = batch_indices(settings.seed, number, settings.batch_sequences, len(tokens))
            copies, kl = step(copies, models, rates, pool.split(tokens[chosen], devices))
            kl, done = float(pool.first(kl)), number + 1
            _require_finite(kl, number)
            measured = None
            if done in check_steps(steps):
                trained = pool.first(copies).trained
                measured = selection_kl(trained)
                best = Best(trained, np.float64(measured)) if measured < best.kl else best
            stop = interrupt.requested and done < steps
            if store is not None and (stop or done % settings.checkpoint_every == 0 or done == steps):
                store.save(done, {"state": pool.first(copies), "best": best})
            if report is not None:
                report(FinetuneProgress(done, steps, kl, measured))
            if stop:
                raise KeyboardInterrupt
    return best


def check_steps(steps: int) -> list[int]:
    """Steps after which the selection text is scored, the last among them."""
    return sorted({-(-steps * (i + 1) // CHECKS) for i in range(CHECKS)})


def _restored(store: StateStore | None, start: Trained, steps: int) -> tuple[int, State, Best]:
    """(steps done, state, best) of the newest checkpoint, or of the start."""
    state = State(start, jax.device_get(optimizer(steps).init(start)))
    best = Best(start, np.float64(np.inf))
    found = None if store is None else store.restore({"state": state, "best": best})
    if found is None:
        return 0, state, best
    (trained, inner), (kept, kl) = found[1]["state"], found[1]["best"]
    return found[0], State(trained, inner), Best(kept, np.float64(kl))


def _require_finite(kl: float, step: int) -> None:
    if not np.isfinite(kl):
        raise UserError(f"the KL of finetuning is {kl} at step {step}; encode at a higher rate, or without it.")
