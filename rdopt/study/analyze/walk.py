"""One pass over the blocks of a model: the figures of every matrix in every basis, and all variants run beside it.

A block's weights are read once; what is kept between blocks are the residual streams of the variants.
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

from rdopt.calibration.streamed import read_block, run_block
from rdopt.checkpoint.families import INPUT_OF, MATRICES, Architecture, hf_name
from rdopt.config.errors import UserError
from rdopt.operator.llama import embed_tokens
from rdopt.study.analyze.ends import changed_end, end_rows, ends_in
from rdopt.study.analyze.figures import concentration, singular_energies
from rdopt.study.analyze.perturb import Around, Inputs
from rdopt.study.analyze.rows import Cost, Row, cost_of, note_error, row_of
from rdopt.study.analyze.store import LayerStore
from rdopt.study.analyze.variants import Variant
from rdopt.transforms.gauges.block import sides_of
from rdopt.transforms.gauges.gauges import Gauges, fold_block

SAVE_AFTER = 60.0  # seconds since the last state


@dataclass
class Pass:
    """What the pass has so far.

    Attributes:
        done: blocks that are finished.
        rows: of matrices in bases.
        streams: residual stream of every variant that has one of its own, (n, T, d) float32.
    """

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
    def load(path: Path, key: str) -> "Pass | None":
        """The state that was written last.

        Raises:
            UserError: it belongs to another analysis.
        """
        if not path.is_file():
            return None
        with safe_open(str(path), "np") as file:
            about = file.metadata()
            if about["key"] != key:
                raise UserError(
                    f"{path} holds an analysis of another model or with other settings; repeat those, remove the "
                    "file, or choose another --out."
                )
            held = [file.get_tensor(str(i)) for i in range(len(file.keys()))]
        return Pass(int(about["done"]), json.loads(about["rows"]), held)


class _Turned(NamedTuple):
    """A block in one basis: weights; inputs by group; by matrix G or its diagonal, and what losing it would cost."""

    weights: Mapping[str, Float[np.ndarray, "..."]]
    inputs: Mapping[str, Inputs]
    G: Mapping[str, Float[np.ndarray, "..."]]
    whole: Mapping[str, Cost]


class Walk:
    """The pass of one model.

    Args:
        params: of `lazy_params`.
        arch: of the model.
        bases: gauges by name.
        variants: the networks run beside it.
        store: moments of the blocks.
    """

    def __init__(
        self,
        params: Mapping[str, Any],
        arch: Architecture,
        bases: Mapping[str, Gauges],
        variants: Sequence[Variant],
        store: LayerStore,
    ) -> None:
        self._params, self._arch, self._bases = params, arch, bases
        self._variants, self._store = variants, store
        self._streamed = [v for v in variants if v.of_stream]

    def begin(self, tokens: Int[np.ndarray, "n T"]) -> Pass:
        """Embeddings and head in every basis, and the streams before the first block."""
        rows, starts, moments = [], {}, self._store.read_ends()
        for basis, gauges in self._bases.items():
            ends = ends_in(dict(self._params), gauges, moments)
            rows += end_rows(ends, basis, self._variants)
            plain = np.asarray(embed_tokens({"embed": ends.embed.W}, tokens))
            for v in self._streamed:
                if v.basis == basis:
                    W = changed_end(ends.embed, v)
                    starts[v[:4]] = plain if W is ends.embed.W else np.asarray(embed_tokens({"embed": W}, tokens))
        return Pass(0, rows, [starts[v[:4]] for v in self._streamed])

    def step(self, state: Pass) -> None:
        """The next block, in place."""
        layer, arch = state.done, self._arch
        p, moments = read_block(self._params, layer), self._store.read(layer)
        spectra = {name: concentration(singular_energies(_gained(p, name))) for name in MATRICES}
        for basis, gauges in self._bases.items():
            here = self._turned(p, layer, gauges, moments)
            rows = {name: self._row(here, name, layer, basis) | {"singular": spectra[name]} for name in MATRICES}
            for i, variant in enumerate(self._streamed):
                if variant.basis == basis:
                    changed = self._perturbed(here, variant, layer, rows)
                    state.streams[i] = run_block(changed, state.streams[i], arch)
            state.rows += rows.values()
        state.done += 1

    def _turned(self, p: Mapping[str, Any], layer: int, gauges: Gauges, moments: Mapping[str, Any]) -> _Turned:
        """A block and its moments in a basis."""
        gains = (np.asarray(p["attn_norm"], np.float64), np.asarray(p["mlp_norm"], np.float64))
        inputs, G = {}, {}
        for name in MATRICES:
            sides, group = sides_of(name, gains, self._arch, gauges.block(layer, self._arch)), INPUT_OF[name]
            if group not in inputs:
                inputs[group] = Inputs(sides.inputs.moment(moments["sigma"][group]))
            own, dual = moments["G"][name], sides.outputs.dual()
            G[name] = np.asarray(dual.diagonal_moment(own) if own.ndim == 1 else dual.moment(own), np.float32)
        folded = fold_block(p, layer, self._arch, gauges)
        whole = {name: cost_of(folded[name], inputs[INPUT_OF[name]].sigma, G[name]) for name in MATRICES}
        return _Turned(folded, inputs, G, whole)

    def _row(self, here: _Turned, name: str, layer: int, basis: str) -> Row:
        about = {"name": hf_name(layer, name), "layer": layer, "kind": name, "basis": basis}
        power, G = np.diagonal(here.inputs[INPUT_OF[name]].sigma), here.G[name]
        return row_of(here.weights[name], about, power, G if G.ndim == 1 else np.diagonal(G))

    def _perturbed(
        self, here: _Turned, variant: Variant, layer: int, rows: Mapping[str, Row]
    ) -> dict[str, np.ndarray]:
        """The block of a variant; what its errors do is noted in the rows."""
        changed = dict(here.weights)
        if variant.perturb is None or not variant.of_blocks:
            return changed
        for i, name in enumerate(MATRICES):
            read, W = here.inputs[INPUT_OF[name]], here.weights[name]
            changed[name] = variant.perturb(Around(W, read, (variant.seed, layer, i)))
            if variant.kind == "rounded":
                error = cost_of(changed[name] - W, read.sigma, here.G[name])
                note_error(rows[name], variant.about, error, here.whole[name])
        return changed


def walk(steps: Walk, tokens: Int[np.ndarray, "n T"], layers: int, path: Path, key: str, say: Any) -> Pass:
    """Every block in order, from the last saved state on.

    Args:
        steps: the pass.
        tokens: of the test text.
        layers: how many blocks there are.
        path: of the state.
        key: what it belongs to.
        say: called with a line now and then.
    """
    state = Pass.load(path, key) or steps.begin(tokens)
    begun, saved, first = time.perf_counter(), time.perf_counter(), state.done
    while state.done < layers:
        steps.step(state)
        now = time.perf_counter()
        left = (now - begun) / (state.done - first) * (layers - state.done)
        say(f"block {state.done} of {layers}  {len(state.streams)} networks beside it  {left:.0f} s left")
        if now - saved > SAVE_AFTER:
            state.save(path, key)
            saved = time.perf_counter()
    return state


def stream_of_each(
    variants: Sequence[Variant], streams: Sequence[Float[np.ndarray, "n T d"]]
) -> list[Float[np.ndarray, "n T d"]]:
    """What the head of every variant reads, from the streams of those that have one of their own."""
    held = dict(zip((v[:4] for v in variants if v.of_stream), streams, strict=True))
    return [held[v[:4] if v.of_stream else (v.basis, "folded", "", 0)] for v in variants]


def _gained(p: Mapping[str, Any], name: str) -> Float[np.ndarray, "out in"]:
    """A matrix with the gain of the norm before it: what every basis turns."""
    norm = f"{INPUT_OF[name]}_norm"
    return p[name] * p[norm] if norm in p else p[name]
