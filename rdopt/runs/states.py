"""Training state on disk: Orbax checkpoints that carry the fingerprint of what they were trained on."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.options import MultiprocessingOptions

from rdopt.config.errors import UserError


class StateStore:
    """The checkpoints of one training run, held by process 0; the last two are kept.

    Args:
        folder: where they live.
        fingerprint: name -> hash of everything the result depends on (weights, text, config).
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, str]) -> None:
        logging.getLogger("absl").setLevel(logging.ERROR)
        folder.mkdir(parents=True, exist_ok=True)
        # Every process holds the same state, so that process 0 alone writes and reads it (and tells the others): no
        # barrier waits for a process that was killed, and the others need no common disk.
        alone = MultiprocessingOptions(primary_host=0, active_processes={0}, barrier_sync_key_prefix="rdopt")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, enable_async_checkpointing=False, create=False, multiprocessing_options=alone
        )
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)
        self._fingerprint = dict(fingerprint)

    def save(self, step: int, state: Any) -> None:
        """Writes the state after `step` steps; a half-written one is never taken for a whole one."""
        if step in self._manager.all_steps():
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(jax.device_get(state)),
            fingerprint=ocp.args.JsonSave(self._fingerprint),
        )
        self._manager.save(step, args=args)

    def restore(self, template: Any) -> tuple[int, Any] | None:
        """(steps done, state) of the newest checkpoint, or None when there is none.

        Raises:
            UserError: the checkpoint belongs to other weights, text or configuration.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        stored = self._manager.restore(step, args=ocp.args.Composite(fingerprint=ocp.args.JsonRestore()))
        changed = [k for k, v in self._fingerprint.items() if stored["fingerprint"].get(k) != v]
        if changed:
            raise UserError(
                f"the checkpoint in {self._manager.directory} was made with other {' and '.join(changed)}; "
                "name another output folder, or restore what it was made with."
            )
        args = ocp.args.Composite(state=ocp.args.StandardRestore(jax.device_get(template)))
        return step, self._manager.restore(step, args=args)["state"]

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.close()
