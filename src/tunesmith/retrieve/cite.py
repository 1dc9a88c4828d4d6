"""Answers that cite passages as `[n]`, and the check of these citations: a rule, the same for everyone, no model.

A sentence is supported when the passages that it cites together hold all its numbers and at least SUPPORT of its content words
(words that are no stop words, without their endings). A citation supports when its sentence is supported, and the passage alone
does it or the others do not without it (the rule of ALCE, Gao et al. 2023, with words for their entailment model). Words are not
meaning: a sentence that turns a passage's own words into their opposite passes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath
from typing import Any

from tunesmith.retrieve.chunks import sentences as spans
from tunesmith.retrieve.search import STOP, words
from tunesmith.retrieve.store import Passage

SUPPORT = 0.6  # of a sentence's content words; bench/retrieve.py shows what other values would pass
ABSTAIN = "The documents do not answer this."
INSTRUCTION = (
    "Answer from these passages. Behind what you take from one, cite it by its number, such as [1]. "
    "If the answer is not in them, say that it is not there."
)

_CITED = re.compile(r"\[(\d{1,4}(?:\s*[,;]\s*\d{1,4}){0,20})\]")
_LEADING = re.compile(r"(?:\s*\[\d{1,4}(?:\s*[,;]\s*\d{1,4}){0,20}\])+[.,;]?")
_ENDINGS = re.compile(r"(?<=\w{3})(?:ingly|edly|ing|ies|ied|ed|es|ly|s|e|y)$")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


@dataclass(frozen=True, slots=True)
class Citation:
    """One `[n]` of a sentence: whether there is a passage n, and whether it supports the sentence."""

    number: int
    sentence: int
    exists: bool
    supports: bool


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence of the answer: `text` is the answer's [start, end). `cover`: the share of its content words in what it cites."""

    text: str
    start: int
    end: int
    numbers: tuple[int, ...]
    cover: float
    supported: bool


@dataclass(frozen=True)
class Cited:
    """An answer, checked. Sentences without content words (`Yes.`) are not among the sentences unless they cite."""

    answer: str
    sentences: tuple[Sentence, ...]
    citations: tuple[Citation, ...]

    @cached_property
    def missing(self) -> tuple[int, ...]:
        """Numbers that are cited and that no passage has."""
        return tuple(sorted({c.number for c in self.citations if not c.exists}))

    @property
    def precision(self) -> float | None:
        """Citations that support, of all; None without a citation."""
        return sum(c.supports for c in self.citations) / len(self.citations) if self.citations else None

    @property
    def recall(self) -> float | None:
        """Sentences that are supported, of all; None without a sentence."""
        return sum(s.supported for s in self.sentences) / len(self.sentences) if self.sentences else None

    @property
    def abstains(self) -> bool:
        """Nothing passes: no sentence is supported."""
        return not any(s.supported for s in self.sentences)

    @property
    def kept(self) -> str:
        """The sentences that are supported, or ABSTAIN."""
        return " ".join(s.text for s in self.sentences if s.supported) or ABSTAIN


def numbered(passages: Sequence[Any]) -> str:
    """What stands before a question: the request to cite, and the passages from 1, each with its document's name. `compare`
    measures it, and `serve` sends it."""
    listed = [f"[{n}] {PurePath(p.document).name}\n{p.text.strip()}" for n, p in enumerate(passages, 1)]
    return "\n\n".join([INSTRUCTION, *listed])


def prompt(question: str, passages: Sequence[Passage]) -> str:
    """The question with its passages, numbered from 1."""
    return f"{numbered(passages)}\n\n{question}"


def answer(question: str, passages: Sequence[Passage], ask: Callable[[str], str]) -> Cited:
    """Ask a model (prompt -> answer) and check what it says; without passages it is not asked. `.kept` is what may be shown."""
    return check(ask(prompt(question, passages)) if passages else ABSTAIN, passages)


def check(answer: str, passages: Sequence[Passage]) -> Cited:
    """Which `[n]` of an answer exist, n being the nth of `passages` from 1, and which support their sentence."""
    sentences: list[Sentence] = []
    citations: list[Citation] = []
    held = {n: _content(f"{p.context}\n{p.text}") for n, p in enumerate(passages, 1)}
    for start, end in _sentences(answer):
        text = answer[start:end]
        numbers = tuple(dict.fromkeys(int(n) for m in _CITED.finditer(text) for n in re.findall(r"\d+", m[1])))
        said = _content(_CITED.sub(" ", text))
        if not said and not numbers:
            continue
        there = [n for n in numbers if n in held]
        supported = _supports(said, [held[n] for n in there])
        place = len(sentences)
        for n in numbers:
            alone = supported and n in held and _supports(said, [held[n]])
            needed = supported and n in held and not _supports(said, [held[m] for m in there if m != n])
            citations.append(Citation(n, place, n in held, alone or needed))
        sentences.append(Sentence(text, start, end, numbers, _cover(said, [held[n] for n in there]), supported))
    return Cited(answer, tuple(sentences), tuple(citations))


def _sentences(answer: str) -> list[tuple[int, int]]:
    """A citation behind the full stop belongs to the sentence before it. A line's end ends a sentence (lists)."""
    out: list[tuple[int, int]] = []
    at = 0
    for line in answer.splitlines(keepends=True):
        first = True
        for a, b in spans(line):
            a, b = at + a, at + b
            lead = _LEADING.match(answer, a, b)
            if lead and out and not first:
                out[-1] = (out[-1][0], lead.end())
                a = lead.end() + len(answer[lead.end() : b]) - len(answer[lead.end() : b].lstrip())
            first = False
            if a < b:
                out.append((a, b))
        at += len(line)
    return out


def _content(text: str) -> set[str]:
    """Content words without their endings, and numbers."""
    numbers = {n.replace(",", "") for n in _NUMBER.findall(text)}
    return {_ENDINGS.sub("", w) for w in words(text) if w not in STOP and not w.isdecimal()} | numbers


def _cover(said: set[str], held: Sequence[set[str]]) -> float:
    return len(said & set().union(*held)) / len(said) if said else 0.0


def _supports(said: set[str], held: Sequence[set[str]]) -> bool:
    numbers = {w for w in said if w[0].isdecimal()}
    return bool(said) and numbers <= set().union(*held) and _cover(said, held) >= SUPPORT
