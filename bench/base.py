"""How good the small base model is: bits per byte on held-out documents, and answers to questions on a passage.

    python bench/base.py --data FOLDER --prepared .cache/base [--model embedded] [--only bits | xz | reading]

`--prepared` is the folder that recipes/base/prepare.py wrote: every model is scored on the bytes of its `held_out`, and xz is
primed with its `train`. FOLDER holds `weights/TinyStories-656K`, `weights/stories260K` and `rag/fairytaleqa`; what is absent is
left out.
Prints tables and writes results/base.json; a second call with another `--model` or `--only` adds to it.

Bits per byte: a document is read in windows as long as the model's context that move on by half of it, so all but a document's
beginning is predicted from at least half a context. Models with a beginning-of-text token get it in front of each window; where
there is none, nothing predicts the first token, which costs log2(vocabulary). A byte that a vocabulary cannot say costs 8 bits.
xz (-9e) reads all the source's training text first; a document costs what it adds, and the next one begins from there again.

Reading: FairytaleQA's test split, token F1 as in SQuAD (lower case, no punctuation, no articles), the best of the given answers;
the gold sections in the prompt, or the question alone. Beside it the passage's sentence that shares most words with the question.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import os
import re
import string
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
SOURCES = ("storybooks", "childrens", "factbook", "openstax")
TARGETS = {"storybooks": 1.65, "childrens": 1.95, "factbook": 1.45, "openstax": 1.75}
AT_ONCE = 16_384  # tokens in a forward pass
ANSWER = 48  # longest answer in tokens
WITH = "Read the text and answer the question.\n\n{passage}\n\nQuestion: {question}"
WITHOUT = "{question}"
ARTICLES = re.compile(r"\b(?:a|an|the)\b")
SENTENCE = re.compile(r"(?<=[.!?])[\"')\u201d\u2019]*\s+")
Encode = Callable[[str], tuple[Sequence[int], int]]  # text -> its ids, and the bytes that its vocabulary cannot say
XZ = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}


# ---- bits per byte -------------------------------------------------------------------------------------------------------------


def windows(count: int, room: int) -> Iterator[tuple[int, int, int]]:
    """(start, first, end) of each window over `count` tokens: it holds start..end and is asked for first..end, each token once."""
    start = first = 0
    while first < count:
        end = min(count, start + room)
        yield start, first, end
        first, start = end, end - room // 2


@torch.no_grad()
def bits(model, ids: Sequence[int], *, context: int, bos: int | None, at_once: int = AT_ONCE) -> float:
    """Bits the model needs for a document's tokens."""
    from tunesmith.ops.attention import Layout

    device, lead = next(model.parameters()).device, [] if bos is None else [bos]
    total, held = (0.0 if lead else math.log2(model.vocab)), []

    def score() -> float:
        tokens, rows, labels, at = [], [], [], 0
        for start, first, end in held:
            text = [*lead, *ids[start:end]]
            asked = range(max(first - start + len(lead), 1), len(text))
            rows += [at + i - 1 for i in asked]
            labels += [text[i] for i in asked]
            tokens += text
            at += len(text)
        layout = Layout.of([end - start + len(lead) for start, _, end in held], device)
        x = model.hidden(torch.tensor(tokens, device=device), layout, rows=torch.tensor(rows, device=device))
        parts = zip(x.split(4096), torch.tensor(labels, device=device).split(4096), strict=True)
        return sum(F.cross_entropy(model.logits(h).float(), y, reduction="sum").item() for h, y in parts) / math.log(2)

    for window in windows(len(ids), context - len(lead)):
        if held and sum(end - start for start, _, end in held) + window[2] - window[0] > at_once:
            total += score()
            held = []
        held.append(window)
    return total + (score() if held else 0.0)


def per_byte(model, encode: Encode, texts: Iterable[str], *, context: int, bos: int | None) -> float:
    needed = size = 0.0
    for text in texts:
        ids, unknown = encode(text)
        needed += bits(model, ids, context=context, bos=bos) + 8 * unknown
        size += len(text.encode())
    return needed / size


def xz(training: Iterable[str], texts: Iterable[str]) -> float:
    """Bits per byte that xz needs for each text after the training text. A forked process goes on from the primed compressor."""
    compressor = lzma.LZMACompressor(format=lzma.FORMAT_RAW, filters=[{**XZ, "dict_size": 256 << 20}])
    primed = sum(len(compressor.compress(text.encode())) for text in training)

    def rest(data: bytes) -> int:
        """Bytes that come out when the text is `data` and then ends."""
        reads, writes = os.pipe()
        if not (child := os.fork()):
            os.write(writes, str(len(compressor.compress(data)) + len(compressor.flush())).encode())
            os._exit(0)
        os.close(writes)
        with os.fdopen(reads) as answer:
            found = int(answer.read())
        os.waitpid(child, 0)
        return found

    nothing, added, size = rest(b""), 0, 0
    assert primed + nothing >= 0
    for text in texts:
        added += rest(text.encode()) - nothing
        size += len(text.encode())
    return 8 * added / size


def texts_of(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


# ---- the two models that others trained ----------------------------------------------------------------------------------------


def stories260k(folder: Path, out: Path) -> Path:
    """llama2.c's .bin and its tokenizer as a Hugging Face folder: its rope turns neighbours, ours (and theirs) halves."""
    from safetensors.torch import save_file

    raw = (folder / "stories260K.bin").read_bytes()
    dim, hidden, layers, heads, kv, vocab, context = struct.unpack("<7i", raw[:28])
    flat, width, at = torch.frombuffer(bytearray(raw[28:]), dtype=torch.float32), dim // heads, 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal at
        size = math.prod(shape)
        at += size
        return flat[at - size : at].view(*shape)

    def halves(w: torch.Tensor, count: int) -> torch.Tensor:
        return w.view(layers, count, width // 2, 2, dim).transpose(2, 3).reshape(layers, count * width, dim)

    tensors, name = {"model.embed_tokens.weight": take(abs(vocab), dim)}, "model.layers.{}."
    stacks = {"input_layernorm": take(layers, dim), "self_attn.q_proj": halves(take(layers, heads * width, dim), heads)}
    stacks["self_attn.k_proj"] = halves(take(layers, kv * width, dim), kv)
    stacks |= {"self_attn.v_proj": take(layers, kv * width, dim), "self_attn.o_proj": take(layers, dim, heads * width)}
    stacks |= {"post_attention_layernorm": take(layers, dim), "mlp.gate_proj": take(layers, hidden, dim)}
    stacks |= {"mlp.down_proj": take(layers, dim, hidden), "mlp.up_proj": take(layers, hidden, dim)}
    tensors |= {f"{name.format(i)}{part}.weight": w[i].clone() for part, w in stacks.items() for i in range(layers)}
    tensors["model.norm.weight"] = take(dim)
    assert vocab > 0, "a head of its own is not read here"
    save_file({k: v.contiguous() for k, v in tensors.items()}, out / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": dim,
        "intermediate_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
        "max_position_embeddings": context, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config))
    _llama2c_tokenizer(folder / "tok512.bin", vocab).save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return out


def _llama2c_tokenizer(path: Path, vocab: int):
    """Its pieces with their scores as a BPE: of all pairs that join to a piece, the one with the highest score first."""
    from tokenizers import Tokenizer, models

    raw, at, scored = path.read_bytes(), 4, []
    for _ in range(vocab):
        score, size = struct.unpack("<fi", raw[at : at + 8])
        scored.append((raw[at + 8 : at + 8 + size].decode("utf-8"), score))
        at += 8 + size
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *(piece for piece, _ in scored[259:])]
    rank = {piece: i for i, (piece, _) in enumerate(scored) if i >= 259}
    pairs = [(scored[i][1], p[:k], p[k:]) for p, i in rank.items() for k in range(1, len(p)) if p[:k] in rank and p[k:] in rank]
    merges = [(a, b) for _, a, b in sorted(pairs, key=lambda pair: -pair[0])]
    return Tokenizer(models.BPE({n: i for i, n in enumerate(names)}, merges, unk_token="<unk>", byte_fallback=True))


def others(data: Path, work: Path) -> Iterator[tuple[str, Any, Encode, int, int]]:
    """(name, model, encode, context, bos) of those whose weights are in FOLDER/weights."""
    from tokenizers import Tokenizer

    from tunesmith import models
    from tunesmith.generate import context

    tiny, small = data / "weights/TinyStories-656K", data / "weights/stories260K"
    if (tiny / "model.safetensors").is_file():
        words, model = Tokenizer.from_file(str(tiny / "tokenizer.json")), models.load(tiny).eval()
        yield "TinyStories-656K", model, _counted(words, 0), context(model), 1
    if (small / "stories260K.bin").is_file():
        work.mkdir(exist_ok=True)
        model = models.load(stories260k(small, work)).eval()
        words = Tokenizer.from_file(str(work / "tokenizer.json"))
        yield "stories260K", model, _counted(words, 0, " "), context(model), 1


def _counted(tokenizer, unknown: int, lead: str = "") -> Encode:
    """TinyStories-656K has no token for brackets, percent and curly quotes: what its unknown token stands for costs as well."""

    def encode(text: str) -> tuple[Sequence[int], int]:
        found, whole = tokenizer.encode(lead + text, add_special_tokens=False), lead + text
        loose = (whole[a:b] for i, (a, b) in zip(found.ids, found.offsets, strict=True) if i == unknown)
        return found.ids, sum(len(span.encode()) for span in loose)

    return encode


# ---- reading -------------------------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """Lower case, no punctuation, no articles: SQuAD's normalisation."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation and c not in "\u2018\u2019\u201c\u201d")
    return ARTICLES.sub(" ", plain).split()


def f1(answer: str, golds: Iterable[str]) -> float:
    """Token F1 with the best of the given answers, 0 to 1."""
    best, said = 0.0, Counter(words(answer))
    for gold in golds:
        wanted = Counter(words(gold))
        shared = sum((said & wanted).values())
        if shared:
            best = max(best, 2 * shared / (said.total() + wanted.total()))
        elif not said and not wanted:
            best = 1.0
    return best


def best_sentence(passage: str, question: str) -> str:
    """The sentence that shares most words with the question; the first of equals."""
    asked = set(words(question))
    return max(SENTENCE.split(passage.replace("\n", " ")), key=lambda s: len(asked & set(words(s))))


def test_questions(data: Path, split: str = "test") -> list[dict[str, Any]]:
    """{question, answers, passage} of FairytaleQA's split; the passage is all gold sections."""
    sections: dict[str, dict[int, str]] = {}
    with (data / "rag/fairytaleqa/documents.jsonl").open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            sections[row["id"]] = {s["section"]: s["text"] for s in row["sections"]}
    with (data / "rag/fairytaleqa/questions.jsonl").open(encoding="utf-8") as lines:
        return [
            {
                "question": row["question"].strip(),
                "answers": row["answers"],
                "passage": "\n\n".join(sections[row["document"]][i] for i in row["gold_sections"]),
            }
            for row in map(json.loads, lines)
            if row["split"] == split
        ]


def reading(talker, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """F1 x 100 with and without the passage, with a few answers to look at."""
    from tunesmith.generate import generate
    from tunesmith.types import Message

    found: dict[str, Any] = {"questions": len(rows)}
    for name, form in (("with_passage", WITH), ("without", WITHOUT)):
        prompts = [talker.renderer.prompt([Message("user", form.format(**row))]) for row in rows]
        order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
        room = talker.context - ANSWER if talker.context else math.inf
        asked = [prompts[i] if len(prompts[i]) <= room else prompts[i][: int(room)] for i in order]
        made = generate(talker.model, asked, stop_ids=sorted(talker.renderer.stop_ids), max_tokens=ANSWER)
        answers = {i: talker.renderer.tokenizer.decode(ids, skip_special=True).strip() for i, ids in zip(order, made, strict=True)}
        found[name] = 100 * sum(f1(answers[i], row["answers"]) for i, row in enumerate(rows)) / len(rows)
        found[f"{name}_examples"] = [[rows[i]["question"], answers[i], rows[i]["answers"][0]] for i in range(0, len(rows), 101)]
        found[f"{name}_cut"] = sum(len(p) > room for p in prompts)
    return found


# ---- the whole -----------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with weights/ and rag/fairytaleqa")
    parser.add_argument("--prepared", type=Path, default=Path(".cache/base"), help="folder with held_out/ and train/")
    parser.add_argument("--model", default="embedded", help="ours: a Hugging Face folder, a run folder, or `embedded`")
    parser.add_argument("--name", default="ours", help="its name in the table")
    parser.add_argument(
        "--only", choices=("bits", "xz", "others", "reading"), action="append", help="do this alone; may be repeated"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results/base.json")
    parser.add_argument("--questions", type=int, help="read only this many questions")
    args = parser.parse_args()
    parts = args.only or ["bits", "others", "xz", "reading"]
    result = json.loads(args.out.read_text()) if args.out.is_file() else {"bits_per_byte": {}, "reading": {}}
    held = {name: list(texts_of(args.prepared / f"held_out/{name}.jsonl")) for name in SOURCES}
    result["held_out_bytes"] = {name: sum(len(t.encode()) for t in texts) for name, texts in held.items()}
    table = result["bits_per_byte"]

    def keep(name: str, score: Callable[[str], float]) -> None:
        began = time.monotonic()
        table[name] = {source: round(score(source), 4) for source in SOURCES}
        print(
            f"{name:20}",
            "  ".join(f"{s} {v:.3f}" for s, v in table[name].items()),
            f"  {time.monotonic() - began:.0f} s",
            flush=True,
        )

    talker = None
    if {"bits", "reading"} & set(parts):
        from tunesmith.chat import Talker

        talker = Talker.open(args.model)
    if "bits" in parts:
        keep(
            args.name,
            lambda s: per_byte(
                talker.model, lambda t: (talker.renderer.tokenizer.encode(t), 0), held[s], context=talker.context, bos=None
            ),
        )
    if "others" in parts:
        with tempfile.TemporaryDirectory() as work:
            for name, model, encode, context, bos in others(args.data, Path(work)):
                keep(name, lambda s, m=model, e=encode, c=context, b=bos: per_byte(m, e, held[s], context=c, bos=b))
    if "xz" in parts:
        keep("xz, primed", lambda s: xz(texts_of(args.prepared / f"train/{s}.jsonl"), held[s]))
    if "reading" in parts and (args.data / "rag/fairytaleqa").is_dir():
        rows = test_questions(args.data)[: args.questions]
        sentence = sum(f1(best_sentence(r["passage"], r["question"]), r["answers"]) for r in rows) / len(rows)
        result["reading"][args.name] = reading(talker, rows)
        result["reading"]["best sentence"] = {"questions": len(rows), "with_passage": 100 * sentence}
        for name, row in result["reading"].items():
            print(f"{name:20}", "  ".join(f"{k} {row[k]:.1f}" for k in ("with_passage", "without") if k in row), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    show(result)


def show(result: dict[str, Any]) -> None:
    print("\n| bits per byte |", " | ".join(SOURCES), "|\n|---|" + "---|" * len(SOURCES))
    for name, row in result["bits_per_byte"].items():
        print(f"| {name} |", " | ".join(f"{row[s]:.2f}" for s in SOURCES), "|")
    print("| at most |", " | ".join(f"{TARGETS[s]:.2f}" for s in SOURCES), "|")
    for name, row in result["reading"].items():
        print(
            f"reading, {name}: F1 {row['with_passage']:.1f} with the passage"
            + (f", {row['without']:.1f} without" if "without" in row else "")
        )


if __name__ == "__main__":
    main()
