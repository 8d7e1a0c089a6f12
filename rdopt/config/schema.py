"""Every key a run can be told: one frozen dataclass a stage, with its default, range and one sentence.

A section built in Python is checked as one read from a file is. `options()` lists the keys for help texts.
"""

# `_option` is dataclasses.field with a sentence and a range, so a call in a default is safe.
# ruff: noqa: RUF009

from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, ClassVar, Literal, get_type_hints

from rdopt.config.check import Limits, checked
from rdopt.config.errors import UserError

SplitOn = Literal["line", "blank", "blank2", "file"]
Init = Literal["identity", "hadamard", "pca", "pca-act", "random", "dct", "fourier", "joint"]
BasisName = Literal[
    "identity", "hadamard", "random", "pca", "pca-act", "joint", "dct", "fourier", "learned"
]
Rate = Literal["analytic", "noise", "annealed", "ste", "l1", "log"]
Density = Literal["gaussian", "laplace", "logistic"]
Distortion = Literal["block", "matrix", "model"]
GridName = Literal["trellis", "lloyd", "feedback", "round"]
Output = Literal["full", "diagonal"]
Activations = Literal["float32", "bfloat16"]
Remat = Literal["auto", "always", "never"]
SiteName = Literal["residual", "value", "stretch", "query", "norm", "hidden"]
RotationKind = Literal["cayley", "givens"]
StoredKind = Literal["none", "blocks", "butterfly", "pairs"]
SideName = Literal["inputs", "outputs"]
StoredBase = Literal["identity", "hadamard"]
TieChoice = Literal["auto", "keep", "untie"]
Drift = Literal["prefix", "none"]
Component = Literal["svd", "none"]
Correction = Literal["unbiased", "none"]
EntropyCoder = Literal["rans", "huffman", "binary"]
Embeddings = Literal["16bit", "coded"]
ArmName = Literal[
    "identity", "hadamard", "random", "dct", "fourier", "pca", "pca-act", "joint", "learned", "hadamard+learned",
    "blockwise-pca"
]


@dataclass(frozen=True, kw_only=True)
class Option:
    """One key: its dotted name, annotation, default and sentence."""

    name: str
    kind: Any
    default: Any
    text: str


def _option(default: Any, text: str, **limits: float) -> Any:
    return field(default=default, metadata={"text": text, "limits": Limits(**limits)})


class _Section:
    """Checks and converts every field when the dataclass is built."""

    section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for f, kind in _typed_fields(type(self)):
            name = f"{self.section}.{f.name}" if self.section else f.name
            value = checked(name, getattr(self, f.name), kind, f.metadata["limits"])
            object.__setattr__(self, f.name, value)


@dataclass(frozen=True, kw_only=True)
class TextConfig(_Section):
    """Which text a model is calibrated, tuned and tested on, and how it is cut."""

    section: ClassVar[str] = "text"
    sources: tuple[str, ...] = _option(
        ("builtin",), "files or folders (.txt, .jsonl, .gz), or builtin")
    split_on: SplitOn = _option("file", "what ends a document: line, blank, blank2 or file")
    seq_len: int = _option(256, "tokens in a calibration sequence", low=2)
    calibration_sequences: int = _option(256, "calibration sequences", low=1)
    seed: int = _option(0, "which sequences are drawn", low=0)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(_Section):
    """How the transforms are learned."""

    section: ClassVar[str] = "train"
    lam: float = _option(50.0, "price of one nat/token of distortion in bits/weight", above=0)
    init: Init = _option(
        "pca", "the basis that learning starts from; joint is better and takes minutes from a width of 1000")
    rivals: tuple[Init, ...] | None = _option(
        None, "further bases that are learned from; the best of all by a trial encoding is kept, starts included")
    tie: TieChoice = _option(
        "auto", "tied embeddings: keep the tie, untie them to rotate the stream, or what takes fewer bits in all")
    sites: tuple[SiteName, ...] = _option(
        ("residual", "value"),
        "the symmetries that are learned: a rotation of the residual stream, a rotation and a stretch of each value "
        "head, an angle and a gain of every rotary pair of queries and keys, scales of norms, of hidden channels")
    rotation: RotationKind = _option(
        "cayley", "how rotations of stream and value heads are parametrised: Cayley, or butterflies of Givens angles")
    stored: StoredKind = _option(
        "none", "rotations kept in the file beside the symmetries: blocks on the diagonal, a Givens butterfly, or "
        "layers of learned disjoint pairs; each stays only where it lowers J by more than its bits")
    stored_sides: tuple[SideName, ...] = _option(
        ("inputs",), "what stored rotations turn: inputs, outputs of matrices")
    stored_size: int = _option(8, "width of a stored block, or number of layers of stored pairs", low=1, high=256)
    stored_base: StoredBase = _option("identity", "what stored rotations come after: nothing, or a Hadamard matrix")
    rate: Rate = _option(
        "analytic", "the rate that is minimised: the operational curve, or a proxy; annealed: noise that becomes "
        "rounding along the steps")
    density: Density = _option(
        "gaussian", "the marginal density of the sampled rates, and of the analytic one on every grid but the trellis")
    distortion: Distortion = _option("matrix", "where the distortion is measured")
    steps: int = _option(150, "optimizer steps", low=1)
    batch_sequences: int = _option(4, "calibration sequences in a step", low=1)
    blocks: int | None = _option(
        None, "blocks that a step draws; null: 8, fewer of more than 16 M weights; all for the distortion model", low=1)
    learning_rate: float = _option(0.006, "Adam's step on the skew entries and angles (radians)", above=0)
    seed: int = _option(0, "order of the sequences and noise of the proxies", low=0)
    checkpoint_every: int = _option(50, "steps between two checkpoints", low=1)
    damping: float = _option(0.02, "added to second moments, as a share of their mean diagonal", low=0)
    activations: Activations = _option(
        "float32", "type of the blocks' activations where the distortion runs them; all else is float32")
    remat: Remat = _option(
        "auto", "compute a block's forward pass again for its gradient instead of keeping it: for large models, or not")


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(_Section):
    """How the aligned weights are quantized and coded."""

    section: ClassVar[str] = "encode"
    lam: float | None = _option(None, "slope of the rate-distortion trade; null: train.lam", above=0)
    target_bpw: float | None = _option(
        None, "bits/weight the file must hit, instead of a slope", above=0, high=12)
    target_kl: float | None = _option(None, "KL on the selection text in nats/token, instead of a slope", above=0)
    target_ppl: float | None = _option(None, "perplexity on the selection text, instead of a slope", above=1)
    finetune: int = _option(0, "steps that train what is not coded on KL; 0: none", low=0)
    grid: GridName = _option(
        "trellis", "trellis, lloyd (Lloyd-Max), feedback (uniform) or round")
    states: int = _option(8, "states of the trellis: 1 (no trellis), 4, 8, 16, 32 or 64", low=1, high=64)
    rdo: float = _option(
        0.4, "weight of the rate in trellis or Lloyd-Max grid, as a share of the slope at high rate; 0: error alone",
        low=0, high=2)
    output: Output = _option("full", "metric of the output error: feed errors back over the rows too, or not")
    output_damping: float = _option(
        0.05, "added to the output's gradient moments, as a share of their mean diagonal", low=0)
    structured: Component = _option("none", "a low-rank component beside the codes where it saves bits, or none")
    drift: Drift = _option("prefix", "aim at what the original gives on the inputs of the model quantized so far")
    drift_sequences: int = _option(128, "calibration sequences that measure the drift", low=1)
    drift_damping: float = _option(
        0.2, "added to the second moments behind the drift's correction, as a share of their mean diagonal", low=0)
    gains: Correction = _option(
        "unbiased", "a gain a row that makes its error uncorrelated with its output, or none")
    coder: EntropyCoder = _option(
        "rans", "entropy coder of the trellis's indices: static rANS or Huffman, or adaptive binary arithmetic coding")
    embeddings: Embeddings = _option("16bit", "embedding and head: kept in 16 bit, or coded at the same slope")
    dead_zone: float = _option(0.0, "share of a step by which the zero bin is widened on each side",
                               low=0, high=0.5)
    damping: float = _option(0.02, "added to second moments, as a share of their mean diagonal", low=0)
    threads: int = _option(0, "encoder threads; 0: all cores", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.states not in (1, 4, 8, 16, 32, 64):
            raise UserError(f"encode.states is {self.states}, but a trellis has 1, 4, 8, 16, 32 or 64; choose one.")
        leads = {k: v for k in ("lam", "target_bpw", "target_kl", "target_ppl") if (v := getattr(self, k)) is not None}
        if len(leads) > 1:
            named = " and ".join(f"encode.{k} is {v:g}" for k, v in leads.items())
            raise UserError(f"{named}, but only one of them can lead: set the others to null.")

    @property
    def targeted(self) -> bool:
        """Whether a size, KL or perplexity leads instead of a slope."""
        return any(x is not None for x in (self.target_bpw, self.target_kl, self.target_ppl))


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(_Section):
    """How perplexity and KL are measured on the test text."""

    section: ClassVar[str] = "evaluate"
    context: int = _option(256, "tokens a model sees at once", low=2)
    stride: int = _option(256, "tokens between two windows", low=1)
    max_tokens: int = _option(65536, "test tokens scored at most", low=1)
    batch: int = _option(8, "windows in one forward pass", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride > self.context:
            raise UserError(f"evaluate.stride is {self.stride}, but it must be at most evaluate.context "
                            f"({self.context}), or tokens between the windows are never scored.")


@dataclass(frozen=True, kw_only=True)
class SweepConfig(_Section):
    """The points and arms of a rate-distortion curve."""

    section: ClassVar[str] = "sweep"
    lams: tuple[float, ...] = _option((7.0, 20.0, 60.0, 200.0, 600.0), "slopes, one point each", above=0)
    target_bpw: tuple[float, ...] | None = _option(
        None, "bits/weight, one point each, instead of slopes", above=0, high=12)
    arms: tuple[ArmName, ...] = _option(
        ("identity", "hadamard", "pca", "joint", "learned"), "the coordinates compared")
    keep: bool = _option(False, "a plain folder of the aligned model for every learned point")


@dataclass(frozen=True, kw_only=True)
class AnalyzeConfig(_Section):
    """In which coordinates a model is looked at, and how it is rounded there."""

    section: ClassVar[str] = "analyze"
    bases: tuple[BasisName, ...] = _option(
        ("identity", "hadamard", "random", "pca", "pca-act", "learned"),
        "coordinate systems; learned: those of --run, or trained here as train says")
    bits: tuple[int, ...] = _option((3, 4, 8), "lengths of codes that weights are rounded to", low=2, high=16)
    protected: float = _option(
        0.005, "share of a matrix's largest weights that outlier protection keeps in 16 bits", above=0, high=0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("identity", "hadamard"):
            if name not in self.bases:
                raise UserError(
                    f"analyze.bases is {', '.join(self.bases)}, but every hypothesis is about a difference from "
                    f"identity and hadamard: add {name}.")


@dataclass(frozen=True, kw_only=True)
class RunConfig(_Section):
    """What a command may take of the machine; no result depends on it."""

    section: ClassVar[str] = "run"
    memory: float | None = _option(
        None, "GiB of blocks and streams kept; null: 60 % of all", above=0)
    moments: str | None = _option(None, "folder of rdopt moments; null: measured")


@dataclass(frozen=True, kw_only=True)
class Config(_Section):
    """One run: a model and a section a stage."""

    model: str = _option("demo", "demo, a Hugging Face folder, or a hub name")
    text: TextConfig = field(default_factory=TextConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    analyze: AnalyzeConfig = field(default_factory=AnalyzeConfig)
    run: RunConfig = field(default_factory=RunConfig)


@cache
def options() -> tuple[Option, ...]:
    """Every key of `Config`, dotted, in the order of the file."""
    return tuple(_options(Config, ""))


@cache
def sections() -> dict[str, type[_Section]]:
    """The sections of `Config` by name."""
    kinds = get_type_hints(Config)
    return {f.name: kinds[f.name] for f in fields(Config) if is_dataclass(kinds[f.name])}


def _options(owner: type, prefix: str) -> Iterator[Option]:
    for f, kind in _typed_fields(owner):
        yield Option(name=prefix + f.name, kind=kind, default=f.default, text=f.metadata["text"])
    if owner is Config:
        for name, kind in sections().items():
            yield from _options(kind, f"{name}.")


@cache
def _typed_fields(owner: type) -> list[tuple[Field[Any], Any]]:
    """The fields that hold a value rather than a section, with their annotations resolved."""
    kinds = get_type_hints(owner)
    return [(f, kinds[f.name]) for f in fields(owner) if not is_dataclass(kinds[f.name])]
