"""What training reads of a model: gain-folded blocks with their second moments, float32, one at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from rdopt.align.coordinates import MatrixCoordinates, OutputDamping, output_metric
from rdopt.align.objective import BlockProblem, Settings
from rdopt.calibration.moments import Moments
from rdopt.calibration.subject import Subject
from rdopt.checkpoint.families import MATRICES, coded_weights
from rdopt.config.memory import Cache
from rdopt.config.schema import Config
from rdopt.operator.params import Params
from rdopt.rate.grids import GRIDS
from rdopt.transforms.aligned import Aligned, ahead
from rdopt.transforms.gauges.coordinates import original_axes
from rdopt.transforms.gauges.registry import changed_outputs
from rdopt.transforms.maps import Map, Sides


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """A model to learn the gauges of; blocks are kept as long as the budget of the subject's cache allows.

    Attributes:
        plain: the model in its original axes, gains folded; it keeps nothing itself.
        changed: the matrices whose outputs a gauge changes.
        outputs: damping of their moments.
        cache: keeps blocks.
    """

    plain: Aligned
    changed: frozenset[str]
    outputs: OutputDamping
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
        G = {k: block.G[k] for k in MATRICES if k in self.changed}
        fixed = {k: _metric(jnp.asarray(block.G[k], jnp.float32), self.outputs) for k in MATRICES if k not in G}
        return jax.tree.map(lambda x: np.asarray(x, np.float32), BlockProblem(block.params, block.sigma, G, fixed))


_metric = jax.jit(
    lambda G, damping: output_metric(G, MatrixCoordinates(Sides(Map(), Map())), damping), static_argnums=1
)


def make_problem(subject: Subject, moments: Moments, config: Config) -> tuple[Problem, Settings]:
    """A model with its moments, and the static choices of training."""
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
    stored = train.stored != "none" and "outputs" in train.stored_sides
    changed = frozenset(MATRICES) if stored else changed_outputs(train.sites, plain.arch)
    return Problem(plain=plain, changed=changed, outputs=settings.outputs, cache=subject.cache), settings
