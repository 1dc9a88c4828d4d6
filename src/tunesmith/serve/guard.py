"""Who may ask, and how much they may send: an ASGI middleware before every route. No torch.

Host      a name that this server goes by: a page that points its own name at 127.0.0.1 (DNS rebinding) does not know one
Origin    absent, or this server's own; `Sec-Fetch-Site: cross-site` is refused too. There is no CORS header
token     `Authorization: Bearer ...`, compared in constant time, on every route
body      JSON only, at most `most_bytes`: a longer Content-Length is refused unread, a longer stream when it is
requests  at most `most_requests` at once, 429 and Retry-After beyond
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
from collections.abc import Iterable, Mapping
from typing import Any

from tunesmith.serve.schema import ApiError
from tunesmith.serve.sse import dumps

HEADERS = ((b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store"), (b"referrer-policy", b"no-referrer"))
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::(\d{1,5}))?")


class Guard:
    """`token` None: nobody is asked for one. `hosts`: names beside LOOPBACK; `addresses`: any address in numbers is a host too."""

    def __init__(self, app: Any, *, token: str | None, hosts: Iterable[str] = (), addresses: bool = False,
                 most_bytes: int = 4 << 20, most_requests: int = 1024, patience: float = 30.0):  # fmt: skip
        self.app, self.token = app, None if token is None else token.encode()
        self.hosts, self.addresses = {*LOOPBACK, *(h.lower() for h in hosts)}, addresses
        self.most_bytes, self.most_requests, self.patience = most_bytes, most_requests, patience
        self.open = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # no web sockets here
            return await send({"type": "websocket.close", "code": 1008})

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *HEADERS]}
            await send(message)

        try:
            headers = self._headers(scope)
            self._who(headers)
            self._what(scope["method"], headers)
            if self.open >= self.most_requests:
                raise ApiError(429, f"{self.open} requests are open", code="rate_limited", headers={"retry-after": "1"})
        except ApiError as fault:
            return await respond(fault, guarded)
        self.open += 1
        try:
            try:
                body = await asyncio.wait_for(self._read(receive), self.patience)
            except TimeoutError:
                return await respond(ApiError(408, "the body did not come in time", headers={"connection": "close"}), guarded)
            except ApiError as fault:
                return await respond(fault, guarded)
            if body is not None:
                await self.app(scope, _replay(body, receive), guarded)
        finally:
            self.open -= 1

    @staticmethod
    def _headers(scope: Any) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        for key, value in scope["headers"]:
            key = key.lower()
            if key in found and key in (b"host", b"origin", b"authorization", b"content-type", b"content-length"):
                raise ApiError(400, f"the header {key.decode('latin-1')} stands twice")
            found[key] = value
        return found

    def _who(self, headers: Mapping[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        match = HOST.fullmatch(host)
        if match is None or not (match[1] in self.hosts or (self.addresses and _address(match[1]))):
            raise ApiError(403, "this Host is not served here; name it with --allow-host when the server starts", code="host")
        origin = headers.get(b"origin")
        if origin is not None and origin.decode("latin-1").lower() not in (f"http://{host}", f"https://{host}"):
            raise ApiError(403, "requests from other origins are not answered", code="origin")
        if headers.get(b"sec-fetch-site", b"none").lower() not in (b"none", b"same-origin"):
            raise ApiError(403, "requests from other sites are not answered", code="origin")
        if self.token is None:
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if not hmac.compare_digest(given.strip(), self.token) or scheme.lower() != b"bearer":
            raise ApiError(401, "this server needs its token: Authorization: Bearer ... (the file that it named when it started)",
                           code="invalid_api_key", headers={"www-authenticate": "Bearer"})  # fmt: skip

    def _what(self, method: str, headers: Mapping[bytes, bytes]) -> None:
        kind = headers.get(b"content-type")
        announced = headers.get(b"content-length")
        has_body = (
            method not in ("GET", "HEAD", "DELETE", "OPTIONS") or announced not in (None, b"0") or b"transfer-encoding" in headers
        )
        if kind is not None or has_body:
            main, *more = (part.strip().lower() for part in (kind or b"").split(b";"))
            if main != b"application/json" or any(p not in (b"", b"charset=utf-8", b'charset="utf-8"') for p in more):
                raise ApiError(415, "bodies are application/json in UTF-8", code="content_type")
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise ApiError(415, "bodies are sent as they are, not compressed", code="content_encoding")
        if announced is None:  # a stream, counted as it comes
            return
        if not announced.isdigit():
            raise ApiError(400, "Content-Length is no number")
        if len(announced) > 18 or int(announced) > self.most_bytes:
            raise ApiError(
                413, f"the body has more than {self.most_bytes:,} bytes", code="too_large", headers={"connection": "close"}
            )

    async def _read(self, receive: Any) -> bytes | None:
        """The body; None when the client has gone."""
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.most_bytes:
                raise ApiError(413, f"the body has more than {self.most_bytes:,} bytes", code="too_large",
                               headers={"connection": "close"})  # fmt: skip
            if not message.get("more_body"):
                return b"".join(parts)


def _address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def _replay(body: bytes, receive: Any) -> Any:
    """The body as one message, then what else comes: the client's going."""
    given = False

    async def again() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def respond(fault: ApiError, send: Any) -> None:
    body = dumps(fault.body())
    headers = {"content-type": "application/json", "content-length": str(len(body)), **fault.headers}
    raw = [(k.encode(), v.encode()) for k, v in headers.items()]
    await send({"type": "http.response.start", "status": fault.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
