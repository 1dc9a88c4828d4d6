"""Retrieval: recall beside bm25s on the same chunks, hybrid beside BM25, latency at 100,000 chunks, the rule for citations.

    python bench/retrieve.py [--data ../shared/data] [--model FOLDER] [--chunks 100000] [--parts recall,latency,cite]

Needs `pip install -e ".[bench,retrieve]"`. Results go into bench/results/retrieve.json, part by part; tables: docs/retrieval.md.
A story of FairytaleQA is a text file of its sections; a question's gold is every chunk that overlaps one of its gold sections.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import platform
import random
import re
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

from tunesmith.retrieve import Index, cite, measures
from tunesmith.retrieve.chunks import split
from tunesmith.retrieve.search import MEANING, STOP, asked, fuse
from tunesmith.retrieve.sqlite import driver

OUT = Path(__file__).parent / "results" / "retrieve.json"
KS = (1, 5, 10)
FUSIONS = [(60, 1.0), (60, 0.3), (60, 0.1), (10, 0.1), (5, 0.2), (5, 0.1), (2, 0.1)]  # RRF's k, the weight of vectors beside words


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def fairytales(data: Path, folder: Path) -> tuple[list[dict], dict[str, list[tuple[int, int]]]]:
    """Writes the stories as text files. (questions, story -> [start, end) of its sections by number)."""
    places = {}
    for story in rows(data / "rag/fairytaleqa/documents.jsonl"):
        text, spans = "", []
        for section in story["sections"]:
            text += "\n\n" if text else ""
            spans.append((len(text), len(text) + len(section["text"])))
            text += section["text"]
        (folder / f"{story['id']}.txt").write_text(text, encoding="utf-8")
        places[story["id"]] = spans
    return rows(data / "rag/fairytaleqa/questions.jsonl"), places


def recall(data: Path, model: str | None, split_name: str, keep: Path | None = None) -> dict:
    """`keep`: a folder for the index, so that a second call need not make the vectors again."""
    import bm25s
    import Stemmer

    with nullcontext(keep) if keep else tempfile.TemporaryDirectory() as home:
        stories = Path(home) / "stories"
        stories.mkdir(exist_ok=True)
        questions, places = fairytales(data, stories)
        with Index.create_or_open(Path(home) / "i.sqlite", model) as index:
            began = time.perf_counter()
            index.add(stories)
            took = time.perf_counter() - began
            all_rows = index.store._db.execute(
                'select c.id, d.path, c.start, c."end", c.text from chunk c join document d on d.id = c.document'
            )
            chunks = {row[0]: row[1:] for row in all_rows.fetchall()}
            of_story: dict[str, list[int]] = {}
            for row, (path, *_) in chunks.items():
                of_story.setdefault(Path(path).stem, []).append(row)
            asked_for, golds, held_out = [], [], []
            for q in questions:
                spans = [places[q["document"]][s - 1] for s in q["gold_sections"] if 0 < s <= len(places[q["document"]])]
                gold = {r for r in of_story[q["document"]] for a, b in spans if chunks[r][1] < b and a < chunks[r][2]}
                if gold and (split_name == "all" or q["split"] == split_name):
                    asked_for.append(q["question"])
                    golds.append(gold)
                    held_out.append(q["split"] != "train")
            depth = 50
            words = [index.store.lexical(asked(q), depth) for q in asked_for]
            ids = list(chunks)
            rankings = {"BM25 (FTS5)": [[c for c, _ in r] for r in words]}
            stemmer = Stemmer.Stemmer("english")
            for name, stop in (("bm25s", "en"), ("bm25s, our stop words", sorted(STOP))):
                peer, how = bm25s.BM25(), {"stopwords": stop, "stemmer": stemmer, "show_progress": False}
                peer.index(bm25s.tokenize([chunks[i][3] for i in ids], **how), show_progress=False)
                found, _ = peer.retrieve(bm25s.tokenize(asked_for, **how), k=depth, show_progress=False)
                rankings[name] = [[ids[j] for j in r] for r in found]
            if model:
                vectors = index.embedder()(asked_for, query=True)
                dense = [index.store.dense(v, depth) for v in vectors]
                rankings["vectors"] = [[c for c, _ in r] for r in dense]
                pairs = list(zip(words, dense, strict=True))
                fused = {f"RRF, k = {k}, {w}": [[c for c, _ in fuse(p, (1.0, w), k)[:depth]] for p in pairs] for k, w in FUSIONS}
                fused |= {f"scores, {w}": [_by_scores(*pair, w)[:depth] for pair in pairs] for w in (0.1, 0.2, 0.3)}
                rankings["hybrid"] = [[c for c, _ in fuse(pair, (1.0, MEANING))[:depth]] for pair in pairs]
    out = {"split": split_name, "stories": len(of_story), "chunks": len(ids), "questions": len(golds),
           "add_s": round(took, 1), "model": Path(model).name if model else None}  # fmt: skip
    for name, ranking in rankings.items():
        out[name] = _measured(ranking, golds)
    if model and not all(held_out):
        out["fusions"] = {}
        for name, ranking in {"BM25 alone": rankings["BM25 (FTS5)"], **fused}.items():
            sides = [[(r, g) for r, g, h in zip(ranking, golds, held_out, strict=True) if h == side] for side in (False, True)]
            train, held = (_measured(*map(list, zip(*pairs, strict=True))) for pairs in sides)
            out["fusions"][name] = {"train": {"recall": train["recall"], "mrr": train["mrr"]},
                                      "held_out": {"recall": held["recall"], "mrr": held["mrr"]}}  # fmt: skip
    return out


def _by_scores(words: list, dense: list, weight: float) -> list[int]:
    """Scores in place of ranks: BM25's over its best, cosines from 0 at the last to 1 at the first (Bruch, Gai and Ingber 2023)."""
    scores = {c: s / words[0][1] for c, s in words}
    first, last = dense[0][1], dense[-1][1]
    for c, s in dense:
        scores[c] = scores.get(c, 0.0) + weight * (s - last) / max(first - last, 1e-9)
    return sorted(scores, key=lambda c: (-scores[c], c))


def _measured(rankings: list, golds: list) -> dict:
    m = measures.ranked(rankings, golds, KS)
    found = {kind: {k: round(v, 4) for k, v in getattr(m, kind).items()} for kind in ("recall", "hit", "ndcg")}
    return found | {"mrr": round(m.mrr, 4)}


def percentiles(times: list[float]) -> dict:
    times = sorted(times)
    return {"p50_ms": round(1000 * times[len(times) // 2], 1), "p95_ms": round(1000 * times[int(0.95 * len(times))], 1),
            "max_ms": round(1000 * times[-1], 1)}  # fmt: skip


def latency(data: Path, model: str | None, count: int, questions: int = 300) -> dict:
    """Books cut as documents are; vectors are random, of the model's width, since their values change no time."""
    import numpy as np

    from tunesmith.retrieve import sqlite
    from tunesmith.retrieve.index import Index as Opened

    embedder = None
    if model:
        from tunesmith.retrieve.embed import Embedder

        embedder = Embedder(model)
    rng = np.random.default_rng(0)
    texts = [q["question"] for q in rows(data / "rag/fairytaleqa/questions.jsonl")]
    texts = random.Random(0).sample(texts, questions)
    with tempfile.TemporaryDirectory() as home:
        with Opened.create_or_open(Path(home) / "i.sqlite") as index:
            if embedder:
                index.store.keep({"width": str(embedder.width)})
            began, made = time.perf_counter(), 0
            with lzma.open(data / "pretrain/books.jsonl.xz", "rt", encoding="utf-8") as f:
                for number, line in enumerate(f):
                    chunks = split(json.loads(line)["text"])[: count - made]
                    vectors = None
                    if embedder:
                        vectors = rng.standard_normal((len(chunks), embedder.width), np.float32)
                        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
                    with index.store.changes():
                        index.store.replace(str(number), "", chunks, vectors)
                    made += len(chunks)
                    if made >= count:
                        break
            index.store.tidy()
            took = time.perf_counter() - began
        with Opened.open(Path(home) / "i.sqlite") as index:
            out = {"chunks": index.chunks, "questions": questions, "bytes": index.path.stat().st_size, "made_s": round(took, 1),
                   "words_a_question": round(sum(len(asked(q)) for q in texts) / questions, 1),
                   "cpus": os.cpu_count(), "load": round(os.getloadavg()[0], 1),
                   "sqlite": driver.sqlite_version, "python": platform.python_version(), "postings": sqlite.POSTINGS}  # fmt: skip

            def timed(search) -> dict:
                for q in texts[:20]:  # the file into the cache
                    search(q)
                wall, cpu = [], []
                for q in texts:
                    a, b = time.perf_counter(), time.process_time()
                    search(q)
                    wall.append(time.perf_counter() - a)
                    cpu.append(time.process_time() - b)
                return {"wall": percentiles(wall), "cpu": percentiles(cpu)}

            out["BM25"] = timed(lambda q: index.search(q, 5, by_words=True))
            cut = [[c for c, _ in index.store.lexical(asked(q), 10)] for q in texts]
            limit, sqlite.POSTINGS = sqlite.POSTINGS, 1 << 60
            out["BM25, every word scored"] = timed(lambda q: index.search(q, 5, by_words=True))
            whole = [[c for c, _ in index.store.lexical(asked(q), 10)] for q in texts]
            sqlite.POSTINGS = limit
            pairs = list(zip(cut, whole, strict=True))
            out["same_first"] = round(sum(a[:1] == b[:1] for a, b in pairs) / len(pairs), 3)
            out["same_of_10"] = round(sum(len(set(a) & set(b)) / max(1, len(b)) for a, b in pairs) / len(pairs), 3)
            if embedder:
                index._embedder = embedder
                out["hybrid"] = timed(lambda q: index.search(q, 5))
                out["model"], out["width"] = Path(model).name, embedder.width
    return out


def citations(data: Path) -> dict:
    """What the rule passes: a section's sentences, shortened, cited to their own section and to another of the same story."""
    from tunesmith.retrieve import Passage
    from tunesmith.retrieve.chunks import sentences

    rng, pairs = random.Random(0), []
    for story in rows(data / "rag/fairytaleqa/documents.jsonl"):
        sections = [s["text"] for s in story["sections"]]
        if len(sections) < 2:
            continue
        for _ in range(6):
            own, other = rng.sample(range(len(sections)), 2)
            spans = [sections[own][a:b] for a, b in sentences(sections[own])]
            said = [w for w in re.findall(r"\w+", rng.choice(spans).lower()) if w not in STOP]
            if len(said) >= 5:
                pairs.append((said, sections[own], sections[other]))
    strangers = [w for said, _, _ in pairs for w in said]
    out: dict = {"sentences": len(pairs)}
    kept = cite.SUPPORT
    for support in (0.4, 0.5, 0.6, 0.7, 0.8):
        cite.SUPPORT = support
        shares = {}
        for name, changed in (
            ("own section", 0.0),
            ("own section, a quarter of the words other ones", 0.25),
            ("another section", 0.0),
        ):
            right = 0
            for said, own, other in pairs:
                text = " ".join(rng.choice(strangers) if rng.random() < changed else w for w in said)
                passage = Passage(1, "d", 0, 0, other if name == "another section" else own, 1.0)
                right += not cite.check(f"{text} [1].", [passage]).abstains
            shares[name] = round(right / len(pairs), 3)
        out[str(support)] = shares
    cite.SUPPORT = kept
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[1].parent / "shared" / "data")
    parser.add_argument("--model")
    parser.add_argument("--chunks", type=int, default=100_000)
    parser.add_argument("--split", default="all", help="of FairytaleQA's questions: all, train, val, test")
    parser.add_argument("--keep", type=Path, help="A folder for recall's index, used again.")
    parser.add_argument("--parts", default="recall,latency,cite")
    a = parser.parse_args()
    found = json.loads(OUT.read_text()) if OUT.is_file() else {}
    for part in a.parts.split(","):
        if part == "recall":
            found[part] = recall(a.data, a.model, a.split, a.keep)
        else:
            found[part] = latency(a.data, a.model, a.chunks) if part == "latency" else citations(a.data)
        print(json.dumps({part: found[part]}, indent=1))
        OUT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
