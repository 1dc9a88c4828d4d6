"""Conversations mended: a function takes one that has the fault and gives it back without, or says why only a person can."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from tunesmith.data.findings import rows as detect
from tunesmith.data.findings.text import ANSWERS, PROMPTS
from tunesmith.types import Conversation, Message

SENTENCE = re.compile(r"(?:[^.!?\n]|[.!?](?![\s\"')]|$))+[.!?]*[\"')]*[ \t]*")
TURNS = re.compile(r"\b(?:but|however|aber|mais|pero)\b|:", re.IGNORECASE)  # what follows in the sentence may be the answer itself
ONWARD = re.compile(r"(?:However|But|Nevertheless|Nonetheless|Still|That said|That being said|Having said that),? +(\w)")
_SPECIAL = detect.SPECIAL.pattern
_EDGE = rf"(?:{_SPECIAL})(?:(?:system|user|assistant|model|human)(?=\s*\n|<\|))?"
SPECIAL_BEFORE = re.compile(rf"\A(?:\s*{_EDGE})+\s*")
SPECIAL_BEHIND = re.compile(rf"(?:\s*(?:{_SPECIAL}))+\s*\Z")
LABEL = re.compile(r"(?:#{2,4} ?|\**)(?:Response|Assistant|ASSISTANT)\**:?\**\s*")  # before an answer, it is nothing but its name

Mended = Conversation | str  # or why it is set aside


def each(c: Conversation, change: Callable[[Message], str], roles: tuple[str, ...] = ()) -> Conversation:
    """With other contents, of all messages or of those with such a role."""
    messages = tuple(replace(m, content=change(m)) if not roles or m.role in roles else m for m in c.messages)
    return replace(c, messages=messages)


def _empty(c: Conversation) -> bool:
    return any(not m.content.strip() and not m.extra for m in c.messages if m.role in (*ANSWERS, *PROMPTS, "text"))


def template(c: Conversation, seen: Counter[str]) -> Mended:
    """Special tokens at the edges of a message are another template's; in the middle they part turns that nobody can tell apart."""

    def change(m: Message) -> str:
        text = SPECIAL_BEHIND.sub("", SPECIAL_BEFORE.sub("", m.content)) if detect.SPECIAL.search(m.content) else m.content
        seen["special tokens cut from the ends of messages"] += text != m.content
        return text

    made = each(c, change)
    return "nothing but special tokens in a message" if _empty(made) else made


def roles(c: Conversation, seen: Counter[str]) -> Mended:
    """The system message first, turns of one role as one, no question behind the last answer. No turn is made up."""
    messages = list(c.messages)
    systems = [m for m in messages if m.role == "system"]
    if len(systems) == 1 and messages[0].role != "system":
        messages.remove(systems[0])
        messages.insert(0, systems[0])
        seen["system message moved to the front"] += 1
    joined: list[Message] = []
    for m in messages:
        last = joined[-1] if joined else None
        if last and last.role == m.role != "tool" and not last.extra and not m.extra and last.learn == m.learn:
            joined[-1] = replace(last, content=f"{last.content}\n\n{m.content}")
            seen["turns of one role joined"] += 1
        else:
            joined.append(m)
    while joined and joined[-1].role == "user":
        joined.pop()
        seen["questions without an answer cut from the end"] += 1
    return replace(c, messages=tuple(joined))


def echo(c: Conversation, seen: Counter[str]) -> Mended:
    """The question before an answer is cut off, and so is what follows the answer under another speaker's name."""
    asked = ""
    messages = []
    for m in c.messages:
        if m.role in PROMPTS:
            asked = m.content.strip()
        elif m.role in ANSWERS:
            text = m.content
            if len(asked) >= detect.COPY and text.lstrip().startswith(asked):
                text = text.lstrip()[len(asked) :].lstrip()
                seen["questions cut from the beginning of answers"] += 1
            if (label := LABEL.match(text)) and detect.ROLE_LINE.match(text):
                text = text[label.end() :]
                seen["role names cut from the beginning of answers"] += 1
            if turn := detect.ROLE_LINE.search(text):
                text = text[: turn.start()].rstrip()
                seen["further turns cut from the end of answers"] += 1
            m = replace(m, content=text)
        messages.append(m)
    made = replace(c, messages=tuple(messages))
    return "nothing is left of the answer without the prompt's text" if _empty(made) else made


def boilerplate(c: Conversation, seen: Counter[str]) -> Mended:
    """The sentences go; where one goes on to the answer itself, a person must say what is left of it."""
    told = False

    def change(m: Message) -> str:
        nonlocal told
        lower = m.content.replace("İ", "I").lower()
        found = [f.span() for f in detect.BOILERPLATE.finditer(lower)]
        if not found:
            return m.content
        out, at = [], 0
        for s in SENTENCE.finditer(m.content):
            if any(start < s.end() and s.start() < end for start, end in found):
                told |= bool(TURNS.search(s[0]))
                out.append(m.content[at : s.start()])
                at = s.end()
                seen["sentences cut"] += 1
        left = "".join([*out, m.content[at:]]).strip()
        first = not "".join(out).strip()  # what answered the sentence now begins
        return ONWARD.sub(lambda o: o[1].upper(), left, count=1) if first and ONWARD.match(left) else left

    made = each(c, change, ANSWERS)
    if told:
        return "boilerplate in one sentence with the answer"
    return "nothing is left of the answer without boilerplate" if _empty(made) else made
