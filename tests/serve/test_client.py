"""The real openai client where answers must be ones that no small model gives: tool calls, and citations of what an index holds.
Renderer, index and HTTP are real, the engine says what the test wrote."""

import json

import openai
from tests.conftest import tiny_tokenizer
from tests.serve.fake import TOKEN, Engine, Server

from tunesmith.data.render import build_renderer
from tunesmith.retrieve import Index
from tunesmith.serve.http import build
from tunesmith.serve.job import Piece
from tunesmith.serve.service import Served, Service

TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + (c.function | tojson) + '</tool_call>' }}{% endfor %}"
    "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALLS = ['Let me look. <tool_call>{"name": "weath', 'er", "arguments": {"town": "Oslo"}}</tool_call>',
         '<tool_call>{"name": "weather", "arguments": {"town": "Rome"}}</tool_call>']  # fmt: skip


class Asked:
    """A served model: `asked.prompts` are the texts that reached its engine, `asked.client` an openai client of it."""

    def __init__(self, folder, says, search=None):
        folder.mkdir(exist_ok=True)
        tiny_tokenizer(folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
        self.renderer, self.prompts = build_renderer(folder), []

        def script(job):
            self.prompts.append(self.renderer.tokenizer.decode(job.prompt))
            last = len(says) - 1
            return [Piece(text, (), k + 1, "stop" if k == last else None) for k, text in enumerate(says)]

        self.service = Service(Engine(script=script), lambda: {"m": Served("m", self.renderer)}, search)

    def __enter__(self):
        self.server = Server(build(self.service, token=TOKEN)).__enter__()
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.server.port}/v1", api_key=TOKEN, max_retries=0, timeout=20)
        return self

    def __exit__(self, *exc):
        self.client.close()
        self.server.__exit__()
        self.renderer.close()

    def ask(self, text, **more):
        return self.client.chat.completions.create(model="m", messages=[{"role": "user", "content": text}], **more)


def test_tools_reach_the_template_and_calls_come_back_as_the_client_reads_them(tmp_path):
    with Asked(tmp_path / "m", CALLS) as asked:
        choice = asked.ask("Rain?", tools=TOOLS).choices[0]
        made = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me look."
        assert [(c.type, c.function.name, json.loads(c.function.arguments)) for c in made] == [
            ("function", "weather", {"town": "Oslo"}), ("function", "weather", {"town": "Rome"})]  # fmt: skip
        assert len({c.id for c in made}) == 2 and '"name": "weather"' in asked.prompts[0].partition("</tools>")[0]
        chunks = [c.choices[0] for c in asked.ask("Rain?", tools=TOOLS, stream=True)]
        said = "".join(c.delta.content or "" for c in chunks)
        calls = [t for c in chunks for t in c.delta.tool_calls or ()]
        assert said.rstrip() == "Let me look." and chunks[-1].finish_reason == "tool_calls"
        assert [(t.index, t.function.name, t.function.arguments) for t in calls] == [
            (k, "weather", c.function.arguments) for k, c in enumerate(made)
        ]
        history = [{"role": "user", "content": "Rain?"}, choice.message, {"role": "user", "content": "So?"}]
        asked.client.chat.completions.create(model="m", messages=history, tools=TOOLS)
        assert asked.prompts[-1].count("<tool_call>") == 2 and "Oslo" in asked.prompts[-1]


def test_citations_name_the_passages_of_a_real_index(tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "moon.txt").write_text("The moon is made of grey rock. It goes around the earth in 27 days.")
    (docs / "tea.txt").write_text("Tea is brewed for 4 minutes. It grows on hills.")
    with Index.create_or_open(tmp_path / "docs.sqlite") as index:
        index.add(docs)
    index = Index.open(tmp_path / "docs.sqlite")
    says = ["The moon is made of grey ", "rock [1]. The moon is made of cheese [1]. Cats bark [9]."]
    try:
        with Asked(tmp_path / "m", says, lambda question: index.search(question, 2)) as asked:
            whole = asked.ask("What is the moon made of?").choices[0].message.citations
            (here, none) = whole
            assert (here["number"], here["exists"], here["supports"], here["document"]) == (1, True, True, "docs/moon.txt")
            assert "grey rock" in here["text"] and none == {"number": 9, "exists": False, "supports": False}
            assert "grey rock" in asked.prompts[0] and "What is the moon made of?" in asked.prompts[0], (
                "the passages are asked with"
            )
            *_, last = asked.ask("What is the moon made of?", stream=True)
            assert last.choices[0].delta.citations == whole
            plain = asked.ask("What is the moon made of?", extra_body={"docs": False}).choices[0].message
            assert not hasattr(plain, "citations") and "grey rock" not in asked.prompts[-1]
    finally:
        index.close()


def test_completions_stream_with_their_logprobs(tmp_path):
    with Asked(tmp_path / "m", ["a b ", "c"]) as asked:
        chunks = list(asked.client.completions.create(model="m", prompt="x", stream=True, logprobs=2))
        assert "".join(c.choices[0].text for c in chunks) == "a b c" and chunks[-1].choices[0].finish_reason == "stop"
