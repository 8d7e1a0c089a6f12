"""Text becomes documents, parts that never mix, and token batches; bad text is refused in one sentence."""

import gzip
import inspect
import json
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from rdopt.calibration.text import builtin_documents, read_documents, split_documents
from rdopt.calibration.tokens import fingerprint, token_batch, tokenize
from rdopt.config.errors import UserError

STORY = "One.\n\nTwo.\nStill two.\n\n\nThree.\n"


def word_folder(folder: Path, words: list[str], bos: int | None = None, adds_bos: bool = False) -> Path:
    """A model folder whose tokenizer knows whole words; word i is token i."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.enable_truncation(3)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"bos_token_id": bos}))
    return folder


@pytest.mark.parametrize(
    "split_on, documents",
    [
        ("line", ["One.", "Two.", "Still two.", "Three."]),
        ("blank", ["One.", "Two.\nStill two.", "Three."]),
        ("blank2", ["One.\n\nTwo.\nStill two.", "Three."]),
        ("file", ["One.\n\nTwo.\nStill two.\n\n\nThree."]),
    ],
)
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_a_file_is_cut_where_asked_whatever_its_line_ends(
    tmp_path: Path, split_on: Any, documents: list[str], line_end: str
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + STORY.replace("\n", line_end).encode())
    assert read_documents([path], split_on) == documents


def test_jsonl_gz_and_folders_hold_the_same_documents_as_plain_files(tmp_path: Path) -> None:
    plain, records = "한국어 text\nsecond", [{"text": "한국어 text"}, {"text": "second", "more": 1}]
    jsonl = "\n".join(json.dumps(r) for r in records) + "\n\n"
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.TXT").write_text(plain, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(jsonl)
    (tmp_path / "sub" / "c.txt.gz").write_bytes(gzip.compress(plain.encode()))
    (tmp_path / "sub" / "d.jsonl.gz").write_bytes(gzip.compress(jsonl.encode()))
    (tmp_path / "ignored.png").write_bytes(b"\xff")
    documents = ["한국어 text", "second"]
    for name in ("a.TXT", "b.jsonl", "sub/c.txt.gz", "sub/d.jsonl.gz"):
        assert read_documents([tmp_path / name], "line") == documents
    assert read_documents([tmp_path], "line") == documents * 4


def test_a_jsonl_record_stays_one_document_however_text_is_cut(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": STORY}))
    assert read_documents([tmp_path], "line") == [STORY]


@pytest.mark.parametrize(
    "name, raw, sentence",
    [
        ("a.txt", b"caf\xe9", r"is not UTF-8 \(byte 3\)"),
        ("a.txt", b" \n\t\n", "holds no words"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "x"}\n', "Line 2 of .* has no text"),
        ("a.jsonl", b'{"text": 3}\n', "Line 1 of .* has no text"),
        ("a.jsonl", b'["text"]\n', "Line 1 of .* has no text"),
        ("a.jsonl", b'{"text": "x"\n', "Line 1 of .* is not JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "half a surrogate pair"),
        ("a.txt.gz", b"plain", "is not a whole gzip file"),
        ("a.txt.gz", gzip.compress(b"x" * 99, mtime=0)[:-9], "is not a whole gzip file"),
        ("a.txt.gz", gzip.compress(b"\xff", mtime=0), "is not UTF-8"),
        ("a.png", b"", "holds no text: files ending in .txt"),
    ],
)
def test_bad_text_is_refused(tmp_path: Path, name: str, raw: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match=sentence):
        read_documents([tmp_path])


@pytest.mark.parametrize("name", ["a.csv", "a.PARQUET", "a.json.gz"])
def test_a_table_is_not_read_as_plain_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"text\nwords\n")
    with pytest.raises(UserError, match=f"{name} holds records .* write them as .jsonl"):
        read_documents([tmp_path / name])


@given(st.binary(), st.sampled_from(["a.txt", "a.jsonl", "a.txt.gz"]))
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes, name: str
) -> None:
    path = tmp_path_factory.mktemp("text") / name
    path.write_bytes(raw)
    try:
        assert all(document.strip() for document in read_documents([path], "line"))
    except UserError as error:
        assert str(path) in str(error)


def test_missing_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.txt does not exist"):
        read_documents([tmp_path / "none.txt"])
    with pytest.raises(UserError, match="No text was named"):
        read_documents([])


@given(st.lists(st.text()), st.randoms())
def test_the_parts_hold_every_document_once_whatever_the_order(documents: list[str], random: object) -> None:
    split = split_documents(documents)
    parts = (split.calibration, split.selection, split.test)
    assert Counter(d for part in parts for d in part) == Counter(set(documents))
    turned = split_documents(documents[::-1] + documents)
    assert [set(p) for p in (turned.calibration, turned.selection, turned.test)] == [set(p) for p in parts]


@given(st.sets(st.text(), min_size=1), st.sets(st.text()))
def test_text_tested_in_one_run_is_calibrated_in_no_other(one: set[str], other: set[str]) -> None:
    first, second = split_documents(one), split_documents(one | other)
    assert not set(first.test) & set(second.calibration + second.selection)
    assert set(first.test) <= set(second.test)


def test_the_shares_are_45_10_and_45_percent() -> None:
    n = 20_000
    split = split_documents(str(i) for i in range(n))
    shares = np.array([len(split.calibration), len(split.selection), len(split.test)]) / n
    # Four standard deviations of a binomial share.
    assert np.all(np.abs(shares - [0.45, 0.10, 0.45]) < 4 * np.sqrt(0.45 * 0.55 / n))


def test_a_document_keeps_its_part_for_ever() -> None:
    """Frozen: another salt or another rounding would let published test text into calibration."""
    split = split_documents(["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota",
                             "kappa"])
    assert (split.calibration, split.selection) == (("alpha", "kappa"), ("epsilon", "iota"))


def test_the_builtin_text_is_the_library_docstrings_read_without_importing() -> None:
    before = set(sys.modules)
    builtin_documents.cache_clear()
    documents = builtin_documents()
    assert {"antigravity", "this", "turtle", "idlelib"}.isdisjoint(set(sys.modules) - before)
    for told in (textwrap, textwrap.dedent, textwrap.TextWrapper, json.JSONDecoder.raw_decode):
        assert inspect.getdoc(told) in documents
    assert min(map(len, documents)) >= 20


def test_the_builtin_text_gives_the_demo_model_over_64k_tokens_in_both_large_parts(demo_model: Path) -> None:
    split = split_documents(read_documents(["builtin"]))
    for part in (split.calibration, split.test):
        assert len(tokenize(demo_model, part, 2048)) > 200_000


def test_the_sampled_stories_give_stories260k_64k_tokens_each(shared_models: Path, shared_text: Path) -> None:
    split = split_documents(read_documents([shared_text / "stories_sampled.txt"], "line"))
    for part in (split.calibration, split.test):
        stream = tokenize(shared_models / "stories260k", part, 512)
        assert token_batch(stream, 256, 256, 0).size == 65_536


@pytest.mark.parametrize("adds_bos", [False, True])
def test_each_document_begins_with_one_begin_token_and_is_never_cut(tmp_path: Path, adds_bos: bool) -> None:
    folder = word_folder(tmp_path, ["?", "<s>", "a", "b"], bos=1, adds_bos=adds_bos)
    stream = tokenize(folder, ["a b a b a b", "b"], 4)
    assert stream.tolist() == [1, 2, 3, 2, 3, 2, 3, 1, 3] and stream.dtype == np.int32


def test_a_model_without_begin_token_gets_none(tmp_path: Path) -> None:
    folder = word_folder(tmp_path, ["?", "a"])
    assert tokenize(folder, ["a", "a a"], 2).tolist() == [1, 1, 1]
    (folder / "config.json").unlink()
    assert tokenize(folder, ["a"], 2).tolist() == [1]
    assert tokenize(folder, [], 2).size == 0


def test_many_documents_are_tokenized_in_their_order(tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(2500)]
    assert tokenize(word_folder(tmp_path, words), words, 2500).tolist() == list(range(2500))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gave token 2, but the model knows 2 tokens \(0 to 1\)"):
        tokenize(word_folder(tmp_path, ["?", "a", "b"]), ["a b"], 2)


def test_a_missing_or_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        tokenize(tmp_path, ["a"], 2)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is not a tokenizer"):
        tokenize(tmp_path, ["a"], 2)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 9), st.integers(0, 2**32), st.data())
def test_a_batch_is_distinct_windows_of_the_stream_and_grows_from_a_smaller_one(
    seq_len: int, n: int, rest: int, seed: int, data: st.DataObject
) -> None:
    stream = np.arange(seq_len * n + rest, dtype=np.int32)
    batch = token_batch(stream, seq_len, n, seed)
    assert batch.shape == (n, seq_len) and batch.dtype == np.int32
    assert len(np.unique(batch)) == batch.size
    assert np.array_equal(batch, batch[:, :1] + np.arange(seq_len)[None, :])
    fewer = data.draw(st.integers(1, n))
    assert np.array_equal(token_batch(stream, seq_len, fewer, seed), batch[:fewer])


def test_the_seed_decides_the_order() -> None:
    stream = np.arange(1000, dtype=np.int32)
    assert np.array_equal(token_batch(stream, 10, 50, 3), token_batch(stream, 10, 50, 3))
    assert not np.array_equal(token_batch(stream, 10, 50, 3), token_batch(stream, 10, 50, 4))


@pytest.mark.parametrize(
    "tokens, sentence",
    [
        (25, "calibration text has 25 tokens, but 3 sequences of 10 need 30: ask for at most 2 sequences"),
        (7, "has 7 tokens, but 3 sequences of 10 need 30: ask for shorter ones, or give more text"),
        (0, "has 0 tokens, but 3 sequences of 10 need 30: give more text"),
    ],
)
def test_too_short_a_text_is_refused_with_what_is_possible(tokens: int, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        token_batch(np.zeros(tokens, np.int32), 10, 3, 0)


@given(st.lists(st.integers(0, 99), min_size=1), st.data())
def test_a_fingerprint_changes_with_any_token_shape_or_type(tokens: list[int], data: st.DataObject) -> None:
    array = np.array(tokens, np.int32)
    mark = fingerprint(array)
    assert len(mark) == 16 and int(mark, 16) >= 0
    assert {mark} == {fingerprint(np.repeat(array, 2)[::2]), fingerprint(array.astype(">i4"))}
    changed = array.copy()
    changed[data.draw(st.integers(0, len(tokens) - 1))] += 1
    others = [changed, array[None], array.astype(np.int64), array[:-1], np.append(array, 0)]
    assert mark not in [fingerprint(other) for other in others]
