"""The routes, on Starlette: OpenAI's /v1/chat/completions, /v1/completions and /v1/models; /v1/adapters; /health. No torch.

Nothing waits on the event loop: rendering runs in a thread, answers come from the engine's thread through an Outbox. A client that
goes away ends its jobs, whether it was reading a stream or waiting.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tunesmith.errors import TunesmithError
from tunesmith.serve import sse
from tunesmith.serve.guard import Guard, respond
from tunesmith.serve.job import Busy, Missing, Piece
from tunesmith.serve.schema import AdapterRequest, ApiError, ChatRequest, CompletionRequest, parse
from tunesmith.serve.service import Draft, Question, Service, chat_logprob, completion_logprobs, told

QUIET = 15.0  # seconds without a token until a stream says that it lives
STALLED = 30.0  # seconds that a client may leave a full connection unread until it counts as gone


class Outbox:
    """From the engine's thread to one request on the event loop: pieces with their choice's number."""

    def __init__(self):
        self._loop, self._pieces, self._event, self._told = asyncio.get_running_loop(), deque(), asyncio.Event(), False

    def put(self, number: int, piece: Piece) -> None:
        self._pieces.append((number, piece))
        if not self._told:
            self._told = True
            with suppress(RuntimeError):  # the loop is closed: nobody reads any more
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._told = False
        self._event.set()

    async def get(self) -> list[tuple[int, Piece]]:
        """All that has come, at least one."""
        while not self._pieces:
            self._event.clear()
            if not self._pieces:
                await self._event.wait()
        found = []
        while self._pieces:
            found.append(self._pieces.popleft())
        return found


class Answering:
    """An ASGI response: asks the engine, says what comes, ends its jobs when the client goes."""

    def __init__(self, service: Service, question: Question, stream: bool, usage: bool):
        self.service, self.question, self.stream, self.usage = service, question, stream, usage
        self.drafts = [Draft(question, i) for i in range(question.choices)]
        self.outbox, self.tickets = Outbox(), []

    def begin(self) -> None:
        """Raises Busy, DataError before anything is sent."""
        if self.question.canned is not None:
            for i in range(self.question.choices):
                self.outbox.put(i, Piece(self.question.canned, reason="stop"))
            return
        self.tickets = self.service.engine.submit(*self.question.jobs(self.outbox.put))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        gone = asyncio.ensure_future(_gone(receive))
        work = asyncio.ensure_future(self._stream(send) if self.stream else self._whole(send))
        try:
            await asyncio.wait((gone, work), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                with suppress(OSError):  # the client went while it was told, or it does not read (TimeoutError)
                    work.result()
        finally:
            for ticket in self.tickets:
                ticket.cancel()
            for task in (gone, work):
                task.cancel()
            await asyncio.gather(gone, work, return_exceptions=True)

    async def _pieces(self) -> AsyncIterator[tuple[Draft, Piece, str] | None]:
        """(draft, piece, text to show) until all drafts have ended; None where nothing came for a while."""
        left = len(self.drafts)
        while left:
            try:
                found = await asyncio.wait_for(self.outbox.get(), QUIET)
            except TimeoutError:
                yield None
                continue
            for number, piece in found:
                draft = self.drafts[number]
                yield draft, piece, draft.take(piece)
                left -= piece.reason is not None

    async def _whole(self, send: Any) -> None:
        try:
            async for _ in self._pieces():
                pass
        except ApiError as fault:
            return await respond(fault, send)
        q = self.question
        choices = [d.chat_choice() if q.chat else d.completion_choice() for d in self.drafts]
        body = sse.dumps({**self._head(chunk=False), "choices": choices, "usage": q.usage([d.made for d in self.drafts])})
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def say(data: bytes) -> None:
            async with asyncio.timeout(STALLED):
                await send({"type": "http.response.body", "body": data, "more_body": True})

        q, begun = self.question, set()
        try:
            async for found in self._pieces():
                if found is None:
                    await say(sse.PING)
                    continue
                draft, piece, text = found
                for choice in self._deltas(draft, piece, text, begun):
                    await say(sse.event({**self._head(chunk=True), "choices": [choice], **({"usage": None} if self.usage else {})}))
            if self.usage:
                made = q.usage([d.made for d in self.drafts])
                await say(sse.event({**self._head(chunk=True), "choices": [], "usage": made}))
            await say(sse.DONE)
        except ApiError as fault:
            await say(sse.event(fault.body()))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _head(self, chunk: bool) -> dict[str, Any]:
        q = self.question
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if q.chat else "text_completion"
        return {"id": q.id, "object": kind, "created": q.created, "model": q.served.name, "system_fingerprint": None}

    def _deltas(self, draft: Draft, piece: Piece, text: str, begun: set[int]) -> list[dict[str, Any]]:
        """The choices of the chunks that a piece makes."""
        told, out = self.question.told is not None, []
        tokens = piece.tokens if told else ()
        if not self.question.chat:
            if text or tokens or piece.reason:
                logprobs = completion_logprobs(tokens, len(draft.text) - len(text)) if told else None
                out.append({"index": draft.index, "text": text, "logprobs": logprobs, "finish_reason": draft.reason})
            return out

        def choice(delta: dict[str, Any], tokens: Any = (), reason: str | None = None) -> dict[str, Any]:
            logprobs = {"content": [chat_logprob(t) for t in tokens], "refusal": None} if told and tokens else None
            return {"index": draft.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

        if draft.index not in begun:
            begun.add(draft.index)
            out.append(choice({"role": "assistant", "content": "", "refusal": None}))
        if text or tokens:
            out.append(choice({"content": text}, tokens))
        if piece.reason is not None:
            if draft.calls:
                out.append(choice({"tool_calls": [{"index": i, **call} for i, call in enumerate(draft.calls)]}))
            out.append(choice({} if draft.citations is None else {"citations": draft.citations}, reason=draft.reason))
        return out


async def _gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def build(service: Service, shelf: Any = None, **guard: Any) -> Starlette:
    """The application. `shelf`: loads and drops adapters by name; `guard`: settings of Guard."""

    async def in_thread(function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.to_thread(function, *args)

    async def ask(request: Request, kind: Any, ready: Callable[[Any], Question]) -> Response | Answering:
        def read() -> tuple[Any, Question]:  # 4 MiB of brackets take half a second
            asked = parse(body, kind)
            return asked, ready(asked)

        body = await request.body()
        asked, question = await in_thread(read)
        options = asked.stream_options
        answering = Answering(service, question, bool(asked.stream), bool(options and options.include_usage))
        if "grammar" in question.settings:  # a large schema's takes seconds for each answer
            await in_thread(answering.begin)
        else:
            answering.begin()
        return answering

    async def chat(request: Request) -> Any:
        return await ask(request, ChatRequest, service.chat)

    async def completion(request: Request) -> Any:
        return await ask(request, CompletionRequest, service.completion)

    async def models(request: Request) -> Response:
        return _json({"object": "list", "data": [_model(served) for served in service.models().values()]})

    async def model(request: Request) -> Response:
        return _json(_model(service.find(request.path_params["name"])))

    async def adapters(request: Request) -> Response:
        found = {} if shelf is None else await in_thread(shelf.adapters)
        return _json({"object": "list", "data": [{"id": name, "object": "adapter", "loaded": on} for name, on in found.items()]})

    async def load(request: Request) -> Response:
        name = parse(await request.body(), AdapterRequest).name
        try:
            return _json(_model(await in_thread(_known(shelf).load, name)))
        except Missing:
            raise
        except TunesmithError as e:
            raise ApiError.of(e, 409, code="adapter_not_loaded", param="name") from None

    async def drop(request: Request) -> Response:
        await in_thread(_known(shelf).drop, request.path_params["name"])
        return _json({"id": request.path_params["name"], "object": "adapter", "deleted": True})

    async def health(request: Request) -> Response:
        state = service.engine.state()
        return _json({"status": "ok" if state.get("alive", True) else "stopped", **state}, 200 if state.get("alive", True) else 503)

    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completion, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/adapters", adapters),
        Route("/v1/adapters", load, methods=["POST"]),
        Route("/v1/adapters/{name}", drop, methods=["DELETE"]),
        Route("/health", health),
    ]
    handlers = {ApiError: _fault, TunesmithError: _fault, HTTPException: _fault, Exception: _fault}
    return Starlette(routes=routes, middleware=[Middleware(Guard, **guard)], exception_handlers=handlers)


def _known(shelf: Any) -> Any:
    if shelf is None:
        raise ApiError(404, "no folder of adapters was named when the server started", code="adapter_not_found")
    return shelf


def _model(served: Any) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "tunesmith",
        "root": served.base or served.name,
    }


def _json(value: Any, status: int = 200) -> Response:
    return Response(sse.dumps(value), status, media_type="application/json")


async def _fault(request: Request, error: Exception) -> Response:
    """Whatever went wrong, in OpenAI's shape. A bug of ours says no more than that; uvicorn writes its traceback."""
    if isinstance(error, Busy):
        fault = ApiError.of(error, 429, code="rate_limited", headers={"retry-after": str(error.after)})
    elif isinstance(error, ApiError):
        fault = error
    elif isinstance(error, TunesmithError):
        fault = told(error)
    elif isinstance(error, HTTPException):
        fault = ApiError(error.status_code, str(error.detail), headers=error.headers)
    else:
        fault = ApiError(500, "this is a bug in the server; its log has more")
    return Response(sse.dumps(fault.body()), fault.status, headers=fault.headers, media_type="application/json")
