"""Documents to a stream of token ids, and the stream to batches of sequences that do not overlap.

The tokenizer is the `tokenizer.json` that lies beside the model. A batch is known by its fingerprint.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32
from tokenizers import Tokenizer

from rdopt.config.errors import UserError

_DOCUMENTS_AT_ONCE = 1024


def tokenize(folder: Path, documents: Sequence[str], vocab_size: int) -> Int32[np.ndarray, " tokens"]:
    """The documents as one stream of token ids, int32, each behind the model's begin-of-text token.

    Args:
        folder: a Hugging Face folder with tokenizer.json; config.json may name `bos_token_id`, which is put
            before each document unless the tokenizer does so itself.
        documents: the texts, joined in their order.
        vocab_size: rows of the model's embedding; every id must lie below.

    Raises:
        UserError: no or a damaged tokenizer.json, or a token the model has no row for.
    """
    tokenizer = load_tokenizer(folder)
    pieces = (np.array(ids, np.int32) for ids in _encoded(tokenizer, documents, _bos(folder)))
    stream = np.concatenate([np.empty(0, np.int32), *pieces])
    if stream.size and stream.max() >= vocab_size:
        raise UserError(
            f"The tokenizer in {folder} gave token {stream.max()}, but the model knows {vocab_size} tokens "
            f"(0 to {vocab_size - 1}): use the tokenizer that belongs to the model.")
    return stream


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, without truncation or padding.

    Raises:
        UserError: tokenizer.json is missing or damaged.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder} has no tokenizer.json: put the model's tokenizer there (transformers: "
                        "AutoTokenizer.from_pretrained(...).save_pretrained(folder)).")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{path} is not a tokenizer ({error!s:.80}): copy it from the model again.") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def token_batch(
    stream: Int32[np.ndarray, " tokens"], seq_len: int, n: int, seed: int, *, part: str = "calibration"
) -> Int32[np.ndarray, "n seq_len"]:
    """n sequences of the stream that do not overlap, drawn without replacement in an order set by the seed.

    The first sequences of a larger n are those of a smaller one. `part` names the stream in the refusal.

    Raises:
        UserError: the stream holds fewer than n sequences.
    """
    possible = len(stream) // seq_len
    if possible < n:
        mend = "give more text, or cut it into more documents (split_on line or blank)"
        if possible:
            mend = f"ask for at most {possible} sequences, or {mend}"
        elif len(stream) > 1:
            mend = f"ask for shorter ones, or {mend}"
        raise UserError(f"The {part} text has {len(stream)} tokens, but {n} sequence{'s' * (n > 1)} of {seq_len} "
                        f"need {n * seq_len}: {mend}.")
    windows = np.asarray(stream[: possible * seq_len], np.int32).reshape(possible, seq_len)
    return windows[np.random.default_rng(seed).permutation(possible)[:n]]


def fingerprint(array: np.ndarray) -> str:
    """SHA-256 of an array's type, shape and little-endian bytes: its first 16 hexadecimal digits."""
    plain = np.ascontiguousarray(array)
    plain = plain.astype(plain.dtype.newbyteorder("<"), copy=False)
    head = f"{plain.dtype.str} {array.shape} ".encode()
    return hashlib.sha256(head + plain.tobytes()).hexdigest()[:16]


def _encoded(tokenizer: Tokenizer, documents: Sequence[str], bos: int | None) -> Iterator[list[int]]:
    for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):
        for encoding in tokenizer.encode_batch_fast(list(documents[start : start + _DOCUMENTS_AT_ONCE])):
            ids = encoding.ids
            yield [bos, *ids] if bos is not None and ids[:1] != [bos] else ids


def _bos(folder: Path) -> int | None:
    """The begin-of-text token that config.json names, if it does."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        return None
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path} is not JSON: copy it from the model again.") from None
    bos = config.get("bos_token_id") if isinstance(config, dict) else None
    return bos if isinstance(bos, int) else None
