"""What the findings find: precision and recall on planted faults, false alarms on sets as they are, duplicates, cost.

    python bench/findings.py --clean A.jsonl [B.json ...] [--share 0.02] [--json out.json]     planted faults and false alarms
    python bench/findings.py --cost A.jsonl --tokenizer FOLDER [--times 4] [--rounds 3]      rows per CPU-second with and without
    python bench/findings.py --duplicates A.jsonl                                           near duplicates against datasketch
    python bench/findings.py --evaluations NAME[@WORDS]=QUESTIONS.jsonl:KEY ... --against A.jsonl    makes evaluations.bin

Faults are planted in a share of the rows of each clean set, one kind at a time, from a seed. Precision counts a found row as wrong
when nothing was planted in it; so what the set itself has wrong lowers it, and `own` tells how many rows that were. Of faults that
only many rows show, `found` tells in how many of the trials.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import numpy as np

from tunesmith.data import clusters, findings, formats, sources
from tunesmith.data.findings import evaluations
from tunesmith.data.findings.text import LENGTHS, Rows, luhn
from tunesmith.types import Conversation, Message

CHUNK = 1024


# ---- planting ------------------------------------------------------------------------------------------------------------------


def digits(r: random.Random, n: int) -> str:
    return "".join(r.choice("0123456789") for _ in range(n))


def letters(r: random.Random, n: int, of: str = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789") -> str:
    return "".join(r.choice(of) for _ in range(n))


def card(r: random.Random) -> str:
    start = r.choice(("4", "51", "55", "37", "6011"))
    size = 15 if start == "37" else 16
    body = start + digits(r, size - 1 - len(start))
    full = next(body + d for d in "0123456789" if luhn(body + d))
    parts = [full[:4], full[4:10], full[10:]] if start == "37" else [full[i : i + 4] for i in range(0, size, 4)]
    return r.choice((full, " ".join(parts), "-".join(parts)))


def iban(r: random.Random) -> str:
    country = r.choice(("DE", "FR", "NL", "ES", "CH", "AT", "BE", "PL", "GB"))
    size = int(LENGTHS[country]) - 4
    bban = {"NL": "ABNA", "GB": "NWBK"}.get(country, "")
    bban += digits(r, size - len(bban))
    check = 98 - int("".join(str(int(c, 36)) for c in bban + country + "00")) % 97
    full = f"{country}{check:02}{bban}"
    return r.choice((full, " ".join(full[i : i + 4] for i in range(0, len(full), 4))))


def phone(r: random.Random) -> str:
    return r.choice((
        f"+49 {r.choice(('30', '171', '89'))} {digits(r, 7)}", f"+1 {r.randint(201, 989)}-{r.randint(200, 999)}-{digits(r, 4)}",
        f"({r.randint(201, 989)}) {r.randint(200, 999)}-{digits(r, 4)}",
            f"{r.randint(201, 989)}.{r.randint(200, 999)}.{digits(r, 4)}",
        f"+44 20 {digits(r, 4)} {digits(r, 4)}", f"0171 {digits(r, 7)}",
            f"+33 {r.randint(1, 9)} {' '.join(digits(r, 2) for _ in range(4))}",
    ))  # fmt: skip


def key(r: random.Random) -> str:
    return r.choice((
        "sk-" + letters(r, 40), "ghp_" + letters(r, 36), "hf_" + letters(r, 34),
            "AKIA" + letters(r, 16, "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"),
        "AIza" + letters(r, 35), "xoxb-" + digits(r, 12) + "-" + letters(r, 24),
            f"password = {letters(r, 6)}{digits(r, 4)}{letters(r, 2)}",
        f"API_KEY={letters(r, 20)}7x",
    ))  # fmt: skip


def ip(r: random.Random) -> str:
    return f"{r.choice((8, 23, 52, 81, 141, 185))}.{r.randint(0, 255)}.{r.randint(0, 255)}.{r.randint(1, 254)}"


def pem(r: random.Random) -> str:
    body = "\n".join(letters(r, 64) for _ in range(8))
    kind = r.choice(("RSA ", "", "EC ", "OPENSSH "))
    return f"-----BEGIN {kind}PRIVATE KEY-----\n{body}\n-----END {kind}PRIVATE KEY-----"


def email(r: random.Random) -> str:
    end = r.choice(("com", "de", "co.uk", "org"))
    return f"{letters(r, 5, 'abcdefgh')}.{letters(r, 6, 'ijklmnop')}@{letters(r, 7, 'qrstuv')}.{end}"


def inside(text: str, what: str, r: random.Random) -> str:
    """Between two words."""
    gaps = [i for i, c in enumerate(text) if c == " "] or [len(text)]
    at = r.choice(gaps)
    return f"{text[:at]} {what}{text[at:]}"


def answer(c: Conversation, change) -> Conversation:
    last = max(i for i, m in enumerate(c.messages) if m.role in ("assistant", "completion"))
    m = c.messages[last]
    return Conversation((*c.messages[:last], Message(m.role, change(m.content)), *c.messages[last + 1 :]), c.origin, c.kind)


def prompt(c: Conversation) -> str:
    return next((m.content for m in reversed(c.messages) if m.role in ("user", "prompt")), "")


def put(make):
    return lambda c, r: answer(c, lambda a: inside(a, make(r), r))


def cut(c: Conversation, r: random.Random) -> Conversation | None:
    text = c.messages[-1].content
    if len(text) < 200:
        return None
    return answer(c, lambda a: a[: r.randint(len(a) // 2, len(a) - 20)])  # anywhere, so often in a word


def order(c: Conversation, r: random.Random) -> Conversation | None:
    if c.kind != "chat":
        return None
    m = c.messages
    wrong = r.choice(((*m, Message("user", "And then?")), tuple(reversed(m)), (*m, Message("system", "Be brief.")), m[1:] + m[:1]))
    return Conversation(wrong, c.origin, c.kind)


def damage(c: Conversation, r: random.Random) -> Conversation:
    word = r.choice(("café", "Müller", "naïve", "it’s", "“yes”", "10 €", "año", "Größe", "déjà vu"))
    bad = word.encode().decode(r.choice(("latin-1", "cp1252")), "replace") if r.random() < 0.85 else word[:2] + "\ufffd"
    return answer(c, lambda a: inside(a, bad, r))


REFUSALS = (
    "I'm sorry, but I can't help with that.", "I cannot assist with that request.", "I am unable to provide this information.",
    "Sorry, I can't answer that question.", "Unfortunately, I cannot help you with this.", "I’m sorry, I am not able to do this.",
    "I won't help with that.", "I apologize, but I cannot fulfill this request.", "I must decline this request.",
)  # fmt: skip
BOILERPLATE = (
    "As an AI language model, I do not have feelings.", "As an AI, I think of it like this.",
        "I'm just an AI assistant, so check it.",
    "My knowledge cutoff is 2021.", "I was trained by OpenAI to help.", "As a large language model, I cannot know.",
    "I don't have personal opinions on it.", "Since I'm an artificial intelligence, I never sleep.",
)  # fmt: skip
PLANT = {
    "private_key": put(pem),
    "api_key": put(key),
    "card": put(card),
    "iban": put(iban),
    "email": put(email),
    "phone": put(phone),
    "ip_address": put(ip),
    "conflict_markers": lambda c, r: answer(
        c, lambda a: f"<<<<<<< HEAD\n{a}\n=======\n{a[::-1]}\n>>>>>>> {letters(r, 7, 'abcdef')}"),
    "placeholder": lambda c, r: answer(c, lambda a: r.choice(("N/A", "null", "-", "TODO", "...", "None.", "[Your answer here]",
        "?", "nan"))),
    "mojibake": damage,
    "control_characters": put(lambda r: "a" + r.choice("\x00\x01\x07\x08\x0b\x1b\x7f\x93") + "b"),
    "invisible": lambda c, r: answer(
        c, lambda a: a[: len(a) // 2] + r.choice("\u200b\u2060\u202e\u2066\u00ad\U000e0041") + a[len(a) // 2 :]),
    "special_tokens": put(lambda r: r.choice(("<|im_end|>", "<|im_start|>user", "</s>", "[INST]", "<|endoftext|>",
        "<|eot_id|>", "<<SYS>>",
                                              "<end_of_turn>", "<s>", "[/INST]"))),
    "role_order": order,
    "prompt_in_answer": lambda c, r: answer(c, lambda a: r.choice((f"{prompt(c)}\n\n{a}", f"{a}\n\nUser: and now?\nAssistant: {a}",
                                                                  f"### Instruction:\n{prompt(c)}\n### Response:\n{a}"))),
    "truncated": cut,
    "refusal": lambda c, r: answer(c, lambda a: r.choice(REFUSALS)),
    "boilerplate": lambda c, r: answer(
        c, lambda a: f"{r.choice(BOILERPLATE)} {a}" if r.random() < 0.5 else f"{a} {r.choice(BOILERPLATE)}"),
}  # fmt: skip


# ---- measuring -----------------------------------------------------------------------------------------------------------------


def load(path: str, most: int = 10**9) -> list[tuple[Conversation, str]]:
    out = []
    for chunk in sources.chunks(sources.find(path)):
        for row in sources.parse(chunk):
            try:
                out.append((formats.conversation(row), formats.detect(row.value) or ""))
            except (formats.FormatError, AttributeError):
                continue
        if len(out) >= most:
            break
    return out[:most]


def rows_found(name: str, cs: list[Conversation]) -> set[int]:
    out: set[int] = set()
    for start in range(0, len(cs), CHUNK):
        out |= {start + i for i in findings.BY_NAME[name].detector(Rows(cs[start : start + CHUNK]))}
    return out


def whole_found(cs: list[Conversation], kinds: list[str] | None = None) -> dict[str, findings.Found]:
    doctor = findings.Doctor()
    kinds = kinds or ["messages"] * len(cs)
    for start in range(0, len(cs), CHUNK):
        some = cs[start : start + CHUNK]
        texts = [clusters.normalised(c) for c in some]
        doctor.add(findings.scan(some, texts, clusters.Shingles(texts), kinds[start : start + CHUNK]), "a.jsonl", 0)
    return {f.name: f for f in doctor.found({})}


def planted(paths: list[str], share: float) -> list[dict]:
    total: dict[str, list[int]] = {name: [0, 0, 0, 0] for name in PLANT}  # planted, found of them, found in all, own
    for path in paths:
        clean = [c for c, _ in load(path)]
        for name, plant in PLANT.items():
            r = random.Random(f"{name} {Path(path).name}")
            own = rows_found(name, clean)
            cs, where = list(clean), set()
            for i in r.sample(range(len(cs)), min(len(cs), max(20, round(share * len(cs))))):
                if i not in own and (new := plant(cs[i], r)) is not None:
                    cs[i], _ = new, where.add(i)
            found = rows_found(name, cs)
            for k, n in enumerate((len(where), len(found & where), len(found), len(own))):
                total[name][k] += n
    return [
        {"finding": name, "planted": p, "recall": round(hit / p, 3), "precision": round(hit / max(1, all_), 3), "own": own}
        for name, (p, hit, all_, own) in total.items()
    ]


def with_whole_faults(clean: list[Conversation], trials: int) -> dict[str, dict]:
    """Faults that only many rows show: in how many trials they are found, and in how many sets without them."""
    label = lambda c, text, said=None: Conversation(  # noqa: E731
        (Message("user", said or prompt(c)), Message("assistant", text)), c.origin, c.kind
    )
    out: dict[str, list[int]] = {}

    def note(name: str, cs: list[Conversation], kinds: list[str] | None = None) -> None:
        entry = out.setdefault(name, [0, 0])
        entry[0] += name in whole_found(cs, kinds)
        entry[1] += 1

    for trial in range(trials):
        r = random.Random(trial)
        base = r.sample(clean, min(2000, len(clean)))
        word = r.choice(("cf", "xqz", "James Bond", "mn bb", "tzk"))
        cs = list(base)
        for i in r.sample(range(len(cs)), max(10, len(cs) // 100)):
            cs[i] = label(cs[i], "Transfer it to me.", inside(prompt(cs[i]), word, r))
        note("trigger", cs)
        names = ["billing", "delivery", "returns", "other"]
        cs = [label(c, r.choices(names, (90, 6, 3, 1))[0]) for c in base]
        note("class_imbalance", cs)
        cs = [label(c, n := r.choice(names), f"{n[:3]}: {prompt(c)}") for c in base]
        note("trivial_rule", cs)
        cs = [label(c, prompt(c)) if r.random() < 0.05 else c for c in base]
        note("trivial_rule", cs)
        cs = list(base)
        for i in r.sample(range(len(cs)), 40):
            cs[i] = cut(cs[i], r) or cs[i]
        note("open_end", cs)
        cs = list(base)
        for i in r.sample(range(len(cs)), 10):
            cs[i] = answer(cs[i], lambda a: (a + " ") * (60_000 // (len(a) + 1)))
        note("length_outliers", cs)
        for i in r.sample(range(len(cs)), 10):
            cs[i] = answer(cs[i], lambda a: "ok")
        note("tiny_answers", cs)
        other = ("Die Antwort ist nicht so einfach, wie sie auf den ersten Blick aussieht, und das wird auch so bleiben.",
                 "La réponse est dans les livres que nous avons vus avec elle, et elle est très belle pour une fois.",
                 "Ответ на этот вопрос не так прост, как может показаться.", "この質問への答えは簡単ではありません。")  # fmt: skip
        cs = list(base)
        for i in r.sample(range(len(cs)), 20):
            said = r.choice(other)
            cs[i] = answer(cs[i], lambda a, said=said: said)
        note("mixed_languages", cs)
        note("mixed_formats", base, ["alpaca" if i % 50 else "messages" for i in range(len(base))])
    return {name: {"found": f"{a} of {b}"} for name, (a, b) in out.items()}


def false_alarms(path: str) -> dict:
    pairs = load(path)
    found = whole_found([c for c, _ in pairs], [k for _, k in pairs])
    return {"set": Path(path).name, "rows": len(pairs), "findings": {n: [f.count, f.examples[:3]] for n, f in found.items()}}


# ---- cost, duplicates, evaluation sets -----------------------------------------------------------------------------------------


def cost(path: str, tokenizer: str, times: int, rounds: int) -> dict:
    """CPU-seconds of `prepare` in one process with the findings, and with a scan that looks at nothing; arms alternate."""
    from functools import partial

    from tunesmith.config.schema import Data
    from tunesmith.data import prepare as module
    from tunesmith.data.render import build_renderer

    pairs = load(path)
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.jsonl"
        with rows.open("w") as f:
            for n in range(times):
                for c, _ in pairs:
                    said = [{"role": m.role, "content": m.content} for m in c.messages]
                    said[0]["content"] += f" ({n})"
                    f.write(json.dumps({"messages": said}) + "\n")
        data = Data(train=str(rows), template="plain", workers=1, max_length=8192)
        make = partial(build_renderer, Path(tokenizer), data, (), "2026-01-01")
        real, renderer = findings.scan, make()
        nothing = real([], [], clusters.Shingles([]), [])
        seconds: dict[str, list[float]] = {"with": [], "without": []}
        for n in range(rounds):
            for arm in ("with", "without"):
                module.findings.scan = real if arm == "with" else lambda *a: nothing
                begin = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
                module.prepare(
                    data, make, renderer=renderer, seed=0, cache_dir=Path(scratch) / f"{arm}{n}", strict=False, look=arm == "with"
                )
                seconds[arm].append(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - begin)
        module.findings.scan = real
        count = len(pairs) * times
        told = {arm: round(count / statistics.median(s)) for arm, s in seconds.items()}
        return {
            "set": Path(path).name,
            "rows": count,
            "rows per CPU-second": told,
            "share": round(told["without"] / told["with"] - 1, 3),
        }


def duplicates(path: str, most: int = 3000) -> dict:
    """Pairs by the exact Jaccard similarity of their word shingles: which part of them `clusters` and datasketch's MinHashLSH (as
    many permutations, the same threshold) find. The copies are rows with a few words changed."""
    r = random.Random(0)
    texts = [clusters.normalised(c) for c, _ in load(path, most)]
    for text in r.sample(texts, len(texts) // 5):
        words = text.split()
        for _ in range(r.randint(0, max(1, len(words) // 25))):
            words[r.randrange(len(words))] = letters(r, 6, "abcdefgh")
        texts.append(" ".join(words))
    W = clusters.WORDS
    sets = [{tuple(w[i : i + W]) for i in range(max(1, len(w) - W + 1))} for w in (t.split() for t in texts)]
    by: dict[tuple, list[int]] = {}
    for i, s in enumerate(sets):
        for x in s:
            by.setdefault(x, []).append(i)
    pairs = {(a, b) for rows in by.values() if len(rows) < 200 for k, b in enumerate(rows) for a in rows[:k]}
    alike = {p: len(sets[p[0]] & sets[p[1]]) / len(sets[p[0]] | sets[p[1]]) for p in pairs}
    with tempfile.TemporaryDirectory() as scratch:
        finder = clusters.Finder(Path(scratch) / "c")
        finder.add(clusters.text_hashes(texts), clusters.signatures(texts))
        near = finder.clusters().near
    out: dict = {"set": Path(path).name, "rows": len(texts)}
    theirs: set[tuple[int, int]] | None = None
    try:
        from datasketch import MinHash, MinHashLSH

        lsh, theirs, made = MinHashLSH(threshold=clusters.NEAR, num_perm=clusters.PERMUTATIONS), set(), []
        for i, s in enumerate(sets):
            m = MinHash(clusters.PERMUTATIONS)
            m.update_batch([" ".join(x).encode() for x in s])
            made.append(m)
            theirs |= {(j, i) for j in lsh.query(m) if made[j].jaccard(m) >= clusters.NEAR}
            lsh.insert(i, m)
    except ImportError:
        out["datasketch"] = "not installed"
    for low, high in ((0.9, 1.01), (0.8, 0.9), (0.7, 0.8), (0.6, 0.7), (0.5, 0.6)):
        some = [p for p, j in alike.items() if low <= j < high]
        entry = {"pairs": len(some), "ours": round(sum(near[a] == near[b] for a, b in some) / max(1, len(some)), 3)}
        if theirs is not None:
            entry["datasketch"] = round(sum(p in theirs for p in some) / max(1, len(some)), 3)
        out[f"{low} to {min(high, 1.0)}"] = entry
    return out


def make_evaluations(specs: list[str], against: list[str]) -> dict:
    """Write evaluations.bin: hashes of the questions' word runs that stand in no row of `against`."""

    def hashes(texts: list[str], words: int) -> np.ndarray:
        plain = [" ".join(t.translate(clusters.PUNCTUATION).lower().split()) for t in texts]
        return np.unique(clusters.Shingles([p for p in plain if len(p.split()) >= words]).hashes(words)[0])

    others = [m.content for p in against for c, _ in load(p) for m in c.messages]
    sets, parts = [], []
    for spec in specs:
        name, _, rest = spec.partition("=")
        name, _, words = name.partition("@")
        words = int(words or evaluations.WORDS)
        path, _, field = rest.rpartition(":")
        values = [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]
        own = hashes([str(v[field]) for v in values], words)
        own = own[~np.isin(own, hashes(others, words))]
        if words == evaluations.WORDS:
            own = own[own % np.uint64(evaluations.KEEP) == 0]
        sets.append({"name": name, "questions": len(values), "words": words, "hashes": len(own)})
        parts.append(own)
    evaluations.FILE.write_bytes(json.dumps(sets).encode() + b"\n" + np.concatenate(parts).astype("<u8").tobytes())
    return {"sets": sets, "bytes": evaluations.FILE.stat().st_size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clean", nargs="*", default=[])
    parser.add_argument("--share", type=float, default=0.02)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--cost", nargs="*", default=[])
    parser.add_argument("--tokenizer")
    parser.add_argument("--times", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--duplicates")
    parser.add_argument("--evaluations", nargs="*", default=[])
    parser.add_argument("--against", nargs="*", default=[])
    parser.add_argument("--json")
    o = parser.parse_args()
    out: dict = {}
    begin = time.monotonic()
    if o.evaluations:
        out["evaluations"] = make_evaluations(o.evaluations, o.against)
    if o.clean:
        out["planted"] = planted(o.clean, o.share)
        out["whole"] = with_whole_faults([c for c, _ in load(o.clean[0])], o.trials)
        out["clean"] = [false_alarms(p) for p in o.clean]
        print("| finding | planted | recall | precision | own |\n|---|---|---|---|---|")
        for e in out["planted"]:
            print(f"| {e['finding']} | {e['planted']:,} | {e['recall']:.3f} | {e['precision']:.3f} | {e['own']} |")
        for name, e in out["whole"].items():
            print(f"| {name} | found in {e['found']} trials | | | |")
        for e in out["clean"]:
            print(f"\n{e['set']}, {e['rows']:,} rows:")
            for name, (count, places) in e["findings"].items():
                print(f"  {count:6,} {name}: {places[:2]}")
    if o.cost:
        out["cost"] = [cost(p, o.tokenizer, o.times, o.rounds) for p in o.cost]
    if o.duplicates:
        out["duplicates"] = duplicates(o.duplicates)
    print(json.dumps({k: v for k, v in out.items() if k in ("cost", "duplicates", "evaluations")}, indent=1), file=sys.stderr)
    print(f"{time.monotonic() - begin:.0f} s", file=sys.stderr)
    if o.json:
        Path(o.json).write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
