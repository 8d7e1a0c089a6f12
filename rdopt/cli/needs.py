"""What a command takes of a machine: the peak of its memory as the largest of a few sums, its disk, its operations.

Everything follows from config.json and the configuration. The factors count arrays that are alive at once; they and the
constants were fitted to measured peaks, beside which scripts/bench_scale.py prints what is said here.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from rdopt.align.feed import drawn_blocks
from rdopt.calibration.backward import LOGIT_BYTES, batch_size
from rdopt.calibration.moments import full_G, moment_entries
from rdopt.checkpoint.families import (
    INPUT_OF,
    MATRICES,
    MATRICES_OF,
    Architecture,
    block_shapes,
    coded_weights,
    expected_tensors,
)
from rdopt.config.memory import memory_budget
from rdopt.config.parallel import cores
from rdopt.config.schema import Config, EncodeConfig
from rdopt.evaluate.divergence import SLICE_BYTES
from rdopt.sweep.arms import ARMS

_MIB = 2**20
# Imports and compiled programs.
_DECODER, _NETWORK, _ENCODER, _JUDGE, _LEARNER = (x * _MIB for x in (195, 340, 430, 500, 1200))
_TOKEN = 2048  # bytes of a tokenizer for a token
_HEAP = 32 * _MIB  # larger arrays are not taken from it
# Bits/weight of a file at a slope: those of three models of 2, 14 and 106 M weights in their own coordinates at 20, and
# half a bit more for a slope twice as large. An embedding took about a bit less.
_BPW, _PER_OCTAVE, _AT_WEIGHTS, _AT_LAM = 2.76, 0.285, 14.2e6, 20.0
_DECODED = 12  # weights are decoded in the time that one is quantized
Terms = Mapping[str, float]
# What lowers a term.
LOWERED_BY = {
    "blocks kept": "--memory",
    "streams kept": "--memory",
    "indices kept": "--memory",
    "streams": "--sequences or --seq-len",
    "windows": "--max-tokens",
    "activations": "--seq-len or --evaluate.batch",
    "drawn blocks": "--train.blocks",
    "second moments": "--moments of an earlier run",
    "aligned folders": "leaving out --keep",
}


class Needs(NamedTuple):
    """What a command takes.

    Attributes:
        memory: stage -> term -> bytes; the peak is the largest sum.
        disk: term -> bytes that are left when it ends.
        meanwhile: bytes on disk while it runs beside these.
        work: kind of operation (see `machine_speed`) -> how many.
    """

    memory: Mapping[str, Terms]
    disk: Terms
    meanwhile: float
    work: Terms

    @property
    def stage(self) -> str:
        """The one that takes the most memory."""
        return max(self.memory, key=lambda stage: sum(self.memory[stage].values()))

    @property
    def peak(self) -> float:
        """Bytes of memory."""
        return sum(self.memory[self.stage].values())


def parameters_of(arch: Architecture) -> int:
    """How many the network has; a tied head counts once."""
    return sum(math.prod(shape) for shape in expected_tensors(arch).values())


class _Model:
    """Bytes, those of float32 where nothing else is said, and counts that the formulas are made of."""

    def __init__(self, arch: Architecture, config: Config) -> None:
        text, window, shapes = config.text, config.evaluate, block_shapes(arch)
        self.arch, self.config, self.layers = arch, config, arch.num_layers
        self.matrices = {k: (shapes[k][0], shapes[k][1]) for k in MATRICES}
        self.widths = {INPUT_OF[k]: n for k, (_, n) in self.matrices.items()}
        self.largest = 4 * max(math.prod(shape) for shape in self.matrices.values())
        self.parameters = parameters_of(arch)
        self.coded = coded_weights(arch)
        self.block, self.moments = 4 * self.coded / arch.num_layers, 4 * moment_entries(arch)
        self.end = 4 * arch.vocab_size * arch.hidden_size
        self.ends = self.end * (1 if arch.tied else 2)
        self.budget = memory_budget(config.run.memory)
        self.tokens = text.calibration_sequences * text.seq_len
        self.stream = 4 * self.tokens * arch.hidden_size
        self.drift = min(config.encode.drift_sequences, text.calibration_sequences) * text.seq_len
        self.scored = window.max_tokens * window.context // window.stride
        self.windows = 4 * self.scored * arch.hidden_size
        self.base = {"programs": _NETWORK, "tokenizer": _TOKEN * arch.vocab_size, "embedding and head": self.ends}
        # Widths of the full second moments, and operations of their products for a token.
        self.full = (*self.widths.values(), *(m for k, (m, _) in self.matrices.items() if full_G(k, m)))
        self.grams, self.square = sum(2 * n * n for n in self.full), 4 * max(self.full) ** 2

    @property
    def decoded(self) -> float:
        """Of a block that is decoded: arrays that come from the heap leave gaps there."""
        return (12 if self.largest < _HEAP else 5.9) * self.block

    def activations(self, batch: int, length: int) -> float:
        """Of one block's forward pass: the scores of all heads, and what its matrices read and give."""
        arch = self.arch
        return 4 * batch * length * (1.5 * arch.num_heads * length + 6 * arch.hidden_size + 3 * arch.ffn_size)


def moments_needs(arch: Architecture, config: Config) -> Needs:
    """Of `rdopt moments`."""
    m, length = _Model(arch, config), config.text.seq_len
    streams = (m.layers + 1) * m.stream
    base = {**m.base, "streams kept": min(m.budget / 4, streams), "streams": 2 * m.stream}
    logits, batch = min(LOGIT_BYTES, 4 * m.tokens * arch.vocab_size), batch_size(arch, length)
    return Needs(
        {
            "the head": {**base, "logits": 9 * logits + m.end},
            "the backward pass": {
                **base, "a block": m.block + 4 * m.moments, "activations": 1.5 * m.activations(batch, length)},
        },
        {"second moments": m.layers * m.moments + 16 * (arch.vocab_size + arch.hidden_size**2)},
        2 * m.stream + max(0, streams - m.budget / 4),
        {"float32": m.tokens * (m.layers * (2 * m.block + m.grams) + 1.5 * m.end)},
    )


def decode_needs(arch: Architecture, config: Config, file: float | None = None, itemsize: int = 4) -> Needs:
    """Of `rdopt decode` into weights of `itemsize` bytes; `file`: its bytes, None where it is not there yet."""
    m = _Model(arch, config)
    base = {"programs": _DECODER, "file": 2 * _file(m, file)}
    return Needs(
        {
            "embedding and head": {**base, "embedding and head": (4.9 if _codes_ends(config) else 3.2) * m.ends},
            "a block": {**base, "embedding and head": m.ends, "a block": m.decoded},
        },
        {"folder": itemsize * m.parameters},
        0,
        {"trellis": m.parameters / _DECODED, "disk": itemsize * m.parameters},
    )


def eval_needs(arch: Architecture, config: Config, file: float | None = None) -> Needs:
    """Of `rdopt eval`; `file`: bytes of the file."""
    m, window = _Model(arch, config), config.evaluate
    ends = {"embedding and head": 2 * m.ends + 2.5 * m.end}  # of both models, here and on the device
    base = {**m.base, **ends, "programs": _JUDGE, "file": 2 * _file(m, file), "windows": 4 * m.windows}
    logits = min(SLICE_BYTES, 4 * m.scored * arch.vocab_size)
    activations = m.activations(window.batch, window.context)
    return Needs(
        {
            "predictions": {**base, "logits": 3.2 * logits + 3.5 * m.end},  # the head in bfloat16 and back
            "blocks": {**base, "a block": m.block + max(m.decoded, activations)},
        },
        {},
        0,
        {"float32": m.scored * 1.5 * (m.layers * m.block + m.end), "trellis": 3 * m.parameters / _DECODED},
    )


def export_needs(arch: Architecture, config: Config) -> Needs:
    """Of `rdopt export`."""
    m, evaluated = _Model(arch, config), eval_needs(arch, config, 0)
    own = {"programs": _ENCODER, "blocks kept": min(m.budget / 2, m.layers * m.block)}
    return Needs(
        {stage: {**terms, **own} for stage, terms in evaluated.memory.items()},
        {"folder": 4 * m.parameters},
        0,
        {"float32": evaluated.work["float32"], "float64": 4 * arch.hidden_size * m.coded, "disk": 4 * m.parameters},
    )


def encode_needs(arch: Architecture, config: Config) -> Needs:
    """Of `rdopt encode`; what it leaves of its own memory is not given back before it measures the file."""
    m, d, encode = _Model(arch, config), arch.hidden_size, config.encode
    drift = 0 if encode.drift == "none" else 8 * m.drift * (d + max(m.widths.values()))
    block = m.block + 4 * m.moments
    base = {**m.base, "programs": _ENCODER, "streams kept": min(m.budget / 8, drift),
            "blocks kept": max(block, min(m.budget / 2, m.layers * block))}
    group = max(MATRICES_OF.values(), key=lambda names: sum(math.prod(m.matrices[k]) for k in names))
    at_once = min(encode.threads or cores(), len(group))
    stages: dict[str, Terms] = {
        "factors": {**base, "streams kept": 0, "a block": block + 6 * m.square},
        "quantizing": {
            **base, "indices kept": min(m.budget / 8, m.coded), "activations": m.activations(8, config.text.seq_len),
            "matrices in work": m.block + max(14 * m.square, at_once * 12 * m.largest + 6 * m.square)},
    }
    if _codes_ends(config):
        stages["coding embedding and head"] = {**base, "indices": 5 * m.ends}
    evaluated, measured = eval_needs(arch, config), moments_needs(arch, config)
    kept = {k: x for k, x in base.items() if k != "embedding and head"}
    # Threads do not give back to the system what their float64 arrays took of the heap, the smaller ones.
    left = sum(times * size for times, size in ((12, m.largest), (6, m.square)) if 2 * size < _HEAP)
    kept["freed, not given back"] = at_once * left
    stages |= {f"measuring: {stage}": {**terms, **kept} for stage, terms in evaluated.memory.items()}
    meanwhile = m.coded + 8 * m.drift * d + max(0, drift - m.budget / 8) + max(0, m.coded - m.budget / 8)
    cubes = sum(n**3 for n in m.full)
    work = {
        "float32": m.drift * m.layers * (m.block + sum(6 * n * n for n in m.widths.values())),
        "float64": m.layers * (4 * cubes + sum(2 * a * n * (6 * n + 4 * a) for a, n in m.matrices.values())),
        "trellis": m.coded + (m.parameters - m.coded) * _codes_ends(config),
        "disk": meanwhile,
    }
    if config.run.moments is None:
        stages |= {f"second moments: {stage}": terms for stage, terms in measured.memory.items()}
        meanwhile += measured.meanwhile + measured.disk["second moments"]
    parts = (work, evaluated.work, measured.work if config.run.moments is None else {})
    return Needs(stages, {"file": _file(m)}, meanwhile, _sum(*parts))


def train_needs(arch: Architecture, config: Config) -> Needs:
    """Of `rdopt train`."""
    m, train, measured = _Model(arch, config), config.train, moments_needs(arch, config)
    block, trial = m.block + m.moments, encode_needs(arch, replace(config, run=replace(config.run, moments="")))
    kept = max(m.block + 4 * m.moments, min(m.budget / 2, m.layers * (block + m.block + 4 * m.moments)))
    base = {**m.base, "programs": _LEARNER}
    drawn = drawn_blocks(train, arch)
    trained = 4 * (arch.hidden_size**2 // 2 + m.layers * arch.num_kv_heads * arch.head_dim**2 // 2)
    stages: dict[str, Terms] = {
        "steps": {**base, "blocks kept": min(m.budget / 2, m.layers * block), "transforms": 12 * trained,
                  "drawn blocks": 4.4 * drawn * block},
        "a trial encoding": {**trial.memory["quantizing"], **base, "blocks kept": kept, "streams kept": 0},
    }
    steps = train.steps * drawn * len({train.init, *(train.rivals or ())})
    work = {"float32": steps * sum(6 * a * n * (a + n) + 2 * n**3 for a, n in m.matrices.values())}
    trials = {kind: 2 * trial.work[kind] for kind in ("float64", "trellis")}
    disk: dict[str, float] = {"transforms": 4 * trained}
    meanwhile = max(0, m.coded - m.budget / 8)
    if config.run.moments is None:
        stages |= {f"second moments: {stage}": terms for stage, terms in measured.memory.items()}
        disk |= measured.disk
        meanwhile += measured.meanwhile
    parts = (work, trials, measured.work if config.run.moments is None else {})
    return Needs(stages, disk, meanwhile, _sum(*parts))


def sweep_needs(arch: Architecture, config: Config) -> Needs:
    """Of `rdopt sweep`."""
    m, sweep = _Model(arch, config), config.sweep
    kind, wanted = ("lam", sweep.lams) if sweep.target_bpw is None else ("target_bpw", sweep.target_bpw)
    files = [_file(m, encode=replace(config.encode, **{"lam": None, "target_bpw": None, kind: x})) for x in wanted]
    points = len(wanted)
    trained, encoded = train_needs(arch, config), encode_needs(arch, config)
    learned = sum(ARMS[name].learned for name in sweep.arms)
    disk: dict[str, float] = {"files": len(sweep.arms) * sum(files)}
    disk |= {"second moments": measured} if (measured := trained.disk.get("second moments")) else {}
    if learned:
        disk |= {"transforms": learned * points * trained.disk["transforms"]}
        disk |= {"aligned folders": learned * points * 4 * m.parameters} if sweep.keep else {}
    work = _sum(*[encoded.work] * (points * len(sweep.arms)), *[trained.work] * (points * learned))
    after = {k: trained.memory["a trial encoding"][k] for k in ("programs", "blocks kept")} if learned else {}
    # What an encoding frees is taken again by the measuring, of what training left.
    freed = {"streams kept": 0, "freed, not given back": 0} if learned else {}
    memory = {
        stage: {**terms, **after, **(freed if stage.startswith("measuring") else {})}
        for stage, terms in encoded.memory.items()
    }
    return Needs({**memory, **(trained.memory if learned else {})}, disk, encoded.meanwhile, work)


# What --dry-run knows a sum for; other commands look at one block at a time, or at nothing but headers.
NEEDS = {
    "moments": moments_needs,
    "train": train_needs,
    "export": export_needs,
    "encode": encode_needs,
    "decode": decode_needs,
    "eval": eval_needs,
    "sweep": sweep_needs,
}


def _codes_ends(config: Config) -> bool:
    return config.encode.embeddings == "coded"


def expected_bpw(arch: Architecture, encode: EncodeConfig, lam: float) -> float:
    """Bits/weight of a file: those asked for, or what models took at a slope (others may differ by a bit)."""
    octaves = math.log2(coded_weights(arch) / _AT_WEIGHTS)
    fitted = _BPW + _PER_OCTAVE * octaves + 0.5 * math.log2((encode.lam or lam) / _AT_LAM)
    return encode.target_bpw or max(fitted, 0.3)


def _file(m: _Model, size: float | None = None, encode: EncodeConfig | None = None) -> float:
    """Bytes of a file: those it has, or what its weights and its 16-bit parameters will take."""
    bpw, rest = expected_bpw(m.arch, encode or m.config.encode, m.config.train.lam), m.parameters - m.coded
    return (m.coded * bpw + rest * (max(bpw - 1, 0.3) if _codes_ends(m.config) else 16)) / 8 if size is None else size


def _sum(*works: Terms) -> Terms:
    return {kind: sum(work.get(kind, 0) for work in works) for kind in ("float32", "float64", "trellis", "disk")}
