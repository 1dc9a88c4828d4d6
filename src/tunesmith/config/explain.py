"""What a key does, what too high and too low look like, and its name elsewhere: `tunesmith explain [KEY]`.

Everything here is read from the schema; `keys()` is the one list of leaf keys, which load.py, reference.py and the tests share.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from textwrap import fill
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from tunesmith.config.schema import RunConfig, Section, Source, place
from tunesmith.errors import ConfigError

OTHERS = {"axolotl": "Axolotl", "trl": "TRL", "unsloth": "Unsloth"}


@dataclass(frozen=True, slots=True)
class Key:
    """One leaf key. `notes` holds high, low, wrong, axolotl, trl, unsloth as the schema says them."""

    name: str  # `lora.rank`; keys of the items of a list have `[]`: `data.train[].path`
    does: str
    kind: str  # what a value may be, in words
    default: str  # as YAML, or "required"
    notes: dict[str, str]


@cache
def keys() -> dict[str, Key]:
    """Every leaf key of the run file, in the file's order."""
    return {k.name: k for k in _walk(RunConfig, "")}


@cache
def sections() -> dict[str, str]:
    """Every section and what it is about. The head of the file is the section ''."""
    named = {name: f.annotation for name, f in RunConfig.model_fields.items() if is_section(f.annotation)}
    return {"": _first_line(RunConfig), **{name: _first_line(section) for name, section in named.items()}}


def _walk(section: type[Section], prefix: str) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        if is_section(field.annotation):
            yield from _walk(field.annotation, f"{prefix}{name}.")
            continue
        notes = field.json_schema_extra
        assert isinstance(notes, dict), f"{prefix}{name} says nothing of itself: give it key(...)"
        yield Key(
            prefix + name,
            field.description or "",
            in_words(full_type(field)),
            _default(field),
            {k: str(v) for k, v in notes.items()},
        )
        for item in get_args(field.annotation):
            if is_section(item):
                yield from _walk(item, f"{prefix}{name}[].")


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def full_type(field: FieldInfo) -> Any:
    """The annotation with the bounds that pydantic has lifted out of it."""
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def _first_line(section: type[Section]) -> str:
    return (section.__doc__ or "").strip().splitlines()[0]


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    value = field.default
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return (
        {True: "true", False: "false"}[value]
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def in_words(annotation: Any) -> str:
    """`a whole number above 0 or "auto"`: what a value may be, for errors and pages."""
    bounds: list[Any] = []
    if get_origin(annotation) is Annotated:
        annotation, *bounds = get_args(annotation)
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        words = [in_words(a) for a in sorted(args, key=lambda a: get_origin(a) is Literal)]
        return (", or " if any(" and " in w or "," in w for w in words) else " or ").join(words)
    if origin is Literal:
        *most, last = (f'"{a}"' for a in args)
        return f"{', '.join(most)} or {last}" if most else last
    if origin is tuple:
        first = in_words(args[0])
        if args[-1] is Ellipsis:
            return "a path or a list of sources" if is_section(args[0]) else f"a list, each {first}"
        return f"a list of {len(args)}, each {first}"
    if origin is dict:
        return f"a mapping of names to {in_words(args[1])}"
    if annotation in (int, float):
        return ("a whole number" if annotation is int else "a number") + _bounds(bounds)
    if annotation is Path or any(getattr(b, "func", None) is place for b in bounds):
        return "a path or name"
    if annotation is Source:
        return "a path, or a mapping with path and weight"
    return {bool: "true or false", str: "text"}.get(annotation, "a section of keys")


def _bounds(metadata: list[Any]) -> str:
    """pydantic keeps bounds as annotated_types inside FieldInfo.metadata, or as they are."""
    found = {}
    for item in metadata:
        for bound in getattr(item, "metadata", [item]):
            found |= {name: getattr(bound, name) for name in ("gt", "ge", "lt", "le") if getattr(bound, name, None) is not None}
    words = {"gt": "above", "ge": "from", "lt": "below", "le": "at most"}
    said = (" to " if "ge" in found else " and ").join(f"{words[name]} {found[name]}" for name in words if name in found)
    return said and f" {said}"


@cache
def elsewhere() -> dict[str, str]:
    """Other tools' names -> ours: {"lora_r": "lora.rank", ...}. The first key to claim a name has it."""
    found: dict[str, str] = {}
    for k in keys().values():
        for tool in OTHERS:
            for name in re.split(r", | x ", k.notes[tool]):
                word = re.fullmatch(r"(?:[A-Z]\w*\.)?([a-z]\w+)", name)
                if word and "." not in k.name.partition("[]")[2]:
                    found.setdefault(word[1], k.name)
    return found


def suggest(name: str, section: str = "") -> str:
    """`did you mean 'lora.rank'?` for a key that `section` (dotted; '' is the head of the file) does not have."""
    siblings = _names_in(section)
    last = name.rsplit(".", 1)[-1]
    same = [k for k in keys() if k.rsplit(".", 1)[-1] == last and "[]" not in k]
    if len(same) == 1:
        return f"did you mean {same[0]!r}?"
    if same:
        return f"did you mean one of {', '.join(same)}?"
    if last in elsewhere():
        return f"did you mean {elsewhere()[last]!r}?"
    leaves = {k.rsplit(".", 1)[-1]: k for k in reversed(keys()) if "[]" not in k} | {name: name for name in siblings}
    near = {
        k: difflib.SequenceMatcher(None, last, k).ratio() + 0.1 * (k in siblings) for k in leaves
    }  # a sibling is likelier meant
    best = max(near, key=near.__getitem__)
    return f"did you mean {leaves[best]!r}?" if near[best] >= 0.75 else f"known here: {', '.join(siblings)}"


def _names_in(section: str) -> list[str]:
    prefix = f"{section}." if section else ""
    inside = [k.removeprefix(prefix) for k in keys() if k.startswith(prefix)]
    return list(dict.fromkeys(re.split(r"[.\[]", k)[0] for k in inside))


def explain(key: str | None = None) -> str:
    """What `key` does, as text of at most 100 columns; a section lists its keys, no key lists all.

    Names from Axolotl, TRL and Unsloth are understood too (`lora_r`). An unknown key raises ConfigError with the near name.
    """
    if not key:
        return _table(sections())
    key = key.strip().rstrip(".")
    if key in sections():
        return _table([key])
    if key in keys():
        return _page(keys()[key])
    if key in elsewhere():
        return f"{key} is {elsewhere()[key]} here.\n\n" + _page(keys()[elsewhere()[key]])
    close = difflib.get_close_matches(key, [*keys(), *sections()], 1, 0.75)
    hint = f"did you mean {close[0]!r}?" if close else suggest(key)
    raise ConfigError(f"unknown key {key!r}", f"{hint} `tunesmith explain` lists them all")


def _page(key: Key) -> str:
    say = [("may be", key.kind), ("default", key.default)]
    say += [
        (label, key.notes[note])
        for note, label in (("high", "too high"), ("low", "too low"), ("wrong", "if wrong"))
        if key.notes[note]
    ]
    say += [(label, key.notes[tool]) for tool, label in OTHERS.items()]
    lines = [fill(f"{label:<10}{text}", 100, initial_indent="  ", subsequent_indent=" " * 12) for label, text in say]
    return "\n".join([key.name, fill(" ".join(key.does.split()), 100, initial_indent="  ", subsequent_indent="  "), "", *lines])


def _table(names: Any) -> str:
    parts = []
    for section in names:
        parts.append(f"{section or 'the head of the file'}: {sections()[section]}")
        for name, key in keys().items():
            if (name.split(".")[0] if "." in name else "") == section:
                parts.append(f"  {name:<26}{key.default:<14}{_cut(key.does, 60)}")
        parts.append("")
    return "\n".join([*parts, "`tunesmith explain KEY` says what too high and too low look like, and what others call it."])


def _cut(text: str, width: int) -> str:
    first = re.split(r"(?<=[.;])\s|: ", text)[0].rstrip(".;")
    return first if len(first) <= width else first[: width - 3].rsplit(" ", 1)[0] + " ..."
