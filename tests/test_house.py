"""Claims about the house: which room imports which, what importing loads, how long files are."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import rdopt

ROOMS = (
    *("config", "checkpoint", "operator", "evaluate", "calibration", "transforms", "rate", "runs", "align"),
    *("codec", "encode", "sweep", "integrations", "study", "cli"),
)
ROOT = Path(rdopt.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
every_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))


def room_of(path):
    return path.relative_to(ROOT).parts[0]


def imported_rooms(tree):
    """Rooms named in any import statement, also inside functions."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [node.module or ""]
            if node.module == "rdopt":
                names = [f"rdopt.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "rdopt" and len(parts) > 1 and parts[1] in ROOMS:
                yield parts[1]


@every_module
def test_a_room_imports_only_what_stands_before_it(path):
    if len(path.relative_to(ROOT).parts) == 1:
        return  # the package itself belongs to no room
    room = room_of(path)
    assert room in (*ROOMS, "demo"), f"{room} is no room of the house"
    if room != "demo":
        found = imported_rooms(ast.parse(path.read_text()))
        assert not {name for name in found if ROOMS.index(name) > ROOMS.index(room)}


@every_module
def test_a_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


@every_module
def test_functions_stay_short(path):
    long = {
        node.name: length
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > 60
    }
    assert not long


@pytest.mark.parametrize("room", [r for r in ROOMS if (ROOT / r / "__init__.py").exists()])
def test_every_public_name_of_a_room_exists_once(room):
    module = importlib.import_module(f"rdopt.{room}")
    assert module.__doc__
    names = getattr(module, "__all__", [])
    assert len(names) == len(set(names))
    assert [name for name in names if not hasattr(module, name)] == []


@pytest.mark.parametrize("module", ["rdopt", "rdopt.cli", "rdopt.codec", "rdopt.align"])
def test_importing_loads_neither_torch_nor_transformers(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.stdout.strip() == "[]", done.stderr
