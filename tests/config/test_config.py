"""The configuration takes every documented key, and refuses the rest in one sentence."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rdopt.config.errors import UserError
from rdopt.config.load import config_yaml, load_config, to_dict
from rdopt.config.schema import Config, EncodeConfig, EvaluateConfig, SweepConfig, TextConfig, TrainConfig, options

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
positive = st.floats(1e-6, 1e6)


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def at(config: Config, name: str) -> object:
    section, _, key = name.rpartition(".")
    return getattr(getattr(config, section) if section else config, key)


def test_no_file_and_no_override_give_the_defaults() -> None:
    assert load_config() == load_config(None, {}) == Config()


def test_every_key_can_be_overridden_and_says_what_it_is() -> None:
    for option in options():
        text = yaml.safe_dump(list(option.default) if isinstance(option.default, tuple) else option.default)
        text = str(option.default) if option.kind is str else text
        assert load_config(None, {option.name: text}) == Config(), option.name
        assert len(option.text) > 10, option.name


def test_options_name_exactly_the_leaves_of_the_dictionary() -> None:
    leaves = set()
    for key, value in to_dict(Config()).items():
        leaves |= {f"{key}.{inner}" for inner in value} if isinstance(value, dict) else {key}
    assert {option.name for option in options()} == leaves


sites = st.lists(st.sampled_from(["residual", "value", "query"]), min_size=1).map(tuple)


@given(
    st.builds(
        Config,
        model=st.text(min_size=1),
        text=st.builds(TextConfig, sources=st.lists(st.text(), min_size=1).map(tuple), seed=st.integers(0)),
        train=st.builds(TrainConfig, lam=positive, learning_rate=positive, sites=sites),
        encode=st.builds(EncodeConfig, lam=st.none() | positive, dead_zone=st.floats(0, 0.5)),
        evaluate=st.builds(EvaluateConfig, context=st.integers(64, 512), stride=st.integers(1, 64)),
        sweep=st.builds(SweepConfig, lams=st.lists(positive, min_size=1).map(tuple)),
    )
)
def test_yaml_of_any_configuration_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, config: Config
) -> None:
    path = written(tmp_path_factory.mktemp("config"), config_yaml(config))
    assert load_config(path) == config


@given(st.sampled_from([option.name for option in options()]), st.text())
def test_any_text_for_any_key_is_taken_or_refused_in_a_sentence(name: str, text: str) -> None:
    try:
        load_config(None, {name: text})
    except UserError as error:
        assert str(error).startswith(name) and str(error).endswith(".")


@given(st.binary() | st.text().map(str.encode))
def test_any_bytes_as_a_file_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes
) -> None:
    path = written(tmp_path_factory.mktemp("config"), raw)
    try:
        assert isinstance(load_config(path), Config)
    except UserError as error:
        assert str(error).count("\n") == 0


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("train.step", "train.steps"),
        ("steps", "train.steps"),
        ("trian.lam", "train.lam"),
        ("evaluate.contxt", "evaluate.context"),
        ("encode.target-bpw", "encode.target_bpw"),
        ("modle", "model"),
        ("learning_rate", "train.learning_rate"),
        ("splitOn", "text.split_on"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(key: str, nearest: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"'{key}'; did you mean '{nearest}'"):
        load_config(None, {key: "1"})
    section, _, inner = key.rpartition(".")
    nested = f"{section}:\n  {inner}: 1\n" if section in to_dict(Config()) else f"{key}: 1\n"
    with pytest.raises(UserError, match=f"did you mean '{nearest}'"):
        load_config(written(tmp_path, nested))


@pytest.mark.parametrize(
    "key, text, sentence",
    [
        ("train.steps", "many", "train.steps is 'many', but it must be a whole number"),
        ("train.steps", "1.5", "train.steps is 1.5, but it must be a whole number"),
        ("train.steps", "true", "train.steps is true, but it must be a whole number"),
        ("train.steps", "0", "train.steps is 0, but it must be at least 1"),
        ("train.lam", "0", "train.lam is 0.0, but it must be greater than 0"),
        ("train.lam", ".nan", "train.lam is nan, but it must be finite"),
        ("train.lam", "null", "train.lam is null, but it must be a number"),
        ("train.sites", "residual,hands", "must be a list, each one of residual, value"),
        ("train.rate", "huffman", "must be one of analytic, noise, annealed, ste, l1, log"),
        ("text.split_on", "word", "must be one of line, blank, blank2, file"),
        ("encode.lam", "-1", "encode.lam is -1.0, but it must be greater than 0"),
        ("encode.dead_zone", "0.7", "must be at most 0.5"),
        ("sweep.lams", "2,x", "must be a list, each a number"),
        ("sweep.lams", "[]", "sweep.lams is empty"),
        ("sweep.lams", "2,-7", "sweep.lams is -7.0"),
        ("sweep.arms", "identity,foo", "each one of identity, hadamard"),
        ("evaluate.stride", "300", "at most evaluate.context \\(256\\)"),
        ("train", "3", "train is a section, not a key"),
    ],
)
def test_a_wrong_value_is_refused_with_its_limit(key: str, text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_config(None, {key: text})


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("train.lam", "1e-3", 1e-3),
        ("train.lam", "7", 7.0),
        ("sweep.lams", "2,2e1,70", (2.0, 20.0, 70.0)),
        ("sweep.lams", "[2, 7]", (2.0, 7.0)),
        ("sweep.lams", "5", (5.0,)),
        ("sweep.arms", "identity, pca", ("identity", "pca")),
        ("text.sources", "a.txt,b.txt", ("a.txt", "b.txt")),
        ("text.sources", "[\"a,b.txt\"]", ("a,b.txt",)),
        ("model", "123", "123"),
        ("encode.target_bpw", "null", None),
        ("encode.target_bpw", "3", 3.0),
    ],
)
def test_an_override_is_read_as_its_field_wants_it(key: str, text: str, value: object) -> None:
    got = at(load_config(None, {key: text}), key)
    assert got == value and type(got) is type(value)


def test_a_later_override_wins_over_an_earlier_one_and_over_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "model: other\ntrain:\n  steps: 5\n  learning_rate: 1e-4\n")
    overrides = [("train.steps", "6"), ("train.steps", "7"), ("text.sources", "a=b.txt")]
    config = load_config(path, overrides)
    assert config.train == replace(TrainConfig(), steps=7, learning_rate=1e-4)
    assert config.model == "other" and config.text.sources == ("a=b.txt",)


def test_lambda_and_target_together_are_refused() -> None:
    with pytest.raises(UserError, match="only one of them can lead"):
        load_config(None, {"encode.lam": "50", "encode.target_bpw": "3"})


@pytest.mark.parametrize(
    "text, sentence",
    [
        (b"model: \xff\n", "is not UTF-8"),
        ("- model\n", "must hold keys and values"),
        ("model: [\n", "is not valid YAML.*line 2"),
        ("train: 3\n", "train is 3 in .*, but it is a section"),
        ("train:\n  steps: 3\n  steps: 4\n", "the key steps is written twice \\(line 3\\)"),
        ("train:\n  steps: '3'\n", "train.steps is '3', but it must be a whole number"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, text: str | bytes, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_config(written(tmp_path, text))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path)


def test_an_empty_file_and_an_empty_section_keep_the_defaults(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, "")) == load_config(written(tmp_path, "train:\n")) == Config()


def test_a_section_built_in_python_is_checked_too() -> None:
    with pytest.raises(UserError, match=r"train\.steps is 0"):
        TrainConfig(steps=0)
    assert EncodeConfig(lam=50).lam == 50.0 and isinstance(EncodeConfig(lam=50).lam, float)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_each_shipped_configuration_loads_and_says_what_it_is(path: Path) -> None:
    config = load_config(path)
    assert path.read_text().startswith("# ")
    assert path.name == path.name.lower()
    assert config.model.count("/") == (0 if path.name == "demo.yaml" else 1)
    assert config.text.seq_len * config.text.calibration_sequences >= 64_000
    assert config.evaluate.max_tokens >= 64_000 and len(config.sweep.lams) >= 5


def test_six_configurations_are_shipped() -> None:
    assert len(CONFIGS) == 6
