"""A run's folder: resolved configuration, versions, seed, devices and metrics, so that a result can be traced."""

import json
import platform
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from rdopt import __version__
from rdopt.config.errors import UserError
from rdopt.config.load import config_yaml
from rdopt.config.schema import Config, RunConfig

CONFIG, FACTS, METRICS, DONE = "config.yaml", "run.json", "metrics.jsonl", "done"
PARTIAL = "run.json.partial"


def open_run(out: Path, config: Config, kind: str, devices: Sequence[Any]) -> bool:
    """Makes a run folder, or opens an unfinished one of the same kind and configuration.

    Args:
        out: the folder.
        config: the resolved configuration.
        kind: "train", "sweep" or "analyze"; a finished sweep may be opened again.
        devices: what it runs on, as jax.devices gives them.

    Returns:
        whether an earlier, unbroken part was found.

    Raises:
        UserError: the folder is something else, is finished, or was started with another configuration.
    """
    resumed = (out / FACTS).is_file()
    # A run killed while it was being opened has left nothing but its configuration.
    strange = out.exists() and (not out.is_dir() or {p.name for p in out.iterdir()} - {CONFIG, PARTIAL})
    if strange and not resumed:
        raise UserError(f"{out} already exists and is no run of rdopt; remove it or choose another name.")
    if resumed:
        facts = json.loads((out / FACTS).read_text(encoding="utf-8"))
        if facts["kind"] != kind:
            raise UserError(f"{out} holds a {facts['kind']} run; choose another folder for this {kind}.")
        if (out / DONE).exists() and kind != "sweep":
            raise UserError(f"{out} holds a finished run; remove it or choose another name.")
        if _identity((out / CONFIG).read_text(encoding="utf-8"), kind) != _identity(_text(config), kind):
            raise UserError(
                f"{out} was started with another configuration ({_changed(out, config)}); "
                "start it the same way, or choose another folder."
            )
    out.mkdir(parents=True, exist_ok=True)
    if not resumed or kind == "sweep":
        (out / CONFIG).write_text(_text(config), encoding="utf-8")
    part = out / PARTIAL
    part.write_text(json.dumps(_facts(config, kind, devices), indent=2) + "\n", encoding="utf-8")
    part.replace(out / FACTS)
    return resumed


def _facts(config: Config, kind: str, devices: Sequence[Any]) -> dict[str, Any]:
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "constriction")
    return {
        "kind": kind,
        "versions": {"rdopt": __version__, "python": platform.python_version()} | {p: version(p) for p in packages},
        "seed": config.train.seed,
        "processes": len({d.process_index for d in devices}),
        "devices": [f"{d.platform}:{d.id} {d.device_kind}" for d in devices],
    }


def _text(config: Config) -> str:
    """What a run is known by: everything but what it may take of the machine."""
    return config_yaml(replace(config, run=RunConfig()))


def _identity(text: str, kind: str) -> dict[str, Any]:
    """What makes two configurations those of one run: a sweep may have other arms and points than before."""
    return {section: x for section, x in yaml.safe_load(text).items() if (kind, section) != ("sweep", "sweep")}


def _changed(out: Path, config: Config) -> str:
    before = (out / CONFIG).read_text(encoding="utf-8").splitlines()
    now = _text(config).splitlines()
    lines = [line.strip() for line in before if line not in now and not line.strip().startswith("#")]
    return "it had " + ", ".join(lines[:3]) if lines else "keys were added"


def finish_run(out: Path) -> None:
    """Marks the run as finished."""
    (out / DONE).write_text("", encoding="utf-8")


class Metrics:
    """metrics.jsonl of a run, one JSON object per line with a "step"; a resumed run continues it without repeats."""

    def __init__(self, out: Path) -> None:
        self._path = out / METRICS
        self._fresh = True

    def write(self, record: dict[str, Any]) -> None:
        """Appends a record; the first one of a process removes what a killed one wrote beyond its checkpoint."""
        if self._fresh and self._path.exists():
            lines = self._path.read_text(encoding="utf-8").splitlines()
            kept = [x for x in lines if x.endswith("}") and json.loads(x)["step"] < record["step"]]
            self._path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._fresh = False
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
