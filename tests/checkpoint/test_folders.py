"""Claims about reading and writing Hugging Face folders."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from conftest import FAMILIES, random_tensors, tiny_config
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rdopt.checkpoint import families
from rdopt.checkpoint.atomic import new_file, new_folder
from rdopt.checkpoint.families import LLAMA_MODULES, architecture_from_config, block_shapes, expected_tensors
from rdopt.checkpoint.folder import open_checkpoint
from rdopt.checkpoint.write import DTYPES, carried_files, write_checkpoint
from rdopt.config.errors import UserError
from rdopt.operator.params import load_params

NUMPY = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
WEIGHTS = "model.safetensors"


def edit_config(folder: Path, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def rewrite(folder: Path, change):
    """Rewrites the single weights file by another library after `change` has edited the dict of arrays."""
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_written_folder_reads_back_as_the_rounded_weights(tiny_llama, family, dtype):
    checkpoint = open_checkpoint(tiny_llama(family, dtype=dtype))
    given_tensors = random_tensors(tiny_config(family))
    assert checkpoint.names() == list(given_tensors)
    for name, values in given_tensors.items():
        read = checkpoint.tensor(name)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, values.astype(NUMPY[dtype]).astype(np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_safetensors_library_reads_the_same_bytes(tiny_llama, dtype):
    folder = tiny_llama("qwen3", dtype=dtype)
    stored = dict(safetensors.deserialize((folder / WEIGHTS).read_bytes()))
    given_tensors = random_tensors(tiny_config("qwen3"))
    assert set(stored) == set(given_tensors)
    for name, values in given_tensors.items():
        assert bytes(stored[name]["data"]) == values.astype(NUMPY[dtype]).tobytes()
    with safetensors.safe_open(folder / WEIGHTS, "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype


@given(
    bits=st.lists(st.integers(0, 2**16 - 1), min_size=24, max_size=24),
    dtype=st.sampled_from(["bfloat16", "float16"]),
)
def test_every_finite_16_bit_weight_survives_reading_and_writing(bits, dtype):
    values = np.array(bits, np.uint16).view(NUMPY[dtype])
    values = np.where(np.isfinite(values.astype(np.float32)), values, values.dtype.type(0))
    config = tiny_config()
    tensors = random_tensors(config) | {"model.norm.weight": values.astype(np.float32)}
    with tempfile.TemporaryDirectory() as tmp:
        write_checkpoint(Path(tmp) / "m", config, tensors.items(), dtype=dtype)
        read = open_checkpoint(Path(tmp) / "m").tensor("model.norm.weight")
    assert read.astype(NUMPY[dtype]).tobytes() == values.tobytes()


@settings(max_examples=15)
@given(shard_bytes=st.integers(1, 60_000))
@example(shard_bytes=1)
def test_any_shard_size_gives_the_same_tensors_in_files_within_it(shard_bytes):
    config = tiny_config("qwen2")
    tensors = random_tensors(config)
    with tempfile.TemporaryDirectory() as tmp:
        out = Path(tmp) / "m"
        # Reversed: tensors may come in any order.
        write_checkpoint(out, config, reversed(tensors.items()), dtype="float32", shard_bytes=shard_bytes)
        checkpoint = open_checkpoint(out)
        for name, values in tensors.items():
            np.testing.assert_array_equal(checkpoint.tensor(name), values)
        files = sorted(out.glob("*.safetensors"))
        seen = {}
        for file in files:
            shard = safetensors.numpy.load_file(file)
            seen |= dict.fromkeys(shard, file.name)
            assert len(shard) == 1 or sum(v.nbytes for v in shard.values()) <= shard_bytes
        if len(files) > 1:
            index = json.loads((out / "model.safetensors.index.json").read_text())
            assert index["weight_map"] == seen
            assert index["metadata"]["total_size"] == sum(v.nbytes for v in tensors.values())
            assert [f.name for f in files][-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
        else:
            assert [file.name for file in files] == [WEIGHTS]


def test_the_demo_model_is_in_the_package_and_rewrites_to_the_same_bits(tmp_path, demo_model):
    demo = open_checkpoint("demo")
    assert demo.num_parameters == 2_816_064
    coded = [s for n, s in block_shapes(demo.arch).items() if len(s) == 2]
    assert demo.arch.num_layers * sum(a * b for a, b in coded) == 2_027_520
    pairs = ((name, demo.tensor(name)) for name in demo.names())
    write_checkpoint(tmp_path / "copy", demo.config, pairs, dtype="bfloat16", files=carried_files(demo.folder))
    before = dict(safetensors.deserialize((demo_model / WEIGHTS).read_bytes()))
    after = dict(safetensors.deserialize((tmp_path / "copy" / WEIGHTS).read_bytes()))
    assert {n: bytes(t["data"]) for n, t in before.items()} == {n: bytes(t["data"]) for n, t in after.items()}
    for carried in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "copy" / carried).read_bytes() == (demo_model / carried).read_bytes()


def test_the_demo_model_is_the_shared_model(shared_models, demo_model):
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (demo_model / name).read_bytes() == (shared_models / "ref-llama" / name).read_bytes()


def test_the_three_real_models_open_and_count_right(shared_models):
    counts = {"ref-llama": 2_816_064, "ref-llama-muon": 2_816_064, "stories260k": 260_032}
    for name, count in counts.items():
        checkpoint = open_checkpoint(shared_models / name)
        assert checkpoint.num_parameters == count
        assert all(np.isfinite(checkpoint.tensor(n)).all() for n in checkpoint.names())


@given(cut=st.floats(0, 1, exclude_max=True))
@example(cut=0.0)
@example(cut=0.9999)
def test_a_file_truncated_anywhere_is_refused_by_name(cut):
    config = tiny_config()
    with tempfile.TemporaryDirectory() as tmp:
        out = Path(tmp) / "m"
        write_checkpoint(out, config, random_tensors(config).items(), dtype="bfloat16")
        data = (out / WEIGHTS).read_bytes()
        (out / WEIGHTS).write_bytes(data[: int(cut * len(data))])
        with pytest.raises(UserError, match=r"model\.safetensors.*again"):
            open_checkpoint(out)


@given(position=st.integers(0, 3000), value=st.integers(0, 255))
def test_a_damaged_header_is_read_or_refused_but_never_a_traceback(position, value):
    config = tiny_config()
    with tempfile.TemporaryDirectory() as tmp:
        out = Path(tmp) / "m"
        write_checkpoint(out, config, random_tensors(config).items(), dtype="float16")
        data = bytearray((out / WEIGHTS).read_bytes())
        data[position] = value
        (out / WEIGHTS).write_bytes(data)
        with contextlib.suppress(UserError):
            checkpoint = open_checkpoint(out)
            [checkpoint.tensor(name) for name in checkpoint.names()]


def test_a_file_cut_after_opening_is_refused(tiny_llama):
    checkpoint = open_checkpoint(tiny_llama())
    os.truncate(checkpoint.folder / WEIGHTS, 5000)
    with pytest.raises(UserError, match="truncated"):
        checkpoint.tensor("lm_head.weight")


def test_a_missing_tensor_is_named(tiny_llama):
    folder = tiny_llama()
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        open_checkpoint(folder)


def test_a_tensor_without_a_place_in_the_network_is_refused(tiny_llama):
    folder = tiny_llama()
    bias = "model.layers.0.self_attn.k_proj.bias"
    rewrite(folder, lambda tensors: tensors.update({bias: np.zeros(16, np.float32)}))
    with pytest.raises(UserError, match=r"k_proj\.bias.*no place"):
        open_checkpoint(folder)


def test_a_misshapen_tensor_is_refused_with_both_shapes(tiny_llama):
    folder = tiny_llama()
    edit_config(folder, intermediate_size=41)
    with pytest.raises(UserError, match=r"\(40, 24\).*\(41, 24\)"):
        open_checkpoint(folder)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_weights_are_refused_by_tensor_name(tiny_llama, bad):
    folder = tiny_llama()
    rewrite(folder, lambda tensors: tensors["model.norm.weight"].put(3, bad))
    checkpoint = open_checkpoint(folder)
    with pytest.raises(UserError, match=r"model\.norm\.weight.* 1 NaN or infinite"):
        checkpoint.tensor("model.norm.weight")


def test_a_float64_checkpoint_is_refused(tiny_llama):
    folder = tiny_llama()
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].astype(np.float64)}))
    with pytest.raises(UserError, match="F64; supported are F32, BF16, F16"):
        open_checkpoint(folder)


def test_a_missing_shard_and_a_shard_without_its_tensor_are_named(tmp_path):
    config = tiny_config()
    write_checkpoint(
        tmp_path / "m", config, random_tensors(config).items(), dtype="float32", shard_bytes=10_000
    )
    shards = sorted((tmp_path / "m").glob("*.safetensors"))
    kept = shards[1].read_bytes()
    shards[1].unlink()
    with pytest.raises(UserError, match=f"{shards[1].name} does not exist"):
        open_checkpoint(tmp_path / "m")
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(UserError, match=f"missing from .*{shards[1].name}"):
        open_checkpoint(tmp_path / "m")
    shards[1].write_bytes(kept)
    open_checkpoint(tmp_path / "m")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "gemma2"}, "'gemma2' is not supported; supported are llama, mistral, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "'gelu' is not supported"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized .gptq"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "lacks low_freq_factor"),
        ({"hidden_size": "24"}, "hidden_size = '24'"),
        ({"num_key_value_heads": 3}, "4 heads over 3"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_is_not_supported_is_refused_in_a_sentence(tiny_llama, changes, sentence):
    folder = tiny_llama()
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=sentence):
        open_checkpoint(folder)


@given(key=st.sampled_from(sorted(tiny_config() | {"rope_scaling": 0, "sliding_window": 0})),
       value=st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                          lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=4),
       family=st.sampled_from(FAMILIES))  # fmt: skip
def test_any_value_in_config_json_is_understood_or_refused(key, value, family):
    try:
        arch = architecture_from_config(tiny_config(family) | {key: value})
    except UserError:
        return
    assert arch == replace(arch) and hash(arch) == hash(replace(arch))


def test_old_and_new_rope_keys_say_the_same():
    llama3 = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    new = tiny_config(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **llama3})
    old = tiny_config(rope_parameters=None, rope_theta=5e5, rope_scaling={"rope_type": "llama3", **llama3})
    older = tiny_config(rope_parameters=None, rope_theta=5e5, rope_scaling={"type": "llama3", **llama3})
    assert architecture_from_config(new) == architecture_from_config(old) == architecture_from_config(older)
    plain = tiny_config(rope_parameters=None, rope_theta=5e5, rope_scaling=None)
    assert architecture_from_config(plain).rope_theta == 5e5
    assert architecture_from_config(plain).rope_scaling is None


def test_a_family_may_name_its_tensors_otherwise(tiny_llama, monkeypatch):
    modules = {**LLAMA_MODULES, "o": "self_attn.dense", "mlp_norm": "pre_feedforward_layernorm"}
    monkeypatch.setitem(families.FAMILIES, "other", families.Family(modules=modules))
    other, llama = open_checkpoint(tiny_llama("other")), open_checkpoint(tiny_llama("llama"))
    assert set(other.names()) - set(llama.names()) == {
        f"model.layers.{layer}.{name}.weight" for layer in (0, 1) for name in (modules["o"], modules["mlp_norm"])
    }
    jax.tree.map(np.testing.assert_array_equal, load_params(other), load_params(llama))


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_mean_what_transformers_takes_them_for(family):
    transformers = pytest.importorskip("transformers", reason="the oracle for defaults")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = {"model_type": family, "num_attention_heads": 64, "num_hidden_layers": 40, "hidden_size": 4096}
    config |= {key: value for key, value in tiny_config().items() if key in sizes and key not in config}
    theirs = transformers.AutoConfig.for_model(**config)
    ours = architecture_from_config(config)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", 64)
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    assert ours.tied == theirs.tie_word_embeddings
    written = architecture_from_config(theirs.to_dict())
    assert written == ours


def test_a_sliding_window_counts_only_where_a_layer_uses_it():
    qwen = tiny_config("qwen2", sliding_window=16, max_window_layers=1)
    assert architecture_from_config(qwen).sliding_window is None
    assert architecture_from_config(qwen | {"use_sliding_window": True}).sliding_window == 16
    assert (
        architecture_from_config(qwen | {"use_sliding_window": True, "max_window_layers": 2}).sliding_window
        is None
    )
    assert architecture_from_config(tiny_config("mistral", sliding_window=16)).sliding_window == 16


def test_tied_checkpoints_need_no_head_and_count_it_once(tiny_llama):
    untied, tied = (open_checkpoint(tiny_llama(tie_word_embeddings=tie)) for tie in (False, True))
    assert "lm_head.weight" not in expected_tensors(tied.arch)
    assert untied.num_parameters - tied.num_parameters == 96 * 24


@pytest.mark.parametrize("missing", ["config.json", WEIGHTS])
def test_an_incomplete_folder_names_the_missing_file(tiny_llama, missing):
    folder = tiny_llama()
    (folder / missing).unlink()
    with pytest.raises(UserError, match=missing):
        open_checkpoint(folder)


def test_an_absent_folder_and_an_unreachable_hub_model_are_sentences(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match="does not exist"):
        open_checkpoint(str(tmp_path / "nowhere"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"owner/model is no existing folder.*check the name"):
        open_checkpoint("owner/model")


def test_a_hub_name_opens_the_downloaded_snapshot(tiny_llama, monkeypatch):
    folder = tiny_llama("qwen3")
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(folder)
    )
    assert open_checkpoint("owner/model").folder == folder
    assert asked == ["owner/model"]


def test_an_existing_output_is_refused_and_left_alone(tmp_path):
    config = tiny_config()
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine").write_text("kept")
    with pytest.raises(UserError, match="already exists"):
        write_checkpoint(tmp_path / "m", config, random_tensors(config).items(), dtype="float32")
    assert [p.name for p in tmp_path.rglob("*")] == ["m", "mine"]


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda t: t.pop("lm_head.weight"), r"lm_head\.weight was not given"),
        (lambda t: t.update(strange=np.zeros(3, np.float32)), "strange has no place"),
        (lambda t: t.update({"model.norm.weight": np.zeros(3, np.float32)}), r"\(3,\).*\(24,\)"),
        (lambda t: t.update({"model.norm.weight": np.full(24, np.nan, np.float32)}), "NaN"),
        (lambda t: t.update({"model.norm.weight": np.full(24, 1e5, np.float32)}), "too large for float16"),
    ],
)
def test_a_wrong_tensor_leaves_nothing_behind(tmp_path, edit, sentence):
    config = tiny_config()
    tensors = random_tensors(config)
    edit(tensors)
    with pytest.raises(UserError, match=sentence):
        write_checkpoint(tmp_path / "m", config, tensors.items(), dtype="float16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_write_leaves_nothing_behind(tmp_path, stop):
    def tensors():
        yield from list(random_tensors(tiny_config()).items())[:5]
        raise stop

    with pytest.raises(stop):
        write_checkpoint(tmp_path / "m", tiny_config(), tensors(), dtype="float32")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("new", [new_file, new_folder])
def test_a_full_disk_is_a_sentence_and_leaves_nothing_behind(tmp_path, new):
    with (
        pytest.raises(UserError, match=r"disk .* is full .*out\.bin was not written; free"),
        new(tmp_path / "out.bin"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_met_inside_safetensors_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="is full"), new_file(tmp_path / "out"):
        # The text of a real one; safetensors keeps no errno.
        raise safetensors.SafetensorError(
            "Error while serializing: IoError(No space left on device (os error 28))"
        )
    assert list(tmp_path.iterdir()) == []


def test_an_output_under_a_file_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), new_file(tmp_path / "file" / "out"):
        pass


def test_an_output_appears_only_at_the_end_and_never_over_another(tmp_path):
    with new_file(tmp_path / "deep" / "out") as partial:
        partial.write_text("new")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out").read_text() == "new"
    with pytest.raises(UserError, match="already exists"), new_file(tmp_path / "late") as partial:
        partial.write_text("mine")
        (tmp_path / "late").write_text("theirs")
    assert (tmp_path / "late").read_text() == "theirs"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "late"]


def test_a_stale_partial_of_a_killed_run_does_not_disturb(tmp_path):
    stale = tmp_path / f".m.partial-{os.getpid()}"
    stale.mkdir()
    (stale / "model.safetensors").write_text("half")
    config = tiny_config()
    write_checkpoint(tmp_path / "m", config, random_tensors(config).items(), dtype="float32")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    open_checkpoint(tmp_path / "m")


def test_one_tensor_is_in_memory_at_a_time(tmp_path, tiny_llama):
    """The writer asks for the next tensor only after the last one's bytes have reached its file."""
    source = open_checkpoint(tiny_llama())
    shutil.rmtree(tmp_path / "m", ignore_errors=True)
    alive = []

    def tensors():
        import weakref

        for name in source.names():
            values = source.tensor(name).copy()
            alive.append(weakref.ref(values))
            yield name, values
            del values
            assert sum(ref() is not None for ref in alive) <= 1

    write_checkpoint(tmp_path / "m", source.config, tensors(), dtype="float32")
