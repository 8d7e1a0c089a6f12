"""J = R + lam D over all blocks, as a function of the gauges.

R is the relaxed rate in bits/weight of the model; D, in nats/token, is an estimate of KL(original || compressed).
One scan runs over the blocks and holds one block's activations and relaxed weights at a time.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rdopt.align.coordinates import ErrorMetric, MatrixCoordinates, OutputDamping, input_metrics, output_metric
from rdopt.align.relaxation import Relaxed, analytic_distortion, relax, unit_noise, weight_error
from rdopt.align.stored_learning import Place
from rdopt.checkpoint.families import INPUT_OF, MATRICES, Architecture
from rdopt.config.schema import Density
from rdopt.evaluate.divergence import token_kl
from rdopt.operator.llama import block, embed_tokens, head_logits, rope_tables
from rdopt.operator.params import Params
from rdopt.rate.operational import CurveName
from rdopt.rate.relaxed import annealed_rate, l1_proxy, log_proxy, noise_rate, straight_through_rate
from rdopt.rate.steps import base_step
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


class Problem(NamedTuple):
    """The arrays that training reads, float32, blocks stacked.

    Attributes:
        params: the gain-folded model.
        sigma: second moments of the inputs, by group.
        G: of the gradients at the outputs, of the matrices whose outputs a gauge changes.
        fixed: the metrics of the other matrices' outputs.
    """

    params: Params
    sigma: Mapping[str, Array]
    G: Mapping[str, Array]
    fixed: Mapping[str, ErrorMetric]


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


class Layer(NamedTuple):
    """One block of the model and of the variables."""

    params: Mapping[str, Array]
    sigma: Mapping[str, Array]
    G: Mapping[str, Array]
    fixed: Mapping[str, ErrorMetric]
    gauges: BlockGauges
    stored: Mapping[Place, Rotation]
    log_scale: Mapping[str, Array]
    key: Array


class RateDistortion(NamedTuple):
    """R in bits/weight and D in nats/token; of one block bits and D, or both by matrix."""

    rate: Any
    distortion: Any


def rate_and_distortion(
    variables: Variables,
    problem: Problem,
    tokens: Int[Array, "batch length"],
    lam: Float[Array, ""],
    key: Array,
    settings: Settings,
) -> RateDistortion:
    """R and D at the given gauges.

    Args:
        variables: see `Variables`.
        problem: model and moments.
        tokens: calibration sequences (unused by the "matrix" distortion).
        lam: the slope; it fixes the steps.
        key: of the quantization noise; equal on all devices.
        settings: static choices.
    """
    arch = settings.arch
    c = base_step(lam, settings.weights)
    rope = rope_tables(arch, tokens.shape[1])
    x = embed_tokens(problem.params, tokens).astype(settings.activations)

    def body(carry: Any, layer: Any) -> tuple[Any, RateDistortion]:
        """One block: its activations passed on, its bits and its distortion in nats/token."""
        p, G = layer.params, layer.G
        terms, errors = block_terms(layer, variables, c, settings)
        bits, D = sum(terms.rate.values()), sum(terms.distortion.values())
        noisy = with_errors(errors, p)
        if settings.distortion == "block":
            x = carry
            carry = block(_as(p, x), x, rope, arch)
            D = block_distortion(_wide(block(_as(noisy, x), x, rope, arch)) - _wide(carry), G["down"])
        elif settings.distortion == "model":
            carry = tuple(block(_as(w, x), x, rope, arch) for w, x in zip((p, noisy), carry, strict=True))
        return carry, RateDistortion(bits, D)

    layers = layers_of(variables, problem, key, arch)
    start = (x, x) if settings.distortion == "model" else x
    step = jax.checkpoint(body) if settings.rematerializes else body
    end: Any
    end, terms = jax.lax.scan(step, start, layers)
    D = jnp.sum(terms.distortion)
    if settings.distortion == "model":
        D = model_divergence(problem.params, _wide(end[0]), _wide(end[1]), arch)
    return RateDistortion((jnp.sum(terms.rate) + variables.angle_bits) / settings.weights, D)


def matrix_terms(
    variables: Variables, problem: Problem, lam: Float[Array, ""], settings: Settings
) -> tuple[dict[str, Float[Array, " layers"]], dict[str, Float[Array, " layers"]]]:
    """(bits, D in nats/token) of every matrix by the analytic rate, without the bits of angles."""
    static = replace(settings, rate="analytic", distortion="matrix")
    c = base_step(lam, settings.weights)

    def one(layer: Layer) -> RateDistortion:
        return block_terms(layer, variables, c, static)[0]

    found = jax.lax.map(one, layers_of(variables, problem, jax.random.key(0), settings.arch))
    return found.rate, found.distortion


def layers_of(variables: Variables, problem: Problem, key: Array, arch: Architecture) -> Layer:
    """Everything that has a layer axis."""
    return Layer(
        problem.params["blocks"],
        problem.sigma,
        problem.G,
        problem.fixed,
        variables.gauges.stacked(arch),
        variables.stored,
        variables.log_scale,
        jax.random.split(key, arch.num_layers),
    )


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


def model_divergence(params: Params, x: Array, noisy: Array, arch: Architecture) -> Float[Array, ""]:
    """Mean KL(original || relaxed) of the next token from the two last hidden states; nats/token."""
    logp, logq = (jax.nn.log_softmax(head_logits(params, state, arch)) for state in (x, noisy))
    return jnp.mean(token_kl(logp, logq))


def block_terms(
    layer: Layer, variables: Variables, c: Array, settings: Settings
) -> tuple[RateDistortion, dict[str, Array]]:
    """Bits and analytic distortion of every matrix, and relaxed weight errors in the original coordinates."""
    gauges = layer.gauges.with_shared(variables.gauges)
    coordinates = {k: _coordinates(k, gauges, layer.stored, settings.arch) for k in MATRICES}
    rows = {**layer.fixed, **{k: output_metric(layer.G[k], coordinates[k], settings.outputs) for k in layer.G}}
    metrics = input_metrics(layer.sigma, coordinates, settings.damping, settings.feedback)
    bits, D, errors = {}, {}, {}
    for name, key in zip(MATRICES, jax.random.split(layer.key, len(MATRICES)), strict=True):
        cols = metrics[INPUT_OF[name]]
        relaxed = relax(coordinates[name].fold(layer.params[name]), rows[name], cols, c, settings.curve)
        D[name] = analytic_distortion(relaxed, c)
        bits[name] = rate_bits(relaxed, layer.log_scale.get(name), key, variables.hardness, settings)
        if settings.distortion != "matrix":
            noise = unit_noise(key, relaxed, settings.rate, variables.hardness)
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
