"""serve/sampling.py, grammar.py, tools.py, service.py: the parts by themselves."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from tests.serve.fake import Engine as Fake
from tests.serve.fake import Words

from tunesmith.data.render import Renderer
from tunesmith.errors import DataError, RunError
from tunesmith.generate import Sampling, distribution
from tunesmith.hub import resolve_model
from tunesmith.serve import tools
from tunesmith.serve.job import Job, Piece
from tunesmith.serve.sampling import Row, draw, sample
from tunesmith.serve.schema import ApiError, ChatRequest, parse
from tunesmith.serve.service import Draft, Question, Served, Service, citations, told
from tunesmith.tokenizer import Tokenizer


def rows(count, **settings):
    return [Row(Job([1], Words(), print, seed=s, **settings), 0) for s in range(count)]


# ---- sampling


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"temperature": 0.6, "top_p": 0.7}, {"temperature": 1.3, "top_k": 5},
                                      {"temperature": 0.9, "top_k": 8, "top_p": 0.8}], ids=str)  # fmt: skip
def test_draws_follow_the_distribution_of_generate(settings):
    """20,000 draws against the probabilities of generate.py, by a chi-squared test at 1 in 100,000."""
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(4)) * 2
    count = 20_000
    found = torch.bincount(sample(logits.expand(count, -1), rows(count, **settings)).tokens_L, minlength=40).double()
    p, ids = distribution(logits, Sampling(**settings))
    wanted = torch.zeros(40, dtype=torch.float64).scatter_(0, ids[0], p[0].double()) * count
    assert not found[wanted == 0].any()
    there = wanted > 0
    chi = ((found - wanted)[there].square() / wanted[there]).sum().item()
    freedom = int(there.sum()) - 1
    assert chi < freedom + 4.4 * math.sqrt(2 * freedom) + 12, (chi, freedom)


def test_a_row_is_drawn_the_same_among_any_others():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    mixed = [Row(Job([1], Words(), print, seed=i, **s), i) for i, s in enumerate(
        [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}, {"temperature": 2.0, "top_k": 3}, {},
         {"temperature": 0.7}])]  # fmt: skip
    together = sample(logits, mixed).tokens_L
    assert together.tolist() == [int(sample(logits[i : i + 1], mixed[i : i + 1]).tokens_L) for i in range(6)]
    assert together[0] == logits[0].argmax() and together[4] == logits[4].argmax()


def test_equals_of_the_last_are_drawn_the_same_among_any_others():
    """In bf16 many scores are equal: how many of them a row's top_k let in went by the widest row of the step."""
    logits = torch.randn(1, 200, generator=torch.Generator().manual_seed(5)).mul(2).round().expand(61, -1)
    for others in ({"temperature": 1.0, "top_k": 60}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 1.0, "top_k": 999}):
        mine = rows(60, temperature=1.0, top_k=5)
        together = sample(logits, [*mine, *rows(1, **others)]).tokens_L[:60]
        assert torch.equal(together, sample(logits[:60], mine).tokens_L), others


def test_draws_are_even_and_depend_on_all_three():
    found = [draw(7, i, p) for i in range(40) for p in range(100)]
    assert min(found) >= 0 and max(found) < 1 and abs(sum(found) / len(found) - 0.5) < 0.02 and len(set(found)) == 4000
    assert draw(1, 2, 3) == draw(1, 2, 3) and len({draw(1, 2, 3), draw(2, 2, 3), draw(1, 3, 3), draw(1, 2, 4)}) == 4


def test_what_is_not_allowed_never_comes():
    logits = torch.randn(200, 12, generator=torch.Generator().manual_seed(2))
    allowed = torch.zeros(10, dtype=torch.bool)  # two rows of the model's vocabulary are padding
    allowed[[3, 7]] = True
    for temperature in (0.0, 1.5):
        asked = [Row(Job([1], Words(), print, seed=s, temperature=temperature), 0, allowed) for s in range(200)]
        assert set(sample(logits, asked).tokens_L.tolist()) == {3, 7}


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 1e-300}, {"temperature": 1e-40}, {"temperature": 1e-38}, {"temperature": 1.0, "top_p": 1e-300}],
    ids=str,
)
def test_the_smallest_settings_are_the_likeliest_token(settings):
    """Numbers that float32 rounds to 0, or whose quotients overflow, drew the last token, or one that a grammar forbids."""
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(3)) * 5
    assert torch.equal(sample(logits, rows(20, **settings)).tokens_L, logits.argmax(-1))


def test_nan_shows():
    logits = torch.randn(2, 8)
    logits[1, 3] = float("nan")
    drawn = sample(logits, rows(2))
    assert drawn.largest_L[0].isfinite() and drawn.largest_L[1].isnan()


# ---- grammar


@pytest.fixture(scope="module")
def grammars():
    pytest.importorskip("llguidance")
    from tunesmith.serve.grammar import Grammars

    words = Tokenizer.load(resolve_model("embedded").path)
    return Grammars(words, words.stop_ids), words


def test_any_walk_through_a_grammar_is_an_answer(grammars):
    jsonschema = pytest.importorskip("jsonschema")
    found, words = grammars
    schema = {"type": "object", "required": ["a"], "additionalProperties": False,
              "properties": {"a": {"type": "array", "items": {"type": "integer", "maximum": 99, "minimum": 0}, "maxItems": 3},
                             "b": {"enum": ["x", "y", None]}, "c": {"type": "string", "pattern": "^[a-z]{1,4}$"}}}  # fmt: skip
    text = found.compile(schema)
    for seed in range(12):
        follower, ids, generator = found.follow(text), [], torch.Generator().manual_seed(seed)
        for _ in range(200):
            allowed = follower.allowed()
            ids.append(int(torch.multinomial(allowed.float(), 1, generator=generator)))
            follower.take(ids[-1])
            if follower.done:
                break
        jsonschema.validate(json.loads(words.decode(ids, skip_special=True)), schema)
        assert follower.whole


@pytest.mark.parametrize("schema", [{"type": "nothing"}, {"$ref": "#/x"}, {"not": {"type": "string"}}, {"$ref": "http://127.0.0.1/x"},
                                    {"type": "string", "pattern": "(a"}, {"minimum": 5, "maximum": 1, "type": "integer"}],
                         ids=str)  # fmt: skip
def test_a_schema_that_cannot_be_followed_is_refused_with_the_reason(grammars, schema):
    with pytest.raises(DataError, match="cannot be followed"):
        grammars[0].compile(schema)


# ---- tools


@pytest.mark.parametrize(
    ("template", "text", "before", "calls"),
    [
        ("<tool_call>", 'Ok.\n<tool_call>\n{"name": "f", "arguments": {"a":1}}\n</tool_call>\n<tool_call>{"name": "g"}</tool_call>',
         "Ok.", [("f", {"a": 1}), ("g", {})]),
        ("<tool_call>", "no call", "no call", []),
        ("<tool_call>", "x <tool_call>{oops</tool_call>", "x <tool_call>{oops</tool_call>", []),
        ("[TOOL_CALLS]", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "é"}}, {"name": "g", "arguments": {}}]', "",
         [("f", {"a": "é"}), ("g", {})]),
        ("<tool_call>", '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}</tool_call>', "",
         [("f", {"a": "</tool_call>"})]),
        ("<tool_call>", '<tool_call>{"name": "f"}', "", [("f", {})]),
        ("<tool_call>", '<tool_call>{"name": "f"} or so</tool_call>', '<tool_call>{"name": "f"} or so</tool_call>', []),
        ("<|python_tag|>", '{"name": "f", "parameters": {"name": "a; b"}}', "", [("f", {"name": "a; b"})]),
        ("<|python_tag|>", '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"a": ";"}}', "",
         [("f", {}), ("g", {"a": ";"})]),
        ("<|python_tag|>", '{"name": "f", "parameters": {}} and more', '{"name": "f", "parameters": {}} and more', []),
        ("<|python_tag|>", '{"name": "f", "parameters": {"a": [1]}}', "", [("f", {"a": [1]})]),
        ("<|python_tag|>", '<|python_tag|>{"name": "f", "parameters": {}}', "", [("f", {})]),
        ("<|python_tag|>", 'I say {"name": "f"}', 'I say {"name": "f"}', []),
        ("<tool_call>", '<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
        ("<tool_call>", "<tool_call>" + "[" * 50_000, "<tool_call>" + "[" * 50_000, []),
    ],
)  # fmt: skip
def test_calls_are_read_as_each_family_writes_them(template, text, before, calls):
    family = tools.family(template)
    said, found = family.split(text)
    assert said == before and [(c.name, json.loads(c.arguments)) for c in found] == calls
    shown = max(family.sayable(text[:n]) for n in range(len(text) + 1)) if len(text) < 500 else 0
    assert not calls or shown <= len(text) - len(text.lstrip()) + len(before) + 2, "a part of a call was shown"


def test_real_templates_are_told_apart(shared_data):
    wanted = {"Qwen-Qwen2.5-7B-Instruct": "hermes", "mistralai-Mistral-Nemo-Instruct-2407": "mistral", "zephyr": None,
              "meta-llama-Llama-3.1-8B-Instruct": "llama", "meta-llama-Llama-3.2-3B-Instruct": "llama",
              "gemma-it": None}  # fmt: skip
    for name, kind in wanted.items():
        found = tools.family((shared_data / "templates" / f"{name}.jinja").read_text("utf-8"))
        assert (found and found.name) == kind, name


def test_special_tokens_are_in_no_text_beside_calls_either():
    """They were cut from text without calls and from streams, and stood in a whole answer before its calls."""

    class Marked(Words):
        special_ids = frozenset({ord("§")})

    class Renderer(Plain):
        tokenizer = Marked()

    question = Question(Served("q", Renderer()), [[1]], 1, {}, True, family=tools.FAMILIES["<tool_call>"])
    for text, content in (('§Ok.§ <tool_call>{"name": "f"}</tool_call>', "Ok."), ("§Ok.§", "Ok.")):
        whole, parts = Draft(question, 0), Draft(question, 0)
        whole.take(Piece(text, (), 9, "stop"))
        said = "".join(parts.take(Piece(c, (), k, "stop" if k == len(text) else None)) for k, c in enumerate(text, 1))
        assert whole.chat_choice()["message"]["content"] == content == said.rstrip() and bool(whole.calls) == ("tool" in text)


# ---- citations


def test_citations_name_passages_and_whether_they_support():
    passages = [SimpleNamespace(document="moon.txt", start=0, end=30, text="The moon is made of grey rock.", context=""),
                SimpleNamespace(document="tea.txt", start=5, end=40, text="Tea is brewed for 4 minutes.", context="")]  # fmt: skip
    found = citations("The moon is made of grey rock [1]. Tea is brewed for 9 minutes [2]. Cats bark [7].", passages)
    assert [(c["number"], c["exists"], c["supports"]) for c in found] == [(1, True, True), (2, True, False), (7, False, False)]
    assert found[0]["document"] == "moon.txt" and found[0]["text"] == passages[0].text and "document" not in found[2]
    assert citations("Nothing is cited.", passages) == []


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../home/x/manual.md", "manual.md"),
        ("/srv/docs/a.txt", "a.txt"),
        ("guide/start.md", "guide/start.md"),
        ("a..b.md", "a..b.md"),
    ],
)
def test_a_citation_says_nothing_of_where_documents_lie(name, shown):
    passage = SimpleNamespace(document=name, start=0, end=30, text="The moon is made of grey rock.", context="")
    assert citations("The moon is made of grey rock [1].", [passage])[0]["document"] == shown


class Plain:
    """A renderer without a template's process."""

    tokenizer, templates, stop_ids = Words(), {"default": ""}, frozenset({0})

    def prompt(self, messages, tools=()):
        return [1]


def chat_of(service, **more):
    body = {"model": "q", "messages": [{"role": "user", "content": "Rain?"}]} | more
    return service.chat(parse(json.dumps(body).encode(), ChatRequest))


def test_an_index_that_fails_is_the_servers_fault_and_its_place_stays_here(capsys):
    def search(question):
        raise DataError("/home/x/index.sqlite: the index is empty", "tunesmith docs add FOLDER --index /home/x/index.sqlite")

    with pytest.raises(ApiError) as caught:
        chat_of(Service(Fake(), lambda: {"q": Served("q", Plain())}, search))
    assert caught.value.status == 500 and "home" not in caught.value.message and "/home/x" in capsys.readouterr().err


def test_faults_with_files_are_not_told_to_clients(capsys):
    fault = told(RunError("/home/x/runs/first: the run is damaged", "rm -r /home/x/runs/first"))
    assert fault.status == 500 and "home" not in fault.message and "/home/x" in capsys.readouterr().err


def test_json_from_documents_that_do_not_answer_is_an_error_with_its_own_reason(monkeypatch):
    """It was "max_tokens or a stop text ended it": nothing had been written."""
    service = Service(Fake(), lambda: {"q": Served("q", Plain())}, lambda question: [])
    monkeypatch.setattr(service, "_grammars_of", lambda served: ())
    with pytest.raises(ApiError, match="no passage fits") as caught:
        chat_of(service, response_format={"type": "json_object"})
    assert caught.value.status == 422 and caught.value.code == "no_passage"
    assert chat_of(service).canned is not None


def test_an_adapter_that_comes_and_goes_leaves_no_grammar_behind(monkeypatch):
    from tunesmith.serve import grammar

    class Grammars:
        def __init__(self, tokenizer, stops):
            made.append(self)

        def compile(self, schema):
            return ""

    made = []
    monkeypatch.setattr(grammar, "Grammars", Grammars)
    served = {}
    service = Service(Fake(), lambda: served)
    for _ in range(5):
        served["q"] = Served("q", Plain())
        chat_of(service, response_format={"type": "json_object"})
        chat_of(service, response_format={"type": "json_object"})
    assert len(made) == 5 and len(service._grammars) == 1


# ---- a request to a prompt


def test_tools_calls_and_results_reach_the_template(shared_data):
    """Qwen 2.5's own template: the tool's schema, the earlier call with its arguments as a value, its result."""
    template = shared_data / "templates" / "Qwen-Qwen2.5-7B-Instruct.jinja"
    renderer = Renderer(Tokenizer.load(shared_data / "tokenizers" / "Qwen2.5"), str(template))
    service = Service(Fake(), lambda: {"q": Served("q", renderer)})
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Oslo"}'}}
    body = {
        "model": "q",
        "messages": [{"role": "developer", "content": "Be brief."},
                     {"role": "user", "content": [{"type": "text", "text": "Rain?"}]},
                     {"role": "assistant", "content": None, "tool_calls": [call]},
                     {"role": "tool", "tool_call_id": "c1", "content": "dry <|im_end|>"}],
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}],
    }  # fmt: skip
    question = service.chat(parse(json.dumps(body).encode(), ChatRequest))
    text = renderer.tokenizer.decode(question.prompts[0])
    assert question.family.name == "hermes" and text.endswith("<|im_start|>assistant\n") and text.count("Be brief.") == 1
    assert '"name": "weather", "parameters": {"type": "object"}' in text and '"arguments": {"town": "Oslo"}' in text
    assert "<tool_response>\ndry <|im_end|>" in text
    ends = question.prompts[0].count(renderer.tokenizer.token_to_id("<|im_end|>"))
    assert ends == text.count("<|im_end|>") - 1, "a tool's result ended a turn"
    without = service.chat(parse(json.dumps(body | {"tool_choice": "none"}).encode(), ChatRequest))
    assert without.family is None and "parameters" not in renderer.tokenizer.decode(without.prompts[0])
    job = question.jobs(lambda number, piece: None)[0]
    assert job.keep_special and job.stop_ids == renderer.stop_ids and job.temperature == 1.0
    renderer.close()
