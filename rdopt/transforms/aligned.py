"""A model in coordinates: its weights and second moments behind the gauges and the stored rotations, block by block.

Everything that looks at a model in other coordinates takes this one value and asks for its blocks in order. A block is
folded in float64 when it is asked for the first time and kept: to hold fewer blocks than a model has, `_once` is the
place, and `calibration.streamed.lazy_params` reads weights when they are asked for.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

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
from rdopt.operator.params import Params
from rdopt.transforms.gauges.coordinates import Gauges
from rdopt.transforms.gauges.fold import fold, fold_block, fold_block_moments, fold_end_moments, fold_ends
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
    _held: dict[Any, Any] = field(default_factory=dict, repr=False, init=False)

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

    def block(self, layer: int) -> Block:
        """One block in the coordinates in which the network runs."""
        return self._once(layer, lambda: self._folded(layer))

    def coded(self, layer: int) -> Block:
        """One block as its matrices are quantized: behind the stored rotations too."""
        stored = self.stored
        if stored is None:
            return self.block(layer)
        return self._once(("coded", layer), lambda: _turned(self.block(layer), layer, stored))

    def blocks(self) -> Iterator[Block]:
        """All blocks in order."""
        return map(self.block, range(self.arch.num_layers))

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
        for layer, block in enumerate(self.blocks()):
            for short in block_shapes(arch):
                yield arch.tensor_name(layer, short), block.params[short]
        yield FINAL_NORM, np.asarray(ends["final_norm"])
        if not arch.tied:
            yield HEAD, np.asarray(ends["head"])

    def network(self) -> Params:
        """All weights at once, blocks stacked, for what runs the whole network; float32."""
        params, gauges = self.subject.params, self.gauges
        if gauges is None:
            return params
        return self._once("network", lambda: fold(params, self.subject.arch, gauges)[0])

    def _folded(self, layer: int) -> Block:
        arch, gauges, moments = self.subject.arch, self.gauges, self.moments
        params = {k: np.asarray(x[layer]) for k, x in self.subject.params["blocks"].items()}
        sigma, G = ({k: x[layer] for k, x in part.items()} for part in (moments.sigma, moments.G))
        if gauges is None:
            return Block(params, sigma, G)
        folded = fold_block(params, layer, arch, gauges)
        if moments is not UNMEASURED:
            sigma, G = fold_block_moments(sigma, G, params, layer, arch, gauges)
        return _contiguous(Block(folded, sigma, G))

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._held:
            self._held[key] = make()
        return self._held[key]


def _contiguous(block: Block) -> Block:
    # Products of matrices depend in their last bits on the order in memory: one order everywhere.
    return Block(*({k: np.ascontiguousarray(x) for k, x in part.items()} for part in block))


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
    return _contiguous(Block(params, sigma, G))


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
