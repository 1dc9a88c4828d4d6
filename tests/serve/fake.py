"""An engine without a model, for tests of the HTTP side, and a client of raw sockets that costs little.

A job's answer is derived from its prompt and index alone, so that each client can tell whether a token is its own.
"""

import asyncio
import heapq
import json
import threading
import time
from types import SimpleNamespace

from tunesmith.serve.job import Busy, Chosen, Piece
from tunesmith.serve.service import Served, Service

TOKEN = "a-token-for-tests-0123456789"
HEADERS = {"authorization": f"Bearer {TOKEN}", "host": "127.0.0.1:8000", "content-type": "application/json"}


class Words:
    """A tokenizer whose tokens are characters."""

    vocab_size = 0x110000
    special_ids = frozenset()

    def decode(self, ids, skip_special=False):
        return "".join(map(chr, ids))

    def stream(self, skip_special=True):
        return SimpleNamespace(push=chr, flush=str)

    def token(self, index):
        return chr(index)


class Renderer:
    tokenizer = Words()
    stop_ids = frozenset({0})

    def __init__(self):
        self.templates = {"default": "<tool_call>"}

    def prompt(self, messages, tools=()):
        return [ord(c) for c in "".join(f"{m['role']}:{m['content']}|" for m in messages)]

    def continued(self, text):
        return [ord(c) for c in text]

    def close(self):
        pass


def words_of(prompt, index, count):
    """The answer to a prompt: `count` words that no other prompt's has."""
    key = "".join(map(chr, prompt))[-24:].replace(" ", "_")
    return [f"{key}/{index}/{k} " for k in range(count)]


class Engine:
    """Answers in `step` seconds a word, all jobs at once; `slots` are held while a job runs."""

    context = 4096

    def __init__(self, *, step=0.0, words=4, most=10_000, script=None):
        self.step, self.words, self.most, self.script = step, words, most, script
        self.running, self.cancelled, self.answered = 0, 0, 0
        self._queue, self._lock, self._wake, self._count = [], threading.Condition(), True, 0
        threading.Thread(target=self._run, daemon=True).start()

    def state(self):
        return {"alive": True, "running": self.running}

    def submit(self, *jobs):
        with self._lock:
            if self.running + len(jobs) > self.most:
                raise Busy(f"{self.running} requests are running or waiting, and no more may wait", 7)
            self.running += len(jobs)
            tickets = []
            for job in jobs:
                said = self.script(job) if self.script else words_of(job.prompt, job.index, job.max_tokens or self.words)
                ticket = SimpleNamespace(job=job, said=list(said), made=0, over=False)
                ticket.cancel = lambda t=ticket: self._cancel(t)
                tickets.append(ticket)
                self._count += 1
                heapq.heappush(self._queue, (time.monotonic() + self.step, self._count, ticket))
            self._lock.notify()
        return tickets

    def _cancel(self, ticket):
        with self._lock:
            if not ticket.over:
                ticket.over = True
                self.running -= 1
                self.cancelled += 1

    def _run(self):
        while True:
            with self._lock:
                while not self._queue or self._queue[0][0] > time.monotonic():
                    self._lock.wait(None if not self._queue else max(0.0, self._queue[0][0] - time.monotonic()))
                _, _, ticket = heapq.heappop(self._queue)
                if ticket.over:
                    continue
                text = ticket.said.pop(0) if ticket.said else ""
                ticket.made += 1
                if not ticket.said:
                    ticket.over = True
                    self.running -= 1
                    self.answered += 1
                else:
                    self._count += 1
                    heapq.heappush(self._queue, (time.monotonic() + self.step, self._count, ticket))
            tokens = (
                (Chosen(1, text, -0.5, (Chosen(1, text, -0.5), Chosen(2, "x", -1.0))),) if ticket.job.logprobs is not None else ()
            )
            piece = text if isinstance(text, Piece) else Piece(text, tokens, ticket.made, "stop" if ticket.over else None)
            ticket.job.deliver(piece)


def service(engine, search=None, names=("tiny",)):
    served = {name: Served(name, Renderer(), created=1) for name in names}
    return Service(engine, lambda: served, search)


def chat(text="hello", **more):
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], **more}


class Server:
    """uvicorn in a thread, on a free port."""

    def __init__(self, app):
        import uvicorn

        from tunesmith.serve.start import listen

        self.sock = listen("127.0.0.1", 0)
        self.port = self.sock.getsockname()[1]
        config = uvicorn.Config(
            app, access_log=False, log_level="error", lifespan="off", server_header=False, timeout_graceful_shutdown=1
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.sock]}, daemon=True)

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            time.sleep(0.005)
        return self

    def __exit__(self, *exc):
        self.server.should_exit = True
        self.thread.join(5)
        self.sock.close()


class Client:
    """One kept-alive connection."""

    def __init__(self, port):
        self.port = port

    async def __aenter__(self):
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def __aexit__(self, *exc):
        self.writer.close()

    async def post(self, path, body, read=True):
        """(status, body); the body of a stream is all its events."""
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{self.port}\r\nauthorization: Bearer {TOKEN}\r\n"
        self.writer.write(head.encode() + f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
        if not read:
            return None
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        status = int(head.split(" ", 2)[1])
        if "transfer-encoding: chunked" not in head:
            length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
            return status, await self.reader.readexactly(length)
        parts = []
        while True:
            size = int(await self.reader.readline(), 16)
            parts.append(await self.reader.readexactly(size))
            await self.reader.readexactly(2)
            if not size:
                return status, b"".join(parts)


def events(body):
    """The JSON values of a stream, which must end with [DONE]."""
    found = [part.removeprefix("data: ") for part in body.decode().split("\n\n") if part and not part.startswith(":")]
    assert found[-1] == "[DONE]", found[-1]
    return [json.loads(part) for part in found[:-1]]
