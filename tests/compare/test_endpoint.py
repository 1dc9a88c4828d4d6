"""compare/endpoint.py: what is sent, what is tried again, what is said, and that the key stays where it belongs."""

import socket
import threading

import pytest

from tunesmith.compare.endpoint import KEY, Endpoint, EndpointError
from tunesmith.errors import ConfigError

ASKED = [{"role": "user", "content": "2 + 2?"}]
SECRET = "local-3f9a0c1d7b"


def endpoint(server, **settings):
    waits = []
    made = Endpoint(server.url, "m", **{"pause": 0.01, "sleep": waits.append, **settings})
    return made, waits


def test_an_answer(server, monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    made, _ = endpoint(server)
    reply = made.ask(ASKED, max_tokens=7, seed=3)
    assert (reply.text, reply.prompt_tokens, reply.answer_tokens, reply.ended) == ("it is 2 + 2?", 5, 3, "stop")
    assert reply.seconds > 0
    assert server.asked == [{"model": "m", "messages": ASKED, "max_tokens": 7, "temperature": 0.0, "seed": 3}]
    assert server.headers[0]["Authorization"] == f"Bearer {SECRET}"


def test_without_a_key_nothing_is_sent_for_one(server, monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    endpoint(server)[0].ask(ASKED, max_tokens=1)
    assert "Authorization" not in server.headers[0]


def test_busy_and_broken_is_tried_again_later_and_later(server):
    server.replies = [(429, {}, {"Retry-After": "3"}), (503, b"<html>", {}), (500, {}, {"Retry-After": "9999"})]
    made, waits = endpoint(server, pause=1.0)
    assert made.ask(ASKED, max_tokens=1).text
    assert waits[0] == 3 and 2 <= waits[1] <= 2.5 and waits[2] == 60  # what the server asks for, but no more than a minute


def test_what_does_not_get_better_is_not_tried_again(server, monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    server.replies = [(401, {"error": {"message": f"Incorrect key {SECRET}, sk-abcdefghijklmnop1234"}}, {})]
    made, waits = endpoint(server)
    with pytest.raises(EndpointError, match="HTTP 401: Incorrect key") as e:
        made.ask(ASKED, max_tokens=1)
    assert KEY in e.value.fix and not waits
    assert SECRET not in str(e.value) and "sk-abc" not in str(e.value)


def test_a_short_key_is_hidden_too(server, monkeypatch):
    monkeypatch.setenv(KEY, "q7z")
    server.replies = [(403, {"error": "q7z may not"}, {})]
    with pytest.raises(EndpointError, match=r"HTTP 403: \[redacted\] may not"):
        endpoint(server)[0].ask(ASKED, max_tokens=1)


def test_it_gives_up_and_says_the_last_reason(server):
    server.replies = [(502, {"error": "bad\x1b[31m gateway"}, {})] * 3
    made, waits = endpoint(server, tries=3)
    with pytest.raises(EndpointError, match=r"no answer after 3 tries; the last: HTTP 502: bad \[31m gateway"):
        made.ask(ASKED, max_tokens=1)
    assert len(waits) == 2


def test_nobody_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        made = Endpoint(f"http://127.0.0.1:{free.getsockname()[1]}/v1", "m", tries=2, sleep=lambda s: None)
        with pytest.raises(EndpointError, match="after 2 tries"):
            made.ask(ASKED, max_tokens=1)


def test_silence_ends():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        held = []
        threading.Thread(target=lambda: held.append(listening.accept()), daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        with pytest.raises(EndpointError, match="timed out"):
            Endpoint(url, "m", tries=1, timeout=0.2).ask(ASKED, max_tokens=1)


@pytest.mark.parametrize(
    "body", [b"", b"<html>hello</html>", {"choices": []}, {"choices": [{"message": {"content": [1]}}]}, [1], {"choices": None}]
)
def test_what_is_no_completion(server, body):
    server.replies = [(200, body, {})]
    with pytest.raises(EndpointError, match="this is no chat completion"):
        endpoint(server)[0].ask(ASKED, max_tokens=1)


def test_an_empty_answer_is_one_and_missing_counts_are_none(server):
    server.replies = [(200, {"choices": [{"message": {"content": None}, "finish_reason": "length"}]}, {})]
    reply = endpoint(server)[0].ask(ASKED, max_tokens=1)
    assert (reply.text, reply.prompt_tokens, reply.ended) == ("", None, "length")


def test_a_redirect_is_not_followed(server, monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    server.replies = [(307, b"", {"Location": f"{server.url}/elsewhere"})]
    with pytest.raises(EndpointError) as e:
        endpoint(server)[0].ask(ASKED, max_tokens=1)
    assert "redirects are not followed" in e.value.fix and len(server.asked) == 1


@pytest.mark.parametrize(
    ("url", "model", "what"),
    [
        ("localhost:8000/v1", "m", "no http address"),
        ("ftp://a/v1", "m", "no http address"),
        ("http://a:x/v1", "m", "no http address"),
        ("https://me:secretword@a/v1", "m", "holds a login"),
        ("https://a/v1?key=secretword", "m", "holds a login"),
        ("https://a/v1", "", "model's name"),
    ],
)
def test_addresses_that_cannot_be(url, model, what):
    with pytest.raises(ConfigError, match=what) as e:
        Endpoint(url, model)
    assert "secretword" not in str(e.value)


def test_a_key_over_plain_http_is_told(monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    assert "unencrypted" in Endpoint("http://far.example/v1", "m").note
    assert not Endpoint("https://far.example/v1", "m").note and not Endpoint("http://localhost:1/v1", "m").note
    monkeypatch.delenv(KEY)
    assert not Endpoint("http://far.example/v1", "m").note


def test_a_key_that_no_header_may_have(server, monkeypatch):
    monkeypatch.setenv(KEY, "a\nb: c")
    with pytest.raises(EndpointError, match="no header may have") as e:
        endpoint(server)[0].ask(ASKED, max_tokens=1)
    assert "b: c" not in str(e.value)
