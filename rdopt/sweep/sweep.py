"""`rdopt sweep`: every arm at every slope or size, resumable, into curve.json, curve.csv and curve.png."""

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import jax

from rdopt.align.candidates import candidates, relaxed_J
from rdopt.align.devices import Device, require_share
from rdopt.align.learn import Learned, learn
from rdopt.align.problem import make_problem
from rdopt.align.tie import settle_tie
from rdopt.align.train import fingerprints
from rdopt.calibration.subject import open_subject
from rdopt.checkpoint.families import coded_weights
from rdopt.config.progress import Say, milestones, ticker
from rdopt.config.schema import Config, EncodeConfig, GridName
from rdopt.encode.blockwise_pca import blockwise_pca
from rdopt.encode.encode import encode_source
from rdopt.encode.source import make_source
from rdopt.encode.trial import hard_cost
from rdopt.evaluate.divergence import noise_floor_bf16
from rdopt.rate.steps import lam_of_base_step
from rdopt.runs.export import check_alignment, reference_of, write_aligned
from rdopt.runs.figures import dumps
from rdopt.runs.folder import Metrics, finish_run, open_run
from rdopt.runs.moments import MOMENTS, moments_of
from rdopt.runs.states import StateStore
from rdopt.sweep.arms import ARMS
from rdopt.sweep.points import Bench, Point, load_point, measure_point, point_name, save_point
from rdopt.sweep.report import curve_csv, curve_json, gain_table, gains, plot_curves, point_table
from rdopt.transforms.aligned import Aligned
from rdopt.transforms.bases import starting_gauges
from rdopt.transforms.files import alignment_of, load_alignment, save_alignment
from rdopt.transforms.gauges.coordinates import Gauges, gauges_of
from rdopt.transforms.stored.rotations import StoredRotations


def sweep(config: Config, out: Path, say: Say, *, devices: Sequence[Device] | None = None) -> list[Point]:
    """Measures all points of a comparison, arm by arm; finished ones of an earlier try in the folder are kept.

    Devices are those to train on, all local ones by default; only learned arms use more than one.

    Raises:
        UserError: bad input, or another comparison in the folder.
        KeyboardInterrupt: after the training state was saved.
    """
    pool = tuple(devices or jax.local_devices())
    if any(ARMS[name].learned for name in config.sweep.arms):
        require_share(config.train.batch_sequences, pool)
    subject, corpus = open_subject(config)
    open_run(out, config, "sweep", pool)
    say(f"model {config.model}: {coded_weights(subject.arch) / 1e6:.2f} M weights to code, {corpus.description}")
    moments = moments_of(out / MOMENTS, subject, corpus, config, ticker(say, "second moments: pass"))
    say("reference: the original model on the test text")
    reference = reference_of(subject, corpus, config)
    bench = Bench(config=config, subject=subject, corpus=corpus, moments=moments, reference=reference, out=out)
    floor = noise_floor_bf16(reference)
    metrics = Metrics(out)
    points: list[Point] = []
    for name in config.sweep.arms:
        learned = _LearnedArm(bench, name, pool, say) if ARMS[name].learned else None
        measure = _fixed_arm(bench, name) if learned is None else learned.point
        for encode, lam in _requests(config):
            label = point_name(name, encode, lam)
            point = load_point(out / "points", label)
            if point is None:
                point = measure(encode, lam)
                save_point(out / "points", label, point)
            elif learned is not None:
                learned.take_over(label)
            points.append(point)
            # nan, where nothing was trained, is no JSON.
            metrics.write({"step": len(points), **{k: v for k, v in point.scalars().items() if v == v}})
            say(_line(point))
            _write_results(bench, points, floor)
    _report(bench, points, floor, say)
    finish_run(out)
    return points


def _write_results(bench: Bench, points: list[Point], floor: float) -> None:
    """curve.json, curve.csv, curve.png and gains.json of the points so far, replacing those of fewer."""
    out, config = bench.out, bench.config
    rows = gains(points, floor)
    (out / "curve.json").write_text(dumps(curve_json(points, config, bench.corpus.description)), encoding="utf-8")
    (out / "curve.csv").write_text(curve_csv(points), encoding="utf-8")
    (out / "gains.json").write_text(dumps({"noise_floor_bf16": floor, "gains": rows}), encoding="utf-8")
    sources = ", ".join(Path(s).name for s in config.text.sources)
    plot_curves(points, out / "curve.png", f"{Path(config.model).name} on {sources}", floor)


def _report(bench: Bench, points: list[Point], floor: float, say: Say) -> None:
    original, rows = bench.reference.perplexity, gains(points, floor)
    say("")
    say(point_table(points))
    say(
        f"original: perplexity {original.value:.3f} +- {original.stderr:.3f} on {original.tokens} tokens; KL of its "
        f"bfloat16 pass {floor:.1e}; * Pareto front; bpw from file bytes, ideal: code length + side bytes,"
    )
    say("relaxed: R of training; D: estimate of the KL from the errors and the moments")
    if rows:
        say("")
        say(gain_table(rows))


def _requests(config: Config) -> list[tuple[EncodeConfig, float]]:
    """(encoder configuration, slope) of every point; learned arms warm-start from one to the next."""
    encode = replace(config.encode, lam=None, target_bpw=None, target_kl=None, target_ppl=None)
    if config.sweep.target_bpw is None:
        return [(encode, lam) for lam in sorted(config.sweep.lams, reverse=True)]
    targets = sorted(config.sweep.target_bpw, reverse=True)
    return [(replace(encode, target_bpw=bpw), config.train.lam) for bpw in targets]


def _fixed_arm(bench: Bench, name: str) -> Callable[[EncodeConfig, float], Point]:
    """What encodes and evaluates at a slope or target in coordinates that do not depend on it, folded once."""
    subject, config, arm = bench.subject, bench.config, ARMS[name]
    grid: GridName = "round" if arm.blockwise else config.encode.grid
    if arm.blockwise:
        stored = blockwise_pca(subject.params, subject.arch)
        aligned = Aligned(subject=subject, moments=bench.moments, stored=stored)
    else:
        assert arm.basis is not None
        gauges = starting_gauges(arm.basis, subject.params, subject.arch, bench.moments, config.train.seed)
        aligned = bench.aligned(gauges)
        check_alignment(bench.reference, aligned)
    source = make_source(aligned, replace(config.encode, grid=grid), work=bench.work)
    return lambda encode, lam: measure_point(bench, name, source, replace(encode, grid=grid), lam)


class _LearnedArm:
    """Transforms trained once per point, each from the point's before it."""

    def __init__(self, bench: Bench, name: str, devices: tuple[Device, ...], say: Say) -> None:
        self._bench, self._name, self._devices, self._say = bench, name, devices, say
        subject, config = bench.subject, bench.config
        self._problem, self._settings = make_problem(subject, bench.moments, config)
        basis = ARMS[name].basis or config.train.init
        start = starting_gauges(basis, subject.params, subject.arch, bench.moments, config.train.seed)
        cost = relaxed_J(self._problem, self._settings, config.train.lam)
        self._train, self._start, tie = settle_tie(subject, config, start, cost)
        if tie is not None:
            say(f"  {name}: {tie.sentence}")

    def take_over(self, label: str) -> None:
        """Takes over the transforms of a finished point."""
        self._start = gauges_of(load_alignment(self._bench.out / "aligned" / label).records)

    def point(self, encode: EncodeConfig, lam: float) -> Point:
        """Trains, folds, encodes and evaluates at one slope or target."""
        bench, subject, clock = self._bench, self._bench.subject, time.perf_counter
        begun = clock()
        if encode.target_bpw is not None:
            # The slope to train at is the one that makes a file of this size before training.
            source = make_source(bench.aligned(self._start), encode)
            lam = lam_of_base_step(encode_source(source, replace(encode, finetune=0), lam)[0].c, source.weights)
        learned = self._best(point_name(self._name, encode, lam), lam)
        self._start = gauges_of(learned.records)
        seconds = clock() - begun
        source = make_source(bench.aligned(self._start, learned.stored), encode, work=bench.work)
        check_alignment(bench.reference, source.aligned)
        folder = bench.out / "aligned" / point_name(self._name, encode, lam)
        shutil.rmtree(folder, ignore_errors=True)
        alignment = alignment_of(
            learned.records, subject.params, subject.checkpoint, subject.fingerprint, learned.stored
        )
        if bench.config.sweep.keep:
            write_aligned(folder, source.aligned, alignment)
        else:
            folder.mkdir(parents=True)
            save_alignment(folder, alignment)
        return measure_point(bench, self._name, source, encode, lam, trained=(learned.rate, seconds))

    def _best(self, label: str, lam: float) -> Learned:
        """The better of the start and of what is learned from it, by a trial encoding."""
        bench = self._bench

        def cost(gauges: Gauges, stored: StoredRotations | None) -> float:
            return hard_cost(bench.aligned(gauges, stored), bench.config.encode, lam).J

        ranked = candidates({"the start": self._start}, lambda name, start: self._learn(label, lam), cost)
        self._say(f"  {label}: J of a trial encoding: " + ", ".join(f"{x.name} {x.J:.4f}" for x in ranked))
        return ranked[0].learned

    def _learn(self, label: str, lam: float) -> Learned:
        bench, train = self._bench, replace(self._train, lam=lam)
        state = bench.out / "state" / label
        store = StateStore(state, fingerprints(bench.subject, bench.corpus, replace(bench.config, train=train)))
        report = milestones(self._say, 5, f"  {label}: ")
        learned = learn(
            self._problem, self._settings, bench.corpus.calibration, self._start, train,
            devices=self._devices, store=store, report=report,
        )
        store.close()
        shutil.rmtree(state, ignore_errors=True)
        return learned


def _line(p: Point) -> str:
    relaxed = "" if math.isnan(p.bpw_relaxed) else f" (relaxed {p.bpw_relaxed:.3f})"
    return (
        f"{p.arm:17s} lam {p.lam:<7.4g} {p.bpw:.4f} bits/weight{relaxed}  KL {p.kl:.5f} (estimated "
        f"{p.distortion:.5f})  perplexity {p.ppl:.3f}  {p.bytes} bytes  {p.seconds:.0f} s"
    )
