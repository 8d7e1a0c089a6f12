"""A symmetry that rdopt does not have, learned, recorded, read back, folded and unfolded: run by test_sites.py."""

import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rdopt.transforms.arrays import namespace
from rdopt.transforms.gauges import registry
from rdopt.transforms.gauges.site import Site
from rdopt.transforms.maps import Map


class Loudness(Site):
    """One positive number a layer: up times it, down over it."""

    name = field = "loudness"
    outputs_changed, inputs_changed = frozenset({"up"}), frozenset({"down"})

    def parameters(self, arch, rotation):
        """Its logarithm."""
        return {"log_scale": (arch.num_layers, 1)}

    def factor(self, theta, arch):
        """exp(t)."""
        return namespace(theta["log_scale"]).exp(theta["log_scale"])

    def outputs(self, name, gauge, arch):
        """Times it, in front of down too."""
        return Map(scale=gauge.repeat(arch.ffn_size))


registry.SITES += (Loudness(),)
registry.OWNERS["loudness"] = registry.SITES[-1]

from rdopt.align.alignment import Alignment, Start, single_precision, trained_records  # noqa: E402 - behind the entry
from rdopt.calibration.subject import load_subject  # noqa: E402
from rdopt.operator.llama import logits  # noqa: E402
from rdopt.transforms.files import alignment_of, load_alignment, save_alignment  # noqa: E402
from rdopt.transforms.gauges.coordinates import Gauges, gauges_of  # noqa: E402
from rdopt.transforms.gauges.fold import fold, unfold  # noqa: E402


def main(folder: Path) -> None:
    """Asserts what the test claims."""
    subject = load_subject(folder)
    params, arch = subject.params, subject.arch
    module = Alignment(arch=arch, sites=("loudness",), rate="analytic")  # type: ignore[arg-type]
    start = Start(single_precision(Gauges(), arch))
    theta = module.init(jax.random.key(0), start)["params"]
    theta = jax.tree.map(lambda x: x + jnp.linspace(0.5, 1.0, x.size).reshape(x.shape), theta)
    trial: Any = module.apply({"params": theta}, start)
    records = trained_records(theta, Gauges(), arch)
    with tempfile.TemporaryDirectory() as out:
        save_alignment(Path(out), alignment_of(records, params, subject.checkpoint, subject.fingerprint))
        gauges = gauges_of(load_alignment(Path(out)).records)
    np.testing.assert_allclose(trial.gauges.loudness, gauges.loudness, rtol=1e-6)
    folded, folded_arch = fold(params, arch, gauges)
    assert np.abs(folded["blocks"]["up"] - params["blocks"]["up"]).max() > 0.1
    tokens = np.arange(16, dtype=np.int32)[None] % arch.vocab_size
    np.testing.assert_allclose(logits(folded, tokens, folded_arch), logits(params, tokens, arch), atol=1e-4)
    again = unfold(folded, arch, gauges, {})
    np.testing.assert_allclose(again["blocks"]["up"], params["blocks"]["up"], atol=1e-6)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
