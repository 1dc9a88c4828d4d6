"""Faults that one row shows by itself. A detector takes a chunk's `Rows` and tells which of them have it, and where."""

from __future__ import annotations

import re
from bisect import bisect
from collections.abc import Iterator

from tunesmith import redact
from tunesmith.data.findings import text as t
from tunesmith.data.findings.text import Hits, Joined, Rows

REPEATED = 120  # of a longer one the beginning: worked answers often begin with a clause of the question
COPY = 40  # characters of a prompt that an answer repeats by more than chance
OPEN_ENDED = 80  # an answer shorter than this may end as it likes

REFUSAL = re.compile(
    r"(?:i(?:'|’)?m (?:very |so |really )?sorry,? (?:but )?(?:i|as)\b.{0,40}?"
    r"(?:can(?:no|')?t|unable|not able|won't|do not|don't)"
    r"|(?:i(?:'|’)?m|i am) (?:sorry,? (?:but )?)?(?:not able|unable) to "
    r"(?:assist|help|provide|fulfill|answer|comply|generate|create)"
    r"|i (?:can(?:no|'|’)t|can not|won(?:'|’)t|will not) "
    r"(?:assist|help|provide|fulfill|comply|answer|generate|create|do that|share)"
    r"|i apologi[sz]e,? but i|i must (?:respectfully |politely )?decline"
    r"|(?:sorry|unfortunately),? (?:but )?i (?:can(?:no|'|’)t|can not|am unable|am not able))"
)
REFUSAL_BEGINS = ("i'", "i’", "im ", "i am ", "i can", "i won", "i will not ", "i apolog", "i must ", "sorry", "unfortunately")
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
    "an ai", "as a large", "as a language", "as an artificial", "language model", "knowledge cutoff",
    "knowledge update", "training data", "openai", "finds you well", "regenerate response", "personal ", "als ki", "als ein ki",
    "en tant qu", "como modelo",
)  # fmt: skip
SPECIAL = re.compile(
    r"<\|[A-Za-z0-9_ ]{2,40}\|>|<｜[^｜\n]{2,40}｜>|\[/?INST\]|<</?SYS>>|</?s>|<(?:bos|eos|pad|unk)>|<(?:start|end)_of_turn>"
    r"|\[(?:PAD|UNK|CLS|MASK|BOS|EOS|SEP)\]"
)
SPECIAL_GATES = (
    "|>", "｜>", "SYS>>", "<s>", "</s>", "os>", "<pad>", "<unk>", "_of_turn>", "INST]", "PAD]", "UNK]", "CLS]", "MASK]", "OS]",
    "SEP]",
)  # fmt: skip
CONFLICT = re.compile(r"^(?:<{7}(?: |$)|>{7}(?: |$)|\|{7}(?: |$))", re.MULTILINE)
ROLE_LINE = re.compile(
    r"^(?:#{2,4} ?(?:Instruction|Input|Response|User|Human|Assistant|System|Prompt)\b:?"
    r"|\**(?:Human|User|Assistant|System|USER|ASSISTANT|HUMAN)\**:)",
    re.MULTILINE,
)
ROLE_GATES = (
    *(f"#{gap}{name}" for gap in ("", " ") for name in ("Ins", "Inp", "Res", "Pro")),
    "Human", "User", "Assistant", "System", "USER:", "ASSISTANT:", "HUMAN:",
)  # fmt: skip
# UTF-8 read as Latin-1 or Windows-1252, or what was left where a decoder gave up
MOJIBAKE = re.compile(
    r"\ufffd|[ÃÂ][\x80-\xbf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u2022\u2026\u2030\u20ac\u2122]"
    r"|â(?:€|[\x80-\x9f\u201a][\x80-\xbf])|ð(?:Ÿ|\x9f)|ï»¿|[ÐÑ][\x80-\xbf][ÐÑ]"
)
MOJIBAKE_SIGNS, MARK = frozenset("\ufffdÃÂâðÐÑ"), frozenset("ï»¿")
CONTROL = re.compile("\x1b\\[[0-9;]*m|[\x00-\x08\x0b\x0e-\x1f\x7f\x80-\x84\x86-\x9f]")
CONTROL_BYTES = bytes(b for b in (*range(32), *range(127, 160)) if b not in (9, 10, 12, 13, 0x85))
# ZWNJ and ZWJ belong to Persian, Indic scripts and emoji: they are a fault between Latin letters only. A zero-width space parts
# words in Thai, Lao, Burmese and Khmer. Tag characters write text that nobody sees, but behind a black flag they are a flag.
INVISIBLE = re.compile(
    "(?<![\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff])\u200b"
    "|[\u2060\u00ad\u202a-\u202e\u2066-\u2069]|(?<=[A-Za-z])[\u200c\u200d](?=[A-Za-z])|(?<!^)\ufeff"
    "|(?<![\U0001f3f4\U000e0001-\U000e007f])[\U000e0001-\U000e007f]"
)
_CODES = (0x200B, 0x200C, 0x200D, 0x2060, 0xAD, 0xFEFF, *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xE0001, 0xE0080))
UNSEEN = frozenset(map(chr, _CODES))
BIDI = frozenset("\u202a\u202b\u202c\u2066\u2067\u2068\u2069")
RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]")
OPEN_SIGNS = frozenset(",([{–—:-")
OPEN_WORDS = frozenset(re.findall(r"\S+",
    "the a an of to and or with for in that which is are was by from as at on because your their its this der die das und ein eine"
    " zu mit für von le la les de et des du un une el los y en que"
))  # fmt: skip
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
    for part, answer in enumerate(answers.parts):
        if len(answer) >= OPEN_ENDED:
            words = answer[-32:].rsplit(None, 1)
            word = words[-1] if words else ""
            if word in OPEN_WORDS or (word[-1:] in OPEN_SIGNS and word and word[-2:] != "--"):
                end = len(answer.rstrip())
                found.setdefault(answers.rows[part], (part, end - len(word), end))
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
    if answers.occurring(ROLE_GATES):
        for m in ROLE_LINE.finditer(answers.text):
            row, part, start, end = answers.at(*m.span())
            found.setdefault(row, (part, start, end))
    return found


def refusal(rows: Rows) -> Hits:
    """At the beginning of an answer, in one line."""
    found: Hits = {}
    answers = rows.answers
    for part, answer in enumerate(answers.parts):
        head = t.lowered(answer[:160].lstrip())
        if head.startswith(REFUSAL_BEGINS) and (m := REFUSAL.match(head.replace("\n", " "))):
            skipped = len(answer) - len(answer.lstrip())
            found.setdefault(answers.rows[part], (part, skipped, skipped + m.end()))
    return found


def boilerplate(rows: Rows) -> Hits:
    return rows.answers.find(BOILERPLATE, BOILERPLATE_GATES, 60, lower=True)


def special_tokens(rows: Rows) -> Hits:
    return rows.all.find(SPECIAL, SPECIAL_GATES, 48)


def conflict_markers(rows: Rows) -> Hits:
    return rows.all.find(CONFLICT, ("<<<<<<<", ">>>>>>>", "|||||||"), 10)


def mojibake(rows: Rows) -> Hits:
    return rows.all.find(MOJIBAKE) if rows.all.foreign & MOJIBAKE_SIGNS or rows.all.foreign >= MARK else {}


def control_characters(rows: Rows) -> Hits:
    data = rows.all.squeezed
    return (
        rows.all.find(CONTROL) if len(data.translate(None, CONTROL_BYTES)) < len(data) else {}
    )  # 10 times quicker than the pattern


def invisible(rows: Rows) -> Hits:
    found: Hits = {}
    text = rows.all.text
    for sign in sorted(rows.all.foreign & UNSEEN):
        at = text.find(sign)
        while at >= 0:
            if (m := INVISIBLE.match(text, at, at + 2)) and not is_bidi(m):
                row, *place = rows.all.at(at, at + 1)
                found[row] = min(found.get(row, tuple(place)), tuple(place))
            at = text.find(sign, at + 1)
    return found


def is_bidi(m: re.Match[str]) -> bool:
    """A direction mark among Hebrew or Arabic letters says how they run. An override (U+202D, U+202E) is never needed for that."""
    return m[0] in BIDI and bool(RIGHT_TO_LEFT.search(m.string, max(0, m.start() - 40), m.end() + 40))


# ---- personal data and secrets -------------------------------------------------------------------------------------------------


def email(rows: Rows) -> Hits:
    return rows.all.first(email_spans(rows.all))


def email_spans(joined: Joined) -> Iterator[tuple[int, int]]:
    for m in t.EMAIL_AT.finditer(joined.text) if b"@" in joined.squeezed else ():
        before = m.string[m.start() - 1 : m.start()] if m.start() else ""
        if before.isascii() and (before.isalnum() or before in ("_", "%", "+", "-")) and not t.RESERVED.search(m[0]):
            yield _left(joined.text, m.start()), m.end()


def _left(text: str, at: int) -> int:
    """Where the name before the @ begins."""
    m = re.search(r"[A-Za-z0-9._%+'-]{1,64}\Z", text[max(0, at - 64) : at])
    return at - len(m[0].lstrip("'.+%-")) if m else at  # none begins with a quotation mark


ORDER = re.compile(  # `in order`, `in this case 030 1234567` are none: there a word such as number must stand between
    r"(?:\b(?:(?:(?<!\bin )(?<!\bto )order|invoice|ticket|tracking|isbn|sku|bestell\w*|auftrags?\w*|rechnungs?\w*)"
    r"(?:[ -]?(?:no|nr|number|nummer|id))?\.?"
    r"|(?:case|ref(?:erence)?|serial|part|item|article|model|kunden|vorgangs?)[ -]?(?:no|nr|number|nummer|id)\.?)"
    r"|(?<!#)#|№) ?[:=]? ?\Z",
    re.IGNORECASE,
)


def _is_phone(m: re.Match[str]) -> bool:
    """Not `order 0815-4711-123`: what a number is called decides, unless it begins with a country's code. Nor `0110 1001 0110`."""
    return (
        t.is_phone(m[0])
        and not set(m[0]) <= set("01 -/")
        and (m[0][0] == "+" or not ORDER.search(m.string[max(0, m.start() - 32) : m.start()]))
    )


NUMBERS = (  # and where a match ends, 0 if it is none
    ("iban", t.IBAN, t.iban_end),
    ("card", t.CARD, lambda m: m.end() if t.is_card(m[0]) else 0),
    ("phone", t.PHONE, lambda m: m.end() if _is_phone(m) else 0),
)


def number_spans(joined: Joined) -> Iterator[tuple[str, int, int]]:
    """Phones, cards and IBANs: they lie in the same few stretches with many digits."""
    for low, high in joined.numbers():
        taken: list[tuple[int, int]] = []  # in order, none over another
        for name, pattern, ends in NUMBERS:
            for m in pattern.finditer(joined.text, low, high):
                start, end = m.start(), ends(m)
                at = bisect(taken, (start, end)) if end else 0
                if end and not (at and taken[at - 1][1] > start) and not (at < len(taken) and taken[at][0] < end):
                    taken.insert(at, (start, end))
                    yield name, start, end


def numbers_of(name: str):
    def detector(rows: Rows) -> Hits:
        known = rows.__dict__.get("_numbers")
        if known is None:
            known = rows.__dict__["_numbers"] = list(number_spans(rows.all))
        return rows.all.first((start, end) for kind, start, end in known if kind == name)

    return detector


def ip_address(rows: Rows) -> Hits:
    return rows.all.first(ip_spans(rows.all))


def ip_spans(joined: Joined) -> Iterator[tuple[int, int]]:
    if t.DOTTED.search(joined.squeezed):
        yield from (m.span() for m in t.IPV4.finditer(joined.text) if t.is_ip(m[0]) and not _version(m))
    yield from _ipv6(joined.text)


FOUR_GROUPS = re.compile(r":[0-9A-Fa-f]{1,4}:[0-9A-Fa-f]{1,4}:[0-9A-Fa-f]{1,4}:")


def _ipv6(text: str) -> Iterator[tuple[int, int]]:
    for m in FOUR_GROUPS.finditer(text) if ":" in text else ():
        for whole in t.IPV6.finditer(text, max(0, m.start() - 6), m.end() + 30):
            if t.is_ip(whole[0]):
                yield whole.span()


def _version(m: re.Match[str]) -> bool:
    """`version 1.2.3.4`, `v1.2.3.4`: four numbers that are no address."""
    return bool(
        re.search(r"(?:version|release|build|ver\.?|section|§) ?\Z", m.string[max(0, m.start() - 10) : m.start()], re.IGNORECASE)
    )


def api_key(rows: Rows) -> Hits:
    return rows.all.first(sorted(key_spans(rows.all)))


NAME_GATES = ("password", "passwd", "secret", "api_key", "apikey", "api-key", "access_key", "_token")
GIVEN = re.compile(rb"[a-z0_.-]{0,30}[\"']?\s{0,4}[=:]")  # behind such a name: a value is given
NO_SECRET = re.compile(r"[(){}<>$]|your|example|xxx|•|^\[KEY(?:_\d+)?\]$", re.IGNORECASE)  # [KEY_12] is what `prepare` writes


def key_spans(joined: Joined) -> Iterator[tuple[int, int]]:
    text, data, lower = joined.text, joined.squeezed, joined.squeezed_lower
    for gate in joined.occurring(t.KEY_GATES):
        at = data.find(gate)
        while at >= 0:
            if m := redact.SHAPES.match(text, at):
                yield m.span()
            at = data.find(gate, at + 1)
    for gate in joined.occurring(NAME_GATES, lower=True):
        at = lower.find(gate)
        while at >= 0:
            if GIVEN.match(lower, at + len(gate)):
                for m in redact.NAMED.finditer(text, max(0, at - 40), at + 300):
                    value = m["secret"].strip("\"'").rstrip(",;.")
                    both = re.search(r"\d", value) and re.search(r"[A-Za-z]", value)
                    if both and len(value) >= 8 and value.isascii() and not NO_SECRET.search(value):
                        yield m.span("secret")
            at = lower.find(gate, at + 1)


def private_key(rows: Rows) -> Hits:
    return rows.all.find(redact.PEM, ("PRIVATE KEY-----",))
