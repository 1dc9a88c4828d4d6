"""The request parser and the event stream under 5,000 odd cases each: an answer or a typed error, at once, and what is sent is read
back the same."""

import copy
import json
import math
import random
import string
import time

import pytest

from tunesmith.serve import sse
from tunesmith.serve.schema import AdapterRequest, ApiError, ChatRequest, CompletionRequest, parse

CASES = 5_000
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CHAT = {
    "model": "m", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "4", "tool_call_id": "1"}], "stream": True, "stream_options": {"include_usage": True},
    "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 3, "n": 2, "stop": ["a", "b"], "logprobs": True, "top_logprobs": 2,
    "logit_bias": {"5": -3}, "user": "u", "tools": [TOOL],
    "response_format": {"type": "text"},
}  # fmt: skip
PLAIN = {"model": "m", "prompt": ["a", "b"], "max_tokens": 5, "logprobs": 3, "echo": False, "best_of": 1, "stop": "x"}
ODD = [None, True, False, 0, -1, 1e308, -0.0, 2**63, 10**400, "", "x", "\ud800", "\x00", "\u2028", "9" * 5000, [], {}, [[]],
       [None], {"": 0}, "NaN", [1, "a"], [[1], ["a"]], 1e-320,
       {"type": "image_url", "image_url": {"url": "http://x"}}, {"type": "text", "text": 5}]  # fmt: skip


BROKEN = [b"", b"null", b"[" * 100_000, b'{"a":' * 50_000, b'{"model":"m","model":"n"}', b"\xff\xfe{}", b"1" * 5_000,
          b'{"temperature":NaN}', b'{"temperature":1e999}', b'"' + b"\\" * 9_999, b"{}" * 2_000]  # fmt: skip


def places(value, at=()):
    yield at
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*at, key))


def changed(rng, tree):
    """A copy with one to four values replaced, removed, renamed or doubled."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.randrange(1, 5)):
        where = [p for p in places(tree) if p]
        if not where:
            return tree
        *path, key = rng.choice(where)
        inner = tree
        for step in path:
            inner = inner[step]
        how = rng.randrange(5)
        if how == 0:
            del inner[key]
        elif how == 1 and isinstance(inner, dict):
            inner["".join(rng.choices(string.printable, k=rng.randrange(8)))] = inner.pop(key)
        elif how == 2 and isinstance(inner, list):
            inner.extend(copy.deepcopy(inner[key]) for _ in range(rng.randrange(1, 40)))
        else:
            inner[key] = copy.deepcopy(rng.choice(ODD))
    return tree


def bodies(seed):
    rng = random.Random(seed)
    for k in range(CASES):
        tree = changed(rng, CHAT if k % 2 else PLAIN)
        body = json.dumps(tree).encode()
        match k % 5:
            case 0:
                at = rng.randrange(len(body) + 1)
                body = body[:at] + bytes(rng.choices(range(256), k=rng.randrange(6))) + body[at + rng.randrange(6) :]
            case 1 if k % 25 == 1:
                body = rng.choice(BROKEN)
        yield body


def test_the_parser_answers_or_says_what_is_wrong():
    accepted = slowest = 0
    for k, body in enumerate(bodies(1)):
        kind = ChatRequest if k % 2 else CompletionRequest
        start = time.perf_counter()
        try:
            request = parse(body, kind)
        except ApiError as e:
            assert 400 <= e.status < 500 and e.message and json.loads(sse.dumps(e.body()))["error"]["message"]
            assert len(e.message) < 2_000, "an error that says the request back"
        else:
            accepted += 1
            assert request.answers >= 1 and request.sampling()["temperature"] >= 0 and (request.limit is None or request.limit > 0)
            if kind is ChatRequest:
                assert all(isinstance(m.plain()["content"], str) for m in request.messages)
            else:
                assert request.prompts
        slowest = max(slowest, time.perf_counter() - start)
    assert accepted > 250 and slowest < 1.0, (accepted, slowest)


def texts(rng):
    alphabet = [
        *string.printable,
        "\u2028",
        "\u2029",
        "\x85",
        "\ud800",
        "\udfff",
        "\U0001f600",
        "\x00",
        "\ufeff",
        "é",
        "data:",
        "\n\n",
        "[DONE]",
    ]
    return "".join(rng.choices(alphabet, k=rng.randrange(30)))


def value_of(rng, depth=0):
    kinds = [lambda: texts(rng), lambda: rng.choice([None, True, 1, -(2**70), 0.1, math.nan, math.inf, -math.inf, 1e-320])]
    if depth < 4:
        kinds += [lambda: [value_of(rng, depth + 1) for _ in range(rng.randrange(4))]]
        kinds += [lambda: {texts(rng): value_of(rng, depth + 1) for _ in range(rng.randrange(4))}] * 2
    return rng.choice(kinds)()


def read(stream):
    """A client's reader, as the standard says: lines end with CR, LF or both, an empty one ends an event."""
    data, found = [], []
    for line in stream.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        if not line and data:
            found.append("\n".join(data))
            data = []
        elif line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        else:
            assert not line or line.startswith(":"), "an event broken by what it holds"
    return found


def nulled(value):
    if isinstance(value, dict):
        return {k: nulled(v) for k, v in value.items()}
    if isinstance(value, list):
        return [nulled(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def test_the_stream_is_read_back_the_same():
    rng, slowest = random.Random(2), 0.0
    for _ in range(CASES // 5):
        values = [value_of(rng) for _ in range(5)]
        start = time.perf_counter()
        stream = sse.PING.join(sse.event(v) for v in values) + sse.DONE
        slowest = max(slowest, time.perf_counter() - start)
        *found, done = read(stream)
        assert done == "[DONE]" and [json.loads(f) for f in found] == [json.loads(json.dumps(nulled(v))) for v in values]
    assert slowest < 1.0


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"temperature": 2.1}, "temperature: "), ({"temperature": "0.5"}, "temperature: "), ({"n": 0}, "n: "), ({"n": True}, "n: "),
        ({"temprature": 1}, "temprature: unknown key; did you mean 'temperature'?"), ({"top_p": 0}, "top_p: "),
        ({"presence_penalty": 0.5}, "presence_penalty: "), ({"tool_choice": "required"}, "tool_choice: "),
        ({"messages": []}, "messages: "), ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options without stream"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "not both"), ({"stop": [""]}, "stop: "),
        ({"logit_bias": {"x": 1}}, "logit_bias: "), ({"response_format": {"type": "json_schema"}}, "json_schema needs"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]}, "fetches nothing"),
        ({"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]}]}, "fetches nothing"),
        ({"messages": [{"role": "user"}]}, "needs content"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role: "),
    ],
    ids=str,
)  # fmt: skip
def test_errors_name_the_key_and_the_way_out(change, what):
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]} | change
    with pytest.raises(ApiError) as caught:
        parse(json.dumps(body).encode(), ChatRequest)
    assert caught.value.status == 400 and what in caught.value.message, caught.value.message


def test_what_openais_clients_send_by_themselves_is_taken():
    off = {"frequency_penalty": 0, "presence_penalty": 0.0, "store": False, "metadata": {"a": "b"}, "parallel_tool_calls": True,
           "user": "u", "modalities": ["text"], "n": None, "stop": None, "logit_bias": None, "tools": None,
           "temperature": 1}  # fmt: skip
    request = parse(json.dumps({"model": "m", "messages": [{"role": "developer", "content": "hi"}]} | off).encode(), ChatRequest)
    assert request.messages[0].plain() == {"role": "system", "content": "hi"} and request.sampling()["temperature"] == 1.0
    assert parse(b'{"name": "x"}', AdapterRequest).name == "x"
