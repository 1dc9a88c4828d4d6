"""Questions on a passage, made from its own sentences by rule: they teach a small model to find a place in a text and copy from it.

    python recipes/base/drills.py --text .cache/base/train --out .cache/base

Reads the prepared training text (never a held-out document or a test story) and writes train/drills.jsonl, passages with questions
and answers as plain text for pretraining, and drills.jsonl, the same kind as conversations for the later runs. The rules are about
forms of words ("X because Y" -> why did X? Y), so some questions are clumsy and a few are wrong; answers stand in their passage.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

Pair = tuple[str, str]
VERBS = """
was/be were/be had/have did/do went/go came/come saw/see took/take gave/give made/make found/find told/tell got/get ran/run
sat/sit stood/stand fell/fall began/begin thought/think knew/know brought/bring bought/buy caught/catch felt/feel held/hold
kept/keep left/leave lost/lose met/meet paid/pay rode/ride rose/rise sang/sing sold/sell sent/send shook/shake slept/sleep
spoke/speak stole/steal threw/throw wore/wear won/win wrote/write ate/eat drank/drink flew/fly grew/grow hid/hide led/lead
drew/draw fought/fight forgot/forget broke/break built/build chose/choose drove/drive heard/hear laid/lay swam/swim
taught/teach woke/wake became/become sprang/spring struck/strike swore/swear tore/tear
"""
IRREGULAR = dict(pair.split("/") for pair in VERBS.split())
NAME = r"[A-Z][a-z]+(?: [A-Z][a-z]+)?"
SUBJECT = re.compile(
    r"((?:The|A|An|His|Her|Their|My|Our|Every|All the|Some|One|Two|Three|Another) (?:[a-z]+[ -]){0,2}[a-z]+(?:'s [a-z]+)?|"
    + NAME
    + ")"
    r" ((?:[a-z]+ed)|" + "|".join(sorted(IRREGULAR)) + r") (.{6,140}?)[.;!]\Z"
)
SAID = re.compile(
    r"[\"\u201c]([^\"\u201c\u201d]{8,110}?)[,.!?]?[,.!?]?[\"\u201d],? (?:said|cried|asked|answered|replied|shouted) "
    r"((?:the|his|her|a|an|old|little|young|poor) (?:[a-z]+ )?[a-z]+|[A-Z][a-z]+)\b"
)
WHEN = re.compile(r"(When|As soon as|After|While) ([^,;:\"\u201c]{8,80}), ([^\"\u201c;:]{8,120}?)[.;!]\Z")
BECAUSE = re.compile(r"([^,;:\"\u201c]{10,90}?),? (?:because|for fear|since) ([^,;:\"\u201c]{6,90})[.;!]\Z")
IS_A = re.compile(
    r"((?:A|An|The) [a-z]+(?: [a-z]+)?|[A-Z][a-z]+(?: [a-z]+)?) (is|are) ((?:a|an|the|any|one)\b[^;:()\[\]]{12,140})\.\Z"
)
FIELD = re.compile(r"^([A-Z][A-Za-z' -]{3,40}): ([^\n;(:]{2,90}?)(?: \(|;|$)", re.MULTILINE)
SENTENCE = re.compile(r"(?<=[.!?;])[\"'\u201d]?\s+(?=[\"'\u201cA-Z])")
PLACE = re.compile(r" ((?:in|at|on|under|near|into|through|behind|beside|by) (?:the|a|an|his|her|their) [a-z]+(?: [a-z]+)?)\Z")
PRONOUN = re.compile(
    r"\A(?:He|She|It|They|We|I|You|This|That|These|Those|There|What|Who|But|And|Then|So|Now|Here|Not|No|If|Yes|Oh)\b"
)
ASK = (
    "Read the text and answer the question.\n\n{passage}\n\nQuestion: {question}",
    "{passage}\n\n{question}",
    "Text:\n{passage}\n\nQuestion: {question}\nAnswer:",
    "Answer from this passage: {question}\n\n{passage}",
    "Question: {question}\n\nPassage: {passage}",
)
CITE = (
    "{passage}\n\nQuestion: {question}\nName the passage you used, like [1].",
    "Use the numbered passages and cite the one you use.\n\n{passage}\n\n{question}",
)
NO_ANSWER = ("The text does not say.", "The passage does not tell us that.", "I cannot find that in the text.")
PASSAGE = (60, 220)  # words
PARTS = {"storybooks": 1.0, "childrens": 1.0, "books": 0.25, "factbook": 0.5, "openstax": 0.25}  # share of passages asked about


def base(verb: str) -> str:
    """went -> go, cried -> cry, stopped -> stop, loved -> love, walked -> walk; a guess by form where no list says."""
    if verb in IRREGULAR:
        return IRREGULAR[verb]
    stem = verb[:-2]
    if stem.endswith("i"):
        return stem[:-1] + "y"
    if len(stem) > 3 and stem[-1] == stem[-2] and stem[-1] not in "lsz":
        return stem[:-1]
    soft = re.search(r"(?:[aeiou][bcdgkmptvz]|[cgsuv]|[bdgkpt]l|[^aeiou]at|[aeiou]r)\Z", stem)
    return (
        stem + "e"
        if soft and not re.search(r"(?:ou|ee|oo|ai|ea|oa|e)[a-z]\Z|[aeiou]ss\Z|pen\Z|sten\Z|ter\Z|der\Z|ver\Z|swer\Z", stem)
        else stem
    )


def lower(text: str) -> str:
    """The first letter small, unless it begins a name."""
    first = text.split(" ", 1)[0]
    common = re.match(
        r"(?:The|A|An|His|Her|Their|My|Our|Every|All|Some|One|Two|Three|Another|In|At|On|There|He|She|It|They|We)\Z", first
    )
    return text[0].lower() + text[1:] if common else text


def upper(text: str) -> str:
    return text[0].upper() + text[1:]


def of_sentence(sentence: str) -> Iterator[Pair]:
    """Questions whose answers are pieces of the sentence."""
    for said in SAID.finditer(sentence):
        words, who = said[1].strip(), said[2]
        yield f"What did {who} say?", words
        if len(words.split()) >= 5:
            yield f'Who said "{words}"?', who
    if sentence[0] in '"\u201c' or len(sentence) > 240:
        return
    if found := WHEN.match(sentence):
        yield f"What happened {found[1].lower()} {lower(found[2])}?", found[3]
    plain = found is None and not PRONOUN.match(sentence)
    if (why := BECAUSE.match(sentence)) and (did := SUBJECT.match(why[1] + ".")):
        yield why_of(did), why[2]
    if plain and (is_a := IS_A.match(sentence)):
        yield f"What {is_a[2]} {lower(is_a[1])}?", is_a[3]
    if plain and "," not in sentence[:20] and (did := SUBJECT.match(sentence)):
        subject, verb, rest = did.groups()
        yield f"Who {verb} {rest}?", subject
        if verb in ("was", "were"):
            yield f"How {verb} {lower(subject)}?" if len(rest.split()) < 4 else f"What {verb} {lower(subject)}?", rest
        elif place := PLACE.search(f" {rest}"):
            yield f"Where did {lower(subject)} {base(verb)} {rest[: max(place.start() - 1, 0)]}?".replace(" ?", "?"), place[1]
        else:
            yield (
                f"What did {lower(subject)} {'do' if len(rest.split()) > 5 else base(verb)}?",
                (f"{verb} {rest}" if len(rest.split()) > 5 else rest),
            )


def why_of(did: re.Match[str]) -> str:
    subject, verb, rest = did.groups()
    if verb in ("was", "were"):
        return f"Why {verb} {lower(subject)} {rest}?"
    return f"Why did {lower(subject)} {base(verb)} {rest}?"


def of_passage(passage: str) -> list[Pair]:
    """Questions with an answer that stands in the passage, each question once and none that begins like another."""
    found: dict[str, Pair] = {}
    for paragraph in passage.split("\n"):
        for sentence in SENTENCE.split(paragraph.strip()):
            for question, answer in of_sentence(sentence.strip()) if sentence.strip() else ():
                answer = answer.strip(" ,;:-")
                if 1 <= len(answer.split()) <= 24 and 4 <= len(question.split()) <= 26:
                    found.setdefault(question.lower()[:40], (question, finish(answer)))
    return list(found.values())


def of_entry(passage: str, name: str) -> list[Pair]:
    """Questions on the lines of a factbook entry."""
    pairs = []
    for field, value in FIELD.findall(passage):
        pairs.append((f"What is the {field[0].lower() + field[1:]} of {name}?", finish(value.strip())))
    return pairs


def finish(answer: str) -> str:
    return upper(answer) + ("" if answer.endswith((".", "!", "?", '"')) else ".")


def passages(text: str, least: int = PASSAGE[0], most: int = PASSAGE[1]) -> Iterator[str]:
    """Paragraphs in a row with at most `most` words, and at least `least`."""
    held: list[str] = []
    count = 0
    for paragraph in text.split("\n\n"):
        words = len(paragraph.split())
        if count + words > most:
            if count >= least:
                yield "\n\n".join(held)
            held, count = [], 0
        if words <= most:
            held.append(paragraph)
            count += words
    if count >= least:
        yield "\n\n".join(held)


def drills(folder: Path, draw: random.Random, parts: dict[str, float] = PARTS) -> Iterator[tuple[str, list[Pair]]]:
    """(passage, its questions) over the prepared training text, in order."""
    for source, share in parts.items():
        with (folder / f"{source}.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                text = json.loads(line)["text"]
                name = text.split("\n", 1)[0].strip() if source == "factbook" else ""
                for passage in passages(text):
                    if draw.random() < share:
                        pairs = of_entry(passage, name) if name else of_passage(passage)
                        draw.shuffle(pairs)
                        if pairs:
                            yield passage, pairs


def as_text(passage: str, pairs: list[Pair], draw: random.Random) -> str:
    """A passage and up to six questions, as a reader of plain text meets them."""
    asked = "\n".join(f"Question: {q}\nAnswer: {a}" for q, a in pairs[:6])
    return f"{passage}\n\n{asked}" if draw.random() < 0.8 else f"Question: {pairs[0][0]}\n\n{passage}\n\nAnswer: {pairs[0][1]}"


def as_chat(passage: str, pairs: list[Pair], others: list[str], draw: random.Random) -> dict:
    """One conversation: mostly the passage and one or two questions; one in ten has passages to cite, one in 25 no answer."""
    question, answer = pairs[0]
    chance = draw.random()
    if chance < 0.04 and others:
        ask, answer = draw.choice(ASK).format(passage=draw.choice(others), question=question), draw.choice(NO_ANSWER)
        pairs = pairs[:1]
    elif chance < 0.14 and others:
        numbered = [passage, draw.choice(others)]
        draw.shuffle(numbered)
        block = "\n\n".join(f"[{i}] {p}" for i, p in enumerate(numbered, 1))
        ask = draw.choice(CITE).format(passage=block, question=question)
        answer, pairs = f"{answer} [{numbered.index(passage) + 1}]", pairs[:1]
    else:
        ask = draw.choice(ASK).format(passage=passage, question=question)
    turns = [ask, answer]
    if len(pairs) > 1:
        turns += pairs[1]
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=Path(".cache/base/train"))
    parser.add_argument("--out", type=Path, default=Path(".cache/base"))
    parser.add_argument("--chat-share", type=float, default=0.4, help="passages that go into the conversations instead of the text")
    args = parser.parse_args()
    draw, seen, count = random.Random(0), [], [0, 0, 0]
    with (
        (args.out / "train/drills.jsonl").open("w", encoding="utf-8") as text,
        (args.out / "drills.jsonl").open("w", encoding="utf-8") as chat,
    ):
        for passage, pairs in drills(args.text, draw):
            count[2] += len(pairs)
            if draw.random() < args.chat_share:
                chat.write(json.dumps(as_chat(passage, pairs, seen, draw), ensure_ascii=False) + "\n")
                count[1] += 1
            else:
                text.write(json.dumps({"text": as_text(passage, pairs, draw)}, ensure_ascii=False) + "\n")
                count[0] += 1
            seen = [*seen[-40:], passage]
    print(f"{count[0]:,} passages as text, {count[1]:,} conversations, from {count[2]:,} questions")


if __name__ == "__main__":
    main()
