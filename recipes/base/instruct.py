"""Instruction and reading rows for the small base model, as messages jsonl, from permissive sets only.

    python recipes/base/instruct.py --data FOLDER --out .cache/base

Writes instruct.jsonl (rasbt, Apache-2.0; short rows of gpteacher's role-play, MIT; questions on factbook entries, CC0),
scope.jsonl (what a question is about and who keeps to a subject: questions of medquad, banking77, CC BY 4.0, gsm8k, MIT; short
answers of medquad), reading.jsonl (fairytaleqa's train split, Apache-2.0, each question in two rows: the passage in the prompt,
one in seven with numbered passages to cite as [n], one in 100 without an answer; answers in the passage's own words where it has
them), tales.jsonl (the stories of that split as
plain text) and reading_held_out.jsonl (its validation split, one passage). The test split is never read.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from drills import ASK, CITE, NO_ANSWER  # beside this file
from prepare import documents, held_out_keys, runs_of, shares_run, test_runs

Row = dict[str, list[dict[str, str]]]
ALIKE, LONGEST = 0.6, 24  # least F1 of a run of words with the answer it stands for; most words of it
KEPT = 0.75  # of the answer's words that say something: `girl was` is no answer where a person wrote `The girl was crying.`
SMALL = frozenset(
    """
    am and are as at be because been but by can could did do does for from had has have he her hers herself him
    himself his how i if in into is it its me my of off on or our out she so some than that their them then there they
    this to too up upon very was we were what when where which who why will with would you your
    """.split()  # noqa: SIM905 - words are easier to read in a row
)
NONE = 0.01  # share of questions without an answer
SENTENCE = re.compile(r"(?<=[.!?])[\"')\u201d\u2019]*\s+")
PLAIN = re.compile(r"[A-Za-z0-9 \n.,;:!?'\"()$%/+-]*\Z")  # no code, no tables, no other scripts
FACTS = (  # a line of a factbook entry, how a person asks for it, how it is answered
    (
        r"name: ([A-Z][A-Za-z' -]{2,30})(?:\n|;|$)",
        ("What is the capital of {name}?", "Name the capital city of {name}."),
        "The capital of {name} is {fact}.",
    ),
    (r"Location: ([A-Z][^\n;]{10,120})", ("Where is {name}?", "Tell me where {name} lies."), "{name} lies here: {fact}."),
    (
        r"Climate: ([a-z][^\n;(]{8,120})",
        ("What is the climate of {name} like?", "How is the weather in {name}?"),
        "The climate of {name} is {fact}.",
    ),
)


def chat(user: str, assistant: str, system: str = "") -> Row:
    turns = [{"role": "system", "content": system}] if system else []
    return {"messages": [*turns, {"role": "user", "content": user.strip()}, {"role": "assistant", "content": assistant.strip()}]}


def short(prompt: str, answer: str) -> bool:
    """Rows a small model can learn from: plain characters, at most 80 words in and 60 out."""
    fits = 0 < len(answer.split()) <= 60 and len(prompt.split()) <= 80
    return fits and bool(PLAIN.match(prompt)) and bool(PLAIN.match(answer))


def instructions(data: Path) -> Iterator[Row]:
    """rasbt and gpteacher, filtered by `short`."""
    for path, answer in ((data / "sft/rasbt/instruction-data.json", "output"), (data / "sft/gpteacher/roleplay.json", "response")):
        for row in json.loads(path.read_text(encoding="utf-8")):
            prompt = row["instruction"] + ("\n\n" + row["input"] if row["input"] else "")
            if short(prompt, row[answer]):
                yield chat(prompt, row[answer])


def facts(data: Path, draw: random.Random) -> Iterator[Row]:
    """Questions on factbook entries; half carry the entry's lines in the prompt, so reading is asked for, not memory."""
    path = data / "pretrain/factbook_cc0.jsonl.xz"
    held_out = held_out_keys("factbook", {key for key, _ in documents(path)})
    for key, text in documents(path):
        name = text.split("\n", 1)[0].strip()
        for pattern, ask, answer in FACTS:
            found = re.search(pattern, text)
            if key in held_out or not found or len(name) >= 40 or not short(name, fact := found.group(1).strip(" .")):
                continue
            prompt = draw.choice(ask).format(name=name)
            if draw.random() < 0.5:
                start = max(text.rfind("\n", 0, max(found.start() - 300, 0)), 0)
                passage = text[start : found.end() + 200].rsplit("\n", 1)[0].strip()
                prompt = draw.choice(ASK).format(passage=passage, question=prompt)
            yield chat(prompt, answer.format(name=name, fact=fact))


def alike(a: list[str], b: list[str]) -> float:
    """Token F1."""
    shared = sum((Counter(a) & Counter(b)).values())
    return 2 * shared / (len(a) + len(b)) if shared else 0.0


def in_its_words(passage: str, answer: str) -> str:
    """The run of words of one sentence that is most like the answer, from ALIKE on; else the answer. Copying is what a model of
    this size can learn: nine of ten answers are nearly in their passage, changed a little by who wrote them.
    """
    wanted, best = bare(answer), (ALIKE, 0, answer)
    telling = set(wanted) - SMALL
    for sentence in SENTENCE.split(passage):
        said = sentence.split()
        tokens = [bare(word) for word in said]
        ends = [i for i, token in enumerate(tokens) if any(t in wanted for t in token)]
        for i in ends:
            for j in ends:
                if i <= j < i + LONGEST:
                    run = [t for token in tokens[i : j + 1] for t in token]
                    found = alike(run, wanted) if len(telling.intersection(run)) >= KEPT * len(telling) else 0.0
                    best = max(best, (found, i - j, " ".join(said[i : j + 1]).strip(" ,;:.\"'\u201c\u201d\u2018\u2019()-")))
    if best[2] and (article := re.search(rf"\b(?:the|an?)(?= {re.escape(best[2])})", passage, re.IGNORECASE)):
        return f"{article[0]} {best[2]}"
    return best[2] or answer


def bare(text: str) -> list[str]:
    """Words as the test compares them: lower case, no punctuation, no articles."""
    return [word for word in re.findall(r"[a-z0-9']+", text.lower().replace("\u2019", "'")) if word not in ("a", "an", "the")]


def reading(data: Path, split: str, draw: random.Random, *, mixed: bool, apart: set[str] = frozenset()) -> Iterator[Row]:
    """fairytaleqa: the gold section in the prompt; with `mixed` also numbered passages and questions without an answer. Passages
    that share a run of words with `apart` are left out.
    """
    stories: dict[str, dict[int, str]] = {}
    with (data / "rag/fairytaleqa/documents.jsonl").open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if row["split"] == split:
                stories[row["id"]] = {s["section"]: s["text"] for s in row["sections"]}
    names = sorted(stories)
    with (data / "rag/fairytaleqa/questions.jsonl").open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if row["split"] != split:
                continue
            own = stories[row["document"]]
            gold, question = "\n\n".join(own[i] for i in row["gold_sections"]), row["question"].strip()
            answer = row["answers"][0].strip()
            if len(gold.split()) > 500 or not answer or shares_run(gold, apart):
                continue
            answer = in_its_words(gold, answer)
            if not answer.endswith((".", "!", "?", '"')):
                answer += "."
            answer = answer[0].upper() + answer[1:]
            other = stories[draw.choice([n for n in names if n != row["document"]])]
            chance = draw.random() if mixed else 1.0
            if chance < NONE:  # few: a model that is unsure says the commonest answer under greedy decoding, which is this one
                passage = draw.choice(sorted(other.values()))
                yield chat(draw.choice(ASK).format(passage=passage, question=question), draw.choice(NO_ANSWER))
            elif chance < NONE + 1 / 7:
                passages = [gold, *draw.sample(sorted(other.values()), k=min(draw.choice((1, 2)), len(other)))]
                draw.shuffle(passages)
                numbered = "\n\n".join(f"[{i}] {p}" for i, p in enumerate(passages, 1))
                yield chat(draw.choice(CITE).format(passage=numbered, question=question), f"{answer} [{passages.index(gold) + 1}]")
            else:
                yield chat(draw.choice(ASK).format(passage=gold, question=question), answer)


def tales(data: Path, apart: set[str] = frozenset()) -> Iterator[dict[str, str]]:
    """The training split's stories as plain text, without the sections that share a run of words with `apart`."""
    with (data / "rag/fairytaleqa/documents.jsonl").open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            sections = [s["text"] for s in row["sections"] if not shares_run(s["text"], apart)]
            if row["split"] == "train" and sections:
                yield {"text": "\n\n".join(sections)}


def subjects(data: Path, draw: random.Random) -> dict[str, list[str]]:
    """Questions by what they are about, of the sets that say so by what they are."""
    health = [row["instruction"].replace(" ?", "?") for row in lines_of(data / "sft/medquad/medquad.jsonl")]
    with (data / "sft/customer_support/banking77/train.csv").open(encoding="utf-8", newline="") as file:
        money = [row["text"].strip() for row in csv.DictReader(file)]
    sums = [row["question"] for row in lines_of(data / "sft/gsm8k/train.jsonl")]
    questions = lines_of(data / "rag/fairytaleqa/questions.jsonl")
    stories = [row["question"].strip() for row in questions if row["split"] == "train"]
    countries = [row["messages"][0]["content"] for row in facts(data, draw)]
    found = {"health": health, "money and banks": money, "sums": sums, "stories": stories, "countries": countries}
    return {name: sorted({q for q in asked if short(q, "yes") and "\n" not in q}) for name, asked in found.items()}


def lines_of(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def scope(data: Path, draw: random.Random, count: int = 6000) -> Iterator[Row]:
    """What a question is about, and an assistant that keeps to its subject: answers are by pattern, questions are people's own."""
    asked = subjects(data, draw)
    names = sorted(asked)
    for _ in range(count):
        about = draw.choice(names)
        question, mine = draw.choice(asked[about]), draw.choice(names)
        if draw.random() < 0.4:
            form = draw.choice(("What is this question about?\n\n{q}", "{q}\n\nName the subject of this question.", "Subject? {q}"))
            yield chat(form.format(q=question), draw.choice(("It is about {s}.", "This is a question about {s}.")).format(s=about))
            continue
        system = draw.choice(("You help with {s} only.", "You are a helper for {s}. Keep to it.", "Answer questions about {s}."))
        if about == mine or draw.random() < 0.4:
            mine = about
            yes = draw.choice(("Yes, that is about {s}, so I can help.", "I can help with that, for it is about {s}."))
            yield chat(question, yes.format(s=mine), system.format(s=mine))
        else:
            no = draw.choice((
                "I am sorry, I do not know about {b}. Please ask me about {s}.", "That is about {b}. I can only help with {s}.",
                "For {b} please ask someone else. I know about {s}.",
            ))  # fmt: skip
            yield chat(question, no.format(b=about, s=mine), system.format(s=mine))


def health(data: Path, most: int = 1500) -> Iterator[Row]:
    """The first sentence of medquad's answers, where question and sentence are short; at most `most`."""
    for row in lines_of(data / "sft/medquad/medquad.jsonl"):
        question, first = row["instruction"].replace(" ?", "?"), re.split(r"(?<=[a-z)]\.)\s", row["output"], maxsplit=1)[0]
        if (
            most
            and 8 <= len(first.split()) <= 40
            and first.endswith(".")
            and short(question, first)
            and "?" not in first
            and not first.startswith("Key ")
        ):
            most -= 1
            yield chat(question, first)


def write(path: Path, rows: list[dict]) -> None:
    with path.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"{path}: {len(rows):,} rows, {path.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(".cache/base"))
    args = parser.parse_args()
    draw = random.Random(0)
    args.out.mkdir(parents=True, exist_ok=True)
    held = (
        json.loads(line)["text"] for path in sorted((args.out / "held_out").glob("*.jsonl")) for line in path.open(encoding="utf-8")
    )
    apart = test_runs(args.data) | {run for text in held for run in runs_of(text)}
    write(args.out / "instruct.jsonl", [*instructions(args.data), *facts(args.data, draw)])
    twice = [row for _ in range(2) for row in reading(args.data, "train", draw, mixed=True, apart=apart)]
    write(args.out / "reading.jsonl", twice)
    write(args.out / "scope.jsonl", [*scope(args.data, random.Random(1)), *health(args.data)])
    write(args.out / "tales.jsonl", list(tales(args.data, apart)))
    write(args.out / "reading_held_out.jsonl", list(reading(args.data, "val", draw, mixed=False, apart=apart))[:400])


if __name__ == "__main__":
    main()
