"""All coded matrices of a model through the trellis: a first pass fits the tables, a second one counts their rate.

Steps are a_ij = c STEP / (M_ii L_jj) with the Cholesky factors of both moments, so that an error of one step costs
the same everywhere. The second pass goes block by block behind the activations of what is already quantized.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from rdopt.checkpoint.families import INPUT_OF, MATRICES, MATRICES_OF, Key, input_groups, matrix_shapes
from rdopt.codec.grids.steps import exp_steps
from rdopt.codec.grids.trellis import TRELLIS_SLOPE, TRELLIS_STEP, TrellisPath, trellis_step
from rdopt.codec.streams.gains import Gains, quantize_gains
from rdopt.codec.streams.structured import Structured, component, dequantize_structured
from rdopt.codec.tables.classes import RowsCols, rank1_spreads
from rdopt.codec.tables.trellis import SPREAD_PRECISIONS, TrellisPlan, fit_plan, rates_of, starting_plan
from rdopt.config.progress import Tick
from rdopt.config.schema import Correction, EncodeConfig
from rdopt.encode.columns import quantize_columns
from rdopt.encode.drift import Prefix
from rdopt.encode.feedback import coordinate_spreads
from rdopt.encode.gain_fit import gain_precision, unbiased_gains
from rdopt.encode.quantize import Grid
from rdopt.encode.source import Source
from rdopt.encode.structured import ComponentGain, fit_structured
from rdopt.encode.wavefront import quantize_wavefront
from rdopt.rate.steps import lam_of_base_step


class TrellisModel(NamedTuple):
    """A quantized model: what the file has to say beside the steps."""

    paths: dict[Key, TrellisPath]
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
    weights = {(layer, name): block.params[name] for layer, block in enumerate(source.blocks()) for name in MATRICES}
    fitted = _components(source, c, encode, weights)
    components = {key: f for key, (f, _) in fitted.items()}
    guess = starting_plan([_expected_spreads(source, key, weights[key], c) for key in keys])
    first = _Pass(source, c, encode, guess, components, mu=0.0)

    def roughly(key: Key) -> tuple[TrellisPath, RowsCols]:
        path = first.path(key, weights[key])
        return path, first.spread(key, weights[key], path)

    with ThreadPoolExecutor(encode.threads or None) as threads:
        paths, spreads = zip(*count(threads.map(roughly, keys)), strict=True)
        fitted_plan, mu = fit_plan(paths, spreads, SPREAD_PRECISIONS[:1]), TRELLIS_SLOPE * encode.rdo
        second = _Pass(source, c, encode, fitted_plan, components, mu)
        done = _behind_prefix(second, encode, count, threads)
    ordered = [done[key] for key in keys]
    plan = fit_plan([x.path for x in ordered], [x.spread for x in ordered])
    gains = None if encode.gains == "none" else _joined([x.gains for x in ordered])
    worth = {key: gain for key, (_, gain) in fitted.items()}
    return TrellisModel({key: done[key].path for key in keys}, plan, gains, components, worth)


class Done(NamedTuple):
    """One quantized matrix: path, spreads of its coordinates, its gains, decoded weights as the network has them."""

    path: TrellisPath
    spread: RowsCols
    gains: Gains
    W: Float[np.ndarray, "out in"]


def _behind_prefix(
    second: "_Pass", encode: EncodeConfig, count: "_Counter", threads: ThreadPoolExecutor
) -> dict[Key, Done]:
    """All matrices in the order of the computation, each aimed at what undoes the drift so far."""
    source = second.source
    prefix = None if source.tokens is None else Prefix(source.aligned, source.tokens, encode.drift_damping)
    precision, finished = _gain_precision(source, second.c), {}
    for layer, group in input_groups(source.arch.num_layers):
        names = MATRICES_OF[group]
        before = {name: finished[layer, name].W for name in MATRICES if (layer, name) in finished}
        if prefix is None:
            targets = {name: source.original((layer, name)) for name in names}
        else:
            targets = prefix.targets(layer, group, before)
        one = partial(_finish, second, layer, targets, precision, encode.gains)
        for name, result in zip(names, count(threads.map(one, names)), strict=True):
            finished[layer, name] = result
        if prefix is not None and group == "down":
            prefix.advance(layer, {name: finished[layer, name].W for name in MATRICES})
    return finished


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
        L, M = grid.factors[key[0], INPUT_OF[key[1]]], grid.outputs.get(key)
        if M is None:
            return quantize_columns(W, L, row, col, rates, self._states)
        return quantize_wavefront(W, L, M, row, col, rates, self._states)

    def spread(self, key: Key, W: Float[np.ndarray, "out in"], path: TrellisPath) -> RowsCols:
        """Row and column spreads of the coordinates that were rounded."""
        grid = self.source.grid
        L, M = grid.factors[key[0], INPUT_OF[key[1]]], grid.outputs.get(key)
        error = np.asarray(W, np.float64) - self.decoded(key, path)
        return coordinate_spreads(path.values, error, L, M, *step_factors(grid, key, self.c))

    def decoded(self, key: Key, path: TrellisPath) -> Float[np.ndarray, "out in"]:
        """The weights that the decoder makes of a path, before gains; float32."""
        grid = self.source.grid
        row, col = grid.rows[key], grid.cols[key[0], INPUT_OF[key[1]]]
        return dequantize_structured(path.values, self._components.get(key), row, col, trellis_step(self.c))


def _components(
    source: Source, c: float, encode: EncodeConfig, weights: Mapping[Key, Float[np.ndarray, "out in"]]
) -> dict[Key, tuple[Structured, ComponentGain]]:
    """The low-rank components that pay, and what they are worth."""
    if encode.structured == "none":
        return {}

    def fit(key: Key) -> tuple[Structured, ComponentGain] | None:
        W = np.asarray(weights[key], np.float64)
        return fit_structured(W, *step_factors(source.grid, key, c), 1 / TRELLIS_STEP)

    with ThreadPoolExecutor(encode.threads or None) as threads:
        fits = zip(weights, threads.map(fit, weights), strict=True)
        return {key: fitted for key, fitted in fits if fitted is not None}


def step_factors(grid: Grid, key: Key, c: float) -> tuple[Float[np.ndarray, " out"], Float[np.ndarray, " in"]]:
    """Row and column factors of the trellis's steps, float64."""
    col = exp_steps(grid.cols[key[0], INPUT_OF[key[1]]]).astype(np.float64)
    return exp_steps(grid.rows[key]).astype(np.float64), col * (c * TRELLIS_STEP)


def _expected_spreads(source: Source, key: Key, W: Float[np.ndarray, "out in"], c: float):
    row, col = step_factors(source.grid, key, c)
    return rank1_spreads(np.asarray(W, np.float64) / np.outer(row, col))


def _finish(
    second: _Pass,
    layer: int,
    targets: Mapping[str, Float[np.ndarray, "_ _"]],
    precision: int,
    kind: Correction,
    name: str,
) -> Done:
    """Quantizes one matrix at its target."""
    key, block = (layer, name), second.source.block(layer)
    target = second.source.turned(key, targets[name])
    path = second.path(key, target)
    W, spread = second.decoded(key, path), second.spread(key, target, path)
    rows = {}
    if kind == "unbiased":
        rows[key] = np.log2(unbiased_gains(target, W, block.sigma[INPUT_OF[name]]))
    gains = quantize_gains(rows, {}, precision)
    return Done(path, spread, gains, second.source.undone(key, gains.apply(key, W)))


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
