"""A model behind an OpenAI-compatible address: one question, one answer, with patience. Standard library alone, no torch.

The key is read from the environment variable TUNESMITH_API_KEY, goes into one header and nowhere else: no file, no message.
Redirects are not followed, so it reaches no other host.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tunesmith.errors import ConfigError, TunesmithError
from tunesmith.redact import HIDDEN, redact

KEY = "TUNESMITH_API_KEY"
PATH = "/chat/completions"
TRIES = 5
TIMEOUT = 120.0  # seconds without a byte
LONGEST_WAIT = 60.0  # seconds between two tries, whatever the server asks for
MOST = 8 << 20  # bytes of a reply that are read
AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
LOCAL = {"localhost", "127.0.0.1", "::1"}


class EndpointError(TunesmithError):
    """It did not answer, or not with an answer."""


@dataclass(frozen=True)
class Reply:
    text: str
    prompt_tokens: int | None
    answer_tokens: int | None
    seconds: float
    ended: str  # stop | length, or the server's own word


@dataclass(frozen=True)
class Endpoint:
    """`url` ends in /v1 or in /chat/completions. Raises ConfigError for one that cannot be."""

    url: str
    model: str
    tries: int = TRIES
    timeout: float = TIMEOUT
    pause: float = 1.0
    """Seconds before the second try; each later wait is twice as long."""
    sleep: Callable[[float], None] = field(default=time.sleep, compare=False)

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            sound, parts = False, None
        if not sound:
            raise ConfigError(f"--endpoint {redact(self.url)}: no http address", "write it as http://localhost:8000/v1")
        if parts.username or parts.password or parts.query:
            raise ConfigError("--endpoint: the address holds a login or a query", f"put the key into the variable {KEY}")
        if not self.model:
            raise ConfigError("--endpoint needs the model's name there", "add --endpoint-model NAME")

    @property
    def note(self) -> str:
        """What a person should know before the first question; '' for nothing."""
        parts = urlsplit(self.url)
        if parts.scheme == "http" and parts.hostname not in LOCAL and os.environ.get(KEY):
            return f"{parts.hostname}: http, so the key in {KEY} and the questions cross the network unencrypted"
        return ""

    def ask(self, messages: Sequence[Mapping[str, Any]], *, max_tokens: int, temperature: float = 0.0, seed: int = 0) -> Reply:
        """One answer. Tries again, later and later, after a time-out, a broken connection, 429, 5xx; EndpointError in the end."""
        body = {
            "model": self.model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
        }
        data = json.dumps(body, ensure_ascii=False).encode("utf-8", "backslashreplace")
        why = ""
        for attempt in range(1, self.tries + 1):
            begun, asked = time.monotonic(), 0.0
            try:
                status, headers, reply = self._post(data)
            except (OSError, http.client.HTTPException) as fault:  # ssl's and socket's errors are OSErrors
                if isinstance(fault, ssl.SSLCertVerificationError):
                    raise EndpointError(
                        f"{self.url}: its certificate cannot be trusted: {fault.verify_message}", "mend it"
                    ) from None
                why = str(fault) or type(fault).__name__
            else:
                if status == 200:
                    return self._reply(reply, time.monotonic() - begun)
                why = f"HTTP {status}: {self._said(reply)}"
                if status not in AGAIN:
                    raise EndpointError(f"{self.url}: {why}", _fix(status))
                asked = _seconds(headers.get("Retry-After"))
            if attempt < self.tries:
                wait = max(asked, self.pause * 2 ** (attempt - 1) * (1 + random.random() / 4))  # not all at the same moment
                self.sleep(min(LONGEST_WAIT, wait))
        what = f"{self.url}: no answer after {self.tries} tries; the last: {self._hide(redact(why))}"
        raise EndpointError(what, "see that the server runs, then give the same command again")

    def _post(self, data: bytes) -> tuple[int, Mapping[str, str], bytes]:
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        path = parts.path.rstrip("/")
        path = path if path.endswith(PATH) else path + PATH
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "tunesmith"}
        if key := os.environ.get(KEY, "").strip():
            if not key.isascii() or not key.isprintable():
                raise EndpointError(f"{KEY} holds signs that no header may have", "set it again, in one line")
            headers["Authorization"] = f"Bearer {key}"
        connection = kind(parts.hostname, parts.port, timeout=self.timeout)
        try:
            connection.request("POST", path, body=data, headers=headers)
            reply = connection.getresponse()
            return reply.status, reply.headers, reply.read(MOST)
        finally:
            connection.close()

    def _reply(self, raw: bytes, seconds: float) -> Reply:
        try:
            found = json.loads(raw)
            choice = found["choices"][0]
            text = choice["message"]["content"]
            usage = found.get("usage") or {}
            if text is None:
                text = ""
            if not isinstance(text, str):
                raise TypeError("content is no text")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            what = f"{self.url}: this is no chat completion: {self._said(raw)}"
            raise EndpointError(what, "give the address that ends in /v1 of an OpenAI-compatible server") from None
        counts = [n if isinstance(n := usage.get(k), int) else None for k in ("prompt_tokens", "completion_tokens")]
        return Reply(text, counts[0], counts[1], seconds, str(choice.get("finish_reason") or "stop"))

    def _said(self, raw: bytes) -> str:
        """The server's own words, short, on one line, without secrets."""
        text = raw[:2000].decode("utf-8", "replace")
        try:
            error = json.loads(raw)["error"]
            text = str(error["message"] if isinstance(error, dict) else error)
        except (ValueError, KeyError, TypeError):
            pass
        return self._hide(redact("".join(c if c.isprintable() else " " for c in text)))[:300]

    @staticmethod
    def _hide(text: str) -> str:
        key = os.environ.get(KEY, "").strip()
        return text.replace(key, HIDDEN) if key else text


def _seconds(value: str | None) -> float:
    """Retry-After in seconds; a date or nothing is 0."""
    try:
        return max(0.0, float(value or 0))
    except ValueError:
        return 0.0


def _fix(status: int) -> str:
    if status in (401, 403):
        return f"set the variable {KEY} to a key that may use this model"
    if status in (301, 302, 303, 307, 308):
        return "redirects are not followed: give the address it leads to"
    if status == 404:
        return "look at the address (it ends in /v1) and at --endpoint-model"
    return "look at --endpoint-model and --max-tokens"
