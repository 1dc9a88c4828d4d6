"""How good an answer is beside the one that was written: metrics by task, which of them fit the rows, and what each says. No torch.

A metric gives each row a value from 0 to 1, higher is better. ROUGE-L, chrF, accuracy and macro-F1 are rouge-score's, sacrebleu's
(sentence level, over 100) and scikit-learn's to the last digit (tests/evaluate/test_metrics_oracle.py); exact match and F1 are
SQuAD's.
"""

from __future__ import annotations

import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.errors import ConfigError, MissingExtra
from tunesmith.evaluate import checks
from tunesmith.evaluate.style import Style
from tunesmith.registry import did_you_mean

MOST = 0.9  # share of the written answers that must be of a kind for the kind's metrics to be found
LABEL_WORDS, LABELS = 5, 200  # a class label has at most so many words, and there are at most so many of them
SHORT_WORDS = 6  # words of a short answer

Statistic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Scored:
    """`values` [rows], each 0 to 1. Where the metric is no mean over rows (macro-F1), `statistic` turns counts of rows [N, rows]
    into its values [N]; one count of ones is the rows as they are. `used` [rows], bool: the rows that the metric concerns, None
    for all; of the others the values say nothing."""

    values: np.ndarray
    statistic: Statistic | None = None
    used: np.ndarray | None = None

    @property
    def whole(self) -> float:
        if self.statistic is None:
            return float(self.counted.mean()) if len(self.counted) else math.nan
        return float(self.statistic(np.ones((1, len(self.values))))[0])

    @property
    def counted(self) -> np.ndarray:
        """The values of the rows that the metric concerns."""
        return self.values if self.used is None else self.values[self.used]

    def among(self, rows: np.ndarray) -> Scored:
        """The same of some rows; `rows` [rows], bool."""
        statistic, whole = self.statistic, len(self.values)
        if statistic is None:
            return Scored(self.values[rows], None, None if self.used is None else self.used[rows])

        def some(counts: np.ndarray) -> np.ndarray:
            every = np.zeros((len(counts), whole))
            every[:, rows] = counts
            return statistic(every)

        return Scored(self.values[rows], some)


@dataclass(frozen=True)
class Metric:
    """`score(answers, golds)`; `misfit(golds)` says why the rows' written answers are none of this metric's, '' where they are."""

    name: str
    says: str
    score: Callable[[Sequence[str], Sequence[str]], Scored]
    misfit: Callable[[Sequence[str]], str]
    binary: bool = False
    """Each value is 0 or 1, and the metric is their mean."""
    marks: bool = False
    """[1] in an answer means something to it, so citations stay."""
    form: bool = False
    """It does not look at the written answer."""
    by_fields: Callable[[Sequence[str], Sequence[Mapping[str, Any]]], Scored] | None = None
    """In place of `score` where it reads what the rows carry beside their messages: (answers, the rows' fields)."""

    def of(self, answers: Sequence[str], golds: Sequence[str], fields: Sequence[Mapping[str, Any]]) -> Scored:
        return self.by_fields(answers, fields) if self.by_fields else self.score(answers, golds)


# ---- words -----------------------------------------------------------------------------------------------------------------------

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """SQuAD's form: lower case, without punctuation and English articles, one blank between words."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, gold: str) -> float:
    """1 where both are the same once normalised."""
    return float(normalised(answer) == normalised(gold))


def token_f1(answer: str, gold: str) -> float:
    """SQuAD's F1 of the words that both hold; of two empty ones 1."""
    said, wanted = normalised(answer).split(), normalised(gold).split()
    if not said or not wanted:
        return float(said == wanted)
    same = sum((Counter(said) & Counter(wanted)).values())
    return 2 * same / (len(said) + len(wanted))


def rouge_words(text: str) -> list[str]:
    """rouge-score's words: runs of a-z and 0-9 in lower case, nothing stemmed."""
    return re.findall("[a-z0-9]+", text.lower())


def rouge_l(answer: str, gold: str) -> float:
    """F1 of the longest common subsequence of words."""
    said, wanted = rouge_words(answer), rouge_words(gold)
    if not said or not wanted:
        return 0.0
    same = _common(said, wanted)
    if not same:
        return 0.0
    precision, recall = same / len(said), same / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence: one addition over bits for each word of `b` (Hyyro 2004)."""
    where: dict[str, int] = {}
    for i, word in enumerate(a):
        where[word] = where.get(word, 0) | 1 << i
    every = (1 << len(a)) - 1
    row = every
    for word in b:
        found = row & where.get(word, 0)
        row = ((row + found) | (row - found)) & every
    return len(a) - row.bit_count()


def chrf(answer: str, gold: str, order: int = 6, beta: float = 2.0) -> float:
    """chrF2 of one sentence: precision and recall of runs of 1 to 6 characters, blanks left out, averaged over the lengths that
    both have, recall weighing four times as much."""
    said, wanted = "".join(answer.split()), "".join(gold.split())
    precision = recall = 0.0
    used = 0
    for n in range(1, order + 1):
        have = Counter(said[i : i + n] for i in range(len(said) - n + 1))
        want = Counter(wanted[i : i + n] for i in range(len(wanted) - n + 1))
        if have and want:
            same = sum((have & want).values())
            precision, recall, used = precision + same / have.total(), recall + same / want.total(), used + 1
    if not precision + recall:
        return 0.0
    precision, recall = precision / used, recall / used
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


# ---- classes ---------------------------------------------------------------------------------------------------------------------


def label_of(text: str) -> str:
    """A class label as it is compared: lower case, no signs at its ends."""
    return " ".join(text.casefold().split()).strip(string.punctuation + " ")


def predicted(answer: str, labels: Sequence[str]) -> str | None:
    """Which of `labels` (as `label_of` has them) an answer gives: itself, or the only one that stands in it as a word."""
    said = label_of(answer)
    if said in labels:
        return said
    rest, found = said, []
    for name in sorted(labels, key=len, reverse=True):  # `very good` is not also `good`
        if not name:
            continue
        rest, times = re.subn(rf"(?<!\w){re.escape(name)}(?!\w)", " ", rest)
        found += [name] if times else []
    return found[0] if len(found) == 1 else None


def _labels(answers: Sequence[str], golds: Sequence[str]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(the labels, each row's own, each answer's: -1 for none of them)."""
    own = [label_of(gold) for gold in golds]
    names = sorted(set(own))
    number = {name: i for i, name in enumerate(names)}
    said = [number.get(predicted(answer, names) or "", -1) for answer in answers]
    return names, np.array([number[name] for name in own]), np.array(said)


def _accuracy(answers: Sequence[str], golds: Sequence[str]) -> Scored:
    _, own, said = _labels(answers, golds)
    return Scored((own == said).astype(float))


def _macro_f1(answers: Sequence[str], golds: Sequence[str]) -> Scored:
    names, own, said = _labels(answers, golds)
    each = np.arange(len(names))
    own_RL, said_RL = own[:, None] == each, said[:, None] == each

    def statistic(counts_NR: np.ndarray) -> np.ndarray:
        counts_NR = np.asarray(counts_NR, float)
        both, all_own, all_said = (counts_NR @ m.astype(float) for m in (own_RL & said_RL, own_RL, said_RL))
        there = all_own + all_said > 0  # a resample may lack a label altogether: it has no F1 then
        f1 = np.divide(2 * both, all_own + all_said, out=np.zeros_like(both), where=there)
        return f1.sum(1) / np.maximum(there.sum(1), 1)

    return Scored((own == said).astype(float), statistic)


# ---- numbers and JSON ------------------------------------------------------------------------------------------------------------

_NUMBER = re.compile(r"[-−]?\$?\d[\d,]*(?:\.\d+)?|[-−]?\$?\.\d+")
_BARE = re.compile(rf"\s*(?:{_NUMBER.pattern})\s*(?:%|[A-Za-z€$]{{1,8}})?\.?\s*")


def number_of(text: str) -> Decimal | None:
    """The number behind the last `####` (GSM8K), else the last number in the text; None where there is none."""
    head, mark, tail = text.rpartition("####")
    found = _NUMBER.findall(tail)
    if not found:
        return number_of(head) if mark and head else None
    first_or_last = found[0] if mark else found[-1]
    try:
        return Decimal(first_or_last.replace(",", "").replace("$", "").replace("−", "-"))
    except InvalidOperation:
        return None


def number_match(answer: str, gold: str) -> float:
    said = number_of(answer)
    return float(said is not None and said == number_of(gold))


_NOTHING = object()


def parsed(text: str) -> Any:
    """The JSON value that the whole text is; _NOTHING where it is none (NaN and a fence around it included)."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return _NOTHING


def json_valid(answer: str, gold: str = "") -> float:
    return float(parsed(answer) is not _NOTHING)


def json_match(answer: str, gold: str) -> float:
    said, wanted = parsed(answer), parsed(gold)
    return float(said is not _NOTHING and wanted is not _NOTHING and _same(said, wanted))


def _same(a: Any, b: Any) -> bool:
    """Equal as JSON: 1 and 1.0 are, in Python so are True and 1, which here are not."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b


# ---- which fit -------------------------------------------------------------------------------------------------------------------


def _share(golds: Sequence[str], of: Callable[[str], bool]) -> float:
    return sum(map(of, golds)) / max(1, len(golds))


def _any(golds: Sequence[str]) -> str:
    return ""


def _latin(golds: Sequence[str]) -> str:
    share = _share(golds, lambda gold: bool(rouge_words(gold)))
    return "" if share >= MOST else f"it knows words of a-z and 0-9 alone, which {share:.0%} of the written answers hold"


def _numeric(golds: Sequence[str]) -> str:
    share = _share(golds, lambda gold: number_of(gold) is not None)
    return "" if share >= MOST else f"{share:.0%} of the written answers hold a number"


def _is_json(golds: Sequence[str]) -> str:
    share = _share(golds, lambda gold: isinstance(parsed(gold), (dict, list)))
    return "" if share >= MOST else f"{share:.0%} of the written answers are a JSON object or list"


def _classes(golds: Sequence[str]) -> str:
    names = {label_of(gold) for gold in golds}
    if max((len(name.split()) for name in names), default=0) > LABEL_WORDS:
        return f"the written answers are no class labels: some have more than {LABEL_WORDS} words"
    if not 2 <= len(names) <= min(LABELS, max(2, len(golds) // 2)):
        return f"{len(names)} different answers were written to {len(golds)} rows, which are no classes"
    return ""


def _rowwise(score: Callable[[str, str], float]) -> Callable[[Sequence[str], Sequence[str]], Scored]:
    return lambda answers, golds: Scored(np.array([score(a, g) for a, g in zip(answers, golds, strict=True)], float))


METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric("exact_match", "the same words as the written answer", _rowwise(exact_match), _any, binary=True),
        Metric("f1", "words shared with the written answer (SQuAD's F1)", _rowwise(token_f1), _any),
        Metric("rouge_l", "longest run of words in the same order (ROUGE-L F1)", _rowwise(rouge_l), _latin),
        Metric("chrf", "shared runs of characters (chrF2), for any language", _rowwise(chrf), _any),
        Metric("accuracy", "the right class", _accuracy, _classes, binary=True),
        Metric("macro_f1", "F1 of each class, all weighing the same", _macro_f1, _classes),
        Metric("number", "the same final number, behind #### where there is one", _rowwise(number_match), _numeric, binary=True),
        Metric("json", "the whole answer is JSON", _rowwise(json_valid), _is_json, binary=True, marks=True, form=True),
        Metric("json_match", "JSON equal to the written one", _rowwise(json_match), _is_json, binary=True, marks=True),
    )
}


def _regex(pattern: str) -> Metric:
    try:
        compiled = re.compile(pattern)
    except re.error as fault:
        raise ConfigError(f"--metric regex:{pattern}: no regular expression: {fault}", "correct the pattern") from None
    score = _rowwise(lambda answer, gold: float(bool(compiled.search(answer))))
    return Metric(f"regex:{pattern}", f"/{pattern}/ is found in the answer", score, _any, binary=True, marks=True, form=True)


def _style(path: str) -> Metric:
    try:
        style = Style.load(Path(path))
    except (OSError, ValueError, KeyError, TypeError, re.error) as fault:
        what = f"--metric style:{path}: cannot be read as style rules: {fault}"
        raise ConfigError(what, "name a JSON file with `rules`, `redirect` and `system_prompt`") from None
    score = _rowwise(lambda answer, gold: float(not style.broken(answer)))
    return Metric("style", f"keeps all {len(style.rules)} rules of {Path(path).name}", score, _any, binary=True, form=True)


def _schema(path: str) -> Metric:
    try:
        import jsonschema
    except ImportError:
        raise MissingExtra("--metric json_schema needs the package jsonschema", "pip install jsonschema") from None
    try:
        schema = json.loads(Path(path).read_text("utf-8"))
        validator = jsonschema.validators.validator_for(schema)
        validator.check_schema(schema)
    except (OSError, ValueError, jsonschema.SchemaError) as fault:
        raise ConfigError(f"--metric json_schema:{path}: no JSON schema: {fault}".splitlines()[0], "name a JSON schema") from None
    check = validator(schema)
    score = _rowwise(lambda answer, gold: float((value := parsed(answer)) is not _NOTHING and check.is_valid(value)))
    return Metric("json_schema", f"JSON that {Path(path).name} allows", score, _any, binary=True, marks=True, form=True)


def _expect(name: str, rows: Sequence[Mapping[str, Any]]) -> Metric:
    """The checks that rows carry under a key, or under `key.name`."""
    known, faults = 0, []
    for i, row in enumerate(rows, 1):
        try:
            known += bool(checks.of_row(row, name))
        except checks.CheckError as fault:
            faults.append(f"held-out row {i}: {name}: {fault}")
    if faults:
        more = [f"and {len(faults) - 5} more rows"] if len(faults) > 5 else []
        raise ConfigError("\n".join([*faults[:5], *more]), "correct the rows, train or prepare again; or name another --metric")
    if not known:
        have = sorted({key for row in rows for key in row})
        what = f"--metric expect:{name}: no held-out row carries checks under {name!r}"
        hint = f"the rows carry {', '.join(have)}" if have else "the rows carry nothing beside their messages"
        raise ConfigError(what, f"{hint}; rows of a run that was trained before they were added lack them: train again")

    def score(answers: Sequence[str], some: Sequence[Mapping[str, Any]]) -> Scored:
        held = [checks.of_row(row, name) for row in some]
        values = [float(all(check(a) for check in of)) for a, of in zip(answers, held, strict=True)]
        return Scored(np.array(values), None, np.array([bool(of) for of in held]))

    says = f"all that the row's own checks ({name}) ask for is in the answer"
    return Metric(name, says, _rowwise(exact_match), _any, binary=True, by_fields=score)


def _when(argument: str, rows: Sequence[Mapping[str, Any]]) -> Metric:
    where, _, pattern = argument.partition(":")
    key, equals, value = where.partition("=")
    try:
        compiled = re.compile(pattern)
    except re.error as fault:
        raise ConfigError(f"--metric when:{argument}: no regular expression: {fault}", "correct the pattern") from None
    if not (key and equals and pattern):
        raise ConfigError(f"--metric when:{argument}: it needs a key, its value and a pattern", f"write --metric {WITH['when'][1]}")
    values = sorted({str(row[key]) for row in rows if key in row})
    if value not in values:
        known = f"the rows have {key} = {', '.join(values[:20])}" if values else f"no held-out row carries {key!r}"
        raise ConfigError(f"--metric when:{where}: no held-out row is such a one", known)

    def score(answers: Sequence[str], some: Sequence[Mapping[str, Any]]) -> Scored:
        pairs = zip(answers, some, strict=True)
        right = [float(bool(compiled.search(a)) == (str(row.get(key)) == value)) for a, row in pairs]
        return Scored(np.array(right), None, np.array([key in row for row in some]))

    says = f"/{pattern}/ is found in the answers to rows whose {key} is {value}, and in no others"
    return Metric(f"when:{where}", says, _rowwise(exact_match), _any, binary=True, by_fields=score)


WITH: dict[str, tuple[Callable[..., Metric], str]] = {  # name:argument
    "regex": (_regex, "regex:PATTERN"),
    "style": (_style, "style:FILE"),
    "json_schema": (_schema, "json_schema:FILE"),
    "expect": (_expect, "expect:KEY"),
    "when": (_when, "when:KEY=VALUE:PATTERN"),
}
READS_FIELDS = {"expect", "when"}


def find(golds: Sequence[str], fields: Sequence[Mapping[str, Any]] = ()) -> list[Metric]:
    """The metrics that fit what was written, the one that decides first: the rows' own checks where they carry any."""
    if not _is_json(golds):
        names = ["json_match", "json"]
    elif _share(golds, lambda gold: "####" in gold or bool(_BARE.fullmatch(gold))) >= MOST and not _numeric(golds):
        names = ["number"]
    elif not _classes(golds) and len({label_of(gold) for gold in golds}) <= max(2, len(golds) // 4):
        names = ["accuracy", "macro_f1"]
    elif _share(golds, lambda gold: len(gold.split()) <= SHORT_WORDS and bool(normalised(gold))) >= MOST:
        names = ["f1", "exact_match"]
    else:
        names = ["chrf", "f1"] if _latin(golds) else ["rouge_l", "chrf", "f1"]
    return [*(_expect(name, fields) for name in checks.names(fields)), *(METRICS[name] for name in names)]


def chosen(names: Sequence[str], golds: Sequence[str], fields: Sequence[Mapping[str, Any]] = ()) -> list[Metric]:
    """The metrics of these names, or those that are found; `fields`: what each row carries beside its messages. ConfigError for
    all at once that are unknown or do not fit, with which do."""
    if not names:
        return find(golds, fields)
    out, faults, fixes = [], [], []
    for name in names:
        head, colon, argument = name.partition(":")
        if name == "expect" and (named := checks.names(fields)):
            out += [_expect(one, fields) for one in named]
        elif head in WITH:
            if not argument:
                faults.append(f"--metric {name}: it needs what to look for")
                fixes.append(f"write --metric {WITH[head][1]}")
            else:
                out.append(WITH[head][0](argument, *([fields] if head in READS_FIELDS else [])))
        elif head not in METRICS or colon:
            faults.append(f"--metric {name}: there is no such metric")
            fixes.append(did_you_mean(head, [*METRICS, *WITH]))
        elif why := METRICS[head].misfit(golds):
            faults.append(f"--metric {name} does not fit these rows: {why}")
            fixes.append(f"these fit: {', '.join(n for n, m in METRICS.items() if not m.misfit(golds))}")
        else:
            out.append(METRICS[head])
    if faults:
        raise ConfigError("\n".join(faults), "; ".join(dict.fromkeys(fixes)))
    return list({metric.name: metric for metric in out}.values())
