"""Faults that one row shows by itself. A detector takes a chunk's `Rows` and tells which of them have it, and where."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tunesmith import redact
from tunesmith.data.findings import text as t
from tunesmith.data.findings.text import Hits, Joined, Rows

REPEATED = 120  # of a longer one the beginning: worked answers often begin with a clause of the question
COPY = 40  # characters of a prompt that an answer repeats by more than chance
OPEN_ENDED = 80  # an answer shorter than this may end as it likes

REFUSAL = re.compile(
    r"^(?:i(?:'|’)?m (?:very |so |really )?sorry,? (?:but )?(?:i|as)\b.{0,40}?"
    r"(?:can(?:no|')?t|unable|not able|won't|do not|don't)"
    r"|(?:i(?:'|’)?m|i am) (?:sorry,? (?:but )?)?(?:not able|unable) to "
    r"(?:assist|help|provide|fulfill|answer|comply|generate|create)"
    r"|i (?:can(?:no|'|’)t|can not|won(?:'|’)t|will not) (?:assist|help|provide|fulfill|comply|answer|generate|create|do that|share)"
    r"|(?:sorry|unfortunately),? (?:but )?i (?:can(?:no|'|’)t|can not|am unable|am not able))",
    re.MULTILINE,
)
REFUSAL_GATES = ("sorry", "unable to", "not able to", "can't", "can’t", "cannot", "can not", "i won't", "i won’t", "i will not")
BOILERPLATE = re.compile(
    r"\bas an? (?:large |artificial )?(?:ai|a\.i\.|language|artificial intelligence)(?: language)? ?(?:model|assistant|chatbot)?\b"
    r"(?=,| i\b| developed| trained)"
    r"|\bi(?:'|’)?(?: a)?m (?:just |only )?an? (?:ai|large language|language|artificial intelligence)"
    r"(?: language)? (?:model|assistant|chatbot)\b"
    r"|\bmy (?:knowledge cutoff|last knowledge update|training data (?:only )?(?:goes|extends|ends))"
    r"|\b(?:trained|developed|created) by openai\b|\bi hope this (?:email|message) finds you well\b|\bregenerate response\b"
    r"|\bi don(?:'|’)t have personal (?:opinions|beliefs|experiences|feelings)\b"
    r"|\bals (?:ein )?ki-(?:sprach)?modell\b|\ben tant qu(?:e |'|’)(?:modèle de langage|ia)\b|\bcomo modelo de lenguaje\b"
)
BOILERPLATE_GATES = (
    "as an ai", "as a large", "as a language", "as an artificial", "an ai ", "language model", "knowledge cutoff",
    "knowledge update", "training data", "openai", "finds you well", "regenerate response", "personal ", "als ki", "als ein ki",
    "en tant qu", "como modelo",
)  # fmt: skip
SPECIAL = re.compile(
    r"<\|[A-Za-z0-9_ ]{2,40}\|>|<｜[^｜\n]{2,40}｜>|\[/?INST\]|<</?SYS>>|</?s>|<(?:bos|eos|pad|unk)>|<(?:start|end)_of_turn>"
    r"|\[(?:PAD|UNK|CLS|MASK|BOS|EOS|SEP)\]"
)
SPECIAL_GATES = ("<|", "<｜", "INST]", "SYS>>", "<s>", "</s>", "<bos>", "<eos>", "<pad>", "<unk>", "_of_turn>",
                 "[PAD]", "[UNK]", "[CLS]", "[MASK]", "[BOS]", "[EOS]", "[SEP]")  # fmt: skip
CONFLICT = re.compile(r"^(?:<{7}(?: |$)|>{7}(?: |$)|\|{7}(?: |$))", re.MULTILINE)
ROLE_LINE = re.compile(
    r"^(?:#{2,4} ?(?:Instruction|Input|Response|User|Human|Assistant|System|Prompt)\b:?"
    r"|\**(?:Human|User|Assistant|System|USER|ASSISTANT|HUMAN)\**:)",
    re.MULTILINE,
)
ROLE_GATES = ("## ", "Human", "User", "Assistant", "System", "USER:", "ASSISTANT:", "HUMAN:", "##Ins", "##Res")
# UTF-8 read as Latin-1 or Windows-1252, or what was left where a decoder gave up
MOJIBAKE = re.compile(
    r"\ufffd|Ã[\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013\u2014\u2018-\u2022\u2026\u2030\u20ac\u2122]"
    r"|â€[\u0080-\u00bf\u0153\u2122\u02dc\u201c\u201d\u00a6\u0161\u02c6\u2018\u2019\u2013\u2014]?|Â[\u00a0-\u00bf]|ðŸ|ï»¿|Ð[\u0080-\u00bf]Ñ"
)
MOJIBAKE_GATES = ("\ufffd", "Ã", "â€", "Â", "ðŸ", "ï»¿", "Ð")
CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\x80-\x84\x86-\x9f]|\x1b\\[[0-9;]*m")
CONTROL_BYTES = bytes((*range(9), 11, *range(14, 32), 127))
# ZWNJ and ZWJ belong to Persian, Indic scripts and emoji: they are a fault between Latin letters only. Tag characters write unseen text.
INVISIBLE = re.compile(
    "[\u200b\u2060\u00ad\u202a-\u202e\u2066-\u2069\U000e0001-\U000e007f]|(?<=[A-Za-z])[\u200c\u200d](?=[A-Za-z])|(?<!^)\ufeff"
)
TAIL = re.compile(
    r"(?:[,(\[{–—:-]|(?<![.!?])\b(?:the|a|an|of|to|and|or|with|for|in|that|which|is|are|was|by|from|as|at|on"
    r"|because|your|their|its|this|der|die|das|und|ein|eine|zu|mit|für|von|le|la|les|de|et|des|du|un|une|el|los|y|en|que))$",
    re.MULTILINE,
)
PLACEHOLDER = re.compile(
    r"^(?:n/?a|null|none|nan|nil|todo|tbd|undefined|unknown|-+|\.+|…|_+|\?+|<[^<>\n]{0,20}>|lorem ipsum.*"
    r"|\[?(?:your )?(?:answer|response|output|text)(?: here)?\]?)[.!]?$",
    re.IGNORECASE | re.DOTALL,
)


def placeholder(rows: Rows) -> Hits:
    found: Hits = {}
    for part, answer in enumerate(rows.answers.parts):
        if len(answer) < 32 or answer[:11].lower() == "lorem ipsum":
            plain = answer.strip()
            if not any(c.isalnum() for c in plain) or PLACEHOLDER.match(plain):
                found.setdefault(rows.answers.rows[part], (part, 0, len(answer)))
    return found


def truncated(rows: Rows) -> Hits:
    found: Hits = {}
    answers = rows.answers
    for m in TAIL.finditer(rows.tails.text):
        row, part, start, end = rows.tails.at(*m.span())
        answer = answers.parts[part]
        if len(answer) >= OPEN_ENDED and end == len(rows.tails.parts[part]):
            found.setdefault(row, (part, max(0, len(answer.rstrip()) - (end - start)), len(answer.rstrip())))
    if "```" in answers.text:
        for part, answer in enumerate(answers.parts):
            if answer.count("```") % 2:
                at = answer.rfind("```")
                found.setdefault(answers.rows[part], (part, at, at + 3))
    return found


def role_order(rows: Rows) -> Hits:
    """Told by roles alone: the excerpt is the first message that stands wrong. An answer that calls a tool comes before one."""
    found: Hits = {}
    part = 0
    for i, c in enumerate(rows.conversations):
        if c.kind == "chat":
            before, wrong = "", -1
            for k, m in enumerate(c.messages):
                role = m.role
                if (
                    (role == "system" and k)
                    or (role == "assistant" and before in ("", "system", "assistant"))
                    or (role == "user" and before in ("user", "tool") and k)
                ):
                    wrong = k
                    break
                before = role
            if wrong < 0 and before == "user":
                wrong = len(c.messages) - 1
            if wrong < 0 and any(f.startswith(("joined", "merged")) for f in c.fixes):
                wrong = 0
            if wrong >= 0:
                found[i] = (part + wrong, 0, 0)
        part += len(c.messages)
    return found


def prompt_in_answer(rows: Rows) -> Hits:
    found: Hits = {}
    answers = rows.answers
    part_of = {row: part for part, row in enumerate(answers.rows)}  # the last of each row
    for row, prompt, answer in rows.pairs:
        if len(answer) >= COPY <= len(prompt):
            key = prompt[:REPEATED]
            at = answer.find(key)
            if at >= 0 and len(answer) > len(prompt) * 0.5:
                found[row] = (part_of[row], at, at + len(key))
    if any(g in answers.text for g in ROLE_GATES):
        for m in ROLE_LINE.finditer(answers.text):
            row, part, start, end = answers.at(*m.span())
            found.setdefault(row, (part, start, end))
    return found


def refusal(rows: Rows) -> Hits:
    return _of_heads(rows, rows.heads.find(REFUSAL, REFUSAL_GATES, lower=True))


def _of_heads(rows: Rows, hits: Hits) -> Hits:
    """Places in `heads` are places in the answers but for the blanks before."""
    shift = {part: len(rows.answers.parts[part]) - len(rows.answers.parts[part].lstrip()) for part, _, _ in hits.values()}
    return {row: (part, start + shift[part], end + shift[part]) for row, (part, start, end) in hits.items()}


def boilerplate(rows: Rows) -> Hits:
    return rows.answers.find(BOILERPLATE, BOILERPLATE_GATES, lower=True)


def special_tokens(rows: Rows) -> Hits:
    return rows.all.find(SPECIAL, SPECIAL_GATES)


def conflict_markers(rows: Rows) -> Hits:
    return rows.all.find(CONFLICT, ("<<<<<<<", ">>>>>>>", "|||||||"))


def mojibake(rows: Rows) -> Hits:
    return {} if rows.all.text.isascii() else rows.all.find(MOJIBAKE, MOJIBAKE_GATES)


def control_characters(rows: Rows) -> Hits:
    text = rows.all.text
    if text.isascii() and len(text.encode().translate(None, CONTROL_BYTES)) == len(text):  # 10 times quicker than the pattern
        return {}
    return rows.all.find(CONTROL)


def invisible(rows: Rows) -> Hits:
    return {} if rows.all.text.isascii() else rows.all.find(INVISIBLE)


# ---- personal data and secrets -------------------------------------------------------------------------------------------------


def email(rows: Rows) -> Hits:
    def good(m: re.Match[str]) -> bool:
        before = m.string[m.start() - 1 : m.start()] if m.start() else ""
        return before.isascii() and (before.isalnum() or before in ("_", "%", "+", "-")) and not t.RESERVED.search(m[0])

    hits = rows.all.find(t.EMAIL_AT, ("@",), good=good)
    return {row: (part, _left(rows.all.parts[part], start), end) for row, (part, start, end) in hits.items()}


def _left(text: str, at: int) -> int:
    """Where the name before the @ begins."""
    m = re.search(r"[A-Za-z0-9._%+'-]{1,64}\Z", text[max(0, at - 64) : at])
    return at - len(m[0]) if m else at


def _numbers(rows: Rows) -> dict[str, Hits]:
    """Phones, cards and IBANs: they lie in the same few stretches with many digits."""
    found: dict[str, Hits] = {"phone": {}, "card": {}, "iban": {}}
    text = rows.all.text
    for low, high in rows.all.numbers():
        taken: list[tuple[int, int]] = []
        for name, pattern, good in (("iban", t.IBAN, t.is_iban), ("card", t.CARD, t.is_card), ("phone", t.PHONE, t.is_phone)):
            for m in pattern.finditer(text, low, high):
                start, end = m.span()
                if not any(start < b and a < end for a, b in taken) and good(m[0]) and "\n" not in m[0]:
                    taken.append((start, end))
                    row, *place = rows.all.at(start, end)
                    found[name].setdefault(row, tuple(place))
    return found


def numbers_of(name: str):
    def detector(rows: Rows) -> Hits:
        known = rows.__dict__.get("_numbers")
        if known is None:
            known = rows.__dict__["_numbers"] = _numbers(rows)
        return known[name]

    return detector


def ip_address(rows: Rows) -> Hits:
    squeezed = rows.all.squeezed
    found: Hits = {}
    if any(d in squeezed for d in t.DOTTED):
        found = rows.all.find(t.IPV4, good=lambda m: t.is_ip(m[0]) and not _version(m))
    if any(c in rows.all.text for c in (":0:0:", ":0000:")) or rows.all.text.count(":") > 7 * 4:
        for row, place in rows.all.find(t.IPV6, good=lambda m: t.is_ip(m[0])).items():
            found.setdefault(row, place)
    return found


def _version(m: re.Match[str]) -> bool:
    """`version 1.2.3.4`, `v1.2.3.4`: four numbers that are no address."""
    return bool(
        re.search(r"(?:version|release|build|ver\.?|section|§) ?\Z", m.string[max(0, m.start() - 10) : m.start()], re.IGNORECASE)
    )


def api_key(rows: Rows) -> Hits:
    found: Hits = {}
    for start, end in sorted(_keys(rows.all)):
        row, *place = rows.all.at(start, end)
        found.setdefault(row, tuple(place))
    return found


def _keys(joined: Joined) -> Iterator[tuple[int, int]]:
    text = joined.text
    for gate in t.KEY_GATES:
        at = text.find(gate)
        while at >= 0:
            if m := redact.SHAPES.match(text, at):
                yield m.span()
            at = text.find(gate, at + 1)
    lower = joined.lower
    if any(g in lower for g in ("password", "passwd", "secret", "api_key", "apikey", "api-key", "access_key", "_token")):
        for m in redact.NAMED.finditer(text):
            value = m["secret"].strip("\"'").rstrip(",;.")
            kinds = sum(map(bool, (re.search(r"\d", value), re.search(r"[A-Za-z]", value))))
            if (
                kinds == 2
                and len(value) >= 8
                and value.isascii()
                and not re.search(r"[(){}<>$]|your|example|xxx", value, re.IGNORECASE)
            ):
                yield m.span("secret")


def private_key(rows: Rows) -> Hits:
    return rows.all.find(redact.PEM, ("PRIVATE KEY-----",))
