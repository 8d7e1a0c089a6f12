"""YAML and command-line overrides into a `Config`, and back.

A later source wins: defaults, then the file, then the overrides in their order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from rdopt.config.errors import UserError
from rdopt.config.schema import Config, options, sections

# What PyYAML raises for damaged text; its constructors let more than its own errors through.
_YAML_ERRORS = (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError)

Overrides = Mapping[str, str] | Sequence[tuple[str, str]]


def load_config(path: Path | str | None = None, overrides: Overrides = ()) -> Config:
    """The configuration of a run.

    Args:
        path: a YAML file, or None for the defaults.
        overrides: dotted key and text, e.g. ("train.steps", "20"); the text is read as YAML is, a list also
            as "2,7,20". Text fields take it as it stands.

    Raises:
        UserError: unreadable file, unknown key (the nearest valid one is named), wrong type or range.
    """
    values = _flat(_read_yaml(Path(path)), str(path)) if path is not None else {}
    pairs = overrides.items() if isinstance(overrides, Mapping) else overrides
    values |= {key: _parsed(key, text) for key, text in pairs}
    parts: dict[str, dict[str, Any]] = {name: {} for name in sections()}
    top: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (parts[section] if section else top)[name] = value
    built: dict[str, Any] = {name: kind(**parts[name]) for name, kind in sections().items()}
    return Config(**top, **built)


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain nested dicts, lists, numbers and text (JSON and YAML take it)."""
    return _plain(config)


def config_yaml(config: Config) -> str:
    """The configuration as a YAML file that `load_config` reads back to an equal one."""
    # Escapes instead of allow_unicode, under which PyYAML loses a next-line character (U+0085).
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return list(value) if isinstance(value, tuple) else value


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that is written twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} is written twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"The configuration {path} does not exist: check the path.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"The configuration {path} is not UTF-8 (byte {error.start}): save it so.") from None
    except OSError as error:
        raise UserError(f"The configuration {path} cannot be read ({error.strerror}): name a file.") from None
    try:
        content = yaml.load(text, Loader=_UniqueKeyLoader)
    except _YAML_ERRORS as error:
        raise UserError(f"The configuration {path} is not valid YAML: {_one_line(error)}.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"The configuration {path} must hold keys and values such as 'model: demo', "
                        f"but it holds {content!r:.60}.")
    return content


def _one_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return " ".join(f"{problem} (line {mark.line + 1})".split()) if mark else " ".join(problem.split())


def _flat(content: Mapping[Any, Any], origin: str) -> dict[str, Any]:
    """Nested sections to dotted keys, each known; a section left empty keeps its defaults."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if key in sections() and isinstance(value, Mapping):
            inner = {f"{key}.{name}": v for name, v in value.items()}
        elif key in sections() and value is None:
            inner = {}
        elif key in sections():
            raise UserError(f"{key} is {value!r} in {origin}, but it is a section: write its keys below it, "
                            "indented.")
        else:
            inner = {str(key): value}
        for name in inner:
            _require_known(name)
        flat |= inner
    return flat


def _parsed(key: str, text: str) -> Any:
    """The text of an override as its field's type wants it read."""
    kind = _require_known(key)
    if kind is str:
        return text
    try:
        value = yaml.safe_load(text)
    except _YAML_ERRORS:
        raise UserError(f"{key} is {text!r}, but YAML cannot read that: quote or mend it.") from None
    is_list = get_origin(kind) is tuple or any(get_origin(a) is tuple for a in get_args(kind))
    if is_list and isinstance(value, str):
        return [_item(word) for word in text.split(",")]
    return value


def _item(word: str) -> Any:
    """One item of a comma-separated list; text that YAML would read as something odd stays text."""
    try:
        value = yaml.safe_load(word)
    except _YAML_ERRORS:
        return word.strip()
    return value if isinstance(value, (int, float)) else word.strip()


def _require_known(key: str) -> Any:
    """The annotation of a known key.

    Raises:
        UserError: the key is unknown; the nearest valid name is named.
    """
    kinds = {o.name: o.kind for o in options()}
    if key in kinds:
        return kinds[key]
    if key in sections():
        first = next(name for name in kinds if name.startswith(f"{key}."))
        raise UserError(f"{key} is a section, not a key: name one of its keys, for example {first}.")
    raise UserError(f"There is no configuration key {key!r}; did you mean {_nearest(key, list(kinds))!r}?")


def _nearest(key: str, names: Sequence[str]) -> str:
    """The most similar name; the last part alone counts almost as much, so `steps` finds `train.steps`."""
    def similarity(name: str) -> float:
        whole = SequenceMatcher(None, key, name).ratio()
        last = SequenceMatcher(None, key.rpartition(".")[2], name.rpartition(".")[2]).ratio()
        return max(whole, 0.95 * last)
    return max(names, key=similarity)
