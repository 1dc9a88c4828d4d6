"""Start the server. Closed by default: 127.0.0.1, and a token in a file that only its owner may read."""

from __future__ import annotations

import ipaddress
import os
import secrets
import signal
import socket
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tunesmith.errors import ConfigError, Interrupted, MissingExtra, TunesmithError, install

SHORTEST = 16  # characters of a token that somebody wrote


def loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def token_file(path: Path | None, host: str, port: int) -> tuple[str, Path]:
    """(the token, where it lies). A file that was named and is there is read, if nobody else may; else a new token is written.

    Raises ConfigError: on another address than this machine's own without a named file; a file that others may read; a short token.
    """
    if path is None:
        if not loopback(host):
            raise ConfigError(
                f"--host {host} is open to other machines, and no token was named",
                "name its file: --token-file FILE (it is made where it is missing), and give that token to the clients",
            )
        path = Path(os.environ.get("TUNESMITH_CACHE") or "~/.cache/tunesmith").expanduser() / f"serve-{port}.token"
        return _written(path, replace=True), path
    if not path.exists():
        return _written(path), path
    try:
        mode, text = path.stat().st_mode, path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read: {e}", "name a file with the token alone") from None
    if os.name == "posix" and stat.S_IMODE(mode) & 0o077:
        raise ConfigError(f"{path}: others may read it (mode {stat.S_IMODE(mode):04o})", f"chmod 600 {path}")
    if len(text) < SHORTEST or not text.isascii() or not text.isprintable() or " " in text:
        raise ConfigError(f"{path}: no token of {SHORTEST} characters or more without spaces", "delete the file, and one is made")
    return text, path


def _written(path: Path, replace: bool = False) -> str:
    token = secrets.token_urlsafe(32)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if replace:
            path.unlink(missing_ok=True)  # not written into: it may be a link, or open to others
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(token + "\n")
    except OSError as e:
        raise ConfigError(f"{path}: the token cannot be written: {e.strerror}", "name another file with --token-file") from None
    return token


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one. ConfigError where the address is taken or not this machine's."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port {port}: no port", "0, which takes a free one, to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named, or asyncio leaves Nagle on: 40 ms an answer
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host.strip("[]"), port))
    except OSError as e:
        sock.close()
        raise ConfigError(f"{host}:{port}: {e.strerror or e}", "choose another --port, or end the program that has it") from None
    sock.listen(1024)
    return sock


def library() -> Any:
    """uvicorn, and Starlette beside it. Raises MissingExtra."""
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError:
        raise MissingExtra("a server needs starlette and uvicorn", install("serve")) from None
    return uvicorn


def run(sources: Sequence[str | Path], *, docs: Path | None = None, passages: int = 4, adapters: Path | None = None,
        host: str = "127.0.0.1", port: int = 8000, token: Path | None = None, allow_hosts: Sequence[str] = (),
        limits: dict[str, Any] | None = None, memory: Any = None, kernels: str = "auto", say: Callable[[str], None] = print,
        ready: Callable[[Any], None] | None = None) -> None:  # fmt: skip
    """Open `sources`, serve until SIGINT or SIGTERM, then return; Interrupted where SIGINT comes before it serves.

    `ready` gets uvicorn's server once it is made (its `should_exit` ends it). `kernels`: as in ops/backend.py; `reference` also
    records no steps."""
    uvicorn = library()
    if (limits or {}).get("queue", 0) < 0:
        raise ConfigError(f"--max-queue {limits['queue']}", "0, where nobody waits, or more")
    sock = listen(host, port)
    try:
        port = sock.getsockname()[1]
        secret, where = token_file(token, host, port)
        from tunesmith.ops import backend
        from tunesmith.serve.http import build
        from tunesmith.serve.service import Service
        from tunesmith.serve.shelf import Shelf

        backend.set_mode(kernels)
        if kernels == "reference":
            limits = (limits or {}) | {"graphs": False}
        search, close = _search(docs, passages)
        shelf = Shelf(sources, folder=adapters, memory=memory, limits=limits)
    except KeyboardInterrupt:
        sock.close()
        raise Interrupted("stopped before it served", "give the same command again") from None
    except BaseException:
        sock.close()
        raise
    try:
        service = Service(shelf.engine, shelf.models, search)
        most = 2 * (shelf.engine.limits.batch + shelf.engine.limits.queue)
        app = build(service, shelf, token=secret, hosts=[host, *allow_hosts], addresses=not loopback(host), most_requests=most)
        config = uvicorn.Config(app, access_log=False, log_level="warning", server_header=False, lifespan="off",
                                timeout_keep_alive=30, timeout_graceful_shutdown=5)  # fmt: skip
        server = uvicorn.Server(config)
        for note in (*shelf.notes, *shelf.engine.notes):
            say(f"note    {note}")
        engine = shelf.engine.start()
        cache = engine.pool.keys.nbytes + engine.pool.values.nbytes
        say(f"Models  {', '.join(shelf.models())}")
        say(f"Cache   {engine.pool.blocks.count * 16:,} tokens in {cache / 2**30:.2f} GiB, {engine.limits.batch} answers at once")
        say(f"Token   in {where}: clients send it as their API key")
        say(f"Serving http://{f'[{host}]' if ':' in host else host}:{port}/v1")
        if ready is not None:
            ready(server)
        with _swallowed():
            server.run(sockets=[sock])
        say("Stopped serving")
    finally:
        shelf.close()
        sock.close()
        if close is not None:
            close()


@contextmanager
def _swallowed() -> Iterator[None]:
    """uvicorn ends on SIGINT and SIGTERM and then sends itself the signal again, which would end the process before the engine and
    the templates' processes are closed, or look like a run that was interrupted."""
    former = {}
    if threading.current_thread() is threading.main_thread():
        former = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _search(docs: Path | None, passages: int) -> tuple[Callable[[str], Any] | None, Callable[[], None] | None]:
    if docs is None:
        return None, None
    if not 1 <= passages <= 64:
        raise ConfigError(f"--passages {passages}", "1 to 64")
    from tunesmith.retrieve import Index

    index = Index.open(docs)
    try:
        index.embedder()  # what is missing is told now
    except TunesmithError:
        index.close()
        raise
    return lambda question: index.search(question, passages), index.close
