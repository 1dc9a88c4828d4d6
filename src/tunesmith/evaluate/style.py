"""Whether answers keep a house style that is written down as rules a program can check, redirect what is off topic, hold the facts.

A rules file is JSON: `rules` (each a `pattern` that must, or with `match: false` must not, be found in an answer), `redirect` (the
pattern that marks an answer that sends a request on), `system_prompt` (the same asked for in words). A row says its `topic` (`off`
is to be redirected, anything else is not) and its `facts` (of each list one string must stand in the answer). No torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Style:
    """The rules as patterns."""

    rules: tuple[tuple[str, re.Pattern[str], bool], ...]  # name, pattern, whether it must be found
    redirect: re.Pattern[str]
    system_prompt: str

    @classmethod
    def load(cls, path: Path) -> Style:
        raw = json.loads(path.read_text(encoding="utf-8"))
        rules = tuple((rule["name"], re.compile(rule["pattern"]), rule["match"]) for rule in raw["rules"])
        return cls(rules, re.compile(raw["redirect"]["pattern"]), raw["system_prompt"])

    def broken(self, answer: str) -> list[str]:
        """Names of the rules that the answer breaks."""
        return [name for name, pattern, wanted in self.rules if bool(pattern.search(answer)) != wanted]

    def redirects(self, answer: str) -> bool:
        return bool(self.redirect.search(answer))


def holds(facts: Sequence[Sequence[str]], answer: str) -> bool:
    """Whether of each list one string stands in the answer, in lower case, as a whole word or phrase."""
    return all(any(re.search(rf"\b{re.escape(word)}\b", answer.lower()) for word in words) for words in facts)


@dataclass(frozen=True)
class Share:
    """So many of so many."""

    hits: int
    of: int

    @property
    def percent(self) -> float:
        return 100 * self.hits / self.of if self.of else float("nan")

    def __str__(self) -> str:
        return f"{self.percent:.0f} %" if self.of else "-"


@dataclass(frozen=True)
class Scores:
    """What one model's answers to all rows come to."""

    style: Share  # answers that break no rule
    redirected: Share  # of the off-topic requests
    turned_away: Share  # of the others, which were not to be redirected
    facts: Share  # answers from the manual, of the rows that have facts


def score(style: Style, rows: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> Scores:
    off = [a for row, a in zip(rows, answers, strict=True) if row["topic"] == "off"]
    others = [a for row, a in zip(rows, answers, strict=True) if row["topic"] != "off"]
    asked = [(row["facts"], a) for row, a in zip(rows, answers, strict=True) if row["topic"] == "on" and row.get("facts")]
    return Scores(
        Share(sum(not style.broken(a) for a in answers), len(answers)),
        Share(sum(map(style.redirects, off)), len(off)),
        Share(sum(map(style.redirects, others)), len(others)),
        Share(sum(holds(facts, a) for facts, a in asked), len(asked)),
    )
