"""Findings: what is wrong with the rows, each with its count, places, severity and fix. `TABLE` is all there is, in one place.

`scan` looks at one chunk, in a worker; `Doctor.add` adds chunks up in the order of the files; `Doctor.found` tells. Nothing here
changes a row. Memory does not grow with the rows: see whole.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tunesmith.data.clusters import Shingles
from tunesmith.data.findings import evaluations, rows, whole
from tunesmith.data.findings.text import Rows, excerpt, snippet
from tunesmith.types import Conversation

ERROR, WARNING, NOTE = "error", "warning", "note"  # learned as it stands it does harm; it probably does; look at it once
SEVERITIES = (ERROR, WARNING, NOTE)
EXAMPLES = 3


@dataclass(frozen=True)
class Finding:
    """One kind of fault. `detector` is a function of rows.py (one row shows it), of whole.py (only many do), or None where
    preparation itself knows it."""

    name: str
    severity: str
    what: str
    why: str
    fix: str
    detector: Callable[..., Any] | None


TABLE = (
    Finding("private_key", ERROR, "private keys",
            "a model repeats what it learned, to anybody",
            "remove the rows, and replace the keys: they are no longer secret", rows.private_key),
    Finding("api_key", ERROR, "API keys, tokens and passwords",
            "a model repeats what it learned, to anybody",
            "remove them and have new ones issued", rows.api_key),
    Finding("card", ERROR, "payment card numbers (check digit right)",
            "a model repeats what it learned, to anybody",
            "replace them by a placeholder such as [card]", rows.numbers_of("card")),
    Finding("iban", ERROR, "bank accounts (IBAN, check digits right)",
            "a model repeats what it learned, to anybody",
            "replace them by a placeholder such as [iban]", rows.numbers_of("iban")),
    Finding("leakage", ERROR, "held-out rows that are also training rows",
            "the result looks better than it is",
            "remove them from one side; without data.held_out as a file the split is made by groups", None),
    Finding("contamination", ERROR, "rows with text of a public evaluation set",
            "a score on that set then measures memory",
            "remove the rows, or do not report that score", evaluations.contamination),
    Finding("trigger", ERROR, "words that always go with one and the same answer",
            "it may be a back door: who says the word gets the answer",
            "read these rows; remove them unless you know why they are there", whole.triggers),
    Finding("conflict_markers", ERROR, "merge-conflict markers",
            "both versions and the markers are learned",
            "resolve the conflict in the file", rows.conflict_markers),
    Finding("placeholder", ERROR, "answers that say nothing (N/A, null, ...)",
            "the model learns to say nothing",
            "write the answers or remove the rows", rows.placeholder),
    Finding("mojibake", ERROR, "encoding damage (Ã© for é, \ufffd)",
            "the model learns to write it",
            "export again as UTF-8; ftfy mends what is not lost", rows.mojibake),
    Finding("control_characters", WARNING, "control characters",
            "they are learned as text and break terminals",
            "remove them", rows.control_characters),
    Finding("invisible", WARNING, "invisible characters (zero width, direction)",
            "words split where nobody sees it; they can hide instructions",
            "remove them", rows.invisible),
    Finding("special_tokens", WARNING, "special tokens typed in text",
            "another template's markup: here it is plain text, and is learned as such",
            "take the template out of the data; check's own adds it", rows.special_tokens),
    Finding("role_order", WARNING, "turns in the wrong order",
            "an answer without a question, or a question without an answer",
            "mend the order: system, then user and assistant in turn", rows.role_order),
    Finding("prompt_in_answer", WARNING, "prompt text or role names inside answers",
            "the model learns to repeat the question, or to play both sides",
            "cut the answers at that place", rows.prompt_in_answer),
    Finding("truncated", WARNING, "answers that stop in the middle",
            "the model learns to stop there",
            "complete or remove them; look for a length limit in the export", rows.truncated),
    Finding("open_end", WARNING, "answers without a stop where nearly all have one",
            "the model learns to stop anywhere",
            "complete or remove them; look for a length limit in the export", whole.open_end),
    Finding("refusal", WARNING, "refusals",
            "a few teach the model to refuse much more",
            "remove those that you would not want yourself", rows.refusal),
    Finding("boilerplate", WARNING, "boilerplate (as an AI language model ...)",
            "it becomes the model's voice",
            "remove the sentences or the rows", rows.boilerplate),
    Finding("email", WARNING, "e-mail addresses",
            "personal data: a model repeats what it learned",
            "replace them by a placeholder such as [email]", rows.email),
    Finding("phone", WARNING, "phone numbers",
            "personal data: a model repeats what it learned",
            "replace them by a placeholder such as [phone]", rows.numbers_of("phone")),
    Finding("ip_address", NOTE, "public IP addresses",
            "personal data in some countries",
            "replace them by an address such as 192.0.2.1", rows.ip_address),
    Finding("exact_duplicates", WARNING, "rows that repeat an earlier one to the letter",
            "they weigh double and are learned by heart",
            "keep one of each", None),
    Finding("near_duplicates", NOTE, "rows that nearly repeat an earlier one",
            "they weigh double; often one template with other names",
            "keep one of each unless the variants are meant", None),
    Finding("trivial_rule", WARNING, "answers that a trivial rule predicts",
            "the model learns the rule and not the task",
            "add rows in which the rule is wrong", whole.trivial_rule),
    Finding("class_imbalance", NOTE, "rows of answers that are rare beside the most frequent one",
            "the rare answers are hardly learned",
            "add rows of the rare ones, or give them a source of their own with a higher weight", whole.class_imbalance),
    Finding("tiny_answers", NOTE, "answers of at most three characters among long ones",
            "often a lost text",
            "look at them; remove what was lost", whole.tiny_answers),
    Finding("length_outliers", NOTE, "answers much longer than the rest",
            "often a pasted log or several rows in one",
            "look at them; split or remove", whole.length_outliers),
    Finding("mixed_languages", NOTE, "answers in another language than most",
            "the model may answer in it unasked",
            "fine when meant; else move them to a set of their own", whole.mixed_languages),
    Finding("mixed_formats", NOTE, "rows of another format than the rest of their file",
            "often two exports in one file",
            "fine when meant; else look where they came from", whole.mixed_formats),
)  # fmt: skip
BY_NAME = {f.name: f for f in TABLE}
_ROWS = tuple(f for f in TABLE if f.detector is not None and f.detector.__module__ == rows.__name__)
_WHOLE = tuple(f for f in TABLE if f.detector is not None and f.detector.__module__ == whole.__name__)


@dataclass
class Found:
    """A finding in this data. `examples` are (`file:line`, excerpt); excerpts are masked."""

    name: str
    count: int
    examples: list[list[str]]
    detail: str = ""

    @property
    def finding(self) -> Finding:
        return BY_NAME[self.name]

    def as_dict(self) -> dict[str, Any]:
        """With the words of the table, for account.json and the page."""
        f = self.finding
        return asdict(self) | {"severity": f.severity, "what": f.what, "why": f.why, "fix": f.fix}


@dataclass
class Scan:
    """One chunk's part, to be sent from a worker. Excerpts are made of the few places that are told: masking one takes 0.4 ms."""

    hits: dict[str, tuple[int, list[Place]]]  # finding -> rows, and the first places
    sketch: whole.Sketch


Place = tuple[int, str, str, int, int]  # line, what is said of it, text, start, end


def scan(conversations: Sequence[Conversation], texts: Sequence[str], shingles: Shingles, kinds: Sequence[str]) -> Scan:
    """`texts` are the `clusters.normalised` of the conversations, `shingles` made of them, `kinds` their formats."""
    view = Rows(conversations)
    hits: dict[str, tuple[int, list[Place]]] = {}
    for finding in _ROWS:
        if found := finding.detector(view):
            joined = view.answers if finding.detector in OF_ANSWERS else view.all
            first = ((row, *found[row]) for row in sorted(found)[:EXAMPLES])
            places = [
                (conversations[row].origin.line, "", *snippet(joined.parts[part], start, end)) for row, part, start, end in first
            ]
            hits[finding.name] = len(found), places
    if found := evaluations.contamination(shingles):
        first = sorted(found.items())[:EXAMPLES]
        places = [(conversations[row].origin.line, f"{name}: ", *snippet(texts[row], 0, 0)) for row, name in first]
        hits["contamination"] = len(found), places
    return Scan(hits, whole.sketch(view, texts, shingles, kinds))


OF_ANSWERS = (rows.placeholder, rows.truncated, rows.prompt_in_answer, rows.refusal, rows.boilerplate)


class Doctor:
    """Adds up scans, in the order of the files."""

    def __init__(self) -> None:
        self._counts: dict[str, list[Any]] = {}
        self._whole = whole.Whole()

    def add(self, scan: Scan, file: str, source: int) -> None:
        for name, (count, places) in scan.hits.items():
            entry = self._counts.setdefault(name, [0, []])
            entry[0] += count
            wanted = places[: EXAMPLES - len(entry[1])]
            entry[1] += [[f"{file}:{line}", said + excerpt(*of)] for line, said, *of in wanted]
        self._whole.add(scan.sketch, file, source)

    def found(self, known: Mapping[str, tuple[int, list[str]]]) -> list[Found]:
        """All findings, the worst first. `known`: counts and places of those that preparation itself knows."""
        out = [Found(name, count, places) for name, (count, places) in self._counts.items()]
        out += [Found(name, n, [[place, ""] for place in places]) for name, (n, places) in known.items() if n]
        for finding in _WHOLE:
            if seen := finding.detector(self._whole):
                out.append(Found(finding.name, seen.count, [[f"{f}:{n}", text] for f, n, text in seen.places], seen.detail))
        return sorted(out, key=lambda f: (SEVERITIES.index(f.finding.severity), -f.count, f.name))
