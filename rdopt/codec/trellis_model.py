"""All coded matrices of a model through the trellis: a first pass fits the tables, a second one counts their rate.

Steps are a_ij = c STEP / (M_ii L_jj) with the Cholesky factors of both moments, so that an error of one step costs
the same everywhere. The second pass goes block by block behind the activations of what is already quantized.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rdopt.calibration import INPUT_OF
from rdopt.checkpoint import MATRICES, Architecture
from rdopt.codec.classes import rank1_spreads
from rdopt.codec.columns import Path, Rates, quantize_columns
from rdopt.codec.drift import Prefix, prefix_order
from rdopt.codec.gains import PRECISIONS as GAIN_PRECISIONS
from rdopt.codec.gains import Gains, apply_gains, quantize_gains
from rdopt.codec.quantize import Grid, Key, matrix_shapes
from rdopt.codec.steps import exp_steps, lam_of_base_step
from rdopt.codec.structured import Gain, Structured, component, fit_structured, rebuild
from rdopt.codec.trellis_plan import PRECISIONS, Spread, TrellisPlan, fit_plan, rate_table, starting_plan
from rdopt.codec.wavefront import quantize_wavefront
from rdopt.config import EncodeConfig
from rdopt.operator import Params

# A trellis of this step has the distortion of a scalar grid of step one at high rate: its error is 0.26 of a
# squared step (1.09 dB of granular gain on grids of step two), the scalar grid's 1/12.
STEP = 0.566
SLOPE = 0.36  # squared steps per bit on the curve D(R) at high rate: 2 ln2 0.26
_GAIN_LIMIT = 2.0

Ticker = Callable[[int, int], None] | None


class TrellisModel(NamedTuple):
    """A quantized model: what the file has to say beside the steps."""

    paths: dict[Key, Path]
    plan: TrellisPlan
    gains: Gains | None
    components: dict[Key, Structured]


class Task(NamedTuple):
    """What is quantized.

    Attributes:
        params: weights in the coordinates of the grid.
        arch: architecture.
        grid: steps and metric.
        tokens: calibration sequences for the drift's correction, or none for no correction.
        sigma: input group -> (layers, in, in) second moments.
        signal: 1/2 tr(G W sigma W^T) summed over the matrices, nats/token.
    """

    params: Params
    arch: Architecture
    grid: Grid
    tokens: Int[np.ndarray, "n length"] | None
    sigma: Mapping[str, Float[np.ndarray, "layers in in"]]
    signal: float


def quantize_trellis(task: Task, c: float, encode: EncodeConfig, progress: Ticker = None) -> TrellisModel:
    """Paths, tables and gains of every coded matrix at the base step c.

    Args:
        task: the model.
        c: base step of the scalar grid of equal distortion.
        encode: states, rdo, gains, threads.
        progress: called with (matrices done, of how many) over both passes.
    """
    keys = list(matrix_shapes(task.arch))
    count = _Counter(progress, 2 * len(keys))
    weights = {key: task.params["blocks"][key[1]][key[0]] for key in keys}
    components = _components(task, c, encode, weights)
    guess = starting_plan([_expected_spreads(task, key, weights[key], c) for key in keys])
    first = _Pass(task, c, encode, guess, components, mu=0.0)

    def roughly(key: Key) -> tuple[Path, Spread]:
        path = first.path(key, weights[key])
        return path, first.spread(key, weights[key], path)

    with ThreadPoolExecutor(encode.threads or None) as threads:
        paths, spreads = zip(*count(threads.map(roughly, keys)), strict=True)
        second = _Pass(task, c, encode, fit_plan(paths, spreads, PRECISIONS[:1]), components, SLOPE * encode.rdo)
        done = _behind_prefix(second, encode, count, threads)
    ordered = [done[key] for key in keys]
    plan = fit_plan([x.path for x in ordered], [x.spread for x in ordered])
    logs = {key: x.log_gains for key, x in done.items()}
    gains = quantize_gains(logs, {}, _gain_precision(task, c)) if encode.gains == "unbiased" else None
    return TrellisModel({key: done[key].path for key in keys}, plan, gains, components)


class Done(NamedTuple):
    """One quantized matrix: path, spreads of its coordinates, log2 row gains, decoded weights."""

    path: Path
    spread: Spread
    log_gains: Float[np.ndarray, " out"]
    W: Float[np.ndarray, "out in"]


def _behind_prefix(
    second: "_Pass", encode: EncodeConfig, count: "_Counter", threads: ThreadPoolExecutor
) -> dict[Key, Done]:
    """All matrices in the order of the computation, each aimed at what undoes the drift so far."""
    task = second.task
    prefix = None if task.tokens is None else Prefix(task.params, task.arch, task.tokens, encode.damping)
    precision, found = _gain_precision(task, second.c), {}
    for layer, group in prefix_order(task.arch.num_layers):
        names = [name for name in MATRICES if INPUT_OF[name] == group]
        before = {name: found[layer, name].W for name in MATRICES if (layer, name) in found}
        if prefix is None:
            targets = {name: task.params["blocks"][name][layer] for name in names}
        else:
            targets = prefix.targets(layer, group, before)
        one = partial(_finish, second, layer, targets, precision, encode.gains == "unbiased")
        for name, result in zip(names, count(threads.map(one, names)), strict=True):
            found[layer, name] = result
        if prefix is not None and group == "down":
            prefix.advance(layer, {name: found[layer, name].W for name in MATRICES})
    return found


class _Pass:
    """One way over all matrices with fixed tables."""

    def __init__(
        self,
        task: Task,
        c: float,
        encode: EncodeConfig,
        plan: TrellisPlan,
        components: Mapping[Key, Structured],
        mu: float,
    ):
        self.task, self.c, self._states, self._mu = task, c, encode.states, mu
        self._bits, self._low = rate_table(plan)
        self._spreads = dict(zip(matrix_shapes(task.arch), plan.spreads, strict=True))
        self._components = components

    def path(self, key: Key, W: Float[np.ndarray, "out in"]) -> Path:
        """Quantizes what a matrix has beside its component."""
        grid, spreads, f = self.task.grid, self._spreads[key], self._components.get(key)
        row, col = step_factors(grid, key, self.c)
        if f is not None:
            W = W - component(f, grid.rows[key], grid.cols[key[0], INPUT_OF[key[1]]], trellis_step(self.c))
        rates = Rates(spreads.row.astype(np.int64), (spreads.col - self._low).astype(np.int64), self._bits, self._mu)
        L, M = grid.factors[key[0], INPUT_OF[key[1]]], grid.outputs.get(key)
        if M is None:
            return quantize_columns(W, L, row, col, rates, self._states)
        return quantize_wavefront(W, L, M, row, col, rates, self._states)

    def spread(self, key: Key, W: Float[np.ndarray, "out in"], path: Path) -> Spread:
        """Row and column spreads of the coordinates that were rounded: the values plus what M^T (W - W^) L leaves."""
        grid = self.task.grid
        row, col = step_factors(grid, key, self.c)
        L, M = grid.factors[key[0], INPUT_OF[key[1]]], grid.outputs.get(key)
        left = np.asarray(W, np.float64) - self.decoded(key, path)
        error = left @ L if M is None else M.T @ left @ L
        rows = row if M is None else row * np.diagonal(M)
        return rank1_spreads(path.values + error / np.outer(rows, col * np.diagonal(L)))

    def decoded(self, key: Key, path: Path) -> Float[np.ndarray, "out in"]:
        """The weights that the decoder makes of a path, before gains; float32."""
        grid = self.task.grid
        row, col = grid.rows[key], grid.cols[key[0], INPUT_OF[key[1]]]
        return rebuild(path.values, self._components.get(key), row, col, trellis_step(self.c))


def _components(
    task: Task, c: float, encode: EncodeConfig, weights: Mapping[Key, Float[np.ndarray, "out in"]]
) -> dict[Key, Structured]:
    """The low-rank components that pay."""
    if encode.structured == "none":
        return {}

    def fit(key: Key) -> tuple[Structured, Gain] | None:
        return fit_structured(np.asarray(weights[key], np.float64), *step_factors(task.grid, key, c), 1 / STEP)

    with ThreadPoolExecutor(encode.threads or None) as threads:
        found = zip(weights, threads.map(fit, weights), strict=True)
        return {key: fitted[0] for key, fitted in found if fitted is not None}


def step_factors(grid: Grid, key: Key, c: float) -> tuple[Float[np.ndarray, " out"], Float[np.ndarray, " in"]]:
    """Row and column factors of the trellis's steps, float64."""
    col = exp_steps(grid.cols[key[0], INPUT_OF[key[1]]]).astype(np.float64)
    return exp_steps(grid.rows[key]).astype(np.float64), col * (c * STEP)


def trellis_step(c: float) -> float:
    """The base step of the trellis as the float32 number that encoder and decoder multiply with."""
    return float(np.float32(c) * np.float32(STEP))


def _expected_spreads(task: Task, key: Key, W: Float[np.ndarray, "out in"], c: float):
    row, col = step_factors(task.grid, key, c)
    return rank1_spreads(np.asarray(W, np.float64) / np.outer(row, col))


def _finish(
    second: _Pass,
    layer: int,
    targets: Mapping[str, Float[np.ndarray, "_ _"]],
    precision: int,
    unbiased: bool,
    name: str,
) -> Done:
    """Quantizes one matrix at its target."""
    key = (layer, name)
    path = second.path(key, targets[name])
    W, spread = second.decoded(key, path), second.spread(key, targets[name], path)
    if not unbiased:
        return Done(path, spread, np.zeros(len(W)), W)
    logs = unbiased_gains(targets[name], W, second.task.sigma[INPUT_OF[name]][layer])
    rounded = quantize_gains({key: logs}, {}, precision).rows[key]
    return Done(path, spread, logs, apply_gains(W, rounded, None, precision))


def unbiased_gains(
    W: Float[np.ndarray, "out in"], decoded: Float[np.ndarray, "out in"], sigma: Float[np.ndarray, "in in"]
) -> Float[np.ndarray, " out"]:
    """log2 of the row gains that make the output error uncorrelated with the output, <g W^ - W, W>_sigma = 0.

    Choosing cheap indices shrinks the weights; what is coherent with the signal adds up over tokens and layers.
    """
    weighted = np.asarray(W, np.float64) @ sigma
    wanted, found = np.sum(weighted * W, axis=1), np.sum(weighted * decoded, axis=1)
    ratio = np.divide(wanted, found, out=np.ones_like(wanted), where=found > 0)
    return np.log2(np.clip(ratio, 1 / _GAIN_LIMIT, _GAIN_LIMIT))


def _gain_precision(task: Task, c: float) -> int:
    """The precision with the least log2(precision) bits a gain + lam D, D what rounding adds (see gains)."""
    matrices = [task.params["blocks"][name] for name in MATRICES]
    weights = sum(W.size for W in matrices)
    rows, lam = sum(W.shape[0] * W.shape[1] for W in matrices), lam_of_base_step(c, weights)

    def cost(precision: int) -> float:
        return rows * np.log2(precision) / weights + lam * task.signal * (np.log(2) / precision) ** 2 / 12

    return min(GAIN_PRECISIONS, key=cost)


class _Counter:
    """Passes results on and reports how many there were."""

    def __init__(self, progress: Ticker, total: int):
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self, results) -> Iterator:
        for result in results:
            self._done += 1
            if self._progress is not None:
                self._progress(self._done, self._total)
            yield result
