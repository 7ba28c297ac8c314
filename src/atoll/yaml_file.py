"""Read a YAML file so that every complaint about it can name file, line and key.

The one idea: values are built from the parsed nodes, which know their lines, and by the rules of YAML 1.2. PyYAML alone follows 1.1, where `5e-4` is
text, `no` is false, `017` is 15, `12:30` is 750 and a key written twice silently wins; here these are 0.0005, "no", 17, "12:30" and an error.

Used by config (reading, writing and overriding files) and ludwig (lines and key suggestions).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from atoll.errors import ConfigError

Key = tuple[str | int, ...]  # the way to a value: ("tasks", 0, "trainer", "r")

_TAG = "tag:yaml.org,2002:"
_PLAIN_SCALARS = (
    (f"{_TAG}bool", "true|True|TRUE|false|False|FALSE"),
    (f"{_TAG}int", "[-+]?[0-9]+(_[0-9]+)*|0x[0-9a-fA-F]+|0o[0-7]+"),
    (f"{_TAG}float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
    (f"{_TAG}merge", "<<"),
    (f"{_TAG}null", "~|null|Null|NULL|"),
)
_TYPES = ("str", "int", "float", "bool", "null", "map", "seq")
_KEY_TAGS = (f"{_TAG}str", f"{_TAG}merge", f"{_TAG}int")  # a whole number as a key (`rank_pattern: {3: 8}`) is its text


def _resolvers() -> dict[str | None, list[tuple[str, re.Pattern[str]]]]:
    """PyYAML's table for plain scalars; the key None means: try these whatever the first character is."""
    return {None: [(tag, re.compile(f"^(?:{pattern})$")) for tag, pattern in _PLAIN_SCALARS]}


def _whole_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, 10 if text.lstrip("+-")[:2].lower() not in ("0x", "0o") else 0)


def _text_node(dumper: yaml.representer.BaseRepresenter, text: Any) -> yaml.Node:
    """Text of several lines as a block, the way people write templates."""
    return dumper.represent_scalar(f"{_TAG}str", text, style="|" if "\n" in text else None)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _resolvers()
    yaml_constructors = {**yaml.SafeLoader.yaml_constructors, f"{_TAG}int": _whole_number}  # noqa: RUF012 (PyYAML's own way to set it)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _resolvers()  # so that text which reads as a number is quoted by the same rules

    def ignore_aliases(self, data: Any) -> bool:
        return True

    yaml_representers = {**yaml.SafeDumper.yaml_representers, str: _text_node}  # noqa: RUF012


@dataclass(frozen=True)
class YamlFile:
    """The values of one file, and the line (from 1) on which each key stands."""

    path: Path
    data: dict[str, Any]
    lines: Mapping[Key, int]

    def where(self, key: Key) -> str:
        """`file.yaml:12` for a key of the file; the nearest enclosing key's line when the key itself is not in it."""
        for length in range(len(key), 0, -1):
            if key[:length] in self.lines:
                return f"{self.path}:{self.lines[key[:length]]}"
        return str(self.path)


def read_yaml(path: Path) -> YamlFile:
    """Read a file whose top level is a mapping with text keys. Raises ConfigError for anything else, with file and line."""
    text = _read_text(path)
    lines: dict[Key, int] = {}
    try:
        data = _build(text, path, lines)
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark or problem.context_mark
        place = path if mark is None else f"{path}:{mark.line + 1}"
        raise ConfigError(
            f"{place}: not valid YAML: {problem.problem or problem.context}", hint="check indentation, colons and quotes there"
        ) from None
    except yaml.reader.ReaderError as problem:
        line = text.count("\n", 0, problem.position) + 1
        raise ConfigError(f"{path}:{line}: not valid YAML: control character U+{problem.character:04X}", hint="remove that character") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply to be a configuration", hint="a configuration has at most a handful of levels") from None
    if data is None:
        raise ConfigError(f"{path} is empty, expected keys such as base and data", hint="examples/train.yaml and examples/land.yaml show the form")
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds {kind_of(data)}, expected keys with values, such as `base: smollm2-135m-instruct`")
    return YamlFile(path=path, data=data, lines=lines)


def parse_value(text: str, what: str) -> Any:
    """The value of one YAML scalar or flow form (`5e-4`, `[q_proj, v_proj]`, `null`) from a command line; `what` names it in the ConfigError."""
    try:
        return _build(text, Path(what), {})
    except (yaml.YAMLError, RecursionError):
        raise ConfigError(f"{what}: {text!r} is not a YAML value", hint='quote text that has special characters: key="a: b"') from None


def dump_yaml(data: Mapping[str, Any]) -> str:
    """YAML text that `read_yaml` reads back to the same values; keys in their order."""
    return str(yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=150, default_flow_style=False))


def key_text(key: Key) -> str:
    """("tasks", 0, "trainer") as people write it: `tasks[0].trainer`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key)
    return text.removeprefix(".")


def nearest(word: str, valid: Iterable[str]) -> str | None:
    """The valid word most like `word`, or None when none is near. Case and the choice of - or _ do not count."""
    folded = {name.casefold().replace("-", "_"): name for name in valid}
    found = difflib.get_close_matches(word.casefold().replace("-", "_"), folded, n=1, cutoff=0.6)
    return folded[found[0]] if found else None


def key_hint(key: str, parent: str, siblings: Iterable[str], elsewhere: Iterable[str]) -> str:
    """The way out for an unknown key: a valid key beside it that looks like it, the same key in another section, or the list of valid keys.

    parent: path of the section ("" at the top). elsewhere: full paths (`trainer.learning_rate`) of all valid keys.
    """
    siblings = list(siblings)
    prefix = f"{parent}." if parent else ""
    near = nearest(key, siblings)
    moved = [path for path in elsewhere if path.rpartition(".")[2] == key]
    if moved and (near is None or near.casefold() != key.casefold()):
        return f"did you mean {moved[0]}?"
    if near is not None:
        return f"did you mean {prefix}{near}?"
    return f"keys {'of ' + parent if parent else 'at the top'}: {', '.join(siblings)}"


def kind_of(value: Any) -> str:
    """What a YAML value is, in words for a message."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", tuple: "a list", dict: "a mapping"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path} (looked from {Path.cwd()})", hint="check the spelling, or give the full path") from None
    except OSError as problem:
        raise ConfigError(f"{path} cannot be read: {problem.strerror}", hint="give the path of a readable YAML file") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = raw[: problem.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: byte 0x{raw[problem.start]:02x} is not UTF-8", hint="save the file as UTF-8") from None


def _build(text: str, path: Path, lines: dict[Key, int]) -> Any:
    """The value of a YAML text (None when it has none); fills `lines`."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else _Builder(path, loader, lines).build(node, ())
    finally:
        loader.dispose()


class _Builder:
    """Builds values from nodes; notes each key's line, refuses keys that are not text or stand twice, and forms that contain themselves."""

    def __init__(self, path: Path, loader: _Loader, lines: dict[Key, int]) -> None:
        self.path, self.loader, self.lines = path, loader, lines
        self.open: set[int] = set()  # nodes being built: meeting one again means an alias to itself
        self.done: dict[int, Any] = {}  # an alias is built once, however often it is used

    def build(self, node: yaml.Node, key: Key) -> Any:
        line = node.start_mark.line + 1
        self.lines.setdefault(key, line)
        if id(node) in self.open:
            raise ConfigError(f"{self.path}:{line}: {key_text(key)} contains itself", hint="write the value out instead of the alias")
        if id(node) not in self.done:
            self.open.add(id(node))
            self.done[id(node)] = self._value(node, key)
            self.open.discard(id(node))
        return self.done[id(node)]

    def _value(self, node: yaml.Node, key: Key) -> Any:
        line = node.start_mark.line + 1
        if node.tag.removeprefix(_TAG) not in _TYPES:
            raise ConfigError(f"{self.path}:{line}: {key_text(key)} has the tag {node.tag!r}", hint="write plain text, numbers, lists and mappings")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*key, index)) for index, item in enumerate(node.value)]
        try:
            return self.loader.construct_object(node, deep=True)
        except (ValueError, KeyError):  # a number too long for Python, or `!!int` before something else
            raise ConfigError(f"{self.path}:{line}: {key_text(key)} is not a value that can be read", hint="put text in quotes") from None

    def _mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        seen: dict[Hashable, int] = {}
        for name, _ in node.value:  # before merging: a key of the file's own may replace one that `<<` brought
            text, line = str(name.value), name.start_mark.line + 1
            if name.tag not in _KEY_TAGS:
                raise ConfigError(f"{self.path}:{line}: the key {text!r} is not text", hint="put it in quotes")
            if text in seen:
                raise ConfigError(
                    f"{self.path}:{line}: {key_text((*key, text))} is given twice (first on line {seen[text]})", hint="keep one of the two"
                )
            seen[text] = line
        self.loader.flatten_mapping(node)
        values = {}
        for name, value in node.value:
            self.lines[(*key, name.value)] = name.start_mark.line + 1
            values[name.value] = self.build(value, (*key, name.value))
        return values
