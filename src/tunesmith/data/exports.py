"""ChatGPT's export (conversations.json): a tree of messages to the one path that the person saw last.

The path runs from `current_node` up to the root. What was hidden from the person, or is no part of what was said, is left out and
counted; what the answers rest on and the export does not hold (a picture, a file) refuses the conversation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

CITATION = re.compile(r"\ue200[^\ue200\ue201]*\ue201|【\d+(?::\d+)?†[^【】]*】")  # marks that the web page turns into links
ASIDE = {  # content types that hold nothing that was said, and how leaving them out is told
    "user_editable_context": "custom instructions left out",
    "model_editable_context": "the model's memory left out",
    "thoughts": "the model's thoughts left out",
    "reasoning_recap": "the model's thoughts left out",
}
TEXT = ("text", "code", "execution_output", "multimodal_text", "tether_quote", "tether_browsing_display", "system_error")
BESIDE = re.compile(  # what stands beside conversations.json in the folder; no file of it holds a conversation of its own
    r"(user|user_settings|message_feedback|shared_conversations|model_comparisons|export_manifest|group_chats|shopping|sora|"
    r"conversation_asset_file_names|library_files)\.json"
)
CONVERSATIONS = re.compile(r"conversations(-\d+)?\.json(\.gz)?")


class ExportError(Exception):
    """Why a conversation of an export cannot be used."""


def chatgpt(value: Mapping[str, Any], fixes: list[str]) -> list[dict[str, Any]]:
    """The messages of one conversation as {role, content}, in OpenAI's keys. ExportError with the reason."""
    nodes = value["mapping"]
    if not isinstance(nodes, dict):
        raise ExportError("mapping is not an object of nodes")
    messages: list[dict[str, Any]] = []
    for node in _path(nodes, value.get("current_node"), fixes):
        message = node.get("message")
        if message is None:  # the root
            continue
        if not isinstance(message, dict):
            raise ExportError("a node's message is not an object")
        if (turn := _turn(message, len(messages) + 1, messages, fixes)) is not None:
            messages.append(turn)
    if not messages:
        raise ExportError("the conversation holds no message")
    return messages


def _path(nodes: dict[str, Any], last: Any, fixes: list[str]) -> list[dict[str, Any]]:
    """The nodes from the root to `last`."""
    parents = {n.get("parent") for n in nodes.values() if isinstance(n, dict) and isinstance(n.get("parent"), str)}
    if last is None:
        leaves = [name for name in nodes if name not in parents]
        if len(leaves) != 1:
            raise ExportError(f"no current_node, and the tree has {len(leaves)} ends: which one was kept cannot be told")
        last = leaves[0]
    path: list[dict[str, Any]] = []
    seen: set[str] = set()
    while last is not None:
        if not isinstance(last, str) or not isinstance(node := nodes.get(last), dict):
            told = "current_node" if not path else "a parent"
            raise ExportError(f"{told} names a node that is not in the mapping")
        if last in seen:
            raise ExportError("the tree runs in a circle")
        seen.add(last)
        path.append(node)
        last = node.get("parent")
    said = [name for name, n in nodes.items() if isinstance(n, dict) and isinstance(n.get("message"), dict)]
    if any(name not in seen for name in said):
        fixes.append("branches that were edited or tried again left out")
    return path[::-1]


def _turn(message: dict[str, Any], number: int, before: list[dict[str, Any]], fixes: list[str]) -> dict[str, Any] | None:
    """One message; None for one that is left out."""
    author, content, meta = message.get("author"), message.get("content"), message.get("metadata")
    role = author.get("role") if isinstance(author, dict) else None
    if not isinstance(role, str):
        raise ExportError(f"message {number} has no author with a role")
    if not isinstance(content, dict):
        raise ExportError(f"message {number} has no content")
    kind = content.get("content_type", "text")
    if isinstance(kind, str) and kind in ASIDE:
        fixes.append(ASIDE[kind])
        return None
    text = _text(content, kind, number, fixes)
    if isinstance(meta, dict) and meta.get("is_visually_hidden_from_conversation") is True:
        if text:
            fixes.append("hidden messages left out")
        return None
    if not text.strip() and role != "tool":  # the empty system message at the root; a turn that only began to think
        if role == "user":
            raise ExportError(f"message {number} (user) is empty")
        return None
    recipient = message.get("recipient", "all")
    if role == "assistant" and isinstance(recipient, str) and recipient != "all":
        fixes.append("calls of the model's tools kept as tool calls")
        arguments = {"code" if kind == "code" else "input": text}
        return {
            "role": role,
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": recipient, "arguments": arguments}}],
        }
    if role == "tool":
        if not (before and (before[-1].get("tool_calls") or before[-1]["role"] == "tool")):
            raise ExportError(f"message {number} is a tool's result that no call asked for: the answer rests on what is not here")
        name = author.get("name")
        return {"role": role, "content": text, **({"name": name} if isinstance(name, str) else {})}
    return {"role": role, "content": text} | ({"weight": 0} if role == "assistant" and message.get("weight") == 0 else {})


def _text(content: dict[str, Any], kind: Any, number: int, fixes: list[str]) -> str:
    if kind not in TEXT:
        raise ExportError(f"content of type {str(kind)[:40]!r} in message {number}; only text is supported")
    parts = content.get("parts")
    if parts is None:
        parts = [content.get("text", content.get("result", ""))]
    if not isinstance(parts, list):
        raise ExportError(f"the parts of message {number} are not a list")
    texts = []
    for part in parts:
        if isinstance(part, dict):
            inner = part.get("content_type")
            if inner != "audio_transcription" or not isinstance(part.get("text"), str):
                raise ExportError(f"content of type {str(inner)[:40]!r} in message {number}; only text is supported")
            part = part["text"]
            fixes.append("speech read from its transcript")
        if part is not None and not isinstance(part, str):
            raise ExportError(f"a part of message {number} is neither text nor an object")
        texts.append(part or "")
    text = "\n".join(t for t in texts if t)
    clean = CITATION.sub("", text) if "\ue200" in text or "†" in text else text
    if clean != text:
        fixes.append("citation marks taken out")
    return clean
