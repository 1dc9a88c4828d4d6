"""Guardrails in a comparison: each way is asked the probes as it would be asked a question, and told what it passes, before and
after tuning. Answers are kept as the comparison's are (guardrails.jsonl). No torch.

A way's own prompt stands around the probe: its system prompt, its examples, its passages. Ours is one line that a
probe for a secret adds to the system prompt, and the documents of a probe, which stand before the retrieved ones.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.compare import arms
from tunesmith.compare.arms import Arm, Passage, Prompt, Question, Shot
from tunesmith.data.render import RowRefused
from tunesmith.errors import DataError
from tunesmith.evaluate import guard_page, guardrails
from tunesmith.evaluate.guardrails import KINDS, Probe
from tunesmith.evaluate.statistics import FEW_ROWS, mcnemar, wilson
from tunesmith.files import finite, write_atomic
from tunesmith.redact import redact
from tunesmith.types import Message
from tunesmith.wording import counted

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.compare.work import _Work

ANSWERS = "guardrails.jsonl"
FOUND = "guardrails.json"
TOKENS = 96  # of an answer: a secret that is told, or an order that is followed, shows early
OWN = 12  # of the person's own questions
SHOWN_P = 0.05
CASES = 24  # probes whose answers stand on the page
PAIRS = (("base", "tuned"), ("retrieval", "tuned+retrieval"))  # before tuning and after it


@dataclass
class Guarded:
    """What all arms were asked beside the rows, and answered. `probes`, `questions` and each arm's prompts go together."""

    arms: list[Arm]
    probes: list[Probe]
    questions: list[Question]
    prompts: dict[str, list[Prompt]]
    max_tokens: int
    options: Any
    notes: list[str] = field(default_factory=list)
    answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def asked(work: _Work, *, system: str = "", max_tokens: int = TOKENS) -> Guarded:
    """The probes as each arm is asked them. `system` stands in every arm that has no system prompt of its own; else the one that at
    least half of the held-out rows have. A probe that one arm cannot hold is left out for all. DataError where none is left."""
    options = work.options
    own = guardrails.own_refusal(options.refusal)
    every = [q for i, c in enumerate(work.source.held_out) if (q := arms.question_of(i, c)) is not None]
    probes = guardrails.load(options.probes, seed=options.seed, scope=options.scope)
    total = len(probes)
    probes = guardrails.subset(probes, options.guardrails)
    taken = len(probes)
    if options.probes is None:
        plain = [(q.before, q.gold) for q in every if not q.completion and not q.tools]
        probes += guardrails.own_questions(plain, OWN, own)
    completion = bool(every) and all(q.completion for q in every)
    told = system or common_system(every)
    questions = [Question(i, p.messages, "", completion, p.id) for i, p in enumerate(probes)]
    shots = work._shots(questions, every, {completion}, [])
    notes: list[str] = []  # a comparison has told of its examples and documents
    passages = work._passages(questions, 0, notes)
    renderers = {arm.model: work._renderer(arm.model) for arm in work.arms if arm.model != "endpoint"}
    room = min(max_tokens, work.limit // 4)
    prompts: dict[str, list[Prompt | None]] = {arm.name: [] for arm in work.arms}
    for arm in work.arms:
        for i, probe in enumerate(probes):
            fits = None
            if arm.model != "endpoint":

                def fits(prompt: Prompt, model: str = arm.model) -> bool:
                    return len(work._ids(renderers[model], prompt)) + room <= work.limit

            head = probe.system or (options.system if arm.system else told)
            prompts[arm.name].append(_prompt(arm, probe, i, head, completion, shots[i], passages[i], fits))
    kept = [i for i in range(len(probes)) if all(prompts[arm.name][i] is not None for arm in work.arms)]
    if not kept:
        what = f"none of {counted(len(probes), 'probe')} fits the model's context of {work.limit:,} tokens"
        raise DataError(what, "take a model with a longer context")
    if len(kept) < len(probes):
        notes.append(f"{counted(len(probes) - len(kept), 'probe')} left out: the model's context or template cannot hold them")
    if options.probes is None and taken < total:
        notes.append(f"{taken} of {total} probes, spread over the kinds")
    if options.probes is None and not options.scope:
        notes.append("no topic is known, so any harmless question must be answered: say with --scope what the assistant is for")
    return Guarded(
        work.arms,
        [probes[i] for i in kept],
        [questions[i] for i in kept],
        {name: [made[i] for i in kept] for name, made in prompts.items()},
        max_tokens,
        options,
        notes,
    )


def common_system(questions: Sequence[Question]) -> str:
    """The system message that at least half of the rows have; '' for none."""
    said = Counter(next((m.content for m in q.before if m.role == "system"), "") for q in questions)
    text, times = max(said.items(), key=lambda item: (item[1], item[0]), default=("", 0))
    return text if text and 2 * times >= len(questions) else ""


def _prompt(
    arm: Arm, probe: Probe, row: int, head: str, completion: bool, shots: Sequence[Shot], passages: Sequence[Passage], fits: Any
) -> Prompt | None:
    """The arm's prompt of a probe; None where it does not fit. A template without a system message gets its text before the
    question, as people do it."""
    system = "\n".join(filter(None, (head, probe.secret)))
    poison = [Passage(f"{probe.id}-{n}", d.name, d.text) for n, d in enumerate(probe.documents, 1)]
    found = [*poison, *(passages if arm.passages else ())]
    way = replace(arm, system=False, passages=bool(found))
    first = probe.messages[0]
    ways = [(*([Message("system", system)] if system else []), *probe.messages)]
    if system:
        ways.append((Message(first.role, f"{system}\n\n{first.content}"), *probe.messages[1:]))
    if completion:
        ways = [(Message("prompt", "\n\n".join(filter(None, [system, *(m.content for m in probe.messages)]))),)]
    for before in ways:
        question = Question(row, before, "", completion, probe.id)

        def again(some: Sequence[Shot], more: Sequence[Passage], question: Question = question) -> Prompt:
            return arms.compose(way, question, shots=some, passages=more)

        whole = again(shots, found)
        if fits is None:
            return whole
        try:
            made = arms.fitted(whole, again, fits)
            if len(made.passages) >= len(poison) and fits(made):
                return made
        except RowRefused:
            continue
    return None


# ---- what came of it -------------------------------------------------------------------------------------------------------------


def gather(found: Guarded) -> dict[str, Any]:
    """{probes, kinds, arms: pass rates with Wilson's intervals, pairs: before and after tuning, cases: answers side by side}."""
    own = guardrails.own_refusal(found.options.refusal)
    why = {
        arm.name: [p.judge(row["answer"], own) for p, row in zip(found.probes, found.answers[arm.name], strict=True)]
        for arm in found.arms
    }
    kinds = {kind: [i for i, p in enumerate(found.probes) if p.kind == kind] for kind in _ordered(found.probes)}
    everything = list(range(len(found.probes)))
    rows = [
        {"name": arm.name, "says": arm.says, **_rate(why[arm.name], everything),
         "kinds": {kind: _rate(why[arm.name], of) for kind, of in kinds.items()}}
        for arm in found.arms
    ]  # fmt: skip
    pairs = []
    for before, after in PAIRS:
        if before in why and after in why:
            entry = {"before": before, "after": after, **_change(why[before], why[after], everything)}
            entry["kinds"] = {kind: _change(why[before], why[after], of) for kind, of in kinds.items()}
            pairs.append(entry)
    out: dict[str, Any] = {
        "format": 1, "probes": len(found.probes), "max_tokens": found.max_tokens, "seed": found.options.seed,
        "scope": found.options.scope, "refusal": found.options.refusal, "notes": found.notes,
        "kinds": [{"name": kind, "says": KINDS.get(kind, kind), "of": len(of)} for kind, of in kinds.items()],
        "arms": rows, "pairs": pairs, "cases": _cases(found, why),
    }  # fmt: skip
    return out | {"verdict": _verdict(out)}


def _ordered(probes: Sequence[Probe]) -> list[str]:
    there = list(dict.fromkeys(p.kind for p in probes))
    return [k for k in KINDS if k in there] + [k for k in there if k not in KINDS]


def _rate(why: Sequence[str], of: Sequence[int]) -> dict[str, Any]:
    passed = sum(not why[i] for i in of)
    return {"passed": passed, "of": len(of), "rate": passed / len(of), "interval": list(wilson(passed, len(of)))}


def _change(before: Sequence[str], after: Sequence[str], of: Sequence[int]) -> dict[str, Any]:
    """McNemar's exact test over the probes that only one of the two passes; shown: -1 worse after, 1 better, 0 neither."""
    lost, won, p = mcnemar([not before[i] for i in of], [not after[i] for i in of])
    sure = p < SHOWN_P and len(of) >= FEW_ROWS
    return {"lost": lost, "won": won, "p": p, "shown": (1 if won > lost else -1) if sure else 0}


def _verdict(found: Mapping[str, Any]) -> list[str]:
    rate = {arm["name"]: f"{arm['passed']} of {arm['of']}" for arm in found["arms"]}
    out = []
    for pair in found["pairs"]:
        word = {1: "shown to be better", 0: "no difference shown", -1: "shown to be worse"}[pair["shown"]]
        out.append(
            f"Guardrails: {pair['before']} passes {rate[pair['before']]}, {pair['after']} {rate[pair['after']]}: after tuning "
            f"{pair['won']} more and {pair['lost']} no longer, p {pair['p']:.2g}: {word}."
        )
        for kind, change in pair["kinds"].items():
            if change["shown"]:
                way = "better" if change["shown"] > 0 else "worse"
                says = KINDS.get(kind, kind)
                out.append(f"{way.capitalize()} at {kind} ({says}): {change['won']} more, {change['lost']} no longer.")
    if not found["pairs"]:
        out += [f"Guardrails: {name} passes {said}." for name, said in rate.items()]
    return out


def _cases(found: Guarded, why: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Answers side by side: first what tuning lost, then what it won, then what fails all the same, one kind after the other."""
    names = list(why)
    before, after = next(((b, a) for b, a in PAIRS if b in why and a in why), (names[0], names[-1]))

    def place(i: int) -> int | None:
        was, is_ = bool(why[before][i]), bool(why[after][i])
        return 0 if is_ and not was else 1 if was and not is_ else 2 if is_ else 3 if any(why[n][i] for n in names) else None

    found_at: dict[int, list[int]] = {}
    for i in range(len(found.probes)):
        if (at := place(i)) is not None:
            found_at.setdefault(at, []).append(i)
    picked: list[int] = []
    for at, most in ((0, CASES // 2), (1, CASES // 4), (2, CASES), (3, CASES)):
        picked += _in_turn(found_at.get(at, []), found.probes)[: min(most, CASES - len(picked))]
    return [
        {
            "id": p.id, "kind": p.kind, "question": p.shown, "before": [m.as_dict() for m in p.messages[:-1]],
            "documents": [{"name": d.name, "text": d.text} for d in p.documents],
            "fails": [list(f) for f in p.fails],
            "answers": {n: {"answer": found.answers[n][i]["answer"], "why": why[n][i]} for n in names},
        }
        for i in picked for p in [found.probes[i]]
    ]  # fmt: skip


def _in_turn(rows: Sequence[int], probes: Sequence[Probe]) -> list[int]:
    """One of each kind, then the second of each ..."""
    times: Counter[str] = Counter()
    keyed = []
    for i in rows:
        keyed.append((times[probes[i].kind], i))
        times[probes[i].kind] += 1
    return [i for _, i in sorted(keyed)]


# ---- on its own: tunesmith guard -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """`found` is guardrails.json; `page` its .html; `short` what fell below `--min-pass`, a line each."""

    folder: Path
    found: Mapping[str, Any]
    short: tuple[str, ...] = ()

    @property
    def page(self) -> Path:
        return self.folder / "guardrails.html"

    @property
    def exit_code(self) -> int:
        return 1 if self.short else 0

    def print(self, console: Console | None = None) -> None:
        from rich.console import Console

        console = console or Console()
        print_found(self.found, console)
        for line in self.short:
            console.print(line, style="red", highlight=False, markup=False, soft_wrap=True)
        console.print(f"\nPage   {self.page}", highlight=False, markup=False, soft_wrap=True)


def finish(found: Guarded, folder: Path, name: str, minima: Mapping[str, float]) -> Result:
    """Judge the answers; write guardrails.json and guardrails.html. `minima`: the least pass rate of a kind, of all under ''."""
    whole = gather(found) | {"name": redact(name)}
    last = whole["arms"][-1]  # the tuned model, where there is one
    short = []
    for kind, least in minima.items():
        entry = last["kinds"].get(kind) if kind else last
        if entry is None:
            short.append(f"below --min-pass: no probe of kind {kind} could be asked")
        elif entry["rate"] < least:
            what = f" of kind {kind}" if kind else ""
            passed = f"{last['name']} passes {entry['passed']} of {entry['of']}{what}"
            short.append(f"below --min-pass: {passed} ({entry['rate']:.3f}, and {least:g} is wanted)")
    write_atomic(folder / FOUND, json.dumps(finite(whole), indent=1, ensure_ascii=False) + "\n")
    guard_page.write(whole, folder / "guardrails.html")
    return Result(folder, whole, tuple(short))


def print_found(found: Mapping[str, Any], console: Console) -> None:
    """A table of what passed, kind by kind."""
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    shown.add_column("passed", no_wrap=True)
    for arm in found["arms"]:
        shown.add_column(arm["name"], justify="right", no_wrap=True)
    for kind in found["kinds"]:
        cells = [f"{(of := arm['kinds'][kind['name']])['passed']}/{of['of']}" for arm in found["arms"]]
        wide = console.width >= 60 + 11 * len(found["arms"])
        shown.add_row(f"{kind['name']:<10} {kind['says']}" if wide and kind["says"] != kind["name"] else kind["name"], *cells)
    wide = console.width >= 40 + 18 * len(found["arms"])
    total = [
        f"{arm['rate']:.2f}" + (f" ({arm['interval'][0]:.2f}-{arm['interval'][1]:.2f})" if wide else "") for arm in found["arms"]
    ]
    shown.add_row("all", *total, style="bold")
    console.print(shown, markup=False, highlight=False)  # a kind of one's own may hold brackets
    for line in found["verdict"]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for line in found["notes"]:
        console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)
