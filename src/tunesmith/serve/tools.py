"""Tool calls in a model's text, for families whose templates make plain how they are written. No torch.

    hermes    <tool_call>{"name": ..., "arguments": {...}}</tool_call>, one or more         Qwen 2.5 and 3, Hermes, SmolLM3
    mistral   [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]                          Mistral
    llama     {"name": ..., "parameters": {...}} as the whole answer, <|python_tag|> before Llama 3.1 to 3.3

Which one is read off the template. Text that does not parse stays text: a client sees what the model said.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Call:
    name: str
    arguments: str  # JSON


@dataclass(frozen=True, slots=True)
class Family:
    """`begins`: what a call begins with; `whole`: a call is the whole answer; `read`: the calls of a text, ValueError for none."""

    name: str
    begins: tuple[str, ...]
    whole: bool
    read: Callable[[str], Iterator[Call]]

    def split(self, text: str) -> tuple[str, list[Call]]:
        """(what is said before the calls, the calls); all of the text and none where they do not parse."""
        starts = [at for mark in self.begins if (at := text.find(mark)) >= 0]
        if not starts or (self.whole and text[: min(starts)].strip()):
            return text, []
        try:
            return text[: min(starts)].rstrip(), list(self.read(text[min(starts) :]))
        except (ValueError, RecursionError):
            return text, []

    def sayable(self, text: str) -> int:
        """How many first characters of an unfinished text are surely no part of a call."""
        if self.whole:
            begun = text.lstrip()
            may = not begun or any(begun.startswith(m) or m.startswith(begun) for m in self.begins)
            return 0 if may else len(text)
        if starts := [at for mark in self.begins if (at := text.find(mark)) >= 0]:
            return min(starts)
        return len(text) - max((n for m in self.begins for n in range(1, len(m)) if text.endswith(m[:n])), default=0)


def family(template: str) -> Family | None:
    """Of a chat template's text; None where it does not say how calls are written."""
    return next((f for mark, f in FAMILIES.items() if mark in template), None)


def _call(value: Any, key: str = "arguments") -> Call:
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str) or not value["name"]:
        raise ValueError("no call")
    arguments = value.get(key, {})
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(arguments, Mapping):
        raise ValueError("arguments must be an object")
    return Call(value["name"], json.dumps(arguments, ensure_ascii=False))


def _hermes(text: str) -> Iterator[Call]:
    while (at := text.find("<tool_call>")) >= 0:
        value, rest = _value(text[at + len("<tool_call>") :])
        if rest and not rest.startswith("</tool_call>"):
            raise ValueError("a call that does not end")
        yield _call(value)
        text = rest


def _mistral(text: str) -> Iterator[Call]:
    value, _ = _value(text.removeprefix("[TOOL_CALLS]"))
    yield from (_call(v) for v in (value if isinstance(value, list) else [value]))


def _llama(text: str) -> Iterator[Call]:
    text = text.removeprefix("<|python_tag|>")
    while text:
        value, rest = _value(text)
        if rest and not rest.startswith(";"):
            raise ValueError("more than calls")
        yield _call(value, "parameters" if isinstance(value, Mapping) and "parameters" in value else "arguments")
        text = rest[1:].strip()


def _value(text: str) -> tuple[Any, str]:
    """(the JSON value that a text begins with, what stands behind it): what looks like a mark may stand within a value."""
    text = text.lstrip()
    value, end = json.JSONDecoder().raw_decode(text)
    return value, text[end:].lstrip()


FAMILIES = {
    "<tool_call>": Family("hermes", ("<tool_call>",), False, _hermes),
    "[TOOL_CALLS]": Family("mistral", ("[TOOL_CALLS]",), False, _mistral),
    "<|python_tag|>": Family("llama", ("<|python_tag|>", '{"name"', '{ "name"'), True, _llama),
    '"parameters": dictionary of argument name': Family("llama", ("<|python_tag|>", '{"name"', '{ "name"'), True, _llama),
}
