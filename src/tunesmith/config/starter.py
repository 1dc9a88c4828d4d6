"""A commented run file made from a look at the data: `tunesmith init DATA`.

The config room is below the data room, so the look takes the reader and the format finder as arguments.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.config.yaml12 import one_line, show, write

LOOK = 2_000  # rows; enough to know the format and the length, read in about a second
CHARACTERS_A_TOKEN = 3.5  # English text is nearer to 4; short of it, so that max_length comes out long enough
SCHEMA = Path(__file__).resolve().parents[3] / "docs" / "run.schema.json"  # in a checkout; an installed package has none


@dataclass
class Look:
    """What the first rows show."""

    path: str
    rows: int = 0
    more: bool = False  # the look stopped before the end
    formats: Counter[str] = field(default_factory=Counter)
    refused: list[str] = field(default_factory=list)  # the first few, with their line
    unknown: int = 0  # rows of no known format
    characters: list[int] = field(default_factory=list)  # of each row that must fit whole
    taken: bool = True  # False: nobody looked


def look(path: str | os.PathLike[str], rows: Callable[[str], Iterable[Any]], detect: Callable[[Any], str | None]) -> Look:
    """Look at the first rows of `path`. `rows` yields rows with `.value`, or what was refused with `.reason`; `detect` names a
    value's format. What `rows` raises for data that cannot be read passes."""
    seen = Look(os.fspath(path))
    for row in rows(seen.path):
        if seen.rows + len(seen.refused) >= LOOK:
            seen.more = True
            break
        if hasattr(row, "reason"):
            seen.refused.append(f"{row.origin}: {row.reason}")
            continue
        seen.rows += 1
        kind = detect(row.value)
        if kind is None:
            seen.unknown += 1
            continue
        seen.formats[kind] += 1
        if kind != "text":  # raw text is cut into windows of any length
            seen.characters.append(_characters(row.value))
    return seen


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, (list, tuple)) else 0


def starter(
    seen: Look | str | os.PathLike[str], model: str = "embedded", output: str = "runs/first", *, file: str = "run.yaml"
) -> str:
    """The YAML text. `seen` is what `look` returned, or a path for a starter without a look; `output` is the run folder; `file` is
    where the text will be written (its first line leads an editor to the schema when that is near)."""
    if not isinstance(seen, Look):
        seen = Look(os.fspath(seen), taken=False)
    about_model = "the small model in the package; a real one: mistralai/Mistral-7B-Instruct-v0.3"
    lines = [*_schema_line(file), f"# What to train, on what, how, and where to. Next: tunesmith check {file}", ""]
    lines += [_line("model", model, about_model if model == "embedded" else "a folder or a hub id"), ""]
    lines += [*_about_data(seen), "data:", _line("  train", seen.path)]
    lines += [_line("  held_out", 0.05, "share of rows never trained on: they show whether it helped")]
    if seen.characters:
        longest = max(seen.characters) / CHARACTERS_A_TOKEN
        length = next((n for n in (2048, 4096, 8192, 16384) if n >= longest), 32768)
        about = f"tokens; the longest row seen has about {int(longest):,}"
        lines += [_line("  # max_length" if length == 2048 else "  max_length", length, about)]
    if seen.formats["messages"] + seen.formats["sharegpt"]:
        lines += [_line("  # train_on", "all", "every answer of a chat is learned; last: only its last")]
    method = "lora" if model == "embedded" else "qlora"
    lines += ["", _line("method", method, "qlora: least memory; lora: faster where it fits; full: every weight")]
    lines += [_line("output", output, "the run folder: adapter, metrics, report.html"), ""]
    return "\n".join([*lines, *_about_training(seen), ""])


def _schema_line(file: str) -> list[str]:
    """Only where a relative path leads to the schema: inside a checkout."""
    folder = Path(file).resolve().parent
    inside = SCHEMA.is_file() and folder.is_relative_to(SCHEMA.parents[1])
    return [f"# yaml-language-server: $schema={os.path.relpath(SCHEMA, folder)}"] if inside else []


def _line(key: str, value: Any, comment: str = "") -> str:
    """One key and, in a column of its own, what to know of it. A key that starts with # is a default worth knowing."""
    lead, name = re.fullmatch(r"([ #]*)(\w+)", key).groups()
    text = lead + write({name: value}).strip()
    return f"{text:<26}  # {comment}" if comment else text


def _about_data(seen: Look) -> list[str]:
    if not seen.taken:
        return ["# Nobody has looked at the data yet: `tunesmith check` says what is in it."]
    count = f"the first {seen.rows:,} rows" if seen.more else f"{seen.rows:,} rows"
    found = ", ".join(f"{n:,} {kind}" if len(seen.formats) > 1 else kind for kind, n in seen.formats.most_common())
    said = [f"# Seen in the data: {count}{f', format {found}' if found else ''}"]
    if seen.unknown:
        said.append(f"# {seen.unknown:,} rows have no known format: `tunesmith check` shows which and why")
    if seen.refused:
        said.append(f"# {len(seen.refused):,} rows cannot be read, first {_comment(seen.refused[0])}")
    return said


def _comment(text: str) -> str:
    """Text from the data or the disk as part of one comment line."""
    text = one_line(text)
    return text if text.isprintable() else show(text, 200)


def _about_training(seen: Look) -> list[str]:
    epochs, why = 3, "passes over the rows"
    if not seen.more and 0 < seen.rows < 200:
        why += f"; {seen.rows} rows are few: if the held-out loss turns up early, write more"
    elif seen.more:
        epochs, why = 2, "with many rows one or two passes do; see whether the held-out loss still falls"
    return [
        "train:",
        _line("  epochs", epochs, why),
        _line("  # batch_size", 8, "examples a step; memory is planned for you and never changes the result"),
        _line("  # learning_rate", "auto", "the first thing to change: lower where the loss jumps, such as 1e-4"),
        "",
        "# lora:",
        _line("#   rank", 16, "how much the adapter can hold"),
        "",
        "# Every other key, with its default: tunesmith explain",
    ]
