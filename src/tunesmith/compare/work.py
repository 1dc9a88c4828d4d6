"""The answers of all arms to the same held-out rows, kept one by one: a comparison that is stopped goes on where it was.

answers.jsonl holds an object a line: arm, row, prompt, answer, tokens, seconds. Its `key` is a hash of all that decides the answer
(weights, prompt, decoding); an answer is taken from the file only under the same key, so a changed prompt is asked anew. One model
is loaded at a time, and only when a row of its arms lacks an answer. torch is imported then, not before.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.compare import arms, citing, contrast, forgetting, guard, scoring
from tunesmith.compare import judge as judging
from tunesmith.compare.arms import ARMS, Arm, Passage, Prompt, Question, Shot
from tunesmith.compare.endpoint import Endpoint, EndpointError
from tunesmith.config.load import load
from tunesmith.config.schema import RunConfig
from tunesmith.data import formats, sources
from tunesmith.data.render import Renderer, RowRefused, build_renderer
from tunesmith.errors import ConfigError, DataError, MissingExtra, RunError
from tunesmith.evaluate.metrics import METRICS, Metric, chosen, find
from tunesmith.files import LEFTOVER, append, make_folder, sha256, sha256_file, write_atomic
from tunesmith.hub import ResolvedModel, resolve_model
from tunesmith.run import Run, base_fingerprint
from tunesmith.spec import plan_spec
from tunesmith.types import Conversation
from tunesmith.wording import counted

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.chat import Talker

ROWS, SHOTS, PASSAGES, JUDGE_ROWS = 100, 4, 4, 50
LEAST_TOKENS, MOST_TOKENS = 32, 512  # of an answer, where --max-tokens is not given
CALLS = 4  # questions at an endpoint at a time
ANSWERS = "answers.jsonl"
PROBES = 60  # asked of every way, spread over all kinds, where --guardrails is not given
UNREAD = 5  # documents that could not be read are named, so many of them
INDEX = "index-"  # begins the name of the index made of a folder of documents


@dataclass(frozen=True)
class Options:
    """What a person asked for. `arms` empty: those that can be had."""

    docs: Path | None = None
    system: str = ""
    shots: int = SHOTS
    passages: int = PASSAGES
    rows: int = ROWS
    arms: tuple[str, ...] = ()
    endpoint: str = ""
    endpoint_model: str = ""
    metrics: tuple[str, ...] = ()
    max_tokens: int | None = None
    temperature: float = 0.0
    seed: int = 0
    guardrails: int = 0  # probes to ask of every way; 0 is none
    probes: Path | None = None  # a file of them; None is our own suite
    scope: str = ""
    refusal: str = ""
    by: str = ""
    gold: str = ""
    forgetting: tuple[str, ...] = ()
    judge: str = ""
    judge_model: str = ""
    judge_rows: int = JUDGE_ROWS

    def __post_init__(self) -> None:
        faults = [
            f"--{name} {value}: must be {least} or more"
            for name, value, least in (
                ("shots", self.shots, 0), ("passages", self.passages, 1), ("rows", self.rows, 1),
                ("max-tokens", self.max_tokens or 1, 1), ("temperature", self.temperature, 0), ("guardrails", self.guardrails, 0),
                ("judge-rows", self.judge_rows, 1),
            )
            if not value >= least
        ]  # fmt: skip
        if self.max_tokens is not None and self.max_tokens < 1:
            faults.append(f"--max-tokens {self.max_tokens}: must be 1 or more")
        if bool(self.endpoint) != bool(self.endpoint_model):
            missing = "--endpoint-model NAME" if self.endpoint else "--endpoint URL"
            faults.append(f"an endpoint takes an address and a model's name: {missing} is missing")
        if self.judge_model and not self.judge:
            faults.append(f"--judge-model {self.judge_model}: --judge is missing")
        if self.judge.startswith(("http://", "https://")) and not self.judge_model:
            faults.append(f"--judge {self.judge}: an address takes a model's name: --judge-model NAME is missing")
        if faults:
            raise ConfigError("\n".join(faults), "correct these")


@dataclass(frozen=True)
class Source:
    """What is compared: the run file's settings, the run where there is one, and the held-out rows."""

    config: RunConfig
    run: Run | None
    tuned: bool  # the run has a result
    base: ResolvedModel
    held_out: list[Conversation]

    @property
    def folder(self) -> Path:
        return self.run.path / "compare" if self.run else Path(f"{self.config.output}-compare")

    @property
    def name(self) -> str:
        return self.run.path.name if self.run else self.base.name


def open_source(what: str | Path | RunConfig | dict[str, Any], console: Console, *, rows: bool = True) -> Source:
    """A run folder; or a run file, whose run is taken where its `output` holds one, and whose rows are prepared where not (without
    `rows`: a model alone)."""
    if isinstance(what, (str, Path)) and (Path(what) / "run.yaml").is_file():
        run: Run | None = Run.open(what)
    elif isinstance(what, (str, Path)) and Path(what).is_dir():
        run = Run.open(what)  # says what is wrong with it
    else:
        config = load(what)
        run = Run.open(config.output) if rows and (Path(config.output) / "run.yaml").is_file() else None
    if run is not None:
        config = run.config
    base = resolve_model(config.model, weights=False)
    if run is not None:
        result = run.model / "config.json" if config.method == "full" else run.adapter / "adapter_config.json"
        return Source(config, run, result.is_file(), base, _kept_rows(run.data / "held_out.jsonl"))
    return Source(config, None, False, base, _prepared_rows(config, base, console) if rows else [])


def _kept_rows(path: Path) -> list[Conversation]:
    if not path.is_file():
        return []
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                rows.append(formats.from_dict(json.loads(line)))
            except (ValueError, KeyError, TypeError, AttributeError) as fault:
                what = f"{path}:{number}: not a held-out row as training wrote it ({type(fault).__name__}: {fault})"
                raise RunError(what, "put the run's own file back") from None
    return rows


def _prepared_rows(config: RunConfig, base: ResolvedModel, console: Console) -> list[Conversation]:
    """As training would hold them out."""
    import functools

    from tunesmith.data.prepare import prepare

    make = functools.partial(build_renderer, base.path, config.data, config.lora.new_tokens, None)
    prepared = prepare(config.data, make, seed=config.seed, progress=console, model=base.path)
    return list(prepared.conversations())


# ---- answers on disk -------------------------------------------------------------------------------------------------------------


class Answers:
    """answers.jsonl. A line that a crash tore is asked again."""

    def __init__(self, path: Path):
        self.path = path
        self._kept: dict[tuple[str, int, str], dict[str, Any]] = {}
        whole = True
        for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
            try:
                row = json.loads(line)
                self._kept[row["arm"], row["row"], row["key"]] = row
                whole = line.endswith(b"\n")
            except (ValueError, KeyError, TypeError):
                whole = False
        if not whole:  # else the next line would be glued to the torn one
            write_atomic(path, b"".join(map(self._line, self._kept.values())))

    def get(self, arm: str, row: int, key: str) -> dict[str, Any] | None:
        return self._kept.get((arm, row, key))

    def add(self, found: dict[str, Any]) -> None:
        append(self.path, self._line(found))
        self._kept[found["arm"], found["row"], found["key"]] = found

    @staticmethod
    def _line(row: dict[str, Any]) -> bytes:
        return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


@contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """The comparison's folder for us alone. RunError where it holds something else, or another comparison writes there."""
    make_folder(folder)
    there = {p.name for p in folder.iterdir() if not LEFTOVER.fullmatch(p.name)}
    known = {ANSWERS, guard.ANSWERS, forgetting.FILE, "compare.json"}
    if {n for n in there if not n.startswith(("lock", INDEX))} and not there & known:
        what = f"{folder}: is not empty and holds no comparison (it holds {', '.join(sorted(there)[:3])})"
        raise RunError(what, "name another --out")
    try:
        with Run(folder.absolute()).lock():
            yield
    except RunError as fault:
        if "another process is writing" in fault.what:
            what = fault.what.replace("writing this run", "comparing here")
            raise RunError(what, "wait for it, stop it, or name another --out") from None
        raise


# ---- passages --------------------------------------------------------------------------------------------------------------------

Search = Callable[[str, int], list[Passage]]


def searcher(docs: Path, folder: Path, notes: list[str]) -> Search:
    """A search over `docs`: an index (a file), or a folder of documents, or one of them, which are read into an index of theirs in
    `folder`. DataError where nothing is there. Documents that cannot be read are named in `notes`.

    Raises MissingExtra where this installation has no retrieval.
    """
    if not docs.exists():
        raise DataError(f"--docs {docs}: there is no such file or folder", "name a folder of documents, or an index of them")
    if docs.is_dir() and not any(p.is_file() for p in docs.rglob("*")):
        raise DataError(f"--docs {docs}: the folder is empty", "put documents into it (text, Markdown, HTML, PDF ...)")
    try:
        from tunesmith.retrieve import Index
    except ImportError as fault:
        raise MissingExtra(f"--docs needs retrieval, which is not installed: {fault}", "drop --docs, or install it") from None
    if docs.is_dir() or sources.is_document(docs):
        found = Index.create_or_open(folder / f"{INDEX}{sha256(str(docs.resolve()))[:12]}.sqlite")
        added = found.add(docs, only=True)  # what has not changed is not read again; a copied index names the old place: it goes
        if unread := getattr(added, "unread", []):
            named = "; ".join(f"{name}: {why}" for name, why in unread[:UNREAD])
            more = f"; and {len(unread) - UNREAD} more" if len(unread) > UNREAD else ""
            if not (added.documents or added.unchanged):
                raise DataError(f"--docs {docs}: none of its documents can be read: {named}{more}", "name documents that can be")
            notes.append(f"{counted(len(unread), 'document')} could not be read, the rest is searched: {named}{more}")
    else:
        found = Index.open(docs)

    def search(query: str, count: int) -> list[Passage]:
        return [Passage(str(p.id), str(p.document), p.text, getattr(p, "context", "")) for p in found.search(query, count)]

    return search


# ---- the work --------------------------------------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """What all arms were asked and what they answered; result.py makes the verdict of it."""

    source: Source
    options: Options
    folder: Path
    arms: list[Arm]
    questions: list[Question]
    metrics: list[Metric]
    max_tokens: int
    left_out: int
    prompts: dict[str, list[Prompt]]
    notes: list[str] = field(default_factory=list)
    answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    ranked: list[list[Passage]] = field(default_factory=list)
    """The passages found for each question, best first: as many as prompts hold, or citing.DEPTH where the right ones are known."""
    gold: str | None = None
    contrast: contrast.Contrast | None = None
    adherence: dict[str, Any] | None = None
    forgetting: dict[str, Any] | None = None
    judged: dict[str, Any] | None = None
    guarded: guard.Guarded | None = None


Asked = Comparison | guard.Guarded | contrast.Contrast  # arms, questions and prompts, for which answers are wanted


def compare(source: Source, options: Options, folder: Path, console: Console) -> Comparison:
    """All that can be wrong is found out here, before a model is loaded; then every arm answers every row."""
    picked = _arms(source, options)
    tasks = _tasks(source, options, picked)
    endpoint = Endpoint(options.endpoint, options.endpoint_model) if options.endpoint else None
    with own_folder(folder):
        work = _Work(source, options, folder, picked, endpoint, console, tasks)
        return work.run()


def ask_probes(source: Source, options: Options, folder: Path, console: Console, max_tokens: int) -> guard.Guarded:
    """The probes alone. `options.system` stands in every way, since it is no way to compare here."""
    picked = _arms(source, options)
    with own_folder(folder):
        work = _Work(source, options, folder, picked, None, console, [])
        found = guard.asked(work, system=options.system, max_tokens=max_tokens)
        work.say("guard", f"{counted(len(found.probes), 'probe')}, asked of: {', '.join(arm.name for arm in picked)}")
        work.answer([(found, Answers(folder / guard.ANSWERS))])
        return found


def _concerned(metrics: list[Metric], questions: Sequence[Question]) -> list[Metric]:
    """Those that concern any of the rows that are asked. ConfigError where none does."""
    fields = [q.fields for q in questions]
    kept = []
    for metric in metrics:
        used = metric.by_fields([""] * len(fields), fields).used if metric.by_fields else None
        if used is None or used.any():
            kept.append(metric)
    if not kept:
        what = f"--metric {metrics[0].name} concerns none of the {len(questions)} rows that are asked"
        raise ConfigError(what, "ask more rows: --rows; or name another metric")
    return kept


def _tasks(source: Source, options: Options, picked: Sequence[Arm]) -> list[forgetting.Task]:
    """What both models are measured on beside the rows; nothing where one of them is not in the comparison."""
    if {"base", "tuned"} <= {arm.model for arm in picked}:
        return forgetting.tasks(options.forgetting)
    if [name for name in options.forgetting if name != forgetting.NONE]:
        what = "--forgetting compares the base with the tuned model, and this comparison lacks one of them"
        raise ConfigError(what, "compare a finished run, with a base and a tuned way among --arms")
    return []


def _arms(source: Source, options: Options) -> list[Arm]:
    have = {
        "system": bool(options.system), "shots": options.shots > 0, "passages": options.docs is not None,
        "base": True, "tuned": source.tuned, "endpoint": bool(options.endpoint),
    }  # fmt: skip

    def lacks(arm: Arm) -> list[str]:
        wanted = [arm.model, *(way for way in ("system", "shots", "passages") if getattr(arm, way))]
        return [way for way in wanted if not have[way]]

    if not options.arms:
        usual = ["base", "system", "few-shot", "retrieval", "tuned", "tuned+retrieval", "endpoint"]
        if source.run is not None and not source.tuned:
            _refuse_unfinished(source.run)
        return [arm for arm in map(ARMS.__getitem__, usual) if not lacks(arm)]
    picked = arms.named(options.arms)
    fixes = {
        "system": "add --system TEXT", "shots": "give --shots 1 or more", "passages": "add --docs FOLDER",
        "endpoint": "add --endpoint URL --endpoint-model NAME",
    }  # fmt: skip
    faults, told = [], []
    for arm in picked:
        for way in lacks(arm):
            if way == "tuned" and source.run is not None:
                _refuse_unfinished(source.run)
            elif way == "tuned":
                faults.append(f"--arms {arm.name}: nothing has been trained yet in {source.config.output}")
                told.append("tunesmith train RUN.yaml, or leave that arm out")
            else:
                faults.append(f"--arms {arm.name}: it has nothing to go with")
                told.append(fixes[way])
    if faults:
        raise ConfigError("\n".join(faults), "; ".join(dict.fromkeys(told)))
    return picked


def _refuse_unfinished(run: Run) -> None:
    state = run.status().state
    what = "wait until it has finished" if state == "running" else "finish it: tunesmith train RUN.yaml --resume"
    raise RunError(
        f"{run.path}: this run has no result yet, its state is {state}", f"{what}; or compare without: --arms base,few-shot"
    )


@dataclass
class _Part:
    """Questions and the file of their answers: which are there, which are missing."""

    found: Asked
    store: Answers
    keys: dict[str, list[str]]
    missing: dict[str, list[int]]

    @classmethod
    def of(cls, work: _Work, found: Asked, store: Answers) -> _Part:
        keys = {arm.name: [work._key(arm, p, found.max_tokens) for p in found.prompts[arm.name]] for arm in found.arms}
        missing = {
            name: [i for i, q in enumerate(found.questions) if store.get(name, q.row, some[i]) is None]
            for name, some in keys.items()
        }
        return cls(found, store, keys, missing)

    @property
    def total(self) -> int:
        return len(self.keys) * len(self.found.questions)

    @property
    def todo(self) -> int:
        return sum(map(len, self.missing.values()))


class _Work:
    def __init__(
        self, source: Source, options: Options, folder: Path, picked: list[Arm], endpoint: Endpoint | None, console: Console,
        tasks: list[forgetting.Task],
    ):  # fmt: skip
        self.source, self.options, self.folder, self.arms, self.endpoint = source, options, folder, picked, endpoint
        self.tasks = tasks
        self.console = console
        self.renderers: dict[str, Renderer] = {}
        self.prints: dict[str, Any] = {}
        self.identities: dict[str, Any] = {}
        self.search: Search | None = None
        self.limit = plan_spec(source.base.path).reach

    def run(self) -> Comparison:
        found = self._asked()
        judge = self._judge()
        store = Answers(self.folder / ANSWERS)
        forgot = forgetting.Forgetting(self.tasks, Answers(self.folder / forgetting.FILE), self._identity)
        rows, ways = len(found.questions), len(self.arms)
        self.say("compare", f"{counted(rows, 'held-out row')}, {counted(ways, 'way')}: {ways * rows:,} answers")
        for note in found.notes:
            self.say("", note)
        whole: list[tuple[Asked, Answers]] = [(found, store)]
        if self.options.guardrails:
            try:
                found.guarded = guard.asked(self)
            except DataError as fault:  # the rows can be asked all the same
                found.notes.append(f"no guardrails: {fault.what}")
                self.say("guard", f"left out: {fault.what}")
            else:
                more = counted(len(found.guarded.probes), "probe")
                self.say("guard", f"{more} more of every way; --guardrails 0 leaves them out")
                whole.append((found.guarded, Answers(self.folder / guard.ANSWERS)))
        if found.contrast is not None:
            more = counted(len(found.contrast.questions), "training row")
            self.say("", f"{more} for the base too, to learn what the house's style is")
            whole.append((found.contrast, store))

        def beside(model: str, talker: Talker) -> None:
            forgot.measure(model, talker, lambda what: self.say("", f"what was forgotten: {what}"))

        self.answer(whole, {model for model in ("base", "tuned") if forgot.missing(model)}, beside)
        if found.contrast is not None:
            self._hear(found, found.contrast)
        if self.tasks:
            found.forgetting = forgot.found(self.options.seed)
        if judge is not None:
            self._ask_judge(found, judge)
        return found

    def answer(
        self, whole: Sequence[tuple[Asked, Answers]], wanted: Set[str] = frozenset(),
        beside: Callable[[str, Talker], None] = lambda model, talker: None,
    ) -> None:  # fmt: skip
        """The answers that the files lack, and what else is `wanted` of a model. Each is loaded once for all, and only for that."""
        parts = [_Part.of(self, found, store) for found, store in whole]
        total, todo = sum(p.total for p in parts), sum(p.todo for p in parts)
        if total > todo:
            self.say("", f"{total - todo:,} are there already, {todo:,} are to be made")
        with self._bar(total, total - todo) as step:
            for model in ("base", "tuned", "endpoint"):
                some = [(part, arm) for part in parts for arm in part.found.arms if arm.model == model and part.missing[arm.name]]
                if not some and model not in wanted:
                    continue
                talker = None if model == "endpoint" else self._load(model)
                for part, arm in some:
                    if talker is None:
                        made = self._called(arm, part.found, part.missing[arm.name], part.store)
                    else:
                        made = self._written(talker, arm, part.found, part.missing[arm.name])
                    for i, answer in made:
                        part.store.add(self._record(arm, part.found, i, part.keys[arm.name][i], answer))
                        step(arm.name)
                if talker is not None:
                    beside(model, talker)
                del talker
                gc.collect()  # a large model leaves the device before the next comes
        for part in parts:
            for arm in part.found.arms:
                pairs = zip(part.found.questions, part.keys[arm.name], strict=True)
                part.found.answers[arm.name] = [part.store.get(arm.name, q.row, key) for q, key in pairs]

    @staticmethod
    def _hear(found: Comparison, others: contrast.Contrast) -> None:
        """Put the classifier in the place of its metric, or take the metric out and say why."""
        metric, found.adherence, why = contrast.metric_of(others, [q.gold for q in found.questions])
        kept = [metric if m.name == contrast.NAME else m for m in found.metrics]
        found.metrics = [m for m in kept if m is not None] or find([q.gold for q in found.questions])
        if why:
            found.notes.append(f"adherence is not measured: {why}")

    # ---- the judge

    def _judge(self) -> judging.Judge | None:
        """Found out before a model is loaded; a local one is loaded when all answers are there."""
        options = self.options
        if not options.judge:
            return None
        if len(self.arms) < 2:
            raise ConfigError("--judge compares ways, and there is one", "name two or more: --arms base,tuned")
        if options.judge.startswith(("http://", "https://")):
            return judging.EndpointJudge(Endpoint(options.judge, options.judge_model), options.seed)
        folder = Path(options.judge)
        if (folder / "run.yaml").is_file():
            run = Run.open(folder)
            if not (run.adapter / "adapter_config.json").is_file() and not (run.model / "config.json").is_file():
                raise RunError(f"--judge {folder}: this run has no result", "finish it, or name another judge")
            weights = sorted([*run.adapter.glob("*.safetensors"), *run.model.glob("*.safetensors")])
            identity: Any = [sha256_file(p) for p in weights]
        else:
            identity = base_fingerprint(resolve_model(options.judge).path)
        return judging.LocalJudge(options.judge, identity, self.source.config.memory)

    def _ask_judge(self, found: Comparison, judge: judging.Judge) -> None:
        scored, own = scoring.scores(found), scoring.weighed(found.arms)
        best = scoring.leading(own, scored, found.metrics[0].name).name
        store, rows = Answers(self.folder / judging.FILE), min(self.options.judge_rows, len(found.questions))
        total = 2 * rows * (len(found.arms) - 1)
        self.say("", f"judge {judge.name}: {best} beside each other way on {counted(rows, 'row')}, both orders: {total} verdicts")
        found.judged = judging.judged(found, judge, best, rows, store, partial(self._bar, doing="judging"))

    # ---- what is asked

    def _asked(self) -> Comparison:
        every = [q for i, c in enumerate(self.source.held_out) if (q := arms.question_of(i, c)) is not None]
        if not self.source.held_out:
            raise DataError("there are no held-out rows to compare on", "set data.held_out (a share or a file) and train again")
        if not every:
            raise DataError(
                f"none of the {len(self.source.held_out)} held-out rows ends in an answer: there is nothing to ask",
                "compare needs rows with a question and an answer, not plain text",
            )
        kinds = {q.completion for q in every}
        local = [arm for arm in self.arms if arm.model != "endpoint"]
        renderers = {arm.model: self._renderer(arm.model) for arm in local}
        options = self.options
        picked = [every[i] for i in arms.spread(len(every), options.rows)]
        counter = next(iter(renderers.values()), None) or self._renderer("base")
        if options.max_tokens is None:
            longest = max(len(counter.tokenizer.encode(q.gold)) for q in picked)
            max_tokens = min(MOST_TOKENS, max(LEAST_TOKENS, longest * 3 // 2 + 8))
        else:
            max_tokens = options.max_tokens
        room = min(max_tokens, self.limit // 4)

        def fits(model: str) -> Callable[[Prompt], bool]:
            return lambda prompt: len(self._ids(renderers[model], prompt)) + room <= self.limit

        plain = {arm.name: arm for arm in local if not (arm.shots or arm.passages)} or {a.name: a for a in local}

        def askable(q: Question) -> bool:
            try:
                return all(fits(arm.model)(arms.compose(arm, q, system=options.system)) for arm in plain.values())
            except RowRefused:
                return False

        questions = [q for q in picked if askable(q)]
        if not questions:
            what = f"none of {counted(len(picked), 'held-out question')} fits the model's context of {self.limit:,} tokens"
            raise DataError(what, "give a smaller --max-tokens, a shorter --system, or a model with a longer context")
        fields = [q.fields for q in every]
        if options.by and not any(options.by in row for row in fields):
            have = sorted({key for row in fields for key in row})
            what = f"--by {options.by}: no held-out row carries {options.by!r}"
            raise ConfigError(what, f"the rows carry {', '.join(have)}" if have else "the rows carry nothing beside their messages")
        gold = citing.gold_key(fields, options.gold) if any(arm.passages for arm in self.arms) else None
        if options.gold and gold is None:
            raise ConfigError("--gold says which passages are right, and no way has passages", "add --docs FOLDER")
        notes: list[str] = []
        metrics, contrasted = self._metrics(every, fields, fits("base") if "base" in renderers else None, max_tokens, notes)
        metrics = _concerned(metrics, questions)
        shots = self._shots(questions, every, kinds, notes)
        ranked = self._passages(questions, citing.DEPTH if gold else 0, notes)
        if any(arm.passages for arm in self.arms) and not any(ranked):
            raise DataError(f"--docs {options.docs}: no passage was found for any question", "does it hold text?")
        passages = [found[: options.passages] for found in ranked]
        prompts, short = {}, 0
        for arm in self.arms:
            made = []
            for i, q in enumerate(questions):

                def again(some: Sequence[Shot], more: Sequence[Passage], q=q, arm=arm) -> Prompt:
                    return arms.compose(arm, q, system=options.system, shots=some, passages=more)

                whole = again(shots[i], passages[i])
                prompt = whole if arm.model == "endpoint" else arms.fitted(whole, again, fits(arm.model))
                short += (len(prompt.shots), len(prompt.passages)) != (len(whole.shots), len(whole.passages))
                made.append(prompt)
            prompts[arm.name] = made
        if short:
            notes.append(
                f"{counted(short, 'prompt')} took fewer examples or passages: the model's context holds {self.limit:,} tokens"
            )
        if self.endpoint is not None and self.endpoint.note:
            notes.append(self.endpoint.note)
        left_out = len(picked) - len(questions)
        if left_out:
            notes.append(f"{counted(left_out, 'row')} left out: the question alone is too long for the model's context")
        return Comparison(
            self.source, options, self.folder, self.arms, questions, metrics, max_tokens, left_out, prompts, notes,
            ranked=ranked, gold=gold, contrast=contrasted,
        )  # fmt: skip

    def _metrics(
        self, every: list[Question], fields: list[Any], fits: Callable[[Prompt], bool] | None, max_tokens: int, notes: list[str]
    ) -> tuple[list[Metric], contrast.Contrast | None]:
        """The metrics, by all rows (a few may lack most classes), and what the style's classifier is to learn from: where it is
        asked for, or where text is compared with a tuned model's and nothing else was named."""
        names, golds = list(self.options.metrics), [q.gold for q in every]
        plain = [name for name in names if name != contrast.NAME]
        metrics = chosen(plain, golds, fields) if plain or not names else []
        text = {"rouge_l", "chrf"} & {m.name for m in metrics}
        asked = contrast.NAME in names
        if not asked and (names or not text or not self.source.tuned):
            return metrics, None
        data = self.source.config.data
        why = "no way has the base model" if fits is None else contrast.choose(data, every, fits, max_tokens)
        if isinstance(why, str):
            if not metrics:
                raise ConfigError(f"--metric {contrast.NAME} cannot be had: {why}", "leave it out, or add another --metric")
            notes.append(f"adherence is not measured: {why}")
            return metrics, None
        place = names.index(contrast.NAME) if asked else len(metrics)
        until = replace(METRICS["exact_match"], name=contrast.NAME)  # the classifier comes with the base's answers
        metrics.insert(min(place, len(metrics)), until)
        return metrics, why

    def _shots(self, questions: list[Question], every: list[Question], kinds: set[bool], notes: list[str]) -> list[list[Shot]]:
        if not any(arm.shots for arm in self.arms):
            return [[] for _ in questions]
        nearest = {}
        for completion in kinds:
            found = arms.pool(arms.training_rows(self.source.config.data), every, completion=completion)
            nearest[completion] = arms.Nearest(found)
        chosen_ = [nearest[q.completion].nearest(q.shown, self.options.shots) for q in questions]
        if not all(chosen_):
            raise DataError("no training row can serve as an example", "leave the few-shot arm out: --arms base,tuned")
        notes.append(f"few-shot: the {self.options.shots} training rows nearest to the question by words (BM25)")
        return chosen_

    def _passages(self, questions: list[Question], depth: int, notes: list[str]) -> list[list[Passage]]:
        if not any(arm.passages for arm in self.arms):
            return [[] for _ in questions]
        assert self.options.docs is not None
        if self.search is None:  # once for rows and probes: all documents are read through
            self.search = searcher(self.options.docs, self.folder, notes)
        return [self.search(q.shown, max(depth, self.options.passages)) for q in questions]

    def _renderer(self, model: str) -> Renderer:
        if model not in self.renderers:
            run = self.source.run
            date = run.manifest.get("date") if run else None
            if model == "tuned":
                assert run is not None
                made = build_renderer(run.tokenizer, self.source.config.data, date=date, saved=True)
            else:
                made = build_renderer(self.source.base.path, date=date)
            self.renderers[model] = made
        return self.renderers[model]

    @staticmethod
    def _ids(renderer: Renderer, prompt: Prompt) -> list[int]:
        return renderer.raw_prompt(prompt.messages[0].content) if prompt.raw else renderer.prompt(prompt.messages, prompt.tools)

    # ---- who answers

    def _identity(self, model: str) -> Any:
        """What the answers depend on beside the prompt."""
        if model not in self.identities:
            self.identities[model] = self._made_of(model)
        return self.identities[model]

    def _made_of(self, model: str) -> Any:
        source = self.source
        if model == "endpoint":
            assert self.endpoint is not None
            return [self.endpoint.url, self.endpoint.model]
        if "base" not in self.prints:
            kept = source.run.manifest.get("base") if source.run else None
            self.prints["base"] = kept or base_fingerprint(resolve_model(source.config.model).path)
        if model == "tuned" and "tuned" not in self.prints:
            assert source.run is not None
            files = sorted(source.run.adapter.glob("*.safetensors"))
            whole = source.config.method == "full"
            self.prints["tuned"] = base_fingerprint(source.run.model) if whole else [sha256_file(p) for p in files]
        store = "nf4" if source.config.method == "qlora" else "dense"
        return [self.prints["base"], store, self.prints.get(model) if model == "tuned" else None, self._renderer(model).fingerprint]

    def _key(self, arm: Arm, prompt: Prompt, max_tokens: int) -> str:
        options = self.options
        drawn = [options.temperature, options.seed if options.temperature or arm.model == "endpoint" else 0]
        said = [self._identity(arm.model), prompt.as_dicts(), prompt.raw, prompt.tools, max_tokens, drawn]
        return sha256(json.dumps(said, sort_keys=True, default=str))[:32]

    def _load(self, model: str) -> Talker:
        """The base as it lay under the adapter while it trained (4 bits for qlora), so that the arms differ in nothing else."""
        from tunesmith import models
        from tunesmith.chat import Talker
        from tunesmith.models.place import place

        self.say("", f"loading {'the tuned model' if model == 'tuned' else self.source.base.name}")
        config = self.source.config
        if model == "tuned":
            assert self.source.run is not None
            return Talker.open(self.source.run.path, memory=config.memory)
        where = place(config.memory)
        store = "nf4" if config.method == "qlora" else "dense"
        loaded = models.load(resolve_model(config.model).path, dtype=where.dtype, device=where.device, store=store)
        return Talker(loaded.eval(), self._renderer("base"), self.source.base.name)

    def _written(self, talker: Talker, arm: Arm, found: Asked, rows: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """(row, answer) by a model here, a batch at a time; half as many after an out-of-memory."""
        import torch

        from tunesmith.generate import Sampling, stream, together

        options, renderer, stop = self.options, self._renderer(arm.model), self._renderer(arm.model).stop_ids
        asked = {i: self._ids(renderer, found.prompts[arm.name][i]) for i in rows}
        # a row's draws are its own, however many others are asked with it
        at_once = 1 if options.temperature else together(talker.model, max(map(len, asked.values())) + found.max_tokens)
        start = 0
        while start < len(rows):
            part = rows[start : start + at_once]
            prompts = [asked[i] for i in part]
            sampling = Sampling(options.temperature, seed=options.seed + found.questions[part[0]].row if options.temperature else 0)
            made: list[list[int]] = [[] for _ in part]
            ended = ["length"] * len(part)
            begun = time.monotonic()
            try:
                for k, token in stream(
                    talker.model, prompts, stop_ids=sorted(stop), max_tokens=found.max_tokens, sampling=sampling, batch=len(part)
                ):
                    if token in stop:
                        ended[k] = "stop"
                    else:
                        made[k].append(token)
            except torch.OutOfMemoryError:
                if at_once == 1:
                    raise
                at_once = max(1, at_once // 2)
                torch.cuda.empty_cache()
                continue
            each = (time.monotonic() - begun) / len(part)
            for k, i in enumerate(part):
                text = renderer.tokenizer.decode(made[k], skip_special=True).strip()
                counts = {"prompt_tokens": len(prompts[k]), "answer_tokens": len(made[k])}
                yield i, {"answer": text, **counts, "seconds": each, "ended": ended[k]}
            start += len(part)

    def _called(self, arm: Arm, found: Asked, rows: list[int], store: Answers) -> Iterator[tuple[int, dict[str, Any]]]:
        """(row, answer) by the endpoint, CALLS at a time. When one fails for good, those that came are kept first."""
        endpoint, options = self.endpoint, self.options
        assert endpoint is not None

        def ask(i: int) -> Any:
            prompt = found.prompts[arm.name][i].as_dicts()
            try:
                return endpoint.ask(prompt, max_tokens=found.max_tokens, temperature=options.temperature, seed=options.seed)
            except EndpointError as fault:
                return fault

        came = 0
        with ThreadPoolExecutor(CALLS) as threads:
            for start in range(0, len(rows), CALLS):
                part, failed = rows[start : start + CALLS], None
                for i, reply in zip(part, threads.map(ask, part), strict=True):
                    if isinstance(reply, EndpointError):
                        failed = reply
                        continue
                    came += 1
                    counts = {"prompt_tokens": reply.prompt_tokens, "answer_tokens": reply.answer_tokens}
                    yield i, {"answer": reply.text.strip(), **counts, "seconds": reply.seconds, "ended": reply.ended}
                if failed is not None:
                    done = len(found.questions) - len(rows) + came
                    probes = isinstance(found, guard.Guarded)
                    what = f"{arm.name}: {done} of {len(found.questions)} {'probes' if probes else 'rows'} are answered"
                    what = f"{failed.what}\n{what} and kept in {store.path}"
                    without = ",".join(a.name for a in self.arms if a.model != "endpoint")
                    rest = ", or leave the probes out: --guardrails 0" if probes else ""  # some servers refuse them
                    rest += f", or compare without it: --arms {without}" if without else ""
                    raise RunError(what, f"{failed.fix}; the same command goes on from there{rest}")

    @staticmethod
    def _record(arm: Arm, found: Asked, i: int, key: str, answer: dict[str, Any]) -> dict[str, Any]:
        question, prompt = found.questions[i], found.prompts[arm.name][i]
        return {
            "arm": arm.name, "row": question.row, "key": key, "question": question.shown, "gold": question.gold, **answer,
            "prompt": prompt.messages[0].content if prompt.raw else prompt.as_dicts(), "shots": [s.origin for s in prompt.shots],
            "passages": [{k: v for k, v in asdict(p).items() if k in ("id", "document")} for p in prompt.passages],
        }  # fmt: skip

    # ---- what is told

    def say(self, name: str, text: str) -> None:
        self.console.print(f"{name:<9}{text}", markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def _bar(self, total: int, done: int, doing: str = "answering") -> Iterator[Callable[[str], None]]:
        """A bar on a terminal; elsewhere a line when an arm begins."""
        if not self.console.is_terminal:
            told: set[str] = set()

            def tell(arm: str) -> None:
                if arm not in told:
                    told.add(arm)
                    self.say("", f"{doing}: {arm}")

            yield tell
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task("answers", total=total, completed=done)
            yield lambda arm: progress.update(task, advance=1, description=arm)
