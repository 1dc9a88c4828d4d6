"""Requests as OpenAI's API has them, parsed strictly, and errors in its shape. No torch.

An unknown key is refused with the near name; a key of OpenAI's that has no effect here is taken only with the value that means
"off". What a server would have to fetch (image_url, file ids) is refused: this one asks nobody. Every fault is an ApiError.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tunesmith.errors import TunesmithError
from tunesmith.registry import did_you_mean

ANSWERS = 16  # answers to one request
DEPTH = 64  # brackets within brackets; Python's parser stops near 1,000 by itself


class ApiError(Exception):
    """What a client is told: status, OpenAI's `type` and `code`, and which key is at fault."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None,
                 headers: Mapping[str, str] | None = None):  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, dict(headers or {})

    @classmethod
    def of(cls, fault: TunesmithError, status: int = 400, **more: Any) -> ApiError:
        """An error of ours with its fix."""
        return cls(status, f"{fault.what}; {fault.fix}" if fault.fix else fault.what, **more)

    @property
    def type(self) -> str:
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        return kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


Finite = Annotated[float, Field(allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=256)]
Text = Annotated[str, Field(max_length=1 << 22)]


class Function(_Part):
    name: Name
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Part):
    type: Literal["function"]
    function: Function


class CalledFunction(_Part):
    name: Name
    arguments: Text


class ToolCall(_Part):
    id: Name
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(_Part):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[dict[str, Any]] | None = None
    name: Name | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Name | None = None
    reasoning_content: Text | None = None
    refusal: None = None
    citations: list[Any] | None = None  # of an earlier answer of this server; not looked at
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None

    @field_validator("content")
    @classmethod
    def _joined(cls, value: Any) -> str | None:
        """Text parts as one text. Any other kind would have to be looked up or looked at."""
        if not isinstance(value, list):
            return value
        texts = []
        for part in value:
            kind = part.get("type")
            if kind != "text":
                raise ValueError(f"a part of type {str(kind)[:40]!r}: this server takes text alone, and fetches nothing")
            if not isinstance(part.get("text"), str) or len(part) != 2:
                raise ValueError("a text part is {'type': 'text', 'text': '...'}")
            texts.append(part["text"])
        return "".join(texts)

    @model_validator(mode="after")
    def _whole(self) -> ChatMessage:
        if self.content is None and not self.tool_calls:
            raise ValueError("a message needs content, or tool_calls")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls in a message of {self.role}")
        return self

    def plain(self) -> dict[str, Any]:
        """As templates read it: `developer` is `system`, arguments are values."""
        out: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": self.content or ""}
        if self.tool_calls:
            out["tool_calls"] = [{"id": c.id, "type": "function", "function": {"name": c.function.name,
                                  "arguments": _arguments(c.function.arguments)}} for c in self.tool_calls]  # fmt: skip
        for key in ("name", "tool_call_id", "reasoning_content"):
            if (value := getattr(self, key)) is not None:
                out[key] = value
        return out


class JsonSchema(_Part):
    name: Name
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: Text | None = None
    strict: bool | None = None


class ResponseFormat(_Part):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _whole(self) -> ResponseFormat:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise ValueError("json_schema needs {'name': ..., 'schema': {...}}")
        return self

    @property
    def schema_(self) -> dict[str, Any] | None:
        """The schema that the answer must follow; None for text."""
        return {"text": None, "json_object": {"type": "object"}}.get(self.type, self.json_schema and self.json_schema.schema_)


class StreamOptions(_Part):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _Request(_Part):
    model: Name
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1 << 24)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 24)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    n: Annotated[int, Field(ge=1, le=ANSWERS)] | None = None
    stop: Text | list[Text] | None = None
    logit_bias: dict[str, Annotated[Finite, Field(ge=-100, le=100)]] | None = None
    presence_penalty: Literal[0, 0.0] | None = None
    frequency_penalty: Literal[0, 0.0] | None = None
    user: Text | None = None

    @field_validator("stop")
    @classmethod
    def _stops(cls, value: Any) -> Any:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > 16 or any(not 0 < len(stop) <= 256 for stop in stops):
            raise ValueError("up to 16 texts of 1 to 256 characters")
        return stops

    @field_validator("logit_bias")
    @classmethod
    def _ids(cls, value: Any) -> Any:
        if value and (len(value) > 1024 or any(not key.isascii() or not key.isdigit() or len(key) > 9 for key in value)):
            raise ValueError("at most 1,024 token ids")
        return {int(key): bias for key, bias in (value or {}).items()}

    @model_validator(mode="after")
    def _alone(self) -> Any:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options without stream")
        return self

    @property
    def answers(self) -> int:
        return self.n or 1

    def sampling(self) -> dict[str, Any]:
        """Settings of a job, with OpenAI's defaults; the seed stays None where nobody gave one."""
        temperature = 1.0 if self.temperature is None else float(self.temperature)
        return {"temperature": temperature, "top_p": float(self.top_p or 1.0), "top_k": self.top_k or 0,
                "stop": tuple(self.stop or ()), "bias": self.logit_bias or {}}  # fmt: skip


class ChatRequest(_Request):
    """POST /v1/chat/completions"""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4000)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 24)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    docs: bool | None = None  # with --docs: answer from the passages (the default), or not
    store: Literal[False] | None = None
    metadata: dict[str, Text] | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _together(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens or max_completion_tokens, not both")
        if self.tools and self.response_format is not None and self.response_format.schema_ is not None:
            raise ValueError("tools or a JSON response_format, not both")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def told(self) -> int | None:
        """How many likeliest tokens to tell beside the chosen one; None: no logprobs at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Request):
    """POST /v1/completions"""

    prompt: Text | list[Text] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    suffix: None = None
    best_of: Annotated[int, Field(ge=1, le=ANSWERS)] | None = None

    @model_validator(mode="after")
    def _together(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.answers:
            raise ValueError("best_of other than n")
        if not 1 <= len(self.prompts) * self.answers <= ANSWERS * 8:
            raise ValueError(f"1 to {ANSWERS * 8} answers to one request")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]
        return list(self.prompt)

    @property
    def limit(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens  # OpenAI's default

    @property
    def told(self) -> int | None:
        return self.logprobs


class AdapterRequest(_Part):
    """POST /v1/adapters: a name that the server knows from its own folders."""

    name: Name


R = TypeVar("R", bound=BaseModel)


def parse(body: bytes, kind: type[R]) -> R:
    """A request from its body. ApiError 400 with the first fault, and how many there are."""
    value = read_json(body)
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    try:
        return kind.model_validate(value)
    except ValidationError as e:
        faults = e.errors(include_url=False, include_input=False, include_context=True)
        raise _fault(faults, kind) from None


def read_json(body: bytes) -> Any:
    """ApiError 400 for what is no JSON in UTF-8: nan, a key twice, or nested too deep among it."""
    try:
        text = body.decode("utf-8")
        if _deep(text):
            raise ValueError(f"more than {DEPTH} brackets within each other")
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_once, parse_float=_number)
    except (ValueError, RecursionError) as e:
        raise ApiError(400, f"the body is no JSON: {str(e)[:200]}", code="invalid_json") from None


def _deep(text: str) -> bool:
    """Whether brackets outside of strings go deeper than DEPTH. Cheap where there are few brackets."""
    if text.count("[") + text.count("{") <= DEPTH:
        return False
    depth, inside, escaped = 0, False, False
    for c in text:
        if inside:
            escaped, inside = c == "\\" and not escaped, c != '"' or escaped
        elif c == '"':
            inside = True
        elif c in "[{":
            depth += 1
            if depth > DEPTH:
                return True
        elif c in "]}":
            depth -= 1
    return False


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)[:40]!r} stands twice")
    return found


def _fault(faults: list[Any], kind: type[BaseModel]) -> ApiError:
    fault = min(faults, key=lambda f: f["type"] != "extra_forbidden")
    keys = [str(k) for k in fault["loc"] if not str(k).startswith(("function-", "constrained", "list[", "str", "int"))]
    param = ".".join(keys)[:120] or None
    message = fault["msg"].removeprefix("Value error, ")[:500]
    if fault["type"] == "extra_forbidden":
        near = did_you_mean(keys[-1], kind.model_fields) if len(keys) == 1 else ""
        message = "unknown key" + (f"; {near}" if near.startswith("did") else "")
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return ApiError(400, f"{param}: {message}{more}" if param else f"{message}{more}", code="invalid_value", param=param)


def _arguments(text: str) -> Any:
    """A call's arguments as a value, as templates print them; the text itself where it is no JSON object."""
    try:
        value = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text
