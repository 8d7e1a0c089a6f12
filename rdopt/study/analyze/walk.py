"""One pass over the blocks of a model: the figures of every matrix in every basis, and all variants run beside it.

A block's weights are read once; what is kept between blocks are the residual streams of the variants.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.numpy import save_file

from rdopt.calibration import INPUT_OF, read_block, run_block
from rdopt.checkpoint import EMBED, HEAD, MATRICES, Architecture, hf_name
from rdopt.config import UserError
from rdopt.operator import embed_tokens
from rdopt.study.analyze.figures import concentration, figures, singular_energies
from rdopt.study.analyze.perturb import Around, Inputs
from rdopt.study.analyze.store import LayerStore
from rdopt.study.analyze.variants import Variant
from rdopt.transforms import Gauges, fold_block, fold_ends, sides_of

SAVE_AFTER = 60.0  # seconds since the last state
Row = dict[str, Any]


@dataclass
class Pass:
    """What the pass has so far.

    Attributes:
        done: blocks that are finished.
        rows: of matrices in bases.
        streams: residual stream of every variant, (n, T, d) float32.
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

    def begin(self, tokens: Int[np.ndarray, "n T"]) -> Pass:
        """Embeddings and head in every basis, and the streams before the first block."""
        rows, starts = [], {}
        for basis, gauges in self._bases.items():
            ends = fold_ends(dict(self._params), gauges)
            starts[basis] = np.asarray(embed_tokens(ends, tokens))
            rows += [
                {"name": name, "layer": None, "kind": kind, "basis": basis, **_figures(ends[kind])}
                for name, kind in ((EMBED, "embed"), (HEAD, "head"))
            ]
        return Pass(0, rows, [starts[v.basis] for v in self._variants])

    def step(self, state: Pass) -> None:
        """The next block, in place."""
        layer, arch = state.done, self._arch
        p, moments = read_block(self._params, layer), self._store.read(layer)
        spectra = {name: concentration(singular_energies(_gained(p, name))) for name in MATRICES}
        for basis, gauges in self._bases.items():
            folded = fold_block(p, layer, arch, gauges)
            sigma, G = self._moments(p, layer, gauges, moments)
            inputs = {group: Inputs(S) for group, S in sigma.items()}
            rows = {name: self._row(folded[name], name, layer, basis, sigma, G[name]) for name in MATRICES}
            for name in MATRICES:
                rows[name]["singular"] = spectra[name]
                rows[name]["output_power"] = quadratic(folded[name], inputs[INPUT_OF[name]].sigma)
            for i, variant in enumerate(self._variants):
                if variant.basis == basis:
                    changed = self._perturbed(folded, variant, layer, inputs, rows)
                    state.streams[i] = run_block(changed, state.streams[i], arch)
            state.rows += rows.values()
        state.done += 1

    def _moments(
        self, p: Mapping[str, Any], layer: int, gauges: Gauges, moments: Mapping[str, Any]
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """sigma of every group and the diagonal of G of every matrix in a basis."""
        gains = (np.asarray(p["attn_norm"], np.float64), np.asarray(p["mlp_norm"], np.float64))
        sigma, G = {}, {}
        for name in MATRICES:
            sides, own = sides_of(name, gains, self._arch, gauges.block(layer, self._arch)), moments["G"][name]
            if INPUT_OF[name] not in sigma:
                sigma[INPUT_OF[name]] = sides.inputs.moment(moments["sigma"][INPUT_OF[name]])
            dual = sides.outputs.dual()
            G[name] = dual.diagonal_moment(own) if own.ndim == 1 else np.diagonal(dual.moment(own))
        return sigma, G

    def _row(
        self, W: np.ndarray, name: str, layer: int, basis: str, sigma: Mapping[str, np.ndarray], G: np.ndarray
    ) -> Row:
        power = np.diagonal(sigma[INPUT_OF[name]])
        return {
            "name": hf_name(layer, name),
            "layer": layer,
            "kind": name,
            "basis": basis,
            **_figures(W),
            "inputs": concentration(np.maximum(power, 0)),
            "outputs": concentration(np.maximum(G, 0)),
            "curvature": curvature_rank(W, np.maximum(G, 0), np.maximum(power, 0)),
            "output_error": {},
        }

    def _perturbed(
        self,
        folded: Mapping[str, np.ndarray],
        variant: Variant,
        layer: int,
        inputs: Mapping[str, Inputs],
        rows: Mapping[str, Row],
    ) -> dict[str, np.ndarray]:
        """The block of a variant; what its errors do to the outputs is noted in the rows."""
        changed = dict(folded)
        if variant.perturb is None:
            return changed
        for i, name in enumerate(MATRICES):
            read = inputs[INPUT_OF[name]]
            changed[name] = variant.perturb(Around(folded[name], read, (variant.seed, layer, i)))
            if variant.kind == "rounded":
                error = quadratic(changed[name] - folded[name], read.sigma)
                rows[name]["output_error"][variant.about] = error / rows[name]["output_power"]
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


def quadratic(E: Float[np.ndarray, "out in"], S: Float[np.ndarray, "in in"]) -> float:
    """tr(E S E^T): mean squared output of E."""
    return float(np.vdot(E @ S, E))


def curvature_rank(
    W: Float[np.ndarray, "out in"], G: Float[np.ndarray, " out"], power: Float[np.ndarray, " in"], sample: int = 100_000
) -> float:
    """Spearman's correlation of |W_ij| with the curvature G_ii sigma_jj there, over at most `sample` entries."""
    from scipy.stats import spearmanr

    chosen = np.random.default_rng(0).choice(W.size, min(sample, W.size), replace=False, shuffle=False)
    i, j = np.unravel_index(chosen, W.shape)
    found: Any = spearmanr(np.abs(W[i, j]), G[i] * power[j])
    return float(found.statistic)


def _figures(W: Float[np.ndarray, "out in"]) -> Row:
    return {"shape": list(W.shape), **figures(W)._asdict()}


def _gained(p: Mapping[str, Any], name: str) -> Float[np.ndarray, "out in"]:
    """A matrix with the gain of the norm before it: what every basis turns."""
    norm = f"{INPUT_OF[name]}_norm"
    return p[name] * p[norm] if norm in p else p[name]
