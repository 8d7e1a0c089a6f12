"""Claims about training in several processes: the same transforms as one process, also after a kill; its launcher."""

import os
import re
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_runs import ROOT, make_model, make_text, metrics, sha256, train_words

from rdopt.align import devices, hosts
from rdopt.cli.main import main
from rdopt.config.errors import UserError

LAUNCHER = ROOT / "scripts/launch_multihost.sh"
# Runs the command; with DIE_AT set, it kills itself behind the line that begins so.
PROGRAM = f"""#!{sys.executable}
import os, signal, sys
from rdopt.cli import commands
from rdopt.cli.main import run
plain = commands.say
def say(text):
    plain(text)
    if text.startswith(os.environ.get("DIE_AT", "never")):
        os.kill(os.getpid(), signal.SIGKILL)
commands.say = say
run()
"""
# Block distortion: the only kinds that see the batch are "block" and "model".
FASTER = ("--train.distortion", "block", "--encode.grid", "round", "--encode.output", "diagonal")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a model, a text, and the program."""
    world = tmp_path_factory.mktemp("hosts")
    make_model(world / "model", num_hidden_layers=1)
    make_text(world / "text.jsonl")
    program = world / "program"
    program.write_text(PROGRAM)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return world


def words(world, out):
    """The training run of all processes here: 12 steps of 8 sequences, the last checkpoint before the kill after 5."""
    return [*map(str, train_words(world, out)), "--steps", "12", *FASTER]


def environment(world, each, **more):
    """Of a process with `each` virtual devices that compiles fast and shares what it compiled."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={each}"
    shared = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "RDOPT": str(world / "program")}
    return os.environ | shared | more


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(argv, env):
    return subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def launched(world, out):
    """Two processes of two devices each, started by the launcher."""
    argv = [str(LAUNCHER), "local", "2", "--", *words(world, out)]
    return start(argv, environment(world, 2, PORT=free_port()))


def finished(process):
    """Its output, after it ended well."""
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    return said


@pytest.fixture(scope="module")
def runs(world):
    """Four devices in two processes and in one; what the two said."""
    said = finished(launched(world, world / "two"))
    finished(start([str(world / "program"), *words(world, world / "alone")], environment(world, 4)))
    return said


def test_two_processes_learn_what_one_with_as_many_devices_learns(world, runs):
    """Means over four devices are summed in another order, each within 2 units of float32's rounding, 6e-8.

    Adam divides gradients by their size, so that in every step an entry moves by the same share more or less.
    """
    found, wanted = (load_file(world / name / "transforms.safetensors") for name in ("two", "alone"))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        print(name, np.abs(found[name] - value).max() / np.abs(value).max())
        assert np.linalg.norm(found[name] - value) <= 1e-5 * np.linalg.norm(value), name
    for ours, theirs in zip(metrics(world / "two"), metrics(world / "alone"), strict=True):
        costs = [each.pop("costs", {}) for each in (ours, theirs)]
        for words in ("kept", "tie"):
            assert ours.pop(words, "") == theirs.pop(words, "")
        assert ours == pytest.approx(theirs, rel=1e-5)
        assert costs[0] == pytest.approx(costs[1], rel=1e-3)  # trial encodings: a rounded weight may fall elsewhere


def test_process_0_alone_speaks(runs):
    said = re.findall(r"^step (\d+) of 12", runs, re.MULTILINE)
    assert said == [str(step) for step in range(1, 13)]
    assert len(re.findall("^wrote ", runs, re.MULTILINE)) == 1


@pytest.mark.slow
def test_when_process_0_is_killed_the_other_stops_and_the_run_resumes_to_the_same_bytes(world, runs, tmp_path):
    out = tmp_path / "run"
    place = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--process"]
    argv = [str(world / "program"), *words(world, out), *place]
    # Without the launcher, which would end one with the other.
    first, second = (start([*argv, str(i)], environment(world, 2, DIE_AT="step 8 of")) for i in range(2))
    first.communicate(timeout=300)
    assert first.returncode == -signal.SIGKILL
    second.communicate(timeout=150)  # at the latest when heartbeats are missed
    assert second.returncode != 0
    assert len(metrics(out)) == 8
    said = finished(launched(world, out))
    assert re.findall(r"^step (\d+) of 12", said, re.MULTILINE)[0] == "6"
    assert sha256(out / "transforms.safetensors") == sha256(world / "two/transforms.safetensors")
    assert metrics(out) == metrics(world / "two")


def test_a_process_that_alone_has_an_error_ends_at_once(monkeypatch, capsys):
    def leave(code):
        raise SystemExit(code)

    with pytest.raises(OSError, match="full"), hosts.abort_on_error():
        raise OSError("full")
    monkeypatch.setattr(hosts.jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts.os, "_exit", leave)
    with pytest.raises(UserError), hosts.abort_on_error():
        raise UserError("which every process has")
    with pytest.raises(SystemExit, match=str(hosts.LOST)), hosts.abort_on_error():
        raise OSError("full")
    assert "process 0 of 2 cannot go on: OSError('full'); start all" in capsys.readouterr().err


def test_a_mistake_is_told_once_by_every_process_and_none_waits(world, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("mine")
    process = launched(world, tmp_path / "run")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert errors.count("already exists and is no run of rdopt") == 2 and "Traceback" not in errors


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        (("--processes", "2"), "--coordinator is None, but several processes need HOST:PORT"),
        (("--coordinator", "gpu1"), "--coordinator is gpu1, but"),
        (("--coordinator", "gpu1:80"), "needs --processes N and --process I too"),
        (("--coordinator", "a:80", "--processes", "2", "--process", "2"), "is 2, but 2 processes are numbered 0 to 1"),
        (("--coordinator", "auto", "--process", "1"), "by itself; leave them out"),
    ],
)
def test_a_place_that_is_none_is_refused(place, sentence, tmp_path, capsys):
    assert main(["train", "demo", "--out", str(tmp_path / "run"), *place]) == 2
    assert sentence in capsys.readouterr().err


def test_a_batch_that_the_devices_of_all_hosts_cannot_share_is_refused():
    pool = [SimpleNamespace(process_index=i // 2) for i in range(6)]
    with pytest.raises(UserError, match=r"batch_sequences is 8, which 6 devices of 3 processes cannot share .* of 6\."):
        devices.require_share(8, pool)
    devices.require_share(12, pool)


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        ("local 2", ["--process 0", "--process 1"]),
        ("ssh gpu1,gpu2", ["ssh -tt gpu1 .*gpu1:29500.*--process 0", "ssh -tt gpu2 .*gpu1:29500.*--process 1"]),
        ("slurm --nodes 2", ["srun --kill-on-bad-exit=1 --nodes 2 rdopt train demo --out runs/a --coordinator auto"]),
        ("tpu pod --zone z", ["gcloud compute tpus tpu-vm ssh pod --zone z --worker=all --command=rdopt.*auto"]),
    ],
)
def test_a_dry_launch_prints_a_command_for_every_start(words, lines):
    argv = [str(LAUNCHER), "--dry-run", *words.split(), "--", "train", "demo", "--out", "runs/a"]
    env = {k: v for k, v in os.environ.items() if k not in ("RDOPT", "PORT")}
    said = subprocess.run(argv, env=env, capture_output=True, text=True, check=True).stdout.replace("\\", "")
    assert len(said.splitlines()) == len(lines)
    for line, pattern in zip(said.splitlines(), lines, strict=True):
        assert re.search(pattern, line), line


def test_the_launchers_help_is_its_top():
    done = subprocess.run([str(LAUNCHER)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert set(done.stderr.split()) <= set(Path(LAUNCHER).read_text().split())
