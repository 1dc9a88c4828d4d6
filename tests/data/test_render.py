"""The renderer's promises one by one: golden ids, what is learned, what is refused, and that nothing typed becomes a control
token."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from tunesmith.config.schema import Data
from tunesmith.data.render import MERGED, Renderer, RowRefused, build_renderer
from tunesmith.errors import TemplateError
from tunesmith.tokenizer import Tokenizer
from tunesmith.types import Conversation, Message, Origin

HERE = Origin("chats.jsonl", 7)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = (  # as Qwen3: thoughts of earlier turns are cut, the last turn always has some
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>' + (m.reasoning_content or '') + '</think>' }}{% endif %}{{ m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make(**named) -> Tokenizer:
    """Bytes, a few merges, and ChatML's tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ċ", "Ċ"), ("a", "n"), ("Ġ", "a"), ("Ġa", "n"), ("s", "s")]
    vocab = {piece: k for k, piece in enumerate([*alphabet, *(a + b for a, b in merges)])}
    backend = Backend(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ("<|im_start|>", "<|im_end|>", "<s>", "<eos>")]
    )
    backend.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>", "<tool_call>")])
    return Tokenizer(backend, {"eos_token": "<eos>", "bos_token": "<s>", "chat_template": CHATML} | named)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make()


@pytest.fixture(scope="module")
def chatml(tokenizer) -> Renderer:
    return Renderer(tokenizer)


def chat(*turns, tools=(), **settings) -> Conversation:
    messages = tuple(t if isinstance(t, Message) else Message(*t) for t in turns)
    return Conversation(messages, HERE, tools=tuple(tools), **settings)


def ask(*texts) -> Conversation:
    return chat(*((("user", "assistant")[i % 2], text) for i, text in enumerate(texts)))


def learned(renderer: Renderer, conversation: Conversation) -> list[list[str]]:
    """Texts of the learned spans of each example."""
    found = []
    for example in renderer.examples(conversation).examples:
        spans, at = [], 0
        for run in np.split(np.arange(len(example.ids)), np.flatnonzero(np.diff(example.learn)) + 1):
            if example.learn[run[0]]:
                spans.append(renderer.tokenizer.decode(example.ids[run]))
            at += len(run)
        found.append(spans)
    return found


def template(tmp_path, text: str) -> str:
    path = tmp_path / "template.jinja"
    path.write_text(text, encoding="utf-8")
    return str(path)


# ---- other people's ids


def test_axolotls_llama_2_tokenisation(shared_data, tmp_path):
    """Axolotl's fixture of a ShareGPT conversation in llama-2's format: the first 2,055 ids (then it cuts)."""
    spec = json.loads((shared_data / "tokenizers/ort/phi-3-mini/tokenizer.json").read_text(encoding="utf-8"))
    spec["added_tokens"] = [t | {"rstrip": False, "special": True} for t in spec["added_tokens"] if t["id"] < 3]  # llama-2's own
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}))
    source = (shared_data / "templates/llama-2-chat.jinja").read_text(encoding="utf-8").replace("    ", "").replace("\n", "")
    fixtures = shared_data / "sft/fixtures/axolotl"
    turns = json.loads((fixtures / "conversation.json").read_text(encoding="utf-8"))["conversations"]
    golden = json.loads((fixtures / "conversation.tokenized_llama2chat.json").read_text(encoding="utf-8"))
    loaded = Tokenizer.load(tmp_path)
    system = loaded.decode(golden["input_ids"]).split("<<SYS>>\n")[1].split("\n<</SYS>>")[0]
    roles = {"human": "user", "gpt": "assistant"}
    told = chat(("system", system), *((roles[t["from"]], t["value"]) for t in turns))
    example = Renderer(loaded, template(tmp_path, source), max_length=1 << 20).examples(told).examples[0]
    assert len(golden["input_ids"]) >= 2055
    assert example.ids[:2055].tolist() == golden["input_ids"][:2055]
    labels = np.array(golden["labels"][:2055])
    assert (example.ids[:2055][example.learn[:2055]] == labels[example.learn[:2055]]).all(), "what we learn, it learns too"


# ---- what is learned


def test_from_the_prompts_end_through_the_stop(chatml):
    assert learned(chatml, ask("hi", "hello", "and", "bye")) == [["hello<|im_end|>", "bye<|im_end|>"]]
    rendered = chatml.examples(chat(("system", "be brief"), ("user", "hi"), ("assistant", "yo")))
    text = chatml.tokenizer.decode(rendered.examples[0].ids)
    assert text == "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
    assert rendered.notes == () and rendered.truncated == "" and rendered.examples[0].origin == HERE
    assert rendered.examples[0].ids.dtype == np.int32 and rendered.examples[0].learn.dtype == bool


def test_whose_turns(tokenizer, chatml):
    last = Renderer(tokenizer, train_on="last")
    assert learned(last, ask("a", "b", "c", "d")) == [["d<|im_end|>"]]
    weighted = chat(("user", "a"), Message("assistant", "b", False), ("user", "c"), ("assistant", "d"))
    assert learned(chatml, weighted) == [["d<|im_end|>"]]
    assert learned(last, chat(("user", "a"), Message("assistant", "b", True), ("user", "c"), ("assistant", "d"))) == [
        ["b<|im_end|>", "d<|im_end|>"]
    ]
    for conversation, reason in (
        (chat(("user", "a"), Message("assistant", "b", False)), "every assistant message asks not to be learned"),
        (chat(("user", "a")), "no assistant message"),
        (chat(Message("user", "a", True), ("assistant", "b")), "asks to be learned; only assistant"),
        (chat(), "no messages"),
        (chat(("<|im_end|>", "a"), ("assistant", "b")), "which is no name"),
        (ask("a", "\ud83d"), "half a surrogate pair"),
        (ask("a\U000f1001", "b"), "private-use"),
    ):
        with pytest.raises(RowRefused, match=reason):
            chatml.examples(conversation)


def test_the_prompt_of_inference_begins_the_example(chatml):
    for conversation in (ask("hi", "hello"), ask("q", "\nanswer"), ask("q", "\n\n\nanswer"), ask(" an", " an"), ask("", "x")):
        prompt = chatml.prompt(conversation.messages[:-1])
        example = chatml.examples(conversation).examples[0]
        assert example.ids[: len(prompt)].tolist() == prompt
        assert example.learn.tolist().index(True) == len(prompt)
    joined = chatml.examples(ask("q", "\nanswer")).examples[0]
    assert chatml.tokenizer.decode(joined.ids).endswith("assistant\n\nanswer<|im_end|>\n"), "joined ids, the same text"


def test_text_after_the_stop_is_not_learned(tokenizer, tmp_path):
    text = (
        CHATML.replace("<|im_end|>\n' }}{% endfor", "<|im_end|>\ntail' }}{% endfor")
        + "{% if not add_generation_prompt %}<eos>{% endif %}"
    )
    renderer = Renderer(tokenizer, template(tmp_path, text))
    assert learned(renderer, ask("a", "b", "c", "d")) == [["b<|im_end|>", "d<|im_end|>"]]
    assert renderer.tokenizer.token_to_id("<|im_end|>") in renderer.stop_ids


def test_a_template_that_rewrites_history(tokenizer, tmp_path):
    renderer = Renderer(tokenizer, template(tmp_path, THINKING))
    first = Message("assistant", "one", None, (("reasoning_content", "hm"),))
    rendered = renderer.examples(chat(("user", "a"), first, ("user", "b"), ("assistant", "two")))
    assert [tokenizer.decode(e.ids) for e in rendered.examples] == [
        "<|im_start|>user\na<|im_end|><|im_start|>assistant\n<think>hm</think>one<|im_end|>",
        "<|im_start|>user\na<|im_end|><|im_start|>assistant\none<|im_end|><|im_start|>user\nb<|im_end|>"
        "<|im_start|>assistant\n<think></think>two<|im_end|>",
    ]
    assert learned(renderer, chat(("user", "a"), first)) == [["<think>hm</think>one<|im_end|>"]]
    thought = chat(("user", "a"), first, ("user", "b"))
    assert learned(renderer, thought) == [["<think>hm</think>one<|im_end|>"]]
    with pytest.raises(RowRefused, match=r"message 2 \(assistant, its reasoning\) does not appear"):
        Renderer(tokenizer).examples(chat(("user", "a"), first))


def test_every_message_exactly_once(tokenizer, tmp_path):
    silent = CHATML.replace("{{ '<|im_start|>' + m.role", "{% if m.role != 'tool' %}{{ '<|im_start|>' + m.role").replace(
        "{% endfor", "{% endif %}{% endfor"
    )
    renderer = Renderer(tokenizer, template(tmp_path, silent))
    for content in ("20 C", ""):
        with pytest.raises(RowRefused, match=r"message 3 \(tool\).* does not appear"):
            renderer.examples(chat(("user", "w?"), ("assistant", "let me look"), ("tool", content), ("assistant", "20")))
    twice = Renderer(tokenizer, template(tmp_path, "{{ messages[0].content if messages[0].role == 'system' }}" + CHATML))
    with pytest.raises(RowRefused, match=r"appears (more than once|2 times)"):
        twice.examples(chat(("system", "s"), ("user", "a"), ("assistant", "b")))
    assert learned(twice, ask("a", "b")) == [["b<|im_end|>"]]


def test_same_role_turns_are_merged_and_said(chatml):
    rendered = chatml.examples(chat(("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d")))
    assert rendered.notes == (MERGED,)
    assert "user\na\n\nb<|im_end|>" in chatml.tokenizer.decode(rendered.examples[0].ids)
    assert learned(chatml, chat(("user", "a"), ("assistant", "c"), ("assistant", "d"))) == [["c\n\nd<|im_end|>"]]


def test_the_templates_own_refusal_is_the_reason(tokenizer, tmp_path):
    text = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
    renderer = Renderer(tokenizer, template(tmp_path, text))
    with pytest.raises(RowRefused, match="the template says: System role not supported"):
        renderer.examples(chat(("system", "s"), ("user", "a"), ("assistant", "b")))
    assert learned(renderer, ask("a", "b")) == [["b<|im_end|>"]]


# ---- stops


def test_a_template_without_stop(tokenizer, tmp_path):
    path = template(
        tmp_path,
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
    )
    with pytest.raises(TemplateError, match=r"no token ends an answer \(after it comes '\\n'"):
        Renderer(tokenizer, path).examples(ask("a", "b"))
    renderer = Renderer(tokenizer, path, add_eos=True)
    example = renderer.examples(ask("a", "b", "c", "d")).examples[0]
    assert tokenizer.decode(example.ids) == "user: a\nassistant: b<eos>\nuser: c\nassistant: d<eos>\n"
    assert learned(renderer, ask("a", "b", "c", "d")) == [[" b<eos>", " d<eos>"]]
    prompt = renderer.prompt([Message("user", "a"), Message("assistant", "b"), Message("user", "c")])
    assert example.ids[: len(prompt)].tolist() == prompt, "history has EOS at inference too"
    assert renderer.stop_ids == {tokenizer.eos_id} and "data.add_eos" in renderer.describe()


def test_a_stop_the_tokenizer_does_not_know(tmp_path):
    text = CHATML.replace("<|im_end|>", "<|unknown|>")
    with pytest.raises(TemplateError, match=r"<\|unknown\|>.*never stops"):
        Renderer(make(), template(tmp_path, text)).examples(ask("a", "b"))


def test_plain(tokenizer):
    base = make(chat_template=None)
    assert base.template is None
    renderer = Renderer(base)
    example = renderer.examples(
        chat(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ).examples[0]
    assert base.decode(example.ids) == "s\n\n### User:\na\n\n### Assistant:\nb<eos>\n\n### User:\nc\n\n### Assistant:\nd<eos>\n\n"
    assert renderer.describe().startswith("the plain template; learned: every assistant turn")
    assert base.vocab_size == tokenizer.vocab_size, "no new tokens"
    with pytest.raises(RowRefused, match="has no role tool"):
        renderer.examples(chat(("user", "a"), ("tool", "x"), ("assistant", "b")))
    bos = Renderer(make(chat_template=None, add_bos_token=True))
    assert bos.examples(ask("a", "b")).examples[0].ids[0] == bos.tokenizer.bos_id == bos.prompt([Message("user", "a")])[0]
    assert bos.examples(ask("a", "b")).examples[0].ids.tolist().count(bos.tokenizer.bos_id) == 1


# ---- nothing typed becomes a control token

PIECES = [
    "<|im_start|>",
    "<|im_end|>",
    "<|im_",
    "end|>",
    "<s>",
    "<eos>",
    "<think>",
    "</think>",
    "<tool_call>",
    "assistant\n",
    "\n",
    " ",
    "/think",
    "an",
]


TYPED = st.text(st.characters(codec="utf-8", max_codepoint=0xEFFFF), max_size=3)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(turns=st.lists(st.lists(st.sampled_from(PIECES) | TYPED, max_size=5).map("".join), min_size=2, max_size=4))
def test_control_tokens_are_the_templates_own(chatml, rejoining, turns):
    """As many as with harmless words, in the same order, in training and at inference; and the text comes back."""
    if len(turns) % 2:
        turns = turns[:-1]
    conversation = chat(("system", turns[0]), *ask(*turns).messages)
    for renderer in (chatml, rejoining):
        special = renderer.tokenizer.special_ids
        start, end = (renderer.tokenizer.token_to_id(t) for t in ("<|im_start|>", "<|im_end|>"))
        own = [start, end] * (1 + len(turns))  # the system message and the turns
        try:
            example = renderer.examples(conversation).examples[0]
        except RowRefused as refused:
            assert renderer is rejoining, refused
            continue
        assert [i for i in example.ids.tolist() if i in special] == own
        if renderer is chatml:
            assert renderer.tokenizer.decode(example.ids) == renderer.text(conversation.messages)
        prompt = renderer.prompt(conversation.messages[:-1])
        assert sum(i in special for i in prompt) == len(own) - 1
        assert example.ids[: len(prompt)].tolist() == prompt


@pytest.fixture(scope="module")
def rejoining(tokenizer, tmp_path_factory) -> Renderer:
    """A template that takes a word out of the content, so that two halves of a marker meet."""
    text = CHATML.replace("m.content", "m.content.replace('/think', '')")
    return Renderer(tokenizer, template(tmp_path_factory.mktemp("rejoining"), text))


def test_halves_of_a_marker_that_meet(rejoining):
    example = rejoining.examples(ask("<|im_/thinkend|>", "x")).examples[0]
    end = rejoining.tokenizer.token_to_id("<|im_end|>")
    assert example.ids.tolist().count(end) == 2
    assert rejoining.tokenizer.decode(example.ids).count("<|im_end|>") == 3


def test_markers_only_in_assistant_content(chatml):
    think = chatml.tokenizer.token_to_id("<think>")
    example = chatml.examples(ask("<think>", "<think>x</think>y")).examples[0]
    assert example.ids.tolist().count(think) == 1 and example.learn[example.ids.tolist().index(think)]


TOOL = {"type": "function", "function": {"name": "f", "description": "d <|im_end|> <tool_call>", "parameters": {"<s>": "<eos>"}}}
TOOLS = "{% if tools %}{{ '<|im_start|>tools\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}" + CHATML.replace(
    "m.content +", "m.content + (('<tool_call>' + (m.tool_calls | tojson)) if m.tool_calls else '') +"
)


def test_strings_of_tools_and_calls_are_content(tokenizer, tmp_path, chatml):
    renderer = Renderer(tokenizer, template(tmp_path, TOOLS))
    call = Message("assistant", "", None, (("tool_calls", [{"function": {"name": "f", "arguments": {"a": "<|im_end|> 1"}}}]),))
    conversation = chat(("user", "q"), call, ("tool", "r"), ("assistant", "done"), tools=[TOOL])
    example = renderer.examples(conversation).examples[0]
    ids = example.ids.tolist()
    assert ids.count(tokenizer.token_to_id("<|im_end|>")) == 5 and ids.count(tokenizer.token_to_id("<|im_start|>")) == 5
    assert ids.count(tokenizer.token_to_id("<tool_call>")) == 1
    assert tokenizer.decode(ids) == renderer.text(conversation.messages, conversation.tools)
    assert learned(renderer, conversation)[0][0].startswith('<tool_call>[{"function": {"name": "f"')
    assert learned(renderer, conversation)[0][0].endswith("<|im_end|>")
    for wrong, reason in (
        (chat(("user", "q"), ("assistant", "a"), tools=[TOOL]), "does not show the tools"),
        (chat(("user", "q"), call, ("tool", "r"), ("assistant", "a")), "drops the tool calls of message 2"),
    ):
        with pytest.raises(RowRefused, match=reason):
            chatml.examples(wrong)


# ---- length


def test_overlength(tokenizer, chatml):
    conversation = ask("q" * 20, "a" * 30, "q" * 20, "b" * 30)
    full = chatml.examples(conversation).examples[0]
    short = Renderer(tokenizer, max_length=len(full.ids) - 10)
    with pytest.raises(RowRefused, match=rf"{len(full.ids)} tokens, and data.max_length is {len(full.ids) - 10}") as caught:
        short.examples(conversation)
    assert caught.value.tokens == len(full.ids)
    cutting = Renderer(tokenizer, max_length=len(full.ids) - 10, overlength="truncate")
    cut = cutting.examples(conversation)
    assert cut.truncated == "the last answers" and cut.examples[0].ids.tolist() == full.ids[:-10].tolist()
    assert cutting.examples(ask("q" * 20, "a" * 150)).truncated == "the end of the answer"
    tail = chat(*ask("q", "a").messages, ("user", "u" * 200))
    after = short.examples(tail)
    assert after.truncated == "text after the last answer" and after.examples[0].learn.sum() == 2, "no answer is cut: not refused"
    with pytest.raises(RowRefused, match="the prompt alone fills") as caught:
        cutting.examples(ask("q" * 300, "a"))
    assert caught.value.tokens > 300


# ---- without a template


def test_prompt_and_completion(tokenizer):
    renderer = Renderer(make(add_bos_token=True))
    told = Conversation((Message("prompt", "Q: hi\nA:"), Message("completion", " hello")), HERE, "completion")
    example = renderer.examples(told).examples[0]
    assert renderer.tokenizer.decode(example.ids) == "<s>Q: hi\nA: hello<eos>"
    assert learned(renderer, told) == [[" hello<eos>"]]
    for prompt, completion in (("x h", "ello"), ("A: ", "an"), ("q\n", "\nb"), ("", "hello")):
        told = Conversation((Message("prompt", prompt), Message("completion", completion)), HERE, "completion")
        example = renderer.examples(told).examples[0]
        raw = renderer.raw_prompt(prompt)
        assert example.ids[: len(raw)].tolist() == raw, "no token straddles: the prompt's ids are those of inference"
        assert example.learn.tolist() == [False] * len(raw) + [True] * (len(example.ids) - len(raw))
        assert renderer.tokenizer.decode(example.ids) == f"<s>{prompt}{completion}<eos>"
    typed = Conversation((Message("prompt", "<eos><|im_end|>"), Message("completion", "<s>")), HERE, "completion")
    assert sum(i in renderer.tokenizer.special_ids for i in renderer.examples(typed).examples[0].ids.tolist()) == 2
    with pytest.raises(RowRefused, match="completion is empty"):
        renderer.examples(Conversation((Message("prompt", "a"), Message("completion", "")), HERE, "completion"))
    assert tokenizer.prefix_ids == () and Renderer(tokenizer).raw_prompt("a") == tokenizer.encode("a")
    bare = Conversation((Message("prompt", ""), Message("completion", "hello you")), HERE, "completion")
    example = Renderer(tokenizer).examples(bare).examples[0]
    assert example.learn.tolist() == [False] + [True] * (len(example.ids) - 1), "nothing comes before the first: it is no target"


def test_raw_text_in_windows(tokenizer):
    renderer = Renderer(make(add_bos_token=True), max_length=16)
    text = "".join(chr(97 + k % 26) for k in range(100))
    rendered = renderer.examples(Conversation((Message("text", text),), HERE, "text"))
    ids = [renderer.tokenizer.bos_id, *renderer.tokenizer.encode(text), renderer.tokenizer.eos_id]
    joined = rendered.examples[0].ids.tolist() + [i for e in rendered.examples[1:] for i in e.ids[1:].tolist()]
    assert joined == ids, "each window begins with the last token of the one before"
    assert sum(int(e.learn.sum()) for e in rendered.examples) == len(ids) - 1, "every token but the first is learned once"
    assert all(1 < len(e.ids) <= 16 and not e.learn[0] and e.learn[1:].all() for e in rendered.examples)
    with pytest.raises(RowRefused, match="empty"):
        renderer.examples(Conversation((Message("text", " \n"),), HERE, "text"))


# ---- the face


def test_many_are_as_one_by_one(tokenizer, tmp_path):
    renderer = Renderer(tokenizer, template(tmp_path, THINKING), max_length=60)
    rows = [ask(*("an" * (k % 7 + j) for j in range(2 * (k % 3) + 2))) for k in range(60)] + [
        chat(("user", "x")),
        ask("a", "b" * 90),
    ]
    rows += [Conversation((Message("prompt", "a"), Message("completion", "b")), HERE, "completion"), ask("c", "<think>d")]
    many = renderer.examples_many(rows)
    for row, got in zip(rows, many, strict=True):
        if isinstance(got, RowRefused):
            with pytest.raises(RowRefused) as caught:
                renderer.examples(row)
            assert str(caught.value) == str(got)
            continue
        for one, other in zip(renderer.examples(row).examples, got.examples, strict=True):
            assert one.ids.tolist() == other.ids.tolist() and one.learn.tolist() == other.learn.tolist()
    assert sum(isinstance(m, RowRefused) for m in many) >= 2
    assert renderer.examples_many([]) == []


def test_rows_are_rendered_only_where_the_template_looks_at_them(tokenizer, tmp_path, monkeypatch):
    """And come out the same either way."""
    rows = [ask(*(f" {'an' * (k % 7)}\n<|im_end|>{k}" for _ in range(2 * (k % 3) + 2))) for k in range(60)]
    trimming = CHATML.replace("m.content", "m.content | trim")
    looking = CHATML.replace("m.content", "(m.content ~ '')")
    found = {}
    for name, text in (
        ("plain", CHATML),
        ("trimming", trimming),
        ("looking", looking),
        ("trimmed", CHATML.replace("m.content", "((m.content ~ '') | trim)")),
    ):
        renderer = Renderer(tokenizer, template(tmp_path, text))
        renderer.describe()
        jobs = []
        real = renderer._sandbox.render
        monkeypatch.setattr(renderer._sandbox, "render", lambda some, real=real, jobs=jobs: jobs.extend(some) or real(some))
        found[name] = [(e.ids.tolist(), e.learn.tolist()) for r in renderer.examples_many(rows) for e in r.examples]
        assert len(jobs) == 3 + 60 * name.startswith("look") + 60 * (name == "trimmed"), "three shapes, and the rows"
    assert found["plain"] == found["looking"] and found["trimming"] == found["trimmed"] != found["plain"]


def test_questions_for_evaluation(chatml):
    asked = chatml.question(ask("a", "b", "c", "d"))
    assert asked.ids == tuple(chatml.prompt(ask("a", "b", "c").messages)) and (asked.shown, asked.gold) == ("c", "d")
    assert chatml.question(ask("a", "b", "c")) is None
    told = Conversation((Message("prompt", "p"), Message("completion", "q")), HERE, "completion")
    assert chatml.question(told).ids == tuple(chatml.raw_prompt("p"))
    assert chatml.question(Conversation((Message("text", "p"),), HERE, "text")) is None


def test_prompts_from_plain_dicts(chatml):
    assert chatml.prompt([{"role": "user", "content": "hi"}]) == chatml.prompt([Message("user", "hi")])
    assert chatml.text([{"role": "user", "content": "hi"}], prompt=True).endswith("<|im_start|>assistant\n")
    with pytest.raises(RowRefused):
        chatml.prompt([])


def test_the_fingerprint_holds_what_decides(tokenizer, tmp_path):
    prints = {
        Renderer(tokenizer, **settings).fingerprint
        for settings in (
            *({}, {"train_on": "last"}, {"add_eos": True}, {"max_length": 9}, {"overlength": "truncate"}),
            {"template": template(tmp_path, CHATML + " ")},
        )
    }
    assert len(prints) == 6
    assert Renderer(tokenizer, date="2020-01-01").fingerprint == Renderer(tokenizer, date="2021-01-01").fingerprint
    dated = template(tmp_path, CHATML + "{{ strftime_now('%Y') if false }}")
    assert Renderer(tokenizer, dated, date="2020-01-01").fingerprint != Renderer(tokenizer, dated, date="2021-01-01").fingerprint


def test_the_date_is_fixed(tokenizer, tmp_path):
    renderer = Renderer(tokenizer, template(tmp_path, "{{ strftime_now('%d %b %Y') }}" + CHATML), date="2024-07-26")
    assert renderer.text([Message("user", "a")]).startswith("26 Jul 2024") and renderer.date == "2024-07-26"


def test_a_run_reads_its_own_template_again(tokenizer, tmp_path):
    data = Data.model_validate({"train": "x", "template": "plain", "max_length": 77})
    first = Renderer(tokenizer, "plain", max_length=77)
    first.save(tmp_path / "saved")
    again = build_renderer(tmp_path / "saved", data, date=first.date, saved=True)
    row = ask("a", "b", "c", "d")
    assert again.examples(row).examples[0].ids.tolist() == first.examples(row).examples[0].ids.tolist()
    assert again.template == first.template and again.max_length == 77
    assert build_renderer(tmp_path / "saved", new_tokens=("<new>",)).tokenizer.token_to_id("<new>") == tokenizer.vocab_size


def test_wrong_template_files(tokenizer, tmp_path):
    with pytest.raises(TemplateError, match="cannot read nowhere"):
        Renderer(tokenizer, "nowhere.jinja")
    with pytest.raises(TemplateError, match="TemplateSyntaxError"):
        Renderer(tokenizer, template(tmp_path, "{% for %}")).examples(ask("a", "b"))
    with pytest.raises(TemplateError, match="'sep_token' is undefined"):
        Renderer(tokenizer, template(tmp_path, "{{ sep_token + 'a' }}" + CHATML)).examples(ask("a", "b"))
    for broken, what in (("{{ 1 / 0 }}", "ZeroDivisionError"), ("{{ foo.bar }}", "'foo' is undefined")):
        with pytest.raises(TemplateError, match=what) as e:
            Renderer(tokenizer, template(tmp_path, CHATML + broken)).describe()
        assert "data.template" in e.value.fix


def test_a_refusal_survives_a_process_pool():
    again = pickle.loads(pickle.dumps(RowRefused("too long", tokens=9)))
    assert (again.what, again.tokens, str(again)) == ("too long", 9, "too long")
