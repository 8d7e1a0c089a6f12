"""Room `align`: learns the gauges of a model on J = R + lam D, with resume, on all devices of all processes."""

from rdopt.align.candidates import candidates, relaxed_J
from rdopt.align.checkpoints import StateStore
from rdopt.align.devices import Device
from rdopt.align.hosts import join, leads, together
from rdopt.align.learn import Learned, Progress, learn
from rdopt.align.objective import Problem, Settings, Terms, rate_and_distortion
from rdopt.align.run_folder import Metrics, finish_run, open_run
from rdopt.align.tie import settle_tie
from rdopt.align.train import Trained, coded_weights, fingerprints, make_problem, moments_of, train

__all__ = [
    "candidates",
    "relaxed_J",
    "settle_tie",
    "Device",
    "Learned",
    "Metrics",
    "Problem",
    "Progress",
    "Settings",
    "StateStore",
    "Terms",
    "Trained",
    "coded_weights",
    "fingerprints",
    "finish_run",
    "join",
    "leads",
    "learn",
    "make_problem",
    "moments_of",
    "open_run",
    "rate_and_distortion",
    "together",
    "train",
]
