"""Texts mended: encoding damage undone where that is proven, signs without meaning taken out, personal data replaced.

Each function takes what the detectors of data/findings look at, so that what they find is what is mended.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from tunesmith import redact
from tunesmith.data.findings import rows as detect
from tunesmith.data.findings.text import Joined

ROUNDS = 3  # text that was damaged twice is mended twice; what a round brings to light is looked at again

# ---- encoding ------------------------------------------------------------------------------------------------------------------

# The byte of each character that a decoder for Windows-1252 or Latin-1 makes of bytes beyond ASCII.
_BYTE = {chr(b): b for b in range(0x80, 0x100)}
_BYTE |= {bytes([b]).decode("cp1252"): b for b in range(0x80, 0xA0) if b not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)}


def _class(low: int, high: int) -> str:
    return "[" + "".join(re.escape(c) for c, b in _BYTE.items() if low <= b <= high) + "]"


_REST = _class(0x80, 0xBF)
SCRAMBLED = re.compile(
    f"{_class(0xC2, 0xDF)}{_REST}|{_class(0xE0, 0xEF)}{_REST}{{2}}|{_class(0xF0, 0xF4)}{_REST}{{3}}"  # as UTF-8 is built
)
# A text about such damage shows it on purpose.
ABOUT = re.compile(r"mojibake|utf-?8|latin-?1|windows-?1252|cp-?1252|iso-?8859|\bencoding|unicode", re.IGNORECASE)
C1 = re.compile("[\x80-\x84\x86-\x9f]")


def clean(text: str, seen: Counter[str]) -> str:
    """Without encoding damage that can be undone, control characters, and characters that nobody sees. `seen` counts them."""
    if text.isascii() and text.isprintable():
        return text
    if not ABOUT.search(text):
        for _ in range(ROUNDS):
            if not detect.MOJIBAKE.search(text):
                break
            text = _counted(SCRAMBLED, _unscrambled, text, seen, "characters decoded again as UTF-8")
    text = _counted(C1, _windows, text, seen, "control characters read as Windows-1252")
    text = _counted(re.compile("\x0b"), lambda m: "\n", text, seen, "vertical tabs made line breaks")
    text = _counted(detect.CONTROL, lambda m: "", text, seen, "control characters removed")
    unseen = re.compile(f"^\ufeff+|{detect.INVISIBLE.pattern}")
    return _counted(unseen, lambda m: m[0] if detect.is_bidi(m) else "", text, seen, "invisible characters removed")


def _counted(pattern: re.Pattern[str], new: Callable[[re.Match[str]], str], text: str, seen: Counter[str], what: str) -> str:
    def one(m: re.Match[str]) -> str:
        made = new(m)
        seen[what] += made != m[0]
        return made

    return pattern.sub(one, text)


def _unscrambled(m: re.Match[str]) -> str:
    """The character whose UTF-8 bytes were read as single characters; as it stands where it would be none that people write."""
    try:
        made = bytes(_BYTE[c] for c in m[0]).decode()
    except UnicodeDecodeError:
        return m[0]
    return made if unicodedata.category(made) not in ("Cc", "Cn", "Co", "Cs") else m[0]


def _windows(m: re.Match[str]) -> str:
    """U+0093 is a quotation mark of Windows-1252 that was read as Latin-1, as HTML has it."""
    try:
        return m[0].encode("latin-1").decode("cp1252")
    except UnicodeDecodeError:
        return m[0]


# ---- personal data -------------------------------------------------------------------------------------------------------------

SAID = {
    "key": ("KEY", "key or password", "keys or passwords"),
    "iban": ("IBAN", "bank account", "bank accounts"),
    "card": ("CARD", "card number", "card numbers"),
    "phone": ("PHONE", "phone number", "phone numbers"),
    "email": ("EMAIL", "e-mail address", "e-mail addresses"),
    "ip": ("IP", "IP address", "IP addresses"),
}
KEYS = ("key",)
PLACEHOLDER = re.compile(r"\[([A-Z]+)(?:_(\d+))?\]")
SECRET_KEY = re.compile(redact.NAME, re.IGNORECASE)


def spans(joined: Joined, kinds: tuple[str, ...]) -> Iterator[tuple[int, int, str]]:
    """What is personal in the joined text: the places that the detectors see, in order, none within another."""
    found: list[tuple[int, int, str]] = []
    if "key" in kinds:
        found += [(*m.span(), "key") for m in redact.PEM.finditer(joined.text)]
        found += [(*span, "key") for span in detect.key_spans(joined)]
    found += [(start, end, name) for name, start, end in detect.number_spans(joined) if name in kinds]
    if "email" in kinds:
        found += [(*span, "email") for span in detect.email_spans(joined)]
    if "ip" in kinds:
        found += [(*span, "ip") for span in detect.ip_spans(joined)]
    last = 0
    for start, end, kind in sorted(found, key=lambda s: (s[0], -s[1])):
        if start >= last:
            yield start, end, kind
            last = end


class Names:
    """The placeholders of one row: one person's address has one number all over the row, another's another."""

    def __init__(self, texts: list[str]):
        self.known: dict[tuple[str, str], str] = {}
        self.count: Counter[str] = Counter()
        for text in texts:  # those that stand there already are somebody else's
            for m in PLACEHOLDER.finditer(text) if "[" in text else ():
                self.count[m[1]] = max(self.count[m[1]], int(m[2] or 1))

    def of(self, kind: str, text: str) -> str:
        plain = re.sub(r"\D", "", text) if kind in ("phone", "card") else "".join(text.split())
        key = kind, plain if kind == "key" else plain.lower()
        if key not in self.known:
            word = SAID[kind][0]
            self.count[word] += 1
            self.known[key] = f"[{word}]" if self.count[word] == 1 else f"[{word}_{self.count[word]}]"
        return self.known[key]


def anonymous(texts: list[str], kinds: tuple[str, ...], seen: Counter[str]) -> list[str]:
    """The texts of one row with placeholders for personal data. A placeholder's neighbours are looked at again: a number beside a
    number may hide it."""
    names = Names(texts)
    for _ in range(ROUNDS):
        joined = Joined(texts, [0] * len(texts))
        by_part: dict[int, list[tuple[int, int, str]]] = {}
        for start, end, kind in spans(joined, kinds):
            _, part, begin, stop = joined.at(start, end)
            by_part.setdefault(part, []).append((begin, stop, kind))
        if not by_part:
            break
        texts = list(texts)
        for part, places in by_part.items():
            text, out, at = texts[part], [], 0
            for begin, stop, kind in places:
                out += [text[at:begin], names.of(kind, text[begin:stop])]
                seen[kind] += 1
                at = stop
            texts[part] = "".join([*out, text[at:]])
    return texts


def counted(seen: Counter[str]) -> str:
    """`2 e-mail addresses, 1 phone number`."""
    return ", ".join(f"{n} {SAID[kind][1 if n == 1 else 2]}" for kind, n in seen.items())


# ---- the texts of a value ------------------------------------------------------------------------------------------------------

LONG_NUMBER = 10**12  # an integer from which it may be a card number


def leaves(value: Any) -> Iterator[str]:
    """Every text inside, in order; a number that may be a card's is one too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for v in value.values():
            yield from leaves(v)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from leaves(v)
    elif _is_long(value):
        yield str(value)


def with_leaves(value: Any, new: Iterator[str]) -> Any:
    """The same value with other texts, in the order of `leaves`."""
    if isinstance(value, str):
        return next(new)
    if isinstance(value, dict):
        return {k: with_leaves(v, new) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [with_leaves(v, new) for v in value]
    if _is_long(value):
        text = next(new)
        return value if text == str(value) else text
    return value


def _is_long(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= LONG_NUMBER


def without_secret_keys(value: Any, seen: Counter[str]) -> Any:
    """Values whose own key says that they are secret (`password: ...`)."""
    if isinstance(value, dict):
        out = {}
        for k, v in value.items():
            if isinstance(k, str) and isinstance(v, str) and len(v) >= 4 and SECRET_KEY.fullmatch(k):
                seen["key"] += not PLACEHOLDER.fullmatch(v)
                out[k] = v if PLACEHOLDER.fullmatch(v) else "[KEY]"
            else:
                out[k] = without_secret_keys(v, seen)
        return out
    return [without_secret_keys(v, seen) for v in value] if isinstance(value, (list, tuple)) else value
