"""How conversations of one shape are laid out: where the fields stand, what is learned, and which documents are trained.

Where fields stand is found by rendering with a sentinel in place of each, and proved by fitting the real rendering into that
skeleton; where a template looks into the content, by sentinels around it or in one field at a time; where neither can tell, the row
is refused. A template that has shown that it does nothing with the contents but print them (template_child.py) needs no rendering
of a row at all: its skeleton, filled, is that rendering.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from tunesmith.data.encode import END, FIELD, ID, START, TEXT, Op, eos_id
from tunesmith.data.fields import (
    ASSISTANT,
    CLOSE,
    FIELDS,
    OPEN,
    REASONING,
    SENTINEL,
    Chat,
    RowRefused,
    Spot,
    common,
    fit,
    fit_spots,
    once,
    replaced,
    who,
)
from tunesmith.data.template import Fault, Job, Sandbox, Texts
from tunesmith.tokenizer import Tokenizer

SHAPES = 2_000  # conversation shapes remembered


@dataclass(frozen=True, slots=True)
class Document:
    """One text to be encoded: where its fields stand, which spans are learned (from a prompt's end through a stop), and where the
    prompts of other answers end: the ids of what came before an answer never depend on it."""

    text: str
    spots: tuple[Spot, ...]
    marks: tuple[tuple[int, int], ...] = ()
    joins: tuple[int, ...] = ()


@dataclass(slots=True)
class Shape:
    """What is known about all conversations of one shape."""

    skeletons: dict[tuple[int, bool], tuple[list[str], list[int]]] = field(default_factory=dict)  # (n, prompt) -> pieces, fields
    texts: dict[tuple[int, bool], str] = field(default_factory=dict)
    refused: str = ""  # every row of this shape is refused, for this reason
    ops: list[Op] | None = None  # the whole conversation is one example, put together like this
    checks: list[tuple[int, bool, int, int]] = field(default_factory=list)
    """What the row's other renderings must fulfil: (index among those asked, whether it must end there, piece, how far in)."""
    trimmed: frozenset[int] | None = None
    """Known when the template does nothing with the fields but print them, these trimmed: then no row has to be rendered."""

    @property
    def blind(self) -> bool:
        """Whether the texts alone tell how a conversation is put together."""
        return self.trimmed is not None and (self.ops is not None or bool(self.refused))


class World:
    """The renderings of one conversation and where its fields stand in them. `Skeleton` and `Real` tell how."""

    def text(self, n: int, prompt: bool) -> str:
        raise NotImplementedError

    def spots(self, n: int, prompt: bool) -> list[Spot]:
        raise NotImplementedError


class Skeleton(World):
    def __init__(self, asked: Sequence[tuple[int, bool]], texts: Texts):
        self._texts = {pair: texts[k] for k, pair in enumerate(asked)}

    def text(self, n: int, prompt: bool) -> str:
        return self._texts[n, prompt]

    def spots(self, n: int, prompt: bool) -> list[Spot]:
        found = [(m.start(), m.end(), ord(m[0]) - SENTINEL) for m in FIELDS.finditer(self._texts[n, prompt])]
        once(found)
        return found


class Real(World):
    def __init__(self, layouts: Layouts, chat: Chat, shape: Shape, asked: Sequence[tuple[int, bool]], texts: Texts):
        self._layouts, self._chat, self._shape = layouts, chat, shape
        self._texts = {pair: texts[k] for k, pair in enumerate(asked)}
        self._spots: dict[tuple[int, bool], list[Spot]] = {}

    def text(self, n: int, prompt: bool) -> str:
        return self._texts[n, prompt]

    def spots(self, n: int, prompt: bool) -> list[Spot]:
        if (n, prompt) not in self._spots:
            text, chat, layouts = self._texts[n, prompt], self._chat, self._layouts
            found = None
            if (n, prompt) in self._shape.skeletons:
                found = fit_spots(text, *self._shape.skeletons[n, prompt], chat.contents)
            if found is None:
                found = layouts.spots_around(chat, n, prompt, text)
            if found is None:
                found = layouts.spots_one_by_one(chat, n, prompt, text, self._shape.texts.get((n, prompt)))
            self._spots[n, prompt] = found
        return self._spots[n, prompt]


class Layouts:
    """The layouts of one template. `own_stop` is the token with which the template ends an answer, None where it writes none, and
    `stops` all that end one: set once they are known."""

    def __init__(self, tokenizer: Tokenizer, sandbox: Sandbox, templates: Mapping[str, str]):
        self.tokenizer, self.sandbox, self.templates = tokenizer, sandbox, templates
        self.own_stop: int | None = None
        self.stops: frozenset[int] | None = None
        self._shapes: dict[Any, Shape] = {}

    def job(self, chat: Chat, messages: list[dict[str, Any]] | None = None, asked: Sequence[tuple[int, bool]] | None = None) -> Job:
        name = "tool_use" if chat.tools and "tool_use" in self.templates else "default"
        return Job(chat.messages if messages is None else messages, asked or chat.asked(), chat.tools, name)

    def render(self, chat: Chat, asked: Sequence[tuple[int, bool]], messages: list[dict[str, Any]] | None = None) -> Texts:
        answer = self.sandbox.render([self.job(chat, messages, asked)])[0]
        if isinstance(answer, Fault):
            raise RowRefused(str(answer), answer.fix)
        return answer

    def plan(self, chat: Chat, shape: Shape, answer: Texts | Fault | None) -> list[tuple[list[Op], dict[int, str]]]:
        """The documents of a conversation, each as what to put together and the fields' texts. `answer`: its own rendering; None
        where the template does not look at texts."""
        if isinstance(answer, Fault):
            raise RowRefused(str(answer), answer.fix)
        if shape.refused:
            raise RowRefused(shape.refused)
        if answer is None:
            values = chat.contents
            return [(shape.ops, values | {f: values[f].strip() for f in shape.trimmed} if shape.trimmed else values)]
        if shape.ops is not None and (values := _quick(shape, chat, answer)) is not None:
            return [(shape.ops, values)]
        documents = self.documents(Real(self, chat, shape, chat.asked(), answer), chat)
        return [(self.ops(document, chat), values_of(document)) for document in documents]

    def shapes(self, chats: Sequence[Chat]) -> list[Shape]:
        """The shape of each conversation; those not seen before are rendered, all at once, and remembered."""
        new = list({chat.key: chat for chat in chats if chat.key not in self._shapes}.values())
        if len(self._shapes) > SHAPES:
            self._shapes.clear()
            new = list({chat.key: chat for chat in chats}.values())
        jobs: list[Job] = []
        reasons: list[list[str]] = []
        for chat in new:
            rows = [replaced(m, i, chat.contents, SENTINEL, None) for i, m in enumerate(chat.messages)]
            jobs.append(replace(self.job(chat, rows), blind=not chat.prompt))
            without = list(self._without(chat, rows, chat.asked()[0]))
            jobs += [job for job, _ in without]
            reasons.append([reason for _, reason in without])
        answers = iter(self.sandbox.render(jobs))
        for chat, why in zip(new, reasons, strict=True):
            self._shapes[chat.key] = self._shape(chat, next(answers), [(next(answers), reason) for reason in why])
        return [self._shapes[chat.key] for chat in chats]

    def _shape(self, chat: Chat, answer: Texts | Fault, without: list[tuple[Texts | Fault, str]]) -> Shape:
        """What a conversation's shape tells, from its rendering with sentinels and those without one of its parts."""
        shape = Shape()
        if isinstance(answer, Fault):
            return shape
        asked = chat.asked()
        world = Skeleton(asked, answer)
        for other, reason in without:
            if isinstance(other, Texts) and other[0] == answer[0]:
                shape.refused = reason
        for pair in asked:
            shape.texts[pair] = text = world.text(*pair)
            try:
                found = world.spots(*pair)
            except RowRefused:
                continue
            ends = [0, *(end for _, end, _ in found)]
            begins = [*(begin for begin, _, _ in found), len(text)]
            shape.skeletons[pair] = ([text[a:b] for a, b in zip(ends, begins, strict=True)], [f for _, _, f in found])
        if not chat.prompt and not shape.refused:
            try:
                self._settle(shape, chat, world, asked)
            except RowRefused as refused:
                del refused  # the sentinels may have misled the template: each row is looked at for itself
        if answer.trimmed is not None:
            shape.trimmed = frozenset(ord(sentinel) - SENTINEL for sentinel in answer.trimmed)
        return shape

    def _settle(self, shape: Shape, chat: Chat, world: Skeleton, asked: list[tuple[int, bool]]) -> None:
        """If the whole conversation is one example, remember how it is put together and what a row must fulfil."""
        documents = self.documents(world, chat)
        if len(documents) != 1 or documents[0].text != world.text(*asked[0]):
            return
        document = documents[0]
        ends = [0, *(end for _, end, _ in document.spots)]
        prompts = {t: begin for t, (begin, _) in zip(chat.trained, document.marks, strict=True)}
        prompts |= {t: len(world.text(t, True)) for t in chat.answers if t not in prompts and (t, True) in asked}
        needed = [((t, True), True, begin) for t, begin in prompts.items() if begin in document.joins or t in chat.trained]
        needed += [((t + 1, False), False, stop) for t, (_, stop) in zip(chat.trained, document.marks, strict=True)]
        for pair, whole, at in needed:
            k = max(k for k, end in enumerate(ends) if end <= at)
            shape.checks.append((asked.index(pair), whole, k, at - ends[k]))
        shape.ops = self.ops(document, chat)

    def _without(self, chat: Chat, rows: list[dict[str, Any]], pair: tuple[int, bool]) -> Iterator[tuple[Job, str]]:
        """Renderings without a part that has no field of its own; one that equals the whole shows that the template drops it."""
        if chat.tools:
            job = self.job(chat, rows, [pair])
            yield Job(job.messages, job.asked, (), job.template), "the template does not show the tools"
        for i, row in enumerate(rows):
            if row.get("tool_calls"):
                bare = [{k: v for k, v in row.items() if k != "tool_calls"} if j == i else other for j, other in enumerate(rows)]
                yield self.job(chat, bare, [pair]), f"the template drops the tool calls of message {i + 1}"
            elif not row["content"]:
                fewer = [other for j, other in enumerate(rows) if j != i]
                if fewer:
                    text = f"message {i + 1} ({row['role']}) is empty and does not appear in the template's rendering"
                    yield self.job(chat, fewer, [(len(fewer), pair[1])]), text

    # ---- where the fields stand, for a template that looks into the content

    def spots_around(self, chat: Chat, n: int, prompt: bool, text: str) -> list[Spot] | None:
        """Render with a sentinel before and after each field: the template still sees the content it looks for."""
        rows = [replaced(m, i, chat.contents, OPEN, CLOSE) for i, m in enumerate(chat.messages[:n])]
        answer = self.sandbox.render([self.job(chat, rows, [(n, prompt)])])[0]
        if isinstance(answer, Fault):
            return None
        pieces, order, inside, at, open_field = [], [], {}, 0, None
        for match in FIELDS.finditer(answer[0]):
            code = ord(match[0])
            if open_field is None and OPEN <= code < CLOSE and code - OPEN not in inside:
                open_field = code - OPEN
                pieces.append(answer[0][at : match.start()])
            elif open_field is not None and code == CLOSE + open_field:
                inside[open_field] = answer[0][at : match.start()]
                order.append(open_field)
                open_field = None
            else:
                return None
            at = match.end()
        if open_field is not None:
            return None
        pieces.append(answer[0][at:])
        return fit_spots(text, pieces, order, inside)

    def spots_one_by_one(self, chat: Chat, n: int, prompt: bool, text: str, skeleton: str | None) -> list[Spot]:
        """Render with a sentinel in place of one field at a time: what is before and after it is about the others."""
        fields = [f for f in chat.contents if f % REASONING < n]
        rows = [[replaced(m, i, {f: chat.contents[f]}, SENTINEL, None) for i, m in enumerate(chat.messages[:n])] for f in fields]
        answers = self.sandbox.render([self.job(chat, row, [(n, prompt)]) for row in rows])
        found: list[Spot] = []
        for f, answer in zip(fields, answers, strict=True):
            if isinstance(answer, Fault):
                raise RowRefused(str(answer), answer.fix)
            parts = answer[0].split(chr(SENTINEL + f))
            if len(parts) == 1:
                continue  # not in this rendering: whether it had to be is for the whole document to say
            if len(parts) > 2:
                raise RowRefused(f"{who(chat, f)} appears {len(parts) - 1} times in the template's rendering")
            begin, end = common(text, parts[0]), len(text) - common(text[::-1], parts[1][::-1])
            if begin > end:
                begin = end = max(begin, end) if not chat.contents[f].strip() else -1
            got, whole = "".join(text[begin:end].split()), "".join(chat.contents[f].split())
            cut_thoughts = chat.messages[f % REASONING]["role"] == ASSISTANT and "</think>" in whole and got and got in whole
            if begin < 0 or not (got == whole or cut_thoughts):
                raise RowRefused(f"the template changes its own text with {who(chat, f)}: cannot tell which text is whose")
            found.append((begin, end, f))
        found.sort()
        if any(a[1] > b[0] for a, b in pairwise(found)):
            raise RowRefused("the template's rendering mixes two messages: cannot tell which text is whose")
        if skeleton is not None:
            bare = [(m.start(), m.end(), 0) for m in FIELDS.finditer(skeleton)]
            here, there = (
                [i for *_, i in self.scan(*of) if i in self.tokenizer.special_ids] for of in ((text, found), (skeleton, bare))
            )
            if here != there:
                raise RowRefused("the template writes other special tokens for this content: cannot tell whose they are")
        return found

    # ---- documents

    def documents(self, world: World, chat: Chat) -> list[Document]:
        """What is trained of a conversation: the whole as one document when it begins, at every learned answer, exactly with the
        prompt of inference and that answer; else a document for each answer."""
        n = len(chat.messages)
        whole = world.text(n, False)
        singles, agree = [], True
        for t in chat.trained:
            text, spots, begin, stop = self._answer(world, chat, t)
            singles.append((t, Document(text, spots, ((begin, stop),))))
            agree = agree and whole[:stop] == text[:stop]
        if agree:
            document = Document(whole, tuple(world.spots(n, False)), tuple(d.marks[0] for _, d in singles))
            self.complete(chat, document, n, chat.trained)
            return [self.joined(world, chat, document, n)]
        for t, document in singles:
            self.complete(chat, document, t + 1, (t,))
        return [self.joined(world, chat, document, t) for t, document in singles]

    def joined(self, world: World, chat: Chat, document: Document, n: int) -> Document:
        """The document with the ends of the prompts of its other answers, where it begins with them."""
        learned = {begin for begin, _ in document.marks}
        joins = []
        for t in chat.answers:
            if 0 < t < n:
                prompt = world.text(t, True)
                at = len(prompt)
                inside = any(begin < at < end for begin, end, _ in document.spots)
                if at not in learned and not inside and document.text.startswith(prompt):
                    joins.append(at)
        return Document(document.text, document.spots, document.marks, tuple(joins))

    def _answer(self, world: World, chat: Chat, t: int) -> tuple[str, tuple[Spot, ...], int, int]:
        """(text, spots, begin, end): the prompt of inference with answer `t` behind it, learned from begin to end."""
        prompt, text = world.text(t, True), world.text(t + 1, False)
        spots = world.spots(t + 1, False)
        if not text.startswith(prompt):
            text, spots = self._join(world, t, prompt, text, spots)
        begin = len(prompt)
        own = [spot for spot in spots if spot[2] % REASONING == t]
        if any(spot[0] < begin for spot in own):
            raise RowRefused(f"the generation prompt already holds the beginning of message {t + 1}")
        end = max((spot[1] for spot in own if spot[2] == t), default=begin)
        if self.own_stop is None:
            if t not in chat.contents:
                raise RowRefused(f"message {t + 1} has no text to put EOS after")
            return text, tuple(spots), begin, end
        stop = next((stop for at, stop, i in self.scan(text, spots) if at >= end and i in self.stops), None)
        if stop is None:
            raise RowRefused(f"no stop token after message {t + 1}: the stop is never trained")
        return text, tuple(spots), begin, stop

    def _join(self, world: World, t: int, prompt: str, text: str, spots: list[Spot]) -> tuple[str, list[Spot]]:
        """The template writes earlier turns otherwise once they are answered (Nemo moves the system message): put the answer, from
        the end of what the prompt's last words have in common with it, behind the prompt."""
        before = [spot for spot in spots if spot[2] % REASONING < t]
        asked = world.spots(t, True)
        if before and asked and before[-1][2] == asked[-1][2]:
            tail = prompt[asked[-1][1] :]
            cut = before[-1][1] + len(tail)
            if tail and text.startswith(tail, before[-1][1]) and all(s[0] >= cut for s in spots if s[2] % REASONING == t):
                shift = len(prompt) - cut
                return prompt + text[cut:], [*asked, *((a + shift, b + shift, f) for a, b, f in spots if a >= cut)]
        raise RowRefused(
            f"the prompt of message {t + 1}, which ends in {FIELDS.sub('…', prompt[-40:])!r},"
            " is not how the template writes the answered turn"
        )

    def complete(self, chat: Chat, document: Document, n: int, trained: Iterable[int]) -> None:
        """Every message of the first `n` exactly once, or RowRefused."""
        fields = [f for *_, f in document.spots]
        once(document.spots)
        needed = [f for f in chat.contents if f < n or f - REASONING in trained]
        for f in needed:
            if f not in fields:
                raise RowRefused(f"{who(chat, f)} does not appear in the template's rendering")

    # ---- from a document to ids

    def scan(self, text: str, spots: Iterable[Spot]) -> list[tuple[int, int, int]]:
        """(begin, end, id) of the added tokens in markup, in order."""
        pattern, found, at = self.tokenizer.markup_pattern, [], 0
        if pattern is None:
            return found
        for begin, end, _ in (*spots, (len(text), len(text), 0)):
            if begin > at:
                gap = text[at:begin]
                found += [(at + m.start(), at + m.end(), self.tokenizer.token_to_id(m[0])) for m in pattern.finditer(gap)]
            at = end
        return found

    def ops(self, document: Document, chat: Chat) -> list[Op]:
        """The document as texts, fields, ids and marks in order."""
        closer: Op = (TEXT, "", None)
        events: list[tuple[int, int, Op]] = []  # where, order of those at one place, what
        for begin, end, f in document.spots:
            assistant = chat.messages[f % REASONING]["role"] == ASSISTANT
            if end > begin:
                events += [(begin, 4, (FIELD, f, assistant)), (end, 0, closer)]
            if self.own_stop is None and assistant and f < REASONING:
                events.append((end, 2, (ID, eos_id(self.tokenizer), None)))
        for begin, end, index in self.scan(document.text, document.spots):
            events += [(begin, 4, (ID, index, self.tokenizer.added[index])), (end, 0, closer)]
        for begin, stop in document.marks:
            events += [(begin, 1, (START, True, None)), (stop, 3, (END, None, None))]
        events += [(at, 1, (START, False, None)) for at in document.joins]
        ops: list[Op] = []
        at, inside = 0, False
        for where, order, op in sorted(events, key=lambda event: event[:2]):
            if where > at and not inside:
                ops.append((TEXT, document.text[at:where], None))
            at = where
            inside = order == 4 or (inside and order != 0)
            if order:
                ops.append(op)
        if at < len(document.text):
            ops.append((TEXT, document.text[at:], None))
        return ops


def _quick(shape: Shape, chat: Chat, answer: Texts) -> dict[int, str] | None:
    """The fields' texts if this row's renderings are, all of them, its shape's skeletons filled."""
    pieces, order = shape.skeletons[len(chat.messages), False]
    fitted = fit(answer[0], pieces, order, chat.contents)
    if fitted is None:
        return None
    values, ends = fitted
    for index, whole, k, at in shape.checks:
        same, rest = answer.shared(index)
        if same < ends[k] + at or (whole and (rest or same > ends[k] + at)):
            return None
    return dict(zip(order, values, strict=True))


def values_of(document: Document) -> dict[int, str]:
    return {f: document.text[begin:end] for begin, end, f in document.spots}
