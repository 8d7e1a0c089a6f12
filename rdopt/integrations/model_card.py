"""The README.md of a decoded folder: what it is, what it was made from, what it costs and what it lost.

The front matter follows the Hugging Face hub's model card metadata.
"""

from rdopt.checkpoint.families import coded_weights
from rdopt.codec.decoder import Decoded
from rdopt.codec.streams.index import coded_bits


def model_card(
    *,
    model_type: str,
    parameters: int,
    weights: int,
    bpw: float,
    bpw_all: float,
    size: int,
    original: str | None = None,
    kl: float | None = None,
) -> str:
    """The card of one compressed model.

    Args:
        model_type: family, as in config.json.
        parameters: of the original model.
        weights: number of coded weights.
        bpw: bits/weight of what rebuilds the coded matrices.
        bpw_all: bits of the whole file per parameter of the original.
        size: bytes of the file.
        original: name of the original model, if known.
        kl: measured KL(original || this) in nats/token, if known.

    Returns:
        Markdown with a final newline.
    """
    rows = {
        "original": original or "not recorded in the file",
        "architecture": model_type,
        "parameters": f"{parameters}, of which {weights} are coded in the blocks",
        "bits/weight": f"{bpw:.3f} in the coded matrices, {bpw_all:.3f} per parameter of the whole file",
        "compressed file": f"{size} bytes",
        "KL(original, this)": "not measured" if kl is None else f"{kl:.5f} nats/token",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [rdopt, compression, {model_type}]
---

# {original or model_type}, decoded from a compressed file

The weights of this folder were decoded by rdopt from an entropy-coded file. It is a plain checkpoint that
transformers loads without rdopt. Where coordinates were aligned before coding, single weights differ from the
original's by more than rounding; the network computes the same up to the KL below.

| fact | value |
|---|---|
{table}

The licence and limits of the original model apply.
"""


def decoded_card(decoded: Decoded, *, original: str | None = None, kl: float | None = None) -> str:
    """The card of a decoded file.

    Args:
        decoded: of `rdopt.codec.decode_model`; every figure is taken from its bytes.
        original: name of the original model, if known.
        kl: measured KL, if known.
    """
    weights = coded_weights(decoded.arch)
    bits = sum(decoded.bits.values())
    return model_card(
        model_type=decoded.arch.model_type,
        parameters=decoded.parameters,
        weights=weights,
        bpw=coded_bits(decoded.bits) / weights,
        bpw_all=bits / decoded.parameters,
        size=bits // 8,
        original=original,
        kl=kl,
    )
