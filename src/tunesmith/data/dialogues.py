"""Dialogues written as text (.txt, .md): who speaks is found by the marks at the beginning of lines.

    User: ...                    **Anna:** ...                 ## Assistant              [12.03.24, 14:05] Anna: ...
    Assistant: ...               **Ben**: ...                  text below it             12/03/2024, 14:05 - Ben: ...

A file is a dialogue only if its first 64 kB leave no doubt: names of roles on both sides, stamped messages of two people, or two
names that take turns. A play with ten voices, a text with `Note:` in it and a page of fields stay raw text. Who is the assistant is
told with the reason; data.train[].columns: {answer: NAME} says it, {text: "*"} keeps everything raw text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from tunesmith.data.columns import PLAIN, word_set

HEAD = 64 << 10  # bytes of a file that are looked at
ROW_CHARS, ROW_TURNS = 64 << 10, 200  # a row is cut before a user's turn beyond either
MOST_CHARS, MOST_TURNS = 4 << 20, 4_000  # and at any turn beyond these; a single turn over the first is refused
MOST_NAMES = 10_000  # speakers counted over a folder
TAKES_TURNS = 4  # speaker lines that two names without a role must have, 3 of 4 of them a change of speaker

# Names that say a role, without accents.
ASSISTANT = word_set(
    """assistant ai bot chatbot chatgpt gpt gpt-4 gpt-4o model claude gemini copilot mistral llama agent support advisor answer a
    antwort assistent assistentin berater kundenservice kundendienst service reponse respuesta asistente risposta assistente
    resposta antwoord"""
)
USER = word_set(
    """user human you me customer client prompter question q frage nutzer nutzerin benutzer mensch kunde kundin ich du utilisateur
    pregunta usuario cliente domanda utente pergunta vraag gebruiker klant"""
)
SYSTEM = frozenset(("system",))
FIELDS = word_set(  # what stands before a colon and is nobody's name
    """note notes title subject date topic re from to cc summary author source url link tags tag example examples warning tip hint
    step result status version name description keywords category language license titel betreff datum thema von an quelle hinweis
    beispiel anmerkung achtung zusammenfassung autor stichworte ingredients zutaten todo fixme ps http https"""
)
QUESTIONS = word_set("question q frage pregunta domanda pergunta vraag")  # with these each pair stands for itself

_DAY, _TIME = r"(\d{1,4}[./-]\d{1,2}[./-]\d{1,4})", r"\d{1,2}[:.]\d{2}(?:[:.]\d{2})?(?:[ \u202f]?[APap]\.?[Mm]\.?)?"
_STAMP = re.compile(rf"[\u200e\u200f\ufeff]*\[?{_DAY},?[ \u202f]{_TIME}(?:\]|(?=\s*[-–])|(?=[ :]))\s*[-–:]?\s+(.*)", re.DOTALL)
_NAMED = re.compile(r"[\u200e\u200f~ ]*([^:\n]{1,60}?):(?:\s+|$)(.*)", re.DOTALL)
_BOLD = re.compile(r"\s{0,3}(\*\*|__)([^*_:\n]{1,40}?)(?::\s*\1|\1\s*:)\s*(.*)", re.DOTALL)
_HEADING = re.compile(r"#{1,6}\s+\**([^#:*\s][^#:*\n]{0,39}?)[*:\s]*")
_PLAIN = re.compile(r"([^\W\d_][^:\n<>{}\[\]()|\"/=]{0,39}?)\s?:(?:\s+(.*)|$)", re.DOTALL)
_RULE = re.compile(r"\s*([-*=_])(?:\s*\1){2,79}\s*$")
_LEFT_OUT = r"(?:image|video|audio|sticker|GIF|document|Bild|Video) (?:omitted|weggelassen)"
_MEDIA = re.compile(rf"\u200e?<?\s*(?:Media omitted|Medien ausgeschlossen|{_LEFT_OUT})>?\s*$")


@dataclass(frozen=True)
class Look:
    """What the beginning of a file says: the style of its speaker lines, and its speakers in the order in which they come."""

    style: str
    speakers: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """How a file is read. Names are in lower case."""

    style: str
    names: frozenset[str]
    assistants: frozenset[str]
    system: str = ""
    several: bool = False  # more than one user: their names stay in the text
    pairs: bool = False


class SpeakerError(Exception):
    """The speaker that the person named is not there. The text says what is."""


@dataclass
class Voices:
    """How often each speaker is in a file of the folder: who is in most of them is more likely the one who answers."""

    files: Counter[str] = field(default_factory=Counter)

    def add(self, look: Look) -> None:
        for name in look.speakers:
            if name in self.files or len(self.files) < MOST_NAMES:
                self.files[name] += 1


def role_of(name: str) -> str:
    """The role that a name says, or nothing."""
    plain = re.sub(r"\s+(said|says|wrote|schrieb|sagt|sagte)$", "", name).translate(PLAIN)
    return "assistant" if plain in ASSISTANT else "user" if plain in USER else "system" if plain in SYSTEM else ""


def look(head: str, given: Mapping[str, str]) -> Look | None:
    """Whether a file is a dialogue, by its beginning."""
    asked_for = {_name(n) for n in given.values()}
    for style in ("stamped", "bold", "heading", "plain"):
        found, before, lines, fence = [], 0, 0, False
        for line in head.splitlines():
            if not line.strip():
                continue
            lines += 1
            if line.lstrip().startswith("```"):
                fence = not fence
            if not fence and (said := _speaker(line, style)) and said[0]:
                found.append(said[0])
            elif not found:
                before += 1
        if _is_dialogue(style, found, before, lines, asked_for):
            return Look(style, tuple(dict.fromkeys(_speakers(style, found, asked_for))))
    return None


def _speakers(style: str, found: list[str], asked_for: set[str]) -> list[str]:
    """Those of the names before a colon that are somebody's. Where both roles are named, other names are text."""
    if style == "stamped":
        return found
    roles = {role_of(n) for n in found}
    if {"user", "assistant"} <= roles:
        return [n for n in found if role_of(n) or n in asked_for]
    return [n for n in found if n not in FIELDS or n in asked_for]


def _is_dialogue(style: str, found: list[str], before: int, lines: int, asked_for: set[str]) -> bool:
    names = _speakers(style, found, asked_for)
    different = set(names)
    if style == "stamped":
        return len(different) >= 2 and 5 * len(found) >= lines
    if len(different) < 2 or before > 10:
        return False
    if asked_for & different:
        return True
    roles = {role_of(n) for n in different}
    if {"user", "assistant"} <= roles:
        return True
    people = {n for n in different if role_of(n) != "system"}
    if style == "heading" or len(people) != 2 or before > 1 or FIELDS & set(found):
        return False
    if "" not in roles:
        return False
    if len(roles - {"system"}) > 1:  # a role and a name: `Customer:` and `Anna:`
        return len(names) >= 2
    changes = sum(a != b for a, b in pairwise(names))
    return len(names) >= TAKES_TURNS and 4 * changes >= 3 * (len(names) - 1)


def plan(found: Look, given: Mapping[str, str], voices: Voices) -> tuple[Plan, str]:
    """Who is the assistant, and how that is told. SpeakerError when the one that the person named does not speak."""
    people = [n for n in found.speakers if role_of(n) != "system" and n != _name(given.get("system", ""))]
    wanted, asking = _name(given.get("answer", "")), _name(given.get("prompt", ""))
    for name, key in ((wanted, "answer"), (asking, "prompt")):
        if name and name not in found.speakers:
            raise SpeakerError(
                f"{given[key]!r}, the {key} by data.train[].columns, does not speak; {', '.join(found.speakers[:8])} do"
            )
    letters = not QUESTIONS.isdisjoint(people)  # `A:` answers where there is a `Q:`; beside `B:` it is only the first to speak
    if not people:
        raise SpeakerError("nobody but the system text speaks")
    known = [n for n in people if role_of(n) == "assistant" and (n != "a" or letters)]
    users = [n for n in people if role_of(n) == "user"]
    if wanted:
        assistant, why = wanted, "as you wrote"
    elif asking and len(people) == 2:
        assistant, why = next(n for n in people if n != asking), "as you wrote"
    elif known:
        assistant, why = known[0], "by the name"
    elif len(people) == 2 and len(users) == 1:
        assistant, why = next(n for n in people if n not in users), "guessed: the other is the user by the name"
    else:
        most = sorted(people, key=lambda n: -voices.files[n])
        if len(most) > 1 and voices.files[most[0]] > max(1, voices.files[most[1]]):
            assistant, why = most[0], "guessed: in more of the files than the others"
        else:
            assistant, why = people[1] if len(people) > 1 else people[0], "guessed: the second to speak"
    names = frozenset(found.speakers) | (SYSTEM if found.style != "stamped" else frozenset())
    pairs = bool(users) and QUESTIONS.issuperset(users) and not wanted
    assistants = frozenset((assistant, *(known if not wanted else ())))
    told = f"read as a dialogue: {assistant!r} is the assistant ({why})"
    return Plan(found.style, names, assistants, _name(given.get("system", "")), len(set(people) - assistants) > 1, pairs), told


def read(lines: Iterable[str], how: Plan, notes: Counter[str]) -> Iterator[tuple[int, dict[str, Any] | str, int]]:
    """(line, row, characters) of each conversation; a text instead of a row says why it is refused."""
    row = _Row(1)
    rule = ""  # a line of dashes: the end of a conversation if a speaker follows, else part of what is said
    fence = False
    for number, line in enumerate(lines, 1):
        if line.lstrip().startswith("```"):
            fence = not fence
        said = None if fence else _speaker(line, how.style)
        if said is not None and said[0] and how.style != "stamped" and said[0] not in how.names:
            said = None
        if said is None:
            if not fence and row.turns and _RULE.match(line):
                rule += line
            elif row.turns:
                row.more(rule + line)
                rule = ""
            elif line.strip():
                notes["line before the first speaker left out"] += 1
            continue
        name, text, new_day = said
        if not name:
            notes["line without a speaker left out"] += 1
            continue
        if _MEDIA.match(text):
            notes["message without its picture, film or sound left out"] += 1
            continue
        role = "assistant" if name in how.assistants else "user"
        if name == how.system or (role_of(name) == "system" and role == "user"):
            role = "system"
        why = _cut(row, role, bool(rule), new_day != row.day, how)
        if why:
            yield row.made(how)
            notes[f"dialogue cut into rows {why}"] += 1
            row = _Row(number)
        if not row.turns:
            row.start, row.day = number, new_day
        rule = ""
        row.turn(role, name, text)
    if row.turns:
        row.more(rule)
        yield row.made(how)


def _cut(row: _Row, role: str, rule: bool, next_day: bool, how: Plan) -> str:
    """Why a new row begins with this turn; empty when none does."""
    if row.chars > MOST_CHARS or len(row.turns) >= MOST_TURNS:
        return "for its length"
    if role == "assistant" or not row.answered:
        return ""
    if rule:
        return "at a line of dashes"
    if role == "system" and row.turns[-1][0] != "system":
        return "at a system text"
    if role != "user" or row.turns[-1][0] != "assistant":
        return ""
    if how.pairs:
        return "after each answer"
    if next_day:
        return "where the day changes"
    return "for its length" if row.chars > ROW_CHARS or len(row.turns) >= ROW_TURNS else ""


class _Row:
    """A conversation as it is read."""

    def __init__(self, start: int):
        self.start, self.turns, self.chars, self.last = start, [], 0, 0
        self.answered, self.over, self.day = False, False, ""

    def turn(self, role: str, name: str, text: str) -> None:
        self.turns.append((role, name, [text]))
        self.chars += len(text)
        self.last = len(text)
        self.answered |= role == "assistant"

    def more(self, text: str) -> None:
        self.chars += len(text)
        self.last += len(text)
        self.over |= self.last > MOST_CHARS
        if not self.over:
            self.turns[-1][2].append(text)

    def made(self, how: Plan) -> tuple[int, dict[str, Any] | str, int]:
        if self.over:
            return self.start, f"a turn longer than {MOST_CHARS >> 20} MB", 0
        messages = []
        for role, name, parts in self.turns:
            text = "".join(parts).replace("\r\n", "\n").replace("\r", "\n").strip()
            if role == "user" and how.several:
                text = f"{name}: {text}"
            if "\0" in text:
                return self.start, "a zero character (NUL) in the text", 0
            messages.append({"role": role, "content": text})
        return self.start, {"messages": messages}, self.chars


def _name(text: str) -> str:
    return " ".join(text.strip("\u200e\u200f\u202a\u202c\ufeff~*_ \t").casefold().split())


def _speaker(line: str, style: str) -> tuple[str, str, str] | None:
    """(name, text behind it, day) of a line that begins a turn; the name is empty for a stamped line that nobody says."""
    if style == "stamped":
        if (m := _STAMP.match(line)) is None:
            return None
        day, rest = m[1], m[2]
        named = _NAMED.match(rest)
        return (_name(named[1]), named[2], day) if named else ("", rest, day)
    if style == "heading":
        line = line.strip()
        m = _HEADING.fullmatch(line) if len(line) < 80 else None  # in a long run of spaces the search takes its square
        name = _name(m[1]) if m else ""
        return (name, "", "") if role_of(name) else None
    if style == "bold":
        m = _BOLD.match(line)
        return (_name(m[2]), m[3], "") if m and _name(m[2]) else None
    m = _PLAIN.match(line)
    if m is None or len(m[1].split()) > 4:
        return None
    name = _name(m[1])
    return (name, m[2] or "", "") if role_of(name) or m[1][0].isupper() or not m[1][0].islower() else None
