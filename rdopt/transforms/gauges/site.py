"""What a symmetry of the network has to say of itself; the rest of the package loops over such sites.

A gauge is one choice at one site: an array, float64 (in training float32 of JAX). What it makes of the weights is told
as `Map`s of the outputs and inputs of the matrices; their inverses and duals follow from those.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Shaped

from rdopt.checkpoint.families import Architecture
from rdopt.config.schema import RotationKind
from rdopt.operator.params import Params
from rdopt.transforms.arrays import AnyArray
from rdopt.transforms.maps import Map
from rdopt.transforms.matrices.rotations import rotated, rotation_record, rotation_shapes
from rdopt.transforms.records import Kind, TransformRecord, rebuild

Parameters = Mapping[str, AnyArray]  # of one site, by name
NormGain = Float[AnyArray, " d"] | None  # of a norm, to be folded behind it; None: no gain


class Site:
    """One symmetry, or a second factor of one; a site that does nothing unless a method says otherwise.

    Attributes:
        name: what `train.sites` calls it.
        field: the gauge it changes, a field of `Gauges` and the name of a record.
        kind: how the numbers of a gauge are recorded.
        outputs_changed: the matrices whose outputs it changes.
        inputs_changed: the groups of matrices whose input it changes.
        unties: whether it changes embedding, head and the norms' gains, so that a tied head is cut off.
        shared: whether all blocks have one gauge.
    """

    name: ClassVar[str]
    field: ClassVar[str]
    kind: ClassVar[Kind] = "scale"
    outputs_changed: ClassVar[frozenset[str]] = frozenset()
    inputs_changed: ClassVar[frozenset[str]] = frozenset()
    unties: ClassVar[bool] = False
    shared: ClassVar[bool] = False

    def start(
        self, basis: str, params: Params, arch: Architecture, sigma: Mapping[str, Any], seed: int
    ) -> Float[np.ndarray, "..."] | None:
        """The gauge in fixed coordinates, float64; None where these leave the site as it is.

        Args:
            basis: one of `bases.BASES`.
            params: the original weights, gains not folded.
            arch: their architecture.
            sigma: input group -> second moments of the inputs, (layers, n, n).
            seed: of random matrices and signs.
        """
        return None

    def identity(self, arch: Architecture) -> Float[np.ndarray, "..."] | None:
        """The gauge that changes nothing, float64, at a site that training cannot do without; else None."""
        return None

    def parameters(self, arch: Architecture, rotation: RotationKind) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape of what is learned, all zero at the start; none where nothing can be.

        The first axis is that of the blocks unless the site is shared.
        """
        return {}

    def factor(self, theta: Parameters, arch: Architecture) -> Any:
        """What parameters make of a gauge entry by entry; numpy or JAX as the parameters are."""
        raise NotImplementedError(f"nothing is learned at {self.name}")

    def learned(
        self, theta: Parameters, start: AnyArray | None, arch: Architecture, rotation: RotationKind
    ) -> Any:
        """The gauge of parameters on its starting gauge, which it is at zero: their product unless a site says else."""
        factor = self.factor(theta, arch)
        return factor if start is None else start * factor

    def record(
        self, theta: Parameters, start: TransformRecord | None, arch: Architecture, rotation: RotationKind
    ) -> TransformRecord:
        """The record of what was learned, float32 parameters, on the record of its start."""
        exact = {k: np.asarray(x, np.float64) for k, x in theta.items()}
        return self.fixed(self.learned(exact, None if start is None else rebuild(start), arch, rotation))

    def fixed(self, gauge: Shaped[np.ndarray, "..."]) -> TransformRecord:
        """The record of a gauge by its very numbers."""
        if self.kind == "complex":
            parameters = {"real": np.real(gauge), "imag": np.imag(gauge)}
        else:
            parameters = {"matrix" if self.kind == "matrix" else "values": gauge}
        return TransformRecord(kind=self.kind, site=self.field, shape=gauge.shape, parameters=parameters)

    def block(self, gauge: AnyArray, layer: int, arch: Architecture) -> Any:
        """One block's part of a gauge."""
        return gauge[layer]

    def stacked(self, gauge: AnyArray, arch: Architecture) -> Any:
        """The parts of all blocks at once, with a leading layer axis."""
        return gauge

    def drawn(self, gauge: AnyArray, layers: Any, arch: Architecture) -> Any:
        """The gauge of a network of these blocks alone."""
        return gauge if self.shared else gauge[layers]

    def outputs(self, name: str, gauge: AnyArray, arch: Architecture) -> Map:
        """What becomes of the outputs of a matrix.

        Args:
            name: of the matrix, one of `outputs_changed`.
            gauge: its block's part.
            arch: of the network.
        """
        raise NotImplementedError(f"{self.name} changes no outputs")

    def inputs(self, group: str, gauge: Any, gain: NormGain, arch: Architecture) -> Map:
        """What becomes of the input of a group of matrices, as `outputs` of one unless a site says otherwise.

        Args:
            group: one of `inputs_changed`.
            gauge: its block's part.
            gain: of the norm before it, to be folded behind the norm; None: no gain.
            arch: of the network.
        """
        return self.outputs(group, gauge, arch)

    def gain(self, gain: Float[np.ndarray, " d"], gauge: AnyArray, at: int) -> Float[np.ndarray, " d"]:
        """What becomes of a norm's gain by the whole gauge; norms are counted as `norm.Norm` does, the final one last.
        """
        return gain

    def embedding(self, gauge: AnyArray) -> Map:
        """What becomes of the embedding's rows by the whole gauge."""
        return Map()

    def head(self, gauge: AnyArray, gain: Float[AnyArray, " d"]) -> Map:
        """What becomes of the head's input by the whole gauge; the final norm's gain is folded behind the norm."""
        return Map()


class RotatedSite(Site):
    """A site of invertible matrices, each learned as a rotation of its start: A0 Q."""

    kind = "matrix"

    def shape(self, arch: Architecture) -> tuple[int, ...]:
        """Of the whole gauge, (..., n, n)."""
        raise NotImplementedError(f"{self.name} has no shape")

    def identity(self, arch: Architecture) -> Float[np.ndarray, "*batch n n"]:
        """I everywhere."""
        shape = self.shape(arch)
        return np.broadcast_to(np.eye(shape[-1]), shape)

    def parameters(self, arch: Architecture, rotation: RotationKind) -> Mapping[str, tuple[int, ...]]:
        """Those of the rotations."""
        shape = self.shape(arch)
        return rotation_shapes(rotation, shape[-1], shape[:-2])

    def learned(
        self, theta: Parameters, start: Float[AnyArray, "*batch n n"], arch: Architecture, rotation: RotationKind
    ) -> Float[AnyArray, "*batch n n"]:
        """A0 Q."""
        return rotated(rotation, theta, start)

    def record(
        self, theta: Parameters, start: TransformRecord | None, arch: Architecture, rotation: RotationKind
    ) -> TransformRecord:
        """The parameters behind the basis."""
        return rotation_record(rotation, theta, self.field, self.shape(arch)[-1], start)
