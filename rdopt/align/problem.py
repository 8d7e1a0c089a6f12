"""What training reads of a model: gain-folded blocks with their second moments, float32, one at a time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np
from jaxtyping import Array

from rdopt.align.coordinates import ErrorMetric, MatrixCoordinates, OutputDamping, input_metrics, output_metric
from rdopt.align.objective import BlockProblem, Settings
from rdopt.calibration.moments import Moments
from rdopt.calibration.subject import Subject
from rdopt.checkpoint.families import MATRICES, MATRICES_OF, coded_weights
from rdopt.config.memory import Cache
from rdopt.config.schema import Config
from rdopt.operator.params import Params
from rdopt.rate.grids import GRIDS
from rdopt.transforms.aligned import Aligned, ahead
from rdopt.transforms.gauges.coordinates import original_axes
from rdopt.transforms.gauges.registry import changed_sides
from rdopt.transforms.maps import Map, Sides


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """A model to learn the gauges of; blocks are kept as long as the budget of the subject's cache allows.

    Attributes:
        plain: the model in its original axes, gains folded; it keeps nothing itself.
        settings: static choices.
        outputs: the matrices whose outputs a gauge changes.
        inputs: the groups of matrices whose input one does.
        cache: keeps blocks.
    """

    plain: Aligned
    settings: Settings
    outputs: frozenset[str]
    inputs: frozenset[str]
    cache: Cache

    def block(self, layer: int) -> BlockProblem:
        """One block."""
        return self.cache.get(self, layer, lambda: self._read(layer))

    def blocks(self) -> Iterator[BlockProblem]:
        """All blocks in order."""
        return ahead(self.block, self.plain.arch.num_layers)

    def some(self, layers: Sequence[int]) -> BlockProblem:
        """Some blocks with a leading axis."""
        return jax.tree.map(lambda *x: np.stack(x), *map(self.block, layers))

    @property
    def ends(self) -> Params:
        """"final_norm" and "head" of the original model: what makes predictions of the last stream."""
        params = self.plain.subject.params
        return {"final_norm": params["final_norm"], "head": params.get("head", params["embed"])}

    def _read(self, layer: int) -> BlockProblem:
        block = self.plain.block(layer)
        sigma = {k: x for k, x in block.sigma.items() if k in self.inputs}
        G = {k: x for k, x in block.G.items() if k in self.outputs or k == MATRICES[-1]}
        fixed = ({k: np.asarray(x, np.float32) for k, x in every.items() if k not in changed}
                 for every, changed in ((block.sigma, self.inputs), (block.G, self.outputs)))
        found = BlockProblem(block.params, sigma, G, *_fixed_metrics(*fixed, self.settings))
        return jax.tree.map(lambda x: np.asarray(x, np.float32), found)


@partial(jax.jit, static_argnames="settings")
def _fixed_metrics(
    sigma: Mapping[str, Array], G: Mapping[str, Array], settings: Settings
) -> tuple[dict[str, ErrorMetric], dict[str, ErrorMetric]]:
    """The metrics of moments that no gauge changes, by group and by matrix."""
    still: dict[str, MatrixCoordinates] = {k: MatrixCoordinates(Sides(Map(), Map())) for k in MATRICES}
    inputs = input_metrics(sigma, still, settings.damping, settings.feedback)
    outputs = {k: output_metric(G[k], still[k], settings.outputs) for k in G}
    return {k: _without_inverse(x) for k, x in inputs.items()}, {k: _without_inverse(x) for k, x in outputs.items()}


def _without_inverse(metric: ErrorMetric) -> ErrorMetric:
    return metric if metric.factor is None else metric._replace(factor=metric.factor._replace(inverse=None))


def make_problem(
    subject: Subject, moments: Moments, config: Config, tied: bool = False
) -> tuple[Problem, Settings]:
    """A model with its moments, and the static choices of training.

    Args:
        subject: the model.
        moments: its second moments.
        config: training and encoder.
        tied: whether no gauge parts embedding and head, so that what such gauges change is made once a block.
    """
    plain = Aligned(subject=replace(subject, cache=Cache(0)), moments=moments, gauges=original_axes(subject.arch))
    train, encode = config.train, config.encode
    grid = GRIDS[encode.grid]
    two_sided = grid.feeds_rows and encode.output == "full"
    settings = Settings(
        arch=plain.arch,
        rate=train.rate,
        density=train.density,
        curve=grid.curve or train.density,
        distortion=train.distortion,
        feedback=grid.feeds_columns,
        damping=train.damping,
        outputs=OutputDamping(train.damping, encode.output_damping if two_sided else None),
        weights=coded_weights(plain.arch),
        activations=train.activations,
        remat=train.remat,
    )
    outputs, inputs = changed_sides(train.sites, plain.arch, tied)
    if train.stored != "none":
        outputs = frozenset(MATRICES) if "outputs" in train.stored_sides else outputs
        inputs = frozenset(MATRICES_OF) if "inputs" in train.stored_sides else inputs
    problem = Problem(plain=plain, settings=settings, outputs=outputs, inputs=inputs, cache=subject.cache)
    return problem, settings
