"""The signal experiment: sums of sinusoids as Fourier coefficients and as a ReLU MLP, at matched distortion.

The MLP is trained first; the Fourier basis then gets the fewest harmonics that reach the MLP's SNR. Both are
quantized with steps in proportion to 1 / sqrt(mean squared slope of the output) of every matrix, coded, decoded, and
compared with the signal. The MLP is coded in its own coordinates, after a Hadamard rotation of all its matrices, and
in principal and learned axes of the inputs of its hidden matrices: once as if these axes were free, and once with
their angles rounded and counted (`-stored`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from rdopt.codec.grids.steps import log_steps
from rdopt.config.progress import Say
from rdopt.study.figures import coefficient_figures, energy_curve, in_steps
from rdopt.study.toy.coding import (
    CodedPoint,
    TableClasses,
    bits_at,
    cheapest_classes,
    decode_arrays,
    encode_arrays,
    quantized,
    steps_of,
)
from rdopt.study.toy.coordinates import (
    Coordinates,
    hadamard_coordinates,
    learn_axes,
    principal_axes,
    stored_coordinates,
)
from rdopt.study.toy.mlp import mean_sensitivities, run_mlp, train_mlps
from rdopt.study.toy.settings import HIDDEN_LAYERS, REFERENCE_DB, SAMPLES, SNR_AIMS, SNR_LEVELS, ToySettings
from rdopt.study.toy.signal import (
    cell_middles,
    decibels,
    draw_sinusoids,
    fit_to_snr,
    fourier_basis,
    noise_power,
    snr,
    unit_power,
)

TOY_ARMS = ("fourier", "mlp", "hadamard", "pca", "learned", "pca-stored", "learned-stored")
# The distortion at a step is the mean over these multiples of it.
_NEARBY = 2.0 ** np.linspace(-0.25, 0.25, 12)
_CHOICE = SNR_AIMS[1]  # dB: the steps at which classes are chosen, alike for all representations
ENERGY_COUNTS = tuple(sorted({int(n) for n in np.rint(np.geomspace(1, 10_000, 41))}))
Signal = Float[np.ndarray, " n"]
_run_mlp = jax.jit(run_mlp)


class Representation(NamedTuple):
    """A signal in some numbers.

    Attributes:
        arrays: matrices of numbers, float64.
        log_steps: step of each in quarter octaves, by its sensitivity.
        weight: sum over all numbers of squared slope times squared step, at a base step of one.
        run: numbers to signal.
    """

    arrays: list[Float[np.ndarray, "_ _"]]
    log_steps: Int[np.ndarray, " k"]
    weight: float
    run: Callable[[Sequence[Float[np.ndarray, "_ _"]]], Signal]

    def base_step(self, level: float) -> float:
        """The base step whose error lies `level` dB below a signal of unit power, to first order."""
        return float(np.float32(np.sqrt(12 * 10 ** (-level / 10) / self.weight)))

    def steps(self, level: float) -> Float[np.ndarray, " k"]:
        """The steps at that level."""
        return steps_of(self.log_steps, self.base_step(level)).astype(np.float64)


def representation_of(
    arrays: Sequence[Float[np.ndarray, "_ _"]], slopes: Float[np.ndarray, " k"], run: Callable[..., Signal]
) -> Representation:
    """Numbers with the steps that their mean squared slopes ask for."""
    ks = log_steps(1 / np.sqrt(np.maximum(slopes, 1e-12 * slopes.max())))
    counts = np.array([W.size for W in arrays])
    weight = float(np.sum(counts * slopes * steps_of(ks, 1.0).astype(np.float64) ** 2))
    return Representation([np.asarray(W, np.float64) for W in arrays], ks, weight, run)


def trained_mlps(x: Signal, signals: Sequence[Signal], settings: ToySettings) -> list[Representation]:
    """An MLP for every signal."""
    keys = jax.vmap(jax.random.key)(settings.seed + jnp.arange(settings.seeds))
    places, samples = jnp.asarray(x, jnp.float32), jnp.asarray(np.stack(signals), jnp.float32)
    params = train_mlps(keys, places, samples, width=settings.width, layers=HIDDEN_LAYERS, steps=settings.steps)

    def run(arrays: Sequence[np.ndarray]) -> Signal:
        return np.asarray(_run_mlp([jnp.asarray(W, jnp.float32) for W in arrays], places), np.float64)

    mlps = []
    for number in range(settings.seeds):
        own = [W[number] for W in params]
        slopes = np.array([float(s) for s in mean_sensitivities(own, places)])
        mlps.append(representation_of([np.asarray(W) for W in own], slopes, run))
    return mlps


def fourier_of(x: Signal, y: Signal, least: float) -> Representation:
    """The Fourier coefficients that reach `least` dB, as a matrix of one row; every column of the basis has slope 1."""
    coefficients = fit_to_snr(x, y, least)
    basis = fourier_basis(x, len(coefficients) // 2)

    def run(arrays: Sequence[np.ndarray]) -> Signal:
        return basis @ np.asarray(arrays[0][0], np.float64)

    return representation_of([coefficients[None]], np.ones(1), run)


def coordinates_of(mlp: Representation, settings: ToySettings, seed: int) -> dict[str, Coordinates]:
    """The coordinates that an MLP is coded in, by the name of the arm."""
    steps = mlp.steps(REFERENCE_DB)
    axes = {at: principal_axes(W) for at, W in enumerate(mlp.arrays) if min(W.shape) > 1}
    learned = {
        at: learn_axes(mlp.arrays[at], V, float(steps[at]), steps=settings.turn_steps, seed=len(axes) * seed + number)
        for number, (at, V) in enumerate(axes.items())
    }
    return {
        "mlp": Coordinates(),
        "hadamard": hadamard_coordinates([W.shape for W in mlp.arrays], np.random.default_rng(seed)),
        "pca": Coordinates(V=axes),
        "learned": Coordinates(V=learned),
        "pca-stored": stored_coordinates(mlp.arrays, axes, steps),
        "learned-stored": stored_coordinates(mlp.arrays, learned, steps),
    }


def coded_point(
    representation: Representation,
    coordinates: Coordinates,
    rotated: Sequence[np.ndarray],
    classes: TableClasses,
    level: float,
    y: Signal,
) -> CodedPoint:
    """Codes, decodes, undoes the rotations and compares with the signal; the same for steps nearby, without bytes."""

    def noise(decoded: Sequence[np.ndarray]) -> float:
        return noise_power(y, representation.run(coordinates.undo(decoded)))

    c, logs = representation.base_step(level), representation.log_steps
    coded = encode_arrays(rotated, logs, c, classes)
    mean = np.mean([noise(quantized(rotated, logs, c * near)) for near in _NEARBY])
    decoded = noise(decode_arrays(coded.data))
    price = 8.0 * len(coordinates.data)
    return CodedPoint(decibels(float(mean)), decibels(decoded), price + 8.0 * len(coded.data), price + coded.ideal)


def arm_of(representation: Representation, coordinates: Coordinates, y: Signal) -> dict[str, Any]:
    """The record of one representation in one system of coordinates."""
    rotated = coordinates.rotate(representation.arrays)
    classes = cheapest_classes(rotated, representation.log_steps, representation.base_step(_CHOICE))
    points = [coded_point(representation, coordinates, rotated, classes, level, y) for level in SNR_AIMS]
    steps = representation.steps(REFERENCE_DB)
    energy = energy_curve(in_steps(rotated, steps))
    return {
        "snr_unquantized": snr(y, representation.run(representation.arrays)),
        "price": 8.0 * len(coordinates.data),
        "classes": classes._asdict(),
        "points": [p._asdict() for p in points],
        "bits": {f"{level:g}": bits_at(points, level) for level in SNR_LEVELS},
        "reference_bits": bits_at(points, REFERENCE_DB),
        "concentration": coefficient_figures(rotated, steps),
        "energy_curve": [float(energy[min(n, len(energy)) - 1]) for n in ENERGY_COUNTS],
    }


def toy_experiment(settings: ToySettings, say: Say = lambda line: None) -> list[dict[str, Any]]:
    """The records of all seeds; the same settings give the same figures on the same machine."""
    x, seeds = cell_middles(SAMPLES), range(settings.seed, settings.seed + settings.seeds)
    rngs = [np.random.default_rng(seed) for seed in seeds]
    signals = [unit_power(draw_sinusoids(rng, settings.sinusoids, settings.cycles).at(x)) for rng in rngs]
    mlps = trained_mlps(x, signals, settings)
    say(f"trained {len(seeds)} MLPs of {settings.parameters} parameters, {settings.steps} steps")
    records = []
    for seed, y, mlp in zip(seeds, signals, mlps, strict=True):
        limit = snr(y, mlp.run(mlp.arrays))
        fourier = fourier_of(x, y, limit)
        arms = {"fourier": arm_of(fourier, Coordinates(), y)}
        arms |= {name: arm_of(mlp, own, y) for name, own in coordinates_of(mlp, settings, seed).items()}
        records.append({"seed": seed, "harmonics": fourier.arrays[0].size // 2, "arms": arms})
        reached = arms["fourier"]["snr_unquantized"]
        say(f"seed {seed}: MLP {limit:.1f} dB, Fourier {reached:.1f} dB with {fourier.arrays[0].size} coefficients")
    return records
