"""A model in coordinates: its weights and second moments behind the gauges and the stored rotations, block by block.

Everything that looks at a model in other coordinates takes this one value and asks for its blocks in order. A block is
read and folded in float64 when it is asked for, and kept as long as the budget of the subject's cache allows; of blocks
that are asked for in order the next one is made while the last one is worked on.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float, Int

from rdopt.calibration.moments import EmbeddingMoments, Moments
from rdopt.calibration.subject import Subject
from rdopt.checkpoint.families import (
    EMBED,
    FINAL_NORM,
    HEAD,
    INPUT_OF,
    MATRICES,
    MATRICES_OF,
    Architecture,
    block_shapes,
)
from rdopt.operator.params import Params, PerBlock, read_block
from rdopt.transforms.gauges.coordinates import Gauges
from rdopt.transforms.gauges.fold import NORMS, fold_block, fold_block_moments, fold_end_moments, fold_ends
from rdopt.transforms.stored.rotations import StoredRotations


class Block(NamedTuple):
    """One block: what is quantized in it, and what errors there cost.

    Attributes:
        params: short name -> float32 array, norms and biases included.
        sigma: input group -> second moment of the input, float64.
        G: matrix -> second moment of the gradient at the output, float64; its diagonal for very wide outputs.
    """

    params: Mapping[str, Float[np.ndarray, "..."]]
    sigma: Mapping[str, Float[np.ndarray, "in in"]]
    G: Mapping[str, Float[np.ndarray, "..."]]

    def diag_G(self, name: str) -> Float[np.ndarray, " out"]:
        """Diagonal of the G of one matrix."""
        G = self.G[name]
        return G if G.ndim == 1 else np.diagonal(G)

    def rows(self, chosen: Mapping[str, Int[np.ndarray, " some"]]) -> "Block":
        """The block with some rows of its matrices only, as if it had no others.

        Args:
            chosen: matrix -> which rows.
        """
        params = {**self.params, **{k: self.params[k][i] for k, i in chosen.items()}}
        G = {k: self.G[k][i][:, i] if self.G[k].ndim == 2 else self.G[k][i] for k, i in chosen.items()}
        return Block(params, self.sigma, G)


UNMEASURED = Moments({}, {}, 0)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, eq=False)
class Aligned:
    """A model in the coordinates that it is looked at or coded in.

    Attributes:
        subject: the original.
        moments: its second moments, where errors are to be priced.
        gauges: the symmetries that are used; None: the folder is taken as it lies.
        stored: rotations behind them that a file keeps.
        tokens: calibration sequences, where something runs the network.
    """

    subject: Subject
    moments: Moments = UNMEASURED
    gauges: Gauges | None = None
    stored: StoredRotations | None = None
    tokens: Int[np.ndarray, "n length"] | None = None

    @property
    def arch(self) -> Architecture:
        """The architecture there: a head that the gauges part from the embedding is untied."""
        arch = self.subject.arch
        return replace(arch, tied=False) if self.gauges is not None and self.gauges.unties else arch

    @property
    def config(self) -> dict[str, Any]:
        """config.json there."""
        config = self.subject.checkpoint.config
        plain = self.gauges is None and self.stored is None
        return dict(config) if plain else {**config, "tie_word_embeddings": self.arch.tied}

    def layer(self, layer: int) -> Mapping[str, Float[np.ndarray, "..."]]:
        """The parameters of one block in the coordinates in which the network runs, without its moments."""
        return self._once(("layer", layer), lambda: self._folded(layer))

    def block(self, layer: int) -> Block:
        """One block in the coordinates in which the network runs."""
        return self._once(layer, lambda: self._measured(layer))

    def coded(self, layer: int) -> Block:
        """One block as its matrices are quantized: behind the stored rotations too."""
        stored = self.stored
        if stored is None:
            return self.block(layer)
        return self._once(("coded", layer), lambda: _turned(self.block(layer), layer, stored))

    def blocks(self) -> Iterator[Block]:
        """All blocks in order."""
        return ahead(self.block, self.arch.num_layers)

    def coded_blocks(self) -> Iterator[Block]:
        """All blocks in order, as their matrices are quantized."""
        return ahead(self.coded, self.arch.num_layers)

    @property
    def ends(self) -> Params:
        """"embed", "final_norm" and, unless tied, "head"."""
        params, gauges = self.subject.params, self.gauges
        if gauges is None or not gauges.unties:
            return {k: x for k, x in params.items() if k != "blocks"}
        return self._once("ends", lambda: fold_ends(params, gauges))

    @property
    def end_moments(self) -> EmbeddingMoments | None:
        """The moments of embedding and head."""
        held, gauges = self.moments.embed, self.gauges
        if held is None or gauges is None:
            return held
        return self._once("end moments", lambda: fold_end_moments(held, self.subject.params, gauges))

    def tensors(self) -> Iterator[tuple[str, Float[np.ndarray, "..."]]]:
        """(checkpoint name, float32 array) of every weight, one at a time, in the order of `expected_tensors`."""
        ends, arch = self.ends, self.arch
        yield EMBED, np.asarray(ends["embed"])
        for layer, params in enumerate(ahead(self.layer, arch.num_layers)):
            for short in block_shapes(arch):
                yield arch.tensor_name(layer, short), params[short]
        yield FINAL_NORM, np.asarray(ends["final_norm"])
        if not arch.tied:
            yield HEAD, np.asarray(ends["head"])

    def network(self) -> Params:
        """All weights for what runs the network, float32, those of a block made when it is indexed."""

        def parameter(short: str) -> PerBlock:
            return PerBlock(self.arch.num_layers, lambda layer: self.layer(layer)[short])

        return {**self.ends, "blocks": {short: parameter(short) for short in block_shapes(self.arch)}}

    def _folded(self, layer: int) -> Mapping[str, Float[np.ndarray, "..."]]:
        params, gauges = read_block(self.subject.params, layer), self.gauges
        return params if gauges is None else _contiguous(fold_block(params, layer, self.subject.arch, gauges))

    def _measured(self, layer: int) -> Block:
        arch, gauges, moments = self.subject.arch, self.gauges, self.moments
        params = self.layer(layer)
        sigma, G = ({k: x[layer] for k, x in part.items()} for part in (moments.sigma, moments.G))
        if gauges is None or moments is UNMEASURED:
            return Block(params, sigma, G)
        norms = {k: self.subject.params["blocks"][k][layer] for k in NORMS}
        return Block(params, *map(_contiguous, fold_block_moments(sigma, G, norms, layer, arch, gauges)))

    def _once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        return self.subject.cache.get(self, key, make)


def ahead(make: Callable[[int], T], count: int) -> Iterator[T]:
    """make(0), make(1), ..., each made while the one before it is worked on."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(make, 0)
        for i in range(1, count + 1):
            made = following.result()
            if i < count:
                following = thread.submit(make, i)
            yield made


def _contiguous(arrays: Mapping[str, Float[np.ndarray, "..."]]) -> dict[str, Float[np.ndarray, "..."]]:
    # Products of matrices depend in their last bits on the order in memory: one order everywhere.
    return {k: np.ascontiguousarray(x) for k, x in arrays.items()}


def _turned(block: Block, layer: int, stored: StoredRotations) -> Block:
    """A block behind its stored rotations."""
    params, sigma, G = dict(block.params), dict(block.sigma), dict(block.G)
    for name in MATRICES:
        sides = stored.sides(layer, name, params[name].shape)
        params[name] = sides.fold(np.asarray(params[name], np.float64)).astype(np.float32)
        G[name] = G[name] if sides.outputs is None else sides.outputs.moment(G[name])
    for group, names in MATRICES_OF.items():
        sides = stored.sides(layer, names[0], block.params[names[0]].shape)
        sigma[group] = sigma[group] if sides.inputs is None else sides.inputs.moment(sigma[group])
    return Block(*map(_contiguous, (params, sigma, G)))


def matrix_distortion(
    E: Float[np.ndarray, "out in"], sigma: Float[np.ndarray, "in in"], G: Float[np.ndarray, "..."]
) -> float:
    """D = 1/2 tr(G E sigma E^T) of the errors of one matrix, nats/token, float64; of a diagonal G its diagonal."""
    E = np.asarray(E, np.float64)
    return float(np.sum((G @ E if G.ndim == 2 else G[:, None] * E) * (E @ sigma))) / 2


def distortion(
    blocks: Iterable[Block], decoded: Callable[[int, str], Float[np.ndarray, "out in"]] | None
) -> float:
    """D of the errors of all matrices, nats/token.

    Args:
        blocks: before quantization, in order.
        decoded: from layer and matrix to the weights of the file, in the same coordinates; None: all zeros, which
            gives the power of the signal.
    """
    total = 0.0
    for layer, block in enumerate(blocks):
        for name in MATRICES:
            W = np.asarray(block.params[name], np.float64)
            E = W if decoded is None else W - decoded(layer, name)
            total += matrix_distortion(E, block.sigma[INPUT_OF[name]], block.G[name])
    return total
