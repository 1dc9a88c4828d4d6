"""ChatGPT's export: the path that was seen last, nothing hidden learned, and a reason for each conversation that cannot be used."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data import json_rows, sources
from tunesmith.data.formats import FormatError, conversation
from tunesmith.data.sources import Refused, Row, find, rows
from tunesmith.errors import DataError
from tunesmith.types import Conversation, Origin


def node(name, parent, role=None, text="", kind="text", hidden=False, **more):
    if role is None:
        return {"id": name, "message": None, "parent": parent, "children": []}
    content = {"content_type": kind} | ({"text": text} if kind in ("code", "execution_output") else {"parts": [text]})
    message = {
        "id": name,
        "author": {"role": role, "name": more.pop("author", None), "metadata": {}},
        "create_time": 1718000000.5,
        "content": more.pop("content", content),
        "status": "finished_successfully",
        "weight": 0.0 if hidden else 1.0,
        "metadata": {"is_visually_hidden_from_conversation": True} if hidden else {},
        "recipient": "all",
    }
    return {"id": name, "message": message | more, "parent": parent, "children": []}


def export(*nodes, last="", **more):
    """A conversation as conversations.json has it."""
    return {
        "title": "Eggs",
        "create_time": 1718000000.1,
        "update_time": 1718000100.1,
        "mapping": {n["id"]: n for n in nodes},
        "moderation_results": [],
        "current_node": last or nodes[-1]["id"],
        "plugin_ids": None,
        "conversation_id": "6f0e",
    } | more


START = (node("root", None), node("sys", "root", "system", "", hidden=True))
ASKED = node("q", "sys", "user", "How long does an egg boil?")
EGGS = export(*START, ASKED, node("a", "q", "assistant", "Seven minutes."))


def read(value):
    return conversation(Row(value, Origin("conversations.json", 1)))


def said(value):
    return [(m.role, m.content) for m in read(value).messages]


def reason(value):
    with pytest.raises(FormatError) as e:
        read(value)
    return e.value.reason


def test_a_conversation_is_read_without_its_hidden_root():
    assert said(EGGS) == [("user", "How long does an egg boil?"), ("assistant", "Seven minutes.")]
    assert read(EGGS).fixes == ()


def test_the_path_to_the_current_node_is_taken_and_the_other_branches_are_told():
    first, again = node("a1", "q", "assistant", "An hour."), node("a2", "q", "assistant", "Seven minutes.")
    value = export(*START, ASKED, first, again, last="a2")
    assert said(value)[-1] == ("assistant", "Seven minutes.")
    assert read(value).fixes == ("branches that were edited or tried again left out",)
    assert said(value | {"current_node": "a1"})[-1] == ("assistant", "An hour.")


def test_what_was_never_said_is_left_out_and_counted():
    value = export(
        *START,
        node("ci", "sys", "user", hidden=True, content={"content_type": "user_editable_context", "user_profile": "I am Ann."}),
        node("h", "ci", "system", "You are a model. Today is Monday.", hidden=True),
        node("q", "h", "user", "Who won?"),
        node("t", "q", "assistant", content={"content_type": "thoughts", "thoughts": [{"summary": "s", "content": "hm"}]}),
        node("r", "t", "assistant", content={"content_type": "reasoning_recap", "content": "Thought for 4 s"}),
        node("e", "r", "assistant", ""),
        node("a", "e", "assistant", "Italy \ue200cite\ue202turn0search1\ue201 won【4†source】."),
    )
    assert said(value) == [("user", "Who won?"), ("assistant", "Italy  won.")]
    assert read(value).fixes == (
        "custom instructions left out",
        "hidden messages left out",
        "the model's thoughts left out",
        "citation marks taken out",
    )


def test_a_tool_that_was_called_is_a_tool_call_and_its_result():
    value = export(
        *START,
        ASKED,
        node("c", "q", "assistant", "print(7)", kind="code", recipient="python"),
        node("o", "c", "tool", "7", kind="execution_output", author="python"),
        node("a", "o", "assistant", "Seven."),
    )
    c = read(value)
    assert [m.role for m in c.messages] == ["user", "assistant", "tool", "assistant"]
    assert dict(c.messages[1].extra)["tool_calls"][0]["function"] == {"name": "python", "arguments": {"code": "print(7)"}}
    assert c.messages[2].content == "7" and dict(c.messages[2].extra) == {"name": "python"}
    assert c.fixes == ("calls of the model's tools kept as tool calls",)


def test_speech_is_read_from_its_transcript():
    parts = [{"content_type": "audio_transcription", "text": "How long?", "direction": "in"}]
    value = export(
        *START,
        node("q", "sys", "user", content={"content_type": "multimodal_text", "parts": parts}),
        node("a", "q", "assistant", "Seven."),
    )
    assert said(value)[0] == ("user", "How long?") and read(value).fixes == ("speech read from its transcript",)


PICTURE = {"content_type": "multimodal_text", "parts": [{"content_type": "image_asset_pointer", "asset_pointer": "file-x"}, "?"]}
ANSWER = node("a", "q", "assistant", "Seven.")


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (export(*START, node("q", "sys", "user", content=PICTURE), ANSWER), "'image_asset_pointer' in message 1; only text"),
        (export(*START, ASKED, node("t", "q", "tool", "a file"), node("a", "t", "assistant", "b")), "no call asked for"),
        (export(*START, ASKED, ANSWER, last="gone"), "current_node names a node that is not in the mapping"),
        (export(*START, ASKED | {"parent": "gone"}, ANSWER), "a parent names a node that is not in the mapping"),
        (export(ASKED | {"parent": "a"}, ANSWER), "the tree runs in a circle"),
        (export(*START, ASKED, ANSWER, node("b", "q", "assistant", "c"), current_node=None), "the tree has 2 ends"),
        (export(*START, node("q", "sys", "user", " "), ANSWER), "message 1 (user) is empty"),
        (export(*START, ASKED), "no assistant message"),
        (export(*START), "the conversation holds no message"),
        (EGGS | {"mapping": [1]}, "mapping is not an object of nodes"),
        (EGGS | {"mapping": "{"}, "mapping is a string that is not JSON"),
        (export(node("q", None, "user", "x", author=None) | {"message": {"author": None}}), "message 1 has no author with a role"),
        (export(*START, node("q", "sys", "user", content=None), ANSWER), "message 1 has no content"),
        (export(*START, node("q", "sys", "user", content={"content_type": "text", "parts": "x"}), ANSWER), "are not a list"),
        (export(*START, node("q", "sys", "wizard", "x"), ANSWER), "unknown role 'wizard'"),
    ],
)
def test_a_conversation_that_cannot_be_used_says_why(value, why):
    assert why in reason(value)


def test_the_folder_as_it_is_unpacked(tmp_path):
    (tmp_path / "conversations.json").write_text(json.dumps([EGGS, EGGS | {"title": "Again"}]))
    for name in ("user.json", "message_feedback.json", "shared_conversations.json", "export_manifest.json"):
        (tmp_path / name).write_text('{"id": 1}')
    (tmp_path / "chat.html").write_text("<html>all of it again</html>")
    assert [r.value["title"] for r in rows(tmp_path)] == ["Eggs", "Again"]
    left = " ".join(find(tmp_path).skipped)
    assert all(name in left for name in ("user.json (metadata", "message_feedback.json (metadata", "chat.html"))


def test_one_conversation_in_a_file_of_its_own(tmp_path):
    path = tmp_path / "eggs.json"
    path.write_text(json.dumps(EGGS, indent=1))
    (row,) = rows(path)
    assert said(row.value) == said(EGGS)


def test_user_json_alone_is_read_as_any_other(tmp_path):
    (tmp_path / "user.json").write_text(json.dumps([{"question": "a", "answer": "b"}]))
    assert len(list(rows(tmp_path))) == 1


def test_a_cut_off_export_names_the_conversation(tmp_path):
    path = tmp_path / "conversations.json"
    path.write_text(json.dumps([EGGS] * 3)[:-200])
    with pytest.raises(DataError, match="ends in the middle of row 3: the file is cut off"):
        list(rows(path))


def test_a_conversation_beyond_the_limit_is_refused_in_words(tmp_path, monkeypatch):
    for module in (sources, json_rows):
        monkeypatch.setattr(module, "MAX_ROW", 1 << 20)
    path = tmp_path / "conversations.json"
    path.write_text(json.dumps([export(*START, ASKED, node("a", "q", "assistant", "x" * (4 << 20)))]))
    with pytest.raises(DataError, match="a row longer than 1 MB"):
        list(rows(path))


def test_a_hundred_thousand_turns_take_one_walk():
    turns = [node(str(i), str(i - 1) if i else None, ("user", "assistant")[i % 2], f"m{i}") for i in range(100_000)]
    assert len(read(export(*turns)).messages) == 100_000


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from(["a", "b", "user", "assistant", "text", "all", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["message", "author", "role", "content", "parts", "content_type", "parent", "a"]), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "b", "c"]), anything, max_size=3) | anything, anything)
def test_fuzz_any_tree_is_a_conversation_or_a_reason(mapping, last):
    try:
        assert isinstance(read({"mapping": mapping, "current_node": last, "create_time": 1}), Conversation)
    except FormatError as e:
        assert e.reason


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(sorted(("root", "sys", "q", "a"))),
    st.sampled_from(["id", "message", "parent"]),
    anything,
)
def test_fuzz_one_damaged_node(name, field, value):
    nodes = {n: dict(v) for n, v in EGGS["mapping"].items()}
    nodes[name][field] = value
    try:
        read(EGGS | {"mapping": nodes})
    except FormatError as e:
        assert e.reason


def test_no_row_is_lost(tmp_path):
    path = tmp_path / "conversations.json"
    path.write_text(json.dumps([EGGS, 5, None, EGGS, {"mapping": {}}]))
    found = list(rows(path))
    assert len(found) == 5 and sum(isinstance(r, Refused) for r in found) == 2
