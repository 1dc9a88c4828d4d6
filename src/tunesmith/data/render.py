"""Conversations to token ids, with which of them are learned. The one renderer: training, evaluation, chat, serving and export.

A template's rendering is read as markup (the template's own text) and fields (what people wrote).

    template.py, template_child.py    the template in its sandbox; whether it looks at what people wrote
    fields.py                         fields in a rendering, found by sentinels
    layout.py                         what all conversations of one shape (roles, tools) have in common; documents and learned spans
    encode.py                         documents to ids
    render.py                         the face: conversations, completions and raw text to examples and prompts

    learned    from the end of the generation prompt's rendering through the first stop token of the answer
    ids        special tokens are matched in markup only; each run between two of them is encoded whole
    history    if the whole does not begin with the prompt as it is at inference, each answer becomes an example of its own

A shape is rendered once. A row costs its encoding and, where the template looks at what people wrote, its rendering and the fit.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tunesmith.config.schema import Data
from tunesmith.data.encode import END, FIELD, ID, START, Encoding, Op, eos_id
from tunesmith.data.fields import ASSISTANT, FIELDS, GUARD, REASONING, SENTINEL, Chat, RowRefused, writable
from tunesmith.data.layout import Document, Layouts, Real, Skeleton, values_of
from tunesmith.data.template import Fault, Job, Sandbox, Texts
from tunesmith.errors import DataError, TemplateError
from tunesmith.tokenizer import Tokenizer
from tunesmith.types import Conversation, Example, Message, Origin

VERSION = 1  # raise it when the same conversation would give other ids or another mask
ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_ -]{0,31}")
MERGED = "merged same-role turns"

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
        self._layouts = Layouts(tokenizer, self._sandbox, self.templates)
        self._memo: dict[tuple[str, str], list[int]] = {}

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
        return self._layouts.stops

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
        stop = repr(self.tokenizer.token(self._layouts.own_stop if self._layouts.own_stop is not None else self.tokenizer.eos_id))
        others = sorted(self._layouts.stops - {self._layouts.own_stop})
        more = f"; generation also stops at {', '.join(repr(self.tokenizer.token(i)) for i in others)}" if others else ""
        added = "" if self._layouts.own_stop is not None else " (put after each answer by data.add_eos)"
        return f"{self.source}; learned: {which}, from the end of its prompt through {stop}{added}{more}"

    def _vet(self) -> None:
        """Once: render a small conversation, find the token that ends an answer. TemplateError if there is none."""
        if self._layouts.stops is not None:
            return
        probe: Texts | Fault | None = None
        for roles in (("user", ASSISTANT), ("system", "user", ASSISTANT)):
            messages = [{"role": role, "content": chr(SENTINEL + i)} for i, role in enumerate(roles)]
            probe = self._sandbox.render([Job(messages, [(len(roles), False)])])[0]
            if isinstance(probe, Texts):
                break
        if isinstance(probe, Fault) and probe.kind != "raised":
            fix = probe.fix or "correct the template, or name another with data.template"
            raise TemplateError(f"{self.source}: {probe}", fix)
        stops = self.tokenizer.stop_ids
        if isinstance(probe, Texts):
            found = Skeleton([(0, False)], probe)
            spots = found.spots(0, False)
            last = next((end for _, end, f in spots if f == len(roles) - 1), None)
            tokens = self._layouts.scan(found.text(0, False), spots)
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
            self._layouts.own_stop = own
            stops = stops | ({own} if own is not None else {self.tokenizer.eos_id})
        else:
            self._layouts.own_stop = self.tokenizer.eos_id
        self._layouts.stops = frozenset(stops)

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
        work = Encoding(self.tokenizer, self._memo)
        drafts: list[tuple[int, Sequence[list[Any]], tuple[str, ...]]] = []
        chats: list[tuple[int, Chat]] = []
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
            shapes = self._layouts.shapes([chat for _, chat in chats])
            seen = [chat for (_, chat), shape in zip(chats, shapes, strict=True) if not shape.blind]
            answers = iter(self._sandbox.render([self._layouts.job(chat) for chat in seen]))
            for (k, chat), shape in zip(chats, shapes, strict=True):
                answer = None if shape.blind else next(answers)
                try:
                    plan = self._layouts.plan(chat, shape, answer)
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
        shape = self._layouts.shapes([chat])[0]
        if shape.refused:
            raise RowRefused(shape.refused)
        n, world = len(chat.messages), Real(self._layouts, chat, shape, chat.asked(), self._layouts.render(chat, chat.asked()))
        document = self._layouts.joined(world, chat, Document(world.text(n, True), tuple(world.spots(n, True))), n)
        self._layouts.complete(chat, document, n, ())
        work = Encoding(self.tokenizer, self._memo)
        draft = work.draft(self._layouts.ops(document, chat), values_of(document), chat.guarded)
        work.run()
        return work.finish(draft)[0]

    def raw_prompt(self, text: str) -> list[int]:
        """Ids of a prompt without template, as `completion` rows are trained: BOS where the tokenizer adds one, then the text."""
        return [*self.tokenizer.prefix_ids, *self.tokenizer.encode(text)]

    def continued(self, text: str) -> list[int]:
        """Ids of a text to be continued as it stands. Special tokens written in it are recognised: this is the person's own text,
        not a row of data. BOS comes first where the tokenizer puts one, once. Raises DataError for half a surrogate pair."""
        if not text.isascii() and text.encode(errors="ignore").decode() != text:
            raise DataError("the prompt holds half a surrogate pair, which is no character", "write it as UTF-8")
        ids, prefix = self.tokenizer.encode(text, special=True), list(self.tokenizer.prefix_ids)
        return ids if prefix and ids[: len(prefix)] == prefix else [*prefix, *ids]

    def text(
        self, messages: Sequence[Message | Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (), prompt: bool = False
    ) -> str:
        """The rendering as text, with the generation prompt when `prompt`."""
        chat = self._chat([_message(m) for m in messages], tuple(dict(t) for t in tools), prompt=True)
        return self._layouts.render(chat, [(len(chat.messages), prompt)])[0].replace(GUARD, "")

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

    def _completion(self, conversation: Conversation, work: Encoding) -> list[Any]:
        """BOS, prompt, completion, EOS; the completion and EOS are learned. The prompt's ids are those of inference (`raw_prompt`):
        where a token of the joint text would hold the prompt's end and the completion's start, their own ids are joined instead."""
        prompt, completion = (m.content for m in conversation.messages)
        for i, text in enumerate((prompt, completion)):
            writable(text, i)
        if not completion:
            raise RowRefused("the completion is empty: no token is trained")
        ops: list[Op] = [(ID, i, None) for i in self.tokenizer.prefix_ids]
        ops += [(FIELD, 0, False), (START, True, None), (FIELD, 1, False), (ID, eos_id(self.tokenizer), None), (END, None, None)]
        return work.draft(ops, {0: prompt, 1: completion}, False, lead=True)

    def _raw(self, conversation: Conversation, work: Encoding) -> list[Any]:
        text = "".join(m.content for m in conversation.messages)
        writable(text, 0)
        if not text.strip():
            raise RowRefused("the text is empty")
        ops: list[Op] = [(ID, i, None) for i in self.tokenizer.prefix_ids]
        return work.draft([*ops, (FIELD, 0, False), (ID, eos_id(self.tokenizer), None)], {0: text}, False, lead=True)

    def _windows(self, ids: list[int], origin: Origin) -> Iterator[Example]:
        """Windows of at most max_length. Each begins with the last token of the one before, so every token of the document
        but the first is learned exactly once."""
        row, step = np.asarray(ids, np.int32), self.max_length - 1
        for begin in range(0, max(1, len(row) - 1), step):
            window = row[begin : begin + self.max_length]
            learn = np.ones(len(window), bool)
            learn[0] = False
            yield Example(window, learn, origin)

    # ---- chats

    def _chat(self, messages: Sequence[Message], tools: tuple[dict[str, Any], ...], prompt: bool = False) -> Chat:
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
            writable(message.content, i)
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
                    writable(reasoning, i)
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
        return Chat(rows, contents, tools, tuple(answers), trained, prompt, (prompt, key), notes, guarded)

    def _guard(self, value: Any, role: str) -> Any:
        """Break up the texts of special tokens in every string of a tool definition or call, so that they are never matched."""
        if isinstance(value, str):
            writable(value, -1)
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
            stops = self.tokenizer.stop_ids if conversation.kind == "completion" else self._layouts.stops
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


def _message(message: Message | Mapping[str, Any]) -> Message:
    if isinstance(message, Message):
        return message
    extra = {k: v for k, v in message.items() if k not in ("role", "content")}
    return Message(str(message.get("role")), message.get("content") or "", None, tuple(extra.items()))


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
