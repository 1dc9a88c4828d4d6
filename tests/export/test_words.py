"""Tokenizers as llama.cpp reads them: real vocabularies of every kind give the same ids for awkward texts and conversations."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from tests.conftest import SIZES
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tunesmith.data.render import build_renderer
from tunesmith.errors import ModelError
from tunesmith.export import gguf, parity
from tunesmith.export.gguf_read import read_gguf
from tunesmith.export.gguf_words import keys_of
from tunesmith.export.source import Source
from tunesmith.hub import ResolvedModel
from tunesmith.models import save_checkpoint
from tunesmith.models.decoder import Decoder
from tunesmith.spec import read_config, read_spec

REAL = {  # tokenizer's folder or file, template, tokens that its config lacks, model type
    "mistral": ("Mistral-7B-v0.1", "mistral-instruct.jinja", {}, "llama"),
    "qwen2.5": ("Qwen2.5", "qwen2.5-instruct.jinja", {}, "llama"),
    "phi3": ("ort/phi-3-mini", "phi-3.jinja", {}, "phi3"),
    "sentencepiece": ("mistral-common/mistral_instruct_tokenizer_240323.model.v3", "mistral-instruct.jinja", {}, "llama"),
}


def checkpoint(folder, model_type="llama", **config):
    """Random weights of 32 numbers a token beside a tokenizer that lies in `folder` already."""
    renderer = build_renderer(folder)
    vocab = renderer.tokenizer.vocab_size
    architecture = {"llama": "LlamaForCausalLM", "phi3": "Phi3ForCausalLM"}[model_type]
    sizes = SIZES | {"model_type": model_type, "architectures": [architecture], "num_hidden_layers": 1}
    sizes |= {"vocab_size": vocab + (-vocab % 8), "max_position_embeddings": 512, **config}
    (folder / "config.json").write_text(json.dumps(sizes))
    model = Decoder(read_spec(folder), config=read_config(folder))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    save_checkpoint(model, folder)
    run = SimpleNamespace(path=folder, config=SimpleNamespace(method="full"))
    source = Source(run, ResolvedModel(folder, "x"), torch.float32)
    source.__dict__["renderer"] = renderer
    return source


def ids_in_llama_cpp(source, path, conversations):
    gguf.write(source, path, "f16", "dense")
    job = {
        "artefact": str(path),
        "adapter": None,
        "rows": [[5, 6, 7]],
        "positions": [[1]],
        "top": 4,
        "prompts": [],
        "max_tokens": 1,
    }
    return parity.ask("llama.cpp", job | {"asked": [{"messages": c} for c in conversations]})[2]


def golden(shared_data) -> list[str]:
    """llama.cpp's own strings for its tokenizers' tests."""
    files = (shared_data / "tokenizers" / "golden").glob("*.inp")
    found = {t.rstrip("\n") for f in files for t in f.read_text("utf-8").split("__ggml_vocab_test__\n")}
    return sorted(t for t in found if t.strip())


@pytest.mark.parametrize("name", REAL)
def test_a_real_tokenizer_gives_the_same_ids(name, shared_data, tmp_path):
    where, template, named, model_type = REAL[name]
    source = shared_data / "tokenizers" / where
    if source.is_file():
        shutil.copyfile(source, tmp_path / "tokenizer.model")
    else:
        for file in source.glob("tokenizer*.json"):
            shutil.copyfile(file, tmp_path / file.name)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    lines = (shared_data / "templates" / template).read_text().split("\n")
    path.write_text(json.dumps(config | named | {"chat_template": "".join(line.strip() for line in lines)}))
    live = checkpoint(tmp_path, model_type)
    texts = [*parity.PROBES, *golden(shared_data)]
    asked = [[{"role": "user", "content": t}] for t in texts]
    asked.append(
        [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}, {"role": "user", "content": " three"}]
    )
    facts = ids_in_llama_cpp(live, tmp_path / "x.gguf", asked)
    for conversation, found in zip(asked, facts["rendered"], strict=True):
        assert found == live.renderer.prompt(conversation), conversation
    assert len(texts) > 40 and facts["template"] == live.renderer.template and facts["eos"] == live.renderer.tokenizer.eos_id


TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def small(folder, backend, **config):
    """A tokenizer of the test's own with the tiny template's tokens."""
    backend.add_special_tokens([AddedToken(f"<|{n}|>", special=True) for n in ("end", "user", "assistant")])
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "chat_template": TEMPLATE, **config}))
    return folder


def unigram(scheme: str) -> Tokenizer:
    words = ["▁the", "▁cat", "▁sat", "▁", "s", "at", "c", "a", "t", "h", "e", "▁on", "▁mat", "m", "o", "n", "th"]
    scores = [-2.0, -3.1, -3.2, -2.5, -4.0, -3.6, -5.0, -4.1, -4.2, -4.3, -4.4, -3.3, -3.4, -5.2, -5.3, -5.4, -4.8]
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), *zip(words, scores, strict=True)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return backend


@pytest.mark.parametrize("scheme", ["always", "never"])
def test_a_unigram_tokenizer_keeps_its_scores(scheme, tmp_path):
    live = checkpoint(small(tmp_path, unigram(scheme), unk_token="<unk>"))
    asked = [[{"role": "user", "content": t}] for t in ("the cat sat on the mat", "matcat", "the", "a  cat", "hats")]
    facts = ids_in_llama_cpp(live, tmp_path / "x.gguf", asked)
    assert facts["rendered"] == [live.renderer.prompt(c) for c in asked]
    keys = read_gguf(tmp_path / "x.gguf").keys
    assert keys["tokenizer.ggml.model"] == "t5" and keys["tokenizer.ggml.scores"][1] == -2.0


def sentencepiece() -> Tokenizer:
    """As Llama 2's and Mistral's: spaces are part of words, what no piece holds becomes bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz.,"]
    made = [
        "th",
        "at",
        "the",
        "▁the",
        "▁c",
        "▁cat",
        "▁s",
        "sat",
        "▁sat",
    ]  # in the order of their scores, each by every pair of others
    pieces += made
    merges = [(p[:k], p[k:]) for p in made for k in range(1, len(p)) if p[:k] in pieces and p[k:] in pieces]
    words = models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    backend = Tokenizer(words)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return backend


@pytest.mark.parametrize("bos", [True, False])
def test_a_sentencepiece_tokenizer_gives_the_same_ids_and_bos_where_the_template_has_it(bos, tmp_path):
    """Which llama.cpp's server adds by itself, once, where the file says so."""
    template = ("{{ bos_token }}" if bos else "") + TEMPLATE
    live = checkpoint(small(tmp_path, sentencepiece(), unk_token="<unk>", bos_token="<s>", chat_template=template))
    texts = ("the cat sat", "thecat  sat.", "Ω is 3", "  the", "cat\n\nthe", "sat, the cat")
    asked = [[{"role": "user", "content": t}] for t in texts]
    facts = ids_in_llama_cpp(live, tmp_path / "x.gguf", asked)
    wanted = [live.renderer.prompt(c) for c in asked]
    assert facts["rendered"] == wanted and [ids.count(1) for ids in wanted] == [int(bos)] * len(texts)
    assert facts["adds_bos"] == bos == (wanted[0][0] == 1) and facts["bos"] == 1
    keys = read_gguf(tmp_path / "x.gguf").keys
    assert keys["tokenizer.ggml.model"] == "llama" and keys["tokenizer.ggml.add_bos_token"] == bos


def test_the_vocabulary_is_as_long_as_the_embedding(tiny):
    """Ids that only the embedding has are unused tokens; fewer rows than tokens are refused."""
    renderer = build_renderer(tiny.model)
    keys = keys_of(renderer, 264)
    assert keys["ggml.tokens"][258:] == ["<|user|>", "<|assistant|>", "[PAD260]", "[PAD261]", "[PAD262]", "[PAD263]"]
    assert keys["ggml.token_type"][255:] == [1, 3, 3, 3, 3, 5, 5, 5, 5]
    with pytest.raises(ModelError, match="the tokenizer has 260 tokens, the embedding 100 rows"):
        keys_of(renderer, 100)


def test_words_split_in_a_way_that_llama_cpp_lacks_are_refused(tmp_path):
    backend = Tokenizer(models.BPE({c: k for k, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    split = pre_tokenizers.Split(pattern="q", behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    with pytest.raises(ModelError, match="no pre-tokenizer that splits words as this tokenizer does"):
        keys_of(build_renderer(small(tmp_path, backend)), 300)


def test_a_kind_of_tokenizer_that_llama_cpp_lacks_is_refused(tmp_path):
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    with pytest.raises(ModelError, match="a WordLevel that llama"):
        keys_of(build_renderer(small(tmp_path, backend)), 300)
