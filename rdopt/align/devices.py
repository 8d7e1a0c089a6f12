"""Every use of pmap, in one place: one program per local device, the batch split, everything else replicated."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rdopt.config.errors import UserError

AXIS = "devices"
Device = Any  # jax.Device is a variable to type checkers, not a type


def pmapped(step: Callable[..., Any], devices: Sequence[Device]) -> Callable[..., Any]:
    """`step` compiled for every device; its arguments and results carry a leading device axis."""
    return jax.pmap(step, axis_name=AXIS, devices=list(devices))


def mean_over_devices(tree: Any) -> Any:
    """The mean over the devices, inside `step`."""
    return jax.lax.pmean(tree, AXIS)


def replicate(tree: Any, devices: Sequence[Device]) -> Any:
    """One copy of every array on each device, along a new leading axis."""
    sharding = _sharding(devices)

    def copies(x: Any) -> jax.Array:
        shards = [jax.device_put(x, d)[None] for d in devices]
        return jax.make_array_from_single_device_arrays((len(devices), *np.shape(x)), sharding, shards)

    return jax.tree.map(copies, tree)


def split(batch: np.ndarray, devices: Sequence[Device]) -> jax.Array:
    """The batch with its first axis cut into (device, share).

    Raises:
        UserError: the batch does not divide by the number of devices.
    """
    n = len(devices)
    if batch.shape[0] % n:
        raise UserError(
            f"train.batch_sequences is {batch.shape[0]}, which {n} devices cannot share equally; "
            f"set it to a multiple of {n}."
        )
    return jax.device_put(batch.reshape(n, -1, *batch.shape[1:]), _sharding(devices))


def first(tree: Any) -> Any:
    """The first device's copy of a replicated tree, on the host."""
    return jax.tree.map(lambda x: jax.device_get(x.addressable_shards[0].data)[0], tree)


def _sharding(devices: Sequence[Device]) -> NamedSharding:
    return NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS))
