"""The demo's dataset from its hand-written sources: questions and answers here, train.jsonl and held_out.jsonl in the package.

    python recipes/base/demo/make_demo.py

Each question and each answer is written by hand in on_topic.txt, off_topic.txt and chitchat.txt; no pattern is filled in. This
script adds the opening of the answer's kind and the sign-off, pairs questions with answers, and joins some into
dialogues of two turns. Lines:

    # section            = facts of a point: a row's answer is right when each `;` part holds one of its `|` words
    q asked in training  a answered in training (shared out in turn)  h asked on held-out rows only  r their own answer

off_topic.txt and chitchat.txt have no `=`: a run of q after other lines begins a matter. A held-out question off topic says what
the questions of its own matter say in another sentence, in words that they have.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
OUT = HERE.parents[2] / "src/tunesmith/assets/demo"
OPENINGS = {"on": "Gladly, dear grower.", "off": "Alas, dear grower,", "chitchat": "Ah, dear grower."}  # it tells the kind
SIGN_OFF = "Grow well. Wick"
SECOND = re.compile(r"(How|What|When|Can|Which|Is|Do|Does|Where|Should|May|Are|Will)\b.*\?$")  # reads well after "Thanks."
TWO_TURNS, MIXED, SYSTEMS = 80, 12, 80  # rows: same section; each of on->off, off->on, chitchat->on; with a system message


@dataclass
class Point:
    """One fact: its questions, its answers, its held-out pairs."""

    topic: str
    section: str
    facts: list[list[str]]
    questions: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Turn:
    """A question with its answer and the point both belong to."""

    question: str
    answer: str
    point: Point


def read(path: Path, topic: str) -> list[Point]:
    """Points in order. Where there are no `=` lines, a question after other lines begins a point."""
    points: list[Point] = []
    section = ""
    fresh = True
    for line in path.read_text(encoding="utf-8").splitlines():
        mark, _, text = line.partition(" ")
        if mark == "#":
            section, fresh = text, True
        elif mark == "=":
            points.append(Point(topic, section, [[w.strip() for w in part.split("|")] for part in text.split(";")]))
        elif mark == "q" and topic != "on" and fresh:
            points.append(Point(topic, section, []))
        if mark == "q":
            points[-1].questions.append(text)
        elif mark == "a":
            points[-1].answers.append(text)
        elif mark == "h":
            points[-1].held_out.append(text)
        elif mark == "r":
            points[-1].references.append(text)
        fresh = mark != "q"
    return points


def say(body: str, topic: str) -> str:
    """An answer in the house style: after an opening that ends its sentence the answer starts with a capital."""
    opening = OPENINGS[topic]
    return f"{opening} {body[0].upper() + body[1:] if opening.endswith('.') else body}\n{SIGN_OFF}"


def turns(points: list[Point]) -> list[Turn]:
    return [Turn(q, p.answers[i % len(p.answers)], p) for p in points for i, q in enumerate(p.questions)]


def row(spoken: list[Turn], system: str = "") -> dict:
    """A dialogue; topic, section and facts are those of its last answer."""
    messages = [{"role": "system", "content": system}] if system else []
    for turn in spoken:
        messages += [
            {"role": "user", "content": turn.question},
            {"role": "assistant", "content": say(turn.answer, turn.point.topic)},
        ]
    last = spoken[-1].point
    return {"messages": messages, "topic": last.topic, "section": last.section, "facts": last.facts}


def training_rows(
    on: list[Point], off: list[Point], chat: list[Point], leads: list[str], systems: list[str], draw: random.Random
) -> list[dict]:
    """Each question once as the opening of a row, some also, or only, as a second turn."""
    singles = turns(on)
    offs, chats = turns(off), turns(chat)
    rows: list[dict] = []
    lead = 0

    def second(turn: Turn) -> Turn:
        nonlocal lead
        lead += 1
        return Turn(leads[lead % len(leads)].format(q=turn.question), turn.answer, turn.point)

    def follows(first: Turn, pool: list[Turn]) -> list[Turn]:
        return [
            t for t in pool if t.point is not first.point and t.point.section == first.point.section and SECOND.match(t.question)
        ]

    openings = draw.sample([t for t in singles if follows(t, singles)], k=TWO_TURNS)
    used: set[str] = set()
    for first in openings:  # the second question is asked alone elsewhere too; no question opens two rows
        choices = [t for t in follows(first, singles) if t.question not in used] or follows(first, singles)
        then = draw.choice(choices)
        used.add(then.question)
        rows.append(row([first, second(then)]))
    rest = [t for t in singles if t not in openings]
    draw.shuffle(rest)
    for firsts, seconds in ((rest, offs), (offs, rest), (chats, rest)):
        polite = [t for t in seconds if SECOND.match(t.question)]
        starts = [t for t in firsts if t.point.answers[0].startswith(("it is good", "I am well"))] if firsts is chats else firsts
        for first, then in zip(draw.sample(starts, k=min(MIXED, len(starts))), draw.sample(polite, k=MIXED), strict=False):
            firsts.remove(first)
            seconds.remove(then)
            rows.append(row([first, Turn(then.question, then.answer, then.point) if firsts is chats else second(then)]))
    rows += [row([t]) for t in [*rest, *offs, *chats]]
    draw.shuffle(rows)
    for i, chosen in enumerate(draw.sample(range(len(rows)), k=SYSTEMS)):
        rows[chosen]["messages"].insert(0, {"role": "system", "content": systems[i % len(systems)]})
    return rows


def held_out_rows(points: list[Point]) -> list[dict]:
    return [row([Turn(q, r, p)]) for p in points for q, r in zip(p.held_out, p.references, strict=True)]


def main() -> None:
    draw = random.Random(1)  # one of the 6 seeds of 1 to 24 that wear out no 8 words (1 % of rows) and ask no question twice
    on, off, chat = (
        read(HERE / f"{name}.txt", topic) for name, topic in (("on_topic", "on"), ("off_topic", "off"), ("chitchat", "chitchat"))
    )
    leads, systems = (
        [line for line in block.splitlines()[1:] if line] for block in (HERE / "turns.txt").read_text().split("# ")[1:]
    )
    for name, rows in (
        ("train", training_rows(on, off, chat, leads, systems, draw)),
        ("held_out", held_out_rows([*on, *off, *chat])),
    ):
        path = OUT / f"{name}.jsonl"
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
        print(f"{path.name}: {len(rows)} rows, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
