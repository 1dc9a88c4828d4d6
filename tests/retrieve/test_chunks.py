"""Chunks: exact offsets for any text, in order, no word lost or cut, the size kept; headings."""

import re
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.retrieve import chunks
from tunesmith.retrieve.chunks import LONGEST_WORD, count, sentences, split

PIECES = st.sampled_from(
    ["# Title", "## Part two", "Title\n=====", "```\ncode # no heading\n\nmore\n```", "\n\n", "\n", " ", "Dr. Who left. ",
     "one two three", "A sentence! ", "“Quoted.” ", "漢字仮名。", "- item", "---", "\t", "\u2003", "naïve café", "x" * 50, "\u00a0",
     "# ", "\x0c", "word " * 30, "\u2028", "e.g. this"]
)  # fmt: skip
TEXTS = st.one_of(st.lists(PIECES, max_size=60).map("".join), st.text(max_size=300), st.lists(PIECES, max_size=60).map("\n".join))


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.integers(1, 40))
def test_offsets_are_exact_and_no_word_is_lost_or_cut(text, words):
    made = split(text, words)
    at = 0
    for c in made:
        assert text[c.start : c.end] == c.text and c.text == c.text.strip() and c.text
        assert c.start >= at and not text[at : c.start].strip(), "only space lies between chunks"
        assert count(c.text) <= words
        at = c.end
    assert not text[at:].strip()
    assert [w for c in made for w in chunks._WORD.findall(c.text)] == chunks._WORD.findall(text)


def test_what_is_no_word_is_cut():
    assert [len(c.text) for c in split("a " + "x" * 25 * LONGEST_WORD, 10)] == [
        2 + 9 * LONGEST_WORD,
        10 * LONGEST_WORD,
        6 * LONGEST_WORD,
    ]


def test_headings_are_kept_as_context_and_stay_with_what_stands_below():
    text = (
        "# Guide\n\nIntro.\n\n## Install\n\n"
        + "Do this now. " * 30
        + "\n\n## Use\n\n### Daily\n\n"
        + "Then rest. " * 40
        + "\n\nOther\n=====\n\nEnd."
    )
    made = split(text, 60)
    assert [c.context for c in made] == [
        "Guide",
        "Guide > Install",
        "Guide > Install",
        "Guide > Use > Daily",
        "Guide > Use > Daily",
        "Other",
    ]
    assert made[1].text.startswith("## Install\n\nDo this") and made[3].text.startswith("## Use\n\n### Daily\n\nThen")
    assert all(c.text.endswith(".") for c in made)


def test_short_sections_share_a_chunk_under_what_they_have_in_common():
    (only,) = split("# A\n\n## B\n\nOne.\n\n## C\n\nTwo.")
    assert only.context == "A" and split("# A\n\none\n\n# B\n\ntwo")[0].context == ""


def test_nothing_in_a_code_fence_is_a_heading():
    (only,) = split("# T\n\n```\n# comment\n\nx = 1\n```\n\nafter")
    assert only.context == "T"


def test_sentences():
    text = 'Mr. Fox ran. "Stop!" cried Dr. Owl.  Why? 3.5 is e.g. a number…\nEnd'
    assert [text[a:b] for a, b in sentences(text)] == [
        "Mr. Fox ran.",
        '"Stop!" cried Dr. Owl.',
        "Why?",
        "3.5 is e.g. a number…",
        "End",
    ] or [text[a:b] for a, b in sentences(text)] == [
        "Mr. Fox ran.",
        '"Stop!"',
        "cried Dr. Owl.",
        "Why?",
        "3.5 is e.g. a number…",
        "End",
    ]


def test_hostile_texts_take_time_in_step_with_their_size():
    for text in (
        "---\n" * 100_000,
        "# " * 100_000,
        "." * 400_000,
        '."' * 200_000,
        "```\n" * 100_000,
        " " * 400_000,
        "#" * 400_000,
        "a\n---\n" * 50_000,
    ):
        began = time.process_time()
        made = split(text)
        assert time.process_time() - began < 5, text[:8]
        assert re.sub(r"\s", "", "".join(c.text for c in made)) == re.sub(r"\s", "", text)
