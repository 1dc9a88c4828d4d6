"""A run file becomes a RunConfig, or every fault of it is told at once: `run.yaml:5: lora.rankk: unknown key; did you mean 'rank'?`

Overrides are `key.path=value`, the value YAML as in the file. Relative paths count from the current directory, not from the file.
"""

from __future__ import annotations

import copy
import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import ValidationError

from tunesmith.config.explain import full_type, in_words, is_section, suggest
from tunesmith.config.schema import LATER, RunConfig, contradictions, long_form
from tunesmith.config.yaml12 import Document, Loc, one_line, read, show, write
from tunesmith.errors import ConfigError

MAX_BYTES = 1 << 20
LAST = 1 << 30  # overrides are told after all lines of the file
ROWS = {".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt", ".md", ".gz"}  # endings of data, which is easily named by mistake
FOUR_KEYS = "write model, data, method and output; `tunesmith init DATA` writes such a file for you"
REQUIRED = {
    "model": "write a checkpoint folder, a hub id such as mistralai/Mistral-7B-Instruct-v0.3, or embedded",
    "data": "write the file or folder with your rows, such as chats.jsonl",
    "data.train": "write the file or folder with your rows, such as chats.jsonl",
    "method": "write qlora, lora or full",
    "output": "write a folder for the run, such as runs/first",
}
# Takes the place of what is missing or wrong when the rest is searched for contradictions.
STAND_IN = {"model": "a model", "data": {}, "method": "lora", "output": "a run"}


def load(source: str | os.PathLike[str] | Mapping[str, Any] | RunConfig, *overrides: str) -> RunConfig:
    """The checked run file.

    `source` is a path, a run folder (its run.yaml), a mapping as the YAML would give it, or a RunConfig. `overrides` are
    `key.path=value` and win over the file; a key of the file that has no effect beside an override is dropped.
    Raises ConfigError naming every fault with its line.
    """
    if isinstance(source, RunConfig):
        source = source.model_dump(exclude_unset=True)
    if isinstance(source, Mapping):
        return _Check("", Document(_plain(source)), overrides).config()
    name, text = _text_of(Path(source))
    return _Check(name, read(text, name), overrides).config()


def resolved(config: RunConfig) -> dict[str, Any]:
    """Every key with its value, such that `load` gives the same run from any directory: what a run folder keeps.

    Paths that exist are made absolute; defaults that have no effect (the lora section of method: full) are left out.
    """
    tree = config.model_dump(mode="json")
    for section, key in ((tree, "model"), (tree["data"], "held_out"), (tree["data"], "template"), (tree["lora"], "continue_from")):
        section[key] = _absolute(section[key])
    for source in tree["data"]["train"]:
        source["path"] = _absolute(source["path"])
    tree["output"] = os.path.abspath(tree["output"])
    for c in contradictions(_validated(tree)):
        _drop(tree, _loc(c.key))
    return tree


def dump(config: RunConfig) -> str:
    """`resolved` as YAML."""
    return write(resolved(config))


def _absolute(value: Any) -> Any:
    is_path = isinstance(value, str) and value not in ("auto", "plain", "none", "embedded") and os.path.exists(value)
    return os.path.abspath(value) if is_path else value


def _text_of(path: Path) -> tuple[str, str]:
    if path.suffix.lower() in ROWS or (path.is_dir() and not (path / "run.yaml").exists()):
        what = "a folder without a run.yaml" if path.is_dir() else "not a run file by its name"
        raise ConfigError(f"{path}: {what}", f"if these are your rows, `tunesmith init {path}` writes a run file for them")
    try:
        if path.is_dir():
            path /= "run.yaml"
        size = path.stat().st_size
        raw = path.read_bytes() if size <= MAX_BYTES else b""
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.y*ml"))[:5] if path.parent.is_dir() else []
        raise ConfigError(
            f"{path}: no such file", f"here are: {', '.join(near)}" if near else "`tunesmith init DATA` writes one"
        ) from None
    except (OSError, ValueError) as fault:  # ValueError: a NUL in the name
        raise ConfigError(f"{show(str(path), 200)}: cannot be read: {fault}", "name a run file that you may read") from None
    if size > MAX_BYTES:
        raise ConfigError(f"{path}: has {size:,} bytes, too many for a run file", "name the YAML file, not the data or the weights")
    try:
        return str(path), raw.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        what = f"{path}: is not UTF-8 text (byte {fault.start})"
        raise ConfigError(
            what, "name the YAML file, not the data or the weights; if it is the run file, save it as UTF-8"
        ) from None


class _Check:
    """One load: applies the overrides, validates, and turns what pydantic says into faults that name file, line and key."""

    def __init__(self, name: str, document: Document, overrides: Iterable[str]):
        self.name, self.lines, self.tree = name, document.lines, document.tree
        self.told: dict[str, int] = {}  # the finished lines of the error -> their place in it
        self.set_by: dict[Loc, str] = {}  # which override set a key
        if self.tree is None and name:
            raise ConfigError(f"{name}: is empty", FOUR_KEYS)
        if not isinstance(self.tree, dict):
            kind = "a list" if isinstance(self.tree, list) else "a single value"
            raise ConfigError(f"{name + ':1: ' if name else ''}holds {kind}, not `key: value` lines", FOUR_KEYS)
        for loc, line, what in document.faults:
            self.tell(line, f"{name}:{line}", loc, what)
        self.normalise()
        for text in overrides:
            self.override(text)
            self.normalise()

    def normalise(self) -> None:
        """The long form of `data`, and `train:` with all its keys commented out as the empty section it is."""
        if "data" in self.tree:
            if not isinstance(self.tree["data"], dict):  # the items of `data: [a, b]` keep their lines as data.train's
                self.lines |= {("data", "train", *loc[1:]): line for loc, line in self.lines.items() if loc[:1] == ("data",)}
            self.tree["data"] = long_form(self.tree["data"])
        for name, field in RunConfig.model_fields.items():
            if is_section(field.annotation) and name != "data" and name in self.tree and self.tree[name] is None:
                self.tree[name] = {}

    def override(self, text: str) -> None:
        key, equals, value = text.partition("=")
        *parents, leaf = loc = _loc(key.strip())
        where = f"override {show(text, 80)[1:-1]}"
        if not equals or not all(loc):
            return self.tell(LAST, where, (), "write key.path=value, such as train.epochs=2")
        try:
            document = read(value)
        except ConfigError as fault:
            return self.tell(LAST, where, (), f"{fault.what}; quotes around the value may help")
        for at, _, what in document.faults:
            self.tell(LAST, where, at, what)
        if loc == ("data",) and isinstance(self.tree.get("data"), dict) and isinstance(document.tree, (str, list)):
            parents, leaf, loc = ["data"], "train", ("data", "train")  # `data=other.jsonl` changes the rows and keeps the rest
        node = self.tree
        for depth, part in enumerate(parents, 1):
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                what = "is a list: give it whole, as [a, b]" if isinstance(node, list) else f"is no section; {suggest(leaf)}"
                return self.tell(LAST, where, (), f"{_dotted(tuple(parents[:depth]))} {what}")
        node[leaf] = document.tree
        self.set_by[loc] = where

    def config(self) -> RunConfig:
        try:
            config = _validated(self.tree)
        except ValidationError as fault:
            config = self.rest(fault.errors(include_url=False, include_input=False))
        found = list(contradictions(config))
        # An override wins over the file: `train.max_steps=20` beside its epochs. What cannot be run is not settled that way.
        settled = [c for c in found if c.idle and self.set_by_override(_loc(c.against)) and not self.set_by_override(_loc(c.key))]
        for c in found:
            if c not in settled:
                self.fault(_loc(c.key), c.what)
        if self.told:
            lines = sorted(self.told, key=self.told.__getitem__)
            raise ConfigError("\n".join(lines), "`tunesmith explain KEY` says what a key does and what it may be")
        for c in settled:
            _drop(self.tree, _loc(c.key))
        return self.config() if settled else config

    def rest(self, errors: list[Any]) -> RunConfig:
        """Tell pydantic's errors, one a key; returns what the file says without the faulty keys, for what that contradicts."""
        by_key: dict[Loc, Any] = {}
        for error in errors:
            loc = self.key_of(error)
            by_key[loc] = max(by_key.get(loc, error), error, key=_nearness)
        rest = copy.deepcopy(self.tree)
        for loc, error in by_key.items():
            inside = any(len(other) > len(loc) and other[: len(loc)] == loc for other in by_key)
            if not inside:  # `targets: [1]` fails as a word and in its item; the item says more
                self.fault(loc, self.what(loc, error))
            _drop(rest, _leaf(loc))
        rest = STAND_IN | rest
        rest["data"] = {"train": "rows"} | rest["data"]
        return _validated(rest)

    def key_of(self, error: Any) -> Loc:
        """The key an error is about. pydantic's loc also names branches of unions and `[key]`, which the tree does not have."""
        node, loc = self.tree, ()
        for part in error["loc"]:
            in_list = isinstance(node, list) and isinstance(part, int) and part < len(node)
            if in_list or (isinstance(node, dict) and part in node):
                node, loc = node[part], (*loc, part)
        return (*loc, error["loc"][-1]) if error["type"] == "missing" and is_section(_type_at(loc)) else loc

    def what(self, loc: Loc, error: Any) -> str:
        kind = _type_at(loc)
        if error["type"] == "missing" and is_section(_type_at(loc[:-1])):
            return f"missing; {REQUIRED.get(_dotted(loc), 'it has no default')}"
        if error["type"] == "extra_forbidden":
            section = "".join("[]" if isinstance(part, int) else f".{part}" for part in loc[:-1])
            return f"unknown key; {suggest(str(loc[-1]), section.lstrip('.'))}"
        if error["type"] == "value_error":
            return one_line(error["msg"].removeprefix("Value error, "))
        value: Any = self.tree
        for part in loc:
            value = value[part]
        expected = in_words(kind)
        if value is None:
            return f"has no value; {REQUIRED.get(_dotted(loc)) or f'write {expected}, or drop the line'}"
        hint = ""
        if isinstance(value, str) and (close := difflib.get_close_matches(value.lower(), re.findall(r'"(.+?)"', expected), 1, 0.6)):
            hint = f"; did you mean {close[0]!r}?"
        elif isinstance(value, (int, float)) and re.search(r"\b(text|path)\b", expected):
            hint = "; put it in quotes"
        return f"expected {expected}, got {show(value)}{hint}"

    def set_by_override(self, loc: Loc) -> str:
        """The override that set this key, or something inside or around it."""
        return next((where for at, where in self.set_by.items() if at[: len(loc)] == loc or loc[: len(at)] == at), "")

    def fault(self, loc: Loc, what: str) -> None:
        if where := self.set_by_override(loc):
            self.tell(LAST, where, loc, what)
        elif self.name:
            line = next((self.lines[loc[:n]] for n in range(len(loc), -1, -1) if loc[:n] in self.lines), 1)
            self.tell(line, f"{self.name}:{line}", loc, what)
        else:
            self.tell(0, "", loc, what)

    def tell(self, place: int, where: str, loc: Loc, what: str) -> None:
        self.told.setdefault(": ".join(part for part in (where, _dotted(loc), what) if part), place)


def _validated(tree: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(tree, context=LATER)


def _nearness(error: Any) -> int:
    """Of a union's branches the one that came nearest speaks: not that word, not text, of the right kind but out of bounds."""
    return {"literal_error": 0, "string_type": 1}.get(error["type"], 2)


def _loc(key: str) -> Loc:
    return tuple(key.split("."))


def _dotted(loc: Loc) -> str:
    return ".".join(str(part) if re.fullmatch(r"[\w-]+", str(part)) else show(part) for part in loc)


def _type_at(loc: Loc) -> Any:
    """The annotation of a key, or of an item in it; text where the schema knows no such key."""
    here: Any = RunConfig
    for part in loc:
        here = _inside(here, part)
    return here


def _inside(annotation: Any, part: str | int) -> Any:
    bare = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    if is_section(bare):
        return full_type(bare.model_fields[part]) if part in bare.model_fields else str
    if get_origin(bare) is tuple:
        return get_args(bare)[0]
    if get_origin(bare) is dict:
        return get_args(bare)[1]
    return next((_inside(branch, part) for branch in get_args(bare) if get_args(branch) and branch is not bare), str)


def _leaf(loc: Loc) -> Loc:
    """loc cut where the sections end: `data.train.0.path` -> `data.train`."""
    return next((loc[:n] for n in range(1, len(loc)) if not is_section(_type_at(loc[:n]))), loc)


def _drop(tree: dict[str, Any], loc: Loc) -> None:
    for part in loc[:-1]:
        tree = tree.get(part, {})  # a section, as _leaf ends where sections end
    tree.pop(loc[-1], None)


def _plain(value: Any) -> Any:
    """What YAML would have given: paths and keys are text, tuples are lists."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value
