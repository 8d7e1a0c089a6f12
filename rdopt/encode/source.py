"""What the encoder starts from: a model in its final coordinates, with everything that no slope changes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from rdopt.checkpoint.families import INPUT_OF, MATRICES, Architecture, Key, coded_weights
from rdopt.checkpoint.write import carried_files
from rdopt.codec.streams.fixed_point import undo_stored
from rdopt.codec.streams.uncoded import pack_files
from rdopt.config.errors import UserError
from rdopt.config.schema import EncodeConfig
from rdopt.encode.quantize import Grid, Metric, make_grid, metric_of
from rdopt.transforms.aligned import Aligned, Block, ahead, distortion
from rdopt.transforms.stored.rotations import StoredRotations


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """What is encoded.

    Attributes:
        aligned: the model; its matrices are quantized behind its stored rotations.
        files: its config.json, tokenizer and generation files, packed.
        grid: steps of the coded matrices before the base step.
        weights: number of coded weights.
        parameters: number of parameters of the original model (the denominator of bpw_all).
        signal: 1/2 tr(G W sigma W^T) summed over the matrices, nats/token.
        tokens: calibration sequences, where the drift of the activations can be corrected.
        encode: what the grid was made by.
        work: folder beside the file to be, where what is done of it is kept.
        chosen: matrix -> the rows that are coded, where it is a part of the model only.
    """

    aligned: Aligned
    files: bytes
    grid: Grid
    weights: int
    parameters: int
    signal: float
    tokens: Int[np.ndarray, "n length"] | None = None
    encode: EncodeConfig
    work: Path | None = None
    chosen: Mapping[str, Int[np.ndarray, " some"]] = field(default_factory=dict)

    @property
    def arch(self) -> Architecture:
        """The network's architecture."""
        return self.aligned.arch

    @property
    def stored(self) -> StoredRotations | None:
        """The rotations that a file of it keeps: none of a part, which is never a file."""
        return None if self.chosen else self.aligned.stored

    def block(self, layer: int) -> Block:
        """One block as its matrices are quantized."""
        if not self.chosen:
            return self.aligned.coded(layer)
        cache = self.aligned.subject.cache
        return cache.get(self, ("part", layer), lambda: self.aligned.coded(layer).rows(self.chosen))

    def blocks(self) -> Iterator[Block]:
        """All of them in order."""
        return ahead(self.block, self.arch.num_layers)

    def metric(self, layer: int) -> Metric:
        """What errors cost in one block, factored."""
        cache = self.aligned.subject.cache
        return cache.get(self, ("metric", layer), lambda: metric_of(self.block(layer), self.encode))

    def original(self, key: Key) -> Float[np.ndarray, "out in"]:
        """One matrix as the network has it; of a part, which has no network, as it is coded."""
        block = self.block(key[0]) if self.chosen else self.aligned.block(key[0])
        return block.params[key[1]]

    def turned(self, key: Key, W: Float[np.ndarray, "out in"]) -> Float[np.ndarray, "out in"]:
        """One matrix of the network behind the stored rotations."""
        return W if self.stored is None else self.stored.sides(*key, W.shape).fold(np.asarray(W, np.float64))

    def undone(self, key: Key, W: Float[np.ndarray, "out in"]) -> Float[np.ndarray, "out in"]:
        """One decoded matrix in the network's coordinates, as a decoder forms it."""
        return W if self.stored is None else undo_stored(self.stored, *key, INPUT_OF[key[1]], W)


def make_source(
    aligned: Aligned, encode: EncodeConfig, parameters: int | None = None, work: Path | None = None
) -> Source:
    """Prepares a model for encoding at any slope.

    Args:
        aligned: the model, with its moments.
        encode: the encoder's configuration.
        parameters: of the original, where `aligned.subject` is not it but an exported folder.
        work: see `Source`.

    Raises:
        UserError: weights or moments are not finite.
    """
    checkpoint = aligned.subject.checkpoint
    signal = distortion(_finite_blocks(aligned), None)  # first: the grid of weights that are no numbers is none
    return Source(
        aligned=aligned,
        files=pack_files(aligned.config, carried_files(checkpoint.folder)),
        grid=make_grid(aligned.coded_blocks(), encode),
        encode=encode,
        work=work,
        weights=coded_weights(aligned.arch),
        parameters=checkpoint.num_parameters if parameters is None else parameters,
        signal=signal,
        tokens=None if encode.drift == "none" or aligned.tokens is None else aligned.tokens[: encode.drift_sequences],
    )


def _finite_blocks(aligned: Aligned) -> Iterator[Block]:
    """The blocks in order, each refused where a coded weight is not finite."""
    for layer, block in enumerate(aligned.blocks()):
        for name in MATRICES:
            if not np.isfinite(block.params[name]).all():
                raise UserError(f"{aligned.arch.tensor_name(layer, name)} holds NaN or infinity; mend the checkpoint.")
        yield block


def part_of(source: Source, chosen: Mapping[str, Int[np.ndarray, " some"]], encode: EncodeConfig) -> Source:
    """A source of some rows of every matrix, without the correction of the drift.

    Args:
        source: of the whole model.
        chosen: matrix -> the rows.
        encode: the encoder's configuration.
    """
    part = replace(source, chosen=chosen, tokens=None, work=None)
    return replace(
        part,
        grid=make_grid(part.blocks(), encode),
        encode=encode,
        weights=sum(block.params[name].size for block in part.blocks() for name in MATRICES),
        signal=distortion(part.blocks(), None),
    )
