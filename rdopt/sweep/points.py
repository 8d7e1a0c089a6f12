"""One point of a curve: encode a model at a slope or a size, write, read back, decode, evaluate."""

import json
import shutil
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from rdopt.calibration.moments import Moments
from rdopt.calibration.subject import Corpus, Subject
from rdopt.checkpoint.atomic import new_file
from rdopt.codec.decoder import open_file
from rdopt.codec.streams.container import write_container
from rdopt.config.errors import UserError
from rdopt.config.schema import Config, EncodeConfig
from rdopt.encode.encode import encode_source, make_judge
from rdopt.encode.measure import file_distortion, file_params
from rdopt.encode.source import Source
from rdopt.evaluate.divergence import Reference, compare
from rdopt.rate.steps import lam_of_base_step
from rdopt.transforms.aligned import Aligned
from rdopt.transforms.gauges.coordinates import Gauges
from rdopt.transforms.stored.rotations import StoredRotations


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all points of one comparison share: model, text, moments, reference, configuration, folder."""

    config: Config
    subject: Subject
    corpus: Corpus
    moments: Moments
    reference: Reference
    out: Path

    @property
    def work(self) -> Path:
        """Where what is done of the file in work lies, so that a killed sweep goes on inside a point."""
        return self.out / "work"

    def aligned(self, gauges: Gauges, stored: StoredRotations | None = None) -> Aligned:
        """The model in other coordinates."""
        return Aligned(
            subject=self.subject, moments=self.moments, gauges=gauges, stored=stored, tokens=self.corpus.calibration
        )


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measured file.

    Attributes:
        arm: its coordinates.
        lam: slope that its steps follow from.
        bpw: bits/weight of what rebuilds the coded matrices, file bytes.
        bpw_estimated: the same with the ideal code length.
        bpw_relaxed: R at the end of training; nan where nothing was trained.
        bpw_all: file bits per parameter of the original.
        distortion: D of the real quantization errors, nats/token.
        kl: measured KL, nats/token.
        ppl: perplexity.
        bytes: file size.
        seconds: training, encoding, decoding and evaluating.
        train_seconds, encode_seconds, decode_seconds: parts of it.
        kl_sums: KL of every test sequence, nats.
        counts: its scored tokens.
    """

    arm: str
    lam: float
    bpw: float
    bpw_estimated: float
    bpw_relaxed: float
    bpw_all: float
    distortion: float
    kl: float
    ppl: float
    bytes: int
    seconds: float
    train_seconds: float
    encode_seconds: float
    decode_seconds: float
    kl_sums: Float[np.ndarray, " sequences"]
    counts: Int[np.ndarray, " sequences"]

    def scalars(self) -> dict[str, Any]:
        """All fields but the arrays."""
        return {k: v for k, v in vars(self).items() if not isinstance(v, np.ndarray)}


def measure_point(
    bench: Bench,
    arm: str,
    source: Source,
    encode: EncodeConfig,
    lam: float,
    trained: tuple[float, float] = (float("nan"), 0.0),
) -> Point:
    """Encodes, writes, reads back, decodes and evaluates one file.

    Args:
        bench: the comparison.
        arm: name of the coordinates.
        source: the model in them.
        encode: grid, target.
        lam: slope, or the first guess for a target.
        trained: (R at the end of training, seconds it took).
    """
    start = time.perf_counter()
    judge = make_judge(bench.subject, bench.corpus, bench.config) if encode.finetune else None
    encoded, _ = encode_source(source, encode, lam, judge)
    path = bench.out / "files" / f"{point_name(arm, encode, lam)}.rdopt.safetensors"
    path.unlink(missing_ok=True)
    write_container(path, encoded.data)
    written = time.perf_counter()
    for _ in open_file(path).tensors():  # one at a time: all of it is decoded, and nothing kept
        pass
    read = time.perf_counter()
    file = open_file(path)
    params = file_params(file)
    comparison = compare(bench.reference, params, file.arch)
    shutil.rmtree(bench.work, ignore_errors=True)
    return Point(
        arm=arm,
        lam=lam_of_base_step(encoded.c, source.weights),
        bpw=encoded.bpw,
        bpw_estimated=encoded.bpw_estimated,
        bpw_relaxed=trained[0],
        bpw_all=encoded.bpw_all,
        distortion=file_distortion(source.aligned, params),
        kl=comparison.kl_mean,
        ppl=comparison.perplexity.value,
        bytes=len(encoded.data),
        seconds=trained[1] + time.perf_counter() - start,
        train_seconds=trained[1],
        encode_seconds=written - start,
        decode_seconds=read - written,
        kl_sums=comparison.kl_sums,
        counts=comparison.counts,
    )


def point_name(arm: str, encode: EncodeConfig, lam: float) -> str:
    """File name of a point: its arm and its slope or target."""
    return f"{arm}-lam{lam:g}" if encode.target_bpw is None else f"{arm}-bpw{encode.target_bpw:g}"


def save_point(folder: Path, name: str, point: Point) -> None:
    """Writes a point as JSON, complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(point).items()}
    with new_file(folder / f"{name}.json") as part:
        part.write_text(json.dumps(plain), encoding="utf-8")


def load_point(folder: Path, name: str) -> Point | None:
    """A finished point, or None.

    Raises:
        UserError: it was measured by another version.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    plain = json.loads(path.read_text(encoding="utf-8"))
    differing = {f.name for f in fields(Point)} ^ set(plain)
    if differing:
        raise UserError(
            f"{path} lacks or has beside those of a point the fields {', '.join(sorted(differing))}: another version "
            "measured it; remove it, and the sweep measures it again."
        )
    return Point(**{**plain, "kl_sums": np.array(plain["kl_sums"]), "counts": np.array(plain["counts"])})
