"""From a request to jobs for the engine, and from pieces of answers to what OpenAI's clients read. No torch, no HTTP.

`Service.chat` and `.completion` make a Question: prompt ids, settings, passages. They render and search, which may wait: call them
off the event loop, one at a time (`Service.lock` sees to it). A `Draft` takes one answer's pieces and gives what may be said.
"""

from __future__ import annotations

import json
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Protocol

from tunesmith.errors import DataError, MissingExtra, ModelError, TunesmithError
from tunesmith.registry import did_you_mean
from tunesmith.serve import tools
from tunesmith.serve.job import Chosen, Engine, Job, Missing, Piece
from tunesmith.serve.schema import ApiError, ChatRequest, CompletionRequest


class Renderer(Protocol):
    """What is asked of data/render.py's."""

    tokenizer: Any
    templates: Mapping[str, str]
    stop_ids: frozenset[int]

    def prompt(self, messages: Sequence[Any], tools: Sequence[Any] = ()) -> list[int]: ...

    def continued(self, text: str) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Served:
    """A model that clients name. `adapter`: the engine's name for it; `base`: the model it stands on, for /v1/models."""

    name: str
    renderer: Renderer
    adapter: str = ""
    base: str = ""
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass(slots=True)
class Question:
    """A request made ready. `prompts`: one for each prompt of the request; each gets `answers` answers."""

    served: Served
    prompts: list[list[int]]
    answers: int
    settings: dict[str, Any]
    chat: bool
    told: int | None = None
    schema: dict[str, Any] | None = None
    family: tools.Family | None = None
    passages: list[Any] | None = None  # None: nothing was looked up
    canned: str | None = None  # the answer, where no model is asked
    id: str = ""
    created: int = 0

    def __post_init__(self) -> None:
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(12)
        self.created = int(time.time())

    @property
    def choices(self) -> int:
        return len(self.prompts) * self.answers

    def jobs(self, deliver: Callable[[int, Piece], None]) -> list[Job]:
        """One for each choice; `deliver` gets the choice's number with each piece."""
        words, seed = self.served.renderer.tokenizer, self.settings["seed"]
        return [
            Job(prompt=list(ids), words=words, deliver=_to(deliver, p * self.answers + i), model=self.served.adapter,
                stop_ids=self.served.renderer.stop_ids, logprobs=self.told, keep_special=self.family is not None, index=i,
                **self.settings | {"seed": seed if p == 0 else seed + p})
            for p, ids in enumerate(self.prompts)
            for i in range(self.answers)
        ]  # fmt: skip

    def usage(self, made: Sequence[int]) -> dict[str, int]:
        asked, answered = sum(map(len, self.prompts)), sum(made)
        return {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered}


def _to(deliver: Callable[[int, Piece], None], number: int) -> Callable[[Piece], None]:
    return lambda piece: deliver(number, piece)


class Service:
    """The models by name, the engine, and documents to answer from (`search`: question -> passages)."""

    def __init__(self, engine: Engine, models: Callable[[], Mapping[str, Served]],
                 search: Callable[[str], Sequence[Any]] | None = None):  # fmt: skip
        self.engine, self.models, self.search = engine, models, search
        self.lock = threading.Lock()
        self._grammars: dict[str, tuple[Any, Any]] = {}  # by model name: its renderer, the grammars of its tokenizer

    def find(self, name: str) -> Served:
        served = self.models()
        if name not in served:
            near = did_you_mean(name[:80], served)
            raise ApiError(404, f"no model {name[:80]!r} is served here; {near}", code="model_not_found", param="model")
        return served[name]

    def chat(self, request: ChatRequest) -> Question:
        """Raises ApiError: no such model, a conversation the template refuses, a schema that cannot be followed."""
        served = self.find(request.model)
        messages = [message.plain() for message in request.messages]
        offered = [t.model_dump(exclude_none=True) for t in request.tools or ()] if request.tool_choice != "none" else []
        schema = request.response_format.schema_ if request.response_format is not None else None
        question = Question(served, [], request.answers, self._settings(request), True, request.told, schema)
        with self.lock, _told():
            if self.search is not None and request.docs is not False and messages[-1]["role"] == "user":
                self._look_up(question, messages)
            question.prompts = [served.renderer.prompt(messages, offered)]
            grammars = None if schema is None else self._grammars_of(served)
        if grammars is not None:
            if question.canned is not None:
                raise ApiError(422, "no passage fits the question, so no model was asked and there is no JSON", code="no_passage")
            with _told():  # a large one takes a second, in which others ask
                question.settings["grammar"] = self._grammar(grammars, schema)
        if offered:
            templates = served.renderer.templates
            question.family = tools.family(templates.get("tool_use") or templates["default"])
        return question

    def completion(self, request: CompletionRequest) -> Question:
        """As `chat`, without a template."""
        served = self.find(request.model)
        with self.lock, _told():
            prompts = [self._ids(served, p) if isinstance(p, list) else served.renderer.continued(p) for p in request.prompts]
        return Question(served, prompts, request.answers, self._settings(request), False, request.told)

    def _look_up(self, question: Question, messages: list[dict[str, Any]]) -> None:
        """The last question becomes one with its passages; without a passage no model is asked (retrieve/cite.py)."""
        from tunesmith.retrieve import cite

        asked = messages[-1]["content"]
        try:
            question.passages = list(self.search(asked)) if asked.strip() else []
        except TunesmithError as e:  # of the index, not of the request
            _log(e)
            raise ApiError(500, "the documents cannot be searched; the server's log has more") from None
        if question.passages:
            messages[-1]["content"] = cite.prompt(asked, question.passages)
        else:
            question.canned = cite.ABSTAIN

    def _grammars_of(self, served: Served) -> Any:
        """One set for each name that is served: one loaded again has another renderer."""
        from tunesmith.serve.grammar import Grammars

        renderer, grammars = self._grammars.get(served.name, (None, None))
        if renderer is not served.renderer:
            grammars = Grammars(served.renderer.tokenizer, served.renderer.stop_ids)
            self._grammars[served.name] = served.renderer, grammars
        return grammars

    @staticmethod
    def _grammar(grammars: Any, schema: dict[str, Any]) -> Callable[[], Any]:
        """A follower for each answer."""
        from tunesmith.serve.grammar import Patience

        grammar, patience = grammars.compile(schema), Patience()
        return lambda: grammars.follow(grammar, patience)

    @staticmethod
    def _ids(served: Served, ids: Sequence[int]) -> list[int]:
        if not all(0 <= i < served.renderer.tokenizer.vocab_size for i in ids):
            raise DataError("a token id beyond the model's vocabulary", "use the ids of this model's tokenizer")
        return list(ids)

    @staticmethod
    def _settings(request: ChatRequest | CompletionRequest) -> dict[str, Any]:
        seed = secrets.randbits(48) if request.seed is None else request.seed
        return {**request.sampling(), "seed": seed, "max_tokens": request.limit}


class _told:
    """Errors of ours become a client's."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, TunesmithError):
            raise told(error) from None


def told(error: TunesmithError) -> ApiError:
    """What a client may know of an error of ours: its own faults and the engine's in words; what is wrong with files here, not."""
    if isinstance(error, DataError):
        long = "context holds" in error.what or "cache holds" in error.what
        return ApiError.of(error, 400, code="context_length_exceeded" if long else "invalid_value")
    if isinstance(error, Missing):
        return ApiError.of(error, 404, code="not_found")
    if type(error) in (ModelError, MissingExtra):
        return ApiError.of(error, 500)
    _log(error)
    return ApiError(500, "something is wrong on the server's side; its log has more")


def _log(error: TunesmithError) -> None:
    print(f"error   {error}", file=sys.stderr, flush=True)


class Draft:
    """One choice while it is made: what may be said of it now, and what it was in the end."""

    def __init__(self, question: Question, index: int):
        self.question, self.index = question, index
        self.text, self.tokens, self.made = "", [], 0
        self.reason: str | None = None
        self._said = self._until = 0  # of the text: characters said, and those that are no calls
        words = question.served.renderer.tokenizer
        self._special = [words.token(i) for i in words.special_ids] if question.family is not None else []
        self.calls: list[dict[str, Any]] = []
        self.content = ""
        self.citations: list[dict[str, Any]] | None = None

    def take(self, piece: Piece) -> str:
        """The text that a stream may show now. Raises ApiError where the answer failed."""
        if piece.reason == "error":
            raise told(piece.error)
        if piece.reason == "cancelled":
            raise ApiError(503, "the answer was cut off: the server or its model was stopped", code="cancelled")
        self.text += piece.text
        self.tokens += piece.tokens
        self.made = piece.made
        if piece.reason is not None:
            self._finish(piece.reason)
        family, until = self.question.family, len(self.text)
        if self.calls:
            until = self._until
        elif family is not None and self.reason is None:
            until = family.sayable(self.text)
        new, self._said = self.text[self._said : until], max(self._said, until)
        return self._plain(new)

    def _plain(self, text: str) -> str:
        """Without special tokens, which are in the text where tool calls may be."""
        for special in self._special if text else ():
            text = text.replace(special, "")
        return text

    def _finish(self, reason: str) -> None:
        self.content, self.reason = self.text, reason
        question = self.question
        if question.family is not None:
            said, found = question.family.split(self.text)
            self._until, self.content = len(said), self._plain(said)
            self.calls = [{"id": f"call_{secrets.token_hex(8)}", "type": "function",
                           "function": {"name": call.name, "arguments": call.arguments}} for call in found]  # fmt: skip
            if found:
                self.reason = "tool_calls"
        if question.schema is not None:
            _whole_json(self.content, reason)
        if question.passages is not None:
            self.citations = citations(self.content, question.passages)

    # ---- OpenAI's shapes

    def chat_choice(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.content or (None if self.calls else ""), "refusal": None}
        if self.calls:
            message["tool_calls"] = self.calls
        if self.citations is not None:
            message["citations"] = self.citations
        logprobs = None if self.question.told is None else {"content": [chat_logprob(t) for t in self.tokens], "refusal": None}
        return {"index": self.index, "message": message, "logprobs": logprobs, "finish_reason": self.reason}

    def completion_choice(self) -> dict[str, Any]:
        logprobs = None if self.question.told is None else completion_logprobs(self.tokens)
        return {"index": self.index, "text": self.content, "logprobs": logprobs, "finish_reason": self.reason}


def _whole_json(text: str, reason: str) -> None:
    try:
        json.loads(text)
    except ValueError:
        why = "max_tokens or the context ended it" if reason == "length" else "a stop text ended it"
        raise ApiError(422, f"the answer's JSON is not whole: {why}; allow more tokens, or ask for less",
                       code="invalid_output", param="response_format") from None  # fmt: skip


def citations(answer: str, passages: Sequence[Any]) -> list[dict[str, Any]]:
    """Each `[n]` of an answer: its passage, and whether that supports the sentence (the rule of retrieve/cite.py)."""
    from tunesmith.retrieve import cite

    found: dict[int, dict[str, Any]] = {}
    for c in cite.check(answer, passages).citations:
        if not c.exists:
            found.setdefault(c.number, {"number": c.number, "exists": False, "supports": False})
            continue
        p = passages[c.number - 1]
        entry = found.setdefault(c.number, {"number": c.number, "exists": True, "supports": False,
                                            "document": _document(p.document), "start": p.start, "end": p.end,
                                            "text": p.text})  # fmt: skip
        entry["supports"] = entry["supports"] or c.supports
    return [found[n] for n in sorted(found)]


def _document(name: str) -> str:
    """As clients may see it: its path within the index's folder, or the file's name alone where it lies elsewhere."""
    path = PurePath(name)
    return path.name if path.is_absolute() or ".." in path.parts else name


def chat_logprob(token: Chosen) -> dict[str, Any]:
    """`bytes` is null where the token holds part of a character."""
    return {**_one(token), "top_logprobs": [_one(t) for t in token.top]}


def _one(token: Chosen) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": None if "\ufffd" in token.text else list(token.text.encode())}


def completion_logprobs(tokens: Sequence[Chosen], offset: int = 0) -> dict[str, Any]:
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {"tokens": [t.text for t in tokens], "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [{o.text: o.logprob for o in t.top} for t in tokens], "text_offset": offsets}  # fmt: skip
