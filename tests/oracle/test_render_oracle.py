"""The renderer against an oracle that shares no code with it: characters, not sentinels.

The oracle renders with a plain jinja environment, tokenises the whole text at once with the `tokenizers` library, and says a token
is learned when its character offset lies between the end of the generation prompt's rendering and the end of the last stop text in
the rendering that ends with the answer. 26 real templates x 20 conversation shapes x real tokenizers: equal ids and masks, or
refused; what is refused is written down below, so that refusing cannot pass for being right.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.sandbox
import pytest
from tokenizers import Tokenizer as Backend

from tunesmith.data.render import Renderer, RowRefused
from tunesmith.errors import TemplateError
from tunesmith.tokenizer import Tokenizer
from tunesmith.types import Conversation, Message, Origin

DATE = "2026-01-02"
SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"),
    *("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    *("<|end_of_turn|>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    "[/TOOL_RESULTS]",
]
MARKERS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
BASES = {  # folder, bos, eos
    "Mistral-7B-v0.1": ("<s>", "</s>"),
    "gpt2": ("<|endoftext|>", "<|endoftext|>"),
    "ort/phi-3-mini": ("<s>", "<|endoftext|>"),
    "Qwen2.5": ("<|endoftext|>", "<|im_end|>"),
    "Llama-3.1": ("<|begin_of_text|>", "<|eot_id|>"),
    "Mistral-7B-v0.3": ("<s>", "</s>"),
}
AS_WRITTEN = (  # the other 16 are pretty-printed
    "HuggingFaceTB-SmolLM3-3B",
    "Qwen-Qwen2.5-7B-Instruct",
    "Qwen-Qwen3-0.6B",
    "google-gemma-2-2b-it",
    "granite-3.0-instruct",
    "meta-llama-Llama-3.1-8B-Instruct",
    "meta-llama-Llama-3.2-3B-Instruct",
    "microsoft-Phi-3.5-mini-instruct",
    "mistralai-Mistral-Nemo-Instruct-2407",
    "qwen2.5-instruct",
)
STOPS = {  # the text that ends an answer; EOS means the tokenizer's, None that the template has none
    "HuggingFaceTB-SmolLM3-3B": "<|im_end|>",
    "Qwen-Qwen2.5-7B-Instruct": "<|im_end|>",
    "Qwen-Qwen3-0.6B": "<|im_end|>",
    "alpaca": "EOS",
    "amberchat": None,
    "chatml": "<|im_end|>",
    "chatqa": None,
    "falcon-instruct": None,
    "gemma-it": "<end_of_turn>",
    "google-gemma-2-2b-it": "<end_of_turn>",
    "granite-3.0-instruct": "<|end_of_text|>",
    "llama-2-chat": "EOS",
    "llama-3-instruct": "<|eot_id|>",
    "meta-llama-Llama-3.1-8B-Instruct": "<|eot_id|>",
    "meta-llama-Llama-3.2-3B-Instruct": "<|eot_id|>",
    "microsoft-Phi-3.5-mini-instruct": "<|end|>",
    "mistral-instruct": "EOS",
    "mistralai-Mistral-Nemo-Instruct-2407": "EOS",
    "openchat-3.5": "<|end_of_turn|>",
    "phi-3-small": "<|end|>",
    "phi-3": "<|end|>",
    "qwen2.5-instruct": "<|im_end|>",
    "saiga": "EOS",
    "solar-instruct": None,
    "vicuna": "EOS",
    "zephyr": "EOS",
}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "its name"}},
            "required": ["city"],
        },
    },
}


def said(*turns: tuple[str, str]) -> tuple[Message, ...]:
    return tuple(Message(role, text) for role, text in turns)


def ask(*texts: str) -> tuple[Message, ...]:
    """user, assistant, user, assistant ..."""
    return said(*((("user", "assistant")[i % 2], text) for i, text in enumerate(texts)))


CALL = Message(
    "assistant",
    "",
    None,
    (
        (
            "tool_calls",
            [{"type": "function", "id": "abcdefghi", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}],
        ),
    ),
)
RESULT = Message("tool", '{"celsius": 20}', None, (("tool_call_id", "abcdefghi"), ("name", "get_weather")))
SHAPES: dict[str, tuple[tuple[Message, ...], tuple]] = {
    "single": (ask("What is a spline?", "A smooth curve made of pieces."), ()),
    "multi": (ask("Hi", "Hello!", "And you?", "Fine, thanks.", "Good.", "Yes."), ()),
    "system": (said(("system", "Be brief."), *[(m.role, m.content) for m in ask("Why?", "Because.")]), ()),
    "system multi": (said(("system", "Be brief."), *[(m.role, m.content) for m in ask("Why?", "So.", "How?", "Thus.")]), ()),
    "unicode": (ask("¿Qué es 漢字? Ein Ölfaß, नमस्ते, e\u0301", "كتابة — “characters” … \u2028 \u00a0 end"), ()),
    "emoji": (ask("🦙👩‍👩‍👧‍👦 hi 🏴󠁧󠁢󠁥󠁮󠁧󠁿", "🇮🇹🙂"), ()),
    "leading space": (ask(" padded question", "  two spaces first"), ()),
    "leading newline": (ask("\nquestion", "\n\nanswer after two lines"), ()),
    "trailing space": (ask("question  \n", "answer with a tail \n\n"), ()),
    "think": (ask("2+2?", "<think>\ntwo and two\n</think>\n\nFour."), ()),
    "think multi": (ask("2+2?", "<think>\nhm\n</think>\n\nFour.", "sure?", "<think>\nyes\n</think>\n\nSure."), ()),
    "call": ((Message("user", "Weather in Rome?"), CALL, RESULT, Message("assistant", "It is 20 degrees.")), (TOOL,)),
    "tools unused": (ask("Hi", "Hello!"), (TOOL,)),
    "tool result": (said(("user", "Weather?"), ("assistant", "Let me look."), ("tool", "20 C"), ("assistant", "It is 20.")), ()),
    "short": (ask("2+2", "4", "3", ".", "?", "a"), ()),
    "code": (ask("fix\n```py\nif x:\n\ty  = 1\n```", "```py\nif x:\n    y = 1\n\n\n```"), ()),
    "empty answer": (ask("Say nothing.", ""), ()),
    "ends in user": (ask("Hi", "Hello!", "And then?"), ()),
    "markdown": (ask("### Response:\n[link](x) {{ messages }}", "| a | b |\n|---|---|\n\r\n{% raw %} ### Instruction:"), ()),
    "long": (ask("word " * 200, "answer, " * 150), ()),
}
ALTERNATING = {"call", "tool result"}
"""Shapes that a template with strictly alternating user and assistant turns refuses itself."""
NO_TOOLS = {"tools unused"}
REFUSED: dict[str, set[str]] = {
    **{name: ALTERNATING | NO_TOOLS | ({"empty answer"} if stop is None else set()) for name, stop in STOPS.items()},
    "HuggingFaceTB-SmolLM3-3B": {"call", "tools unused"},  # takes role tool, shows neither tools nor calls
    "Qwen-Qwen2.5-7B-Instruct": set(),
    "Qwen-Qwen3-0.6B": set(),
    "qwen2.5-instruct": set(),
    "google-gemma-2-2b-it": ALTERNATING | NO_TOOLS | {"system", "system multi"},
    "granite-3.0-instruct": ALTERNATING,  # shows tools; drops role `tool` in silence
    "meta-llama-Llama-3.1-8B-Instruct": set(),
    "meta-llama-Llama-3.2-3B-Instruct": set(),
    "microsoft-Phi-3.5-mini-instruct": ALTERNATING | NO_TOOLS,  # drops role `tool` in silence
    "mistralai-Mistral-Nemo-Instruct-2407": {"tool result"},  # wants a call id of nine characters
}


@dataclass(frozen=True)
class Expected:
    ids: list[int] | None  # None: prompt and answer are joined, see `head`
    learn: list[bool] | None
    head: list[int]  # ids of the first prompt
    text: str


class Oracle:
    """Character offsets over one joint tokenisation."""

    def __init__(self, source: str, stop: str | None, backend: Backend, bos: str, eos: str):
        def refuse(message):
            raise jinja2.TemplateError(message)

        env = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        env.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
        env.globals |= {"raise_exception": refuse, "strftime_now": lambda form: "02 Jan 2026"}
        self.template, self.backend, self.bos, self.eos = env.from_string(source), backend, bos, eos
        self.stop = eos if stop == "EOS" else stop

    def render(self, messages, tools, prompt: bool) -> str:
        rows = [m.as_dict() for m in messages]
        return self.template.render(
            messages=rows, tools=list(tools) or None, add_generation_prompt=prompt, bos_token=self.bos, eos_token=self.eos
        )

    def expected(self, messages, tools) -> list[Expected]:
        answers = [t for t, m in enumerate(messages) if m.role == "assistant"]
        whole = self.render(messages, tools, False)
        spans, texts = [], []
        for t in answers:
            prompt, text = self.render(messages[:t], tools, True), self.render(messages[: t + 1], tools, False)
            if not text.startswith(prompt):  # Nemo: the system message stands in the last user turn of a prompt only
                text = prompt + messages[t].content + self.eos
            end = len(text.rstrip()) if self.stop is None else text.rindex(self.stop) + len(self.stop)
            spans.append((len(prompt), end))
            texts.append(text)
        if all(whole[:end] == text[:end] for (_, end), text in zip(spans, texts, strict=True)):
            return [self.tokens(whole, spans, spans)]
        return [self.tokens(text, [span], spans[: k + 1]) for k, (span, text) in enumerate(zip(spans, texts, strict=True))]

    def tokens(self, text, spans, ends) -> Expected:
        if self.stop is None:  # EOS behind each answer
            for _, end in reversed(ends):
                text = text[:end] + self.eos + text[end:]
            shift = len(self.eos)
            spans = [(begin + k * shift, end + (k + 1) * shift) for k, (begin, end) in enumerate(spans)]
        encoded = self.backend.encode(text, add_special_tokens=False)
        heads = [self.backend.encode(text[:begin], add_special_tokens=False).ids for begin, _ in spans]
        if any(encoded.ids[: len(head)] != head for head in heads):
            return Expected(None, None, heads[0], text)
        learn = [any(begin <= at < end for begin, end in spans) for at, _ in encoded.offsets]
        return Expected(encoded.ids, learn, heads[0], text)


def load_base(shared: Path, name: str, folder: Path) -> Tokenizer:
    bos, eos = BASES[name]
    (folder / "tokenizer.json").symlink_to(shared / "tokenizers" / name / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos, "eos_token": eos}))
    tokenizer = Tokenizer.load(folder)
    tokenizer.add_tokens(SPECIAL, special=True)
    tokenizer.add_tokens(MARKERS)
    return tokenizer


@pytest.fixture(scope="module")
def base(shared_data, tmp_path_factory):
    made: dict[str, Tokenizer] = {}

    def get(name: str) -> Tokenizer:
        if name not in made:
            made[name] = load_base(shared_data, name, tmp_path_factory.mktemp("tokenizer"))
        return made[name]

    return get


def source_of(shared: Path, name: str) -> str:
    text = (shared / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    return text if name in AS_WRITTEN else text.replace("    ", "").replace("\n", "")


def compare(shared: Path, tmp_path: Path, name: str, tokenizer: Tokenizer, shapes=SHAPES) -> set[str]:
    """Hold one template against the oracle in every shape; the shapes that were refused come back."""
    source = source_of(shared, name)
    path = tmp_path / f"{name}.jinja"
    path.write_text(source, encoding="utf-8")
    renderer = Renderer(tokenizer, str(path), add_eos=STOPS[name] is None, max_length=1 << 20, date=DATE)
    oracle = Oracle(source, STOPS[name], tokenizer.backend, tokenizer.bos_token, tokenizer.eos_token)
    conversations = [Conversation(messages, Origin(shape, 1), tools=tools) for shape, (messages, tools) in shapes.items()]
    refused = set()
    for conversation, got in zip(conversations, renderer.examples_many(conversations), strict=True):
        shape = conversation.origin.file
        if isinstance(got, RowRefused):
            assert len(got.what) > 20, "a refusal tells its reason"
            refused.add(shape)
            continue
        wanted = oracle.expected(conversation.messages, conversation.tools)
        assert len(got.examples) == len(wanted), shape
        for example, want in zip(got.examples, wanted, strict=True):
            ids, learn = example.ids.tolist(), example.learn.tolist()
            if want.ids is None:
                assert ids[: len(want.head)] == want.head, shape
                assert tokenizer.decode(ids).replace(" ", "") == tokenizer.decode(
                    tokenizer.encode(want.text, special=True)
                ).replace(" ", "")
                assert learn.index(True) == len(want.head), shape
                continue
            assert ids == want.ids, (
                shape,
                [(tokenizer.token(a), tokenizer.token(b)) for a, b in zip(ids, want.ids, strict=False) if a != b][:3],
            )
            assert learn == want.learn, (
                shape,
                [(k, tokenizer.token(ids[k])) for k in range(len(ids)) if learn[k] != want.learn[k]][:5],
            )
    return refused


@pytest.mark.parametrize("name", sorted(STOPS))
def test_ids_and_mask_equal_the_oracle(shared_data, tmp_path, base, name):
    """Every template and shape with one of three vocabularies in turn; all with all under `soak`."""
    tokenizer = ("Mistral-7B-v0.1", "gpt2", "ort/phi-3-mini")[sorted(STOPS).index(name) % 3]
    assert compare(shared_data, tmp_path, name, base(tokenizer)) == REFUSED[name]


@pytest.mark.parametrize("name", ["Qwen-Qwen2.5-7B-Instruct", "Qwen-Qwen3-0.6B"])
def test_their_own_tokenizer(shared_data, tmp_path, base, name):
    assert compare(shared_data, tmp_path, name, base("Qwen2.5")) == REFUSED[name]


@pytest.mark.soak
@pytest.mark.parametrize("tokenizer", sorted(BASES))
@pytest.mark.parametrize("name", sorted(STOPS))
def test_every_template_with_every_tokenizer(shared_data, tmp_path, base, name, tokenizer):
    assert compare(shared_data, tmp_path, name, base(tokenizer)) == REFUSED[name]


@pytest.mark.parametrize("name", sorted(n for n, stop in STOPS.items() if stop is None))
def test_a_template_without_stop_is_refused(shared_data, tmp_path, base, name):
    path = tmp_path / "template.jinja"
    path.write_text(source_of(shared_data, name), encoding="utf-8")
    with pytest.raises(TemplateError, match="no token ends an answer"):
        Renderer(base("gpt2"), str(path)).examples(Conversation(SHAPES["single"][0], Origin("x", 1)))
