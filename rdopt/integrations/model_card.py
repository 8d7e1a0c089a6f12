"""The README.md of a decoded folder: what it is, what it was made from and what it costs.

The front matter follows the Hugging Face hub's model card metadata.
"""

from rdopt.checkpoint.families import coded_weights
from rdopt.codec.decoder import OpenFile
from rdopt.codec.streams.index import coded_bits


def decoded_card(decoded: OpenFile) -> str:
    """The card of a decoded file, Markdown with a final newline; every figure is taken from the file's bytes."""
    weights, bits, model_type = coded_weights(decoded.arch), sum(decoded.bits.values()), decoded.arch.model_type
    bpw, bpw_all = coded_bits(decoded.bits) / weights, bits / decoded.parameters
    rows = {
        "original": "not recorded in the file",
        "architecture": model_type,
        "parameters": f"{decoded.parameters}, of which {weights} are coded in the blocks",
        "bits/weight": f"{bpw:.3f} in the coded matrices, {bpw_all:.3f} per parameter of the whole file",
        "compressed file": f"{bits // 8} bytes",
        "KL(original, this)": "not measured",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [rdopt, compression, {model_type}]
---

# {model_type}, decoded from a compressed file

The weights of this folder were decoded by rdopt from an entropy-coded file. It is a plain checkpoint that
transformers loads without rdopt. Where coordinates were aligned before coding, single weights differ from the
original's by more than rounding; the network computes the same up to the KL below.

| fact | value |
|---|---|
{table}

The licence and limits of the original model apply.
"""
