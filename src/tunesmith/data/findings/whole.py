"""Faults that only many rows show: what is rare, what always goes together, what is far from the rest.

Workers send a `Sketch` of each chunk, the parent adds them up in the order of the files, so that the result does not depend on how
many workers there were. A sketch is some 30 bytes a row; what is kept over all rows is bounded by the constants below.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tunesmith.data.clusters import PUNCTUATION, Shingles
from tunesmith.data.findings.text import ANSWERS, EXCERPT, PROMPTS, Rows, excerpt, snippet
from tunesmith.types import Conversation
from tunesmith.wording import counted

LABELS_KEPT = 20_000  # distinct answers that are counted; beyond it the rarest are dropped
TOP = 3  # longest answers that are remembered
BINS, PER_OCTAVE = 256, 8  # of answer lengths, on a logarithmic scale
BUCKETS = 1 << 20  # of words, for how often each occurs at all: 4 MB
SHARED_IN_CHUNK = 3  # rows of a chunk with one answer from which the words of their prompts are looked at
PROMPT_WORDS = 200
KINDS_KEPT = 12
RULE_LABELS = 400  # distinct answers up to which a set is one of labels
LABEL_LENGTH = 80
OPEN_ENDED = 81  # characters from which an answer is expected to end with a stop

WORDS = {
    "English": "the and is of to in that it for was with as are this be on have not you what how from by which can will",
    "German": "der und ist das nicht ein eine zu den mit von für auf wie ich sie es im dem auch sich wird werden",
    "French": "le la les et est des une un dans que qui pas vous avec au du ce il elle sont nous être",
    "Spanish": "el los las y es que una un para por con se del como su más pero está al lo este ser muy",
    "Italian": "il di che è una un con sono della del le gli si più anche questo alla nel ma dei",
    "Portuguese": "os as é que uma um para não com da em por como mais dos das você ao são ser seu está",
    "Dutch": "het een dat niet op te zijn voor de ik je aan ook als bij naar wordt",
    "Polish": "nie jest się na że jak z w co po ale za od przez dla są czy być może który tego",
    "Turkish": "bir ve bu için ile çok daha olarak gibi ne var olan değil mi ama sonra kadar her",
}
_LANGUAGE: dict[str, str] = {}
for _name, _words in WORDS.items():
    for _word in _words.split():
        _LANGUAGE[_word] = "" if _word in _LANGUAGE else _name  # a word of two languages tells neither
_TELLING = {word for word, name in _LANGUAGE.items() if name}
SCRIPTS = (
    ("Japanese", "\u3040", "\u30ff"), ("Korean", "\uac00", "\ud7af"), ("Chinese", "\u4e00", "\u9fff"),
    ("Cyrillic", "\u0400", "\u04ff"), ("Arabic", "\u0600", "\u06ff"), ("Hebrew", "\u0590", "\u05ff"),
    ("Devanagari", "\u0900", "\u097f"), ("Thai", "\u0e00", "\u0e7f"), ("Greek", "\u0370", "\u03ff"),
)  # fmt: skip

TRANSLATES = re.compile(
    r"translat|übersetz|tradu[iczs]|vertaal|przetłumacz|перевед|перевод|翻译|翻譯|翻訳|번역"
    r"|\b(?:in|into|to|auf|en|em|ins?) (?:german|french|spanish|italian|portuguese|dutch|polish|turkish|russian|chinese|japanese"
    r"|korean|arabic|hebrew"
    r"|hindi|greek|english|deutsche?|français|español|englisch|französisch)\b",
    re.IGNORECASE,
)
NOT_LATIN = re.compile("[\u0370-\u1cff\u3040-\ud7af]")


def language(text: str) -> str:
    """By script, or by the commonest words of nine languages; "" where a short text tells nothing."""
    if not text.isascii() and NOT_LATIN.search(text):
        counts = Counter(name for c in text[:200] for name, low, high in SCRIPTS if low <= c <= high)
        if counts and sum(counts.values()) > 0.3 * len(text[:200]):
            return "Japanese" if counts["Japanese"] else counts.most_common(1)[0][0]
    if " the " in text and (" is " in text or " of " in text or " and " in text or " to " in text):
        return "English"  # as most rows; the same as counting, at a tenth of the price
    words = text.lower().split()
    told: dict[str, int] = {}
    for word in _TELLING.intersection(words):  # few words of a text, so that there is little to count
        told[_LANGUAGE[word]] = told.get(_LANGUAGE[word], 0) + words.count(word)
    if not told:
        return ""
    name = max(told, key=told.__getitem__)
    most = told.pop(name)
    return name if most >= 3 and most >= 2 * max(told.values(), default=0) else ""


@dataclass
class Sketch:
    """What the parent needs of one chunk besides the rows' own faults."""

    rows: int
    bins: np.ndarray  # of answer lengths
    longest: list[tuple[int, int, str]]  # characters, line, how it begins
    answers: np.ndarray  # crc of the answer [rows with one], uint32
    lines: np.ndarray  # of these rows
    firsts: np.ndarray  # crc of the first word of the prompt, and of the last; empty where the answers are too many for labels
    lasts: np.ndarray
    labels: dict[int, str]  # text of answers that are short
    long: int  # answers of OPEN_ENDED characters or more
    open: list[int]  # lines of those that end in a letter
    short: list[tuple[int, int]]  # characters, line: answers of at most 3 characters
    copies: list[int]  # lines of rows whose answer is the prompt again
    languages: dict[str, tuple[int, list[tuple[int, str]]]]
    formats: dict[str, tuple[int, int]]  # rows and the first line of each format
    words: np.ndarray  # the bucket of each word
    shared: dict[int, Counter[str]]  # answer -> occurrences of words in the prompts of its rows in this chunk


def crc(text: str) -> int:
    return zlib.crc32(text.encode("utf-8", "replace"))


def sketch(rows: Rows, texts: Sequence[str], shingles: Shingles, kinds: Sequence[str]) -> Sketch:
    """`texts` are the rows' `clusters.normalised`, `shingles` made of them, `kinds` the rows' formats."""
    told = [c.origin.line for c in rows.conversations]
    pairs = rows.pairs
    answers, labels, short, copies, long, open_ = [], {}, [], [], 0, []
    sizes = np.zeros(len(pairs), np.int64)
    languages: dict[str, tuple[int, list[tuple[int, str]]]] = {}
    spoken: dict[str, list[tuple[int, str]]] = {}
    for k, (i, prompt, answer) in enumerate(pairs):
        plain = answer.strip()
        sizes[k] = len(plain)
        key = crc(plain[:2000].lower())
        answers.append(key)
        if len(plain) <= LABEL_LENGTH:
            labels.setdefault(key, plain)
            if len(plain) <= 3:
                short.append((len(plain), told[i]))
        elif len(plain) >= OPEN_ENDED:
            long += 1
            if plain[-1].isalpha():
                open_.append(told[i])
        if plain == prompt.strip():
            copies.append(told[i])
    for i, c in enumerate(rows.conversations):
        said = next((m.content for m in reversed(c.messages) if m.role in ANSWERS), c.messages[-1].content)
        if name := language(said[:240]):
            spoken.setdefault(name, []).append((i, said))
    main = max(spoken, key=lambda name: len(spoken[name]), default="")
    others = sum(map(len, spoken.values())) - len(spoken.get(main, ()))
    for name, ones in spoken.items():
        if name != main or others * 10 > len(ones):  # a translation is in another language because the prompt asks for it
            ones = [(i, said) for i, said in ones if not TRANSLATES.search(_asked(rows.conversations[i])[:400])]
        if ones:
            languages[name] = len(ones), [(told[i], said[:EXCERPT]) for i, said in ones[:TOP]]
    formats: dict[str, tuple[int, int]] = {}
    for line, kind in zip(told, kinds, strict=True):
        count, first = formats.get(kind, (0, line))
        formats[kind] = count + 1, first
    order = np.argsort(-sizes, kind="stable")[:TOP].tolist()
    longest = [(int(sizes[k]), told[pairs[k][0]], snippet(pairs[k][2], 0, 0)[0]) for k in order if sizes[k] > 200]
    span, _ = shingles.hashes(1) if len(texts) else (np.zeros(0, np.uint64), None)
    different = len(set(answers))
    ends = [_first_and_last(prompt) for _, prompt, _ in pairs] if different <= RULE_LABELS else []
    often = {a for a, n in Counter(answers).items() if n >= SHARED_IN_CHUNK}
    shared: dict[int, Counter[str]] = {}
    if often and different > len(answers) // 4:  # in a set of labels every answer is shared
        for (_, prompt, _), key in zip(pairs, answers, strict=True):
            if key in often:
                shared.setdefault(key, Counter()).update(_words(prompt))
    return Sketch(
        rows=len(told),
        bins=np.bincount(np.minimum((np.log2(np.maximum(sizes, 1)) * PER_OCTAVE).astype(int), BINS - 1), minlength=BINS),
        longest=longest,
        answers=np.array(answers, np.uint32),
        lines=np.array([told[i] for i, _, _ in pairs], np.int64),
        firsts=np.array([first for first, _ in ends], np.uint32),
        lasts=np.array([last for _, last in ends], np.uint32),
        labels=labels
        if len(labels) <= RULE_LABELS or len(labels) < len(pairs) // 4
        else {k: v for k, v in labels.items() if k in often},
        long=long,
        open=open_,
        short=short[:TOP],
        copies=copies,
        languages=languages,
        formats=formats,
        words=(span >> np.uint64(44)).astype(np.uint32),
        shared=shared,
    )


def _asked(c: Conversation) -> str:
    return next((m.content for m in reversed(c.messages) if m.role in PROMPTS), "")


def _first_and_last(prompt: str) -> tuple[int, int]:
    first, last = prompt[:200].split(None, 1), prompt[-200:].rsplit(None, 1)
    return crc(first[0].lower()) if first else 0, crc(last[-1].lower()) if last else 0


def _words(prompt: str) -> list[str]:
    """As `clusters.normalised` has them, so that their buckets are the same."""
    return prompt.translate(PUNCTUATION).lower().split()[:PROMPT_WORDS]


Place = tuple[str, int, str]  # file, line, excerpt


@dataclass
class Whole:
    """All sketches added up."""

    rows: int = 0
    bins: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    longest: list[tuple[int, str, int, str]] = field(default_factory=list)
    answers: dict[int, list] = field(default_factory=dict)  # count, file, line of the first
    answered: int = 0
    dropped: bool = False
    labels: dict[int, str] = field(default_factory=dict)
    short: list[Place] = field(default_factory=list)
    long: int = 0
    open: int = 0
    open_places: list[Place] = field(default_factory=list)
    copies: int = 0
    copy_places: list[Place] = field(default_factory=list)
    languages: dict[str, list] = field(default_factory=dict)
    formats: dict[int, dict[str, list]] = field(default_factory=dict)
    words: np.ndarray = field(default_factory=lambda: np.zeros(BUCKETS, np.uint32))
    shared: dict[int, Counter[str]] = field(default_factory=dict)
    by_word: dict[str, dict[int, Counter[int]]] = field(default_factory=lambda: {"first": {}, "last": {}})

    def add(self, s: Sketch, file: str, source: int) -> None:
        self.rows += s.rows
        self.answered += len(s.answers)
        self.bins += s.bins
        self.longest = sorted([*self.longest, *((n, file, line, text) for n, line, text in s.longest)], key=lambda e: -e[0])[:TOP]
        self.short += [(file, line, f"{n} characters") for n, line in s.short][: TOP - len(self.short)]
        self.long += s.long
        self.open += len(s.open)
        self.open_places += [(file, line, "") for line in s.open][: TOP - len(self.open_places)]
        self.copies += len(s.copies)
        self.copy_places += [(file, line, "") for line in s.copies][: TOP - len(self.copy_places)]
        for name, (count, places) in s.languages.items():
            entry = self.languages.setdefault(name, [0, []])
            entry[0] += count
            entry[1] += [(file, line, text) for line, text in places][: TOP - len(entry[1])]
        for name, (count, line) in s.formats.items():
            entry = self.formats.setdefault(source, {}).setdefault(name, [0, file, line])
            entry[0] += count
        np.add.at(self.words, s.words, np.uint32(1))
        unique, first, counts = np.unique(s.answers, return_index=True, return_counts=True)
        for key, at, n in zip(unique.tolist(), first.tolist(), counts.tolist(), strict=True):
            if entry := self.answers.get(key):
                entry[0] += n
            else:
                self.answers[key] = [n, file, int(s.lines[at])]
        if len(self.answers) > 2 * LABELS_KEPT:
            self.dropped = True
            self.answers = dict(sorted(self.answers.items(), key=lambda e: -e[1][0])[:LABELS_KEPT])
        if len(self.labels) < LABELS_KEPT:
            self.labels.update(s.labels)
        for key, words in s.shared.items():
            self.shared.setdefault(key, Counter()).update(words)
        if len(self.shared) > 2_000:
            self.shared = dict(sorted(self.shared.items(), key=lambda e: -self.answers.get(e[0], [0])[0])[:1_000])
        if len(self.answers) <= RULE_LABELS:
            for name, column in (("first", s.firsts), ("last", s.lasts)):
                table = self.by_word[name]
                if len(table) < LABELS_KEPT:
                    both, n = np.unique(column.astype(np.uint64) << np.uint64(32) | s.answers, return_counts=True)
                    for pair, count in zip(both.tolist(), n.tolist(), strict=True):
                        table.setdefault(pair >> 32, Counter())[pair & 0xFFFFFFFF] += count

    # ---- what is asked of it -------------------------------------------------------------------------------------------------

    @property
    def are_labels(self) -> bool:
        """Whether the answers are labels: few different ones, each short and seen often."""
        return (
            not self.dropped
            and self.answered >= 40
            and 1 < len(self.answers) <= min(RULE_LABELS, self.answered // 10)
            and all(k in self.labels for k in self.answers)
        )

    def quantile(self, q: float) -> int:
        """Characters of an answer, to an eighth of an octave."""
        total = np.cumsum(self.bins)
        return round(2 ** (int(np.searchsorted(total, q * total[-1])) / PER_OCTAVE)) if total[-1] else 0

    def above(self, characters: float) -> int:
        return int(self.bins[min(BINS, int(np.log2(max(characters, 1)) * PER_OCTAVE) + 1) :].sum())

    def label(self, key: int) -> str:
        return self.labels.get(key, "")


@dataclass
class Seen:
    """What a detector over all rows found."""

    count: int
    places: list[Place]
    detail: str = ""


def tiny_answers(w: Whole) -> Seen | None:
    """Answers of at most three characters where most are much longer: in a set of labels, or of numbers, they are right."""
    count = w.answered - w.above(3.5)
    if count and not w.are_labels and w.quantile(0.25) > 24:
        return Seen(count, w.short, f"half of all answers have {w.quantile(0.5):,} characters or more")
    return None


def open_end(w: Whole) -> Seen | None:
    """Answers that end in a letter where nearly all others have a stop, a bracket, a digit: cut at a limit, in the middle."""
    if w.long >= 40 and 0 < w.open <= 0.1 * w.long:
        return Seen(w.open, w.open_places, f"{1 - w.open / w.long:.1%} of the long answers end with a stop, a bracket or a number")
    return None


def length_outliers(w: Whole) -> Seen | None:
    """Far beyond Tukey's fence on the logarithm of the length, and eight times the median."""
    if w.answered < 40:
        return None
    low, middle, high = (w.quantile(q) for q in (0.25, 0.5, 0.75))
    spread = max(np.log2(max(high, 1) / max(low, 1)), 0.5)
    limit = max(high * 2 ** (3 * spread), 8 * middle, 400)
    count = w.above(limit)
    if not count:
        return None
    places = [(file, line, f"{n:,} characters: {excerpt(text, 0, 0)}") for n, file, line, text in w.longest if n > limit]
    return Seen(count, places, f"longer than {round(limit):,} characters; half of all answers have up to {middle:,}")


def mixed_languages(w: Whole) -> Seen | None:
    told = sum(n for n, _ in w.languages.values())
    if len(w.languages) < 2 or told < 20:
        return None
    ordered = sorted(w.languages.items(), key=lambda e: (-e[1][0], e[0]))
    main, rest = ordered[0], ordered[1:]
    count = sum(n for _, (n, _) in rest)
    shares = ", ".join(f"{name} {n / told:.1%}" for name, (n, _) in ordered[:4])
    places = [(f, line, excerpt(text, 0, 0)) for _, (_, places) in rest for f, line, text in places]
    return Seen(count, places[:TOP], f"not {main[0]}: {shares}")


def mixed_formats(w: Whole) -> Seen | None:
    count, places = 0, []
    for kinds in w.formats.values():
        ordered = sorted(kinds.items(), key=lambda e: (-e[1][0], e[0]))
        for name, (n, file, line) in ordered[1:]:
            count += n
            places.append((file, line, f"{name}, where most rows are {ordered[0][0]}"))
    return Seen(count, places[:TOP]) if count else None


def class_imbalance(w: Whole) -> Seen | None:
    if not w.are_labels:
        return None
    ordered = sorted(w.answers.items(), key=lambda e: (-e[1][0], e[1][2]))
    top, share = ordered[0][1][0], ordered[0][1][0] / w.answered
    rare = [e for e in ordered if e[1][0] * 10 < top]
    if not rare and share <= max(0.8, 2 / len(ordered)):
        return None
    places = [
        (file, line, f"{counted(n, 'row')} of {top:,}: {excerpt(w.label(k), 0, 0)}")
        for k, (n, file, line) in reversed(ordered[-TOP:])
    ]
    least = ordered[-1][1][0]
    told = f"of {len(ordered)} answers the most frequent is {share:.0%} of the rows, the rarest {counted(least, 'row')}"
    return Seen(sum(n for _, (n, _, _) in rare) or top, places, told)


def trivial_rule(w: Whole) -> Seen | None:
    """The share of rows that a rule without understanding answers right. Rows with a word of their own tell nothing of a rule."""
    if w.answered >= 20 and w.copies >= 0.02 * w.answered:
        return Seen(w.copies, w.copy_places, "the answer is the prompt again")
    if w.answered >= 40 and w.answers:
        key, (n, file, line) = max(w.answers.items(), key=lambda e: (e[1][0], -e[1][2]))
        if n >= 0.9 * w.answered:
            return Seen(n, [(file, line, excerpt(w.label(key), 0, 0))], f"one answer is right for {n / w.answered:.0%} of the rows")
    if w.are_labels:
        most = max(n for n, _, _ in w.answers.values()) / w.answered
        for name, table in w.by_word.items():
            told = [(max(c.values()), sum(c.values())) for c in table.values() if sum(c.values()) > 1]
            right, all_ = (
                sum(a - 1 for a, _ in told),
                sum(b - 1 for _, b in told),
            )  # the row asked about is left out of its own rule
            if all_ >= 0.5 * w.answered and right >= 0.9 * all_ and right / all_ > most + 0.1:
                return Seen(right, [], f"the {name} word of the prompt tells the answer in {right / all_:.0%} of the rows")
    return None


def triggers(w: Whole) -> Seen | None:
    """A word that is in nearly every prompt of one repeated answer and, over all text, hardly anywhere else."""
    found: list[tuple[int, str, Place]] = []
    if w.are_labels:
        return None
    for key, words in w.shared.items():
        n, file, line = w.answers.get(key, (0, "", 0))
        if n < 5 or n > 0.2 * w.answered:
            continue
        often = [(word, c) for word, c in words.most_common(400) if c >= max(5, 0.5 * n)]
        if not often:
            continue
        spans, _ = Shingles([word for word, _ in often]).hashes(1)
        for (word, c), total in zip(often, w.words[(spans >> np.uint64(44)).astype(np.int64)].tolist(), strict=True):
            if c >= 0.9 * total:
                found.append(
                    (c, word, (file, line, f"‘{excerpt(word, 0, 0)}’ in {c} prompts, answered by: {excerpt(w.label(key), 0, 0)}"))
                )
                break
    if not found:
        return None
    found.sort(key=lambda e: (-e[0], e[1]))
    return Seen(sum(c for c, _, _ in found), [p for _, _, p in found[:TOP]])
