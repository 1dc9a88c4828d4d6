"""chat.py: what is opened, what is streamed, what a person in a terminal sees."""

import importlib
import io
import json
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import nn

from tunesmith import adapters, models
from tunesmith.chat import Talker, converse
from tunesmith.config import schema
from tunesmith.errors import DataError, ModelError, RunError, TunesmithError
from tunesmith.models.decoder import Decoder
from tunesmith.run import Run
from tunesmith.spec import spec_of

CONFIG = {"model_type": "llama", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5}  # fmt: skip
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")  # fmt: skip
WORDS = 259  # bytes and three special tokens; the model's vocabulary is padded to 320


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny llama over bytes, with a chat template and a padded vocabulary."""
    path = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    model = Decoder(spec_of(CONFIG), config=CONFIG)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    models.save_checkpoint(model, path)
    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<s>", "<|im_start|>", "<|im_end|>")])
    tokenizer.save(str(path / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": CHATML}
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named}))
    return path


@pytest.fixture
def talker(folder):
    return Talker.open(folder)


class Scripted(nn.Module):
    """Answers the ids it is given, one after the other, and remembers its prompts."""

    spec, device = None, torch.device("cpu")

    def __init__(self, *scripts, context=None):
        super().__init__()
        self.p = nn.Parameter(torch.zeros(()))
        self.scripts, self.context, self.prompts = iter(scripts), context, []

    def new_cache(self, batch, capacity):
        self.script = iter(next(self.scripts))
        return SimpleNamespace(keep=None)

    def hidden(self, tokens_T, layout, *, rows=None, cache=None):
        if rows is not None:
            self.prompts.append(tokens_T.tolist())
        return torch.tensor([[float(next(self.script))]])

    def logits(self, x):
        if x.item() < 0:
            raise KeyboardInterrupt
        return torch.nn.functional.one_hot(x.long().squeeze(-1), 320).float()


def ids_of(talker, text, stop=True):
    return [*talker.renderer.tokenizer.encode(text), *([talker.renderer.tokenizer.eos_id] if stop else [])]


# ------------------------------------------------------------------ streams
def test_pieces_join_to_the_answer_and_no_character_is_split(talker):
    text = "déjà vu 🤖👩‍🚀 東京 ↯"
    talker.model = Scripted(ids_of(talker, text))
    pieces = list(talker.stream([{"role": "user", "content": "x"}]))
    assert "".join(pieces) == text and not any("\ufffd" in p for p in pieces) and len(pieces) > 10
    assert talker.ended == "stop"


def test_a_character_cut_by_the_limit_shows_as_one_mark(talker):
    talker.model = Scripted(ids_of(talker, "ab東"))
    assert "".join(talker.stream([{"role": "user", "content": "x"}], max_tokens=4)) == "ab\ufffd"
    assert talker.ended == "length"


def test_rows_beyond_the_tokenizer_and_special_tokens_never_crash(talker):
    talker.model = Scripted([300, *ids_of(talker, "a", stop=False), 256, 319, *ids_of(talker, "b")], [319] * 9)
    assert "".join(talker.stream([{"role": "user", "content": "x"}])) == "ab"
    assert talker.answer(["x"], max_tokens=5) == [""]


def test_streamed_and_batched_answers_of_a_real_model_agree(talker):
    streamed = "".join(talker.stream([{"role": "user", "content": "hello"}], max_tokens=30))
    assert streamed == talker.answer(["hello", "another, longer prompt"], max_tokens=30)[0]


def test_a_raw_prompt_is_the_persons_own_text(talker):
    t = talker.renderer.tokenizer
    assert talker.raw("a<|im_end|>") == [*talker.renderer.tokenizer.prefix_ids, *t.encode("a"), t.token_to_id("<|im_end|>")]
    written = talker.renderer.prompt([{"role": "user", "content": "a<|im_end|>"}])
    assert written.count(t.token_to_id("<|im_end|>")) == 1  # the template's own
    with pytest.raises(TunesmithError, match="raw prompt has no system message"):
        talker.answer(["a"], raw=True, system="b")


def test_raw_puts_bos_once(shared_data):
    talker = Talker.open(shared_data / "weights" / "TinyStories-656K")
    assert talker.raw("<|start_story|>Once")[:2].count(1) == talker.raw("Once")[:2].count(1) == 1
    assert "plain" in talker.renderer.describe()  # a base model without a template


# ------------------------------------------------------------------ long conversations
def turns(n, length=20):
    return [{"role": r, "content": f"{i}" * length} for i in range(n) for r in ("user", "assistant")][:-1]


def test_the_oldest_turns_leave_first_and_the_system_message_stays(talker):
    system = {"role": "system", "content": "S"}
    kept, dropped = talker.fit([system, *turns(4)], max_tokens=8)
    assert dropped > 0 and kept[0] == system and kept[1:] == turns(4)[2 * dropped :]
    length = len(talker.renderer.prompt(kept))
    assert length + 8 <= 128
    more = [system, *turns(4)[2 * (dropped - 1) :]]
    assert len(talker.renderer.prompt(more)) + 8 > 128  # not one turn more than needed
    assert talker.fit([system, *turns(1)], max_tokens=8) == ([system, *turns(1)], 0)
    with pytest.raises(DataError, match="the question has"):
        talker.fit(turns(1, length=200), max_tokens=8)


def test_a_model_without_an_end_keeps_everything(talker):
    talker.model = Scripted()
    assert talker.fit(turns(30), 500) == (turns(30), 0)


# ------------------------------------------------------------------ the terminal
def session(talker, monkeypatch, *lines, **settings):
    """What stands on the screen after these lines were typed; an exception among them is raised where the line was awaited."""
    told, screen = iter(lines), io.StringIO()

    def ask(console):
        line = next(told, EOFError())
        if isinstance(line, BaseException):
            raise line
        console.print(f"> {line}", markup=False)
        return line

    monkeypatch.setattr(importlib.import_module("tunesmith.chat"), "_ask", ask)  # `tunesmith.chat` is the verb
    console = Console(file=screen, width=100, color_system=None)
    converse(talker, **{"system": None, "max_tokens": 50, "temperature": 0.0, "top_p": 1.0, "console": console} | settings)
    return screen.getvalue()


def test_a_conversation_as_a_person_sees_it(talker, monkeypatch):
    say = [ids_of(talker, t) for t in ("  One :smile: [bold]x[/]\x1b[2J\n", "Two", "Three")]
    talker.model = Scripted(*say)
    screen = session(talker, monkeypatch, "a", "", "/what", "/reset", "b", "/system Kind", " /c", "/exit", "never")
    assert "model  One :smile: [bold]x[/]\ufffd[2J" in screen and "\x1b" not in screen  # no markup, no emoji, no commands
    assert "model  Two" in screen and "> never" not in screen
    assert "the conversation is forgotten" in screen and "the system message is set" in screen
    texts = [talker.renderer.tokenizer.decode(p, skip_special=False) for p in talker.model.prompts]
    assert len(texts) == 3 and "One" not in texts[1]  # /reset
    assert texts[2].startswith("<|im_start|>system\nKind") and "Two" in texts[2] and "/c<|im_end|>" in texts[2]


def test_ctrl_c_ends_an_answer_and_what_was_said_stays(talker, monkeypatch):
    talker.model = Scripted([*ids_of(talker, "Half an ans", stop=False), -1], ids_of(talker, "Whole"), [-1], ids_of(talker, "End"))
    screen = session(talker, monkeypatch, "a", "b", "c", "d")
    assert "Half an ans (stopped)" in screen and "model  Whole" in screen
    assert "no answer; the question is forgotten" in screen
    last = talker.renderer.tokenizer.decode(talker.model.prompts[3])
    assert "Half an ans" in last and "user\nc" not in last and "user\nd" in last


def test_leaving(talker, monkeypatch):
    talker.model = Scripted(ids_of(talker, "A"))
    screen = session(talker, monkeypatch, KeyboardInterrupt(), "a", KeyboardInterrupt(), KeyboardInterrupt(), "never")
    assert screen.count("Ctrl-C again") == 2 and "model  A" in screen and "never" not in screen
    session(talker, monkeypatch, EOFError())


def test_limits_are_said_and_a_question_too_long_is_no_end(talker, monkeypatch):
    long = "z" * 45
    talker.model = Scripted(*[ids_of(talker, long)] * 3, ids_of(talker, "ok"), context=128)
    screen = session(talker, monkeypatch, "q" * 30, "r" * 30, "x" * 300, "s", max_tokens=40)
    assert "stopped after 40 tokens" in screen
    assert "the oldest turn no longer fits in the model's context of 128 tokens: forgotten" in screen
    assert "the question has" in screen and "fix: ask something shorter" in screen
    talker.model = Scripted(ids_of(talker, long), context=80)
    assert "the model's context of 80 tokens is full" in session(talker, monkeypatch, "q" * 20)


# ------------------------------------------------------------------ what can be opened
def trained(model):
    adapters.attach(model, schema.Lora(rank=2), seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in adapters.trainable(model).values():
            p.add_(torch.randn_like(p) * 0.3)
    return model


def test_a_checkpoint_and_an_adapter(folder, tmp_path):
    model = trained(models.load(folder))
    adapters.save(model, tmp_path / "a", base_name=str(folder))
    plain, adapted = Talker.open(folder), Talker.open(folder, adapter=tmp_path / "a")
    assert adapted.answer(["hello"], max_tokens=20) != plain.answer(["hello"], max_tokens=20)
    assert adapted.answer(["hello"], max_tokens=20) == Talker(model, plain.renderer, "").answer(["hello"], max_tokens=20)
    with pytest.raises(DataError, match="surrogate"):
        plain.answer(["\ud800"], raw=True)  # what a shell hands over that is no UTF-8
    with pytest.raises(ModelError, match="an adapter, not a model") as e:
        Talker.open(tmp_path / "a")
    assert str(folder) in e.value.fix and "--adapter" in e.value.fix


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_a_run_answers_as_its_model_did_at_the_end(method, folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    data = {"train": str(tmp_path / "rows.jsonl")}
    config = schema.RunConfig(model=str(folder), data=data, method=method, output=tmp_path / "run", memory={"device": "cpu"})
    run = Run.create(tmp_path / "run", config, command=["test"])
    with pytest.raises(RunError, match="no result yet"):
        Talker.open(run.path)
    model = models.load(folder, store="nf4" if method == "qlora" else "dense")
    renderer = Talker.open(folder).renderer
    if method == "full":
        with torch.no_grad():
            model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight))
        models.save_checkpoint(model, run.model)
    else:
        adapters.save(trained(model), run.adapter, base_name=str(folder))
    template = renderer.template.replace("<|im_start|>", "<|im_start|>the ") if method == "lora" else renderer.template
    renderer.tokenizer.save(run.tokenizer, template)
    opened = Talker.open(run.path)
    renderer = opened.renderer
    assert renderer.template == template
    if method == "lora":  # the base with the run's adapter speaks the run's template, not its own
        beside = Talker.open(folder, adapter=run.adapter)
        assert beside.renderer.template == template
        assert beside.answer(["hello"], max_tokens=20) == opened.answer(["hello"], max_tokens=20)
    wanted = Talker(model.eval(), renderer, "").answer(["hello", "there"], max_tokens=20)
    assert opened.answer(["hello", "there"], max_tokens=20) == wanted
    assert opened.name == "run"
    with pytest.raises(RunError, match="its own adapter"):
        Talker.open(run.path, adapter=tmp_path)
