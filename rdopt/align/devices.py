"""Every use of pmap, in one place: one program per device, the batch split, everything else replicated.

The devices may belong to several processes. Each of them then calls the same function on the leading axis of its own
devices; only means reach over all.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rdopt.config.errors import UserError

AXIS = "devices"
Device = Any  # jax.Device is a variable to type checkers, not a type


def pmapped(step: Callable[..., Any], devices: Sequence[Device]) -> Callable[..., Any]:
    """`step` compiled for every device; arguments and results carry a leading axis of this process's devices."""
    return jax.pmap(step, axis_name=AXIS, devices=list(devices))


def mean_over_devices(tree: Any) -> Any:
    """The mean over the devices of all processes, inside `step`."""
    return jax.lax.pmean(tree, AXIS)


def replicate(tree: Any, devices: Sequence[Device]) -> Any:
    """One copy of every array on each device of this process, along a new leading axis."""
    own = _own(devices)
    sharding = _sharding(own)

    def copies(x: Any) -> jax.Array:
        shards = [jax.device_put(x, d)[None] for d in own]
        return jax.make_array_from_single_device_arrays((len(own), *np.shape(x)), sharding, shards)

    return jax.tree.map(copies, tree)


def require_share(sequences: int, devices: Sequence[Device]) -> None:
    """Refuses a batch that the devices cannot share equally.

    Raises:
        UserError: the number of sequences is no multiple of that of the devices.
    """
    n, hosts = len(devices), len({d.process_index for d in devices})
    if sequences % n:
        where = f"{n} devices" if hosts == 1 else f"{n} devices of {hosts} processes"
        raise UserError(
            f"train.batch_sequences is {sequences}, which {where} cannot share equally; set it to a multiple of {n}."
        )


def split(batch: np.ndarray, devices: Sequence[Device]) -> jax.Array:
    """The batch with its first axis cut into (device, share): the shares of this process's devices.

    Raises:
        UserError: the batch does not divide by the number of devices.
    """
    require_share(len(batch), devices)
    shares = batch.reshape(len(devices), -1, *batch.shape[1:])
    own = _own(devices)
    return jax.device_put(shares[[devices.index(d) for d in own]], _sharding(own))


def first(tree: Any) -> Any:
    """One device's copy of a replicated tree, on the host."""
    return jax.tree.map(lambda x: jax.device_get(x.addressable_shards[0].data)[0], tree)


def _own(devices: Sequence[Device]) -> list[Device]:
    """Those of this process."""
    return [d for d in devices if d.process_index == jax.process_index()]


def _sharding(devices: Sequence[Device]) -> NamedSharding:
    return NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS))
