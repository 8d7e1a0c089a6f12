"""A model and a slope to the bytes of a file: quantize, choose the tables, code, pack.

Searches, finetuning and what outlives a kill are `encode.py`'s affair.
"""

from collections.abc import Callable

from rdopt.checkpoint.families import INPUT_OF, Key
from rdopt.codec.encoder import Coded, Encoded, assemble, code_lloyd, code_scalar
from rdopt.codec.streams.index import MatrixCodes
from rdopt.codec.streams.paths import pack_trellis
from rdopt.codec.tables.classes import RowsCols
from rdopt.codec.tables.uniform import choose_plan
from rdopt.config.parallel import bounded_map, on_cores
from rdopt.config.progress import Tick
from rdopt.config.schema import EncodeConfig, GridName
from rdopt.encode.embeddings import code_embeddings
from rdopt.encode.lloyd import quantize_lloyd
from rdopt.encode.quantize import index_spreads, quantize_model
from rdopt.encode.source import Source
from rdopt.encode.trellis_model import quantize_trellis
from rdopt.rate.steps import base_step


def encode_model(source: Source, lam: float, encode: EncodeConfig, progress: Tick | None = None) -> Encoded:
    """The file of a model at one slope.

    Args:
        source: of `make_source`.
        lam: bits/weight per nat/token; fixes every step.
        encode: grid, dead zone, threads.
        progress: called with (matrices done, of how many).

    Returns:
        the container's bytes and their parts. The same input gives the same bytes.
    """
    return encode_at_step(source, base_step(lam, source.weights), encode, progress)


def encode_at_step(source: Source, c: float, encode: EncodeConfig, progress: Tick | None = None) -> Encoded:
    """`encode_model` with the base step given instead of lambda."""
    coded = code_matrices(source, c, encode, progress)
    if encode.embeddings == "coded":
        coded = coded._replace(embeddings=code_embeddings(source.aligned, c, encode))
    return assemble(coded, source.aligned.tensors(), source.arch, source.files, source.parameters)


def code_matrices(source: Source, c: float, encode: EncodeConfig, progress: Tick | None = None) -> Coded:
    """All matrices quantized and coded at the base step c, embedding and head left aside."""
    return METHODS[encode.grid](source, c, encode, progress)


def _coded(source: Source, c: float, indices: MatrixCodes) -> Coded:
    """The parts that every method has."""
    return Coded(c, indices, source.grid.rows, source.grid.cols, stored=source.stored)


def _on_uniform_grid(source: Source, c: float, encode: EncodeConfig, progress: Tick | None) -> Coded:
    indices = quantize_model(source.blocks(), source.grid, c, encode, progress)
    matrices = list(indices.values())

    def spreads(key: Key) -> RowsCols:
        W, L = source.block(key[0]).params[key[1]], source.metric(key[0]).L[INPUT_OF[key[1]]]
        return index_spreads(W, L, source.grid, key, indices[key], c, encode.grid)

    with on_cores(encode.threads) as threads:
        fits = list(bounded_map(threads, spreads, indices))
    return _coded(source, c, code_scalar(matrices, choose_plan(matrices, fits), encode.threads))


def _on_lloyd_grids(source: Source, c: float, encode: EncodeConfig, progress: Tick | None) -> Coded:
    indices, plan, levels = quantize_lloyd(source.blocks(), source.grid, c, encode, progress)
    return _coded(source, c, code_lloyd(list(indices.values()), plan, levels, encode.threads))


def _through_trellis(source: Source, c: float, encode: EncodeConfig, progress: Tick | None) -> Coded:
    model = quantize_trellis(source, c, encode, progress)
    codes = pack_trellis(model.indices, model.indices.orders, model.plan, encode.states, encode.threads, encode.coder)
    return _coded(source, c, codes)._replace(
        gains=model.gains,
        components=model.components,
        saved={key: gain.saved for key, gain in model.component_gains.items()},
    )


# How a model is put on every grid; what the grids are to the rest of the package stands in rate/grids.py.
METHODS: dict[GridName, Callable[[Source, float, EncodeConfig, Tick | None], Coded]] = {
    "trellis": _through_trellis,
    "lloyd": _on_lloyd_grids,
    "feedback": _on_uniform_grid,
    "round": _on_uniform_grid,
}
