"""A run that took a second, a stand-in for retrieval, and a server that answers as it is told."""

import io
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType, SimpleNamespace

import pytest
from rich.console import Console

import tunesmith
import tunesmith.retrieve as retrieve
from tunesmith.retrieve import cite, measures


def quiet():
    return Console(file=io.StringIO(), width=160)


@pytest.fixture(scope="session")
def run(tiny, tmp_path_factory):
    """A finished run with 24 held-out rows: answers of one number, one in four rows with two turns."""
    root = tmp_path_factory.mktemp("compared")
    held = tiny.rows(root / "held.jsonl", 24, start=100)
    config = tiny.config(root / "run", data={"held_out": str(held)}, train={"epochs": 1})
    return tunesmith.train(config, console=quiet())


@pytest.fixture
def retrieval(monkeypatch):
    """tunesmith.retrieve as it will be: passages by shared words."""
    made = SimpleNamespace(added=[], asked=[], indexes=[])

    class Index:
        def __init__(self, texts):
            self.texts = texts

        @classmethod
        def open(cls, path):
            return cls(json.loads(path.read_text()))

        @classmethod
        def create_or_open(cls, path):
            path.touch()
            made.indexes.append(path)
            return cls([])

        def add(self, folder, *, only):
            made.added.append(folder)
            self.texts += [(p.name, p.read_text()) for p in sorted(folder.rglob("*.txt"))]

        def search(self, query, k):
            made.asked.append(query)
            found = [(sum(w in text for w in query.split()), name, text) for name, text in self.texts]
            best = sorted(found, key=lambda f: -f[0])[:k]
            return [
                SimpleNamespace(id=f"{name}#0", document=name, start=0, end=len(text), text=text, score=s) for s, name, text in best
            ]

    module = ModuleType("tunesmith.retrieve")
    module.Index = Index
    module.__path__ = retrieve.__path__  # its check of citations and its measures are the real ones
    module.cite, module.measures = cite, measures
    monkeypatch.setitem(sys.modules, "tunesmith.retrieve", module)
    return made


@pytest.fixture
def server():
    """An OpenAI-compatible server. `told.replies` are (status, body, headers), each used once; then it echoes the question."""
    told = SimpleNamespace(replies=[], asked=[], headers=[], lock=threading.Lock(), fail_from=None, judge=None)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with told.lock:
                told.asked.append(body)
                told.headers.append(dict(self.headers))
                number = len(told.asked)
                reply = told.replies.pop(0) if told.replies else None
            if told.fail_from is not None and number >= told.fail_from:
                reply = (400, {"error": {"message": "no more"}}, {})
            if reply is None:
                asked = body["messages"][-1]["content"]
                text = told.judge(asked) if told.judge else f"it is {asked[:20]}"
                usage = {"prompt_tokens": 5, "completion_tokens": 3}
                reply = (200, {"choices": [{"message": {"content": text}, "finish_reason": "stop"}], "usage": usage}, {})
            status, value, headers = reply
            raw = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            for name, text in headers.items():
                self.send_header(name, text)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *args):
            pass

    service = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=service.serve_forever, daemon=True).start()
    told.url = f"http://127.0.0.1:{service.server_address[1]}/v1"
    yield told
    service.shutdown()
    service.server_close()
