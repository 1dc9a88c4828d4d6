"""A document's text as chunks: cut at headings, paragraphs, sentences, in this order, with exact character offsets.

`text[chunk.start : chunk.end] == chunk.text` for every chunk, chunks stand in order and do not overlap, and no word is cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

WORDS = 180  # a chunk's size: about 240 tokens, so that five fit a prompt of 2,048 beside the question and the answer
LONGEST_WORD = 200  # characters; what is longer (base64, minified code) is no word: it counts as several and may be cut

# Chinese, Japanese and their punctuation: written without spaces, so that each character counts as a word.
_CJK = "\u3001-\u303f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff01-\uff60"
_WORD = re.compile(rf"[{_CJK}]|[^\s{_CJK}]{{1,{LONGEST_WORD}}}")
_HEADING = re.compile(r"(#{1,6})[ \t]+(\S.*?)[ \t]*#*")
_UNDERLINE = re.compile(r"(={3,}|-{3,})[ \t]*")
_FENCE = re.compile(r" {0,3}(```|~~~)")
_SENTENCE = re.compile(r"""
    (?<=[.!?…])(?<!\bMr\.)(?<!\bMrs\.)(?<!\bMs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\bNo\.)\s+
    | (?<=[.!?…]["'”’)\]])\s+ | (?<=[。！？])\s*""", re.VERBOSE)  # fmt: skip
_LINE = re.compile(r"\n+")


@dataclass(frozen=True, slots=True)
class Chunk:
    """`text` is the document's [start, end); `context` the headings above it, as `Guide > Installing`."""

    start: int
    end: int
    text: str
    context: str = ""


@dataclass(frozen=True, slots=True)
class _Block:
    """A paragraph or a heading: its place, its words, the headings above it."""

    start: int
    end: int
    words: int
    path: tuple[str, ...]
    heading: bool


def split(text: str, words: int = WORDS) -> list[Chunk]:
    """Chunks of at most `words` words (a CJK character is a word). Short sections that follow each other share a chunk."""
    out: list[Chunk] = []
    held: list[_Block] = []

    def close(keep_headings: bool) -> None:
        """Held blocks become a chunk; headings at their end stay held where they are for what comes."""
        last = len(held)
        while keep_headings and last and held[last - 1].heading:
            last -= 1
        if last:
            out.append(_chunk(text, held[0].start, held[last - 1].end, _common([b.path for b in held[:last]])))
            del held[:last]

    for block in _blocks(text):
        size = sum(b.words for b in held)
        if size + block.words > words or (block.heading and size >= words // 3):
            close(keep_headings=True)
            size = sum(b.words for b in held)
        if size + block.words <= words:
            held.append(block)
            continue
        start = held[0].start if held else block.start
        held.clear()
        for piece in _pieces(text, start, block.end, words):
            out.append(_chunk(text, *piece, " > ".join(block.path)))
    close(keep_headings=False)
    return out


def sentences(text: str) -> list[tuple[int, int]]:
    """[start, end) of each sentence, without the space around it."""
    return [span for start, end in _cut(text, 0, len(text), _SENTENCE) if (span := _trimmed(text, start, end))]


def count(text: str) -> int:
    """Words of a text as `split` counts them."""
    return sum(1 for _ in _WORD.finditer(text))


def _chunk(text: str, start: int, end: int, context: str) -> Chunk:
    return Chunk(start, end, text[start:end], context)


def _common(paths: list[tuple[str, ...]]) -> str:
    """The headings that all blocks stand under."""
    shared = []
    for level in zip(*paths, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return " > ".join(shared)


def _blocks(text: str) -> Iterator[_Block]:
    """Paragraphs and headings in order. Inside a fenced block of code nothing is a heading, and blank lines do not part it."""
    path: list[tuple[int, str]] = []
    start = -1  # of the open paragraph
    end, at, fence = 0, 0, ""

    def paragraph() -> Iterator[_Block]:
        nonlocal start
        if start >= 0 and (span := _trimmed(text, start, end)):
            yield _Block(*span, count(text[span[0] : span[1]]), tuple(title for _, title in path), False)
        start = -1

    def heading(level: int, title: str, first: int, last: int) -> _Block:
        while path and path[-1][0] >= level:
            path.pop()
        path.append((level, title[:120]))
        span = _trimmed(text, first, last) or (first, last)
        return _Block(*span, count(text[span[0] : span[1]]), tuple(title for _, title in path), True)

    for line in text.split("\n"):
        here, at = at, at + len(line) + 1
        mark = _FENCE.match(line)
        if fence or mark:
            start, end = (here if start < 0 else start), here + len(line)
            if mark:
                fence = "" if fence == mark[1] else fence or mark[1]
        elif not line.strip():
            yield from paragraph()
        elif len(line) < 400 and (found := _HEADING.fullmatch(line)):
            yield from paragraph()
            yield heading(len(found[1]), found[2], here, here + len(line))
        elif start >= 0 and end - start < 400 and _UNDERLINE.fullmatch(line) and "\n" not in text[start:end]:
            yield heading(1 if line[0] == "=" else 2, text[start:end].strip(), start, here + len(line))
            start = -1
        else:
            start, end = (here if start < 0 else start), here + len(line)
    yield from paragraph()


def _pieces(text: str, start: int, end: int, words: int) -> Iterator[tuple[int, int]]:
    """A long block in pieces of at most `words` words: whole sentences, else whole lines, else whole words."""
    for a, b in _packed(text, [start, end], (_SENTENCE, _LINE, _WORD), words):
        if span := _trimmed(text, a, b):
            yield span


def _packed(text: str, ends: list[int], levels: tuple[re.Pattern[str], ...], words: int) -> Iterator[tuple[int, int]]:
    """The span cut at the first level and packed again; a part that is still too long is cut at the next level."""
    first = size = -1
    last = 0
    for a, b in _cut(text, ends[0], ends[1], levels[0]):
        n = count(text[a:b])
        if first >= 0 and size + n > words:
            yield first, last
            first = -1
        if n > words and len(levels) > 1:
            yield from _packed(text, [a, b], levels[1:], words)
            continue
        if first < 0:
            first, size = a, 0
        size, last = size + n, b
    if first >= 0:
        yield first, last


def _cut(text: str, start: int, end: int, at: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    """[start, end) cut behind each match."""
    before = start
    for match in at.finditer(text, start, end):
        if before < match.end() < end:
            yield before, match.end()
            before = match.end()
    if before < end:
        yield before, end


def _trimmed(text: str, start: int, end: int) -> tuple[int, int] | None:
    """Without the space around it; None when there is nothing else."""
    part = text[start:end]
    left = len(part) - len(part.lstrip())
    return (start + left, start + len(part.rstrip())) if left < len(part) else None
