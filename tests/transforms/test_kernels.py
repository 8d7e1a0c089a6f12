"""Claims about compiled kernels: where their machine code is kept, and that they run where it can be kept nowhere."""

import json
import os
import subprocess
import sys

import pytest

from rdopt.transforms.kernels import kernel

# A module whose __pycache__ is a file: nothing can be written beside it, not even by root.
MODULE = """
from rdopt.transforms.kernels import kernel

@kernel()
def total(x):
    sum = 0
    for value in x:
        sum += value
    return sum
"""
CALL = """
import json, numpy, installed
value = int(installed.total(numpy.arange(5)))
print(json.dumps([value, sum(installed.total.stats.cache_hits.values())]))
"""


@pytest.fixture
def installed(tmp_path):
    """Calls the kernel of the module in a process of its own, under an environment without any other cache."""
    (tmp_path / "installed.py").write_text(MODULE)
    (tmp_path / "__pycache__").write_text("")
    nowhere = {"HOME": os.devnull, "XDG_CACHE_HOME": os.path.join(os.devnull, "cache"), "NUMBA_CACHE_DIR": ""}

    def call(**environment):
        paths = os.pathsep.join([str(tmp_path), *sys.path])
        env = os.environ | nowhere | {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"} | environment
        done = subprocess.run([sys.executable, "-c", CALL], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return call


def test_a_kernel_runs_where_nobody_may_keep_its_machine_code(installed):
    assert installed() == [10, 0]


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "NUMBA_CACHE_DIR"])
def test_the_second_process_takes_what_the_first_compiled_from_the_users_cache(installed, tmp_path, variable):
    place = {variable: str(tmp_path / "cache")}
    assert installed(**place) == [10, 0]
    assert installed(**place) == [10, 1]


def test_a_named_cache_that_cannot_be_written_gives_way_to_the_users(installed, tmp_path):
    place = {"NUMBA_CACHE_DIR": os.path.join(os.devnull, "named"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    installed(**place)
    assert installed(**place) == [10, 1]


def test_options_reach_the_compiler():
    @kernel(error_model="numpy")
    def quotient(x, y):
        return x / y

    assert quotient(1.0, 0.0) == float("inf")
