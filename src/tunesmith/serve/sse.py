"""Server-sent events: one JSON value an event, and `[DONE]`. No torch.

A value is one line whatever it holds: JSON writes line ends as escapes, and half a surrogate pair, which UTF-8 cannot hold, too.
"""

from __future__ import annotations

import json
from typing import Any

from tunesmith.files import finite

DONE = b"data: [DONE]\n\n"
PING = b": still here\n\n"  # a comment: proxies close what is silent


def event(value: Any) -> bytes:
    """`data: {...}` and an empty line. nan and infinity, which JSON lacks, become null."""
    return b"data: " + dumps(value) + b"\n\n"


def dumps(value: Any) -> bytes:
    """JSON in UTF-8, compact. What is no value of JSON becomes its text."""
    text = json.dumps(finite(value), ensure_ascii=False, separators=(",", ":"), default=str)
    try:
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(finite(value), separators=(",", ":"), default=str).encode()
