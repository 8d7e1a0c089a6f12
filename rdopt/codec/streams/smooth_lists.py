"""Lists of integers as smooth functions of channel and layer plus a coded residual.

A family of lists (say the row steps of every layer's query matrix) is predicted from a few features, chosen by total
bits and described by small integer weights: earlier entries of the list, the layers before, cosine modes along the
channel, and lists of the same layer that run over the same channels. What is left is coded (see `coders.logistic`).
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rdopt.codec.coders.bits import BitReader, BitWriter, unzigzag, zigzag
from rdopt.codec.coders.logistic import (
    LEVEL_OF_ONE,
    LEVELS,
    MAX_ENTRY,
    ONE,
    WINDOW,
    Predictor,
    decode_list,
    encode_slots,
    first_energy,
    laws,
    level_of,
    symbols_of,
)
from rdopt.codec.coders.rans import FIRST_STATE
from rdopt.transforms.stored.angles import SINE_BITS, sine_tables

LAGS = (1, 2, 3, 4, 8, 16, 32, 64)
MODES = (1, 2, 3, 4)
MAX_FEATURES = 8
MAX_WEIGHT = 1 << 8
_OWN = 1 + len(LAGS)  # features of the list itself: the mean of its last entries, then LAGS
_ALONE = _OWN + 3 + len(MODES)  # and: constant, layer before, mean of the layers before, cosine modes
_FEATURE_BITS = 11  # what a feature costs about: its number and its weight
_ANGLE_BITS = 14
_RIDGE = 4.0

Ints = Int[np.ndarray, " _"]
Lists = Sequence[Ints]


class Model(NamedTuple):
    """How a family is predicted: ascending feature numbers, their weights in 1 / ONE, level of the errors."""

    features: tuple[int, ...]
    weights: tuple[int, ...]
    level: int


def pack_families(families: Sequence[Lists]) -> bytes:
    """Codes families of lists of small integers.

    Args:
        families: each a list of integers a layer, all of one length; later families may be predicted from
            earlier ones of the same length and number of layers.

    Raises:
        ValueError: the integers of a list lie further than MAX_ENTRY from their median.
    """
    head, done, coded, escapes = BitWriter(), [], [], []
    last = 0
    for lists in families:
        bases = [int(np.median(x)) for x in lists]
        centred = [np.asarray(x, np.int64) - base for x, base in zip(lists, bases, strict=True)]
        if any(np.abs(x).max(initial=0) > MAX_ENTRY for x in centred):
            raise ValueError(f"scales differ by more than {MAX_ENTRY}")
        model = fit_model(centred, done)
        _write_model(head, model)
        for base in bases:
            head.gamma(zigzag(base - last))
            last = base
        coded += [_symbols(i, centred, done, model, escapes) for i in range(len(centred))]
        done.append(centred)
    slots = np.concatenate([np.zeros((2, 0), np.int64), *coded], axis=1)
    words = np.zeros(slots.shape[1] + 1, np.uint16)
    state, at = encode_slots(slots[0], slots[1], words)
    head.gamma(len(escapes))
    head.gammas(escapes)
    head.gamma(len(words) - at)
    return head.bytes() + np.uint32(state).astype("<u4").tobytes() + words[at:].astype("<u2").tobytes()


def unpack_families(data: bytes, sizes: Sequence[tuple[int, int]]) -> tuple[list[list[Ints]], bytes]:
    """Inverse of `pack_families`: (the families, the bytes behind them).

    Args:
        data: bytes that begin with the families.
        sizes: (number of lists, their length) of every family.

    Raises:
        ValueError: damaged bytes.
    """
    source, models, bases, last = BitReader(data), [], [], 0
    for i, (count, length) in enumerate(sizes):
        related = sum(size == (count, length) for size in sizes[:i])
        models.append(_read_model(source, _ALONE + related))
        for _ in range(count):
            last += unzigzag(source.gamma())
            bases.append(_bounded(last))
    escapes = np.array([_bounded(source.gamma()) for _ in range(source.gamma())], np.int64)
    count, at = source.gamma(), source.bytes_read
    if at + 4 + 2 * count > len(data):
        raise ValueError("the scales end before their last word")
    words = np.frombuffer(data, "<u2", count, at + 4).astype(np.uint16)
    state = np.uint64(int.from_bytes(data[at : at + 4], "little"))
    done = _decode(sizes, models, escapes, state, words)
    flat = iter(bases)
    shifted = [[(x + next(flat)).astype(np.int32) for x in lists] for lists in done]
    return shifted, data[at + 4 + 2 * count :]


def _decode(
    sizes: Sequence[tuple[int, int]], models: Sequence[Model], escapes: Ints, state: np.uint64, words: np.ndarray
) -> list[list[Ints]]:
    done: list[list[Ints]] = []
    at = used = 0
    start, reach = laws()
    for (count, length), model in zip(sizes, models, strict=True):
        lists: list[Ints] = []
        for layer in range(count):
            x = np.zeros(length, np.int64)
            p = _predictor(layer, length, lists, _related(done, count, length), model)
            state, at, used = decode_list(
                x, *p, first_energy(p.level), start, reach, np.uint64(state), words, at, escapes, used
            )
            if at < 0:
                raise ValueError("the scales are not those of any list")
            lists.append(x)
        done.append(lists)
    if at != len(words) or used != len(escapes) or state != FIRST_STATE:
        raise ValueError("the scales do not end with their last list")
    return done


def _symbols(layer: int, lists: Sequence[Ints], done: Sequence[Lists], model: Model, escapes: list[int]):
    """(2, n) slots of one list; appends its escapes."""
    x = lists[layer]
    p = _predictor(layer, len(x), lists[:layer], _related(done, len(lists), len(x)), model)
    slots, written = np.zeros((2, len(x)), np.int64), np.zeros(len(x), np.int64)
    start, reach = laws()
    used = symbols_of(x, *p, first_energy(p.level), start, reach, slots[0], slots[1], written)
    escapes += written[:used].tolist()
    return slots


def _related(done: Sequence[Lists], count: int, length: int) -> list[Lists]:
    """The earlier families that run over as many layers and channels, the latest first."""
    return [lists for lists in reversed(done) if (len(lists), len(lists[0]) if lists else 0) == (count, length)]


def _predictor(layer: int, n: int, before: Sequence[Ints], related: Sequence[Lists], model: Model) -> Predictor:
    known, lags, average = np.zeros(n, np.int64), [], 0
    for feature, weight in zip(model.features, model.weights, strict=True):
        if feature == 0:
            average = weight
        elif feature < _OWN:
            lags.append((LAGS[feature - 1], weight))
        else:
            known += weight * _feature(feature, layer, n, before, related)
    pairs = np.array(lags, np.int64).reshape(-1, 2)
    return Predictor(known, pairs[:, 0].copy(), pairs[:, 1].copy(), average, model.level)


def _feature(feature: int, layer: int, n: int, before: Sequence[Ints], related: Sequence[Lists]) -> Ints:
    """A feature that does not depend on the list itself, (n,) in 1 / ONE."""
    kind = feature - _OWN
    if kind == 0:
        return np.full(n, ONE, np.int64)
    if kind in (1, 2):
        if layer == 0:
            return np.zeros(n, np.int64)
        return ONE * before[-1] if kind == 1 else ONE * np.sum(before, axis=0) // layer
    if feature < _ALONE:
        return cosine_mode(MODES[kind - 3], n)
    return ONE * related[feature - _ALONE][layer]


@lru_cache(maxsize=256)
def cosine_mode(mode: int, n: int) -> Ints:
    """8 cos(pi mode (t + 1/2) / n) in 1 / ONE, from integer sines."""
    angle = (mode * (2 * np.arange(n, dtype=np.int64) + 1) << _ANGLE_BITS) // (4 * n)
    cos, _ = sine_tables(_ANGLE_BITS)
    return (8 * ONE * cos[angle % (1 << _ANGLE_BITS)] + (1 << SINE_BITS - 1)) >> SINE_BITS


def fit_model(lists: Lists, done: Sequence[Lists]) -> Model:
    """The features that pay for themselves, by forward selection with least squares; lists are centred."""
    n = len(lists[0]) if lists else 0
    y = np.concatenate([np.zeros(0), *lists])
    if not np.any(y):
        return Model((), (), 0)
    X = _design(lists, n, _related(done, len(lists), n))
    gram, moment, power = X.T @ X, X.T @ y, float(y @ y)

    def left(some: list[int]) -> float:
        """Squared error of the best prediction from some features."""
        return power - float(moment[some] @ _least_squares(gram, moment, some))

    chosen: list[int] = []
    least = power
    while len(chosen) < MAX_FEATURES:
        trials = {f: left([*chosen, f]) for f in range(len(gram)) if f not in chosen}
        best = min(trials, key=lambda f: trials[f])
        # Rounding to integers leaves a variance of 1/12 that no prediction takes away.
        gain = len(y) / 2 * np.log2((least + len(y) / 12) / (trials[best] + len(y) / 12))
        if gain < _FEATURE_BITS:
            break
        chosen.append(best)
        least = trials[best]
    chosen.sort()
    weights = np.rint(ONE * _least_squares(gram, moment, chosen)).clip(-MAX_WEIGHT, MAX_WEIGHT).astype(int)
    kept = [(f, int(w)) for f, w in zip(chosen, weights, strict=True) if w]
    error = y - X[:, [f for f, _ in kept]] @ (np.array([w for _, w in kept]) / ONE)
    return Model(tuple(f for f, _ in kept), tuple(w for _, w in kept), level_of(float(np.mean(np.abs(error)))))


def _least_squares(gram: np.ndarray, moment: np.ndarray, some: list[int]) -> Float[np.ndarray, " some"]:
    """Weights of some features."""
    return np.linalg.solve(gram[np.ix_(some, some)] + _RIDGE * np.eye(len(some)), moment[some])


def _design(lists: Lists, n: int, related: Sequence[Lists]) -> Float[np.ndarray, "entries features"]:
    """All features of all lists, in units of the integers."""
    blocks = []
    for layer, x in enumerate(lists):
        own = [_running_mean(x)]
        own += [np.concatenate([np.zeros(min(lag, n)), x[: max(n - lag, 0)]]) for lag in LAGS]
        rest = [_feature(f, layer, n, lists[:layer], related) / ONE for f in range(_OWN, _ALONE + len(related))]
        blocks.append(np.stack(own + rest, axis=1))
    return np.concatenate(blocks)


def _running_mean(x: Ints) -> Float[np.ndarray, " n"]:
    """Mean of the up to WINDOW entries before each one, 0 for the first."""
    total = np.concatenate([[0], np.cumsum(x)])
    t = np.arange(len(x))
    first = np.maximum(t - WINDOW, 0)
    return (total[t] - total[first]) / np.maximum(t - first, 1)


def _write_model(out: BitWriter, model: Model) -> None:
    """Number of features, their differences less one, zigzag weights, level."""
    out.gamma(len(model.features))
    last = -1
    for feature, weight in zip(model.features, model.weights, strict=True):
        out.gammas((feature - last - 1, zigzag(weight)))
        last = feature
    out.gamma(zigzag(model.level - LEVEL_OF_ONE))


def _read_model(source: BitReader, limit: int) -> Model:
    features, weights, last = [], [], -1
    for _ in range(source.gamma()):
        last += 1 + source.gamma()
        features.append(last)
        weights.append(unzigzag(source.gamma()))
        if last >= limit or abs(weights[-1]) > MAX_WEIGHT:
            raise ValueError(f"the scales are predicted from feature {last} with weight {weights[-1]}")
    level = unzigzag(source.gamma()) + LEVEL_OF_ONE
    if not 0 <= level < LEVELS:
        raise ValueError(f"errors of level {level}")
    return Model(tuple(features), tuple(weights), level)


def _bounded(value: int) -> int:
    if abs(value) > 16 * MAX_ENTRY:
        raise ValueError(f"a scale of {value}")
    return value
