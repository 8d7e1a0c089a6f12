"""Room `export`: the aligned checkpoint that plain transformers loads, and the way back."""

from rdopt.export.export import (
    KL_LIMIT,
    Exported,
    Run,
    aligned_config,
    check_alignment,
    export,
    open_trained,
    reference_of,
    restore,
    write_aligned,
)

__all__ = [
    "KL_LIMIT",
    "Exported",
    "Run",
    "aligned_config",
    "check_alignment",
    "export",
    "open_trained",
    "reference_of",
    "restore",
    "write_aligned",
]
