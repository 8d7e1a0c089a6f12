"""All coded matrices of a model through the trellis: rows of each are sampled for the tables of the rate term.

Steps are a_ij = c STEP / (M_ii L_jj) with the Cholesky factors of both moments, so that an error of one step costs
the same everywhere. One pass goes block by block behind the activations of what is already quantized; the tables of the
file are fitted to what it found.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rdopt.checkpoint.families import INPUT_OF, MATRICES, MATRICES_OF, Key, matrix_shapes
from rdopt.checkpoint.spill import Spill
from rdopt.codec.coders.order import Order
from rdopt.codec.grids.steps import exp_steps
from rdopt.codec.grids.trellis import TRELLIS_SLOPE, TRELLIS_STEP, TrellisPath, trellis_step
from rdopt.codec.streams.gains import Gains, quantize_gains
from rdopt.codec.streams.structured import Structured, component, dequantize_structured
from rdopt.codec.tables.classes import RowsCols, rank1_spreads
from rdopt.codec.tables.trellis import TrellisPlan, fit_plan, rates_of
from rdopt.config.parallel import bounded_map, on_cores
from rdopt.config.progress import Tick
from rdopt.config.schema import Correction, EncodeConfig
from rdopt.encode.drift import Prefix
from rdopt.encode.gain_fit import gain_precision, unbiased_gains
from rdopt.encode.journal import Journal, digest
from rdopt.encode.quantize import Grid
from rdopt.encode.source import Source
from rdopt.encode.structured import ComponentGain, fit_structured
from rdopt.encode.trellis_matrix import Sample, narrowed, quantize_matrix, sample_matrix, sampled_plan
from rdopt.rate.steps import lam_of_base_step

_SHARE = 4  # of the budget may be taken by indices of one or two bytes


class KeptIndices(Sequence):
    """The indices of all matrices in the order of the file, in one or two bytes each, if need be on disk.

    Args:
        source: the model.
    """

    def __init__(self, source: Source) -> None:
        self._keys = list(matrix_shapes(source.arch))
        self._spill = Spill(source.aligned.subject.cache.budget // _SHARE)
        self.orders: list[Order] = ["diagonals" if key in source.grid.two_sided else "columns" for key in self._keys]

    def keep(self, key: Key, k: Int[np.ndarray, "out in"]) -> None:
        """Keeps the indices of one matrix."""
        self._spill.keep(key, narrowed(k))

    def of(self, key: Key) -> Int[np.ndarray, "out in"]:
        """The indices of one matrix."""
        return self._spill.read(key)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, matrix: Any) -> Any:
        return self.of(self._keys[matrix])


class TrellisModel(NamedTuple):
    """A quantized model: what the file has to say beside the steps."""

    indices: KeptIndices
    plan: TrellisPlan
    gains: Gains | None
    components: dict[Key, Structured]
    component_gains: dict[Key, ComponentGain]


def quantize_trellis(source: Source, c: float, encode: EncodeConfig, progress: Tick | None = None) -> TrellisModel:
    """Indices, tables and gains of every coded matrix at the base step c.

    Args:
        source: the model.
        c: base step of the scalar grid of equal distortion.
        encode: states, rdo, gains, threads.
        progress: called with (matrices done, of how many).
    """
    indices = KeptIndices(source)
    with on_cores(encode.threads) as threads:
        keys = list(matrix_shapes(source.arch))
        expected = list(bounded_map(threads, partial(_expected, source, c, encode), keys))
        plan = sampled_plan([sample for sample, _ in expected], indices.orders, encode.states)
        fitted = {key: found for key, (_, found) in zip(keys, expected, strict=True) if found is not None}
        components = {key: f for key, (f, _) in fitted.items()}
        journal = Journal(None if source.work is None else source.work / "indices", _key(source, c, encode))
        quantizer = _Quantizer(source, c, encode, plan, components)
        count = _Counter(progress, len(indices))
        done = _behind_prefix(quantizer, encode, indices, journal, count, threads)
    plan = fit_plan(indices, indices.orders, encode.states, [x.spread for x in done])
    gains = None if encode.gains == "none" else _joined([x.gains for x in done])
    worth = {key: gain for key, (_, gain) in fitted.items()}
    return TrellisModel(indices, plan, gains, components, worth)


def _expected(
    source: Source, c: float, encode: EncodeConfig, key: Key
) -> tuple[Sample, tuple[Structured, ComponentGain] | None]:
    """What is known of a matrix before it is quantized, and a low-rank component that pays with what it is worth."""
    W, steps = np.asarray(source.block(key[0]).params[key[1]], np.float64), step_factors(source.grid, key, c)
    fitted = None if encode.structured == "none" else fit_structured(W, *steps, 1 / TRELLIS_STEP)
    if fitted is not None:
        W = W - _component(source.grid, key, c, fitted[0])
    return sample_matrix(W, *_factors(source, key), *steps, encode), fitted


def _key(source: Source, c: float, encode: EncodeConfig) -> str:
    """What the indices of a file depend on."""
    steps = [*source.grid.rows.values(), *source.grid.cols.values()]
    tokens = np.zeros(0) if source.tokens is None else source.tokens
    return digest(source.aligned.subject.fingerprint, repr((c, replace(encode, threads=0))), tokens, *steps)


class _Quantizer:
    """Quantizes matrices with tables that stand before."""

    def __init__(
        self, source: Source, c: float, encode: EncodeConfig, plan: TrellisPlan, components: Mapping[Key, Structured]
    ):
        self.source, self.c, self._states, self._components = source, c, encode.states, components
        rates = rates_of(plan, TRELLIS_SLOPE * encode.rdo)
        self._rates = dict(zip(matrix_shapes(source.arch), rates, strict=True))

    def path(self, key: Key, W: Float[np.ndarray, "out in"]) -> TrellisPath:
        """Quantizes what a matrix has beside its component."""
        rates, f, steps = self._rates[key], self._components.get(key), step_factors(self.source.grid, key, self.c)
        if f is not None:
            W = W - _component(self.source.grid, key, self.c, f)
        return quantize_matrix(W, *_factors(self.source, key), *steps, rates, self._states)

    def decoded(self, key: Key, path: TrellisPath) -> Float[np.ndarray, "out in"]:
        """The weights that the decoder makes of a path, before gains; float32."""
        grid = self.source.grid
        row, col = grid.rows[key], grid.cols[key[0], INPUT_OF[key[1]]]
        return dequantize_structured(path.values, self._components.get(key), row, col, trellis_step(self.c))


def _component(grid: Grid, key: Key, c: float, f: Structured) -> Float[np.ndarray, "out in"]:
    """The low-rank component of a matrix."""
    return component(f, grid.rows[key], grid.cols[key[0], INPUT_OF[key[1]]], trellis_step(c))


def _factors(source: Source, key: Key) -> tuple[Float[np.ndarray, "in in"], Float[np.ndarray, "out out"] | None]:
    """The Cholesky factors of both moments, none of the output's where errors are not fed back over the rows."""
    metric = source.metric(key[0])
    return metric.L[INPUT_OF[key[1]]], metric.M.get(key[1])


class Done(NamedTuple):
    """What the file says of one quantized matrix beside its path: spreads of its coordinates, and its gains."""

    spread: RowsCols
    gains: Gains


def _behind_prefix(
    quantizer: _Quantizer,
    encode: EncodeConfig,
    indices: KeptIndices,
    journal: Journal,
    count: "_Counter",
    threads: ThreadPoolExecutor,
) -> list[Done]:
    """All matrices in the order of the computation, each aimed at what undoes the drift so far; in that of the file."""
    source, finished = quantizer.source, {}
    prefix = None if source.tokens is None else Prefix(source.aligned, source.tokens, encode.drift_damping)
    precision = _gain_precision(source, quantizer.c)
    state = journal.read("prefix")
    if prefix is not None and state is not None:
        prefix.go_on(state)
    known = source.arch.num_layers if prefix is None else prefix.layer  # blocks behind which the prefix stands
    for layer in range(source.arch.num_layers):
        kept = journal.read(f"block-{layer}") if layer < known else None
        if kept is not None:
            for name in count(MATRICES):
                indices.keep((layer, name), kept[f"{name}.k"])
                rows = {(layer, name): kept[f"{name}.rows"]} if f"{name}.rows" in kept else {}
                spread = kept[f"{name}.0"], kept[f"{name}.1"]
                finished[layer, name] = Done(spread, Gains(precision, rows, {}))
            continue
        decoded: dict[str, Float[np.ndarray, "out in"]] = {}
        for group, names in MATRICES_OF.items():
            if prefix is None:
                targets = {name: source.original((layer, name)) for name in names}
            else:
                targets = prefix.targets(layer, group, decoded)
            one = partial(_finish, quantizer, layer, targets, precision, encode.gains)
            for name, (path, done, W) in zip(names, count(threads.map(one, names)), strict=True):
                indices.keep((layer, name), path.k)
                finished[layer, name], decoded[name] = done, W
        journal.write(f"block-{layer}", _block_arrays(indices, finished, layer))
        if prefix is not None:
            prefix.advance(layer, decoded)
            journal.write("prefix", prefix.state())
    return [finished[key] for key in matrix_shapes(source.arch)]


def _block_arrays(indices: KeptIndices, finished: Mapping[Key, Done], layer: int) -> dict[str, np.ndarray]:
    """What the journal keeps of a block."""
    arrays = {}
    for name in MATRICES:
        done = finished[layer, name]
        arrays[f"{name}.k"] = indices.of((layer, name))
        arrays |= {f"{name}.{i}": x for i, x in enumerate(done.spread)}
        arrays |= {f"{name}.rows": k for k in done.gains.rows.values()}
    return arrays


def _joined(gains: Sequence[Gains]) -> Gains:
    """The gains of all matrices, which have one precision."""
    rows = {key: k for x in gains for key, k in x.rows.items()}
    return Gains(gains[0].precision, rows, {key: k for x in gains for key, k in x.cols.items()})


def step_factors(grid: Grid, key: Key, c: float) -> tuple[Float[np.ndarray, " out"], Float[np.ndarray, " in"]]:
    """Row and column factors of the trellis's steps, float64."""
    col = exp_steps(grid.cols[key[0], INPUT_OF[key[1]]]).astype(np.float64)
    return exp_steps(grid.rows[key]).astype(np.float64), col * (c * TRELLIS_STEP)


def _finish(
    quantizer: _Quantizer,
    layer: int,
    targets: Mapping[str, Float[np.ndarray, "_ _"]],
    precision: int,
    kind: Correction,
    name: str,
) -> tuple[TrellisPath, Done, Float[np.ndarray, "out in"]]:
    """Quantizes one matrix at its target: its path, what the file says beside it, and what the network will have."""
    key, block = (layer, name), quantizer.source.block(layer)
    target = quantizer.source.turned(key, targets[name])
    path = quantizer.path(key, target)
    W, spread = quantizer.decoded(key, path), rank1_spreads(path.targets)
    rows = {}
    if kind == "unbiased":
        rows[key] = np.log2(unbiased_gains(target, W, block.sigma[INPUT_OF[name]]))
    gains = quantize_gains(rows, {}, precision)
    return path, Done(spread, gains), quantizer.source.undone(key, gains.apply(key, W))


def _gain_precision(source: Source, c: float) -> int:
    """The precision of the gains, by their number and what rounding them costs."""
    rows = sum(len(source.block(0).params[name]) for name in MATRICES) * source.arch.num_layers
    return gain_precision(rows, source.weights, lam_of_base_step(c, source.weights), source.signal)


class _Counter:
    """Passes results on and reports how many there were."""

    def __init__(self, progress: Tick | None, total: int):
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self, results) -> Iterator:
        for result in results:
            self._done += 1
            if self._progress is not None:
                self._progress(self._done, self._total)
            yield result
