"""The gate: what was exported is loaded in the program it is for and held against the live model, before it counts as done.

    words       ids of rendered conversations, BOS, EOS and what ends an answer, the chat template's text
    numbers     KL(live || artefact) a token, whether the likeliest token is the same, the loss on the held-out answers
    answers     greedy answers to the held-out questions: equal, ended alike, and their task metric

KL is over the artefact's TOP likeliest tokens with all others as one: exact where the vocabulary has no more, else a lower bound.
A KL over the first bound of `BOUNDS` warns; over the second, or other words, refuses. parity.json keeps all of it.

Shape letters: P positions, V vocabulary, K tokens given.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunesmith.chat import Talker
from tunesmith.data.fields import RowRefused
from tunesmith.data.render import Renderer
from tunesmith.errors import install
from tunesmith.evaluate import metrics
from tunesmith.export.gguf_words import begins_with_bos
from tunesmith.export.runtimes import NOT_HERE, PROGRESS
from tunesmith.export.source import Source, untold
from tunesmith.files import finite
from tunesmith.generate import context, stream
from tunesmith.ops.attention import Layout
from tunesmith.types import Conversation

ROWS = 64  # held-out rows that are compared
POSITIONS = 512  # tokens of them whose distribution is compared: 0.5 GB of float32 at most, for 256,000 tokens
LONGEST = 1024  # tokens of a row: attention on a CPU grows with the square
ASKED = 16  # questions that are answered
MAX_TOKENS = 48
SURE = 1.0
NUMBERS = re.compile(r"\[\n[^\"\[\]{}]+\]")  # a list of them, in JSON that is indented: it takes one line
TOP = 2048
SILENCE = 600.0  # seconds a runtime may take to load, for a row or an answer, and one more for every
SLOWEST = 10_000_000  # bytes that it loads: a disk, a memory and a CPU that are all slow
REST = 1e-4  # what the others have together is known to 1e-5 of float32 logarithms: below this it is taken as this on both sides

BOUNDS = {  # KL a token: over the first it is told, over the second refused; the embedded model's own: docs/export.md
    "exact": (1e-3, 5e-2),  # 16 and 32 bits
    "8-bit": (3e-3, 5e-2),
    "6-bit": (5e-3, 5e-2),
    "5-bit": (2e-2, 1e-1),
    "4-bit": (1e-1, 3e-1),
    "3-bit": (2e-1, 6e-1),
    "2-bit": (6e-1, 1.5),
}

PROBES = (  # texts that tokenizers disagree on, each as a question
    "Hello  world,   it's 2024-05-01; I'LL pay $3.50!",
    "def f(x):\n    return x_1 ** 2  # ok\n\n\tdone",
    "  leading and trailing  ",
    "123456789 1,234.5 007",
    "naïve café — “quotes” … œuvre",
    "日本語のテキスト 中文 한국어",
    "مرحبا בעולם हिन्दी",
    "🙂👩‍👩‍👧 emoji",
    "don't won't WE'RE they'll",
    "a\r\nb\n\n\nc",
)
FALLBACK_QUESTIONS = ("What can you do?", "Say hello.", "Give me an example.", "Explain it in one sentence.")

RUNTIMES = {  # name -> (module, packages it needs, the extra that brings them)
    "transformers": ("transformers_", ("transformers",), "export"),
    "peft": ("transformers_", ("transformers", "peft"), "export"),
    "llama.cpp": ("llama_cpp", ("xllamacpp",), "export"),
    "vllm": ("vllm_", ("vllm",), ""),
}


def bounds_of(quant: str) -> tuple[float, float]:
    """Those of a GGUF quantisation (q5_k_m: 5 bits); '' and 16 bits are exact."""
    return BOUNDS["exact" if not quant.startswith("q") else f"{quant[1]}-bit"]


@dataclass
class Parity:
    """What was found. `state`: verified; warned, over a bound that is told; refused; not verified: the runtime is not here."""

    format: str
    runtime: str
    state: str = "not verified"
    reasons: list[str] = field(default_factory=list)
    """Why it is refused or not verified, else what was told."""
    notes: list[str] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        text = json.dumps(finite(asdict(self)), indent=1, ensure_ascii=False)
        text = NUMBERS.sub(lambda found: " ".join(found[0].split()), text)
        (folder / "parity.json").write_text(text + "\n", "utf-8")

    def print(self, console: Console) -> None:
        table = Table(show_header=False, box=None, pad_edge=False)
        for name, value in self.lines():
            table.add_row(Text(name, "dim"), Text(value))
        console.print(table)
        for note in self.notes:
            console.print(Text(f"note  {note}", "dim"), soft_wrap=True)
        colour = {"verified": "green", "warned": "yellow"}.get(self.state, "red")
        console.print(Text(f"{self.state}{': ' if self.reasons else ''}{'; '.join(self.reasons)}", colour), soft_wrap=True)

    def lines(self) -> list[tuple[str, str]]:
        m = self.measured
        if "words" not in m:  # the runtime is not here, or could not load it
            return [("loaded in", self.runtime)]
        words, numbers, answers = m["words"], m["numbers"], m["answers"]
        same = words["conversations"] - len(words["different"])
        out = [
            ("loaded in", self.runtime),
            (
                "token ids",
                f"{same} of {words['conversations']} conversations the same, {words['probes_same']} of {words['probes']} probes",
            ),
            ("ends an answer", f"live {words['stops']['live']}, here {words['stops']['artefact']}"),
            ("chat template", "the same" if words["template_same"] else "another"),
            (
                "KL a token",
                f"{numbers['kl_mean']:.2g} (largest {numbers['kl_max']:.2g}) over {numbers['positions']} tokens; "
                f"told over {numbers['bounds'][0]:g}, refused over {numbers['bounds'][1]:g}",
            ),
            ("likeliest token", f"the same at {numbers['top1']:.1%}"),
            ("held-out loss", _both(numbers["loss_live"], numbers["loss_artefact"])),
            (
                "greedy answers",
                f"{answers['equal']} of {answers['count']} the same, {answers['ended']} of {answers['live_ended']} ended",
            ),
        ]
        if "metric" in answers:
            out.append((answers["metric"], _both(answers["metric_live"], answers["metric_artefact"])))
        return out


def _both(live: float | None, here: float | None) -> str:
    return "-" if live is None or here is None else f"{live:.4f} live, {here:.4f} here"


# ---- the live model ------------------------------------------------------------------------------------------------------------


@dataclass
class Live:
    """What the live model says, and the job that asks a runtime the same."""

    rows: list[list[int]]
    positions: list[list[int]]
    targets: np.ndarray  # [P], the token that follows in the row
    logp_PV: np.ndarray
    asked: list[dict[str, Any]]
    rendered: list[list[int]]
    conversations: int  # how many of `asked` are the run's own; the rest are probes
    prompts: list[list[int]]
    answers: list[list[int]]
    texts: list[str]
    ended: list[bool]
    surely: list[bool]
    """Which ended where the stop token was at least SURE nats ahead of every other: rounding does not undo that."""
    golds: list[str]
    notes: list[str]

    @property
    def job(self) -> dict[str, Any]:
        return {"rows": self.rows, "positions": self.positions, "top": TOP, "asked": self.asked, "prompts": self.prompts,
                "max_tokens": MAX_TOKENS}  # fmt: skip


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` of `count`, evenly over all."""
    return list(range(count)) if wanted >= count else [i * count // wanted for i in range(wanted)]


@torch.no_grad()
def live(source: Source, talker: Talker | None = None) -> Live:
    """The live model's words, numbers and answers on the run's held-out rows, as `tunesmith chat RUN` has them."""
    talker = talker or Talker.open(source.run.path)
    renderer, notes = source.renderer, []
    limit = min(LONGEST, context(talker.model) or LONGEST)
    held = [source.held_out[i] for i in spread(len(source.held_out), ROWS)]
    rows, positions = _rows(renderer, held, limit)
    questions = [q for c in held if (q := renderer.question(c)) is not None and len(q.ids) + MAX_TOKENS < limit]
    prompts, golds = [list(q.ids) for q in questions], [q.gold for q in questions]
    if not rows:
        none = f"no held-out row of at most {limit:,} tokens" if held else "no held-out rows"
        notes.append(f"{none}: compared on its own answers to four fixed questions")
        prompts, golds = [renderer.prompt([{"role": "user", "content": q}]) for q in FALLBACK_QUESTIONS], []
    keep = spread(len(prompts), ASKED)
    prompts, golds = [prompts[i] for i in keep], [golds[i] for i in keep] if golds else []
    answers, ended = _answers(talker, prompts)
    if not rows:
        rows = [[*p, *a, *([min(renderer.stop_ids)] if e else [])] for p, a, e in zip(prompts, answers, ended, strict=True)]
        positions = [list(range(len(p) - 1, len(r) - 1)) for p, r in zip(prompts, rows, strict=True)]
        rows, positions = [r for r, p in zip(rows, positions, strict=True) if p], [p for p in positions if p]
    surely = [e and _margin(talker, [*p, *a]) > SURE for p, a, e in zip(prompts, answers, ended, strict=True)]
    each = max(1, POSITIONS // max(1, len(rows)))
    positions = [[p[i] for i in spread(len(p), each)] for p in positions]
    asked, rendered, conversations = _asked(renderer, held)
    decode = renderer.tokenizer.decode
    return Live(
        rows=rows, positions=positions,
        targets=np.array([row[p + 1] for row, at in zip(rows, positions, strict=True) for p in at]),
        logp_PV=np.concatenate([_logp(talker, row, at) for row, at in zip(rows, positions, strict=True)]),
        asked=asked, rendered=rendered, conversations=conversations, prompts=prompts, answers=answers, ended=ended, surely=surely,
        texts=[decode(a, skip_special=True) for a in answers], golds=golds, notes=notes,
    )  # fmt: skip


def _rows(renderer: Renderer, held: Sequence[Conversation], limit: int) -> tuple[list[list[int]], list[list[int]]]:
    """(ids, the positions before each learned token) of every held-out row that renders and is not too long."""
    rows, positions = [], []
    for found in renderer.examples_many(held):
        if isinstance(found, RowRefused):
            continue
        for example in found.examples:
            at = (np.flatnonzero(np.asarray(example.learn)) - 1).tolist()
            if len(example.ids) <= limit and (at := [p for p in at if p >= 0]):
                rows.append([int(i) for i in example.ids])
                positions.append(at)
    keep = spread(len(rows), ROWS)  # a conversation may be several rows
    return [rows[i] for i in keep], [positions[i] for i in keep]


def _asked(renderer: Renderer, held: Iterable[Conversation]) -> tuple[list[dict[str, Any]], list[list[int]], int]:
    """What runtimes render, with our ids. Rows in which somebody wrote a special token are left out: they take it for one,
    which training never did. So are dated templates on another day than the run's."""
    asked: list[dict[str, Any]] = []
    rendered: list[list[int]] = []
    special, own = renderer.tokenizer.markup_pattern, 0
    dated = "strftime_now" in renderer.template
    for conversation in held:
        texts = [m.content for m in conversation.messages]
        if any(special and special.search(t) for t in texts) or dated:
            continue
        try:
            if conversation.kind == "chat":
                before = [m.as_dict() for m in conversation.messages[:-1]]
                if before and conversation.messages[-1].role == "assistant":
                    rendered.append(renderer.prompt(conversation.messages[:-1], conversation.tools))
                    asked.append({"messages": before, "tools": [dict(t) for t in conversation.tools]})
            else:
                rendered.append(renderer.raw_prompt(texts[0]))
                asked.append({"text": texts[0]})
        except RowRefused:
            continue
    own = len(asked)
    for text in () if dated else PROBES:
        try:
            rendered.append(renderer.prompt([{"role": "user", "content": text}]))
            asked.append({"messages": [{"role": "user", "content": text}]})
        except RowRefused:
            continue
    return asked, rendered, own


def _answers(talker: Talker, prompts: list[list[int]]) -> tuple[list[list[int]], list[bool]]:
    answers, ended = [[] for _ in prompts], [False] * len(prompts)
    stops = talker.renderer.stop_ids
    for i, token in stream(talker.model, prompts, stop_ids=sorted(stops), max_tokens=MAX_TOKENS):
        if token in stops:
            ended[i] = True
        else:
            answers[i].append(token)
    return answers, ended


def _margin(talker: Talker, ids: list[int]) -> float:
    """By how many nats a stop token is ahead of every other token after `ids`."""
    logp = _logp(talker, ids, [len(ids) - 1])[0]
    stops = sorted(talker.renderer.stop_ids)
    return float(logp[stops].max() - np.delete(logp, stops).max())


def _logp(talker: Talker, row: list[int], positions: list[int]) -> np.ndarray:
    model = talker.model
    tokens = torch.tensor(row, device=model.device)
    x = model.hidden(tokens, Layout.of([len(row)], model.device), rows=torch.tensor(positions, device=model.device))
    return model.logits(x).float().log_softmax(-1).cpu().numpy()


def divergence_of_models(found: Live, talker: Talker) -> float:
    """Mean KL of what was found live to another model's, over the whole vocabulary."""
    kl, at = [], 0
    for row, positions in zip(found.rows, found.positions, strict=True):
        ours = found.logp_PV[at : at + len(positions)].astype(np.float64)
        theirs = _logp(talker, row, positions)[:, : ours.shape[1]]
        kl.append((np.exp(ours) * (ours - theirs)).sum(1))
        at += len(positions)
    return float(np.concatenate(kl).mean())


# ---- the runtime ---------------------------------------------------------------------------------------------------------------


def missing(runtime: str) -> str:
    """What has to be installed for this runtime; '' where all is there."""
    _, packages, extra = RUNTIMES[runtime]
    lacking = [p for p in packages if find_spec(p) is None]
    return (
        f"{', '.join(lacking)} not installed: {install(extra) if extra else 'pip install ' + ' '.join(lacking)}" if lacking else ""
    )


class RuntimeFailed(Exception):
    """The runtime could not load or run the artefact; the text is its last words."""


class RuntimeLost(Exception):
    """The runtime hung, cannot run here, or the system ended it: none of it says that the artefact is wrong."""


def ask(
    runtime: str, job: dict[str, Any], tell: Callable[[int, int | None], None] = untold
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """The runtime's ids [P, K], logp [P, K] and facts, from a process of its own. Raises RuntimeFailed, RuntimeLost."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the live model is gone, and the runtime wants its room
    house = str(Path(__file__).resolve().parents[2])
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [house, os.environ.get("PYTHONPATH", "")]))
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:
        question, result = Path(folder) / "job.json", Path(folder) / "result.npz"
        paths = {key: str(Path(job[key]).absolute()) for key in ("artefact", "adapter", "base") if job.get(key)}
        question.write_text(json.dumps(job | paths), "utf-8")
        command = [sys.executable, "-m", f"tunesmith.export.runtimes.{RUNTIMES[runtime][0]}", str(question), str(result)]
        code, said = _run(command, env, Path(folder), SILENCE + sum(map(_bytes, paths.values())) / SLOWEST, tell)
        if code == -getattr(signal, "SIGKILL", 9):
            raise RuntimeLost("the system ended it, as it does where memory runs out: check it on a larger machine")
        if code or not result.is_file():
            last = _last_words(said)
            for path in paths.values():  # the card quotes it: no path of this machine
                last = last.replace(path, Path(path).name)
            if code == NOT_HERE:
                raise RuntimeLost(f"it cannot run here: {last}")
            raise RuntimeFailed(f"exit code {code}: {last or 'no word'}")
        with np.load(result, allow_pickle=False) as found:
            return found["ids"], found["logp"], json.loads(str(found["facts"]))


def _last_words(said: str) -> str:
    """The last three lines that are no frames of a traceback, and what is indented below the last: pydantic's reasons are."""
    lines = [re.sub(r"^\[rank\d+\]: ", "", line) for line in said.splitlines() if line.strip()]  # torch.distributed's mark
    at = max((i for i, line in enumerate(lines) if not line.startswith("  ")), default=0)
    plain = [line for line in lines[:at] if not line.startswith("  ")][-2:]
    return " / ".join([*plain, *(line.strip()[:500] for line in lines[at : at + 3])])


def _run(
    command: list[str], env: dict[str, str], folder: Path, silence: float, tell: Callable[[int, int | None], None]
) -> tuple[int, str]:
    """(exit code, what it said). Raises RuntimeLost where its progress stands still for `silence` seconds."""
    out, err, progress = folder / "out", folder / "err", folder / PROGRESS
    with out.open("wb") as o, err.open("wb") as e, \
            subprocess.Popen(command, env=env, cwd=folder, stdin=subprocess.PIPE, stdout=o, stderr=e) as process:  # fmt: skip
        heard, last = time.monotonic(), ""
        try:
            while process.poll() is None:
                time.sleep(0.05)
                now = progress.read_text() if progress.is_file() else ""
                if now != last:
                    heard, last = time.monotonic(), now
                    tell(*map(int, now.split()))
                elif time.monotonic() - heard > silence:
                    done = " of ".join(last.split()) or "no"
                    raise RuntimeLost(
                        f"no sign of life for {silence / 60:.0f} minutes after {done} tokens and answers, so it was ended: "
                        "export again; where it hangs again, try another version of it"
                    )
        finally:
            if process.poll() is None:
                process.kill()
    return process.returncode, (err.read_text("utf-8", "replace").strip() or out.read_text("utf-8", "replace").strip())


def _bytes(path: str) -> int:
    found = Path(path)
    return sum(p.stat().st_size for p in (found.rglob("*") if found.is_dir() else [found]) if p.is_file())


# ---- the verdict ---------------------------------------------------------------------------------------------------------------


def check(
    format: str, quant: str, runtime: str, found: Live, source: Source, job: dict[str, Any], *, stops: Sequence[int] | None,
    tell: Callable[[int, int | None], None] = untold,
) -> Parity:  # fmt: skip
    """Ask the runtime and judge. `stops`: what the artefact's own file says ends an answer, where its runtime cannot say."""
    parity = Parity(format, runtime, notes=list(found.notes))
    if why := missing(runtime):
        parity.reasons.append(why)
        return parity
    try:
        ids, logp, facts = ask(runtime, {"adapter": None, "base": None, **found.job, **job}, tell)
    except RuntimeLost as fault:
        parity.reasons = [f"{runtime}: {fault}"]
        return parity
    except RuntimeFailed as fault:
        parity.state, parity.reasons = "refused", [f"{runtime} cannot load or run it: {fault}"]
        return parity
    parity.runtime = facts["runtime"]
    parity.notes += facts["notes"]
    renderer = source.renderer
    words = _words(found, facts, renderer, facts["stops"] if facts["stops"] is not None else stops)
    numbers = _numbers(found, ids, logp, bounds_of(quant))
    answers = _compared(found, facts)
    parity.measured = {"words": words, "numbers": numbers, "answers": answers}
    refused, told = _judged(words, numbers, answers)
    parity.state = "refused" if refused else "warned" if told else "verified"
    parity.reasons = refused or told
    parity.notes += told if refused else []
    return parity


def _words(found: Live, facts: dict[str, Any], renderer: Renderer, stops: Sequence[int] | None) -> dict[str, Any]:
    own = found.conversations
    same = [ours == theirs for ours, theirs in zip(found.rendered, facts["rendered"], strict=True)]
    different = [
        {"asked": found.asked[i], "live": found.rendered[i], "artefact": facts["rendered"][i]} for i in range(own) if not same[i]
    ]
    tokenizer = renderer.tokenizer
    return {
        "conversations": own,
        "rendered": found.rendered[:own],
        "different": different[:4] + [{} for _ in different[4:]],
        "probes": len(same) - own,
        "probes_same": sum(same[own:]),
        "probes_different": [found.asked[i]["messages"][0]["content"] for i in range(own, len(same)) if not same[i]],
        "template": renderer.template,
        "template_same": facts["template"] == renderer.template,
        **({} if facts["template"] == renderer.template else {"template_artefact": facts["template"]}),
        "stops": {"live": sorted(renderer.stop_ids), "artefact": sorted(stops) if stops is not None else None},
        "eos": {"live": tokenizer.eos_id, "artefact": facts["eos"]},
        "bos": {"live": tokenizer.bos_id, "artefact": facts["bos"]},
        "adds_bos": {"live": begins_with_bos(renderer), "artefact": facts["adds_bos"]},
    }


def _numbers(found: Live, ids_PK: np.ndarray, logp_PK: np.ndarray, bounds: tuple[float, float]) -> dict[str, Any]:
    kl_P = divergence(found.logp_PV, ids_PK, logp_PK)
    rows = np.arange(len(ids_PK))
    at_target = ids_PK == found.targets[:, None]
    told = at_target.any(1)  # the losses are over tokens that are among the artefact's likeliest
    live, theirs = found.logp_PV[rows, found.targets][told], logp_PK[rows, at_target.argmax(1)][told]
    return {
        "positions": len(kl_P),
        "kl_mean": float(kl_P.mean()),
        "kl_p99": float(np.quantile(kl_P, 0.99)),
        "kl_max": float(kl_P.max()),
        "kl": [float(f"{kl:.3g}") for kl in kl_P],
        "top1": float((found.logp_PV.argmax(1) == ids_PK[:, 0]).mean()),
        "loss_live": float(-live.mean()) if told.any() else None,
        "loss_artefact": float(-theirs.mean()) if told.any() else None,
        "bounds": list(bounds),
    }


def divergence(live_PV: np.ndarray, ids_PK: np.ndarray, logp_PK: np.ndarray) -> np.ndarray:
    """KL(live || artefact) in nats at each position [P], over the artefact's K tokens and all others as one."""
    inside = ids_PK < live_PV.shape[1]  # an artefact's vocabulary may be padded
    p = np.where(inside, np.take_along_axis(live_PV, np.where(inside, ids_PK, 0), 1), -np.inf).astype(np.float64)
    q = logp_PK.astype(np.float64)
    kl = (np.exp(p) * np.where(np.isneginf(p), 0.0, p - q)).sum(1)
    left_p, left_q = (np.maximum(1 - np.exp(x).sum(1), REST) for x in (p, q))
    if ids_PK.shape[1] >= live_PV.shape[1]:
        return np.maximum(kl, 0)
    return np.maximum(kl + left_p * np.log(left_p / left_q), 0)


def _compared(found: Live, facts: dict[str, Any]) -> dict[str, Any]:
    pairs = list(zip(found.texts, facts["texts"], strict=True))
    out: dict[str, Any] = {
        "count": len(pairs),
        "equal": sum(a.strip() == b.strip() for a, b in pairs),
        "live_ended": sum(found.ended),
        "ended": sum(a and b for a, b in zip(found.ended, facts["ended"], strict=True)),
        "went_on": sum(
            sure and len(theirs) > len(ours) and theirs[: len(ours)] == ours
            for ours, sure, theirs in zip(found.answers, found.surely, facts["answers"], strict=True)
        ),
        "different": [{"live": a, "artefact": b} for a, b in pairs if a.strip() != b.strip()][:4],
    }
    if found.golds:
        metric = metrics.find(found.golds)[0]
        out["metric"] = metric.name
        out["metric_live"] = metric.score([a.strip() for a, _ in pairs], found.golds).whole
        out["metric_artefact"] = metric.score([b.strip() for _, b in pairs], found.golds).whole
    return out


def _judged(words: dict[str, Any], numbers: dict[str, Any], answers: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(why it is refused, what is told)"""
    refused, told = [], []
    if words["different"]:
        refused.append(f"{len(words['different'])} of {words['conversations']} conversations are rendered to other token ids")
    if not words["template_same"]:
        refused.append("the chat template is another, or lost")
    if words["stops"]["artefact"] is not None and words["stops"]["artefact"] != words["stops"]["live"]:
        refused.append(f"answers end at {words['stops']['artefact']} where the run's end at {words['stops']['live']}")
    if words["eos"]["live"] != words["eos"]["artefact"]:
        refused.append(f"EOS is {words['eos']['artefact']} where the run's is {words['eos']['live']}")
    if words["bos"]["live"] is not None and words["bos"]["live"] != words["bos"]["artefact"]:
        refused.append(f"BOS is {words['bos']['artefact']} where the run's is {words['bos']['live']}")
    if words["adds_bos"]["artefact"] is not None and words["adds_bos"]["live"] != words["adds_bos"]["artefact"]:
        refused.append(
            f"BOS is {'' if words['adds_bos']['artefact'] else 'not '}added where the run's conversations have it otherwise"
        )
    if answers["went_on"]:
        refused.append(f"{answers['went_on']} answers go on past their end")
    kl, (warns, refuses) = numbers["kl_mean"], numbers["bounds"]
    if not kl <= refuses:  # nan too
        refused.append(f"KL a token is {kl:.2g}, over {refuses:g}")
    elif kl > warns:
        told.append(f"KL a token is {kl:.2g}, over {warns:g}")
    if other := words["probes"] - words["probes_same"]:
        told.append(f"{other} of {words['probes']} probes get other token ids: {words['probes_different'][0]!r}")
    return refused, told
