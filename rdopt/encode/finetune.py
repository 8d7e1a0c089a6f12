"""Finetuning after coding: KL(original || decoded) over gains, norms and biases, codes frozen.

The student is the decoded model, the teacher the original. Gains act on activations, y = U (a * (W (b * V^T x))), so
that no gradient of the size of a matrix is formed. Of all values on the way those with the smallest KL on the selection
text are kept, rounded as a file keeps them, and refused when they are no better there than the file without them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from rdopt.align import devices as pool
from rdopt.align.devices import Device
from rdopt.align.loop import Schedule, State, adam, batches, run_steps
from rdopt.checkpoint.families import INPUT_OF, MATRICES, Architecture, matrix_shapes
from rdopt.codec.streams.fixed_point import undo_stored
from rdopt.codec.streams.gains import GAIN_PRECISIONS, Gains, choose_precision, quantize_gains
from rdopt.codec.streams.uncoded import sixteen_bit
from rdopt.evaluate.divergence import Reference, compare, token_kl
from rdopt.operator.llama import embed_tokens, head_logits, linear, rope_tables, run_blocks
from rdopt.operator.params import Params, stacked
from rdopt.runs.states import StateStore
from rdopt.transforms.stored.rotation import Rotation
from rdopt.transforms.stored.rotations import StoredRotations

FINAL = "final_norm"
CHECKS = 4
# Without stored rotations a column gain of down is a row gain of up: leaving it out saves bits at the same KL. The
# norms could take over the columns of v and gate as well, but then 120 steps came 0.4 % less far.
REDUNDANT_COLUMNS = ("down",)
_REFUSED = "finetuning is refused: on the selection text it takes KL from {:.5f} to {:.5f} nats/token."
_ACCEPTED = "finetuning takes KL on the selection text from {:.5f} to {:.5f} nats/token ({:+.1f} %)."
_NOT_FINITE = "the KL of finetuning is {loss} at step {step}; encode at a higher rate, or without it."

# kind ("rows", "cols", "norms", "biases") -> parameter -> (layers, n): log2 gains, and biases as they are;
# the final norm has no layer axis.
Trainable = dict[str, dict[str, Any]]


class LearningRates(NamedTuple):
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
    rates: LearningRates = field(default_factory=LearningRates)
    seed: int = 0
    checkpoint_every: int = 20


class Distillation(NamedTuple):
    """A student and what it learns from.

    Attributes:
        student: the decoded model, with its stored rotations if it has some.
        student_arch: its architecture.
        teacher: the original.
        teacher_arch: its architecture.
        fixed: matrices whose column gains stay as they are.
    """

    student: Params
    student_arch: Architecture
    teacher: Params
    teacher_arch: Architecture
    fixed: tuple[str, ...] = REDUNDANT_COLUMNS


class Best(NamedTuple):
    """The values with the smallest KL on the selection text so far, and that KL in nats/token."""

    values: Trainable
    kl: Float[np.ndarray, ""] | np.floating


class FinetuneProgress(NamedTuple):
    """One step: KL of its batch before the step, and on the selection text where it was measured."""

    step: int
    steps: int
    kl: float
    selection: float | None

    def __str__(self) -> str:
        measured = "" if self.selection is None else f"  KL on selection text {self.selection:.5f}"
        return f"step {self.step} of {self.steps}  KL {self.kl:.5f} nats/token{measured}"


class Finetuned(NamedTuple):
    """The better of the finetuned and the given model.

    Attributes:
        gains: integer gains of the coded matrices; the given ones when refused.
        params: the decoded model without gains, with norms and biases of 16 bit; the given one when refused.
        kl_before: KL on the selection text of the file as it was, nats/token.
        kl_after: the same with the trained values, rounded.
        accepted: whether kl_after is smaller.
        sentence: what to tell the user.
    """

    gains: Gains | None
    params: Params
    kl_before: float
    kl_after: float
    accepted: bool
    sentence: str


def starting_point(params: Params, arch: Architecture, gains: Gains | None) -> Trainable:
    """No change: the given log2 gains or zeros, norms scaled by 2^0, biases as they are."""
    blocks, shapes = params["blocks"], matrix_shapes(arch)

    def logs(part: str, axis: int, name: str) -> Float[np.ndarray, "layers n"]:
        given = {} if gains is None else getattr(gains, part)
        per_octave = 1 if gains is None else gains.precision
        none = np.zeros(shapes[0, name][axis])
        rows = [given.get((i, name), none) / per_octave for i in range(arch.num_layers)]
        return np.stack(rows).astype(np.float32)

    norms = {k: np.zeros_like(v) for k, v in blocks.items() if k.endswith("_norm")}
    return {
        "rows": {name: logs("rows", 0, name) for name in MATRICES},
        "cols": {name: logs("cols", 1, name) for name in MATRICES},
        "norms": {**norms, FINAL: np.zeros_like(params[FINAL])},
        "biases": {k: np.array(v) for k, v in blocks.items() if k.endswith("_bias")},
    }


def with_rotations(params: Params, arch: Architecture, stored: StoredRotations | None) -> Params:
    """The model with its stored rotations, dense, beside the weights, for `gained_linear`."""
    if stored is None:
        return params
    blocks = dict(params["blocks"])
    for name, (m, n) in {name: shape for (_, name), shape in matrix_shapes(arch).items()}.items():
        sides = [stored.sides(i, name, (m, n)) for i in range(arch.num_layers)]
        blocks[f"{INPUT_OF[name]}_V"] = _dense([s.inputs for s in sides], n)
        blocks[f"{name}_U"] = _dense([s.outputs for s in sides], m)
    return {**params, "blocks": blocks}


def _dense(rotations: Sequence[Rotation | None], n: int) -> Float[np.ndarray, "layers n n"]:
    eye = np.eye(n)
    return np.stack([eye if rotation is None else rotation.apply(eye) for rotation in rotations]).astype(np.float32)


def student_params(params: Params, values: Mapping[str, Mapping[str, Any]]) -> Params:
    """The model whose forward pass through `gained_linear` has these values."""
    blocks = dict(params["blocks"]) | dict(values["biases"])
    for name, shift in values["norms"].items():
        if name != FINAL:
            blocks[name] = blocks[name] * jnp.exp2(shift)
    for part in ("rows", "cols"):
        blocks |= {f"{name}_{part}": logs for name, logs in values[part].items()}
    return {
        **params,
        "blocks": blocks,
        FINAL: params[FINAL] * jnp.exp2(values["norms"][FINAL]),
    }


def gained_linear(name: str, p: Mapping[str, Any], x: Float[Array | np.ndarray, "B T in"]) -> Float[Array, "B T out"]:
    """U (a * (W (b * V^T x))) plus the bias; V and U only in blocks of `with_rotations`."""
    V, U = p.get(f"{INPUT_OF[name]}_V"), p.get(f"{name}_U")
    x = x if V is None else jnp.matmul(x, V, precision="highest")
    y = linear(name, {name: p[name]}, x * jnp.exp2(p[f"{name}_cols"])[None, None, :])
    y = y * jnp.exp2(p[f"{name}_rows"])[None, None, :]
    y = y if U is None else jnp.matmul(y, U.T, precision="highest")
    bias = p.get(f"{name}_bias")
    return y if bias is None else y + bias[None, None, :]


def divergence(
    teacher: Params,
    teacher_arch: Architecture,
    params: Params,
    arch: Architecture,
    tokens: Int[Array, "batch length"],
) -> Float[Array, ""]:
    """Mean KL(teacher || student) over all positions, nats/token; logits of one sequence at a time."""
    rope = rope_tables(arch, tokens.shape[1])
    taught = run_blocks(teacher["blocks"], embed_tokens(teacher, tokens), rope, teacher_arch)
    learned = run_blocks(params["blocks"], embed_tokens(params, tokens), rope, arch, gained_linear)

    @jax.checkpoint
    def one(states: tuple[Array, Array]) -> Float[Array, ""]:
        logp = jax.nn.log_softmax(head_logits(teacher, states[0][None], teacher_arch))
        logq = jax.nn.log_softmax(head_logits(params, states[1][None], arch))
        return jnp.mean(token_kl(logp, logq))

    return jnp.mean(jax.lax.map(one, (jax.lax.stop_gradient(taught), learned)))


def log_gains(values: Trainable, part: str) -> dict[tuple[int, str], Float[np.ndarray, " n"]]:
    """(layer, matrix) -> float log2 gains of "rows" or "cols"; matrices whose gains are all one are left out."""
    return {
        (i, name): logs.astype(np.float64)
        for name, of_layers in values[part].items()
        for i, logs in enumerate(np.asarray(of_layers))
        if np.any(logs)
    }


def rounded_params(params: Params, values: Trainable) -> Params:
    """The decoded model with the trained norms and biases, as a file keeps them."""
    blocks = dict(params["blocks"])
    for name, value in values["biases"].items():
        blocks[name] = np.stack([sixteen_bit(x) for x in np.asarray(value)])
    for name, shift in values["norms"].items():
        if name != FINAL:
            scaled = np.asarray(blocks[name]) * np.exp2(np.asarray(shift, np.float64))
            blocks[name] = np.stack([sixteen_bit(x) for x in scaled])
    final = np.asarray(params[FINAL]) * np.exp2(np.asarray(values["norms"][FINAL], np.float64))
    return {**params, "blocks": blocks, FINAL: sixteen_bit(final)}


def decoded_params(params: Params, gains: Gains | None, stored: StoredRotations | None) -> Params:
    """The model that a decoder makes: gains applied, stored rotations undone."""
    blocks = dict(params["blocks"])
    for name in MATRICES:
        layers = []
        for i, W in enumerate(np.asarray(params["blocks"][name])):
            W = W if gains is None else gains.apply((i, name), W)
            layers.append(W if stored is None else undo_stored(stored, i, name, INPUT_OF[name], W))
        blocks[name] = np.stack(layers)
    return {**params, "blocks": blocks}


def parameter_rates(rates: LearningRates, start: Trainable, fixed: Sequence[str]) -> Trainable:
    """The rate of every parameter: that of its kind, times the size of the bias for biases, 0 where fixed."""
    by_kind = {kind: dict.fromkeys(parts, np.float32(getattr(rates, kind))) for kind, parts in start.items()}
    for name, bias in start["biases"].items():
        by_kind["biases"][name] *= np.sqrt(np.mean(bias**2))
    by_kind["cols"] |= dict.fromkeys(fixed, np.float32(0))
    return by_kind


@cache
def _compiled_step(
    arch: Architecture, teacher_arch: Architecture, steps: int, devices: tuple[Device, ...]
) -> tuple[optax.GradientTransformation, Callable[..., Any]]:
    """(optimizer of unit rate, pmapped step); cached, so that files of one model share one compilation."""
    optimizer = adam(1.0, steps, eps=1e-10)

    def step(state: State, constants: tuple[Params, Params, Trainable], tokens: Array, _: Array) -> tuple[State, Any]:
        """One Adam step, averaged over devices: the new state, and the KL before it, nats/token."""
        params, teacher, rates = constants

        def loss(values: Trainable) -> Float[Array, ""]:
            return divergence(teacher, teacher_arch, student_params(params, values), arch, tokens)

        kl, grads = pool.mean_over_devices(jax.value_and_grad(loss)(state.params))
        updates, moments = optimizer.update(grads, state.optimizer)
        updates = jax.tree.map(lambda u, rate: rate * u, updates, rates)
        return State(optax.apply_updates(state.params, updates), moments), (kl,)

    return optimizer, pool.pmapped(step, devices)


def distill(
    models: Distillation,
    tokens: Int[np.ndarray, "sequences length"],
    settings: FinetuneSettings,
    start: Trainable,
    selection_kl: Callable[[Trainable], float],
    *,
    devices: Sequence[Device],
    store: StateStore | None = None,
    report: Callable[[FinetuneProgress], None] | None = None,
) -> Best:
    """Runs all steps; see `finetune`.

    Args:
        models: student and teacher.
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
    steps = settings.steps
    optimizer, step = _compiled_step(models.student_arch, models.teacher_arch, steps, tuple(devices))

    def after(
        done: int, figures: Sequence[float], state: Callable[[], State], best: Best
    ) -> tuple[Best, FinetuneProgress]:
        """Scores the selection text after some steps, and keeps the best values so far."""
        measured = None
        if done in check_steps(steps):
            values = state().params
            measured = selection_kl(values)
            best = Best(values, np.float64(measured)) if measured < best.kl else best
        return best, FinetuneProgress(done, steps, figures[0], measured)

    schedule = Schedule(
        steps=steps,
        batch_sequences=settings.batch_sequences,
        seed=settings.seed,
        checkpoint_every=settings.checkpoint_every,
    )
    _, best = run_steps(
        step,
        State(start, jax.device_get(optimizer.init(start))),
        Best(start, np.float64(np.inf)),
        (models.student, models.teacher, parameter_rates(settings.rates, start, models.fixed)),
        batches(tokens, schedule, devices),
        schedule,
        after,
        devices=devices,
        not_finite=_NOT_FINITE,
        store=store,
        report=report,
    )
    return best


def check_steps(steps: int) -> list[int]:
    """Steps after which the selection text is scored, the last among them."""
    return sorted({-(-steps * (i + 1) // CHECKS) for i in range(CHECKS)})


def finetune(
    params: Params,
    arch: Architecture,
    tokens: Int[np.ndarray, "sequences length"],
    selection: Reference,
    settings: FinetuneSettings,
    *,
    devices: Sequence[Device],
    gains: Gains | None = None,
    stored: StoredRotations | None = None,
    store: StateStore | None = None,
    report: Callable[[FinetuneProgress], None] | None = None,
) -> Finetuned:
    """Trains gains, norms and biases of a decoded model on KL.

    Without stored rotations REDUNDANT_COLUMNS keep their column gains.

    Args:
        params: the decoded model without its gains, float32, in the coordinates of `stored` if given.
        arch: its architecture.
        tokens: calibration sequences.
        selection: the original model on the selection text; it is the teacher.
        settings: steps, rates, lambda.
        devices: local devices; the batch is split over them.
        gains: of the file, from which training starts.
        stored: the rotations that the decoder undoes behind the gains.
        store: where checkpoints go; training resumes from its newest one.
        report: called after every step.

    Returns:
        the better of the finetuned and the given model by KL on the selection text. The same input gives the
        same result, also when a run was broken off in between.

    Raises:
        UserError: the loss is not finite, the batch does not divide, or the checkpoint belongs to other input.
        KeyboardInterrupt: after the state was saved.
    """

    def kl(trial: Gains | None, changed: Params) -> float:
        return compare(selection, decoded_params(changed, trial, stored), arch).kl_mean

    def finest_kl(values: Trainable) -> float:
        finest = quantize_gains(log_gains(values, "rows"), log_gains(values, "cols"), GAIN_PRECISIONS[-1])
        return kl(finest, rounded_params(params, values))

    before = kl(gains, params)
    fixed = REDUNDANT_COLUMNS if stored is None else ()
    models = Distillation(with_rotations(params, arch, stored), arch, stacked(selection.params), selection.arch, fixed)
    start = starting_point(params, arch, gains)
    best = distill(models, tokens, settings, start, finest_kl, devices=devices, store=store, report=report).values
    changed, rows, cols = rounded_params(params, best), log_gains(best, "rows"), log_gains(best, "cols")
    rounded = choose_precision(rows, cols, matrix_shapes(arch), settings.lam, lambda trial: kl(trial, changed))
    after = kl(rounded, changed)
    if after >= before:
        return Finetuned(gains, params, before, after, False, _REFUSED.format(before, after))
    sentence = _ACCEPTED.format(before, after, 100 * (after / before - 1))
    return Finetuned(rounded, changed, before, after, True, sentence)
