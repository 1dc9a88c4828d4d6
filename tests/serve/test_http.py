"""serve/http.py and guard.py: every route is closed to those who may not ask; what comes back has OpenAI's shapes; clients that
vanish free their places. With an engine that has no model."""

import asyncio
import json
import threading
import time

import httpx
import pytest
from tests.serve.fake import HEADERS, TOKEN, Client, Engine, Server, chat, events, service, words_of

from tunesmith.errors import AdapterError, DataError, ModelError
from tunesmith.serve import http
from tunesmith.serve.http import build
from tunesmith.serve.job import Missing, Piece
from tunesmith.serve.schema import parse
from tunesmith.serve.service import Service


class Shelf:
    """Adapters by name."""

    def __init__(self, models):
        self.models, self.loaded = models, {"one": False, "odd": False}

    def adapters(self):
        return self.loaded

    def load(self, name):
        if name not in self.loaded:
            raise Missing(f"no adapter {name!r} here", "known: one")
        if name == "odd":
            raise AdapterError("odd: it changes lm_head.weight of the base", "merge it")
        self.loaded[name] = True
        return self.models()["tiny"]

    def drop(self, name):
        if not self.loaded.get(name):
            raise Missing(f"no adapter {name!r} is loaded")
        self.loaded[name] = False


def app(engine=None, **guard):
    made = service(engine or Engine())
    return build(made, Shelf(made.models), **{"token": TOKEN} | guard)


def call(application, method, path, headers=None, **more):
    """One request, without a socket."""

    async def go():
        transport = httpx.ASGITransport(app=application, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            return await client.request(method, path, headers=HEADERS if headers is None else headers, **more)

    return asyncio.run(go())


def fault(response, status, code=None):
    """An error in OpenAI's shape."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and (code is None or error["code"] == code)
    assert not [k for k in response.headers if k.startswith("access-control")]
    return error


# ---- who may ask

ROUTES = [(r.path.replace("{name}", "tiny").replace("{name:path}", "tiny"), sorted(r.methods - {"HEAD"})[0]) for r in app().routes]
BODY = json.dumps(chat()).encode()


def test_the_routes_are_all_there_are():
    assert sorted(ROUTES) == [
        ("/health", "GET"), ("/v1/adapters", "GET"), ("/v1/adapters", "POST"), ("/v1/adapters/tiny", "DELETE"),
        ("/v1/chat/completions", "POST"), ("/v1/completions", "POST"), ("/v1/models", "GET"), ("/v1/models/tiny", "GET"),
    ]  # fmt: skip


@pytest.mark.parametrize(("path", "method"), [*ROUTES, ("/", "GET"), ("/nothing", "POST"), ("/v1/models", "OPTIONS")])
@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"authorization": None}, 401),
        ({"authorization": f"Bearer {TOKEN}x"}, 401),
        ({"authorization": f"Bearer {TOKEN[:-1]}"}, 401),
        ({"authorization": f"Basic {TOKEN}"}, 401),
        ({"authorization": "Bearer "}, 401),
        ({"authorization": b"Bearer \xff\xfe"}, 401),
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example:8000"}, 403),
        ({"host": "192.168.1.7:8000"}, 403),
        ({"host": "127.0.0.1:8000@evil.example"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:3000"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "application/json; charset=utf-16"}, 415),
        ({"content-type": "application/json, text/plain"}, 415),
        ({"content-encoding": "gzip"}, 415),
    ],
    ids=str,
)
def test_every_route_is_closed(path, method, change, status):
    headers = {k: v for k, v in (HEADERS | change).items() if v is not None}
    response = call(app(), method, path, headers, **({"content": BODY} if method == "POST" else {}))
    error = fault(response, status)
    assert TOKEN not in response.text and "evil" not in response.text
    if status == 401:
        assert response.headers["www-authenticate"] == "Bearer" and error["code"] == "invalid_api_key"


@pytest.mark.parametrize(("path", "method"), [r for r in ROUTES if r[1] == "POST"])
def test_a_body_without_a_type_is_refused(path, method):
    headers = {k: v for k, v in HEADERS.items() if k != "content-type"}
    fault(call(app(), method, path, headers, content=BODY), 415)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/adapters"])
def test_long_bodies_are_refused_unread(path):
    """By Content-Length before a byte is read; without one, once the limit is passed."""
    application, read = app(most_bytes=1000), []

    async def body(parts):
        for part in parts:
            read.append(len(part))
            yield part

    announced = call(application, "POST", path, HEADERS | {"content-length": "1001"}, content=body([b"x" * 500] * 100))
    fault(announced, 413, "too_large")
    assert sum(read) <= 500  # httpx's transport had one part in hand; nobody asked for more
    read.clear()
    fault(call(application, "POST", path, content=body([b"x" * 400] * 100)), 413, "too_large")
    assert sum(read) <= 1600
    fault(call(application, "POST", path, HEADERS | {"content-length": "9" * 40}, content=b"{}"), 413)
    fault(call(application, "POST", path, HEADERS | {"content-length": "-5"}, content=b"{}"), 400)


def test_the_same_host_and_its_own_page_may_ask():
    for change in (
        {"host": "localhost:9000"},
        {"host": "[::1]:8000"},
        {"origin": "http://127.0.0.1:8000"},
        {"sec-fetch-site": "none"},
    ):
        answer = call(app(), "GET", "/v1/models", HEADERS | change)
        assert answer.status_code == 200 and not [k for k in answer.headers if k.startswith("access-control")], change
    assert call(app(hosts=["Box.Example"]), "GET", "/health", HEADERS | {"host": "box.example"}).status_code == 200
    fault(call(app(), "GET", "/health", HEADERS | {"host": "10.0.0.7"}), 403, "host")
    assert call(app(addresses=True), "GET", "/health", HEADERS | {"host": "10.0.0.7"}).status_code == 200
    fault(call(app(addresses=True), "GET", "/health", HEADERS | {"host": "rebound.example"}), 403, "host")
    assert call(app(token=None), "GET", "/health", {"host": "localhost"}).status_code == 200


def test_headers_that_stand_twice_are_refused():
    for name in ("host", "authorization", "content-type"):
        fault(call(app(), "GET", "/health", [*HEADERS.items(), (name, HEADERS[name])]), 400)


def test_a_body_that_does_not_come_is_not_waited_for():
    async def slow():
        yield b"{"
        await asyncio.sleep(5)
        yield b"}"

    start = time.monotonic()
    response = call(app(patience=0.1), "POST", "/v1/chat/completions", content=slow())
    assert fault(response, 408) and response.headers["connection"] == "close", "the rest of it would be read"
    assert time.monotonic() - start < 2


def test_a_client_that_does_not_read_counts_as_gone(monkeypatch):
    """Its stream held a place of the server, and its job one of the engine, as long as it liked."""
    monkeypatch.setattr(http, "STALLED", 0.1)
    engine, sent = Engine(step=0.01, words=2000), []
    body = json.dumps(chat(stream=True)).encode()
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "raw_path": b"", "query_string": b"",
             "root_path": "", "headers": [(k.encode(), v.encode()) for k, v in HEADERS.items()]}  # fmt: skip

    async def go():
        asked = False

        async def receive():
            nonlocal asked
            if asked:
                await asyncio.sleep(60)
            asked = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message):
            sent.append(message["type"])
            if len(sent) > 3:
                await asyncio.sleep(60)

        await app(engine)(scope, receive, send)

    start = time.monotonic()
    asyncio.run(go())
    assert time.monotonic() - start < 5 and engine.running == 0 and engine.cancelled == 1 and len(sent) == 4


def test_a_long_request_is_read_beside_the_event_loop(monkeypatch):
    """4 MiB of brackets take half a second, in which every stream stood still."""
    where = []
    monkeypatch.setattr(http, "parse", lambda body, kind: where.append(threading.current_thread()) or parse(body, kind))
    assert call(app(), "POST", "/v1/chat/completions", json=chat()).status_code == 200
    fault(call(app(), "POST", "/v1/completions", json={"model": "tiny"}), 400)
    assert len(where) == 2 and threading.main_thread() not in where


def test_grammars_are_made_beside_the_event_loop(monkeypatch):
    """3,000 patterns take two seconds for each answer."""
    where, engine = [], Engine()
    submit = engine.submit
    monkeypatch.setattr(engine, "submit", lambda *jobs: where.append(threading.current_thread()) or submit(*jobs))
    monkeypatch.setattr(Service, "_grammars_of", lambda self, served: ())
    monkeypatch.setattr(Service, "_grammar", lambda self, grammars, schema: lambda: None)
    engine.script = lambda job: ["{}"]
    body = chat(response_format={"type": "json_object"})
    assert call(app(engine), "POST", "/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"] == "{}"
    assert len(where) == 1 and threading.main_thread() not in where


def test_nothing_may_be_cached_or_guessed_and_unknown_paths_are_errors_too():
    response = call(app(), "GET", "/v1/models")
    assert response.headers["cache-control"] == "no-store" and response.headers["x-content-type-options"] == "nosniff"
    fault(call(app(), "GET", "/v1/other"), 404)
    fault(call(app(), "GET", "/v1/chat/completions"), 405)
    fault(call(app(), "GET", "/v1/models/..%2f..%2fetc%2fpasswd"), 404)


def test_web_sockets_are_closed():
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(app()({"type": "websocket", "path": "/", "headers": []}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


# ---- what comes back


def test_a_whole_answer_has_openais_shape():
    found = call(app(), "POST", "/v1/chat/completions", json=chat(n=2, max_tokens=3, logprobs=True, top_logprobs=2)).json()
    prompt = [ord(c) for c in "user:hello|"]
    for i, choice in enumerate(found["choices"]):
        assert choice["message"]["content"] == "".join(words_of(prompt, i, 3)) and choice["index"] == i
        assert choice["finish_reason"] == "stop" and len(choice["logprobs"]["content"]) == 3
        assert [len(t["top_logprobs"]) for t in choice["logprobs"]["content"]] == [2, 2, 2]
    assert found["usage"] == {"prompt_tokens": 11, "completion_tokens": 6, "total_tokens": 17}
    assert found["object"] == "chat.completion" and found["id"].startswith("chatcmpl-") and found["model"] == "tiny"
    plain = call(app(), "POST", "/v1/completions", json={"model": "tiny", "prompt": ["a", "b"], "n": 2, "max_tokens": 2}).json()
    said = [c["text"] for c in plain["choices"]]
    assert said == ["".join(words_of([ord(p)], i, 2)) for p in "ab" for i in range(2)] and plain["object"] == "text_completion"


def test_a_stream_joins_to_the_whole_answer():
    for usage in (False, True):
        more = {"stream_options": {"include_usage": True}} if usage else {}
        response = call(app(), "POST", "/v1/chat/completions", json=chat(stream=True, n=2, max_tokens=5, **more))
        assert response.headers["content-type"].startswith("text/event-stream")
        chunks = events(response.content)
        for i in range(2):
            mine = [c["choices"][0] for c in chunks if c["choices"] and c["choices"][0]["index"] == i]
            assert "".join(c["delta"].get("content", "") for c in mine) == "".join(words_of([ord(c) for c in "user:hello|"], i, 5))
            assert mine[0]["delta"]["role"] == "assistant" and [c["finish_reason"] for c in mine[-2:]] == [None, "stop"]
        assert len({c["id"] for c in chunks}) == 1
        assert [c["usage"] for c in chunks if c.get("usage")] == [
            {"prompt_tokens": 11, "completion_tokens": 10, "total_tokens": 21}
        ] * usage


def test_beyond_the_queue_is_429_with_a_time():
    response = call(app(Engine(most=2)), "POST", "/v1/chat/completions", json=chat(n=3))
    assert fault(response, 429, "rate_limited") and response.headers["retry-after"] == "7"
    response = call(app(most_requests=0), "POST", "/v1/chat/completions", json=chat())
    assert fault(response, 429) and response.headers["retry-after"] == "1"


def test_errors_of_the_engine_are_told_and_bugs_are_not(capfd):
    def failing(job):
        return [Piece("begun ", (), 1), Piece("", (), 1, "error", ModelError("the model's answers are nan", "serve it in fp32"))]

    response = call(app(Engine(script=failing)), "POST", "/v1/chat/completions", json=chat())
    assert "nan" in fault(response, 500)["message"]
    streamed = call(app(Engine(script=failing)), "POST", "/v1/chat/completions", json=chat(stream=True))
    last = [json.loads(p.removeprefix("data: ")) for p in streamed.text.split("\n\n") if p][-1]
    assert streamed.status_code == 200 and "nan" in last["error"]["message"] and "[DONE]" not in streamed.text

    def refused(job):
        raise DataError("the prompt has 9 tokens, and the model's context holds 8 with the answer", "shorten it")

    fault(call(app(Engine(script=refused)), "POST", "/v1/chat/completions", json=chat()), 400, "context_length_exceeded")

    def bug(job):
        raise KeyError(TOKEN)

    response = call(app(Engine(script=bug)), "POST", "/v1/chat/completions", json=chat())
    assert fault(response, 500) and "KeyError" not in response.text and TOKEN not in response.text


def test_models_and_adapters_by_name():
    application = app()
    assert [m["id"] for m in call(application, "GET", "/v1/models").json()["data"]] == ["tiny"]
    assert call(application, "GET", "/v1/models/tiny").json()["owned_by"] == "tunesmith"
    assert "did you mean 'tiny'" in fault(call(application, "GET", "/v1/models/tiyn"), 404, "model_not_found")["message"]
    fault(call(application, "POST", "/v1/chat/completions", json=chat() | {"model": "../etc"}), 404, "model_not_found")
    listed = {a["id"]: a["loaded"] for a in call(application, "GET", "/v1/adapters").json()["data"]}
    assert listed == {"one": False, "odd": False}
    assert call(application, "POST", "/v1/adapters", json={"name": "one"}).status_code == 200
    assert call(application, "DELETE", "/v1/adapters/one").json()["deleted"]
    fault(call(application, "DELETE", "/v1/adapters/one"), 404)
    fault(call(application, "POST", "/v1/adapters", json={"name": "odd"}), 409, "adapter_not_loaded")
    fault(call(application, "POST", "/v1/adapters", json={"name": "/etc/passwd"}), 404)
    fault(call(application, "POST", "/v1/adapters", json={"name": "one", "path": "/tmp"}), 400)
    fault(call(build(service(Engine()), token=TOKEN), "POST", "/v1/adapters", json={"name": "one"}), 404)


CALL = '<tool_call>{"name": "weather", "arguments": {"town": "Oslo"}}</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def test_tool_calls_are_told_apart_from_text():
    def calling(job):
        return ["Let me look. ", CALL[:5], CALL[5:30], CALL[30:]]

    found = call(app(Engine(script=calling)), "POST", "/v1/chat/completions", json=chat(tools=TOOLS)).json()["choices"][0]
    assert found["finish_reason"] == "tool_calls" and found["message"]["content"] == "Let me look."
    (made,) = found["message"]["tool_calls"]
    assert made["function"] == {"name": "weather", "arguments": '{"town": "Oslo"}'} and made["type"] == "function"
    chunks = [c["choices"][0] for c in events(call(app(Engine(script=calling)), "POST", "/v1/chat/completions",
                                                   json=chat(tools=TOOLS, stream=True)).content)]  # fmt: skip
    said = "".join(c["delta"].get("content") or "" for c in chunks)
    assert said.rstrip() == "Let me look." and chunks[-1]["finish_reason"] == "tool_calls"
    assert [c["delta"]["tool_calls"][0]["function"]["name"] for c in chunks if "tool_calls" in c["delta"]] == ["weather"]
    without = call(app(Engine(script=calling)), "POST", "/v1/chat/completions", json=chat(tools=TOOLS, tool_choice="none")).json()
    assert without["choices"][0]["message"]["content"].endswith(CALL)
    broken = call(
        app(Engine(script=lambda job: ["<tool_call>{oops"])), "POST", "/v1/chat/completions", json=chat(tools=TOOLS)
    ).json()
    assert broken["choices"][0]["message"]["content"] == "<tool_call>{oops" and broken["choices"][0]["finish_reason"] == "stop"


# ---- load


async def many(port, clients, each, body, check):
    """`clients` connections at once, `each` requests on each; the errors."""
    wrong = []

    async def one(c):
        async with Client(port) as client:
            for k in range(each):
                status, answer = await client.post("/v1/chat/completions", body(c, k))
                if status != 200 or not check(c, k, answer):
                    wrong.append((c, k, status, answer[:200]))

    await asyncio.gather(*(one(c) for c in range(clients)))
    return wrong


def own(c, k, count):
    return "".join(words_of([ord(x) for x in f"user:{c}-{k}-me|"], 0, count))


def test_64_streams_5000_requests_and_nobody_gets_anothers_token():
    def check(c, k, answer):
        return "".join(e["choices"][0]["delta"].get("content", "") for e in events(answer)) == own(c, k, 4)

    with Server(app(Engine(words=4))) as server:
        wrong = asyncio.run(many(server.port, 64, 79, lambda c, k: chat(f"{c}-{k}-me", stream=True), check))
    assert not wrong, (len(wrong), wrong[:3])


@pytest.mark.parametrize("stream", [True, False], ids=["streams", "whole"])
def test_50_clients_that_vanish_free_their_places_within_a_second(stream):
    engine = Engine(step=0.02, words=2000)

    async def vanish(port):
        clients = [await Client(port).__aenter__() for _ in range(50)]
        for client in clients:
            await client.post("/v1/chat/completions", chat(stream=stream), read=False)
        for _ in range(500):
            await asyncio.sleep(0.01)
            if engine.running == 50:
                break
        assert engine.running == 50
        await asyncio.sleep(0.2)
        for client in clients:
            client.writer.transport.abort()
        start = time.monotonic()
        while engine.running and time.monotonic() - start < 5:
            await asyncio.sleep(0.01)
        return time.monotonic() - start

    with Server(app(engine)) as server:
        took = asyncio.run(vanish(server.port))
        assert engine.running == 0 and took < 1.0, (engine.running, took)
        wrong = asyncio.run(many(server.port, 4, 2, lambda c, k: chat("well", max_tokens=2), lambda c, k, a: b"well" in a))
        assert not wrong


def test_10000_short_requests_leave_no_memory_behind():
    import psutil

    process = psutil.Process()
    with Server(app(Engine(words=1))) as server:
        first = asyncio.run(many(server.port, 8, 125, lambda c, k: chat(f"{c}"), lambda c, k, a: True))
        before = process.memory_info().rss
        wrong = asyncio.run(
            many(server.port, 16, 625, lambda c, k: chat(f"{c}-{k}-me"), lambda c, k, a: own(c, k, 1).encode() in a)
        )
        grown = process.memory_info().rss - before
    assert not first and not wrong and grown < 20 << 20, grown
