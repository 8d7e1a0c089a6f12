"""Rotations learned on other criteria than a rate, for comparison: residual stream and value heads, all else alike.

Sum of fourth powers of the weights (OptRot, 2512.24124), kurtosis of the activations (KurTail, 2503.01483), and the
cross-entropy of the network with its rotated weights rounded (SpinQuant, 2405.16406). All are trained by Adam on the
skew entries of Cayley transforms, as our own rotations are, instead of the authors' optimizers.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from rdopt.align.alignment import Alignment, Start, single_precision, trained_records
from rdopt.align.loop import batch_indices
from rdopt.checkpoint.families import MATRICES, Architecture
from rdopt.operator.llama import STAGES, embed_tokens, logits, rope_tables, run_stage
from rdopt.operator.params import Params
from rdopt.transforms.gauges.coordinates import Gauges, gauges_of, sides_of
from rdopt.transforms.gauges.fold import fold

Criterion = Literal["fourth powers", "kurtosis", "cross-entropy"]
FAKE_BITS = 4  # of the weights behind the cross-entropy, as SpinQuant has them
UNIFORM_KURTOSIS = 1.8  # what KurTail aims at
_TOKENS = 2048
_BATCH = 4
_SITES = ("residual", "value")


class RotatedInputs(NamedTuple):
    """Inputs of the rotated matrices on calibration tokens: the normalised streams, and the values after attention."""

    streams: Float[Array, "sites tokens d"]
    values: Float[Array, "layers tokens kv group h"]


def learn_criterion(
    criterion: Criterion,
    params: Params,
    arch: Architecture,
    start: Gauges,
    tokens: Int[np.ndarray, "sequences length"],
    *,
    steps: int,
    learning_rate: float = 0.006,
    seed: int = 0,
) -> Gauges:
    """The rotations that a criterion leads to.

    Args:
        criterion: what is minimised.
        params: the original model.
        arch: its architecture.
        start: the basis that is rotated.
        tokens: calibration sequences.
        steps: of Adam.
        learning_rate: highest, with the schedule of a cosine.
        seed: order of the sequences.
    """
    plain, arch = fold(params, arch, Gauges(residual=np.eye(arch.hidden_size)))
    plain = jax.tree.map(jnp.asarray, plain)
    module = Alignment(arch=arch, sites=_SITES, rate="analytic")
    begin = Start(single_precision(start, arch))
    variables: Any = module.init(jax.random.key(seed), begin)
    theta = variables["params"]
    adam = optax.adam(optax.cosine_decay_schedule(learning_rate, steps, 0.05), b2=0.95, eps=1e-6)
    loss = _losses(plain, arch, tokens)[criterion]

    @jax.jit
    def step(theta: Any, state: Any, batch: Any, begin: Start) -> Any:
        def of(theta: Any) -> Array:
            trial: Any = module.apply({"params": theta}, begin)
            return loss(trial.gauges, batch)

        value, slope = jax.value_and_grad(of)(theta)
        change, state = adam.update(slope, state, theta)
        return optax.apply_updates(theta, change), state, value

    state = adam.init(theta)
    for number in range(steps):
        batch = tokens[batch_indices(seed, number, min(_BATCH, len(tokens)), len(tokens))]
        theta, state, _ = step(theta, state, batch, begin)
    return gauges_of(trained_records(jax.device_get(theta), start, arch))


def _losses(
    params: Params, arch: Architecture, tokens: Int[np.ndarray, "sequences length"]
) -> Mapping[str, Callable[[Gauges, Array], Array]]:
    sample = tokens[: max(1, _TOKENS // tokens.shape[1])]
    inputs = jax.jit(activations, static_argnames="arch")(params, sample, arch)
    return {
        "fourth powers": lambda gauges, batch: fourth_powers(params, arch, gauges),
        "kurtosis": lambda gauges, batch: kurtosis_of_activations(inputs, gauges),
        "cross-entropy": lambda gauges, batch: rounded_cross_entropy(params, arch, gauges, batch),
    }


def turned_matrices(params: Params, arch: Architecture, gauges: Gauges) -> list[dict[str, tuple[Array, Any]]]:
    """(matrix in trial coordinates, how it got there) of every block by name."""
    stacked, found = gauges.stacked(arch), []
    for layer in range(arch.num_layers):
        own = jax.tree.map(lambda x, at=layer: x[at], stacked).with_shared(gauges)
        sides = {k: sides_of(k, (None, None), arch, own) for k in MATRICES}
        found.append({k: (sides[k].fold(params["blocks"][k][layer]), sides[k]) for k in MATRICES})
    return found


def fourth_powers(params: Params, arch: Architecture, gauges: Gauges) -> Float[Array, ""]:
    """Sum of the fourth powers of all rotated weights over the square of their mean square."""
    total = jnp.zeros(())
    for block in turned_matrices(params, arch, gauges):
        total += sum(jnp.mean(W**4) / jnp.mean(W**2) ** 2 for W, _ in block.values())
    return total


def kurtosis_of_activations(inputs: RotatedInputs, gauges: Gauges) -> Float[Array, ""]:
    """Mean distance of the kurtosis of rotated inputs from that of a uniform density."""
    assert gauges.residual is not None and gauges.value is not None
    streams = jnp.matmul(inputs.streams, gauges.residual, precision="highest")
    values = jnp.einsum("ltkgi,lkji->ltkgj", inputs.values, gauges.value, precision="highest")
    kinds = [_kurtosis(x.reshape(len(x), -1)) for x in (streams, values)]
    return jnp.mean(jnp.abs(jnp.concatenate(kinds) - UNIFORM_KURTOSIS))


def _kurtosis(x: Float[Array, "sites n"]) -> Float[Array, " sites"]:
    centred = x - jnp.mean(x, axis=1, keepdims=True)
    return jnp.mean(centred**4, axis=1) / jnp.mean(centred**2, axis=1) ** 2


def rounded_cross_entropy(
    params: Params, arch: Architecture, gauges: Gauges, tokens: Int[Array, "batch length"]
) -> Float[Array, ""]:
    """Next-token loss of the network whose rotated weights are rounded row by row, straight-through; nats/token."""
    blocks = [
        {k: sides.unfold(fake_rounded(W)) for k, (W, sides) in block.items()}
        for block in turned_matrices(params, arch, gauges)
    ]
    rounded = {k: jnp.stack([block[k] for block in blocks]) for k in MATRICES}
    out = logits({**params, "blocks": {**params["blocks"], **rounded}}, tokens, arch)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(out[:, :-1], tokens[:, 1:]))


def fake_rounded(W: Float[Array, "out in"]) -> Float[Array, "out in"]:
    """Symmetric uniform rounding to FAKE_BITS bits over the range of each row; gradients pass."""
    step = jnp.max(jnp.abs(W), axis=1, keepdims=True) / (2 ** (FAKE_BITS - 1) - 1)
    return W + jax.lax.stop_gradient(jnp.round(W / step) * step - W)


def activations(params: Params, tokens: Int[np.ndarray, "batch length"], arch: Architecture) -> RotatedInputs:
    """Inputs of the matrices that the rotations turn, of a gain-folded model."""
    x, rope = embed_tokens(params, tokens), rope_tables(arch, tokens.shape[1])
    streams, values = [], []
    for layer in range(arch.num_layers):
        p = {k: v[layer] for k, v in params["blocks"].items()}
        inputs = x
        for stage in STAGES:
            x, inputs = run_stage(stage, p, x, inputs, rope, arch)
            if stage in ("attn", "mlp"):
                streams.append(inputs)
            elif stage == "o":
                values.append(inputs)
    heads = (arch.num_kv_heads, arch.num_heads // arch.num_kv_heads, arch.head_dim)
    return RotatedInputs(
        jnp.stack([y.reshape(-1, arch.hidden_size) for y in streams]),
        jnp.stack([y.reshape(-1, *heads) for y in values]),
    )
