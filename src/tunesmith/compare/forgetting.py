"""What was forgotten: the base's general ability before and after, on local tasks that have nothing to do with the training rows.

Three kinds of task, each a list of documents that both models get:

    text      bits per byte of a text as it stands, without a template; lower is better
    answers   a question, with the passage it is about where there is one, answered greedily; F1 of words (SQuAD's) with the nearest
              of the written answers, and the share of its words that the answer holds, which no style around it lowers
    lm-eval   a task of lm-evaluation-harness, by its own rules (harness.py)

The neutral text of assets/neutral is always read where the base and a tuned model are compared. Each document's value is kept in
forgetting.jsonl under a hash of weights and document, so nothing is measured twice. torch is imported when a model is there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.compare.arms import spread
from tunesmith.data import sources
from tunesmith.errors import ConfigError, DataError
from tunesmith.evaluate.metrics import normalised, token_f1
from tunesmith.evaluate.statistics import FEW_CHANGED, FEW_ROWS, paired_bootstrap
from tunesmith.files import sha256

if TYPE_CHECKING:
    from tunesmith.chat import Talker

FILE = "forgetting.jsonl"
NEUTRAL = "neutral"
NONE = "none"
HARNESS = "lm-eval:"
MOST = 100  # documents of a task, spread over all
WINDOW = 1024  # tokens of a text that are read at a time
ANSWER = 32  # tokens of a short answer
READ_AT_ONCE = 4096  # tokens of texts in a micro-batch
HELD = "words of the answer held"
SUFFIXES = (".jsonl", ".txt", ".md")


@dataclass(frozen=True)
class Document:
    """A text; or a question with its written answers, and the passage it is about."""

    text: str = ""
    question: str = ""
    answers: tuple[str, ...] = ()
    group: str = ""

    @property
    def prompt(self) -> str:
        passage = f"{self.text}\n\n" if self.text else ""
        return f"{passage}Question: {self.question}\nAnswer in a few words."

    @property
    def key(self) -> str:
        return sha256(json.dumps([self.text, self.question, self.answers], ensure_ascii=False))[:32]


@dataclass(frozen=True)
class Task:
    """`kind`: text, answers or lm-eval; `name` says where it is from. `of`: documents there are, of which some are taken."""

    name: str
    kind: str
    documents: tuple[Document, ...] = ()
    of: int = 0

    @property
    def measure(self) -> str:
        return {"text": "bits per byte", "answers": "F1 of words"}.get(self.kind, "score")

    @property
    def lower_is_better(self) -> bool:
        return self.kind == "text"


# ---- reading ---------------------------------------------------------------------------------------------------------------------


def tasks(named: Sequence[str], base: Path = Path()) -> list[Task]:
    """The neutral text, and what is named: a file or folder of texts, or of questions and answers; `lm-eval:TASK`. `none` alone: no
    task at all. Raises DataError for all that cannot be read, with the fix."""
    if NONE in named:
        if len(named) > 1:
            raise ConfigError("--forgetting none stands beside other tasks", "leave one out")
        return []
    found, faults = [neutral()], []
    for name in named:
        if name.startswith(HARNESS):
            from tunesmith.compare import harness

            found.append(Task(name, "lm-eval", of=harness.known(name.removeprefix(HARNESS))))
            continue
        try:
            found += _read(Path(name))
        except DataError as fault:
            faults.append(fault)
    if faults:
        raise DataError("\n".join(f.what for f in faults), "; ".join(dict.fromkeys(f.fix for f in faults if f.fix)))
    return found


def neutral() -> Task:
    path = files("tunesmith") / "assets" / "neutral" / "text.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    documents = tuple(Document(text=row["text"], group=row["kind"]) for row in rows)
    return Task(NEUTRAL, "text", documents, len(documents))


def _read(path: Path) -> list[Task]:
    kinds = "a .txt or .md text, or a .jsonl of rows with `text`, or with `question` and `answer`"
    if not path.exists():
        raise DataError(f"--forgetting {path}: there is no such file or folder", f"name {kinds}, or a folder of such")
    if path.is_dir():
        inside = sorted(p for p in path.iterdir() if p.is_file() and p.suffix in SUFFIXES and not p.name.startswith("."))
    else:
        inside = [path] if path.suffix in SUFFIXES else []
    if not inside:
        raise DataError(f"--forgetting {path}: holds nothing that can be read", f"name {kinds}, or a folder of such")
    texts: list[Document] = []
    questions: list[tuple[Path, int, dict[str, Any]]] = []
    passages: dict[str, list[str]] = {}
    for file in inside:
        if file.suffix != ".jsonl":
            text = sources.document(file)
            text = text if isinstance(text, str) else "\n\n".join(text)
            texts += [Document(text=text, group=file.stem)] if text.strip() else []
            continue
        for number, row in _rows(file):
            if "question" in row:
                questions.append((file, number, row))
            elif isinstance(row.get("sections"), list):  # fairytaleqa's documents: what the questions are about
                passages[str(row.get("id"))] = [str(s.get("text", "")) for s in row["sections"] if isinstance(s, dict)]
            elif isinstance(row.get("text"), str):
                texts += [Document(text=row["text"], group=str(row.get("kind", "")))] if row["text"].strip() else []
            else:
                raise DataError(f"{file}:{number}: neither `text` nor `question` is there", f"give {kinds}")
    if not passages and questions and (beside := questions[0][0].with_name("documents.jsonl")).is_file():
        passages = {str(r.get("id")): [str(s.get("text", "")) for s in r.get("sections", [])] for _, r in _rows(beside)}
    asked = [_question(*found, passages) for found in questions]
    out = []
    for kind, documents in (("text", texts), ("answers", asked)):
        if documents:
            picked = tuple(documents[i] for i in spread(len(documents), MOST))
            out.append(Task(f"{path.name}{' (texts)' if kind == 'text' and asked else ''}", kind, picked, len(documents)))
    if not out:
        raise DataError(f"--forgetting {path}: is empty", f"give {kinds}")
    return out


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as fault:
                raise DataError(f"{path}:{number}: no JSON: {fault}", "mend or remove the line") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: is no JSON object", "mend or remove the line")
            yield number, row


def _question(file: Path, number: int, row: Mapping[str, Any], passages: Mapping[str, Sequence[str]]) -> Document:
    answers = row.get("answers", row.get("answer"))
    answers = answers if isinstance(answers, list) else [answers]
    question, both = row.get("question"), "a text as `question` and as `answer`, or a list of them as `answers`"
    if not answers or not all(isinstance(t, str) and t.strip() for t in (question, *answers)):
        raise DataError(f"{file}:{number}: lacks {both}", "mend the row")
    text = row.get("context", row.get("passage", ""))
    if not text and (sections := passages.get(str(row.get("document")))):
        picked = [sections[i - 1] for i in row.get("gold_sections", []) if isinstance(i, int) and 0 < i <= len(sections)]
        text = "\n\n".join(picked)
    return Document(text=str(text or ""), question=question, answers=tuple(answers), group=str(row.get("attribute", "")))


# ---- measuring -------------------------------------------------------------------------------------------------------------------


@dataclass
class Forgetting:
    """The tasks and what both models made of them. `identity(model)` is what a value depends on beside its document; `store` keeps
    values (work.Answers)."""

    tasks: list[Task]
    store: Any
    identity: Callable[[str], Any]
    notes: list[str] = field(default_factory=list)
    models: tuple[str, str] = ("base", "tuned")

    def keys(self, model: str, task: Task) -> list[str]:
        made_of = json.dumps([self.identity(model), WINDOW, ANSWER], sort_keys=True, default=str)
        if task.kind == "lm-eval":
            from tunesmith.compare import harness

            return [sha256(f"{made_of} {task.name} {harness.version()} {MOST}")[:32]]
        return [sha256(f"{made_of} {d.key}")[:32] for d in task.documents]

    def missing(self, model: str) -> list[tuple[Task, list[int]]]:
        if model not in self.models:
            return []
        out = []
        for task in self.tasks:
            keys = self.keys(model, task)
            rows = [i for i, key in enumerate(keys) if self.store.get(f"{model} {task.name}", i, key) is None]
            out += [(task, rows)] if rows else []
        return out

    def measure(self, model: str, talker: Talker, step: Callable[[str], None]) -> None:
        """Every value that is missing, kept as it comes."""
        for task, rows in self.missing(model):
            keys, name = self.keys(model, task), f"{model} {task.name}"
            step(f"{model}, {task.name}")
            made = {"text": read_texts, "answers": answer_questions, "lm-eval": _harness}[task.kind](talker, task, rows)
            for i, value in made:
                self.store.add({"arm": name, "row": i, "key": keys[i], **value})

    def values(self, model: str, task: Task) -> list[dict[str, Any]]:
        return [self.store.get(f"{model} {task.name}", i, key) for i, key in enumerate(self.keys(model, task))]

    def found(self, seed: int) -> dict[str, Any]:
        """For compare.json: each task before and after, whether a difference is shown, and that in a sentence."""
        entries = [e for task in self.tasks for e in _compared(task, *(self.values(m, task) for m in self.models), seed)]
        return {"tasks": entries, "notes": self.notes, "says": verdict(entries)}


def read_texts(talker: Talker, task: Task, rows: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(document, {nats, bytes, tokens}) of each text read as it stands, in windows of the context's length."""
    from tunesmith.evaluate.heldout import losses
    from tunesmith.types import Example, Origin

    tokenizer = talker.renderer.tokenizer
    prefix, window = list(tokenizer.prefix_ids), min(WINDOW, talker.context or WINDOW)
    examples, owner = [], []
    skipped: dict[int, int] = {}
    for i in rows:
        text = task.documents[i].text
        ids = tokenizer.encode(text)
        if not prefix:  # nothing predicts the first token
            skipped[i] = len(tokenizer.decode(ids[:1]).encode("utf-8", "replace"))
        for start in range(0, max(1, len(ids)), max(1, window - max(1, len(prefix)))):
            part = ids[start : start + window - max(1, len(prefix))]
            before = ids[start - 1 : start] if start else prefix  # a later window sees the token before it
            whole = np.array([*before, *part], np.int32)
            learn = np.ones(len(whole), bool)
            learn[: max(1, len(before))] = False
            if learn.any():
                examples.append(Example(whole, learn, Origin(task.name, i + 1)))
                owner.append(i)
    found = losses(talker.model, examples, micro_batch_tokens=READ_AT_ONCE, device=talker.model.device)
    for i in rows:
        mine = [k for k, o in enumerate(owner) if o == i]
        size = len(task.documents[i].text.encode("utf-8", "replace")) - skipped.get(i, 0)
        nats, tokens = float(found.total[mine].sum()), int(found.trained[mine].sum())
        yield i, {"nats": nats, "bytes": max(1, size), "tokens": tokens}


def answer_questions(talker: Talker, task: Task, rows: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(document, {answer, f1}); a passage that the context cannot hold loses its end."""
    from tunesmith.generate import generate
    from tunesmith.types import Message

    renderer, limit = talker.renderer, talker.context

    def ids_of(document: Document) -> list[int]:
        text, prompt = document.text, document.prompt
        while True:
            ids = renderer.prompt([Message("user", prompt)])
            if limit is None or len(ids) + ANSWER <= limit or not text:
                return list(ids)
            text = text[: len(text) * max(1, limit - ANSWER) // len(ids) - 1] if len(text) > 8 else ""
            prompt = Document(text=text, question=document.question).prompt

    for start in range(0, len(rows), 8):
        part = rows[start : start + 8]
        prompts = {i: ids_of(task.documents[i]) for i in part}
        fits = [i for i in part if limit is None or len(prompts[i]) < limit]
        stop = sorted(renderer.stop_ids)
        made = dict(zip(fits, generate(talker.model, [prompts[i] for i in fits], stop_ids=stop, max_tokens=ANSWER), strict=True))
        for i in part:
            answer = renderer.tokenizer.decode(made.get(i, []), skip_special=True).strip()
            first = answer.splitlines()[0] if answer else ""
            yield i, {"answer": answer, "f1": max(token_f1(first, gold) for gold in task.documents[i].answers)}


def _harness(talker: Talker, task: Task, rows: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    from tunesmith.compare import harness

    yield 0, {"metrics": harness.evaluate(talker, task.name.removeprefix(HARNESS), MOST)}


# ---- before and after ------------------------------------------------------------------------------------------------------------


def holding(answer: str, golds: Sequence[str]) -> float:
    """The share of a written answer's words that stand in the answer, of the nearest one: words around it, a style's or a
    greeting's, cost nothing here, while F1 counts them."""
    said = set(normalised(answer).split())
    shares = [sum(w in said for w in words) / len(words) for g in golds if (words := normalised(g).split())]
    return max(shares, default=0.0)


def _compared(task: Task, before: list[Any], after: list[Any], seed: int) -> list[dict[str, Any]]:
    if task.kind == "text":
        weights = np.array([v["bytes"] for v in before], float)
        bits = [np.array([v["nats"] / v["bytes"] / math.log(2) for v in side]) for side in (before, after)]
        return [_entry(task, task.measure, *bits, seed, weights=weights, groups=[d.group for d in task.documents])]
    if task.kind == "answers":
        f1 = [np.array([v["f1"] for v in side]) for side in (before, after)]
        pairs = [list(zip(side, task.documents, strict=True)) for side in (before, after)]
        held = [np.array([holding(v["answer"], d.answers) for v, d in side]) for side in pairs]
        return [_entry(task, task.measure, *f1, seed), _entry(task, HELD, *held, seed)]
    first, second = before[0]["metrics"], after[0]["metrics"]
    return [
        _entry(task, name, np.array(first[name]["values"], float), np.array(second[name]["values"], float), seed,
               lower=not first[name]["higher_is_better"])
        for name in first if name in second and len(first[name]["values"]) == len(second[name]["values"])
    ]  # fmt: skip


def _entry(
    task: Task, measure: str, before: np.ndarray, after: np.ndarray, seed: int, *,
    weights: np.ndarray | None = None, groups: Sequence[str] = (), lower: bool | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One measure of one task, with the difference over its documents."""
    lower = task.lower_is_better if lower is None else lower
    weight = np.ones_like(before) if weights is None else weights

    def one(rows: np.ndarray) -> dict[str, Any]:
        b, a, w = before[rows], after[rows], weight[rows]
        gap, low, high = paired_bootstrap(b, a, w, seed=seed)
        sure = (low > 0 or high < 0) and len(b) >= FEW_ROWS and np.count_nonzero(a != b) >= FEW_CHANGED
        worse = (gap > 0) == lower
        return {"documents": len(b), "before": float(b @ w / w.sum()), "after": float(a @ w / w.sum()), "difference": gap,
                "interval": [low, high], "shown": 0 if not sure or gap == 0 else -1 if worse else 1}  # fmt: skip

    out = {"task": task.name, "kind": task.kind, "measure": measure, "lower_is_better": lower, "of": task.of or len(before)}
    out |= one(np.arange(len(before)))
    named = [g for g in dict.fromkeys(groups) if g]
    if len(named) > 1:
        out["groups"] = [{"name": g, **one(np.array([x == g for x in groups]))} for g in named]
    return out


def verdict(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each measure; where nothing is shown it says so, and how much would not show."""
    return [_sentence(e) for e in entries]


def _sentence(e: Mapping[str, Any]) -> str:
    name = "neutral text" if e["task"] == NEUTRAL else e["task"]
    low, high = e["interval"]
    numbers = f"{e['before']:.3f} {e['measure']} before, {e['after']:.3f} after"
    between = f"{_signed(e['difference'])}, 95 % interval {_signed(low)} to {_signed(high)}"
    if e["documents"] < FEW_ROWS:
        return f"{name}: {numbers}; {e['documents']} documents are too few to tell (from {FEW_ROWS} on)."
    if e["shown"] < 0:
        share = f", {abs(e['difference']) / e['before']:.0%} worse" if e["before"] else ""
        return f"Something was forgotten on {name}: {numbers} ({between}{share})."
    if e["shown"] > 0:
        return f"{name}: {numbers} ({between}): better than before, nothing was forgotten there."
    if e["before"] == 0 and e["after"] == 0:
        return f"{name}: 0 before and after: this task is beyond the base, so it shows nothing."
    return f"No forgetting is shown on {name}: {numbers} ({between})."


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−") if math.isfinite(value) else "unknown"
