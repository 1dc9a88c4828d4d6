"""Rows to conversations: every real dataset shape is read, or refused with the right reason; nothing is guessed."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data import formats, sources
from tunesmith.data.formats import FORMATS, FormatError, conversation, detect
from tunesmith.data.sources import Row
from tunesmith.types import Conversation, Origin

HERE = Origin("f.jsonl", 1)
U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def read(value) -> Conversation:
    return conversation(Row(value, HERE))


def said(value):
    return [(m.role, m.content) for m in read(value).messages]


def reason(value) -> str:
    with pytest.raises(FormatError) as e:
        read(value)
    return e.value.reason


@pytest.mark.parametrize("name", FORMATS)
def test_doc_example_is_found_by_its_keys_and_survives_the_round_trip(name):
    example = FORMATS[name].doc_example
    assert detect(example) == name
    c = read(example)
    assert c.fixes == ()
    assert formats.from_dict(json.loads(json.dumps(formats.to_dict(c)))) == c
    for key in FORMATS[name].keys:
        if set(key) <= example.keys():
            break
    else:
        pytest.fail("the example has none of its format's keys")


def test_alpaca():
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief.", "history": [["hi", "hello"]]}
    assert said(row) == [("system", "Be brief."), ("user", "hi"), ("assistant", "hello"), ("user", "Add.\n1 2"), ("assistant", "3")]
    assert said({"instruction": "Add.", "input": "", "output": "3", "text": "rendered"}) == [("user", "Add."), ("assistant", "3")]
    assert said({"instruction": "Who?", "context": "Ann.", "response": "Ann"}) == [("user", "Who?\nAnn."), ("assistant", "Ann")]
    assert said({"instruction": "Add.", "input": None, "output": 3}) == [("user", "Add."), ("assistant", "3")]
    assert said({"instruction": "Add.", "input": float("nan"), "output": "3"}) == [("user", "Add."), ("assistant", "3")]


def test_sharegpt_with_tools():
    row = {
        "conversations": [
            {"from": "human", "value": "weather?"},
            {"from": "function_call", "value": '{"name": "w", "arguments": {"city": "Rome"}}'},
            {"from": "observation", "value": '{"t": 20}'},
            {"from": "gpt", "value": "20 degrees"},
        ],
        "system": "Help.",
        "tools": '[{"name": "w"}]',
    }
    c = read(row)
    assert [m.role for m in c.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert dict(c.messages[2].extra) == {
        "tool_calls": [{"type": "function", "function": {"name": "w", "arguments": {"city": "Rome"}}}]
    }
    assert c.tools == ({"name": "w"},) and c.fixes == ()


def test_messages_with_weights_tools_and_reasoning():
    calls = [{"id": "1", "type": "function", "function": {"name": "w", "arguments": '{"a": 1}'}}]
    messages = [
        U,
        A | {"weight": 0},
        U,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "x", "tool_call_id": "1", "name": "w"},
        A | {"weight": 1, "reasoning_content": "hm"},
    ]
    c = read({"messages": messages})
    assert [m.learn for m in c.messages] == [None, False, None, None, None, True]
    assert dict(c.messages[3].extra)["tool_calls"][0]["function"] == {"name": "w", "arguments": {"a": 1}}
    assert dict(c.messages[4].extra) == {"tool_call_id": "1", "name": "w"}
    assert dict(c.messages[5].extra) == {"reasoning_content": "hm"}
    assert formats.from_dict(json.loads(json.dumps(formats.to_dict(c)))) == c


def test_prompt_completion_is_plain_text_and_lists_are_a_chat():
    c = read({"prompt": "2+2=", "completion": " 4"})
    assert (c.kind, said({"prompt": "2+2=", "completion": " 4"})) == ("completion", [("prompt", "2+2="), ("completion", " 4")])
    c = read({"prompt": [U, A, U], "completion": [A]})
    assert c.kind == "chat" and [m.learn for m in c.messages] == [None, False, None, None]
    assert "one of prompt and completion" in reason({"prompt": [U], "completion": "a"})


@pytest.mark.parametrize("keys", formats.PAIRS)
def test_pairs(keys):
    assert said(dict(zip(keys, ["q", "a"], strict=True))) == [("user", "q"), ("assistant", "a")]


def test_text_and_bare_strings():
    assert read({"text": "once"}).kind == read("once").kind == "text"
    assert said({"text": "once"}) == said("once") == [("text", "once")]


@pytest.mark.parametrize(
    ("value", "fix", "content"),
    [
        ({"messages": [U, {"role": "assistant", "content": 7}]}, "number read as text", "7"),
        ({"messages": [U, {"role": "Assistant", "content": "a"}]}, "role 'Assistant' read as assistant", "a"),
        ({"messages": [{"role": "developer", "content": "s"}, U, A]}, "role 'developer' read as system", "a"),
        ({"messages": [U, {"role": "model", "content": "a"}]}, "role 'model' read as assistant", "a"),
        (
            {"messages": [U, {"role": "assistant", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]}]},
            "parts",
            "xy",
        ),
        ({"messages": json.dumps([U, A])}, "JSON string", "a"),
        ({"conversation": {"messages": [U, A]}}, "", "a"),
        ({"conversation": [U, A]}, "", "a"),
        ({"messages": None, "text": None, "question": "q", "answer": "a"}, "", "a"),
    ],
)
def test_what_is_mended_is_named(value, fix, content):
    c = read(value)
    assert (fix in " ".join(c.fixes)) if fix else not c.fixes
    assert c.messages[-1].content == content


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "preference tuning"),
        ({"messages": [U, A], "label": False}, "preference tuning (KTO)"),
        ({"prompt": "p", "completion": "c", "label": True}, "preference tuning (KTO)"),
        ({"input_ids": [1], "labels": [1]}, "already tokenised"),
        ({"message_tree_id": "1", "prompt": {}}, "tree"),
        ({"text": "t", "role": "prompter", "parent_id": None}, "tree"),
        ({"messages": [U, A], "conversations": []}, "two formats at once (sharegpt and messages)"),
        ({"messages": [U, A], "question": "q", "answer": "a"}, "two formats at once"),
        ({"question": "q", "answer": "a", "response": "b"}, "several questions"),
        ({"question": "q"}, "'answer' is missing"),
        ({"instruction": "i", "output": None}, "'output' is missing"),
        ({"foo": 1, "bar": 2}, "no known format has these keys: bar, foo"),
        ({}, "empty row"),
        ("  ", "the text is empty"),
        ({"text": ""}, "the text is empty"),
        ({"text": [1]}, "text is a list"),
        ({"messages": "hello"}, "not JSON"),
        ({"messages": {"role": "user"}}, "not a list"),
        ({"messages": []}, "messages is empty"),
        ({"messages": ["hi"]}, "message 1 is not an object"),
        ({"messages": [{"content": "q"}, A]}, "message 1 has no role"),
        ({"messages": [{"role": 3, "content": "q"}, A]}, "role of message 1 is not text"),
        ({"messages": [{"role": "wizard", "content": "q"}, A]}, "unknown role 'wizard'"),
        ({"messages": [U, {"role": "assistant"}]}, "content of message 2 is missing or null"),
        ({"messages": [U, {"role": "assistant", "content": None}]}, "content of message 2 is missing or null"),
        ({"messages": [U, {"role": "assistant", "content": {"a": 1}}]}, "is an object, not text"),
        ({"messages": [U, {"role": "assistant", "content": " \n"}]}, "answer in message 2 is empty"),
        ({"messages": [{"role": "user", "content": ""}, A]}, "message 1 (user) is empty"),
        ({"messages": [U]}, "no assistant message"),
        ({"messages": [A]}, "only assistant messages"),
        ({"messages": [U, A | {"weight": 0}]}, "every assistant message has weight 0"),
        ({"messages": [U, A | {"weight": 0.5}]}, "weight of message 2 is 0.5"),
        ({"messages": [U, A | {"weight": True}]}, "weight of message 2 is True"),
        ({"messages": [U | {"weight": 1}, A]}, "only assistant messages are learned"),
        ({"messages": [U, {"role": "assistant", "content": [{"type": "image_url", "image_url": {}}]}]}, "type 'image_url'"),
        ({"messages": [U, A], "images": ["a.jpg"]}, "'images'; only text"),
        ({"messages": [U, {"role": "assistant", "tool_calls": [{"function": {}}]}]}, "tool call has no name"),
        (
            {"messages": [U, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "the argument text of a tool call is a string that is not JSON",
        ),
        ({"messages": [U, A], "tools": "x"}, "tools is a string that is not JSON"),
        ({"messages": [U, A], "tools": ["x"]}, "tools is not a list of objects"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "w()"}]}, "tool call is a string"),
        ({"instruction": "", "input": "", "output": "a"}, "the instruction is empty"),
        ({"instruction": "i", "output": ""}, "the output is empty"),
        ({"instruction": "i", "output": "o", "history": ["a"]}, "history is not a list"),
        ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}], "system": "t"}, "keep one"),
    ],
)
def test_what_is_refused_says_why(value, why):
    assert why in reason(value)


# every dataset of the folder: rows read by format, rows refused by a word of the reason
REAL = {
    "customer_support/banking77/test.csv": ({"text": 3080}, {}),
    "customer_support/banking77/train.csv": ({"text": 10003}, {}),
    "customer_support/support_eval/test_cases.json": ({"messages": 70}, {}),
    "customer_support/support_eval/training_threads.json": ({"messages": 26}, {}),
    "customer_support/tau_bench/few_shot_data/MockAirlineDomainEnv-few_shot.jsonl": ({}, {"no known format": 19}),
    "customer_support/tau_bench/few_shot_data/MockRetailDomainEnv-few_shot.jsonl": ({}, {"no known format": 69}),
    "fixtures/axolotl/alpaca/alpaca.json": ({"alpaca": 2}, {}),
    "fixtures/axolotl/conversation.json": ({"sharegpt": 1}, {}),
    "fixtures/axolotl/conversation.missingturns.json": ({}, {"answer in message 2 is empty": 1}),
    "fixtures/axolotl/conversation.tokenized.json": ({}, {"already tokenised": 1}),
    "fixtures/axolotl/conversation.tokenized_llama2chat.json": ({}, {"already tokenised": 1}),
    "fixtures/torchtune/alpaca_tiny.json": ({"alpaca": 100}, {}),
    "fixtures/torchtune/chat_tiny.json": ({"sharegpt": 1}, {}),
    "fixtures/torchtune/hh_rlhf_tiny.json": ({}, {"preference": 1}),
    "fixtures/torchtune/instruct_tiny.json": ({"alpaca": 2}, {}),
    "fixtures/torchtune/stack_exchange_paired_tiny.json": ({}, {"preference": 25}),
    "fixtures/torchtune/vqa_tiny.json": ({}, {"only text": 1}),
    "gpteacher/roleplay.json": ({"alpaca": 1923}, {}),
    "gsm8k/gsm_8k_train_alpaca_format.json": ({"alpaca": 7473}, {}),
    "gsm8k/test.jsonl": ({"question_answer": 1319}, {}),
    "gsm8k/train.jsonl": ({"question_answer": 7473}, {}),
    "llama_factory/alpaca_en_demo.json": ({"alpaca": 999}, {}),
    "llama_factory/alpaca_zh_demo.json": ({"alpaca": 1000}, {}),
    "llama_factory/c4_demo.jsonl": ({"text": 300}, {}),
    "llama_factory/dpo_en_demo.json": ({}, {"preference": 300}),
    "llama_factory/dpo_zh_demo.json": ({}, {"preference": 300}),
    "llama_factory/glaive_toolcall_en_demo.json": ({"sharegpt": 300}, {}),
    "llama_factory/glaive_toolcall_zh_demo.json": ({"sharegpt": 300}, {}),
    "llama_factory/identity.json": ({"alpaca": 91}, {}),
    "llama_factory/kto_en_demo.json": ({}, {"preference": 300}),
    "llama_factory/reason_tool_use_demo_50.jsonl": ({"messages": 50}, {}),
    "llama_factory/v1_dpo_demo.jsonl": ({}, {"preference": 10}),
    "llama_factory/v1_multimodal_demo.jsonl": ({}, {"only text": 24}),
    "llama_factory/v1_sft_demo.jsonl": ({"messages": 500}, {}),
    "llama_factory/wiki_demo.txt": ({"text": 6}, {}),
    "medquad/medquad.jsonl": ({"alpaca": 16407}, {}),
    "oasst/en_100_message.jsonl": ({}, {"tree": 100}),
    "oasst/en_100_text.jsonl": ({"text": 100}, {}),
    "oasst/en_100_tree.jsonl": ({}, {"tree": 100}),
    "oasst/realistic_seed_data.json": ({}, {"tree": 444}),
    "rasbt/instruction-data-with-preference.json": ({}, {"preference": 1100}),
    "rasbt/instruction-data.json": ({"alpaca": 1100}, {}),
    "rasbt/instruction-examples.json": ({"alpaca": 200}, {}),
    "sharegpt/dummy_conversation.json": ({"sharegpt": 500}, {}),
}


@pytest.mark.parametrize("name", REAL)
def test_real_datasets_are_read_or_refused_with_the_right_reason(shared_data, name):
    wanted, why = REAL[name]
    found, refused = {}, dict.fromkeys(why, 0)
    for row in sources.rows(shared_data / "sft" / name):
        assert isinstance(row, Row), row
        try:
            conversation(row)
            kind = detect(row.value)
            found[kind] = found.get(kind, 0) + 1
        except FormatError as e:
            (hit,) = [w for w in why if w in e.reason]
            refused[hit] += 1
    assert (found, refused) == (wanted, why)


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["user", "assistant", "system", "tool"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "weight", "tool_calls", "function", "name", "type", "text"]), inner
        )
    ),
    max_leaves=12,
)
KEYS = sorted(
    {k for f in FORMATS.values() for ks in f.keys for k in ks} | {"tools", "system", "input", "history", "label", "images"}
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(KEYS), JUNK, max_size=4) | st.text(max_size=3))
def test_fuzz_a_row_is_a_conversation_or_has_a_reason(value):
    try:
        c = read(value)
        assert c.messages and all(isinstance(m.content, str) for m in c.messages)
        assert c.kind != "chat" or any(m.role == "assistant" and m.learn is not False for m in c.messages)
    except FormatError as e:
        assert e.reason


def test_train_false_is_a_weight_of_nothing():
    """Axolotl's per-message field: an assistant turn with `train: false` is not learned."""
    turns = [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "train": True},
    ]  # fmt: skip
    found = conversation(Row({"messages": turns}, Origin("f", 1)))
    assert [m.learn for m in found.messages] == [None, False, None, True]


def test_fields_are_what_a_row_carries_beside_what_its_format_reads():
    from tunesmith.data.sources import Row
    from tunesmith.types import Origin

    def fields(value):
        return formats.fields(Row(value, Origin("f.jsonl", 1)))

    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    marks = {"topic": "on", "expect": [["a"]]}
    assert fields({"messages": chat, **marks, "none": None, "tools": []}) == marks
    assert fields({"instruction": "q", "input": "", "output": "a", "n": 3}) == {"n": 3}
    assert fields({"messages": chat, "long": "x" * 5000}) == {} and fields("plain text") == {}
    c = formats.conversation(Row({"messages": chat, "topic": "on"}, Origin("f.jsonl", 1)))
    assert c.fields == {} and "fields" not in formats.to_dict(c)  # only what is held out carries them
