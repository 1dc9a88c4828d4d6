"""Conversations to token ids, with which of them are learned. The one renderer: training, evaluation, chat, serving and export.

A template's rendering is read as markup (the template's own text) and fields (what people wrote). Where the fields stand is found
by rendering with a sentinel character in place of each of them, and proved by fitting the real rendering into that skeleton; where
a template looks into the content, by sentinels around it or in one field at a time; where neither can tell, the row is refused.

    learned    from the end of the generation prompt's rendering through the first stop token of the answer
    ids        special tokens are matched in markup only; each run between two of them is encoded whole
    history    if the whole does not begin with the prompt as it is at inference, each answer becomes an example of its own

Skeletons depend on the shape of a conversation (roles, tools), so they are made once a shape; a row costs its rendering, the fit
and the encoding.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tunesmith.config.schema import Data
from tunesmith.data.template import Fault, Job, Sandbox, Texts
from tunesmith.errors import DataError, TemplateError
from tunesmith.tokenizer import SPACE, Tokenizer
from tunesmith.types import Conversation, Example, Message, Origin

VERSION = 1  # raise it when the same conversation would give other ids or another mask
ASSISTANT = "assistant"
ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_ -]{0,31}")
SENTINEL, OPEN, CLOSE = 0xF1000, 0xF5000, 0xF9000  # private-use characters, one per field: instead of it, before it, after it
FIELDS = re.compile("[\U000f1000-\U000fcfff]")
REASONING = 0x1000  # field number of message i's reasoning_content is REASONING + i; of its content, i
GUARD = "\U000ffffd"  # splits a special token's text inside a tool's or a call's strings; taken out again before encoding
MERGED = "merged same-role turns"
MEMO = 20_000  # markup runs whose ids are remembered
SHAPES = 2_000  # conversation shapes remembered

PLAIN = """\
{%- for message in messages %}
{%- if message.role == 'system' %}{{ message.content + '\\n\\n' }}
{%- elif message.role == 'user' %}{{ '### User:\\n' + message.content + '\\n\\n' }}
{%- elif message.role == 'assistant' %}{{ '### Assistant:\\n' + message.content + eos_token + '\\n\\n' }}
{%- else %}{{ raise_exception('the plain template has no role ' + message.role) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"""
"""For a base model without a chat template: text markers and EOS, no new tokens. BOS goes first where the tokenizer adds one."""


class RowRefused(DataError):
    """One conversation that cannot be rendered right, with the reason. `tokens` is its length when it is too long, else 0."""

    def __init__(self, what: str, fix: str = "", tokens: int = 0):
        super().__init__(what, fix)
        self.tokens = tokens

    def __reduce__(self):
        return type(self), (self.what, self.fix, self.tokens)


@dataclass(frozen=True, slots=True)
class Rendered:
    """What became of one conversation: its examples, what was mended on the way, and which part was cut ("" when nothing was)."""

    examples: tuple[Example, ...]
    notes: tuple[str, ...] = ()
    truncated: str = ""


@dataclass(frozen=True, slots=True)
class Question:
    """A conversation's last prompt as the model gets it, as a person reads it, and the answer that was written to it."""

    ids: tuple[int, ...]
    shown: str
    gold: str


@dataclass(frozen=True, slots=True)
class _Chat:
    """A conversation made ready for the template."""

    messages: list[dict[str, Any]]
    contents: dict[int, str]  # field number -> text, fields with text only
    tools: tuple[dict[str, Any], ...]
    answers: tuple[int, ...]  # indices of the assistant messages
    trained: tuple[int, ...]  # those that are learned
    prompt: bool  # a prompt for inference: nothing is learned, the generation prompt stands at the end
    key: Any  # conversations with one key have one skeleton
    notes: tuple[str, ...]
    guarded: bool

    def asked(self) -> list[tuple[int, bool]]:
        """The renderings needed: the whole; the prompt of each answer; and the conversation up to each learned one."""
        n = len(self.messages)
        prompts = [(t, True) for t in self.answers if t or t in self.trained]  # a greeting that is not learned needs none
        return list(dict.fromkeys([(n, self.prompt), *prompts, *((t + 1, False) for t in self.trained)]))


Spot = tuple[int, int, int]  # begin, end, field number


@dataclass(frozen=True, slots=True)
class _Document:
    """One text to be encoded: where its fields stand, which spans are learned (from a prompt's end through a stop), and where the
    prompts of other answers end: the ids of what came before an answer never depend on it."""

    text: str
    spots: tuple[Spot, ...]
    marks: tuple[tuple[int, int], ...] = ()
    joins: tuple[int, ...] = ()


# what a document is put together from
TEXT, FIELD, ID, START, END = range(5)
Op = tuple[int, Any, Any]


@dataclass(slots=True)
class _Shape:
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


class _World:
    """The renderings of one conversation and where its fields stand in them. `_Skeleton` and `_Real` tell how."""

    def text(self, n: int, prompt: bool) -> str:
        raise NotImplementedError

    def spots(self, n: int, prompt: bool) -> list[Spot]:
        raise NotImplementedError


class _Skeleton(_World):
    def __init__(self, asked: Sequence[tuple[int, bool]], texts: Texts):
        self._texts = {pair: texts[k] for k, pair in enumerate(asked)}

    def text(self, n: int, prompt: bool) -> str:
        return self._texts[n, prompt]

    def spots(self, n: int, prompt: bool) -> list[Spot]:
        found = [(m.start(), m.end(), ord(m[0]) - SENTINEL) for m in FIELDS.finditer(self._texts[n, prompt])]
        _once(found)
        return found


class _Real(_World):
    def __init__(self, renderer: Renderer, chat: _Chat, shape: _Shape, asked: Sequence[tuple[int, bool]], texts: Texts):
        self._renderer, self._chat, self._shape = renderer, chat, shape
        self._texts = {pair: texts[k] for k, pair in enumerate(asked)}
        self._spots: dict[tuple[int, bool], list[Spot]] = {}

    def text(self, n: int, prompt: bool) -> str:
        return self._texts[n, prompt]

    def spots(self, n: int, prompt: bool) -> list[Spot]:
        if (n, prompt) not in self._spots:
            text, chat, renderer = self._texts[n, prompt], self._chat, self._renderer
            found = None
            if (n, prompt) in self._shape.skeletons:
                found = _fit_spots(text, *self._shape.skeletons[n, prompt], chat.contents)
            if found is None:
                found = renderer._spots_around(chat, n, prompt, text)
            if found is None:
                found = renderer._spots_one_by_one(chat, n, prompt, text, self._shape.texts.get((n, prompt)))
            self._spots[n, prompt] = found
        return self._spots[n, prompt]


class Renderer:
    """Renders conversations through one template.

    template    `auto` the checkpoint's own chat template (`plain` where it has none), `plain`, or a jinja file
    train_on    `all` assistant turns or the `last` one; a message's own `learn` wins
    add_eos     put EOS after each answer of a template that writes no stop token of its own
    max_length  longest example in tokens; `overlength` refuses longer rows or cuts them at the end
    date        the day a template may print, as date or ISO text; today when None. Save it with the run: `Renderer.date`

    Raises TemplateError when the template is broken, or ends no answer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str = "auto",
        train_on: Literal["all", "last"] = "all",
        add_eos: bool = False,
        max_length: int = 2048,
        overlength: Literal["refuse", "truncate"] = "refuse",
        date: str | datetime.date | None = None,
    ):
        self.tokenizer, self.train_on, self.add_eos = tokenizer, train_on, add_eos
        self.max_length, self.overlength = max_length, overlength
        day = datetime.date.fromisoformat(date) if isinstance(date, str) else date or datetime.date.today()
        self.date = day.isoformat()
        """The day the template sees, ISO."""
        self.source, self.templates = _choose(tokenizer, template)
        self._sandbox = Sandbox(self.templates, tokenizer.named, date=day)
        self._shapes: dict[Any, _Shape] = {}
        self._memo: dict[tuple[str, str], list[int]] = {}
        self._stops: frozenset[int] | None = None
        self._own_stop: int | None = None

    # ---- facts

    @property
    def template(self) -> str:
        """The jinja text in use without tools."""
        return self.templates["default"]

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an assistant turn: the template's own stop, EOS, and generation_config.json's."""
        try:
            self._vet()
        except TemplateError:
            return self.tokenizer.stop_ids
        return self._stops

    @property
    def fingerprint(self) -> str:
        """sha256 over all that decides ids and masks."""
        dated = any("strftime_now" in text for text in self.templates.values())
        facts = [VERSION, self.tokenizer.fingerprint, self.templates, self.train_on, self.add_eos, self.max_length, self.overlength]
        return hashlib.sha256(json.dumps([*facts, self.date if dated else ""], sort_keys=True).encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer with the template in use: `build_renderer(folder, ..., saved=True)` renders the same, and so does
        every other program that reads the folder."""
        self.tokenizer.save(folder, self.templates)

    def close(self) -> None:
        """End the template's process. The next rendering starts a fresh one."""
        self._sandbox.close()

    def describe(self) -> str:
        """One line: which template, what is learned, what stops an answer."""
        self._vet()
        which = "every assistant turn" if self.train_on == "all" else "the last assistant turn"
        stop = repr(self.tokenizer.token(self._own_stop if self._own_stop is not None else self.tokenizer.eos_id))
        others = sorted(self._stops - {self._own_stop})
        more = f"; generation also stops at {', '.join(repr(self.tokenizer.token(i)) for i in others)}" if others else ""
        added = "" if self._own_stop is not None else " (put after each answer by data.add_eos)"
        return f"{self.source}; learned: {which}, from the end of its prompt through {stop}{added}{more}"

    def _vet(self) -> None:
        """Once: render a small conversation, find the token that ends an answer. TemplateError if there is none."""
        if self._stops is not None:
            return
        probe: Texts | Fault | None = None
        for roles in (("user", ASSISTANT), ("system", "user", ASSISTANT)):
            messages = [{"role": role, "content": chr(SENTINEL + i)} for i, role in enumerate(roles)]
            probe = self._sandbox.render([Job(messages, [(len(roles), False)])])[0]
            if isinstance(probe, Texts):
                break
        if isinstance(probe, Fault) and probe.kind != "raised":
            fix = _fix_of(probe) or "correct the template, or name another with data.template"
            raise TemplateError(f"{self.source}: {probe}", fix)
        stops = self.tokenizer.stop_ids
        if isinstance(probe, Texts):
            found = _Skeleton([(0, False)], probe)
            spots = found.spots(0, False)
            last = next((end for _, end, f in spots if f == len(roles) - 1), None)
            tokens = self._scan(found.text(0, False), spots)
            not_stop = {self.tokenizer.bos_id} - {self.tokenizer.eos_id}
            own = next((i for begin, _, i in tokens if last is not None and begin >= last and i not in not_stop), None)
            if own is None and not self.add_eos:
                tail = found.text(0, False)[last:] if last is not None else ""
                raise TemplateError(
                    f"{self.source}: no token ends an answer (after it comes {FIELDS.sub('', tail)!r}, which is text"
                    " to this tokenizer): a model trained so never stops",
                    "set data.add_eos: true, or name another template",
                )
            if own is None and self.tokenizer.eos_id is None:
                raise TemplateError(f"{self.source}: data.add_eos needs an EOS token", "set eos_token in tokenizer_config.json")
            self._own_stop = own
            stops = stops | ({own} if own is not None else {self.tokenizer.eos_id})
        else:
            self._own_stop = self.tokenizer.eos_id
        self._stops = frozenset(stops)

    # ---- the face

    def examples(self, conversation: Conversation) -> Rendered:
        """One conversation's examples. Raises RowRefused."""
        rendered = self.examples_many([conversation])[0]
        if isinstance(rendered, RowRefused):
            raise rendered
        return rendered

    def examples_many(self, conversations: Sequence[Conversation]) -> list[Rendered | RowRefused]:
        """Examples of many conversations, in order: a refused one comes back as the RowRefused that tells why."""
        results: list[Rendered | RowRefused | None] = [None] * len(conversations)
        work = _Encoding(self.tokenizer, self._memo)
        drafts: list[tuple[int, Sequence[list[Any]], tuple[str, ...]]] = []
        chats: list[tuple[int, _Chat]] = []
        for k, conversation in enumerate(conversations):
            try:
                if conversation.kind == "chat":
                    chats.append((k, self._chat(conversation.messages, conversation.tools)))
                elif conversation.kind == "completion":
                    drafts.append((k, [self._completion(conversation, work)], ()))
                else:
                    drafts.append((k, [self._raw(conversation, work)], ()))
            except RowRefused as refused:
                results[k] = refused
        if chats:
            self._vet()
            shapes = self._shapes_of([chat for _, chat in chats])
            seen = [chat for (_, chat), shape in zip(chats, shapes, strict=True) if not shape.blind]
            answers = iter(self._sandbox.render([self._job(chat) for chat in seen]))
            for (k, chat), shape in zip(chats, shapes, strict=True):
                answer = None if shape.blind else next(answers)
                try:
                    plan = self._plan(chat, shape, answer)
                    drafts.append((k, [work.draft(ops, values, chat.guarded) for ops, values in plan], chat.notes))
                except RowRefused as refused:
                    results[k] = refused
        work.run()
        for k, parts, notes in drafts:
            conversation = conversations[k]
            try:
                documents = [work.finish(part) for part in parts]
                if conversation.kind == "text":
                    results[k] = Rendered(tuple(self._windows(documents[0][0], conversation.origin)), notes)
                else:
                    results[k] = self._rendered(documents, conversation, notes)
            except RowRefused as refused:
                results[k] = refused
        return results

    def prompt(self, messages: Sequence[Message | Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Ids for inference: the conversation so far and the generation prompt, by the same code as training. Raises RowRefused."""
        self._vet()
        chat = self._chat([_message(m) for m in messages], tuple(dict(t) for t in tools), prompt=True)
        shape = self._shapes_of([chat])[0]
        if shape.refused:
            raise RowRefused(shape.refused)
        n, world = len(chat.messages), _Real(self, chat, shape, chat.asked(), self._render_one(chat, chat.asked()))
        document = self._joined(world, chat, _Document(world.text(n, True), tuple(world.spots(n, True))), n)
        self._complete(chat, document, n, ())
        work = _Encoding(self.tokenizer, self._memo)
        draft = work.draft(self._ops(document, chat), _values(document), chat.guarded)
        work.run()
        return work.finish(draft)[0]

    def raw_prompt(self, text: str) -> list[int]:
        """Ids of a prompt without template, as `completion` rows are trained: BOS where the tokenizer adds one, then the text."""
        return [*self.tokenizer.prefix_ids, *self.tokenizer.encode(text)]

    def text(
        self, messages: Sequence[Message | Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (), prompt: bool = False
    ) -> str:
        """The rendering as text, with the generation prompt when `prompt`."""
        chat = self._chat([_message(m) for m in messages], tuple(dict(t) for t in tools), prompt=True)
        return self._render_one(chat, [(len(chat.messages), prompt)])[0].replace(GUARD, "")

    def question(self, conversation: Conversation) -> Question | None:
        """The last prompt of a conversation that ends in an answer, and that answer; None for others and for refused ones."""
        if conversation.kind == "text" or len(conversation.messages) < 2:
            return None
        *before, last = conversation.messages
        try:
            if conversation.kind == "completion":
                return Question(tuple(self.raw_prompt(before[0].content)), before[0].content, last.content)
            if last.role != ASSISTANT:
                return None
            shown = next((m.content for m in reversed(before) if m.role == "user"), "")
            return Question(tuple(self.prompt(before, conversation.tools)), shown, last.content)
        except RowRefused:
            return None

    # ---- conversations without a template

    def _completion(self, conversation: Conversation, work: _Encoding) -> list[Any]:
        """BOS, prompt, completion, EOS; the completion and EOS are learned. The prompt's ids are those of inference (`raw_prompt`):
        where a token of the joint text would hold the prompt's end and the completion's start, their own ids are joined instead."""
        prompt, completion = (m.content for m in conversation.messages)
        for i, text in enumerate((prompt, completion)):
            _writable(text, i)
        if not completion:
            raise RowRefused("the completion is empty: no token is trained")
        ops: list[Op] = [(ID, i, None) for i in self.tokenizer.prefix_ids]
        ops += [(FIELD, 0, False), (START, True, None), (FIELD, 1, False), (ID, self._eos(), None), (END, None, None)]
        return work.draft(ops, {0: prompt, 1: completion}, False, lead=True)

    def _raw(self, conversation: Conversation, work: _Encoding) -> list[Any]:
        text = "".join(m.content for m in conversation.messages)
        _writable(text, 0)
        if not text.strip():
            raise RowRefused("the text is empty")
        ops: list[Op] = [(ID, i, None) for i in self.tokenizer.prefix_ids]
        return work.draft([*ops, (FIELD, 0, False), (ID, self._eos(), None)], {0: text}, False, lead=True)

    def _windows(self, ids: list[int], origin: Origin) -> Iterator[Example]:
        """Windows of at most max_length. Each begins with the last token of the one before, so every token of the document
        but the first is learned exactly once."""
        row, step = np.asarray(ids, np.int32), self.max_length - 1
        for begin in range(0, max(1, len(row) - 1), step):
            window = row[begin : begin + self.max_length]
            learn = np.ones(len(window), bool)
            learn[0] = False
            yield Example(window, learn, origin)

    def _eos(self) -> int:
        if (eos := self.tokenizer.eos_id) is None:
            raise TemplateError("the tokenizer names no EOS token", "set eos_token in the checkpoint's tokenizer_config.json")
        return eos

    # ---- chats

    def _chat(self, messages: Sequence[Message], tools: tuple[dict[str, Any], ...], prompt: bool = False) -> _Chat:
        """Check, merge same-role turns, settle what is learned, guard the strings of tools and calls."""
        merged: list[Message] = []
        notes: tuple[str, ...] = ()
        for message in messages:
            last = merged[-1] if merged else None
            if (
                last is not None
                and last.role == message.role != "tool"
                and not last.extra
                and not message.extra
                and last.learn == message.learn
            ):
                merged[-1] = Message(last.role, f"{last.content}\n\n{message.content}", last.learn)
                notes = (MERGED,)
            else:
                merged.append(message)
        if not merged:
            raise RowRefused("the conversation has no messages")
        if len(merged) > 4000:
            raise RowRefused(f"{len(merged)} messages in one conversation; 4000 is the most")
        for i, message in enumerate(merged):
            if not ROLE.fullmatch(message.role):
                raise RowRefused(f"message {i + 1} has the role {message.role!r}, which is no name")
            _writable(message.content, i)
            if message.learn and message.role != ASSISTANT:
                raise RowRefused(f"message {i + 1} ({message.role}) asks to be learned; only assistant messages can be")
        answers = [i for i, m in enumerate(merged) if m.role == ASSISTANT]
        wanted = answers if self.train_on == "all" else answers[-1:]
        trained = () if prompt else tuple(i for i in answers if (i in wanted if merged[i].learn is None else merged[i].learn))
        if not prompt and not answers:
            raise RowRefused("no assistant message: no token is trained")
        if not prompt and not trained:
            raise RowRefused("every assistant message asks not to be learned: no token is trained")
        contents = {i: m.content for i, m in enumerate(merged) if m.content}
        guarded = False
        if tools or any(m.extra for m in merged):
            rows, extras = [], []
            for i, message in enumerate(merged):
                extra = {k: v for k, v in message.extra if v is not None}
                if isinstance(reasoning := extra.get("reasoning_content"), str) and reasoning and message.role == ASSISTANT:
                    _writable(reasoning, i)
                    contents[REASONING + i] = reasoning
                    extra.pop("reasoning_content")
                safe = self._guard(extra, message.role)
                guarded |= safe != extra
                extras.append(safe)
                rows.append({"role": message.role, "content": message.content, **safe})
                if REASONING + i in contents:
                    rows[-1]["reasoning_content"] = contents[REASONING + i]
            safe = self._guard(list(tools), "tool")
            guarded |= safe != list(tools)
            tools = tuple(safe)
            key: Any = json.dumps(
                [[m.role for m in merged], sorted(contents), trained, extras, tools], sort_keys=False, default=str
            )
        else:
            rows = [{"role": m.role, "content": m.content} for m in merged]
            key = (tuple(m.role for m in merged), trained, None if len(contents) == len(merged) else tuple(contents))
        return _Chat(rows, contents, tools, tuple(answers), trained, prompt, (prompt, key), notes, guarded)

    def _guard(self, value: Any, role: str) -> Any:
        """Break up the texts of special tokens in every string of a tool definition or call, so that they are never matched."""
        if isinstance(value, str):
            _writable(value, -1)
            pattern = self._specials if role == ASSISTANT else self.tokenizer.markup_pattern
            return pattern.sub(lambda m: m[0][0] + GUARD + m[0][1:], value) if pattern else value
        if isinstance(value, Mapping):
            return {self._guard(k, role) if isinstance(k, str) else k: self._guard(v, role) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._guard(v, role) for v in value]
        return value

    @cached_property
    def _specials(self) -> re.Pattern[str] | None:
        names = sorted((self.tokenizer.token(i) for i in self.tokenizer.special_ids), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names))) if names else None

    def _job(
        self, chat: _Chat, messages: list[dict[str, Any]] | None = None, asked: Sequence[tuple[int, bool]] | None = None
    ) -> Job:
        name = "tool_use" if chat.tools and "tool_use" in self.templates else "default"
        return Job(chat.messages if messages is None else messages, asked or chat.asked(), chat.tools, name)

    def _render_one(self, chat: _Chat, asked: Sequence[tuple[int, bool]], messages: list[dict[str, Any]] | None = None) -> Texts:
        answer = self._sandbox.render([self._job(chat, messages, asked)])[0]
        if isinstance(answer, Fault):
            raise RowRefused(str(answer), _fix_of(answer))
        return answer

    def _plan(self, chat: _Chat, shape: _Shape, answer: Texts | Fault | None) -> list[tuple[list[Op], dict[int, str]]]:
        """The documents of a conversation, each as what to put together and the fields' texts. `answer`: its own rendering; None
        where the template does not look at texts."""
        if isinstance(answer, Fault):
            raise RowRefused(str(answer), _fix_of(answer))
        if shape.refused:
            raise RowRefused(shape.refused)
        if answer is None:
            values = chat.contents
            return [(shape.ops, values | {f: values[f].strip() for f in shape.trimmed} if shape.trimmed else values)]
        if shape.ops is not None and (values := _quick(shape, chat, answer)) is not None:
            return [(shape.ops, values)]
        documents = self._documents(_Real(self, chat, shape, chat.asked(), answer), chat)
        return [(self._ops(document, chat), _values(document)) for document in documents]

    def _shapes_of(self, chats: Sequence[_Chat]) -> list[_Shape]:
        """The shape of each conversation; those not seen before are rendered, all at once, and remembered."""
        new = list({chat.key: chat for chat in chats if chat.key not in self._shapes}.values())
        if len(self._shapes) > SHAPES:
            self._shapes.clear()
            new = list({chat.key: chat for chat in chats}.values())
        jobs: list[Job] = []
        reasons: list[list[str]] = []
        for chat in new:
            rows = [_replaced(m, i, chat.contents, SENTINEL, None) for i, m in enumerate(chat.messages)]
            jobs.append(replace(self._job(chat, rows), blind=not chat.prompt))
            without = list(self._without(chat, rows, chat.asked()[0]))
            jobs += [job for job, _ in without]
            reasons.append([reason for _, reason in without])
        answers = iter(self._sandbox.render(jobs))
        for chat, why in zip(new, reasons, strict=True):
            self._shapes[chat.key] = self._shape(chat, next(answers), [(next(answers), reason) for reason in why])
        return [self._shapes[chat.key] for chat in chats]

    def _shape(self, chat: _Chat, answer: Texts | Fault, without: list[tuple[Texts | Fault, str]]) -> _Shape:
        """What a conversation's shape tells, from its rendering with sentinels and those without one of its parts."""
        shape = _Shape()
        if isinstance(answer, Fault):
            return shape
        asked = chat.asked()
        world = _Skeleton(asked, answer)
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

    def _settle(self, shape: _Shape, chat: _Chat, world: _Skeleton, asked: list[tuple[int, bool]]) -> None:
        """If the whole conversation is one example, remember how it is put together and what a row must fulfil."""
        documents = self._documents(world, chat)
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
        shape.ops = self._ops(document, chat)

    def _without(self, chat: _Chat, rows: list[dict[str, Any]], pair: tuple[int, bool]) -> Iterator[tuple[Job, str]]:
        """Renderings without a part that has no field of its own; one that equals the whole shows that the template drops it."""
        if chat.tools:
            job = self._job(chat, rows, [pair])
            yield Job(job.messages, job.asked, (), job.template), "the template does not show the tools"
        for i, row in enumerate(rows):
            if row.get("tool_calls"):
                bare = [{k: v for k, v in row.items() if k != "tool_calls"} if j == i else other for j, other in enumerate(rows)]
                yield self._job(chat, bare, [pair]), f"the template drops the tool calls of message {i + 1}"
            elif not row["content"]:
                fewer = [other for j, other in enumerate(rows) if j != i]
                if fewer:
                    text = f"message {i + 1} ({row['role']}) is empty and does not appear in the template's rendering"
                    yield self._job(chat, fewer, [(len(fewer), pair[1])]), text

    # ---- where the fields stand, for a template that looks into the content

    def _spots_around(self, chat: _Chat, n: int, prompt: bool, text: str) -> list[Spot] | None:
        """Render with a sentinel before and after each field: the template still sees the content it looks for."""
        rows = [_replaced(m, i, chat.contents, OPEN, CLOSE) for i, m in enumerate(chat.messages[:n])]
        answer = self._sandbox.render([self._job(chat, rows, [(n, prompt)])])[0]
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
        return _fit_spots(text, pieces, order, inside)

    def _spots_one_by_one(self, chat: _Chat, n: int, prompt: bool, text: str, skeleton: str | None) -> list[Spot]:
        """Render with a sentinel in place of one field at a time: what is before and after it is about the others."""
        fields = [f for f in chat.contents if f % REASONING < n]
        rows = [[_replaced(m, i, {f: chat.contents[f]}, SENTINEL, None) for i, m in enumerate(chat.messages[:n])] for f in fields]
        answers = self._sandbox.render([self._job(chat, row, [(n, prompt)]) for row in rows])
        found: list[Spot] = []
        for f, answer in zip(fields, answers, strict=True):
            if isinstance(answer, Fault):
                raise RowRefused(str(answer), _fix_of(answer))
            parts = answer[0].split(chr(SENTINEL + f))
            if len(parts) == 1:
                continue  # not in this rendering: whether it had to be is for the whole document to say
            if len(parts) > 2:
                raise RowRefused(f"{_who(chat, f)} appears {len(parts) - 1} times in the template's rendering")
            begin, end = _common(text, parts[0]), len(text) - _common(text[::-1], parts[1][::-1])
            if begin > end:
                begin = end = max(begin, end) if not chat.contents[f].strip() else -1
            got, whole = "".join(text[begin:end].split()), "".join(chat.contents[f].split())
            cut_thoughts = chat.messages[f % REASONING]["role"] == ASSISTANT and "</think>" in whole and got and got in whole
            if begin < 0 or not (got == whole or cut_thoughts):
                raise RowRefused(f"the template changes its own text with {_who(chat, f)}: cannot tell which text is whose")
            found.append((begin, end, f))
        found.sort()
        if any(a[1] > b[0] for a, b in pairwise(found)):
            raise RowRefused("the template's rendering mixes two messages: cannot tell which text is whose")
        if skeleton is not None:
            bare = [(m.start(), m.end(), 0) for m in FIELDS.finditer(skeleton)]
            here, there = (
                [i for *_, i in self._scan(*of) if i in self.tokenizer.special_ids] for of in ((text, found), (skeleton, bare))
            )
            if here != there:
                raise RowRefused("the template writes other special tokens for this content: cannot tell whose they are")
        return found

    # ---- documents

    def _documents(self, world: _World, chat: _Chat) -> list[_Document]:
        """What is trained of a conversation: the whole as one document when it begins, at every learned answer, exactly with the
        prompt of inference and that answer; else a document for each answer."""
        n = len(chat.messages)
        whole = world.text(n, False)
        singles, agree = [], True
        for t in chat.trained:
            text, spots, begin, stop = self._answer(world, chat, t)
            singles.append((t, _Document(text, spots, ((begin, stop),))))
            agree = agree and whole[:stop] == text[:stop]
        if agree:
            document = _Document(whole, tuple(world.spots(n, False)), tuple(d.marks[0] for _, d in singles))
            self._complete(chat, document, n, chat.trained)
            return [self._joined(world, chat, document, n)]
        for t, document in singles:
            self._complete(chat, document, t + 1, (t,))
        return [self._joined(world, chat, document, t) for t, document in singles]

    def _joined(self, world: _World, chat: _Chat, document: _Document, n: int) -> _Document:
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
        return _Document(document.text, document.spots, document.marks, tuple(joins))

    def _answer(self, world: _World, chat: _Chat, t: int) -> tuple[str, tuple[Spot, ...], int, int]:
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
        if self._own_stop is None:
            if t not in chat.contents:
                raise RowRefused(f"message {t + 1} has no text to put EOS after")
            return text, tuple(spots), begin, end
        stop = next((stop for at, stop, i in self._scan(text, spots) if at >= end and i in self._stops), None)
        if stop is None:
            raise RowRefused(f"no stop token after message {t + 1}: the stop is never trained")
        return text, tuple(spots), begin, stop

    def _join(self, world: _World, t: int, prompt: str, text: str, spots: list[Spot]) -> tuple[str, list[Spot]]:
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

    def _complete(self, chat: _Chat, document: _Document, n: int, trained: Iterable[int]) -> None:
        """Every message of the first `n` exactly once, or RowRefused."""
        fields = [f for *_, f in document.spots]
        _once(document.spots)
        needed = [f for f in chat.contents if f < n or f - REASONING in trained]
        for f in needed:
            if f not in fields:
                raise RowRefused(f"{_who(chat, f)} does not appear in the template's rendering")

    # ---- from a document to ids

    def _scan(self, text: str, spots: Iterable[Spot]) -> list[tuple[int, int, int]]:
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

    def _ops(self, document: _Document, chat: _Chat) -> list[Op]:
        """The document as texts, fields, ids and marks in order."""
        closer: Op = (TEXT, "", None)
        events: list[tuple[int, int, Op]] = []  # where, order of those at one place, what
        for begin, end, f in document.spots:
            assistant = chat.messages[f % REASONING]["role"] == ASSISTANT
            if end > begin:
                events += [(begin, 4, (FIELD, f, assistant)), (end, 0, closer)]
            if self._own_stop is None and assistant and f < REASONING:
                events.append((end, 2, (ID, self._eos(), None)))
        for begin, end, index in self._scan(document.text, document.spots):
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

    # ---- examples

    def _rendered(
        self, documents: list[tuple[list[int], list[tuple[int, int]]]], conversation: Conversation, notes: tuple[str, ...]
    ) -> Rendered:
        """Masks, the hard errors, and what is cut."""
        examples, cut = [], ""
        answers = sum(len(spans) for _, spans in documents)
        longest = max(len(ids) for ids, _ in documents)
        for ids, spans in documents:
            row, learn = np.array(ids, np.int32), np.zeros(len(ids), bool)
            stops = self.tokenizer.stop_ids if conversation.kind == "completion" else self._stops
            for begin, end in spans:
                if end <= max(begin, 1):
                    raise RowRefused("an answer has no token that is trained")
                if ids[end - 1] not in stops:
                    raise RowRefused("the stop token is never trained")
                learn[begin:end] = True
            learn[0] = False
            if len(ids) > self.max_length:
                last = spans[-1][1]
                if last > self.max_length and self.overlength == "refuse":
                    raise RowRefused(f"{longest} tokens, and data.max_length is {self.max_length}", tokens=longest)
                where = sum(end > self.max_length for _, end in spans)
                part = (
                    "text after the last answer" if not where else "the end of the answer" if answers == 1 else "the last answers"
                )
                cut = part if where or not cut else cut
                row, learn = row[: self.max_length], learn[: self.max_length]
                if not learn.any():
                    continue
            examples.append(Example(row, learn, conversation.origin))
        if not examples:
            raise RowRefused(f"the prompt alone fills data.max_length ({self.max_length}); {longest} tokens in all", tokens=longest)
        return Rendered(tuple(examples), notes, cut)


class _Encoding:
    """The runs of text of a batch, encoded together."""

    def __init__(self, tokenizer: Tokenizer, memo: dict[tuple[str, str], list[int]]):
        self.tokenizer, self.memo = tokenizer, memo
        if len(memo) > MEMO:
            memo.clear()
        self.slots: list[list[int] | None] = []
        self.queue: dict[str, list[int]] = {"lead": [], "rest": []}
        self.texts: list[str] = []

    def _add(self, text: str, where: str, fixed: bool) -> int:
        """A slot that will hold the ids of `text`; `fixed` texts (no field in them) are remembered for the next rows."""
        self.texts.append(text)
        known = self.memo.get((where, text)) if fixed else None
        if known is None:
            if fixed:
                known = self.memo[where, text] = self.tokenizer.encode_batch([text], where)[0]
            else:
                self.queue[where].append(len(self.slots))
        self.slots.append(known)
        return len(self.slots) - 1

    def draft(self, ops: Sequence[Op], values: Mapping[int, str], guarded: bool, lead: bool = False) -> list[Any]:
        """Gather a document's runs. `lead`: the text after the first ids is still the beginning of a text (BOS put there by
        hand)."""
        tokenizer = self.tokenizer
        markers = tokenizer.marker_pattern
        items: list[Any] = []
        parts: list[str] = []
        fixed, cut, fixed_head, strip, first, learn = True, -1, True, False, True, False

        def flush(before: bool) -> None:
            nonlocal fixed, cut, strip, first
            text = "".join(parts)
            parts.clear()
            if guarded and GUARD in text:
                head = text[:cut].count(GUARD) if cut > 0 else 0
                text, cut = text.replace(GUARD, ""), cut - head
            if strip:
                stripped = text.lstrip(SPACE)
                cut = max(cut - len(text) + len(stripped), 0) if cut >= 0 else cut
                text = stripped
            if before:
                text = text.rstrip(SPACE)
            if text:
                where = "lead" if first else "rest"
                if cut <= 0 or cut >= len(text):
                    run = (self._add(text, where, fixed),)
                    items.extend([run] if cut < 0 or not learn else [START, run] if cut == 0 else [run, START])
                else:
                    items.append((self._add(text, where, fixed), self._add(text[:cut], where, fixed_head), cut, learn))
                first = False
            elif cut >= 0 and learn:
                items.append(START)
            fixed, cut, strip = True, -1, False

        for kind, a, b in ops:
            if kind == TEXT:
                parts.append(a)
            elif kind == FIELD:
                value = values[a]
                if b and markers is not None and (found := list(markers.finditer(value))):
                    at = 0
                    for match in found:
                        parts.append(value[at : match.start()])
                        index = tokenizer.token_to_id(match[0])
                        token = tokenizer.added[index]
                        fixed = fixed and at == match.start()
                        flush(token.lstrip)
                        items.append([index])
                        first, strip, at = False, token.rstrip, match.end()
                    value = value[at:]
                parts.append(value)
                fixed = False
            elif kind == ID:
                flush(b is not None and b.lstrip)
                items.append([a])
                first, strip = lead, b is not None and b.rstrip
            elif kind == START:
                if parts:
                    cut, fixed_head, learn = len("".join(parts)), fixed, a
                elif a:
                    items.append(START)
            else:
                items.append(END)
        flush(False)
        return items

    def run(self) -> None:
        """Encode everything gathered."""
        for where, slots in self.queue.items():
            if slots:
                for slot, ids in zip(slots, self.tokenizer.encode_batch([self.texts[s] for s in slots], where), strict=True):
                    self.slots[slot] = ids
                slots.clear()

    def finish(self, items: list[Any]) -> tuple[list[int], list[tuple[int, int]]]:
        """(ids, learned spans) of a document. Where the prompt's ids do not begin its run's ids, those of prompt and answer are
        joined."""
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        begin = 0
        for item in items:
            if item == START:
                begin = len(ids)
            elif item == END:
                spans.append((begin, len(ids)))
            elif isinstance(item, list):
                ids += item
            else:
                run = self.slots[item[0]]
                if len(item) == 4:
                    head = self.slots[item[1]]
                    if run[: len(head)] != head:
                        run = head + self.tokenizer.encode_batch([self.texts[item[0]][item[2] :]], "bare")[0]
                    if item[3]:
                        begin = len(ids) + len(head)
                ids += run
        return ids, spans


# ---- small parts


def _choose(tokenizer: Tokenizer, template: str) -> tuple[str, dict[str, str]]:
    """(what it is called, {name: text}) of the wanted template."""
    if template == "auto" and tokenizer.template is not None:
        return "the checkpoint's chat template", dict(tokenizer.templates)
    if template in ("auto", "plain"):
        if tokenizer.eos_token is None:
            raise TemplateError("the plain template needs an EOS token", "set eos_token in the checkpoint's tokenizer_config.json")
        begins = tokenizer.bos_id is not None and tokenizer.bos_id in tokenizer.prefix_ids
        return "the plain template", {"default": ("{{ bos_token }}" if begins else "") + PLAIN}
    path = Path(template)
    try:
        return f"template {path.name}", {"default": path.read_text(encoding="utf-8")}
    except (OSError, UnicodeDecodeError) as fault:
        raise TemplateError(
            f"data.template: cannot read {template} ({fault})", "auto, plain, or the path of a jinja file"
        ) from fault


def _fix_of(fault: Fault) -> str:
    return "set the token in tokenizer_config.json, or name another template" if "_token' is undefined" in fault.message else ""


def _message(message: Message | Mapping[str, Any]) -> Message:
    if isinstance(message, Message):
        return message
    extra = {k: v for k, v in message.items() if k not in ("role", "content")}
    return Message(str(message.get("role")), message.get("content") or "", None, tuple(extra.items()))


def _writable(text: str, i: int) -> None:
    """Half of a surrogate pair is no text; private-use characters of ours would be taken for sentinels."""
    if not text.isascii():
        where = f"message {i + 1}" if i >= 0 else "a tool or a tool call"
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RowRefused(f"{where} holds half a surrogate pair, which is no character") from None
        if FIELDS.search(text) or GUARD in text:
            raise RowRefused(f"{where} holds private-use characters that mark fields here")


def _replaced(message: dict[str, Any], i: int, contents: Mapping[int, str], before: int, after: int | None) -> dict[str, Any]:
    """The message with its fields replaced by (or, with `after`, put between) sentinels."""
    changed = dict(message)
    for f, name in ((i, "content"), (REASONING + i, "reasoning_content")):
        if f in contents:
            changed[name] = chr(before + f) if after is None else chr(before + f) + contents[f] + chr(after + f)
    return changed


def _who(chat: _Chat, f: int) -> str:
    i = f % REASONING
    return f"message {i + 1} ({chat.messages[i]['role']}{', its reasoning' if f >= REASONING else ''})"


def _once(spots: Iterable[Spot]) -> None:
    seen: set[int] = set()
    for *_, f in spots:
        if f in seen:
            raise RowRefused(f"message {f % REASONING + 1} appears more than once in the template's rendering")
        seen.add(f)


def _common(text: str, other: str) -> int:
    """Length of the common prefix."""
    low, high = 0, min(len(text), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text[:middle] == other[:middle] else (low, middle - 1)
    return low


def _variants(text: str) -> Iterator[str]:
    """What templates make of a content: as it is, trimmed, or inside JSON."""
    yield text
    for cut in (text.strip(), text.lstrip(), text.rstrip(), text.lstrip("\n"), text.rstrip("\n"), text.strip("\n")):
        if cut != text:
            yield cut
    yield json.dumps(text, ensure_ascii=False)[1:-1]
    yield json.dumps(text)[1:-1]


def _fit(text: str, pieces: Sequence[str], order: Sequence[int], contents: Mapping[int, str]) -> tuple[list[str], list[int]] | None:
    """The fields' texts and ends if `text` is the pieces with the contents between them; None if it is not."""
    if not text.startswith(pieces[0]):
        return None
    at, values, ends, last = len(pieces[0]), [], [0], len(order) - 1
    for k, f in enumerate(order):
        piece = pieces[k + 1]
        for value in _variants(contents[f]):
            end = at + len(value)
            if text.startswith(value, at) and text.startswith(piece, end) and (k != last or end + len(piece) == len(text)):
                break
        else:
            return None
        values.append(value)
        ends.append(end)
        at = end + len(piece)
    return (values, ends) if order or len(text) == at else None


def _fit_spots(text: str, pieces: Sequence[str], order: Sequence[int], contents: Mapping[int, str]) -> list[Spot] | None:
    fitted = _fit(text, pieces, order, contents)
    if fitted is None:
        return None
    values, ends = fitted
    return [(end - len(value), end, f) for value, end, f in zip(values, ends[1:], order, strict=True)]


def _quick(shape: _Shape, chat: _Chat, answer: Texts) -> dict[int, str] | None:
    """The fields' texts if this row's renderings are, all of them, its shape's skeletons filled."""
    pieces, order = shape.skeletons[len(chat.messages), False]
    fitted = _fit(answer[0], pieces, order, chat.contents)
    if fitted is None:
        return None
    values, ends = fitted
    for index, whole, k, at in shape.checks:
        same, rest = answer.shared(index)
        if same < ends[k] + at or (whole and (rest or same > ends[k] + at)):
            return None
    return dict(zip(order, values, strict=True))


def _values(document: _Document) -> dict[int, str]:
    return {f: document.text[begin:end] for begin, end, f in document.spots}


def build_renderer(
    folder: str | Path,
    data: Data | None = None,
    new_tokens: Sequence[str] = (),
    date: str | None = None,
    *,
    saved: bool = False,
) -> Renderer:
    """The renderer of a checkpoint or, with `saved`, of a run's own tokenizer folder, whose template is already the one that was
    chosen. Picklable with functools.partial, so that each data worker makes its own."""
    tokenizer = Tokenizer.load(folder)
    if new := [t for t in new_tokens if tokenizer.token_to_id(t) is None]:
        tokenizer.add_tokens(new)
    if data is None:
        return Renderer(tokenizer, date=date)
    template = "auto" if saved and tokenizer.template is not None else data.template
    return Renderer(tokenizer, template, data.train_on, data.add_eos, data.max_length, data.overlength, date)
