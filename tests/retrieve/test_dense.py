"""Vectors beside words: a tiny random BERT made here, pooled as by hand; hybrid; what is said when something is missing."""

import builtins
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from tunesmith.errors import DataError, MissingExtra, ModelError
from tunesmith.retrieve import Index, sqlite
from tunesmith.retrieve.embed import Embedder

transformers = pytest.importorskip("transformers")
pytest.importorskip("sqlite_vec")
needs_extensions = pytest.mark.skipif(
    not hasattr(sqlite.driver.Connection, "enable_load_extension"), reason="this SQLite loads no extensions"
)

WORDS = ["the", "pump", "valve", "reset", "red", "button", "open", "close", "by", "hand", "fox", "dog", "jumped", "over", "how"]


def tiny_bert(folder, seed=0, **files):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocab = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    torch.manual_seed(seed)
    model = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=len(vocab), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=64,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(exist_ok=True)
        path.with_suffix(".json").write_text(json.dumps(content))
    return folder, model.eval(), backend


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def docs(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    for n, text in enumerate(["reset the pump by hand", "open the valve", "the fox jumped over the dog"]):
        (folder / f"{n}.txt").write_text(text)
    return folder


def test_vectors_are_the_mean_of_the_last_layer(bert):
    folder, model, backend = bert
    texts = ["the fox", "reset the pump by hand", "", "open " * 200]
    found = Embedder(folder)(texts)
    assert found.shape == (4, 16) and found.dtype == np.float32
    for text, vector in zip(texts, found, strict=True):
        ids = backend.encode(text).ids
        ids = ids if len(ids) <= 64 else [*ids[:63], 3]
        with torch.no_grad():
            mean = model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=1e-5)


def test_pooling_prompts_and_length_as_the_folder_says(tmp_path):
    folder, model, backend = tiny_bert(
        tmp_path,
        **{"1_Pooling__config": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
           "config_sentence_transformers": {"prompts": {"query": "how ", "document": ""}},
           "sentence_bert_config": {"max_seq_length": 5}},
    )  # fmt: skip
    vector = Embedder(folder)(["open the valve by hand"], query=True)[0]
    with torch.no_grad():
        first = model(input_ids=torch.tensor([[*backend.encode("how open the valve by hand").ids[:4], 3]])).last_hidden_state[0, 0]
    np.testing.assert_allclose(vector, (first / first.norm()).numpy(), atol=1e-5)
    (folder / "1_Pooling/config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(ModelError, match="pools by pooling_mode_max_tokens"):
        Embedder(folder)


@needs_extensions
def test_hybrid_finds_by_words_and_by_meaning(tmp_path, docs, bert):
    with Index.create_or_open(tmp_path / "i.sqlite", bert[0]) as index:
        assert index.add(docs).documents == 3
    with Index.open(tmp_path / "i.sqlite") as index:  # finds its model by itself
        assert index.model == str(bert[0])
        vectors = Embedder(bert[0])(["reset the pump by hand", "open the valve", "the fox jumped over the dog"])
        for question in ("reset", "close seconds"):
            near = np.argsort(-vectors @ Embedder(bert[0])([question], query=True)[0])
            assert [row - 1 for row, _ in index.store.dense(index.embedder()([question])[0], 3)] == near.tolist()
        assert index.search("pump hand")[0].document == "docs/0.txt"
        assert len(index.search("close seconds", k=10**6)) == 3 and len(index.store.dense(vectors[0], 10**6)) == 3
        assert index.search("close seconds", by_words=True) == []
        (docs / "0.txt").write_text("the dog")
        (docs / "1.txt").unlink()
        assert index.add(docs).removed == 1
        assert index.store._one("select count(*) from vectors") == index.chunks == 2
        assert index.store.dense(Embedder(bert[0])(["the dog"])[0], 1)[0][1] == pytest.approx(1, abs=1e-5)


@needs_extensions
def test_one_index_has_one_model(tmp_path, docs, bert):
    (tmp_path / "other").mkdir()
    other = tiny_bert(tmp_path / "other", seed=1)[0]
    with Index.create_or_open(tmp_path / "i.sqlite", bert[0]) as index:
        index.add(docs)
    with pytest.raises(DataError, match="another embedding model"):
        Index.create_or_open(tmp_path / "i.sqlite", other)
    Index.create_or_open(tmp_path / "i.sqlite", bert[0]).close()
    with Index.create_or_open(tmp_path / "words.sqlite") as index:
        index.add(docs)
    with pytest.raises(DataError, match="without an embedding model"):
        Index.create_or_open(tmp_path / "words.sqlite", bert[0])


@needs_extensions
def test_a_model_that_changed_is_told(tmp_path, docs):
    (tmp_path / "m").mkdir()
    folder = tiny_bert(tmp_path / "m")[0]
    with Index.create_or_open(tmp_path / "i.sqlite", folder) as index:
        index.add(docs)
    tiny_bert(folder, seed=5)
    with Index.open(tmp_path / "i.sqlite") as index:
        with pytest.raises(DataError, match="has changed since"):
            index.search("pump")
        assert index.search("pump", by_words=True)


def test_without_the_extra_only_meaning_is_missing(tmp_path, docs, bert, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "sqlite_vec":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=r"needs sqlite-vec, which is not installed\nfix: .*\[retrieve\]"):
        Index.create_or_open(tmp_path / "i.sqlite", bert[0])
    with Index.create_or_open(tmp_path / "i.sqlite") as index:
        index.add(docs)
        assert index.search("pump")


def test_a_sqlite_without_extensions_is_told(monkeypatch):
    with pytest.raises(MissingExtra, match="built without extensions\nfix: pip install pysqlite3-binary"):
        sqlite.load_extension(object())


def test_no_code_from_the_folder_and_no_pickles(tmp_path, bert):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "evil", "auto_map": {"AutoModel": "evil.Model"}, "architectures": ["X"]})
    )
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    (tmp_path / "tokenizer.json").write_bytes((bert[0] / "tokenizer.json").read_bytes())
    with pytest.raises(ModelError, match="cannot be loaded as an encoder"):
        Embedder(tmp_path)
    (tmp_path / "config.json").write_bytes((bert[0] / "config.json").read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be loaded as an encoder"):
        Embedder(tmp_path)
    with pytest.raises(ModelError, match="no such folder"):
        Embedder("no/such/folder/at/all")


def test_a_hub_model_is_pinned_and_found_again_without_the_hub(tmp_path, docs, bert, monkeypatch):
    """A stand-in for the hub: the cache's folder of a commit."""
    from tunesmith import hub

    commit, asked = "a" * 40, []
    snapshot = tmp_path / "cache" / commit
    snapshot.parent.mkdir()
    snapshot.symlink_to(bert[0])
    monkeypatch.setattr(hub, "_snapshot", lambda **how: asked.append(how) or str(snapshot))
    first = Embedder("o/m")
    assert first.name == f"o/m@{commit}" and "1_Pooling/config.json" in asked[1]["allow_patterns"]
    assert not any("local_files_only" in how for how in asked)
    asked.clear()
    again = Embedder(first.name, offline=True)
    assert again.identity == first.identity and all(how["local_files_only"] and how["revision"] == commit for how in asked)


def test_words_need_no_torch(tmp_path, docs):
    code = f"""
import sys
from tunesmith.retrieve import Index
with Index.create_or_open({str(tmp_path / "i.sqlite")!r}) as index:
    index.add({str(docs)!r})
    assert index.search("pump")
print(sorted({{m.split(".")[0] for m in sys.modules}} & {{"torch", "transformers", "numpy", "pyarrow"}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers"} & set(eval(done.stdout))
