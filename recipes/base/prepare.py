"""Pretraining text for the small base model: five permissive sources in, one jsonl a source out, held-out documents kept apart.

    python recipes/base/prepare.py --data FOLDER --out .cache/base --max-mb 150 --pack

FOLDER holds `pretrain/*.jsonl.xz` (see README.md for sources, licences and sha256) and, if present, `rag/fairytaleqa`: paragraphs
that share a run of words with its test stories, or with a document held out, are left out, so that the tests are tests. Three
passes, one document in memory at a time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

SOURCES = {  # file in FOLDER/pretrain -> name here; the small and simple first: they are always taken whole
    "storybooks_ccby": "storybooks",
    "childrens_books": "childrens",
    "factbook_cc0": "factbook",
    "openstax_ccby": "openstax",
    "books": "books",
}
WHOLE = ("storybooks", "childrens", "factbook")
OPENSTAX_SHARE = 0.35  # of what is left after WHOLE; the rest is books, simplest words first
HELD_OUT = {
    "storybooks": 0.04,
    "childrens": 0.06,
    "factbook": 0.04,
    "openstax": 0.02,
    "books": 0.01,
}  # share of documents, at least 2
PIECE = 64 * 1024  # longest row in bytes, cut at a paragraph: a row's end teaches an end of text, so cuts are kept rare
SAMPLE_ROWS, SAMPLE_BYTES = 16, 4096  # per source, for the loss watched during training
PACKED = (
    "train",
    "held_out",
    "account.json",
    "init",
    "instruct.jsonl",
    "drills.jsonl",
    "scope.jsonl",
    "gist.jsonl",
    "tales.jsonl",
    "reading.jsonl",
    "reading_held_out.jsonl",
)
RUN, STRIDE = 10, 8  # words: every shared run of RUN + STRIDE - 1 words is found
WORD = re.compile(r"[a-z]+")


def documents(path: Path) -> Iterator[tuple[str, str]]:
    """(key, text) of each document; the key is the same for two printings of one title in a source of short stories."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield (row["title"].lower() if path.name.startswith("storybooks") else row["path"]), row["text"]


def rank(source: str, key: str) -> str:
    """A document's place in a fixed shuffle: the smallest are held out. Depends on nothing but its name."""
    return hashlib.sha256(f"{source}/{key}".encode()).hexdigest()


def held_out_keys(source: str, keys: set[str]) -> set[str]:
    count = max(2, round(HELD_OUT[source] * len(keys)))
    return set(sorted(keys, key=lambda key: rank(source, key))[:count])


def runs_of(text: str) -> Iterator[str]:
    words = WORD.findall(text.lower())
    return (" ".join(words[i : i + RUN]) for i in range(len(words) - RUN + 1))


def test_runs(folder: Path) -> set[str]:
    """Every run of RUN words in fairytaleqa's test stories; empty where the folder is absent."""
    runs: set[str] = set()
    path = folder / "rag/fairytaleqa/documents.jsonl"
    if path.is_file():
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                if row["split"] == "test":
                    runs.update(runs_of(" ".join(s["text"] for s in row["sections"])))
    return runs


def held_out_runs(data: Path, held: dict[str, set[str]]) -> set[str]:
    """The same of the documents held out: a third of a children's book can stand in another edition among the books. Factbook
    entries share their wording from country to country and are left out.
    """
    texts = ((source, *d) for file, source in SOURCES.items() if source != "factbook"
             for d in documents(data / "pretrain" / f"{file}.jsonl.xz"))  # fmt: skip
    return {run for source, key, text in texts if key in held[source] for run in runs_of(text)}


def shares_run(paragraph: str, runs: set[str]) -> bool:
    words = WORD.findall(paragraph.lower())
    return any(" ".join(words[i : i + RUN]) in runs for i in range(0, len(words) - RUN + 1, STRIDE))


def pieces(text: str, size: int) -> Iterator[str]:
    """The text in rows of at most `size` bytes, cut between paragraphs; a longer paragraph stays whole."""
    rows: list[str] = []
    length = 0
    for paragraph in text.split("\n\n"):
        more = len(paragraph.encode()) + 2
        if rows and length + more > size:
            yield "\n\n".join(rows)
            rows, length = [], 0
        rows.append(paragraph)
        length += more
    if rows:
        yield "\n\n".join(rows)


def choose(data: Path, max_bytes: int) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """First pass: which documents are held out and which are trained on, per source."""
    held: dict[str, set[str]] = {}
    taken: dict[str, set[str]] = {}
    simple: Counter[str] = Counter()
    common: set[str] = set()
    left = max_bytes
    for file, source in SOURCES.items():
        size: Counter[str] = Counter()
        hard: dict[str, float] = {}
        for key, text in documents(data / "pretrain" / f"{file}.jsonl.xz"):
            size[key] += len(text.encode())
            if source in ("storybooks", "childrens"):
                simple.update(WORD.findall(text.lower()))
            elif source == "books":  # share of words outside the 2,000 commonest of children's books, past the front matter
                common = common or {word for word, _ in simple.most_common(2000)}
                words = WORD.findall(text[4096 : 4096 + 65536].lower())
                hard[key] = sum(word not in common for word in words) / max(len(words), 1)
        held[source] = held_out_keys(source, set(size))
        rest = sorted(set(size) - held[source], key=lambda key: (hard.get(key, 0), rank(source, key)))
        budget = left if source != "openstax" else int(left * OPENSTAX_SHARE)
        taken[source] = set()
        for key in rest:
            if source in WHOLE or size[key] <= budget:
                taken[source].add(key)
                budget -= size[key]
                left -= size[key]
    return held, taken


def write(data: Path, out: Path, max_bytes: int) -> dict[str, dict[str, int]]:
    """Second pass. Returns per source: documents, rows, bytes trained; documents, bytes held out; paragraphs left out."""
    held, taken = choose(data, max_bytes)
    runs = test_runs(data) | held_out_runs(data, held)
    for folder in ("train", "held_out"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    account = {}
    with (out / "held_out/sample.jsonl").open("w", encoding="utf-8") as sample:
        for file, source in SOURCES.items():
            n: Counter[str] = Counter(documents=0, rows=0, bytes=0, held_out_documents=0, held_out_bytes=0, paragraphs_left_out=0)
            train_path, held_path = out / f"train/{source}.jsonl", out / f"held_out/{source}.jsonl"
            with train_path.open("w", encoding="utf-8") as train, held_path.open("w", encoding="utf-8") as kept:
                sampled = 0
                for key, text in documents(data / "pretrain" / f"{file}.jsonl.xz"):
                    if key in held[source]:
                        n["held_out_documents"] += 1
                        n["held_out_bytes"] += len(text.encode())
                        kept.write(json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n")
                        for _, piece in zip(range(4), pieces(text, SAMPLE_BYTES), strict=False):
                            if sampled < SAMPLE_ROWS and len(piece.encode()) <= 2 * SAMPLE_BYTES:
                                sample.write(json.dumps({"text": piece}, ensure_ascii=False) + "\n")
                                sampled += 1
                    elif key in taken[source]:
                        if source != "factbook":
                            paragraphs = text.split("\n\n")
                            clean = [p for p in paragraphs if not shares_run(p, runs)]
                            n["paragraphs_left_out"] += len(paragraphs) - len(clean)
                            text = "\n\n".join(clean)
                        n["documents"] += 1
                        for piece in pieces(text, PIECE):
                            if len(piece) >= 80:  # shorter is a caption
                                train.write(json.dumps({"text": piece}, ensure_ascii=False) + "\n")
                                n["rows"] += 1
                                n["bytes"] += len(piece.encode())
            account[source] = dict(n)
    (out / "account.json").write_text(json.dumps(account, indent=1) + "\n")
    return account


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds pretrain/*.jsonl.xz")
    parser.add_argument("--out", type=Path, default=Path(".cache/base"))
    parser.add_argument("--max-mb", type=float, default=150, help="about how much text to train on, in MB")
    parser.add_argument("--pack", action="store_true", help="also write corpus.tar.xz: all that is in OUT but weights")
    args = parser.parse_args()
    account = write(args.data, args.out, int(args.max_mb * 1e6))
    for source, n in account.items():
        print(f"{source:11}", "  ".join(f"{key} {value:,}" for key, value in n.items()))
    print(f"{sum(n['bytes'] for n in account.values()) / 1e6:.1f} MB of text to train on, in {args.out}/train")
    if args.pack:
        packed = args.out / "corpus.tar.xz"
        with tarfile.open(packed, "w:xz", preset=6) as tar:
            for name in PACKED:
                if (args.out / name).exists():
                    tar.add(args.out / name, arcname=name, filter=lambda item: None if item.name.endswith(".safetensors") else item)
        print(f"{packed}: {packed.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
