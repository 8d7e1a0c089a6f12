"""A compressed file as transformers' own torch model."""

import tempfile
from pathlib import Path
from typing import Any

from rdopt.codec.decoder import decode
from rdopt.config.errors import UserError


def load_compressed(path: str | Path, *, threads: int = 0) -> Any:
    """Decodes a file into a transformers model with float32 torch weights.

    The decoded checkpoint lies in a temporary folder while transformers reads it.

    Args:
        path: a file of `rdopt encode`.
        threads: decoding threads, 0 for all cores.

    Returns:
        what `AutoModelForCausalLM.from_pretrained` makes of it, in evaluation mode.

    Raises:
        UserError: torch is not installed, or the file is missing or damaged.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise UserError(
            f'{path} is to become a torch model, but torch is not installed; pip install "rdopt[torch]".'
        ) from error
    with tempfile.TemporaryDirectory(prefix="rdopt-") as temporary:
        folder = Path(temporary) / "model"
        decode(Path(path), folder, threads=threads)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
