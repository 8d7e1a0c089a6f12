"""All coded matrices of a model through the trellis: a first pass fits the tables, a second one counts their rate.

Steps are a_ij = c STEP / (M_ii L_jj) with the Cholesky factors of both moments, so that an error of one step costs
the same everywhere. The second pass goes block by block behind the activations of what is already quantized.
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
from rdopt.codec.coders.order import Order, from_lanes, to_lanes
from rdopt.codec.grids.steps import exp_steps
from rdopt.codec.grids.trellis import TRELLIS_SLOPE, TRELLIS_STEP, TrellisPath, trellis_step, walk_lanes
from rdopt.codec.streams.gains import Gains, quantize_gains
from rdopt.codec.streams.paths import restart
from rdopt.codec.streams.structured import Structured, component, dequantize_structured
from rdopt.codec.tables.classes import RowsCols, rank1_spreads
from rdopt.codec.tables.trellis import SPREAD_PRECISIONS, TrellisPlan, fit_plan, rates_of, starting_plan
from rdopt.config.parallel import bounded_map, on_cores
from rdopt.config.progress import Tick
from rdopt.config.schema import Correction, EncodeConfig
from rdopt.encode.columns import quantize_columns
from rdopt.encode.drift import Prefix
from rdopt.encode.feedback import coordinate_spreads
from rdopt.encode.gain_fit import gain_precision, unbiased_gains
from rdopt.encode.journal import Journal, digest
from rdopt.encode.quantize import Grid
from rdopt.encode.source import Source
from rdopt.encode.structured import ComponentGain, fit_structured
from rdopt.encode.wavefront import quantize_wavefront
from rdopt.rate.steps import lam_of_base_step

_SHARE = 4  # of the budget may be taken by indices of one or two bytes


class KeptPaths(Sequence):
    """The paths of all matrices in the order of the file, kept as indices of one or two bytes, if need be on disk.

    Args:
        source: the model.
        states: of the trellis.
    """

    def __init__(self, source: Source, states: int) -> None:
        self._keys, self._states = list(matrix_shapes(source.arch)), states
        self._spill = Spill(source.aligned.subject.cache.budget // _SHARE)
        self.orders: list[Order] = ["diagonals" if key in source.grid.two_sided else "columns" for key in self._keys]

    def keep(self, key: Key, k: Int[np.ndarray, "out in"]) -> None:
        """Keeps the indices of one matrix."""
        self._spill.keep(key, narrowed(k))

    def indices(self, key: Key) -> Int[np.ndarray, "out in"]:
        """The indices of one matrix in their narrow type."""
        return self._spill.read(key)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, matrix: Any) -> Any:
        order, k = self.orders[matrix], self._spill.read(self._keys[matrix]).astype(np.int32)
        values, grids = walk_lanes(to_lanes(k, order), self._states, restart(order))
        return TrellisPath(k, from_lanes(values, order), from_lanes(grids, order))


def narrowed(k: Int[np.ndarray, "out in"]) -> Int[np.ndarray, "out in"]:
    """Indices in the shortest signed type that holds them."""
    largest = np.abs(k).max(initial=0)
    shortest = next(kind for kind in (np.int8, np.int16, np.int32) if largest <= np.iinfo(kind).max)
    return np.ascontiguousarray(k, shortest)


class TrellisModel(NamedTuple):
    """A quantized model: what the file has to say beside the steps."""

    paths: KeptPaths
    plan: TrellisPlan
    gains: Gains | None
    components: dict[Key, Structured]
    component_gains: dict[Key, ComponentGain]


def quantize_trellis(source: Source, c: float, encode: EncodeConfig, progress: Tick | None = None) -> TrellisModel:
    """Paths, tables and gains of every coded matrix at the base step c.

    Args:
        source: the model.
        c: base step of the scalar grid of equal distortion.
        encode: states, rdo, gains, threads.
        progress: called with (matrices done, of how many) over both passes.
    """
    keys = list(matrix_shapes(source.arch))
    count = _Counter(progress, 2 * len(keys))
    paths = KeptPaths(source, encode.states)
    with on_cores(encode.threads) as threads:
        guess, fitted = _expected(source, c, encode, threads)
        components = {key: f for key, (f, _) in fitted.items()}
        journal = Journal(None if source.work is None else source.work / "indices", _key(source, c, encode))
        first = _Pass(source, c, encode, guess, components, mu=0.0)
        spreads = _first_pass(first, paths, journal, count, threads)
        fitted_plan, mu = fit_plan(paths, spreads, SPREAD_PRECISIONS[:1]), TRELLIS_SLOPE * encode.rdo
        second = _Pass(source, c, encode, fitted_plan, components, mu)
        done = _behind_prefix(second, encode, paths, journal, count, threads)
    plan = fit_plan(paths, [x.spread for x in done])
    gains = None if encode.gains == "none" else _joined([x.gains for x in done])
    worth = {key: gain for key, (_, gain) in fitted.items()}
    return TrellisModel(paths, plan, gains, components, worth)


def _expected(
    source: Source, c: float, encode: EncodeConfig, threads: ThreadPoolExecutor
) -> tuple[TrellisPlan, dict[Key, tuple[Structured, ComponentGain]]]:
    """Classes before anything is quantized, and the low-rank components that pay with what they are worth."""
    spreads, components = [], {}

    def one(key: Key) -> tuple[RowsCols, tuple[Structured, ComponentGain] | None]:
        W, (row, col) = np.asarray(source.block(key[0]).params[key[1]], np.float64), step_factors(source.grid, key, c)
        component = None if encode.structured == "none" else fit_structured(W, row, col, 1 / TRELLIS_STEP)
        return rank1_spreads(W / np.outer(row, col)), component

    keys = list(matrix_shapes(source.arch))
    for key, (spread, fitted) in zip(keys, bounded_map(threads, one, keys), strict=True):
        spreads.append(spread)
        if fitted is not None:
            components[key] = fitted
    return starting_plan(spreads), components


def _key(source: Source, c: float, encode: EncodeConfig) -> str:
    """What the indices of a file depend on."""
    steps = [*source.grid.rows.values(), *source.grid.cols.values()]
    tokens = np.zeros(0) if source.tokens is None else source.tokens
    return digest(source.aligned.subject.fingerprint, repr((c, replace(encode, threads=0))), tokens, *steps)


def _first_pass(
    first: "_Pass", paths: "KeptPaths", journal: Journal, count: "_Counter", threads: ThreadPoolExecutor
) -> list[RowsCols]:
    """Paths before tables are known, and the spreads of the coordinates that were rounded."""
    spreads = []
    for layer in range(first.source.arch.num_layers):
        kept = journal.read(f"first-{layer}")
        if kept is None:
            found = dict(zip(MATRICES, threads.map(partial(_roughly, first, layer), MATRICES), strict=True))
            kept = {f"{name}.k": narrowed(path.k) for name, (path, _) in found.items()}
            kept |= {f"{name}.{i}": x for name, (_, spread) in found.items() for i, x in enumerate(spread)}
            journal.write(f"first-{layer}", kept)
        for name in count(MATRICES):
            paths.keep((layer, name), kept[f"{name}.k"])
            spreads.append((kept[f"{name}.0"], kept[f"{name}.1"]))
    return spreads


def _roughly(first: "_Pass", layer: int, name: str) -> tuple[TrellisPath, RowsCols]:
    """A matrix before tables are known: its path, and the spreads of its coordinates."""
    W = first.source.block(layer).params[name]
    path = first.path((layer, name), W)
    return path, first.spread((layer, name), W, path)


class Done(NamedTuple):
    """What the file says of one quantized matrix beside its path: spreads of its coordinates, and its gains."""

    spread: RowsCols
    gains: Gains


def _behind_prefix(
    second: "_Pass",
    encode: EncodeConfig,
    paths: KeptPaths,
    journal: Journal,
    count: "_Counter",
    threads: ThreadPoolExecutor,
) -> list[Done]:
    """All matrices in the order of the computation, each aimed at what undoes the drift so far; in that of the file."""
    source, finished = second.source, {}
    prefix = None if source.tokens is None else Prefix(source.aligned, source.tokens, encode.drift_damping)
    precision = _gain_precision(source, second.c)
    state = journal.read("prefix")
    if prefix is not None and state is not None:
        prefix.go_on(state)
    known = source.arch.num_layers if prefix is None else prefix.layer  # blocks behind which the prefix stands
    for layer in range(source.arch.num_layers):
        kept = journal.read(f"second-{layer}") if layer < known else None
        if kept is not None:
            for name in count(MATRICES):
                paths.keep((layer, name), kept[f"{name}.k"])
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
            one = partial(_finish, second, layer, targets, precision, encode.gains)
            for name, (path, done, W) in zip(names, count(threads.map(one, names)), strict=True):
                paths.keep((layer, name), path.k)
                finished[layer, name], decoded[name] = done, W
        journal.write(f"second-{layer}", _block_arrays(paths, finished, layer))
        if prefix is not None:
            prefix.advance(layer, decoded)
            journal.write("prefix", prefix.state())
    return [finished[key] for key in matrix_shapes(source.arch)]


def _block_arrays(paths: KeptPaths, finished: Mapping[Key, Done], layer: int) -> dict[str, np.ndarray]:
    """What the journal keeps of a block."""
    arrays = {}
    for name in MATRICES:
        done = finished[layer, name]
        arrays[f"{name}.k"] = paths.indices((layer, name))
        arrays |= {f"{name}.{i}": x for i, x in enumerate(done.spread)}
        arrays |= {f"{name}.rows": k for k in done.gains.rows.values()}
    return arrays


def _joined(gains: Sequence[Gains]) -> Gains:
    """The gains of all matrices, which have one precision."""
    rows = {key: k for x in gains for key, k in x.rows.items()}
    return Gains(gains[0].precision, rows, {key: k for x in gains for key, k in x.cols.items()})


class _Pass:
    """One way over all matrices with fixed tables."""

    def __init__(
        self,
        source: Source,
        c: float,
        encode: EncodeConfig,
        plan: TrellisPlan,
        components: Mapping[Key, Structured],
        mu: float,
    ):
        self.source, self.c, self._states = source, c, encode.states
        self._rates = dict(zip(matrix_shapes(source.arch), rates_of(plan, mu), strict=True))
        self._components = components

    def path(self, key: Key, W: Float[np.ndarray, "out in"]) -> TrellisPath:
        """Quantizes what a matrix has beside its component."""
        grid, rates, f = self.source.grid, self._rates[key], self._components.get(key)
        row, col = step_factors(grid, key, self.c)
        if f is not None:
            W = W - component(f, grid.rows[key], grid.cols[key[0], INPUT_OF[key[1]]], trellis_step(self.c))
        L, M = self._factors(key)
        if M is None:
            return quantize_columns(W, L, row, col, rates, self._states)
        return quantize_wavefront(W, L, M, row, col, rates, self._states)

    def spread(self, key: Key, W: Float[np.ndarray, "out in"], path: TrellisPath) -> RowsCols:
        """Row and column spreads of the coordinates that were rounded."""
        L, M = self._factors(key)
        error = np.asarray(W, np.float64) - self.decoded(key, path)
        return coordinate_spreads(path.values, error, L, M, *step_factors(self.source.grid, key, self.c))

    def decoded(self, key: Key, path: TrellisPath) -> Float[np.ndarray, "out in"]:
        """The weights that the decoder makes of a path, before gains; float32."""
        grid = self.source.grid
        row, col = grid.rows[key], grid.cols[key[0], INPUT_OF[key[1]]]
        return dequantize_structured(path.values, self._components.get(key), row, col, trellis_step(self.c))

    def _factors(self, key: Key) -> tuple[Float[np.ndarray, "in in"], Float[np.ndarray, "out out"] | None]:
        metric = self.source.metric(key[0])
        return metric.L[INPUT_OF[key[1]]], metric.M.get(key[1])


def step_factors(grid: Grid, key: Key, c: float) -> tuple[Float[np.ndarray, " out"], Float[np.ndarray, " in"]]:
    """Row and column factors of the trellis's steps, float64."""
    col = exp_steps(grid.cols[key[0], INPUT_OF[key[1]]]).astype(np.float64)
    return exp_steps(grid.rows[key]).astype(np.float64), col * (c * TRELLIS_STEP)


def _finish(
    second: _Pass,
    layer: int,
    targets: Mapping[str, Float[np.ndarray, "_ _"]],
    precision: int,
    kind: Correction,
    name: str,
) -> tuple[TrellisPath, Done, Float[np.ndarray, "out in"]]:
    """Quantizes one matrix at its target: its path, what the file says beside it, and what the network will have."""
    key, block = (layer, name), second.source.block(layer)
    target = second.source.turned(key, targets[name])
    path = second.path(key, target)
    W, spread = second.decoded(key, path), second.spread(key, target, path)
    rows = {}
    if kind == "unbiased":
        rows[key] = np.log2(unbiased_gains(target, W, block.sigma[INPUT_OF[name]]))
    gains = quantize_gains(rows, {}, precision)
    return path, Done(spread, gains), second.source.undone(key, gains.apply(key, W))


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
