"""What detectors look at: the messages of a chunk joined into one text; and excerpts in which nothing secret stands whole.

A pattern runs once over the text of a thousand rows, and not a thousand times. Most faults have a literal in them (`@`, `<|`,
`sk-`), and tables of which three and which five characters stand anywhere in a row tell that most of these literals do not: rows
without faults cost little (on GSM8K 2 us for the tables instead of 0.35 us for each of 150 searches).
"""

from __future__ import annotations

import ipaddress
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, cached_property

import numpy as np

from tunesmith import redact
from tunesmith.types import Conversation

ANSWERS = ("assistant", "completion")
PROMPTS = ("user", "prompt")
DIGITS, WINDOW = 10, 15  # every phone number, card or IBAN has 10 digits within 15 characters; other text hardly ever
EXCERPT = 64  # characters of a row that are shown
AROUND = 800  # characters on either side in which secrets are looked for before an excerpt is cut
Hits = dict[int, tuple[int, int, int]]  # row -> part, start and end in it


class Joined:
    """Texts end to end, a line break between. `find` tells the first place in each row. `among`: texts that these are a part of."""

    def __init__(self, parts: Sequence[str], rows: Sequence[int], among: Joined | None = None):
        self.parts, self.rows, self._among = parts, rows, among  # not itself: no collector runs that would free a circle
        self.text = "\n".join(parts)

    @cached_property
    def starts(self) -> list[int]:
        lengths = np.fromiter(map(len, self.parts), np.int64, len(self.parts)) + 1
        return (np.cumsum(lengths) - lengths).tolist()

    @cached_property
    def lower(self) -> str:
        return lowered(self.text)

    @cached_property
    def squeezed(self) -> bytes:
        """One byte a character, every digit a 0."""
        return self.text.encode("latin-1", "replace").translate(_ZEROS)

    @cached_property
    def squeezed_lower(self) -> bytes:
        return self.squeezed.lower()

    @cached_property
    def runs(self) -> tuple[bytes, bytes]:
        """Which three characters stand side by side anywhere, by `_three`, and which five, by `_five`: 1 or 0."""
        three = _three(np.frombuffer(self.squeezed.translate(_CLASS), np.uint8))
        return _table(three, CLASSES**3), _table(_five(three), 1 << FIVE_BITS)

    @cached_property
    def codes(self) -> np.ndarray:
        """The characters as numbers, and a 0 behind them, uint32."""
        return np.frombuffer((self.text + "\0").encode("utf-32-le", "surrogatepass"), np.uint32)

    @cached_property
    def beyond(self) -> np.ndarray:
        """The places of the characters that are not ASCII."""
        return np.flatnonzero(self.codes > 127)

    @cached_property
    def foreign(self) -> frozenset[str]:
        """The characters that are not ASCII."""
        if self.text.isascii():
            return frozenset()
        seen = np.zeros(0x110000, bool)
        seen[self.codes[self.beyond]] = True
        return frozenset(map(chr, np.flatnonzero(seen).tolist()))

    def places(self, leads: str, follow: str = "") -> list[int]:
        """Where one of `leads`, none of them ASCII, stands, and behind it one of `follow`: both as between [ ] in a pattern."""
        at = self.beyond[_among(leads)[np.minimum(self.codes[self.beyond], 0xFFFF)]]
        return (at[_among(follow)[np.minimum(self.codes[at + 1], 0xFFFF)]] if follow else at).tolist()

    def occurring(self, gates: Sequence[str], lower: bool = False) -> list[bytes]:
        """Those of `gates` (without digits) that occur, as they stand in `squeezed` or, with `lower`, in `squeezed_lower`."""
        data, (threes, fives) = self.squeezed_lower if lower else self.squeezed, (self._among or self).runs
        known = []
        for gate, three, five in map(_gate, gates):
            if all(threes[i] for i in three) and all(fives[i] for i in five) and all(b in data for b in gate[:2]) and gate in data:
                known.append(gate)
        return known

    def at(self, start: int, end: int) -> tuple[int, int, int, int]:
        """Row, part, and start and end in that part."""
        part = bisect_right(self.starts, start) - 1
        begin = self.starts[part]
        return self.rows[part], part, start - begin, min(end - begin, len(self.parts[part]))

    def find(
        self,
        pattern: re.Pattern[str],
        gates: Sequence[str] = (),
        around: int = 0,
        lower: bool = False,
        good: Callable[[re.Match[str]], bool] | None = None,
    ) -> Hits:
        """Rows with a match that is `good`. With `gates`, one of which is in every match, the pattern is run only if there are any,
        and with `around` only so many characters before and behind each."""
        known = self.occurring(gates, lower)
        if gates and not known:
            return {}
        near = self._near(pattern, known, around, lower) if around else self._everywhere(pattern, lower)
        return self.first((m.start() + shift, m.end() + shift) for m, shift in near if good is None or good(m))

    def near(self, pattern: re.Pattern[str], gates: Sequence[str], around: int) -> Iterator[tuple[int, int]]:
        """The places of matches with one of `gates` in them."""
        return (m.span() for m, _ in self._near(pattern, self.occurring(gates), around, False))

    def first(self, spans: Iterable[tuple[int, int]]) -> Hits:
        """The first of these places in the joined text in each row."""
        found: Hits = {}
        for start, end in spans:
            row, *place = self.at(start, end)
            found.setdefault(row, tuple(place))
        return found

    def _everywhere(self, pattern: re.Pattern[str], lower: bool) -> Iterator[tuple[re.Match[str], int]]:
        return ((m, 0) for m in pattern.finditer(self.lower if lower else self.text))

    def _near(
        self, pattern: re.Pattern[str], gates: Sequence[bytes], around: int, lower: bool
    ) -> Iterator[tuple[re.Match[str], int]]:
        data = self.squeezed_lower if lower else self.squeezed
        for gate in gates:
            at = data.find(gate)
            while at >= 0:
                begin, end = max(0, at - around), min(len(data), at + around)
                shift, behind = begin if lower else 0, at + 1
                some = pattern.finditer(lowered(self.text[begin:end])) if lower else pattern.finditer(self.text, begin, end)
                for m in some:  # all of them: the first may be the row before's
                    yield m, shift
                    behind = max(behind, m.end() + shift)
                at = data.find(gate, behind)

    def numbers(self) -> Iterator[tuple[int, int]]:
        """Stretches with DIGITS digits in WINDOW characters, with room before and behind for the rest of what they belong to, if
        they have 8 digits that nothing parts but what stands in a number, or two letters as an IBAN begins. Sums have neither."""
        data = np.frombuffer(self.squeezed, np.uint8)
        at = np.flatnonzero(data == 48)
        low, high = at[: 1 - DIGITS], at[DIGITS - 1 :]  # of each run of so many digits the first and the last
        close = high - low < WINDOW
        low, high = low[close], high[close]
        if not len(low):
            return
        first = np.maximum(high - WINDOW + 1, 0)  # of the windows that hold them all, and the last of these
        last = np.minimum(low, max(len(data) - WINDOW, 0))
        breaks = np.flatnonzero(first[1:] - last[:-1] > WINDOW)
        begins = np.maximum(first[np.append(0, breaks + 1)] - 12, 0)
        ends = np.minimum(last[np.append(breaks, -1)] + WINDOW + 24, len(data))
        sure = _of_numbers(data, at)
        some = np.searchsorted(sure, begins) < np.searchsorted(sure, ends)
        yield from zip(begins[some].tolist(), ends[some].tolist(), strict=True)


def _of_numbers(data: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Of the places of digits those where 8 digits begin with at most two of ` ./()-` between two of them, or where two digits
    follow two capitals: every phone number, card and IBAN has one."""
    left, right = at[:-1], at[1:]
    gap = right - left
    joined = (gap == 1) | ((gap <= 3) & _BETWEEN[data[left + 1]] & _BETWEEN[data[right - 1]])
    count = np.append(0, np.cumsum(joined))
    eight = at[: max(0, len(at) - 7)][count[7:] - count[:-7] == 7]
    pair = left[(gap == 1) & (left >= 2)]
    capitals = (data[pair - 1] - np.uint8(65) < 26) & (data[pair - 2] - np.uint8(65) < 26)
    return np.sort(np.concatenate([eight, pair[capitals]]))


def lowered(text: str) -> str:
    """In lower case, and as long as before: one letter would become two."""
    return text.replace("İ", "I").lower()


def _three(data: np.ndarray) -> np.ndarray:
    """Each three bytes of `_CLASS` as one number, uint16."""
    wide = data.astype(np.uint16)
    return (wide[:-2] * np.uint16(CLASSES) + wide[1:-1]) * np.uint16(CLASSES) + wide[2:]


def members(among: str) -> str:
    """The characters of what stands between [ ] in a pattern."""
    return re.sub("(.)-(.)", lambda m: "".join(map(chr, range(ord(m[1]), ord(m[2]) + 1))), among, flags=re.DOTALL)


@cache
def _among(signs: str) -> np.ndarray:
    table = np.zeros(0x10000, bool)
    table[[ord(c) for c in members(signs)]] = True
    return table


def _five(three: np.ndarray) -> np.ndarray:
    """Each five bytes of `_CLASS`, from their first three and their last, as one number of FIVE_BITS; few have the same one."""
    wide = three[:-2].astype(np.uint32)
    wide *= np.uint32(0x9E3779B1)
    wide += three[2:] * np.uint32(0x85EBCA77)
    wide >>= np.uint32(32 - FIVE_BITS)
    return wide


def _table(numbers: np.ndarray, size: int) -> bytes:
    seen = np.zeros(size, bool)
    seen[numbers] = True
    return seen.tobytes()


@cache
def _gate(gate: str) -> tuple[bytes, list[int], list[int]]:
    """A gate as bytes, and what must be in `runs` where it occurs."""
    data = gate.encode("latin-1", "replace")
    three = _three(np.frombuffer(data.translate(_CLASS), np.uint8))
    return data, three.tolist(), _five(three).tolist()


_ZEROS = bytes(48 if 48 <= b <= 57 else b if b != 0 else 1 for b in range(256))
_KNOWN = b"abcdefghijklmnopqrstuvwxyz0 ._-|<>/]#:\n"
_CLASS = bytes(_KNOWN.find(bytes([b]).lower()) + 1 for b in range(256))  # letters without case, the signs of gates, all others
CLASSES = len(_KNOWN) + 1
FIVE_BITS = 18
_BETWEEN = np.isin(np.arange(256), list(b" ./()-"))


class Rows:
    """A chunk's conversations as detectors see them."""

    def __init__(self, conversations: Sequence[Conversation]):
        self.conversations = conversations

    @cached_property
    def all(self) -> Joined:
        """Every message."""
        pairs = [(m.content, i) for i, c in enumerate(self.conversations) for m in c.messages]
        return Joined([t for t, _ in pairs], [i for _, i in pairs])

    @cached_property
    def answers(self) -> Joined:
        """Those of the model; a bare tool call has no text by right."""
        pairs = [
            (m.content, i)
            for i, c in enumerate(self.conversations)
            for m in c.messages
            if m.role in ANSWERS and (m.content or not m.extra)
        ]
        return Joined([t for t, _ in pairs], [i for _, i in pairs], self.all)

    @cached_property
    def pairs(self) -> list[tuple[int, str, str]]:
        """Row, the last question and its answer, of every row that has both."""
        out = []
        for i, c in enumerate(self.conversations):
            if c.kind != "text":
                prompt = answer = ""
                for m in reversed(c.messages):
                    if not answer and m.role in ANSWERS:
                        answer = m.content
                    elif answer and m.role in PROMPTS:
                        prompt = m.content
                        break
                if prompt and answer:
                    out.append((i, prompt, answer))
        return out


# ---- secrets and personal data -------------------------------------------------------------------------------------------------

EMAIL_AT = re.compile(r"@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9-])")
EMAIL = re.compile(r"[A-Za-z0-9._%+'-]{1,64}" + EMAIL_AT.pattern)
CARD = re.compile(r"(?<![\d.])(?:\d{4}([ ._-]?)\d{4}\1\d{4}\1\d{4}|3\d{3}([ ._-]?)\d{6}\2\d{4,5}|\d{13,19})(?!\d)")
PHONE = re.compile(
    r"(?<![\w+.])(?:\+\d{1,3}[ ./-]?(?:\(0?\d{1,5}\)|\d{1,5})(?:[ ./-]?\d{2,5}){1,4}"  # +49 30 1234567
    r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|(?:1[ .-])?[2-9]\d{2}([.-])[2-9]\d{2}\1\d{4}"  # (212) 555-0123, 212-555-0123
    r"|0\d{2,4}[ /-]\d{3,4}[ -]?\d{3,5}"  # 030/1234567, 0171 1234567
    r"|0\d(?:([ .])\d\d)(?:\2\d\d){3}|0\d{1,3}-\d{2,4}-\d{4}"
    r"|00\d{1,3}[ ./-]\d{1,5}(?:[ ./-]?\d{2,5}){2,4}"  # 06 12 34 56 78, 03-1234-5678, 0041 44 668 18 00
    r"|(?:\+\d{1,3}[ -]?)?\(0\d{0,4}\)[ /-]?\d{1,4}(?:[ ./-]?\d{2,8}){1,4}|\+1\d{10}"  # (089) 1234 5678, +33 (0)1 23 45 67 89
    r"|\+\d{1,3} ?\(0\) ?\d{1,4}(?:[ ./-]?\d{2,5}){1,4}|1[ .-](?:8\d{2})[ .-]\d{3}[ .-]\d{4})(?![\w-])"
)
CALLED = re.compile(  # a number of any form behind such a word
    r"(?:tel(?:[eé]\w*)?|tél(?:[eé]\w*)?|phone|mobile?|cell|handy|móvil|fax|whats ?app|call|ring|sms|numéro|teléfono|fon|電話|电话)"
    r"(?: ?(?:no|nr|number|me|us|at|is|to|on)\b\.?){0,3}[^\w\n+(]{0,4}\Z",
    re.IGNORECASE,
)
ANY_PHONE = re.compile(r"(?<![\w+.-])[(+]?\d{1,4}\)?(?:[ ./-]{1,2}\(?\d{2,8}\)?){1,5}(?![\w-])|(?<![\w+.-])\+?\d{9,13}(?![\w.-])")
IBAN = re.compile(
    r"(?:(?<![A-Za-z0-9])|(?<=IBAN))(?:[A-Z]{2}\d{2}([ .-]?)[A-Z0-9]{4}(?:\1[A-Z0-9]{4}){1,6}(?:\1[A-Z0-9]{1,3})?"
    r"|[a-z]{2}\d{2}([ .-]?)[a-z0-9]{4}(?:\2[a-z0-9]{4}){1,6}(?:\2[a-z0-9]{1,3})?)(?![A-Za-z0-9])"
)
IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")
IPV6_SHORT = re.compile(
    r"(?<![\w:])[23][0-9A-Fa-f]{3}(?::[0-9A-Fa-f]{1,4}){1,6}::(?:[0-9A-Fa-f]{1,4}(?::[0-9A-Fa-f]{1,4}){0,5})?(?![\w:])"
)
IPV6 = re.compile(r"(?<![\w:])(?:[0-9A-Fa-f]{1,4}:){7}[0-9A-Fa-f]{1,4}(?![\w:])")
DOTTED = re.compile(rb"\.0{1,3}\.0{1,3}\.")  # as digits are in `squeezed`
RESERVED = re.compile(r"(?:^|[@.])(?:example\.(?:com|org|net|edu)|[a-z0-9-]+\.(?:example|test|invalid|localhost))$", re.IGNORECASE)
KEY_GATES = (
    "hf_", "api_org_", "sk-", "ghp_", "gho_", "ghs_", "ghr_", "ghu_", "github_pat_", "glpat-", "AKIA", "ASIA", "AIza", "ya00.",
    "xox", "npm_", "pypi-", "eyJ", "sk_live_", "rk_live_", "sk_test_", "rk_test_", "whsec_", "sq0", "SG.", "key-", "dop_v",
    "doo_v", "dor_v",
    "shpat_", "shpss_", "shpca_", "shppa_", "dapi", "glptt-", "gldt-", "glrt-", "gsk_", "r0_", "xai-", "pplx-", "lin_api_",
    "sntrys_", "GOCSPX-",
    "ATATT0", "EAACEdEose", "AccountKey=", "hooks.slack.com", "discord.com/api", "discordapp.com",
)  # fmt: skip
LONG_RUN = re.compile(r"(?=[A-Za-z+/_=-]{0,400}\d)[A-Za-z0-9+/_=-]{24,}")
ANY_RUN = re.compile(r"[^\s]{80,}")
DIGIT_RUN = re.compile(r"\d(?:[ ./()-]{0,2}\d){8,}")
LENGTHS = dict(re.findall(r"([A-Z]{2})(\d{2})", (
    "AD24AE23AL28AT20AZ28BA20BE16BG22BH22BR29CH21CR22CY28CZ24DE22DK18DO28EE20EG29ES24FI18FO18FR27GB22GE22GI23GL18GR27GT28HR21HU28"
    "IE22IL23IS26IT27JO30KW30KZ20LB28LI21LT20LU20LV21MC27MD24ME22MK19MR27MT31MU30NL18NO15PK24PL28PS29PT25QA29RO24RS22SA24SE24SI19"
    "SK24SM27TN24TR26UA29VG24XK20"
)))  # fmt: skip


ISSUERS = re.compile(  # Visa, Mastercard, American Express, Diners, JCB, Discover and UnionPay
    r"4\d{15}(?:\d{3})?|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}|3(?:0[0-5]|[689]\d)\d{11}"
    r"|35(?:2[89]|[3-8]\d)\d{12}|6(?:011|5\d\d|4[4-9]\d|2\d\d)\d{12}"
)


def luhn(digits: str) -> bool:
    """The check digit of a card number."""
    doubled = [int(d) * (1 + i % 2) for i, d in enumerate(reversed(digits))]
    return sum(d - 9 if d > 9 else d for d in doubled) % 10 == 0


def is_card(text: str) -> bool:
    """As many digits as a known issuer gives, the check digit right; one number in ten passes that by chance."""
    digits = "".join(c for c in text if c.isdigit() and c.isascii())
    return bool(ISSUERS.fullmatch(digits)) and len(set(digits)) > 1 and luhn(digits)


def is_iban(text: str) -> bool:
    """The country's length, and the number modulo 97 (ISO 13616)."""
    plain = re.sub(r"[\s.-]", "", text).upper()
    if LENGTHS.get(plain[:2]) != str(len(plain)) or not plain.isascii():
        return False
    return int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1


def iban_end(m: re.Match[str]) -> int:
    """Where the number ends by its country's length: a pattern alone would take in the word behind it. 0 if it is none."""
    left = int(LENGTHS.get(m[0][:2].upper(), 0))
    for k, c in enumerate(m[0]):
        left -= c not in " .-"
        if not left:
            end = m.start() + k + 1
            whole = end == m.end() or not m.string[end].isalnum()
            return end if whole and is_iban(m[0][: k + 1]) else 0
    return 0


def is_phone(text: str) -> bool:
    return 8 <= sum(c.isdigit() for c in text) <= 15


def is_ip(text: str) -> bool:
    """An address of the public net: private, local and documentation ranges are nobody's."""
    try:
        address = ipaddress.ip_address(text)
        return address.is_global and not address.is_multicast
    except ValueError:
        return False


def mask(text: str) -> str:
    """The same length, with everything that may be a secret or personal dotted out but its first two characters. Stricter than the
    detectors: a number without a right check digit and any long run without a gap goes too."""
    text = redact.PEM.sub(lambda m: "•" * len(m[0]), text)
    for pattern in (redact.URL_LOGIN, redact.AUTHORIZATION, redact.TOKEN, redact.NAMED):
        text = pattern.sub(lambda m: m["keep"] + _dots(m["secret"]), text)
    for pattern in (redact.SHAPES, EMAIL, IBAN, DIGIT_RUN, IPV4, IPV6, LONG_RUN, ANY_RUN):
        text = pattern.sub(lambda m: _dots(m[0]), text)
    return text


def _dots(secret: str) -> str:
    shown = 2 if len(secret) >= 8 else 0
    return secret[:shown] + "•" * (len(secret) - shown)


def snippet(text: str, start: int, end: int) -> tuple[str, int, int]:
    """As much of the text as an excerpt of this place needs, and the place in it."""
    low = max(0, start - AROUND - 1)
    return text[low : max(end, start) + AROUND + 1], start - low, end - low


def excerpt(text: str, start: int, end: int) -> str:
    """The place and what stands around it in one line, masked before it is cut: half an address would not be known as one."""
    low, high = max(0, start - AROUND), min(len(text), max(end, start) + AROUND)
    masked = mask(text[low:high])
    room = max(0, EXCERPT - (end - start)) // 2
    first, last = max(low, start - room), min(high, start - room + EXCERPT)
    shown = masked[first - low : max(last, first) - low]
    shown = re.sub("•{4,}", "•••", " ".join(shown.split()))
    return ("…" if first > 0 else "") + shown + ("…" if last < len(text) else "")
