"""Rows to conversations. A format is found by a row's keys; a row that fits none, or two, is refused with the reason.

What can only be meant one way is mended and counted (`Conversation.fixes`): a number as content, a role's other name, a list of
text parts, JSON written into a string. What would have to be guessed is refused. A key whose value is null counts as absent:
tables that were joined from several formats are full of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tunesmith.data import exports
from tunesmith.data.json_rows import from_json
from tunesmith.data.sources import COLUMNS, Row
from tunesmith.errors import DataError
from tunesmith.registry import Registry
from tunesmith.types import Conversation, Message, Origin

SYSTEM, USER, ASSISTANT, TOOL = "system", "user", "assistant", "tool"
PLAIN = (USER, ASSISTANT, SYSTEM)
ROLES = {SYSTEM: SYSTEM, USER: USER, ASSISTANT: ASSISTANT, TOOL: TOOL}
CALLS = ("function_call", "tool_call")  # roles whose content is the call itself
SHAREGPT = {
    "human": USER,
    "gpt": ASSISTANT,
    "function": TOOL,
    "observation": TOOL,
    "function_call": ASSISTANT,
    "tool_call": ASSISTANT,
}
OTHER_NAMES = {
    "prompter": USER,
    "customer": USER,
    "bot": ASSISTANT,
    "model": ASSISTANT,
    "chatgpt": ASSISTANT,
    "ai": ASSISTANT,
    "bing": ASSISTANT,
    "bard": ASSISTANT,
    "developer": SYSTEM,
    "function_response": TOOL,
    "tool_response": TOOL,
    "ipython": TOOL,
}
EXTRA = ("tool_call_id", "name", "reasoning_content")  # what templates read of a message besides role, content and tool_calls

REFUSED_KEYS: tuple[tuple[tuple[str, ...], str], ...] = (
    # keys that tell what a row is, and why it is not trained on
    (("chosen", "rejected"), "preference"),
    (("chosen_messages", "rejected_messages"), "preference"),
    (("response_j", "response_k"), "preference"),
    (("preferred_output", "non_preferred_output"), "preference"),
    (("input_ids",), "already tokenised; give the text, so that the checkpoint's own tokenizer and template are used"),
    (("message_tree_id",), "tree"),
    (("role", "text"), "tree"),  # one turn of a conversation that is spread over rows
)
REASONS = {
    "preference": "{} belong to preference tuning (DPO), which is not supported yet; to train on answers, give only those",
    "tree": "a turn or tree of a conversation ({}); write each path you want learned as one list of messages",
}
MEDIA = ("image", "images", "audio", "audios", "video", "videos")


class FormatError(Exception):
    """Why a row is no conversation. Not for users as such: it becomes the row's refusal."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Format:
    """`keys`: sets of keys, any of which makes a row one of this format. `function(value, fixes) -> (kind, messages, tools)`."""

    keys: tuple[tuple[str, ...], ...]
    function: Callable[[Mapping[str, Any], list[str]], tuple[str, list[Message], tuple[dict[str, Any], ...]]]
    doc_example: dict[str, Any]


def detect(value: dict[str, Any] | str) -> str | None:
    """The name of the one format whose keys a row has; None when there is none, or more than one."""
    if isinstance(value, str):
        return "text"
    found = matches(tuple(k for k, v in value.items() if v is not None))
    return found[0] if len(found) == 1 else None


def knows(keys: Sequence[str]) -> bool:
    """Whether rows with these keys are read, or are refused for what they are: then nothing is guessed about their columns."""
    return bool(matches(tuple(keys))) or any(set(keys).issuperset(k) for k, _ in REFUSED_KEYS)


def conversation(row: Row) -> Conversation:
    """What a row says. Raises FormatError with the reason when it cannot be said for certain."""
    value = row.value
    if isinstance(value, str):
        return Conversation((Message("text", _nonempty(value, "the text")),), row.origin, "text")
    value = {k: v for k, v in value.items() if v is not None}
    found = matches(tuple(value))
    if len(found) != 1:
        two = f"keys of two formats at once ({' and '.join(found)}); keep those of one"
        raise FormatError(two if found else _unknown(value))
    fixes: list[str] = []
    kind, messages, tools = FORMATS[found[0]].function(value, fixes)
    if kind == "chat":
        _check_chat(messages)
    return Conversation(tuple(messages), row.origin, kind, tools, tuple(dict.fromkeys(fixes)))


def to_dict(c: Conversation) -> dict[str, Any]:
    """A conversation as JSON, one line of held_out.jsonl."""
    value: dict[str, Any] = {"kind": c.kind, "messages": [], "file": c.origin.file, "line": c.origin.line}
    for m in c.messages:
        weight = {} if m.learn is None else {"weight": int(m.learn)}
        value["messages"].append({"role": m.role, "content": m.content, **weight, **dict(m.extra)})
    value |= {"fields": dict(c.fields)} if c.fields else {}
    return value | ({"tools": list(c.tools)} if c.tools else {})


def from_dict(value: dict[str, Any]) -> Conversation:
    """What `to_dict` wrote."""
    messages = []
    for m in value["messages"]:
        rest = {k: v for k, v in m.items() if k not in ("role", "content", "weight")}
        messages.append(Message(m["role"], m["content"], {0: False, 1: True}.get(m.get("weight")), tuple(rest.items())))
    origin, tools, fields = Origin(value["file"], value["line"]), tuple(value.get("tools", ())), value.get("fields", {})
    return Conversation(tuple(messages), origin, value["kind"], tools, fields=fields)


FIELD_CHARS = 4000  # of a field as JSON: what is longer is text, no mark on the row


def fields(row: Row) -> dict[str, Any]:
    """What a row carries beside what formats read: `topic`, `expect` ... Not trained on; checks and groups of the comparison read
    it."""
    if isinstance(row.value, str):
        return {}
    rest = {k: v for k, v in row.value.items() if v is not None and k not in COLUMNS}
    return {k: v for k, v in rest.items() if len(json.dumps(v, default=str)) <= FIELD_CHARS}


# ---- which format --------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)  # the rows of a file have few sets of keys
def matches(present: tuple[str, ...]) -> list[str]:
    keys = set(present)
    if any(keys.issuperset(k) for k, _ in REFUSED_KEYS):
        return []
    found = [name for name, f in FORMATS.items() if any(keys.issuperset(k) for k in f.keys)]
    if len(found) > 1 and "text" in found:
        found.remove("text")  # many sets carry the rendered row beside its parts
    if "alpaca" in found and "question_answer" in found:
        found.remove("question_answer")  # {input, output} are alpaca's own
    return found


def _unknown(value: dict[str, Any]) -> str:
    for keys, why in REFUSED_KEYS:
        if value.keys() >= set(keys):
            return REASONS[why].format(" and ".join(keys)) if why in REASONS else why
    if not value:
        return "an empty row"
    keys = ", ".join(sorted(map(str, value))[:8]) + (" ..." if len(value) > 8 else "")
    for name, f in FORMATS.items():
        for wanted in f.keys:
            missing = [k for k in wanted if k not in value]
            if len(wanted) > 1 and len(missing) == 1:
                return f"{missing[0]!r} is missing or null (its other keys look like {name})"
    return f"no known format has these keys: {keys}"


# ---- pieces --------------------------------------------------------------------------------------------------------------------


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))  # a table's empty cell


def _string(value: Any, what: str, fixes: list[str]) -> str:
    """A text; a number becomes one."""
    if isinstance(value, str):
        return value
    if _missing(value):
        raise FormatError(f"{what} is missing or null")
    if isinstance(value, float) and math.isinf(value):
        raise FormatError(f"{what} is a number beyond what can be held")
    if isinstance(value, (bool, int, float)):
        fixes.append("number read as text")
        return str(value)
    kind = "a list" if isinstance(value, (list, tuple)) else "an object" if isinstance(value, dict) else type(value).__name__
    raise FormatError(f"{what} is {kind}, not text")


def _nonempty(text: str, what: str) -> str:
    if not text or text.isspace():
        raise FormatError(f"{what} is empty")
    return text


def _json(value: Any, what: str, fixes: list[str] | None = None) -> Any:
    """A value that may stand as JSON inside a string."""
    if not isinstance(value, str):
        return value
    try:
        parsed = from_json(value)
    except ValueError as e:
        raise FormatError(f"{what} is a string that is not JSON as a row may have it: {e}") from None
    if fixes is not None:
        fixes.append("list read from a JSON string")
    return parsed


def _tools(value: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    tools = value.get("tools", value.get("functions"))
    if not tools or (isinstance(tools, str) and tools.isspace()):
        return ()
    tools = _json(tools, "tools")
    if not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools):
        raise FormatError("tools is not a list of objects")
    return tuple(tools)


def _calls(value: Any) -> list[dict[str, Any]]:
    """Tool calls as templates read them: {"type": "function", "function": {"name", "arguments": object}}."""
    value = _json(value, "a tool call")
    calls = []
    for call in value if isinstance(value, list) else [value]:
        if not isinstance(call, dict):
            raise FormatError("a tool call is not an object")
        inner = call.get("function", call)
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise FormatError("a tool call has no name")
        arguments = inner.get("arguments", inner.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = _json(arguments, "the argument text of a tool call") if arguments.strip() else {}
        head = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        arguments = {} if arguments is None else arguments
        calls.append(
            {**head, "type": "function", "function": {"name": inner["name"], "arguments": {} if arguments is None else arguments}}
        )
    return calls


def _role(role: Any, where: str, fixes: list[str]) -> str:
    if not isinstance(role, str):
        raise FormatError(f"{where} has no role" if _missing(role) else f"the role of {where} is not text")
    if known := ROLES.get(role) or SHAREGPT.get(role):
        return known
    name = role.strip().lower()
    if known := ROLES.get(name) or SHAREGPT.get(name) or OTHER_NAMES.get(name):
        fixes.append(f"role {role.strip()!r} read as {known}")
        return known
    raise FormatError(f"unknown role {role[:40]!r}; known: {', '.join((*ROLES, *SHAREGPT, *OTHER_NAMES))}")


def _weight(message: Mapping[str, Any], role: str, where: str) -> bool | None:
    weight = message.get("weight")
    if weight is None:
        weight = message.get("loss_weight")
    for key in ("train", "training"):  # Axolotl's name for it
        if weight is None and isinstance(message.get(key), bool):
            weight = int(message[key] and role == ASSISTANT)
    if weight is None:
        return None
    if isinstance(weight, bool) or weight not in (0, 1):
        raise FormatError(f"the weight of {where} is {weight!r}; only 0 and 1 are known")
    if weight and role != ASSISTANT:
        raise FormatError(f"{where} is a {role} message with weight 1; only assistant messages are learned")
    return bool(weight)


def _parts(parts: list[Any], where: str, fixes: list[str]) -> tuple[str, str, list[dict[str, Any]]]:
    """Content that is a list of parts -> (text, reasoning, tool calls)."""
    text, reasoning, calls = [], [], []
    for part in parts:
        if isinstance(part, str):
            text.append(part)
            continue
        if not isinstance(part, dict):
            raise FormatError(f"a content part of {where} is neither text nor an object")
        kind, inner = part.get("type", "text"), part.get("text", part.get("value", part.get("content")))
        if kind in ("text", "input_text", "output_text"):
            text.append(_string(inner, f"a text part of {where}", fixes))
        elif kind in ("reasoning", "thinking"):
            reasoning.append(_string(inner if inner is not None else part.get("thinking"), f"a reasoning part of {where}", fixes))
        elif kind == "tool_call":
            calls += _calls(inner)
        else:
            raise FormatError(f"content of type {str(kind)[:40]!r}; only text is supported")
    fixes.append("content parts joined")
    return "".join(text), "".join(reasoning), calls


def _turn(message: Any, number: int, fixes: list[str]) -> Message:
    """One message, in OpenAI's keys (role, content) or ShareGPT's (from, value)."""
    if isinstance(message, dict) and len(message) == 2:  # nearly every message: worth a short way
        role, text = message.get("role"), message.get("content")
        if role in PLAIN and isinstance(text, str) and text and not text.isspace():
            return Message(role, text)
    where = f"message {number}"
    if not isinstance(message, dict):
        raise FormatError(f"{where} is not an object")
    named = message.get("role", message.get("from"))
    role = _role(named, where, fixes)
    content = message.get("content")
    if content is None:
        content = message.get("value")
    extra = {k: message[k] for k in EXTRA if isinstance(message.get(k), str)}
    calls: list[dict[str, Any]] = []
    if isinstance(content, list):
        content, reasoning, calls = _parts(content, where, fixes)
        if reasoning:
            extra["reasoning_content"] = reasoning
    if isinstance(named, str) and named.strip().lower() in CALLS:
        content, calls = "", _calls(_string(content, where, fixes) if not isinstance(content, (dict, list)) else content)
    if given := message.get("tool_calls"):
        calls += _calls(given)
    elif function := message.get("function_call"):
        calls += _calls(function)
    if calls:
        if role != ASSISTANT:
            raise FormatError(f"{where} is a {role} message with tool calls")
        extra = {"tool_calls": calls, **extra}
        content = "" if _missing(content) else content
    if role == TOOL and isinstance(content, dict):
        content = json.dumps(content, ensure_ascii=False)
        fixes.append("tool result written as JSON text")
    text = _string(content, f"the content of {where}", fixes)
    learn = _weight(message, role, where)
    if role == USER:
        _nonempty(text, f"{where} (user)")
    elif role == ASSISTANT and not calls and learn is not False:
        _nonempty(text, f"the answer in {where}")
    return Message(role, text, learn, tuple(extra.items()))


def _turns(value: Any, what: str, fixes: list[str]) -> list[Message]:
    value = _json(value, what, fixes)
    if not isinstance(value, list):
        raise FormatError(f"{what} is not a list of messages")
    if not value:
        raise FormatError(f"{what} is empty")
    return [_turn(m, i, fixes) for i, m in enumerate(value, 1)]


def _check_chat(messages: list[Message]) -> None:
    answers = [m for m in messages if m.role == ASSISTANT]
    if not answers:
        raise FormatError("no assistant message: there is nothing to learn")
    if all(m.learn is False for m in answers):
        raise FormatError("every assistant message has weight 0: there is nothing to learn")
    if len(messages) == len(answers):
        raise FormatError("only assistant messages: there is nothing they answer")


def _refuse_media(value: Mapping[str, Any]) -> None:
    for key in MEDIA:
        if value.get(key):
            raise FormatError(f"the row has {key!r}; only text is supported")


def _first(value: Mapping[str, Any], *names: str) -> Any:
    return next((value[n] for n in names if not _missing(value.get(n))), None)


def _system(value: Mapping[str, Any], fixes: list[str]) -> list[Message]:
    system = _first(value, "system", "system_prompt")
    return [Message(SYSTEM, _string(system, "system", fixes))] if system not in (None, "") else []


# ---- formats -------------------------------------------------------------------------------------------------------------------

Found = tuple[str, list[Message], tuple[dict[str, Any], ...]]


def _alpaca(value: Mapping[str, Any], fixes: list[str]) -> Found:
    """instruction and input become one user message with a line break between; history is a list of [question, answer]."""
    _refuse_media(value)
    instruction = _string(value.get("instruction"), "instruction", fixes)
    given = _first(value, "input", "context")
    given = "" if given is None else _string(given, "input", fixes)
    messages = _system(value, fixes)
    history = _json(value.get("history") or [], "history")
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise FormatError("history is not a list of [question, answer]")
        messages.append(Message(USER, _nonempty(_string(pair[0], "a question in history", fixes), "a question in history")))
        messages.append(Message(ASSISTANT, _nonempty(_string(pair[1], "an answer in history", fixes), "an answer in history")))
    asked = "\n".join(t for t in (instruction, given) if t)
    answer = _string(_first(value, "output", "response"), "output", fixes)
    messages += [Message(USER, _nonempty(asked, "the instruction")), Message(ASSISTANT, _nonempty(answer, "the output"))]
    return "chat", messages, _tools(value)


def _sharegpt(value: Mapping[str, Any], fixes: list[str]) -> Found:
    _refuse_media(value)
    turns = _turns(value["conversations"], "conversations", fixes)
    lead = _system(value, fixes)
    if lead and turns[0].role == SYSTEM:
        raise FormatError("a system text beside a system message; keep one")
    return "chat", lead + turns, _tools(value)


def _messages(value: Mapping[str, Any], fixes: list[str]) -> Found:
    _refuse_media(value)
    if "conversation" in value:
        inner = _json(value["conversation"], "conversation", fixes)
        if isinstance(inner, dict):
            value = {**value, **inner}
            inner = inner.get("messages")
        turns = _turns(inner, "conversation", fixes)
    else:
        turns = _turns(value["messages"], "messages", fixes)
    if isinstance(value.get("label"), bool):
        raise FormatError("messages with a true or false label belong to preference tuning (KTO), which is not supported yet")
    lead = _system(value, fixes) if turns[0].role != SYSTEM else []
    return "chat", lead + turns, _tools(value)


def _chatgpt(value: Mapping[str, Any], fixes: list[str]) -> Found:
    """One conversation of ChatGPT's export: the path that was seen last."""
    _refuse_media(value)
    try:
        messages = exports.chatgpt({**value, "mapping": _json(value["mapping"], "mapping")}, fixes)
    except exports.ExportError as e:
        raise FormatError(str(e)) from None
    return "chat", [_turn(m, i, fixes) for i, m in enumerate(messages, 1)], ()


def _prompt_completion(value: Mapping[str, Any], fixes: list[str]) -> Found:
    """Two texts: plain concatenation, no template. Two lists of messages: a chat whose prompt is not learned."""
    if isinstance(value.get("label"), bool):
        raise FormatError("a completion with a true or false label belongs to preference tuning (KTO), which is not supported yet")
    _refuse_media(value)
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        asked = [
            Message(m.role, m.content, False if m.role == ASSISTANT else m.learn, m.extra) for m in _turns(prompt, "prompt", fixes)
        ]
        return "chat", asked + _turns(completion, "completion", fixes), _tools(value)
    if isinstance(prompt, list) or isinstance(completion, list):
        raise FormatError("one of prompt and completion is a list of messages and the other is not")
    answer = _nonempty(_string(completion, "completion", fixes), "the completion")
    return "completion", [Message("prompt", _string(prompt, "prompt", fixes)), Message("completion", answer)], ()


def _question_answer(value: Mapping[str, Any], fixes: list[str]) -> Found:
    _refuse_media(value)
    pairs = [p for p in PAIRS if value.keys() >= set(p)]
    if len(pairs) != 1:
        raise FormatError(f"several questions and answers ({'; '.join(' and '.join(p) for p in pairs)}); keep one of each")
    asked, answered = pairs[0]
    question = _nonempty(_string(value[asked], asked, fixes), asked)
    answer = _nonempty(_string(value[answered], answered, fixes), answered)
    return "chat", [*_system(value, fixes), Message(USER, question), Message(ASSISTANT, answer)], _tools(value)


def _text(value: Mapping[str, Any], fixes: list[str]) -> Found:
    _refuse_media(value)
    return "text", [Message("text", _nonempty(_string(value["text"], "text", fixes), "the text"))], ()


PAIRS = (
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("prompt", "response"),
    ("prompt", "answer"),
    ("input", "output"),
    ("inputs", "targets"),
)

FORMATS: Registry[Format] = Registry(
    "dataset format",
    {
        "alpaca": Format(
            (("instruction", "output"), ("instruction", "response")),
            _alpaca,
            {"instruction": "Translate to French.", "input": "Good morning", "output": "Bonjour", "system": "Be brief."},
        ),
        "sharegpt": Format(
            (("conversations",),),
            _sharegpt,
            {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello! How can I help?"}]},
        ),
        "messages": Format(
            (("messages",), ("conversation",)),
            _messages,
            {
                "messages": [
                    {"role": "user", "content": "Hello"},
                    {"role": "assistant", "content": "Hello! How can I help?", "weight": 1},
                ]
            },
        ),
        "chatgpt": Format(
            (("mapping", "current_node"), ("mapping", "create_time")),
            _chatgpt,
            {
                "current_node": "b",
                "mapping": {
                    "a": {"parent": None, "message": {"author": {"role": "user"}, "content": {"parts": ["Hello"]}}},
                    "b": {"parent": "a", "message": {"author": {"role": "assistant"}, "content": {"parts": ["Hello!"]}}},
                },
            },
        ),
        "prompt_completion": Format((("prompt", "completion"),), _prompt_completion, {"prompt": "2 + 2 =", "completion": " 4"}),
        "question_answer": Format(PAIRS, _question_answer, {"question": "What is 2 + 2?", "answer": "4"}),
        "text": Format((("text",),), _text, {"text": "Once upon a time there was a small town by the sea."}),
    },
    group="formats",
    error=DataError,
)
