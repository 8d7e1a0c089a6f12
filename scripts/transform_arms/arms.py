"""The arms of the comparison of transforms: how each one finds coordinates, and its file at a slope.

Every arm codes the same model at the same slopes with the same encoder, so that curves cover the same range of KL.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from peers.benchmark import Benchmark
from peers.model import DecodedModel

from rdopt.align.candidates import relaxed_terms
from rdopt.align.learn import learn
from rdopt.align.problem import make_problem
from rdopt.codec.decoder import decode_model
from rdopt.config.schema import Config, EncodeConfig, Init, RotationKind, SiteName, StoredKind, TrainConfig
from rdopt.encode.model import encode_model
from rdopt.encode.source import make_source
from rdopt.encode.trial import hard_cost
from rdopt.operator.params import params_from_tensors
from rdopt.transforms.aligned import Aligned, Block
from rdopt.transforms.bases import starting_gauges
from rdopt.transforms.gauges.coordinates import Gauges
from rdopt.transforms.stored.rotations import StoredRotations
from transform_arms.criteria import Criterion, learn_criterion

ALL_SITES: tuple[SiteName, ...] = ("residual", "value", "stretch", "query", "norm", "hidden")


class ArmCoordinates(NamedTuple):
    """Coordinates of one arm at one slope.

    Attributes:
        gauges: the symmetries.
        stored: the rotations that the file keeps.
        seconds: how long they took to find.
        facts: what else a cell keeps.
    """

    gauges: Gauges
    stored: StoredRotations | None
    seconds: float
    facts: Mapping[str, Any]


class LearnedArm(NamedTuple):
    """An arm that is learned on R + lambda D.

    Attributes:
        sites: the symmetries that are trained.
        init: the basis they start from.
        fixed: fields of the basis that are left out.
        stored: the kind of stored rotations.
        size: width of their blocks, or layers of pairs.
        rotation: how the rotations are parametrised.
    """

    sites: tuple[SiteName, ...]
    init: Init
    fixed: tuple[str, ...] = ()
    stored: StoredKind = "none"
    size: int = 8
    rotation: RotationKind = "cayley"


FIXED_ARMS: tuple[Init, ...] = ("identity", "hadamard", "pca", "joint")
CRITERION_ARMS: Mapping[str, Criterion] = {
    "sum of fourth powers (OptRot-like)": "fourth powers",
    "kurtosis (KurTail-like)": "kurtosis",
    "rounded cross-entropy (SpinQuant-like)": "cross-entropy",
}
LEARNED_ARMS: Mapping[str, LearnedArm] = {
    "residual rotation alone": LearnedArm(("residual",), "joint", ("value",)),
    "value rotations alone": LearnedArm(("value",), "joint", ("residual",)),
    "value stretches alone": LearnedArm(("stretch",), "identity"),
    "query and key factors alone": LearnedArm(("query",), "identity"),
    "norm scales alone": LearnedArm(("norm",), "identity"),
    "hidden scales alone": LearnedArm(("hidden",), "identity"),
    "all gauges": LearnedArm(ALL_SITES, "joint"),
    "both rotations, Cayley": LearnedArm(("residual", "value"), "joint"),
    "both rotations, butterflies": LearnedArm(("residual", "value"), "joint", rotation="givens"),
    "all gauges + stored blocks of 8": LearnedArm(ALL_SITES, "joint", stored="blocks"),
    "all gauges + a layer of stored pairs": LearnedArm(ALL_SITES, "joint", stored="pairs", size=1),
}
TELLING_ARMS = (
    "identity", "hadamard", "pca", "joint", "residual rotation alone", "all gauges",
    "all gauges + a layer of stored pairs",
)
PARAMETRISATION_ARMS = (
    "identity", "hadamard", "pca", "joint", "both rotations, Cayley", "both rotations, butterflies",
)


class TransformArms:
    """The arms of one model.

    Args:
        benchmark: the model, its moments and its text.
        encode: the encoder of all files.
        steps: of every training.
    """

    def __init__(self, benchmark: Benchmark, encode: EncodeConfig, steps: int) -> None:
        self._benchmark, self._encode, self._steps = benchmark, encode, steps
        self._criteria: dict[str, ArmCoordinates] = {}

    @cached_property
    def _problem(self) -> tuple[Any, Any]:
        config = Config(train=TrainConfig(sites=ALL_SITES), encode=self._encode)
        return make_problem(self._benchmark.plain.subject, self._benchmark.plain.moments, config)

    @staticmethod
    def names() -> list[str]:
        """All arms, in the order of the table."""
        return [*FIXED_ARMS, *CRITERION_ARMS, *LEARNED_ARMS]

    def code(self, name: str, lam: float) -> DecodedModel:
        """The file of an arm at a slope, decoded, with what its coordinates cost relaxed and hard."""
        found, plain = self.find(name, lam), self._benchmark.plain
        aligned = Aligned(
            subject=plain.subject, moments=plain.moments, gauges=found.gauges, stored=found.stored, tokens=plain.tokens
        )
        source = make_source(aligned, self._encode)
        encoded = encode_model(source, lam, self._encode)
        decoded = decode_model(encoded.data, name)
        hard = hard_cost(aligned, self._encode, lam)
        facts = {
            "train_seconds": found.seconds,
            "transform_bits": encoded.bits["transforms"] / source.weights,
            "hard": {"codes": hard.codes, "rate": hard.rate, "distortion": hard.distortion},
            "relaxed": self._relaxed(lam, found),
            "columns": column_powers(aligned.blocks()),
            **found.facts,
        }
        weights = params_from_tensors(decoded.tensors, decoded.arch)
        return DecodedModel(encoded.bpw, encoded.bpw_estimated, weights, decoded.arch, facts)

    def _relaxed(self, lam: float, found: ArmCoordinates) -> Mapping[str, float] | None:
        """R and D by the analytic rate, of coordinates without stored rotations."""
        if found.stored is not None:
            return None
        rate, distortion = relaxed_terms(*self._problem, lam, found.gauges)
        return {"rate": rate, "distortion": distortion}

    def find(self, name: str, lam: float) -> ArmCoordinates:
        """The coordinates of an arm; those that do not depend on the slope are found once."""
        if name in LEARNED_ARMS:
            return self._learn(LEARNED_ARMS[name], lam)
        if name not in self._criteria:
            self._criteria[name] = _timed(lambda: self._slopeless(name))
        return self._criteria[name]

    def _slopeless(self, name: str) -> Gauges:
        subject, moments = self._benchmark.plain.subject, self._benchmark.plain.moments
        if name not in CRITERION_ARMS:
            return starting_gauges(name, subject.params, subject.arch, moments)
        start = starting_gauges("hadamard", subject.params, subject.arch, moments)
        tokens = self._benchmark.calibration
        return learn_criterion(CRITERION_ARMS[name], subject.params, subject.arch, start, tokens, steps=self._steps)

    def _learn(self, arm: LearnedArm, lam: float) -> ArmCoordinates:
        subject, moments, begun = self._benchmark.plain.subject, self._benchmark.plain.moments, time.perf_counter()
        start = starting_gauges(arm.init, subject.params, subject.arch, moments)
        start = start._replace(**dict.fromkeys(arm.fixed))
        train = TrainConfig(
            lam=lam, sites=arm.sites, init=arm.init, steps=self._steps, rotation=arm.rotation, stored=arm.stored,
            stored_size=arm.size,
        )
        history: list[float] = []
        learned = learn(
            *self._problem, self._benchmark.calibration, start, train, devices=jax.local_devices(),
            report=lambda p: history.append(p.J),
        )
        facts: dict[str, Any] = {"history": history}
        if learned.choice is not None:
            stored = learned.choice.stored
            sites = 0 if stored is None else len(stored.inputs) + len(stored.outputs)
            facts["stored"] = {**learned.choice._asdict(), "stored": sites}
        if "residual" in arm.sites:
            before, after = start.residual, learned.gauges.residual
            assert before is not None and after is not None
            facts["angles"] = rotation_angles(before.T @ after).tolist()
        return ArmCoordinates(learned.gauges, learned.stored, time.perf_counter() - begun, facts)


def _timed(make: Callable[[], Gauges]) -> ArmCoordinates:
    begun = time.perf_counter()
    gauges = make()
    return ArmCoordinates(gauges, None, time.perf_counter() - begun, {})


def rotation_angles(Q: Float[np.ndarray, "n n"]) -> Float[np.ndarray, " n"]:
    """The angles by which an orthogonal matrix turns its invariant planes, degrees, falling."""
    return np.sort(np.abs(np.degrees(np.angle(np.linalg.eigvals(Q)))))[::-1]


def column_powers(blocks: Iterable[Block]) -> list[float]:
    """Mean over q, k, v, gate and up of the sorted mean squares of their columns over those of the matrix, falling."""
    rows = []
    for block in blocks:
        for name in ("q", "k", "v", "gate", "up"):
            power = np.mean(np.square(np.asarray(block.params[name], np.float64)), axis=0)
            rows.append(-np.sort(-power / power.mean()))
    return np.mean(rows, axis=0).tolist()
