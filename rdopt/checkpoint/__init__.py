"""Room checkpoint: Hugging Face folders to arrays and back, one tensor at a time, nothing half-written."""

from rdopt.checkpoint.atomic import new_file, new_folder
from rdopt.checkpoint.families import (
    EMBED,
    FINAL_NORM,
    HEAD,
    MATRICES,
    Architecture,
    architecture_from_config,
    block_shapes,
    expected_tensors,
    hf_name,
)
from rdopt.checkpoint.folder import Checkpoint, open_checkpoint
from rdopt.checkpoint.write import DTYPES, carried_files, write_checkpoint

__all__ = [
    "DTYPES",
    "EMBED",
    "FINAL_NORM",
    "HEAD",
    "MATRICES",
    "Architecture",
    "Checkpoint",
    "architecture_from_config",
    "block_shapes",
    "carried_files",
    "expected_tensors",
    "hf_name",
    "new_file",
    "new_folder",
    "open_checkpoint",
    "write_checkpoint",
]
