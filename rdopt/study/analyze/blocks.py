"""One pass over the blocks of a model: the figures of every matrix in every basis, and all networks run beside it.

A block's weights are read once; what is kept between blocks are the residual streams of the networks.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.numpy import save_file

from rdopt.calibration.moments import Moments
from rdopt.checkpoint.families import INPUT_OF, MATRICES, Architecture
from rdopt.config.errors import UserError
from rdopt.config.progress import Say
from rdopt.operator.blockwise import run_block
from rdopt.operator.params import read_block
from rdopt.study.analyze.ends import end_rows, ends_in
from rdopt.study.analyze.figures import ErrorCost, Row, error_cost, note_error, row_of, singular_concentration
from rdopt.study.analyze.networks import Inputs, Network, Rounding
from rdopt.transforms.gauges.coordinates import Gauges
from rdopt.transforms.gauges.fold import fold_block, fold_block_moments

SAVE_AFTER = 60.0  # seconds since the last state


@dataclass
class PassState:
    """What the pass has so far: blocks done, rows, residual streams of the networks that have one, float32."""

    done: int = 0
    rows: list[Row] = field(default_factory=list)
    streams: list[Float[np.ndarray, "n T d"]] = field(default_factory=list)

    def save(self, path: Path, key: str) -> None:
        """Writes the state; an interrupted writing leaves the state before."""
        part = path.with_suffix(".part")
        arrays = {str(i): x for i, x in enumerate(self.streams)}
        save_file(arrays, str(part), metadata={"key": key, "done": str(self.done), "rows": json.dumps(self.rows)})
        os.replace(part, path)

    @staticmethod
    def load(path: Path, key: str) -> "PassState | None":
        """The state that was written last.

        Raises:
            UserError: it belongs to another analysis.
        """
        if not path.is_file():
            return None
        with safe_open(str(path), "np") as file:
            metadata = file.metadata()
            if metadata["key"] != key:
                raise UserError(
                    f"{path} holds an analysis of another model or with other settings; repeat those, remove the "
                    "file, or choose another --out."
                )
            streams = [file.get_tensor(str(i)) for i in range(len(file.keys()))]
        return PassState(int(metadata["done"]), json.loads(metadata["rows"]), streams)


class _BlockInBasis(NamedTuple):
    """A block in one basis: weights; inputs by group; by matrix G or its diagonal, what losing it costs, its row."""

    weights: Mapping[str, Float[np.ndarray, "..."]]
    inputs: Mapping[str, Inputs]
    G: Mapping[str, Float[np.ndarray, "..."]]
    whole: Mapping[str, ErrorCost]
    rows: Mapping[str, Row]

    def changed(self, network: Network, layer: int) -> Mapping[str, Float[np.ndarray, "..."]]:
        """The weights of a network; what rounding them costs is noted in the rows."""
        change = network.change
        if change is None or network.part != "blocks":
            return self.weights
        changed = dict(self.weights)
        for i, name in enumerate(MATRICES):
            inputs, W = self.inputs[INPUT_OF[name]], self.weights[name]
            changed[name] = change.apply(W, inputs, (network.seed, layer, i))
            if isinstance(change, Rounding):
                error = error_cost(changed[name] - W, inputs.sigma, self.G[name])
                note_error(self.rows[name], change, error, self.whole[name])
        return changed


@dataclass(frozen=True)
class BlockPass:
    """The pass of one model.

    Attributes:
        params: of `lazy_params`.
        arch: of the model.
        bases: gauges by name.
        networks: run beside it.
        moments: of the model.
        batch: sequences in a pass.
    """

    params: Mapping[str, Any]
    arch: Architecture
    bases: Mapping[str, Gauges]
    networks: Sequence[Network]
    moments: Moments
    batch: int

    def run(self, tokens: Int[np.ndarray, "n T"], path: Path, key: str, say: Say) -> PassState:
        """Every block in order, from the state last saved for this key on; says a line a block."""
        state, layers = PassState.load(path, key) or self.begin(tokens), self.arch.num_layers
        begun, saved, first = time.perf_counter(), time.perf_counter(), state.done
        while state.done < layers:
            self.step(state)
            now = time.perf_counter()
            left = (now - begun) / (state.done - first) * (layers - state.done)
            say(f"block {state.done} of {layers}  {len(state.streams)} networks beside it  {left:.0f} s left")
            if now - saved > SAVE_AFTER:
                state.save(path, key)
                saved = time.perf_counter()
        return state

    def begin(self, tokens: Int[np.ndarray, "n T"]) -> PassState:
        """Embeddings and head in every basis, and the streams before the first block."""
        rows, streams, moments = [], {}, self.moments.embed
        assert moments is not None
        for basis, gauges in self.bases.items():
            ends = ends_in(dict(self.params), gauges, moments)
            rows += end_rows(ends, basis, self.networks)
            plain = ends.embed.W[tokens]
            for network in self.networks:
                if network.basis == basis and network.has_stream:
                    W = ends.embed.changed(network)
                    same = W is ends.embed.W
                    streams[network] = plain if same else W[tokens]
        return PassState(0, rows, [streams[network] for network in self.networks if network.has_stream])

    def step(self, state: PassState) -> None:
        """The next block, in place."""
        layer = state.done
        p, measured = read_block(self.params, layer), (self.moments.sigma, self.moments.G)
        sigma, G = ({k: x[layer] for k, x in part.items()} for part in measured)
        spectra = {name: singular_concentration(_with_gain(p, name)) for name in MATRICES}
        streamed = [network for network in self.networks if network.has_stream]
        for basis in self.bases:
            block = self._in_basis(basis, p, layer, (sigma, G), spectra)
            for i, network in enumerate(streamed):
                if network.basis == basis:
                    state.streams[i] = run_block(block.changed(network, layer), state.streams[i], self.arch, self.batch)
            state.rows += block.rows.values()
        state.done += 1

    def _in_basis(
        self, basis: str, p: Mapping[str, Any], layer: int, moments: tuple[Any, Any], spectra: Mapping[str, Any]
    ) -> _BlockInBasis:
        weights = fold_block(p, layer, self.arch, self.bases[basis])
        sigma, gradients = fold_block_moments(*moments, p, layer, self.arch, self.bases[basis])
        inputs = {group: Inputs(S) for group, S in sigma.items()}
        G = {name: np.asarray(g, np.float32) for name, g in gradients.items()}
        whole = {name: error_cost(weights[name], inputs[INPUT_OF[name]].sigma, G[name]) for name in MATRICES}
        rows = {}
        for name in MATRICES:
            place = {"name": self.arch.tensor_name(layer, name), "layer": layer, "kind": name, "basis": basis}
            power = np.diagonal(inputs[INPUT_OF[name]].sigma)
            curvature = G[name] if G[name].ndim == 1 else np.diagonal(G[name])
            rows[name] = row_of(weights[name], place, power, curvature, spectra[name])
        return _BlockInBasis(weights, inputs, G, whole, rows)


def _with_gain(p: Mapping[str, Any], name: str) -> Float[np.ndarray, "out in"]:
    """A matrix with the gain of the norm before it: what every basis turns."""
    norm = f"{INPUT_OF[name]}_norm"
    return p[name] * p[norm] if norm in p else p[name]
