"""KL(P_reference || P_candidate) per token and both models' losses, batch by batch on the device.

The sum is formed from terms p f(d), d = log p - log q, f(d) = d + exp(-d) - 1 >= 0: equal to sum p d because
q sums to one, but without cancellation, so float32 logits give KLs far below 1e-8 nats.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rdopt.checkpoint.families import Architecture
from rdopt.config.errors import UserError
from rdopt.evaluate.perplexity import Perplexity, per_token, perplexity
from rdopt.operator.llama import logits
from rdopt.operator.params import Params

Against = Callable[..., tuple[Array, Array]]
CACHE_BYTES = 2**30

_SERIES = 0.1  # below this |d| the Taylor series of f is more exact than float32 arithmetic


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """A candidate against its reference on the same text; per-sequence sums feed paired bootstraps.

    Attributes:
        counts: scored tokens of each sequence.
        nll_reference, nll_candidate: summed negative log-likelihood of each sequence, nats, float64.
        kl_sums: summed KL of each sequence, nats, float64.
        kl: KL of each scored token in reading order, nats, float32.
    """

    counts: Int[np.ndarray, " N"]
    nll_reference: Float[np.ndarray, " N"]
    nll_candidate: Float[np.ndarray, " N"]
    kl_sums: Float[np.ndarray, " N"]
    kl: Float[np.ndarray, " tokens"]

    @property
    def perplexity(self) -> Perplexity:
        """Of the candidate."""
        return perplexity(self.nll_candidate, self.counts)

    @property
    def reference_perplexity(self) -> Perplexity:
        """Of the reference."""
        return perplexity(self.nll_reference, self.counts)

    @property
    def kl_mean(self) -> float:
        """Nats per token."""
        return per_token(self.kl_sums, self.counts)[0]

    @property
    def kl_stderr(self) -> float:
        """Standard error of the mean over sequences; nan for one sequence."""
        return per_token(self.kl_sums, self.counts)[1]

    @property
    def kl_median(self) -> float:
        """Nats, over tokens."""
        return float(np.median(self.kl))

    @property
    def kl_p90(self) -> float:
        """Nats, over tokens."""
        return float(np.percentile(self.kl, 90))


class Reference:
    """The original model on the evaluation windows; its log-probabilities are computed once when they fit.

    Args:
        params, arch: the original model.
        inputs, scored: token windows and which of their tokens are targets; see `windows`.
        batch: windows per device call.
        cache_bytes: keep the float32 log-probabilities below this size, else compute them per comparison.

    Raises:
        UserError: a token outside the vocabulary, a window too long for the model, or a NaN loss.
    """

    def __init__(
        self,
        params: Params,
        arch: Architecture,
        inputs: Int[np.ndarray, "N context"],
        scored: Bool[np.ndarray, "N context"],
        batch: int,
        cache_bytes: int = CACHE_BYTES,
    ):
        _check_windows(arch, inputs, scored, batch)
        self.arch, self.batch = arch, batch
        self.params: Params = jax.device_put(params)
        self.inputs, self.scored = np.asarray(inputs, np.int32), np.asarray(scored, bool)
        self.counts = self.scored.sum(axis=1)
        size = 4 * inputs.size * arch.vocab_size
        self._cache: list[Array] | None = [] if size < cache_bytes else None
        losses = []
        for tokens in _batches(self.inputs, batch):
            logp = _log_probabilities(self.params, tokens, arch)
            losses.append(_loss(logp, tokens))
            if self._cache is not None:
                self._cache.append(logp)
        self.nll = _sequence_sums(losses, self.scored)
        _refuse_nan(self.nll, "reference")

    @property
    def perplexity(self) -> Perplexity:
        """Of the reference itself."""
        return perplexity(self.nll, self.counts)

    def log_probabilities(self) -> Iterator[tuple[Int[np.ndarray, "batch T"], Float[Array, "batch targets V"]]]:
        """Token batches, the last zero-padded, and the reference's log-probabilities of each next token."""
        for i, tokens in enumerate(_batches(self.inputs, self.batch)):
            cached = None if self._cache is None else self._cache[i]
            yield tokens, _log_probabilities(self.params, tokens, self.arch) if cached is None else cached


def compare(reference: Reference, params: Params, arch: Architecture) -> Comparison:
    """Scores a candidate on the reference's windows.

    Compiled once per architecture and shape, so candidates of a sweep cost one forward pass each.

    Raises:
        UserError: vocabularies differ, or the candidate's loss is NaN.
    """
    if arch.vocab_size != reference.arch.vocab_size:
        raise UserError(
            f"The models' vocabularies differ ({reference.arch.vocab_size} and {arch.vocab_size} tokens), so "
            "KL is undefined; compare models of one tokenizer."
        )
    return _compare(reference, params, arch, _against)


def _compare(reference: Reference, params: Params, arch: Architecture, against: Against) -> Comparison:
    params = jax.device_put(params)
    losses, divergences = [], []
    for tokens, logp in reference.log_probabilities():
        loss, kl = against(params, tokens, logp, arch)
        losses.append(loss)
        divergences.append(kl)
    nll = _sequence_sums(losses, reference.scored)
    _refuse_nan(nll, "candidate")
    return Comparison(
        counts=reference.counts,
        nll_reference=reference.nll,
        nll_candidate=nll,
        kl_sums=_sequence_sums(divergences, reference.scored),
        kl=_rows(divergences, len(nll))[reference.scored[:, 1:]],
    )


def noise_floor_bf16(reference: Reference) -> float:
    """Mean KL, nats per token, of the model against its own bfloat16 forward pass: no KL below it matters."""
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), reference.params)
    return _compare(reference, rounded, reference.arch, _against_rounded).kl_mean


def as_eval_json(comparison: Comparison, noise_floor: float, context: int, stride: int) -> dict[str, Any]:
    """The figures every command writes: perplexity of the candidate and KL in nats per token."""
    loss = comparison.perplexity
    divergence = {"mean": comparison.kl_mean, "median": comparison.kl_median, "p90": comparison.kl_p90}
    return {
        "perplexity": {**loss._asdict(), "context": context, "stride": stride},
        "kl": {**divergence, "noise_floor_bf16": noise_floor},
    }


def token_kl(logp: Float[Array, "*n V"], logq: Float[Array, "*n V"]) -> Float[Array, "*n"]:
    """sum p (log p - log q) over the last axis for normalised float32 log-probabilities; never negative.

    An error e in a normalisation adds only e^2 / 2, because the mean of f'(d) under p is zero. Differentiable: the
    slope in log q is q - p.
    """
    d = logp - logq
    p, q = jnp.exp(logp), jnp.exp(logq)
    close = jnp.abs(d) < _SERIES
    # Where the series is not taken it must not overflow: infinity times a slope of zero is no number.
    e = jnp.where(close, d, 0.0)
    series = e * e * (1 / 2 + e * (-1 / 6 + e * (1 / 24 + e * (-1 / 120 + e * (1 / 720)))))
    # p f(d) written with q = p exp(-d), which stays finite where exp(-d) would overflow.
    return jnp.sum(jnp.where(close, p * series, p * (d - 1) + q), axis=-1)


@functools.partial(jax.jit, static_argnames="arch")
def _log_probabilities(params: Params, tokens: Array, arch: Architecture) -> Array:
    return jax.nn.log_softmax(logits(params, tokens, arch)[:, :-1], axis=-1)


@jax.jit
def _loss(logp: Array, tokens: Array) -> Array:
    return -jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0]


def _score(params: Params, tokens: Array, logp: Array, arch: Architecture) -> tuple[Array, Array]:
    logq = _log_probabilities(params, tokens, arch)
    return _loss(logq, tokens), token_kl(logp, logq)


_against = jax.jit(_score, static_argnames="arch")
# XLA may keep float32 between fused bfloat16 operations; then the floor would depend on the batch size.
_against_rounded = jax.jit(_score, static_argnames="arch", compiler_options={"xla_allow_excess_precision": False})


def _batches(inputs: np.ndarray, batch: int) -> Iterator[np.ndarray]:
    """Equal batches, the last padded with rows of token 0, so that one compilation serves all."""
    for start in range(0, len(inputs), batch):
        rows = inputs[start : start + batch]
        yield np.pad(rows, ((0, batch - len(rows)), (0, 0)))


def _rows(batches: list[Array], n: int) -> Float[np.ndarray, "N targets"]:
    return np.concatenate([np.asarray(values) for values in batches])[:n]


def _sequence_sums(batches: list[Array], scored: np.ndarray) -> Float[np.ndarray, " N"]:
    values = _rows(batches, len(scored)).astype(np.float64)
    return np.where(scored[:, 1:], values, 0.0).sum(axis=1)


def _check_windows(arch: Architecture, inputs: np.ndarray, scored: np.ndarray, batch: int) -> None:
    if inputs.shape[1] > arch.max_positions:
        raise UserError(
            f"Windows of {inputs.shape[1]} tokens exceed the model's {arch.max_positions} positions; "
            "lower evaluate.context."
        )
    if inputs.min() < 0 or inputs.max() >= arch.vocab_size:
        raise UserError(
            f"Token {inputs.max()} lies outside the model's vocabulary of {arch.vocab_size}; "
            "use the model's own tokenizer."
        )
    if batch < 1:
        raise UserError(f"evaluate.batch is {batch}, but at least 1 window per call is needed.")
    if scored.shape != inputs.shape or scored[:, 0].any() or not scored.any():
        raise ValueError("scored must have the shape of inputs, a target, and none at position 0")


def _refuse_nan(nll: np.ndarray, role: str) -> None:
    if not np.isfinite(nll).all():
        first = int(np.flatnonzero(~np.isfinite(nll))[0])
        raise UserError(
            f"The {role} model's loss is NaN or infinite on evaluation window {first} of {len(nll)}; "
            "its weights overflow: use another checkpoint, or a higher rate or precision."
        )
