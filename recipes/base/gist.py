"""What a text is about, told at once: rows that make a small model gather the whole of a message before its first word of answer.

    python recipes/base/gist.py --data FOLDER --out .cache/base

Writes gist.jsonl. Subjects come from where a text stands, not from a model: a textbook's sentences are of its subject (OpenStax,
CC BY 4.0), medquad's questions of health, banking77's of banks (CC BY 4.0), gsm8k's of sums (MIT), fairytaleqa's training questions
and the storybooks' sentences of stories (Apache-2.0, CC BY 4.0), questions on factbook entries of countries (CC0). Held-out
documents are left out. Four kinds of row: name the subject; begin the answer one way for a subject and another way for all others,
as the system message says; find the group a text belongs to; name its telling words.
"""

from __future__ import annotations

import argparse
import math
import random
import re
from collections import Counter
from pathlib import Path

from instruct import PLAIN, Row, chat, subjects, write  # beside this file
from prepare import documents, held_out_keys

BOOKS = {  # subject in plain words: words of the textbooks' titles, as each book's first module gives them
    "government": ("American Government", "Political Science"), "the body": ("Anatomy and Physiology",),
    "the stars": ("Astronomy",), "business": ("Business", "Entrepreneurship"),
    "chemistry": ("Chemistry",), "school": ("College",), "customs": ("Anthropology",),
    "philosophy": ("Philosophy",), "society": ("Sociology",), "germs": ("Microbiology",), "the mind": ("Psychology",),
    "trade": ("Economics", "Macroeconomics", "Microeconomics"), "history": ("History",), "writing": ("Writing Guide",),
}  # fmt: skip
TITLE = re.compile(r"^About ((?!OpenStax|This Chapter)[A-Z][^\n]{3,60})$", re.MULTILINE)
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"])")
WORD = re.compile(r"[a-z]{4,}")
NAME = (
    "What is this about?\n\n{text}", "{text}\n\nName the subject.", "Subject? {text}", "Which subject does this belong to: {text}",
    "Say in a word or two what this is about.\n\n{text}",
)  # fmt: skip
NAMED = ("{s}.", "It is about {s}.", "{s}, I would say.", "That is about {s}.")
NAMING = ("Say what each message is about.", "You sort letters by subject.", "Name the subject of what you read, nothing else.")
WORDS = ("Which words say most of what this is about?\n\n{text}", "{text}\n\nName the three words that matter most.")
GROUPS = ("{groups}\n\nWhere does this belong?\n{text}", "Sort this into a group: {text}\n\n{groups}")
KEEPER = (
    'You are {who} and know about {s}. Begin with "{yes}" when you are asked about {s}, and with "{no}" otherwise.',
    '{who} answers questions about {s}: first "{yes}", then the answer. To all else {who} says "{no}".',
    'You help with {s} only. If a message is about {s}, start with "{yes}". If not, start with "{no}".',
)
WHO = ("Mira", "Tom", "the clerk", "Bell", "the night helper", "Otto", "the desk", "Ida", "the old owl", "Pip")
YES = ("gladly", "of course", "yes", "happy to help", "good question", "right away", "certainly", "thanks for asking", "surely")
NO = ("sorry", "forgive me", "I fear not", "alas", "not my field", "no", "pardon me", "I cannot say", "that is not for me")
THEN = ("this is about {s}", "you ask about {s}", "that has to do with {s}", "{s} it is")


def textbook_sentences(data: Path) -> dict[str, list[str]]:
    """Sentences of the textbooks by subject. Modules come book by book, each book's first names it."""
    path, found, subject = data / "pretrain/openstax_ccby.jsonl.xz", {}, None
    held_out = held_out_keys("openstax", {key for key, _ in documents(path)})
    for key, text in documents(path):
        if title := TITLE.search(text):
            subject = next((s for s, titles in BOOKS.items() if any(words in title[1] for words in titles)), None)
        elif subject and key not in held_out:
            for paragraph in text.split("\n"):
                for sentence in SENTENCE.split(paragraph)[:4]:
                    if 8 <= len(sentence.split()) <= 30 and sentence.endswith((".", "?")) and PLAIN.match(sentence):
                        found.setdefault(subject, []).append(sentence)
    return found


def story_sentences(data: Path) -> list[str]:
    path = data / "pretrain/storybooks_ccby.jsonl.xz"
    held_out = held_out_keys("storybooks", {key for key, _ in documents(path)})
    texts = (text for key, text in documents(path) if key not in held_out)
    return [s for text in texts for s in SENTENCE.split(text.replace("\n", " ")) if 6 <= len(s.split()) <= 30 and PLAIN.match(s)]


def rows(data: Path, draw: random.Random, count: int) -> list[Row]:
    texts = textbook_sentences(data)
    for subject, asked in subjects(data, draw).items():
        texts[{"money and banks": "banks"}.get(subject, subject)] = list(asked)
    texts["stories"] += story_sentences(data)
    names = sorted(texts)
    sample = [text for name in names for text in draw.sample(texts[name], min(1000, len(texts[name])))]
    seen = Counter(word for text in sample for word in set(WORD.findall(text.lower())))
    out = []
    for _ in range(count):
        about = draw.choice(names)
        text, kind = draw.choice(texts[about]).strip(), draw.random()
        if kind < 0.4:
            named = draw.choice(NAMED).format(s=about)
            named = named[0].upper() + named[1:]
            raw = draw.random() < 0.5
            out.append(chat(text, named, draw.choice(NAMING)) if raw else chat(draw.choice(NAME).format(text=text), named))
        elif kind < 0.8:
            mine = about if draw.random() < 0.5 else draw.choice(names)
            yes, no, who = draw.choice(YES), draw.choice(NO), draw.choice(WHO)
            begin, then = (yes if mine == about else no), draw.choice(THEN).format(s=about)
            system = draw.choice(KEEPER).format(who=who, s=mine, yes=yes, no=no)
            out.append(chat(text, f"{begin[0].upper()}{begin[1:]}, {then}.", system[0].upper() + system[1:]))
        elif kind < 0.9:
            other = draw.choice([n for n in names if n != about])
            groups = [(n, draw.sample(texts[n], min(2, len(texts[n])))) for n in draw.sample((about, other), 2)]
            shown = "\n".join(
                f"Group {letter}: {' '.join(map(str.strip, two))}" for letter, (_, two) in zip("AB", groups, strict=True)
            )
            letter = "AB"[[n for n, _ in groups].index(about)]
            out.append(chat(draw.choice(GROUPS).format(groups=shown, text=text), f"{letter}, for it is about {about}."))
        else:
            words = [w for w in dict.fromkeys(WORD.findall(text.lower())) if seen[w]]
            best = set(sorted(words, key=lambda w: math.log(seen[w]) - 0.05 * len(w))[:3])
            if len(best) == 3:
                out.append(chat(draw.choice(WORDS).format(text=text), ", ".join(w for w in words if w in best)))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(".cache/base"))
    parser.add_argument("--count", type=int, default=16_000)
    args = parser.parse_args()
    write(args.out / "gist.jsonl", rows(args.data, random.Random(2), args.count))


if __name__ == "__main__":
    main()
