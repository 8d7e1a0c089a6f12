"""The commands: each calls one function of a room and prints its figures."""

# A command imports what it runs inside its function, and only there: JAX, numba and matplotlib take seconds to load,
# which neither `rdopt --help` nor a command that needs none of them should cost.

import argparse
import time

from rdopt.checkpoint.atomic import refuse_existing
from rdopt.cli.parser import TEXT, WINDOWS, toy_settings
from rdopt.config.errors import UserError
from rdopt.config.progress import milestones, ticker
from rdopt.config.schema import Config


def say(line: str) -> None:
    """Prints a line at once."""
    print(line, flush=True)


def run_moments(args: argparse.Namespace, config: Config) -> None:
    """rdopt moments."""
    from rdopt.calibration.subject import open_subject
    from rdopt.runs.moments import moments_of

    begun = time.perf_counter()
    subject, corpus = open_subject(config)
    moments_of(args.out, subject, corpus, config, ticker(say, "second moments: pass"))
    say(f"second moments of {corpus.calibration.size} tokens in {time.perf_counter() - begun:.0f} s")
    say(f"wrote {args.out}; next: rdopt encode MODEL --moments {args.out} --out FILE, with the same text")


def run_train(args: argparse.Namespace, config: Config) -> None:
    """rdopt train."""
    from rdopt.align.hosts import abort_on_error, is_primary, join
    from rdopt.align.train import train

    join(args.coordinator, args.processes, args.process)
    with abort_on_error():
        if is_primary():
            train_aloud(args, config)
        else:
            train(config, args.out)


def train_aloud(args: argparse.Namespace, config: Config) -> None:
    """Trains and says how it goes."""
    from rdopt.align.train import train
    from rdopt.cli.sizes import sizes
    from rdopt.encode.trial import hard_cost
    from rdopt.transforms.aligned import Aligned

    say(sizes(args, config, timed=False))

    def trial(aligned: Aligned) -> float:
        """J by an encoding."""
        return hard_cost(aligned, config.encode, config.train.lam).J

    tick = ticker(say, "second moments: pass")
    trained = train(config, args.out, report=milestones(say, 20), progress=tick, trial=trial)
    if trained.tie:
        say(trained.tie)
    costs = ", ".join(f"{name} {J:.4f}" for name, J in trained.costs.items())
    say(f"J of a trial encoding, bits/weight: {costs}; kept: {trained.kept}")
    say(
        f"J {trained.start_J:.4f} -> {trained.J:.4f}  bpw_relaxed {trained.bpw_relaxed:.4f}  on selection text: "
        f"D estimated {trained.distortion:.5f}, KL of the relaxed model {trained.kl:.5f} nats/token"
    )
    say(f"wrote {args.out}; next: rdopt encode {args.out} --out FILE")


def run_export(args: argparse.Namespace, config: Config) -> None:
    """rdopt export."""
    from rdopt.runs.export import KL_LIMIT, export

    exported = export(args.run, args.out, config.run)
    say(
        f"KL(original || aligned) {exported.kl:.2e} nats/token in float32 (limit {KL_LIMIT:g}); "
        f"rounded to bfloat16 {exported.kl_bf16:.2e}"
    )
    say(f"wrote {args.out}: a plain checkpoint, transforms.json and transforms.safetensors")


def run_encode(args: argparse.Namespace, config: Config) -> None:
    """rdopt encode."""
    from rdopt.codec.streams.index import coded_bits
    from rdopt.encode.encode import encode
    from rdopt.encode.measure import encode_figures
    from rdopt.rate.grids import GRIDS
    from rdopt.runs.figures import write_figures

    report = args.out.with_suffix(".json")
    if report == args.out:
        raise UserError(f"{report} would hold the model and its report; name the file *.rdopt.safetensors.")
    refuse_existing(report)
    refuse_text_of_run(args)
    begun = time.perf_counter()
    tuning = milestones(say, 20, "finetune: ")
    prepared, encoded, tuned = encode(
        args.source, args.out, config, ticker(say, "encode: matrix"), tuning, ticker(say, "second moments: pass")
    )
    seconds = time.perf_counter() - begun
    figures = {**encode_figures(args.out, args.source, prepared, encoded), "seconds": seconds}
    write_figures(report, figures)
    if tuned is not None:
        say(tuned.sentence)
    parts = "  ".join(f"{k} {v:.4f}" for k, v in figures["parts"].items())
    say(f"{len(encoded.data)} bytes in {seconds:.1f} s; bits per coded weight: {parts}")
    saved = figures["structure_saved"]
    say(
        f"structure saves (bits/weight): smooth scales {saved['scales']:.4f}, low-rank components "
        f"{sum(bits for _, bits in saved['low_rank'].values()):.4f} in {len(saved['low_rank'])} matrices"
    )
    say(
        f"bits/weight {figures['bpw']:.4f} (ideal {figures['bpw_estimated']:.4f}) in the matrices of the blocks, "
        f"{coded_bits(encoded.bits) // 8} bytes; whole file {figures['bpw_all']:.4f} per parameter, embedding and head "
        + (f"coded in {encoded.bits['embeddings'] // 8} bytes" if encoded.bits["embeddings"] else "in 16 bit")
    )
    corrected = prepared.source.tokens is not None and GRIDS[prepared.config.encode.grid].follows_drift
    counted = ", the drift's correction counted as error" if corrected else ""
    say(
        f"KL {figures['kl']:.5f} nats/token (D {figures['distortion_estimated']:.5f}{counted}), perplexity "
        f"{figures['perplexity_before']:.3f} -> {figures['perplexity_after']:.3f}"
    )
    say(f"wrote {args.out} and {report}")


def refuse_text_of_run(args: argparse.Namespace) -> None:
    """A run brings the text it was trained on: naming another would be silently ignored."""
    named = [flag for flag in (*TEXT, *WINDOWS) if getattr(args, flag.replace("-", "_")) is not None]
    if (args.source / "run.json").is_file() and named:
        raise UserError(
            f"--{named[0]} does not apply to a run, which brings its own text and windows; leave it out, or "
            "export the run and encode the folder."
        )


def run_decode(args: argparse.Namespace, config: Config) -> None:
    """rdopt decode."""
    from rdopt.checkpoint.families import coded_weights
    from rdopt.codec.decoder import decode
    from rdopt.integrations.model_card import decoded_card

    begun = time.perf_counter()
    decoded = decode(args.file, args.out, dtype=args.dtype, threads=config.encode.threads, card=decoded_card)
    weights = coded_weights(decoded.arch)
    seconds = time.perf_counter() - begun
    say(f"decoded {weights} weights in {seconds:.2f} s; wrote {args.out}")


def run_eval(args: argparse.Namespace, config: Config) -> None:
    """rdopt eval."""
    from rdopt.encode.measure import eval_figures, measure
    from rdopt.runs.figures import write_figures

    refuse_existing(args.json)
    measured = measure(args.candidate, config)
    figures = eval_figures(measured, config)
    loss, kl = figures["perplexity"], figures["kl"]
    say(
        f"text: {', '.join(config.text.sources)}, test part, context {loss['context']}, stride {loss['stride']}, "
        f"tokenizer of {config.model}"
    )
    say(
        f"perplexity {loss['value']:.4f} +- {loss['stderr']:.4f} on {loss['tokens']} tokens "
        f"(reference {measured.comparison.reference_perplexity.value:.4f})"
    )
    say(
        f"KL(reference || candidate) mean {kl['mean']:.6f}, median {kl['median']:.6f}, p90 {kl['p90']:.6f} "
        f"nats/token; bf16 noise floor {kl['noise_floor_bf16']:.1e}"
    )
    if args.json is not None:
        write_figures(args.json, figures)


def run_sweep(args: argparse.Namespace, config: Config) -> None:
    """rdopt sweep."""
    from rdopt.sweep.sweep import sweep

    begun = time.perf_counter()
    sweep(config, args.out, say)
    say(f"wrote {args.out}/curve.json, curve.csv, curve.png in {time.perf_counter() - begun:.0f} s")


def run_analyze(args: argparse.Namespace, config: Config) -> None:
    """rdopt analyze."""
    from rdopt.study.analyze.report import report_lines
    from rdopt.study.analyze.run import analyze

    begun = time.perf_counter()
    for line in report_lines(analyze(config, args.out, args.learned, say, trajectory=args.trajectory)):
        say(line)
    say(f"wrote {args.out}: analysis.json, analysis.txt and three PNGs in {time.perf_counter() - begun:.0f} s")


def run_inspect(args: argparse.Namespace, config: Config) -> None:
    """rdopt inspect."""
    from rdopt.runs.figures import write_figures
    from rdopt.study.inspect import describe, inspect

    refuse_existing(args.json)
    figures = inspect(args.path)
    say(describe(figures))
    if args.json is not None:
        write_figures(args.json, figures)


def run_toy(args: argparse.Namespace, config: Config) -> None:
    """rdopt toy."""
    from rdopt.checkpoint.atomic import new_folder
    from rdopt.study.toy.experiment import toy_experiment
    from rdopt.study.toy.report import toy_sentences, toy_table, write_toy

    settings, begun = toy_settings(args), time.perf_counter()
    with new_folder(args.out) as folder:
        seeds = toy_experiment(settings, say)
        write_toy(folder, settings, seeds)
    say(toy_table(seeds))
    for sentence in toy_sentences(seeds):
        say(sentence)
    say(f"wrote {args.out}/toy.json and toy.png in {time.perf_counter() - begun:.0f} s")
