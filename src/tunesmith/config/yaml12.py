"""YAML text -> plain values with the line of every key, and back.

The scalars are YAML 1.2's (2e-4 is a number, `no` and 2024-01-01 are text); a key given twice and a tag are faults; aliases
cannot blow up.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from tunesmith.errors import ConfigError

Loc = tuple[str | int, ...]
MAX_NODES = 20_000  # a run file has a few hundred; aliases of aliases have billions
TAG = "tag:yaml.org,2002:"
PLAIN_TAGS = {TAG + name for name in ("map", "seq", "str", "int", "float", "bool", "null")}
NUMBER = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars: 1.1 reads 2e-4 as text, 010 as 8, 1:30 as 90, `no` as false and a date as a date."""


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or 1.2 would not read as text."""


_Loader.yaml_implicit_resolvers = {}
_Dumper.yaml_implicit_resolvers = {first: list(pairs) for first, pairs in yaml.SafeDumper.yaml_implicit_resolvers.items()}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", NUMBER, list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(TAG + _tag, re.compile(rf"^(?:{_pattern})$"), _first)


def write(tree: Any) -> str:
    """Plain values as YAML, keys in their order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 20)


@dataclass
class Document:
    """What a YAML text says: plain values, the line of every key and item, and the faults of the text itself."""

    tree: Any = None
    lines: dict[Loc, int] = field(default_factory=dict)
    faults: list[tuple[Loc, int, str]] = field(default_factory=list)  # key, line, what


def read(text: str, name: str = "") -> Document:
    """Raises ConfigError (one line) where the text is no YAML at all; lesser faults are in the Document."""
    at = f"{name}:" if name else ""
    document = Document()
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is not None:
            document.tree = _Reader(loader, document).value(root, ())
    except yaml.MarkedYAMLError as fault:
        mark = fault.problem_mark or fault.context_mark
        line = mark.line if mark else 0
        tab = "\t" in "".join(text.splitlines()[line : line + 1])
        fix = "YAML indents with spaces: replace the tab" if tab else "mend the line; text that holds : # { [ & * or ! needs quotes"
        raise ConfigError(f"{at}{line + 1}: not YAML: {one_line(fault.problem or fault.context or '')}", fix) from None
    except yaml.reader.ReaderError as fault:
        line = text[: fault.position].count("\n")
        raise ConfigError(
            f"{at}{line + 1}: not text: holds the character {show(text[fault.position])}", "save it as plain UTF-8 text"
        ) from None
    except RecursionError:
        raise ConfigError(
            f"{at}1: nested too deeply", "a run file has sections with keys, and nothing deeper than a list"
        ) from None
    return document


class _Reader:
    """Composed nodes -> plain values, noting lines and faults on the way."""

    def __init__(self, loader: _Loader, document: Document):
        self.loader, self.document, self.nodes = loader, document, 0

    def value(self, node: yaml.Node, loc: Loc) -> Any:
        line = node.start_mark.line + 1
        self.document.lines.setdefault(loc, line)
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise yaml.MarkedYAMLError(problem="too many values; are there aliases of aliases?", problem_mark=node.start_mark)
        if node.tag not in PLAIN_TAGS:
            self.document.faults.append((loc, line, f"has the tag {show(node.tag, 60)}; write a plain value"))
            return None
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, loc)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*loc, i)) for i, item in enumerate(node.value)]
        try:
            return self.loader.construct_object(node)
        except (
            ValueError,
            KeyError,
        ):  # `!!int abc`, `!!bool maybe`, an integer of 5,000 digits: the schema will say what it expects
            return node.value

    def mapping(self, node: yaml.MappingNode, loc: Loc) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        first: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag == TAG + "merge":  # `<<: *base` or `<<: [*a, *b]`; the earlier wins, own keys win over all
                for part in reversed(value.value) if isinstance(value, yaml.SequenceNode) else [value]:
                    merged |= self.mapping(part, loc) if isinstance(part, yaml.MappingNode) else {}
            elif not isinstance(key, yaml.ScalarNode):
                self.document.faults.append((loc, line, "a key must be a word, not a list or a mapping"))
            else:
                at = (*loc, key.value)
                if key.value in first:
                    self.document.faults.append((at, line, f"given twice, first on line {first[key.value]}; keep one"))
                first[key.value] = self.document.lines[at] = line
                own[key.value] = self.value(value, at)
        return merged | own


def show(value: Any, width: int = 40) -> str:
    """A value as one short printable line, for errors."""
    if isinstance(value, (dict, list)):
        kind = "mapping" if isinstance(value, dict) else "list"
        return f"a {kind}" if value else f"an empty {kind}"
    if isinstance(value, bool):
        return str(value).lower()
    try:
        text = repr(value) if isinstance(value, str) and value.isprintable() else ascii(value)
    except ValueError:  # an integer of more than 4,300 digits
        return "a very long number"
    return text if len(text) <= width else f"{text[: width - 4]}...{text[-1]}"


def one_line(text: str) -> str:
    return " ".join(text.split())
