"""Load with the real engine over a tiny model, through HTTP: clients that vanish, many streams, memory. test_http.py has the same
with an engine that has no model."""

import asyncio
import json
import time

import psutil
import pytest
from tests.serve.fake import TOKEN, Client, Server, chat, events
from tests.serve.test_http import many

from tunesmith import models
from tunesmith.data.render import build_renderer
from tunesmith.generate import generate
from tunesmith.serve.engine import Engine, Limits
from tunesmith.serve.http import build
from tunesmith.serve.service import Served, Service


@pytest.fixture(scope="module")
def served(tiny, tmp_path_factory):
    """(engine, application, renderer, model) of a tiny checkpoint with room for long answers."""
    folder = tiny.checkpoint(tmp_path_factory.mktemp("load") / "model", seed=5, max_position_embeddings=4096)
    model, renderer = models.load(folder), build_renderer(folder)
    engine = Engine(model, base="tiny", limits=Limits.on(model.device, batch=64, queue=256, cache=64 << 20))
    service = Service(engine, lambda: {"tiny": Served("tiny", renderer)})
    with engine:
        yield engine, build(service, token=TOKEN), renderer, model
    renderer.close()


def test_50_streams_that_vanish_free_their_places_and_blocks_within_a_second(served):
    engine, app, *_ = served
    never = {"temperature": 0, "max_tokens": 4000, "logit_bias": {"257": -100}}  # no end of the turn

    async def vanish(port):
        clients = [await Client(port).__aenter__() for _ in range(50)]
        for k, client in enumerate(clients):
            await client.post("/v1/chat/completions", chat(f"{k}", stream=True, **never), read=False)
        for client in clients:
            await asyncio.wait_for(client.reader.readuntil(b'"content":"'), 30)
        for _ in range(3000):
            if engine.state()["running"] == 50:
                break
            await asyncio.sleep(0.01)
        assert engine.state()["running"] == 50
        for client in clients:
            client.writer.transport.abort()
        start = time.monotonic()
        while engine.state()["running"] and time.monotonic() - start < 10:
            await asyncio.sleep(0.01)
        return time.monotonic() - start

    with Server(app) as server:
        took = asyncio.run(vanish(server.port))
    state = engine.state()
    assert took < 1.0 and state["free_blocks"] == state["blocks"] and engine.free == 64, (took, state)


def answers_of(model, renderer, texts, tokens):
    """What each text is answered alone, at temperature 0."""
    prompts = [renderer.prompt([{"role": "user", "content": t}]) for t in texts]
    stops = renderer.stop_ids
    found = [generate(model, [p], stop_ids=sorted(stops), max_tokens=tokens)[0] for p in prompts]
    said = [renderer.tokenizer.decode([i for i in ids if i not in stops], skip_special=True) for ids in found]
    return dict(zip(texts, said, strict=True))


@pytest.mark.soak
def test_64_streams_5000_requests_of_a_real_model_and_nobody_gets_anothers_token(served):
    """Ragged prompts and answers; each stream's text is what the prompt is answered alone."""
    _, app, renderer, model = served
    texts = [f"{k} " + "word " * (k % 17) for k in range(101)]
    wanted = answers_of(model, renderer, texts, 12)
    assert len(set(wanted.values())) > 50

    def text(c, k):
        return texts[(79 * c + k) % 101]

    def check(c, k, answer):
        return "".join(e["choices"][0]["delta"].get("content", "") for e in events(answer)) == wanted[text(c, k)]

    def body(c, k):
        return chat(text(c, k), stream=True, temperature=0, max_tokens=12)

    with Server(app) as server:
        wrong = asyncio.run(many(server.port, 64, 79, body, check))
    assert not wrong, (len(wrong), wrong[:3])


@pytest.mark.soak
def test_10000_short_requests_of_a_real_model_leave_no_memory_behind(served):
    _, app, *_ = served
    process = psutil.Process()

    def check(c, k, answer):
        return json.loads(answer)["usage"]["completion_tokens"] <= 2

    def body(c, k):
        return chat(f"{c}-{k}", max_tokens=2)

    with Server(app) as server:
        wrong = asyncio.run(many(server.port, 16, 125, body, check))
        before = process.memory_info().rss
        wrong += asyncio.run(many(server.port, 16, 625, body, check))
        grown = process.memory_info().rss - before
    assert not wrong and grown < 20 << 20, (len(wrong), grown)
    print(f"{grown:,} bytes")
