"""The coordinate systems that a model is looked at in, from tensors read one at a time."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rdopt.calibration.moments import Moments
from rdopt.checkpoint.families import Architecture
from rdopt.study.analyze.store import LayerStore
from rdopt.transforms.bases import starting_gauges
from rdopt.transforms.gauges.gauges import Gauges

LEARNED = "learned"


def coordinate_systems(
    names: tuple[str, ...], params: Mapping[str, Any], arch: Architecture, store: LayerStore, learned: Gauges | None
) -> dict[str, Gauges]:
    """Gauges by name, norm gains folded into the consumers in all of them, so that none can move the L2 norm.

    Args:
        names: of fixed bases, or "learned".
        params: of `lazy_params`.
        arch: of the model.
        store: its moments.
        learned: the coordinates of a finished training, if asked for.
    """
    moments = Moments(store.lazy("sigma"), store.lazy("G"), 0)
    found = {}
    for name in names:
        gauges = learned if name == LEARNED else starting_gauges(name, dict(params), arch, moments)
        assert gauges is not None
        found[name] = gauges if gauges.residual is not None else gauges._replace(residual=np.eye(arch.hidden_size))
    return found
