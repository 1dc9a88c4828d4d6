"""The whole server with the real openai client: the text that the command line prints, in each way that clients ask for it."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import httpx
import openai
import pytest

import tunesmith
from tunesmith.chat import Talker
from tunesmith.config.schema import Memory
from tunesmith.errors import AdapterError, ConfigError, Interrupted, MissingExtra, RunError
from tunesmith.retrieve import Index
from tunesmith.serve import shelf as shelf_module
from tunesmith.serve import start
from tunesmith.serve.job import Job
from tunesmith.serve.shelf import Shelf

LIMITS = {"batch": 16, "queue": 64, "cache": 64 << 20}
QUESTIONS = ["What is the moon?", "Why do birds sing?", "Tell me about rain.", "Hello!"]


class Serving:
    """`start.run` in a thread; `.client` is an openai client of it."""

    def __init__(self, root, *sources, **settings):
        self.token_file, self.said, made = root / "token", [], threading.Event()

        def ready(server):
            self.server = server
            made.set()

        def work():
            try:
                start.run(sources, port=0, token=self.token_file, limits=LIMITS, say=self.said.append, ready=ready, **settings)
            except BaseException as e:  # noqa: BLE001 - shown by the test
                self.fault = e
                made.set()

        self.fault = None
        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()
        assert made.wait(60)
        if self.fault:
            raise self.fault
        while not self.server.started:
            time.sleep(0.005)
        self.url = self.said[-1].split()[-1]
        self.token = self.token_file.read_text().strip()
        self.client = openai.OpenAI(base_url=self.url, api_key=self.token, max_retries=0, timeout=60)

    def close(self):
        self.client.close()
        self.server.should_exit = True
        self.thread.join(10)
        assert not self.thread.is_alive()

    def ask(self, text, model="embedded", **more):
        settings = {"temperature": 0, "max_tokens": 40} | more
        return self.client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **settings)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """The embedded model, with an index of two documents."""
    root = tmp_path_factory.mktemp("served")
    (root / "docs").mkdir()
    (root / "docs" / "moon.txt").write_text("The moon is a ball of grey rock. It goes around the earth in 27 days.")
    (root / "docs" / "bread.txt").write_text("Bread is made of flour, water and salt. It is baked for forty minutes.")
    with Index.create_or_open(root / "docs.sqlite") as index:
        index.add(root / "docs")
    serving = Serving(root, "embedded", docs=root / "docs.sqlite", passages=2)
    yield serving
    serving.close()


@pytest.fixture(scope="module")
def printed():
    """What `tunesmith generate` answers."""
    talker = Talker.open("embedded")
    return SimpleNamespace(talker=talker, answers=dict(zip(QUESTIONS, talker.answer(QUESTIONS, max_tokens=40), strict=True)))


PLAIN = {"extra_body": {"docs": False}}


def test_the_text_is_that_of_the_command_line(embedded, printed):
    """Whole and streamed, alone and 8 at once: the same at temperature 0."""
    found = {}

    def one(k):
        question = QUESTIONS[k % 4]
        if k < 4:
            found[k] = embedded.ask(question, **PLAIN).choices[0].message.content
        else:
            chunks = list(embedded.ask(question, stream=True, **PLAIN))
            found[k] = "".join(c.choices[0].delta.content or "" for c in chunks)

    threads = [threading.Thread(target=one, args=(k,)) for k in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert found == {k: printed.answers[QUESTIONS[k % 4]] for k in range(8)}
    assert all(len(answer) > 5 for answer in printed.answers.values())
    raw = printed.talker.answer(["Once upon a time"], max_tokens=12, raw=True)[0]
    made = embedded.client.completions.create(model="embedded", prompt="Once upon a time", temperature=0, max_tokens=12)
    assert made.choices[0].text == raw


def test_usage_and_reasons_are_told(embedded, printed):
    answer = embedded.ask(QUESTIONS[0], max_tokens=3, **PLAIN)
    prompt = printed.talker.renderer.prompt([{"role": "user", "content": QUESTIONS[0]}])
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 3
    assert answer.usage.prompt_tokens == len(prompt) and answer.usage.total_tokens == len(prompt) + 3
    assert embedded.ask(QUESTIONS[0], max_tokens=400, **PLAIN).choices[0].finish_reason == "stop"
    *_, last = embedded.ask(QUESTIONS[0], max_tokens=3, stream=True, stream_options={"include_usage": True}, **PLAIN)
    assert last.usage == answer.usage and last.choices == []


def test_stop_seed_n_and_logprobs(embedded, printed):
    whole = printed.answers[QUESTIONS[0]]
    cut = embedded.ask(QUESTIONS[0], stop=[whole[8:11]], **PLAIN).choices[0]
    assert cut.message.content == whole[: whole.index(whole[8:11])] and cut.finish_reason == "stop"
    draws = [embedded.ask("Tell me a story.", temperature=1.0, seed=s, n=3, max_tokens=12, **PLAIN) for s in (1, 1, 2)]
    texts = [[c.message.content for c in d.choices] for d in draws]
    assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) > 1
    content = embedded.ask(QUESTIONS[0], logprobs=True, top_logprobs=3, max_tokens=5, **PLAIN).choices[0].logprobs.content
    assert "".join(t.token for t in content) == whole[: len("".join(t.token for t in content))]
    assert all(t.logprob == max(o.logprob for o in t.top_logprobs) and len(t.top_logprobs) == 3 for t in content)
    streamed = [c.choices[0] for c in embedded.ask(QUESTIONS[0], logprobs=True, max_tokens=5, stream=True, **PLAIN)]
    assert [t.token for c in streamed if c.logprobs for t in c.logprobs.content] == [t.token for t in content]


SCHEMA = {"type": "object", "additionalProperties": False, "required": ["kind", "legs", "tags"],
          "properties": {"kind": {"enum": ["cat", "bird"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 9},
                         "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 2}}}  # fmt: skip


def test_answers_follow_a_schema(embedded):
    jsonschema = pytest.importorskip("jsonschema")
    pytest.importorskip("llguidance")
    how = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA, "strict": True}}
    answers = embedded.ask("Describe an animal.", response_format=how, n=4, temperature=1.0, seed=3, max_tokens=200, **PLAIN)
    for choice in answers.choices:
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
        assert choice.finish_reason == "stop"
    with pytest.raises(openai.UnprocessableEntityError, match="JSON is not whole: max_tokens"):
        embedded.ask("Describe an animal.", response_format=how, max_tokens=4, **PLAIN)
    bad = how | {"json_schema": {"name": "x", "schema": {"type": "objekt"}}}
    with pytest.raises(openai.BadRequestError, match="cannot be followed: Invalid type"):
        embedded.ask("x", response_format=bad, **PLAIN)
    chunks = embedded.ask("Describe an animal.", response_format=how, stream=True, max_tokens=200, **PLAIN)
    jsonschema.validate(json.loads("".join(c.choices[0].delta.content or "" for c in chunks)), SCHEMA)


def test_answers_from_documents_name_their_passages(embedded):
    """The question the model gets holds the passages; what it cites is looked up and judged."""
    answer = embedded.ask("How long does the moon take to go around the earth?", max_tokens=60).choices[0].message
    for citation in answer.citations:
        assert set(citation) >= {"number", "exists", "supports"} and (
            not citation["exists"] or citation["document"].endswith(".txt")
        )
    assert embedded.ask("zzzz qqqq", max_tokens=60).choices[0].message.content == "The documents do not answer this."
    *_, last = embedded.ask("How is bread made?", stream=True, max_tokens=60)
    assert isinstance(last.choices[0].delta.citations, list)
    assert not hasattr(embedded.ask("Hello!", **PLAIN).choices[0].message, "citations")


def test_what_the_client_does_wrong_is_its_own_error(embedded):
    for kind, change in (
        (openai.NotFoundError, {"model": "other"}), (openai.BadRequestError, {"max_tokens": 0}),
        (openai.BadRequestError, {"extra_body": {"temprature": 1}}), (openai.BadRequestError, {"stop": ["x"] * 17}),
    ):  # fmt: skip
        with pytest.raises(kind):
            embedded.ask("Hello!", **{"model": "embedded"} | change)
    image = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}]
    with pytest.raises(openai.BadRequestError, match="fetches nothing"):
        embedded.client.chat.completions.create(model="embedded", messages=[{"role": "user", "content": image}])
    with pytest.raises(openai.BadRequestError) as caught:
        embedded.ask("word " * 4000, **PLAIN)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=embedded.url, api_key="wrong", max_retries=0).models.list()
    assert embedded.ask("Hello!", **PLAIN).choices[0].message.content


def test_the_model_is_listed_and_the_server_is_well(embedded):
    assert [m.id for m in embedded.client.models.list()] == ["embedded"]
    assert embedded.client.models.retrieve("embedded").owned_by == "tunesmith"
    url = embedded.url.removesuffix("/v1") + "/health"
    health = httpx.get(url, headers={"authorization": f"Bearer {embedded.token}"}).json()
    assert health["status"] == "ok" and health["running"] == 0 and health["free_blocks"] == health["blocks"]
    assert embedded.token not in " ".join(embedded.said) and str(embedded.token_file) in " ".join(embedded.said)


# ---- runs and adapters


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Three short runs over one base, each taught in its own way; one more over 4 bits."""
    from rich.console import Console

    root, quiet = tmp_path_factory.mktemp("runs"), Console(quiet=True)
    for name, change in {"one": {}, "two": {"lora": {"variant": "dora"}, "seed": 8}, "four": {"method": "qlora"}}.items():
        more = {"train": {"learning_rate": 0.05}} | change
        tunesmith.train(tiny.config(root / name, **more), console=quiet)
    return root


def test_runs_over_one_base_answer_as_their_own_chat_does(runs, tmp_path):
    serving = Serving(tmp_path, runs / "one", adapters=runs)
    try:
        base = tunesmith.generate(runs / "one", ["add 3 and 4"], max_tokens=16)
        assert [m.id for m in serving.client.models.list()] == ["one", "model"]
        assert serving.ask("add 3 and 4", model="one", max_tokens=16).choices[0].message.content == base[0]
        assert serving.client.post("/adapters", cast_to=object, body={"name": "two"})["id"] == "two"
        wanted = {name: tunesmith.generate(runs / name, ["add 3 and 4"], max_tokens=16)[0] for name in ("one", "two")}
        found = {}

        def one(name):
            found[name] = serving.ask("add 3 and 4", model=name, max_tokens=16).choices[0].message.content

        threads = [threading.Thread(target=one, args=(name,)) for name in wanted]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert found == wanted and wanted["one"] != wanted["two"]
        listed = serving.client.get("/adapters", cast_to=object)["data"]
        assert {a["id"]: a["loaded"] for a in listed} == {"one": True, "two": True, "four": False}
        with pytest.raises(openai.ConflictError, match="in 4 bits"):
            serving.client.post("/adapters", cast_to=object, body={"name": "four"})
        with pytest.raises(openai.NotFoundError):
            serving.client.post("/adapters", cast_to=object, body={"name": "../one"})
        serving.client.delete("/adapters/two", cast_to=object)
        with pytest.raises(openai.NotFoundError):
            serving.ask("add 3 and 4", model="two")
    finally:
        serving.close()


def test_a_run_over_4_bits_is_served_over_the_same_numbers(runs):
    shelf = Shelf([runs / "four"], limits=LIMITS)
    try:
        assert "decoded from 4 bits once" in shelf.notes[0] and not shelf.engine.notes
        got, done = [], threading.Event()

        def deliver(piece):
            got.append(piece.text)
            if piece.reason:
                done.set()

        renderer = shelf.models()["four"].renderer
        prompt = renderer.prompt([{"role": "user", "content": "add 3 and 4"}])
        with shelf.engine as engine:
            engine.submit(Job(prompt, renderer.tokenizer, deliver, "four", 16, stop_ids=renderer.stop_ids))
            assert done.wait(20)
        assert "".join(got) == tunesmith.generate(runs / "four", ["add 3 and 4"], max_tokens=16)[0]
    finally:
        shelf.close()


def test_a_damaged_run_hides_no_other_and_no_path_is_told(runs, tiny, tmp_path, capsys, monkeypatch):
    """A folder that cannot be looked into made every look into --adapters an error; a damaged run told clients where it lies."""
    folder, found = tmp_path / "secret" / "adapters", Shelf._found
    folder.mkdir(parents=True)
    for name in ("good", "bad", "torn", "worse", "closed"):
        shutil.copytree(runs / "one", folder / name)
    next((folder / "bad").rglob("adapter_config.json")).write_text("{")
    (folder / "torn" / "run.yaml").write_text("model: [")
    shutil.rmtree(next((folder / "worse").rglob("tokenizer.json")).parent)

    def closed(path):
        if path.name == "closed":
            raise PermissionError(13, "Permission denied", str(path / "run.yaml"))
        return found(path)

    monkeypatch.setattr(Shelf, "_found", staticmethod(closed))
    shelf = Shelf([tiny.model], folder=folder, limits=LIMITS)
    try:
        assert shelf.adapters() == {"good": False, "bad": False, "torn": False, "worse": False}
        assert "note    closed:" in capsys.readouterr().err
        assert shelf.load("good").name == "good"
        for name in ("bad", "torn", "worse"):
            with pytest.raises(AdapterError) as caught:
                shelf.load(name)
            assert name in str(caught.value) and "secret" not in str(caught.value), caught.value
    finally:
        shelf.close()


def test_what_cannot_be_served_is_told_at_the_start(runs, tiny, tmp_path):
    with pytest.raises(AdapterError, match="in 4 bits"):
        Shelf([runs / "one", runs / "four"], limits=LIMITS)
    with pytest.raises(RunError, match="neither a run"):
        Shelf([runs / "one", tiny.model], limits=LIMITS)
    with pytest.raises(ConfigError, match="second model named"):
        Shelf([runs / "one", runs / "one"], limits=LIMITS)
    with pytest.raises(RunError, match="no such folder"):
        Shelf([tiny.model], folder=tmp_path / "none", limits=LIMITS)
    other = Shelf([tiny.model], memory=Memory(dtype="fp32"), limits=LIMITS)
    assert list(other.models()) == ["model"] and other.adapters() == {}
    other.close()


# ---- the token and the address


def test_a_new_token_each_start_that_only_its_owner_may_read(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    first, where = start.token_file(None, "127.0.0.1", 8000)
    second, again = start.token_file(None, "127.0.0.1", 8000)
    assert first != second and len(first) >= 32 and where == again and where.read_text().strip() == second
    assert where.stat().st_mode & 0o777 == 0o600
    link = tmp_path / "cache" / "serve-9.token"
    link.symlink_to(tmp_path / "elsewhere")
    start.token_file(None, "localhost", 9)
    assert not link.is_symlink() and not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_an_open_address_needs_a_named_token(host, tmp_path):
    with pytest.raises(ConfigError, match="open to other machines"):
        start.token_file(None, host, 8000)
    token, where = start.token_file(tmp_path / "token", host, 8000)
    assert start.token_file(where, host, 8000) == (token, where) and where.stat().st_mode & 0o777 == 0o600


def test_a_token_that_others_may_read_or_guess_is_refused(tmp_path):
    file = tmp_path / "token"
    for text, mode, what in (
        ("x" * 40, 0o644, "others may read it"),
        ("short", 0o600, "no token of 16"),
        ("a b" * 20, 0o600, "spaces"),
    ):
        file.write_text(text)
        file.chmod(mode)
        with pytest.raises(ConfigError, match=what):
            start.token_file(file, "127.0.0.1", 8000)


def test_numbers_that_cannot_be_are_told(tmp_path):
    for change, told in (
        ({"port": 70_000}, "--port 70000"),
        ({"port": -1}, "--port -1"),
        ({"limits": {"queue": -1}}, "--max-queue -1"),
    ):
        with pytest.raises(ConfigError, match=told):
            start.run(["embedded"], **{"port": 0, "token": tmp_path / "token", **change})


def test_a_taken_port_is_told():
    sock = start.listen("127.0.0.1", 0)
    with pytest.raises(ConfigError, match="choose another --port"):
        start.listen("127.0.0.1", sock.getsockname()[1])
    sock.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_the_command_line_serves_and_ends_on_a_signal(tmp_path, number):
    """In its own words, and after it has closed what it opened."""
    env = os.environ | {"TUNESMITH_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "tunesmith.cli", "serve", "embedded", "--port", "0", "--cache-gb", "0.1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    lines = []
    for line in process.stdout:
        lines.append(line.strip())
        if line.startswith("Serving"):
            break
    url, file = lines[-1].split()[1], re.search(r"in (\S+):", next(x for x in lines if x.startswith("Token")))[1]
    with open(file) as f:
        client = openai.OpenAI(base_url=url, api_key=f.read().strip(), max_retries=2)
        token = client.api_key
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1", url) and os.stat(file).st_mode & 0o777 == 0o600
    assert client.chat.completions.create(model="embedded", messages=[{"role": "user", "content": "Hi"}], max_tokens=5).id
    for body in (b"{", b'{"model": "embedded", "prompt": [4096]}', json.dumps({"model": token, "prompt": "x"}).encode()):
        headers = {"authorization": f"Bearer {token}", "content-type": "application/json"}
        assert httpx.post(f"{url}/completions", content=body, headers=headers).status_code >= 400
    assert httpx.get(f"{url}/models?key={token}", headers={"authorization": f"Basic {token}"}).status_code == 401
    with socket.create_connection(("127.0.0.1", int(url.split(":")[2].split("/")[0]))) as raw:
        raw.sendall(f"GARBAGE {token}\r\nAuthorization: Bearer {token}\r\n\r\n".encode())
        raw.recv(100)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0 and "Traceback" not in err and "training" not in err, err
    assert out.splitlines()[-1] == "Stopped serving"
    assert token not in err and token not in out + "".join(lines), "a secret was logged"


def test_the_command_line_refuses_an_open_address_without_a_token(tmp_path):
    env = os.environ | {"TUNESMITH_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "tunesmith.cli", "serve"]
    refused = subprocess.run([*command, "embedded", "--host", "0.0.0.0"], capture_output=True, text=True, env=env)
    assert refused.returncode == 2 and "open to other machines" in refused.stderr and "--token-file" in refused.stderr


def test_a_signal_before_it_serves_is_told_as_such(monkeypatch, tmp_path):
    def interrupted(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(shelf_module, "Shelf", interrupted)
    with pytest.raises(Interrupted, match="before it served"):
        tunesmith.serve("embedded", port=0, token_file=tmp_path / "token")


def test_without_the_extra_the_way_to_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(MissingExtra, match=r"\.\[serve\]"):
        tunesmith.serve("embedded")
