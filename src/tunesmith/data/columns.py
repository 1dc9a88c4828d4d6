"""Which column of a table is the question and which the answer, when their names are not ones that a format knows.

The names decide, then the contents of the first rows; what stays open is an error that says how to settle it, never a silent
choice. Whatever was guessed is a note, and so is every column that is not used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

KEYS = {"prompt": "question", "answer": "answer", "system": "system", "id": "id", "text": "text"}
"""What data.train[].columns may name -> the key that formats.py reads."""

SAMPLE_ROWS, SAMPLE_CHARS = 100, 1 << 20  # of a file, for the look at the contents
LONG_TEXT = 200  # characters on average from which one column alone is taken for text to read, not for a label
SENTENCE = 20  # two unnamed columns are question and answer only if one is at least this long on average: not two names
A_ROW_NOT_A_NAME = 60  # characters: a longer "column name" is a row's content


def word_set(names: str) -> frozenset[str]:
    return frozenset(names.split())


# Whole names and single words of names, in the languages that exports come in; without accents, in lower case.
NAMES = {
    "prompt": word_set(
        """question questions prompt instruction instructions query user human customer client request asked ask inquiry enquiry
        input problem ticket frage fragen anfrage kunde kundenfrage eingabe aufgabe pregunta consulta cliente entrada demande
        requete domanda richiesta pergunta pedido vraag klant fraga pytanie"""
    ),
    "answer": word_set(
        """answer answers response responses reply replies completion output assistant agent solution resolution bot gpt antwort
        antworten losung loesung ausgabe reponse respuesta salida risposta resposta antwoord oplossing svar odpowiedz"""
    ),
    "system": word_set("system persona systemprompt"),
    "id": word_set("id uuid guid nr key rowid"),
    "text": word_set(
        """text body content article story document passage inhalt artikel texte contenu contenido testo texto tekst"""
    ),
}
ABOUT = word_set(  # `answer_date`, `customer name`: a fact about it, not itself
    """id uuid nr no number date datum time timestamp created updated at on by name email mail phone count length len type typ
    status state lang language score rating url link tokens model author category kategorie tag tags priority"""
)
_NUMBER = re.compile(r"[-+]?[\d.,\s]*\d[\d.,\s]*%?")
_DATE = re.compile(r"\d{1,4}[-./]\d{1,2}[-./]\d{1,4}([T ,]+\d{1,2}:\d{2}(:\d{2})?.*)?")
_ADDRESS = re.compile(r"\S+@\S+\.\w+|https?://\S+")
PLAIN = str.maketrans("äàáâãåçèéêëìíîïñòóôõöøùúûüýąćęłńśźż", "aaaaaaceeeeiiiinoooooouuuuyacelnszz")


class ColumnsError(Exception):
    """The columns cannot be told. `what`, and the `fix`."""

    def __init__(self, what: str, fix: str):
        super().__init__(what)
        self.what, self.fix = what, fix


def choose(names: Sequence[str], sample: Sequence[Sequence[str]], given: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """(role -> column, what is to be told). `given` is what the person wrote; the rest is guessed."""
    chosen = {role: _written(column, names) for role, column in given.items()}
    cells = {n: [row[i] for row in sample if i < len(row) and row[i].strip()] for i, n in enumerate(names)}
    told = {role: "as you wrote" for role in chosen}
    if "text" not in chosen and not {"prompt", "answer"} <= chosen.keys():
        if any(n.rstrip().endswith("?") or len(n) > A_ROW_NOT_A_NAME for n in names):
            raise ColumnsError(
                "the first line looks like a row, not like the names of columns",
                "put a line with the names above it, such as question,answer",
            )
        _guess(list(names), cells, chosen, told)
    notes = [f"column {chosen[role]!r} read as the {_SAID[role]} ({why})" for role, why in told.items()]
    notes += [f"column {n!r} not used" for n in names if n not in chosen.values()]
    return chosen, notes


_SAID = {"prompt": "prompt", "answer": "answer", "system": "system text", "id": "row's id", "text": "text"}


def rename(value: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any] | str:
    """A row under the keys that formats.py reads; or why it cannot be."""
    for role in ("prompt", "answer", "text"):
        if role in columns and value.get(columns[role]) is None:
            return f"{columns[role]!r}, the {role} by data.train[].columns, is missing or null"
    return {KEYS[role]: value[column] for role, column in columns.items() if column in value}


def settle(names: Sequence[str]) -> str:
    """How a person names the columns."""
    few = ", ".join(map(repr, names[:12])) + (" ..." if len(names) > 12 else "")
    return (
        "say which is which in the run file: data: {train: [{path: ..., columns: {prompt: NAME, answer: NAME}}]}, or "
        f"columns: {{text: NAME}} for raw text; the names are {few}"
    )


def _written(column: str, names: Sequence[str]) -> str:
    if column in names:
        return column
    near = [n for n in names if _plain(n) == _plain(column)]
    if len(near) == 1:
        return near[0]
    raise ColumnsError(f"data.train[].columns names {column!r}, which is no column", settle(names))


def _guess(names: list[str], cells: dict[str, list[str]], chosen: dict[str, str], told: dict[str, str]) -> None:
    """Fill `chosen` in. ColumnsError when more than one way is open."""
    kinds = {n: _kind(c) for n, c in cells.items()}
    free = [n for n in names if n not in chosen.values()]

    def take(role: str, column: str, why: str) -> None:
        chosen[role], told[role] = column, f"guessed from {why}"
        free.remove(column)

    if len(pair := [n for n in free if _plain(n) in ("q", "a")]) == 2:  # only together: A alone is a spreadsheet's first column
        for role, letter in (("prompt", "q"), ("answer", "a")):
            for n in pair:
                if _plain(n) == letter and role not in chosen:
                    take(role, n, "its name")
    for role in ("prompt", "answer", "system", "id"):
        if role in chosen:
            continue
        scores = {n: _score(n, role, kinds[n]) for n in free}
        best = [n for n, s in scores.items() if s and s == max(scores.values())]
        if len(best) == 1:
            take(role, best[0], "its name")
        elif best and role in ("prompt", "answer"):
            raise ColumnsError(f"several columns may be the {role}: {', '.join(map(repr, best))}", settle(names))
    words = [n for n in free if kinds[n] == "words" and not (ABOUT & set(_plain(n).split()) and _mean(cells[n]) < SENTENCE)]
    asked, answered = "prompt" in chosen, "answer" in chosen
    if asked and answered:
        return
    if asked or answered:
        role = "answer" if asked else "prompt"
        if len(words) != 1:
            told_so = f"no column looks like the {role}" if not words else f"several may be: {', '.join(map(repr, words))}"
            raise ColumnsError(f"the {role}'s column cannot be told: {told_so}", settle(names))
        take(role, words[0], "being the only other column of text")
        return
    named = [n for n in words if _score(n, "text", kinds[n]) == 2] or [n for n in words if _score(n, "text", kinds[n])]
    if len(named) == 1:
        take("text", named[0], "its name")
    elif len(words) == 1 and _mean(cells[words[0]]) >= LONG_TEXT:
        take("text", words[0], "being the only column of text")
    elif len(words) == 2:
        first, second = words
        asks = [sum(c.rstrip().endswith(("?", "？")) for c in cells[n]) / max(1, len(cells[n])) for n in words]
        if abs(asks[0] - asks[1]) >= 0.5:
            first, second = (first, second) if asks[0] > asks[1] else (second, first)
            take("prompt", first, "its question marks")
            take("answer", second, "being the other column of text")
        elif max(_mean(cells[n]) for n in words) >= SENTENCE:
            take("prompt", first, "being the first of two columns of text")
            take("answer", second, "being the second of two columns of text")
    if not {"text", "answer"} & chosen.keys():
        raise ColumnsError(
            "which columns hold the questions and the answers cannot be told from their names or contents", settle(names)
        )


def _plain(name: str) -> str:
    """`userMessage`, `User-Message`, ` user message ` -> `user message`."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name.strip()).casefold().translate(PLAIN)
    return " ".join(re.findall(r"\w+", name.replace("_", " ")))


def _score(name: str, role: str, kind: str) -> int:
    """2: the whole name says it; 1: a word of it does; 0: nothing, or the contents speak against it."""
    plain = _plain(name)
    if kind == "empty" or (kind != "words" and role in ("prompt", "system", "text")):
        return 0
    if plain in NAMES[role] or plain.replace(" ", "") in NAMES[role]:
        return 2
    words = plain.split()
    if role in ("id", "text"):
        return int(words[-1:] != [] and words[-1] in NAMES[role])
    if kind not in ("words", "label") or ABOUT.intersection(words):
        return 0
    return int(any(w in NAMES[role] and len(w) > 1 for w in words))


def _kind(cells: list[str]) -> str:
    """What a column holds, by its first cells that are not empty."""
    if not cells:
        return "empty"
    cells = [c.strip() for c in cells]
    for kind, pattern in (("number", _NUMBER), ("date", _DATE), ("address", _ADDRESS)):
        if all(pattern.fullmatch(c[:200]) for c in cells):
            return kind
    if len(cells) >= 5 and len(set(cells)) == 1:
        return "constant"
    if len(set(cells)) == len(cells) and all(len(c) <= 64 and any(x.isdigit() for x in c) and " " not in c for c in cells):
        return "code"
    if len(cells) >= 10 and 5 * len(set(cells)) <= len(cells) and _mean(cells) < 2 * SENTENCE:
        return "label"
    return "words"


def _mean(cells: list[str]) -> float:
    return sum(map(len, cells)) / max(1, len(cells))
