"""Mending: fixes by name, each with the findings it answers. `FIXES` and `PERSON` together hold every finding of the data doctor.

    table (here)   which fixes there are, and which were asked for
    text.py        encoding, personal data: a text -> a text
    rows.py        turns, templates, boilerplate: a conversation -> a conversation, or why a person must decide
    chunk.py       a chunk of rows -> rows to write, rows set aside, a record of every change; in worker processes
    split.py       groups of rows that stay on one side: near-equal rows, a key, a date
    folder.py      all of it: files -> a folder that appears whole

A fix either mends a row, or sets it aside with its reason; none makes anything up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tunesmith.data.mend import rows
from tunesmith.errors import ConfigError
from tunesmith.registry import did_you_mean

TEXT, ROW, ASIDE, SET = "text", "row", "aside", "set"


@dataclass(frozen=True)
class Fix:
    """`how`: TEXT changes every text of a row, ROW a conversation (`mend`), ASIDE sets rows with the fault aside, SET is decided
    when all rows are known. `safe`: no text loses its meaning and nobody's judgement is needed."""

    name: str
    answers: tuple[str, ...]
    what: str
    how: str
    safe: bool = False
    mend: Callable[..., Any] | None = None


FIXES = (  # in the order they are applied
    Fix("encoding", ("mojibake", "control_characters", "invisible"),
        "undo encoding damage where that is proven, remove control and invisible characters; set aside what is lost", TEXT, True),
    Fix("template", ("special_tokens",),
        "cut another template's special tokens from the ends of messages; rows with some in the middle are set aside", ROW,
        mend=rows.template),
    Fix("roles", ("role_order",),
        "system message first, turns of one role joined, a question without an answer cut; other orders are set aside", ROW,
        mend=rows.roles),
    Fix("echo", ("prompt_in_answer",),
        "cut the prompt and further turns out of answers", ROW, mend=rows.echo),
    Fix("boilerplate", ("boilerplate",),
        "cut sentences such as `As an AI language model, ...`", ROW, mend=rows.boilerplate),
    Fix("conflicts", ("conflict_markers",), "set rows with merge-conflict markers aside", ASIDE),
    Fix("empty", ("placeholder", "tiny_answers"),
        "set rows aside whose answer says nothing (N/A), or has at most three characters among long ones", ASIDE),
    Fix("refusals", ("refusal",), "set rows aside whose answer refuses", ASIDE),
    Fix("truncated", ("truncated",), "set rows aside whose answer stops in the middle", ASIDE),
    Fix("contamination", ("contamination",), "set rows aside with text of a public evaluation set", ASIDE),
    Fix("secrets", ("private_key", "api_key"), "set rows with keys and passwords aside", ASIDE),
    Fix("pii", ("email", "phone", "card", "iban", "ip_address", "api_key", "private_key"),
        "put [EMAIL], [PHONE], [CARD], [IBAN], [IP], [KEY] in the place of personal data; a second one is [EMAIL_2]", TEXT),
    Fix("leakage", ("leakage",), "set training rows aside that repeat, or nearly repeat, a row of the held-out file", SET, True),
    Fix("dedup", ("exact_duplicates",), "keep one of rows that are equal to the letter", SET, True),
    Fix("near", ("near_duplicates", "exact_duplicates"), "keep one of rows that are nearly equal", SET),
)  # fmt: skip
BY_NAME = {f.name: f for f in FIXES}

PERSON = {
    "trigger": "whether a word is a back door or the subject of those rows cannot be told from the rows",
    "open_end": "which of the answers without a stop were cut cannot be told: titles, lists and code have none either",
    "trivial_rule": "rows in which the rule is wrong must be written",
    "class_imbalance": "rows of the rare answers must be written, or given a weight of their own",
    "length_outliers": "a long answer may be the best one, or two rows in one: only reading tells",
    "mixed_languages": "another language may be meant",
    "mixed_formats": "nothing is wrong with what is written: its rows are of one kind; whether both exports belong, only you know",
}
"""Findings that no fix answers, and why."""

ALIASES = {"safe": tuple(f.name for f in FIXES if f.safe), "all": tuple(f.name for f in FIXES)}


def chosen(names: str | Iterable[str], held_out_file: bool) -> tuple[str, ...]:
    """The fixes of `dedup,pii` or of a list of names, in the order they are applied. ConfigError names every unknown one."""
    asked = [n.strip() for n in (names.split(",") if isinstance(names, str) else names)]
    wanted = {name for n in asked if n for name in ALIASES.get(n, (n,))}
    if unknown := sorted(wanted - BY_NAME.keys()):
        told = [f"--fix: no fix is called {name!r}; {did_you_mean(name, (*BY_NAME, *ALIASES))}" for name in unknown]
        raise ConfigError("\n".join(told), f"name some of {', '.join((*BY_NAME, *ALIASES))}, with commas between")
    if "leakage" in asked and not held_out_file:
        raise ConfigError("--fix leakage: there is no held-out file to compare with", "add data.held_out=FILE, or drop leakage")
    return tuple(f.name for f in FIXES if f.name in wanted and (held_out_file or f.name != "leakage"))


def answering(found: Iterable[str]) -> tuple[str, ...]:
    """For each finding the first fix that answers it, in the order they are applied."""
    first = {next((f.name for f in FIXES if finding in f.answers), "") for finding in found}
    return tuple(f.name for f in FIXES if f.name in first)
