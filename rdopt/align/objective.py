"""J = R + lam D over blocks, as a function of the gauges.

R is the relaxed rate in bits/weight of the model; D, in nats/token, is an estimate of KL(original || compressed).
Both are sums over blocks: some of them give their part of J, in one scan that holds one block's activations and relaxed
weights at a time. Only the KL of the whole model needs all of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rdopt.align.coordinates import ErrorMetric, MatrixCoordinates, OutputDamping, input_metrics, output_metric
from rdopt.align.relaxation import Relaxed, analytic_distortion, relax, unit_noise, weight_error
from rdopt.align.stored_learning import Place
from rdopt.checkpoint.families import INPUT_OF, MATRICES, Architecture
from rdopt.config.schema import Density
from rdopt.evaluate.divergence import log_probabilities, token_kl
from rdopt.operator.llama import block, rope_tables
from rdopt.operator.params import Params
from rdopt.rate.operational import CurveName
from rdopt.rate.relaxed import annealed_rate, l1_proxy, log_proxy, noise_rate, straight_through_rate
from rdopt.rate.steps import base_step
from rdopt.transforms.arrays import AnyArray
from rdopt.transforms.gauges.coordinates import BlockGauges, Gauges, sides_of
from rdopt.transforms.stored.rotation import RotatedSides, Rotation

# Weights from which a block's forward pass is computed again for its gradient instead of being kept.
REMATERIALIZE_ABOVE = 2**26


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is static in a compiled step.

    Attributes:
        arch: architecture of the model with its gains folded.
        rate: "analytic", "noise", "annealed", "ste", "l1" or "log".
        density: "gaussian", "laplace" or "logistic", of the sampled rates.
        curve: of the analytic rate and of all distortions: of that density, or of the trellis.
        distortion: "matrix", "block" or "model".
        feedback: whether the encoder feeds errors back over the columns.
        damping: of the inputs' second moments.
        outputs: damping of the outputs' gradient moments.
        weights: N, the number of coded weights.
        activations: type of the blocks' activations, "float32" or "bfloat16".
        remat: whether a block's forward pass is computed again for its gradient: "auto" in large models.
    """

    arch: Architecture
    rate: str
    density: Density
    curve: CurveName
    distortion: str
    feedback: bool
    damping: float
    outputs: OutputDamping
    weights: int
    activations: str = "float32"
    remat: str = "auto"

    @property
    def rematerializes(self) -> bool:
        """Whether activations and relaxed weights of one block at a time are kept for the gradient."""
        return self.remat == "always" or (self.remat == "auto" and self.weights > REMATERIALIZE_ABOVE)


class BlockProblem(NamedTuple):
    """What training reads of one block, float32; of several with a leading axis.

    Attributes:
        params: the gain-folded parameters.
        sigma: second moments of the inputs, by group, of those that a gauge changes.
        G: of the gradients at the outputs, of the matrices whose outputs a gauge changes, and of the last one, whose
            output is the block's.
        inputs: the metrics of the other groups.
        outputs: and of the other matrices.
    """

    params: Mapping[str, AnyArray]
    sigma: Mapping[str, AnyArray]
    G: Mapping[str, AnyArray]
    inputs: Mapping[str, ErrorMetric]
    outputs: Mapping[str, ErrorMetric]


class Variables(NamedTuple):
    """What is trained.

    Attributes:
        gauges: the symmetries.
        stored: the rotations that the file keeps, with a leading layer axis.
        angle_bits: bits of their angles.
        log_scale: for the sampled rates, matrix -> (layers, in): learned log2 of each column's spread over its
            root mean square.
        hardness: how much of the noise of the annealed rate has become rounding, 0 to 1.
    """

    gauges: Gauges
    stored: Mapping[Place, Rotation] = {}
    angle_bits: Any = 0.0
    log_scale: Mapping[str, Array] = {}
    hardness: Any = 0.0


class Own(NamedTuple):
    """What belongs to one block of the variables; of several blocks with a leading axis."""

    gauges: BlockGauges
    stored: Mapping[Place, Rotation] = {}
    log_scale: Mapping[str, Array] = {}


class Text(NamedTuple):
    """What a distortion reads of the original network on some sequences; nothing for "matrix".

    Attributes:
        streams: the residual stream, in the type of the activations, before every block; for "model" before the first
            block and behind the last.
        ends: "final_norm" and "head", for "model".
    """

    streams: Float[Array, "batch streams length d"] | None = None
    ends: Params | None = None


class RateDistortion(NamedTuple):
    """R in bits/weight and D in nats/token; of one block bits and D, or both by matrix."""

    rate: Any
    distortion: Any


def rate_and_distortion(
    variables: Variables,
    blocks: BlockProblem,
    text: Text,
    lam: Float[Array, ""],
    keys: Array,
    settings: Settings,
) -> RateDistortion:
    """R and D of some blocks at the given gauges, as a model's of which they are a part.

    Args:
        variables: of these blocks alone.
        blocks: their weights and moments, stacked; all of the model for the "model" distortion.
        text: what the distortion reads of the original network on some sequences.
        lam: the slope; it fixes the steps.
        keys: of the quantization noise, one a block; equal on all devices.
        settings: static choices.
    """
    arch, drawn = settings.arch, replace(settings.arch, num_layers=len(keys))
    c = base_step(lam, settings.weights)
    streams, rope = _streams(text, arch)

    def body(carry: Any, layer: Any) -> tuple[Any, RateDistortion]:
        """One block: noisy activations passed on, its bits and its distortion in nats/token."""
        own, problem, key, x = layer
        own = own._replace(gauges=own.gauges.with_shared(variables.gauges))
        terms, errors = block_terms(own, problem, key, variables.hardness, c, settings)
        bits, D = sum(terms.rate.values()), sum(terms.distortion.values())
        p, noisy = problem.params, with_errors(errors, problem.params)
        if settings.distortion == "block":
            delta = _wide(block(_as(noisy, x), x, rope, arch)) - _wide(block(_as(p, x), x, rope, arch))
            D = block_distortion(delta, problem.G["down"])
        elif settings.distortion == "model":
            carry = block(_as(noisy, carry), carry, rope, arch)
        return carry, RateDistortion(bits, D)

    step = jax.checkpoint(body) if settings.rematerializes else body
    each = streams if settings.distortion == "block" else None
    start = streams[0] if settings.distortion == "model" else None
    end, terms = jax.lax.scan(step, start, (own_of(variables, drawn), blocks, keys, each))
    D = jnp.sum(terms.distortion)
    if settings.distortion == "model":
        D = jnp.mean(predicted_kl(text.ends, _wide(streams[1]), _wide(end), arch))
    return RateDistortion((jnp.sum(terms.rate) + variables.angle_bits) / settings.weights, D)


def _streams(text: Text, arch: Architecture) -> tuple[Any, Any]:
    """(the streams, which lie in front of the batch, tables of their positions), where there are any."""
    if text.streams is None:
        return None, None
    return jnp.swapaxes(text.streams, 0, 1), rope_tables(arch, text.streams.shape[2])


def own_of(variables: Variables, arch: Architecture) -> Own:
    """What has a layer axis; `arch` has as many layers as the variables."""
    return Own(variables.gauges.stacked(arch), variables.stored, variables.log_scale)


def with_errors(errors: Mapping[str, Array], p: Mapping[str, Array]) -> dict[str, Array]:
    """A block's parameters with the errors of its weights."""
    return {**p, **{k: p[k] + errors[k] for k in errors}}


def _wide(x: Float[Array, "batch length d"]) -> Float[Array, "batch length d"]:
    """Activations in float32, where small differences of them are taken."""
    return x.astype(jnp.float32)


def _as(p: Mapping[str, Array], x: Array) -> dict[str, Array]:
    """A block's float32 parameters in the type of its activations, which is the type that it computes in."""
    return {k: v.astype(x.dtype) for k, v in p.items()}


def block_distortion(delta: Float[Array, "batch length d"], G: Float[Array, "d d"]) -> Float[Array, ""]:
    """1/2 mean over tokens of delta^T G delta, G the gradient moment at the block's output; nats/token."""
    rows = delta.reshape(-1, delta.shape[-1])
    return 0.5 * jnp.mean(jnp.sum(jnp.matmul(rows, G, precision=jax.lax.Precision.HIGHEST) * rows, axis=-1))


def predicted_kl(
    ends: Params | None, x: Float[Array, "*n d"], noisy: Float[Array, "*n d"], arch: Architecture
) -> Float[Array, " positions"]:
    """KL(original || relaxed) of every next token from the streams behind the last block; nats."""
    assert ends is not None
    return token_kl(*(log_probabilities(ends, state.reshape(-1, state.shape[-1]), arch) for state in (x, noisy)))


def block_terms(
    own: Own, problem: BlockProblem, key: Array, hardness: Any, c: Array, settings: Settings
) -> tuple[RateDistortion, dict[str, Array]]:
    """Bits and analytic distortion of a block's matrices, and relaxed weight errors in the original coordinates."""
    coordinates = {k: _coordinates(k, own.gauges, own.stored, settings.arch) for k in MATRICES}
    turned = [k for k in problem.G if k not in problem.outputs]
    rows = {**problem.outputs, **{k: output_metric(problem.G[k], coordinates[k], settings.outputs) for k in turned}}
    metrics = {**problem.inputs, **input_metrics(problem.sigma, coordinates, settings.damping, settings.feedback)}
    bits, D, errors = {}, {}, {}
    for name, own_key in zip(MATRICES, jax.random.split(key, len(MATRICES)), strict=True):
        cols = metrics[INPUT_OF[name]]
        relaxed = relax(coordinates[name].fold(problem.params[name]), rows[name], cols, c, settings.curve)
        D[name] = analytic_distortion(relaxed, c)
        bits[name] = rate_bits(relaxed, own.log_scale.get(name), own_key, hardness, settings)
        if settings.distortion != "matrix":
            noise = unit_noise(own_key, relaxed, settings.rate, hardness)
            errors[name] = coordinates[name].unfold(weight_error(noise, rows[name], cols, c))
    return RateDistortion(bits, D), errors


def _coordinates(
    name: str, gauges: BlockGauges, stored: Mapping[Place, Rotation], arch: Architecture
) -> MatrixCoordinates:
    rotated = RotatedSides(stored.get(("outputs", name)), stored.get(("inputs", INPUT_OF[name])))
    return MatrixCoordinates(sides_of(name, (None, None), arch, gauges), rotated)


def rate_bits(
    relaxed: Relaxed, log_scale: Array | None, key: Array, hardness: Any, settings: Settings
) -> Float[Array, ""]:
    """Relaxed bits of one matrix by the chosen proxy, indices in steps."""
    if settings.rate == "analytic":
        return jnp.sum(relaxed.rate)
    codes = relaxed.codes
    if settings.rate == "l1":
        scale = jax.lax.stop_gradient(jnp.sqrt(jnp.mean(codes**2, axis=0)))
        return jnp.sum(l1_proxy(codes, 1.0, scale))
    if settings.rate == "log":
        return jnp.sum(log_proxy(codes, 1.0))
    assert log_scale is not None
    # Learned relative to the column's own spread, so that training starts where the columns are.
    scale = jnp.exp2(log_scale) * jax.lax.stop_gradient(jnp.sqrt(jnp.mean(codes**2, axis=0) + 1e-8))
    if settings.rate == "noise":
        return jnp.sum(noise_rate(codes, 1.0, scale, key, settings.density))
    if settings.rate == "annealed":
        return jnp.sum(annealed_rate(codes, 1.0, scale, key, hardness, settings.density))
    return jnp.sum(straight_through_rate(codes, 1.0, scale, settings.density))
