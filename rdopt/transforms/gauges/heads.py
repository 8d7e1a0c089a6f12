"""The order of the heads: query heads inside their group, and whole groups with their KV head."""

import numpy as np
from jaxtyping import Int

from rdopt.checkpoint.families import Architecture
from rdopt.transforms.arrays import AnyArray
from rdopt.transforms.gauges.site import Site
from rdopt.transforms.maps import Map


class Heads(Site):
    """The old query head in every new place, (layers, heads); heads of one group stay together."""

    name = field = "heads"
    kind = "order"
    outputs_changed, inputs_changed = frozenset({"q", "k", "v"}), frozenset({"o"})

    def outputs(self, name: str, gauge: Int[AnyArray, " heads"], arch: Architecture) -> Map:
        """The heads of queries and of what attention makes of them, or the KV heads, in the new order."""
        groups = _groups(gauge, arch)
        return Map(order=_entries(groups if name in ("k", "v") else gauge, arch))


def _groups(heads: Int[AnyArray, " heads"], arch: Architecture) -> Int[AnyArray, " kv"]:
    """The old KV head in every new place."""
    group = arch.num_heads // arch.num_kv_heads
    of = heads.reshape(-1, group) // group
    if np.any(of != of[:, :1]):
        raise ValueError("query heads of one group have to stay together")
    return of[:, 0]


def _entries(heads: Int[AnyArray, " k"], arch: Architecture) -> Int[AnyArray, " n"]:
    """Where every entry of all heads comes from."""
    return (heads[:, None] * arch.head_dim + np.arange(arch.head_dim)).ravel()
