"""From a document, as texts, fields, ids and marks in order, to token ids and learned spans.

Special tokens are ids of their own; each run of text between two of them is encoded whole, and the runs of many documents together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.data.fields import GUARD
from tunesmith.errors import TemplateError
from tunesmith.tokenizer import SPACE, Tokenizer

MEMO = 20_000  # markup runs whose ids are remembered

# what a document is put together from
TEXT, FIELD, ID, START, END = range(5)
Op = tuple[int, Any, Any]


def eos_id(tokenizer: Tokenizer) -> int:
    """The id of EOS, or TemplateError."""
    if (eos := tokenizer.eos_id) is None:
        raise TemplateError("the tokenizer names no EOS token", "set eos_token in the checkpoint's tokenizer_config.json")
    return eos


class Encoding:
    """The runs of text of a batch, encoded together."""

    def __init__(self, tokenizer: Tokenizer, memo: dict[tuple[str, str], list[int]]):
        self.tokenizer, self.memo = tokenizer, memo
        if len(memo) > MEMO:
            memo.clear()
        self.slots: list[list[int] | None] = []
        self.queue: dict[str, list[int]] = {"lead": [], "rest": []}
        self.texts: list[str] = []

    def _add(self, text: str, where: str, fixed: bool) -> int:
        """A slot that will hold the ids of `text`; `fixed` texts (no field in them) are remembered for the next rows."""
        self.texts.append(text)
        known = self.memo.get((where, text)) if fixed else None
        if known is None:
            if fixed:
                known = self.memo[where, text] = self.tokenizer.encode_batch([text], where)[0]
            else:
                self.queue[where].append(len(self.slots))
        self.slots.append(known)
        return len(self.slots) - 1

    def draft(self, ops: Sequence[Op], values: Mapping[int, str], guarded: bool, lead: bool = False) -> list[Any]:
        """Gather a document's runs. `lead`: the text after the first ids is still the beginning of a text (BOS put there by
        hand)."""
        tokenizer = self.tokenizer
        markers = tokenizer.marker_pattern
        items: list[Any] = []
        parts: list[str] = []
        fixed, cut, fixed_head, strip, first, learn = True, -1, True, False, True, False

        def flush(before: bool) -> None:
            nonlocal fixed, cut, strip, first
            text = "".join(parts)
            parts.clear()
            if guarded and GUARD in text:
                head = text[:cut].count(GUARD) if cut > 0 else 0
                text, cut = text.replace(GUARD, ""), cut - head
            if strip:
                stripped = text.lstrip(SPACE)
                cut = max(cut - len(text) + len(stripped), 0) if cut >= 0 else cut
                text = stripped
            if before:
                text = text.rstrip(SPACE)
            if text:
                where = "lead" if first else "rest"
                if cut <= 0 or cut >= len(text):
                    run = (self._add(text, where, fixed),)
                    items.extend([run] if cut < 0 or not learn else [START, run] if cut == 0 else [run, START])
                else:
                    items.append((self._add(text, where, fixed), self._add(text[:cut], where, fixed_head), cut, learn))
                first = False
            elif cut >= 0 and learn:
                items.append(START)
            fixed, cut, strip = True, -1, False

        for kind, a, b in ops:
            if kind == TEXT:
                parts.append(a)
            elif kind == FIELD:
                value = values[a]
                if b and markers is not None and (found := list(markers.finditer(value))):
                    at = 0
                    for match in found:
                        parts.append(value[at : match.start()])
                        index = tokenizer.token_to_id(match[0])
                        token = tokenizer.added[index]
                        fixed = fixed and at == match.start()
                        flush(token.lstrip)
                        items.append([index])
                        first, strip, at = False, token.rstrip, match.end()
                    value = value[at:]
                parts.append(value)
                fixed = False
            elif kind == ID:
                flush(b is not None and b.lstrip)
                items.append([a])
                first, strip = lead, b is not None and b.rstrip
            elif kind == START:
                if parts:
                    cut, fixed_head, learn = len("".join(parts)), fixed, a
                elif a:
                    items.append(START)
            else:
                items.append(END)
        flush(False)
        return items

    def run(self) -> None:
        """Encode everything gathered."""
        for where, slots in self.queue.items():
            if slots:
                for slot, ids in zip(slots, self.tokenizer.encode_batch([self.texts[s] for s in slots], where), strict=True):
                    self.slots[slot] = ids
                slots.clear()

    def finish(self, items: list[Any]) -> tuple[list[int], list[tuple[int, int]]]:
        """(ids, learned spans) of a document. Where the prompt's ids do not begin its run's ids, those of prompt and answer are
        joined."""
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        begin = 0
        for item in items:
            if item == START:
                begin = len(ids)
            elif item == END:
                spans.append((begin, len(ids)))
            elif isinstance(item, list):
                ids += item
            else:
                run = self.slots[item[0]]
                if len(item) == 4:
                    head = self.slots[item[1]]
                    if run[: len(head)] != head:
                        run = head + self.tokenizer.encode_batch([self.texts[item[0]][item[2] :]], "bare")[0]
                    if item[3]:
                        begin = len(ids) + len(head)
                ids += run
        return ids, spans
