"""KL(P_reference || P_candidate) per token and both models' losses, block by block and then slice by slice of the text.

The sum is formed from terms p f(d), d = log p - log q, f(d) = d + exp(-d) - 1 >= 0: equal to sum p d because
q sums to one, but without cancellation, so float32 logits give KLs far below 1e-8 nats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from rdopt.checkpoint.families import Architecture
from rdopt.config.errors import UserError
from rdopt.evaluate.perplexity import Perplexity, per_token, perplexity
from rdopt.operator.blockwise import Through, forward, last_stream, padded_batches
from rdopt.operator.llama import block, head_logits
from rdopt.operator.params import Params, map_params

Score = Callable[..., tuple[Array, Array]]
SLICE_BYTES = 2**26  # of float32 logits on the device at once, in each of a handful of arrays

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
    """The original model on the evaluation windows, run once: what is kept is the stream behind its last block.

    Args:
        params, arch: the original model, its blocks in memory or read when they are indexed.
        inputs: token windows, (N, context) int.
        scored: (N, context), True where a token is a target; see `windows`.
        batch: windows per device call.

    Raises:
        UserError: a token outside the vocabulary, a window too long for the model, or a NaN loss.
    """

    def __init__(
        self,
        params: Mapping[str, Any],
        arch: Architecture,
        inputs: Int[np.ndarray, "N context"],
        scored: Bool[np.ndarray, "N context"],
        batch: int,
    ):
        _check_windows(arch, inputs, scored, batch)
        self.params, self.arch, self.batch = params, arch, batch
        self.inputs, self.scored = np.asarray(inputs, np.int32), np.asarray(scored, bool)
        self.counts = self.scored.sum(axis=1)
        self._last = last_stream(params, self.inputs, arch, batch)
        head, parts = _head(params, arch), zip(self._slices(self._last[:, :-1]), self._labels(), strict=True)
        self.nll = self._sums(self._windows(_nll(head, x, labels, arch) for x, labels in parts))
        _refuse_nan(self.nll, "reference")

    @property
    def perplexity(self) -> Perplexity:
        """Of the reference itself."""
        return perplexity(self.nll, self.counts)

    def against(
        self, params: Mapping[str, Any], arch: Architecture, through: Through = forward, score: Score | None = None
    ) -> Comparison:
        """Scores a candidate: one block at a time, then both heads on some positions at a time.

        Args:
            params, arch: the candidate.
            through: runs one of its blocks.
            score: compares predictions; `_score` by default.
        """
        last = last_stream(params, self.inputs, arch, self.batch, through)
        head, other = _head(self.params, self.arch), _head(params, arch)
        rows = zip(self._slices(self._last[:, :-1]), self._slices(last[:, :-1]), self._labels(), strict=True)
        scored = [(score or _score)(head, other, x, y, labels, self.arch, arch) for x, y, labels in rows]
        losses, divergences = (self._windows(part[i] for part in scored) for i in range(2))
        nll = self._sums(losses)
        _refuse_nan(nll, "candidate")
        return Comparison(
            counts=self.counts,
            nll_reference=self.nll,
            nll_candidate=nll,
            kl_sums=self._sums(divergences),
            kl=divergences[self.scored[:, 1:]],
        )

    def _slices(self, x: Shaped[np.ndarray, "N targets ..."]) -> Iterator[np.ndarray]:
        """Some positions at a time, as many as SLICE_BYTES of logits allow; the last ones padded."""
        count = x.shape[0] * x.shape[1]
        return padded_batches(
            x.reshape(count, *x.shape[2:]), max(1, min(count, SLICE_BYTES // (4 * self.arch.vocab_size)))
        )

    def _labels(self) -> Iterator[np.ndarray]:
        return self._slices(self.inputs[:, 1:])

    def _windows(self, slices: Iterable[Array]) -> Float[np.ndarray, "N targets"]:
        """Figures of positions in slices as rows, one a window."""
        count, context = self.inputs.shape
        return np.concatenate([np.asarray(x) for x in slices])[: count * (context - 1)].reshape(count, context - 1)

    def _sums(self, values: Float[np.ndarray, "N targets"]) -> Float[np.ndarray, " N"]:
        return np.where(self.scored[:, 1:], values.astype(np.float64), 0.0).sum(axis=1)


def compare(reference: Reference, params: Mapping[str, Any], arch: Architecture) -> Comparison:
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
    return reference.against(params, arch)


def noise_floor_bf16(reference: Reference) -> float:
    """Mean KL, nats per token, of the model against its own bfloat16 forward pass: no KL below it matters."""
    rounded = map_params(lambda x: np.asarray(x).astype(jnp.bfloat16), reference.params)
    return reference.against(rounded, reference.arch, _forward_rounded, _score_rounded).kl_mean


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


def log_probabilities(ends: Params, x: Float[Array, "n d"], arch: Architecture) -> Float[Array, "n V"]:
    """What a model predicts, from the stream behind its last block; float32."""
    return jax.nn.log_softmax(head_logits(ends, x[None], arch)[0], axis=-1)


def _loss(logp: Float[Array, "n V"], labels: Int[Array, " n"]) -> Float[Array, " n"]:
    return -jnp.take_along_axis(logp, labels[:, None], axis=-1)[:, 0]


@partial(jax.jit, static_argnames="arch")
def _nll(head: Params, x: Array, labels: Array, arch: Architecture) -> Array:
    return _loss(log_probabilities(head, x, arch), labels)


def _score_slice(
    head: Params, other: Params, x: Array, y: Array, labels: Array, arch: Architecture, other_arch: Architecture
) -> tuple[Array, Array]:
    """(loss of the candidate, KL) of some positions; x and y are the streams of reference and candidate."""
    logp, logq = log_probabilities(head, x, arch), log_probabilities(other, y, other_arch)
    return _loss(logq, labels), token_kl(logp, logq)


_ARCHS = ("arch", "other_arch")
_score: Score = jax.jit(_score_slice, static_argnames=_ARCHS)
# XLA may keep float32 between fused bfloat16 operations; then the floor would depend on the batch size.
_EXACT_TYPES = {"xla_allow_excess_precision": False}
_score_rounded: Score = jax.jit(_score_slice, static_argnames=_ARCHS, compiler_options=_EXACT_TYPES)
_forward_rounded = jax.jit(block, static_argnames="arch", compiler_options=_EXACT_TYPES)


def _head(params: Mapping[str, Any], arch: Architecture) -> Params:
    """What makes predictions of the stream behind the last block, on the device."""
    return jax.device_put({k: params[k] for k in ("final_norm", "embed" if arch.tied else "head")})


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
