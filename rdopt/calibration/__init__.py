"""Room 5, calibration: text to token batches; the parts of the text that may and may not be looked at."""

from rdopt.calibration.moments import INPUT_OF, MATRICES_OF, EmbeddingMoments, Moments, second_moments
from rdopt.calibration.streamed import lazy_params, read_block, run_block, streamed_moments, streams
from rdopt.calibration.subject import (
    Corpus,
    Subject,
    corpus_moments,
    load_corpus,
    load_moments,
    load_subject,
    open_subject,
    save_moments,
)
from rdopt.calibration.text import Split, builtin_documents, read_documents, split_documents
from rdopt.calibration.tokens import fingerprint, load_tokenizer, token_batch, tokenize

__all__ = [
    "Corpus",
    "Subject",
    "corpus_moments",
    "load_corpus",
    "load_moments",
    "load_subject",
    "open_subject",
    "save_moments",
    "INPUT_OF",
    "MATRICES_OF",
    "EmbeddingMoments",
    "Moments",
    "second_moments",
    "lazy_params",
    "read_block",
    "run_block",
    "streamed_moments",
    "streams",
    "Split",
    "builtin_documents",
    "fingerprint",
    "load_tokenizer",
    "read_documents",
    "split_documents",
    "token_batch",
    "tokenize",
]
