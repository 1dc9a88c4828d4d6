"""The arms of a comparison: which model, what its prompt holds beside the question, where examples and passages come from.

Examples are the training rows nearest to the question by words (BM25), never a held-out row or one with a held-out question. They
stand as turns before it, the nearest last. Passages stand numbered before the question, with the request to cite them. No torch.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tunesmith.data import formats, sources
from tunesmith.data.prepare import find_all
from tunesmith.data.sources import Refused
from tunesmith.errors import ConfigError
from tunesmith.registry import did_you_mean
from tunesmith.retrieve.cite import numbered
from tunesmith.types import Conversation, Message

POOL = 20_000  # training rows that examples are chosen from: the first ones
K1, B = 1.2, 0.75  # BM25's usual constants
SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Arm:
    """`order` is what it costs to have, the least first: a prompt, then what makes prompts longer, then training."""

    name: str
    model: Literal["base", "tuned", "endpoint"]
    order: int
    says: str
    system: bool = False
    shots: bool = False
    passages: bool = False


ARMS = {
    arm.name: arm
    for arm in (
        Arm("base", "base", 0, "the base model as it is"),
        Arm("system", "base", 1, "the base model with a system prompt", system=True),
        Arm("few-shot", "base", 2, "the base model with examples in the prompt", shots=True),
        Arm("retrieval", "base", 3, "the base model with retrieved passages", passages=True),
        Arm("tuned", "tuned", 4, "the tuned model"),
        Arm("tuned+retrieval", "tuned", 5, "the tuned model with retrieved passages", passages=True),
        Arm("endpoint", "endpoint", 6, "the endpoint's model"),
        Arm("endpoint+system", "endpoint", 7, "the endpoint's model with a system prompt", system=True),
        Arm("endpoint+few-shot", "endpoint", 8, "the endpoint's model with examples in the prompt", shots=True),
        Arm("endpoint+retrieval", "endpoint", 9, "the endpoint's model with retrieved passages", passages=True),
    )
}


def named(names: Sequence[str]) -> list[Arm]:
    """The arms of these names, each once, in the order of their cost. ConfigError for all unknown ones at once."""
    wrong = [name for name in names if name not in ARMS]
    if wrong:
        what = "\n".join(f"--arms {name}: there is no such arm" for name in wrong)
        raise ConfigError(what, "; ".join(dict.fromkeys(did_you_mean(name, ARMS) for name in wrong)))
    return [arm for arm in ARMS.values() if arm.name in names]


@dataclass(frozen=True)
class Passage:
    """A retrieved piece of a document."""

    id: str
    document: str
    text: str
    context: str = ""  # the headings above it


@dataclass(frozen=True)
class Shot:
    """A training row as an example."""

    question: str
    answer: str
    origin: str


@dataclass(frozen=True)
class Question:
    """A held-out row: all that was said before its last answer, and that answer."""

    row: int
    before: tuple[Message, ...]
    gold: str
    completion: bool  # a prompt that is continued as it stands, without a template
    origin: str
    tools: tuple[dict[str, Any], ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What else the row carries: `topic`, `expect` ..."""

    @property
    def shown(self) -> str:
        """The last thing asked."""
        return next((m.content for m in reversed(self.before) if m.role == "user"), self.before[-1].content)


@dataclass(frozen=True)
class Prompt:
    """What an arm is asked: messages for the template, or one text that is continued (`raw`)."""

    messages: tuple[Message, ...]
    raw: bool = False
    shots: tuple[Shot, ...] = ()
    passages: tuple[Passage, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()

    def as_dicts(self) -> list[dict[str, Any]]:
        return [{"role": "user", "content": m.content} if self.raw else m.as_dict() for m in self.messages]


def question_of(row: int, conversation: Conversation) -> Question | None:
    """None for a row that ends in no answer."""
    messages = conversation.messages
    if conversation.kind == "text" or len(messages) < 2 or not messages[-1].content.strip():
        return None
    if conversation.kind == "chat" and messages[-1].role != "assistant":
        return None
    c = conversation
    return Question(row, messages[:-1], messages[-1].content, c.kind == "completion", str(c.origin), c.tools, c.fields)


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` rows, evenly over all of them."""
    return list(range(count)) if wanted >= count else [i * count // wanted for i in range(wanted)]


def compose(
    arm: Arm, question: Question, *, system: str = "", shots: Sequence[Shot] = (), passages: Sequence[Passage] = ()
) -> Prompt:
    """The arm's prompt. `shots` come nearest first. A system prompt takes the place of the row's own."""
    shots, passages = tuple(shots) if arm.shots else (), tuple(passages) if arm.passages else ()
    if question.completion:
        parts = [system] if arm.system else []
        parts += [f"{shot.question}{shot.answer}" for shot in reversed(shots)]
        parts += [numbered(passages)] if passages else []
        text = SEPARATOR.join([*parts, question.before[0].content])
        return Prompt((Message("prompt", text),), True, shots, passages)
    head = tuple(m for m in question.before if m.role == "system")
    rest = [m for m in question.before if m.role != "system"]
    if arm.system:
        head = (Message("system", system),)
    turns = [Message(role, text) for s in reversed(shots) for role, text in (("user", s.question), ("assistant", s.answer))]
    if passages:
        last = max((i for i, m in enumerate(rest) if m.role == "user"), default=len(rest) - 1)
        rest[last] = Message(rest[last].role, f"{numbered(passages)}{SEPARATOR}{rest[last].content}", None, rest[last].extra)
    return Prompt((*head, *turns, *rest), False, shots, passages, question.tools)


def fitted(prompt: Prompt, again: Callable[[Sequence[Shot], Sequence[Passage]], Prompt], fits: Callable[[Prompt], bool]) -> Prompt:
    """The prompt with as many of its examples and passages as fit: the least near ones go first. `again` composes it from fewer."""
    shots, passages = list(prompt.shots), list(prompt.passages)
    while (shots or passages) and not fits(prompt):
        (passages or shots).pop()
        prompt = again(shots, passages)
    return prompt


# ---- citations -------------------------------------------------------------------------------------------------------------------

_CITED = re.compile(r"\s?\[(\d{1,2}(?:\s*[,;]\s*\d{1,2})*)\]")  # as retrieve/cite.py reads them


def uncited(answer: str, count: int) -> str:
    """The answer without its citations: the written answer has none, so they would count against it."""

    def drop(match: re.Match[str]) -> str:
        return "" if all(1 <= int(n) <= count for n in re.findall(r"\d+", match[1])) else match[0]

    return _CITED.sub(drop, answer).strip() if count else answer


# ---- examples --------------------------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def same_question(text: str) -> str:
    """What two questions are compared by."""
    return " ".join(words(text)) or text.strip()


def training_rows(data: Any) -> Iterator[Conversation]:
    """The conversations of the training sources (a run file's `data` section), refused rows left out."""
    count = len(data.train)
    for files in find_all(data)[:count]:
        for chunk in sources.chunks(files):
            for row in sources.parse(chunk):
                if isinstance(row, Refused):
                    continue
                try:
                    yield formats.conversation(row)
                except formats.FormatError:
                    continue


def pool(conversations: Iterable[Conversation], held_out: Iterable[Question], *, completion: bool, most: int = POOL) -> list[Shot]:
    """What examples may be chosen from: the last question and answer of each training row, a question once. Left out is whatever
    asks what a held-out row asks."""
    seen = {same_question(q.shown) for q in held_out}
    out: list[Shot] = []
    for conversation in conversations:
        asked = question_of(0, conversation)
        if asked is None or asked.completion != completion or any(m.role == "tool" for m in asked.before):
            continue
        key = same_question(asked.shown)
        if key in seen:
            continue
        seen.add(key)
        out.append(Shot(asked.shown, asked.gold, asked.origin))
        if len(out) == most:
            break
    return out


class Nearest:
    """BM25 over the pool's questions. Ties, and what is missing when too few share a word, go by the rows' order."""

    def __init__(self, shots: Sequence[Shot]):
        self.shots = list(shots)
        counts = [Counter(words(s.question)) for s in self.shots]
        self._long = [max(1, c.total()) for c in counts]
        self._mean = sum(self._long) / max(1, len(self._long))
        self._where: dict[str, list[tuple[int, int]]] = {}
        for i, found in enumerate(counts):
            for word, times in found.items():
                self._where.setdefault(word, []).append((i, times))

    def nearest(self, question: str, count: int) -> list[Shot]:
        """The `count` nearest, nearest first."""
        scores: dict[int, float] = {}
        for word in dict.fromkeys(words(question)):
            rows = self._where.get(word, ())
            rare = math.log(1 + (len(self.shots) - len(rows) + 0.5) / (len(rows) + 0.5))
            for i, times in rows:
                weight = times * (K1 + 1) / (times + K1 * (1 - B + B * self._long[i] / self._mean))
                scores[i] = scores.get(i, 0.0) + rare * weight
        best = sorted(scores, key=lambda i: (-scores[i], i))[:count]
        if len(best) < count:
            taken = set(best)
            best += [i for i in range(len(self.shots)) if i not in taken][: count - len(best)]
        return [self.shots[i] for i in best]
