"""The three forms of data: Conversation (what was said), Example (token ids and which are learned), Batch (what the model sees).

Shape letters: T tokens in the flat stream, N documents in it, L labelled rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row came from: `chats.jsonl:17`."""

    file: str
    line: int  # 1-based line (jsonl, csv), or element (json array) or row (parquet)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is the field's own: system, user, assistant, tool (or any the template knows).

    `learn` is the person's own wish for this message (OpenAI's per-message `weight`: 0 -> False, 1 -> True); None leaves it to
    `data.train_on`. `extra` holds what a template may read besides: tool_calls, tool_call_id, name, reasoning_content.
    """

    role: str
    content: str
    learn: bool | None = None
    extra: tuple[tuple[str, Any], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The dict a chat template reads."""
        return {"role": self.role, "content": self.content, **dict(self.extra)}


@dataclass(frozen=True, slots=True)
class Conversation:
    """What was said. `kind` tells how it is rendered:

    chat        messages through the chat template
    completion  two messages, roles `prompt` and `completion`: plain concatenation + EOS, no template; the completion is learned
    text        one message, role `text`: raw text, everything learned, cut into windows of the maximum length
    """

    messages: tuple[Message, ...]
    origin: Origin
    kind: Literal["chat", "completion", "text"] = "chat"
    tools: tuple[dict[str, Any], ...] = ()
    fixes: tuple[str, ...] = ()  # what was mended on the way, e.g. "merged same-role turns"
    fields: Mapping[str, Any] = field(default_factory=dict)  # of a held-out row: what else it carries, for checks and groups


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of one document and which of them are trained: `learn[t]` means token t is a target (predicted from t-1)."""

    ids: np.ndarray  # int32 [T]
    learn: np.ndarray  # bool [T]; learn[0] is always False: nothing predicts the first token
    origin: Origin

    def __post_init__(self) -> None:
        assert self.ids.shape == self.learn.shape and self.ids.ndim == 1, "ids and learn must be one row of equal length"


@dataclass(frozen=True, slots=True)
class Batch:
    """One flat stream of documents without padding; documents cannot see each other.

    `rows[l]` is the index in the stream whose hidden state predicts `labels[l]`; only these reach the vocabulary projection.
    """

    tokens: np.ndarray  # int64 [T]
    positions: np.ndarray  # int64 [T], restart at 0 in each document
    cu_seqlens: np.ndarray  # int32 [N + 1], document boundaries, cu_seqlens[0] == 0, cu_seqlens[-1] == T
    rows: np.ndarray  # int64 [L]
    labels: np.ndarray  # int64 [L]
    origins: tuple[Origin, ...] = ()  # one a document: named when a loss is not finite

    @property
    def trained(self) -> int:
        """Tokens that carry loss in this batch."""
        return len(self.labels)
