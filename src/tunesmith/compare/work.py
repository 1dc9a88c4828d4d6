"""The answers of all arms to the same held-out rows, kept one by one: a comparison that is stopped goes on where it was.

answers.jsonl holds an object a line: arm, row, prompt, answer, tokens, seconds. Its `key` is a hash of all that decides the answer
(weights, prompt, decoding); an answer is taken from the file only under the same key, so a changed prompt is asked anew. One model
is loaded at a time, and only when a row of its arms lacks an answer. torch is imported then, not before.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.compare import arms, guard
from tunesmith.compare.arms import ARMS, Arm, Passage, Prompt, Question, Shot
from tunesmith.compare.endpoint import Endpoint, EndpointError
from tunesmith.config.load import load
from tunesmith.config.schema import RunConfig
from tunesmith.data import formats
from tunesmith.data.render import Renderer, RowRefused, build_renderer
from tunesmith.errors import ConfigError, DataError, MissingExtra, RunError
from tunesmith.evaluate.metrics import Metric, chosen
from tunesmith.files import LEFTOVER, append, make_folder, sha256, sha256_file, write_atomic
from tunesmith.hub import ResolvedModel, resolve_model
from tunesmith.run import Run, base_fingerprint
from tunesmith.spec import plan_spec
from tunesmith.types import Conversation
from tunesmith.wording import counted

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.chat import Talker

ROWS, SHOTS, PASSAGES = 100, 4, 4
LEAST_TOKENS, MOST_TOKENS = 32, 512  # of an answer, where --max-tokens is not given
AT_ONCE = {"cuda": 32, "cpu": 8}  # answers that are written together, and kept together
CALLS = 4  # questions at an endpoint at a time
ANSWERS = "answers.jsonl"
PROBES = 60  # asked of every way, spread over all kinds, where --guardrails is not given
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

    def __post_init__(self) -> None:
        faults = [
            f"--{name} {value}: must be {least} or more"
            for name, value, least in (
                ("shots", self.shots, 0), ("passages", self.passages, 1), ("rows", self.rows, 1),
                ("max-tokens", self.max_tokens or 1, 1), ("temperature", self.temperature, 0), ("guardrails", self.guardrails, 0),
            )
            if not value >= least
        ]  # fmt: skip
        if self.max_tokens is not None and self.max_tokens < 1:
            faults.append(f"--max-tokens {self.max_tokens}: must be 1 or more")
        if bool(self.endpoint) != bool(self.endpoint_model):
            missing = "--endpoint-model NAME" if self.endpoint else "--endpoint URL"
            faults.append(f"an endpoint takes an address and a model's name: {missing} is missing")
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
    if {n for n in there if not n.startswith(("lock", INDEX))} and not there & {ANSWERS, guard.ANSWERS, "compare.json"}:
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


def searcher(docs: Path, folder: Path) -> Search:
    """A search over `docs`: an index (a file), or a folder of documents, which are read into an index of theirs in `folder`.
    DataError where nothing is there.

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
    if docs.is_dir():
        found = Index.create_or_open(folder / f"{INDEX}{sha256(str(docs.resolve()))[:12]}.sqlite")
        found.add(docs)  # what has not changed since is not read again
    else:
        found = Index.open(docs)

    def search(query: str, count: int) -> list[Passage]:
        return [Passage(str(p.id), str(p.document), p.text) for p in found.search(query, count)]

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
    guarded: guard.Guarded | None = None


Asked = Comparison | guard.Guarded  # arms, questions and prompts, for which answers are wanted


def compare(source: Source, options: Options, folder: Path, console: Console) -> Comparison:
    """All that can be wrong is found out here, before a model is loaded; then every arm answers every row."""
    picked = _arms(source, options)
    endpoint = Endpoint(options.endpoint, options.endpoint_model) if options.endpoint else None
    with own_folder(folder):
        work = _Work(source, options, folder, picked, endpoint, console)
        return work.run()


def ask_probes(source: Source, options: Options, folder: Path, console: Console, max_tokens: int) -> guard.Guarded:
    """The probes alone. `options.system` stands in every way, since it is no way to compare here."""
    picked = _arms(source, options)
    with own_folder(folder):
        work = _Work(source, options, folder, picked, None, console)
        found = guard.asked(work, system=options.system, max_tokens=max_tokens)
        work.say("guard", f"{counted(len(found.probes), 'probe')}, asked of: {', '.join(arm.name for arm in picked)}")
        work.answer([(found, guard.ANSWERS)])
        return found


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
    def of(cls, work: _Work, found: Asked, path: Path) -> _Part:
        store = Answers(path)
        keys = {arm.name: [work._key(arm, p, found.max_tokens) for p in found.prompts[arm.name]] for arm in work.arms}
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
        self, source: Source, options: Options, folder: Path, picked: list[Arm], endpoint: Endpoint | None, console: Console
    ):
        self.source, self.options, self.folder, self.arms, self.endpoint = source, options, folder, picked, endpoint
        self.console = console
        self.renderers: dict[str, Renderer] = {}
        self.prints: dict[str, Any] = {}
        self.identities: dict[str, Any] = {}
        self.limit = plan_spec(source.base.path).reach

    def run(self) -> Comparison:
        found = self._asked()
        rows, ways = counted(len(found.questions), "held-out row"), len(self.arms)
        self.say("compare", f"{rows}, {ways} ways: {ways * len(found.questions):,} answers")
        for note in found.notes:
            self.say("", note)
        whole: list[tuple[Asked, str]] = [(found, ANSWERS)]
        if self.options.guardrails:
            try:
                found.guarded = guard.asked(self)
            except DataError as fault:  # the rows can be asked all the same
                found.notes.append(f"no guardrails: {fault.what}")
                self.say("guard", f"left out: {fault.what}")
            else:
                self.say(
                    "guard", f"{counted(len(found.guarded.probes), 'probe')} more of every way; --guardrails 0 leaves them out"
                )
                whole.append((found.guarded, guard.ANSWERS))
        self.answer(whole)
        return found

    def answer(self, whole: Sequence[tuple[Asked, str]]) -> None:
        """The answers that the files lack. Each model is loaded once for all of them, and only where one is missing."""
        parts = [_Part.of(self, found, self.folder / name) for found, name in whole]
        total, todo = sum(p.total for p in parts), sum(p.todo for p in parts)
        if total > todo:
            self.say("", f"{total - todo:,} are there already, {todo:,} are to be made")
        with self._bar(total, total - todo) as step:
            for model in ("base", "tuned", "endpoint"):
                some = [(part, arm) for part in parts for arm in self.arms if arm.model == model and part.missing[arm.name]]
                if not some:
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
                del talker
                gc.collect()  # a large model leaves the device before the next comes
        for part in parts:
            for arm in self.arms:
                pairs = zip(part.found.questions, part.keys[arm.name], strict=True)
                part.found.answers[arm.name] = [part.store.get(arm.name, q.row, key) for q, key in pairs]

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
        metrics = chosen(options.metrics, [q.gold for q in every])  # all rows: a few may lack most classes
        notes = []
        shots = self._shots(questions, every, kinds, notes)
        passages = self._passages(questions)
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
        return Comparison(self.source, options, self.folder, self.arms, questions, metrics, max_tokens, left_out, prompts, notes)

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

    def _passages(self, questions: list[Question]) -> list[list[Passage]]:
        if not any(arm.passages for arm in self.arms):
            return [[] for _ in questions]
        assert self.options.docs is not None
        search = searcher(self.options.docs, self.folder)
        found = [search(q.shown, self.options.passages) for q in questions]
        if not any(found):
            raise DataError(f"--docs {self.options.docs}: no passage was found for any question", "does it hold text?")
        return found

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

        from tunesmith.generate import Sampling, stream

        options, renderer = self.options, self._renderer(arm.model)
        stop, at_once = renderer.stop_ids, AT_ONCE.get(talker.model.device.type, AT_ONCE["cpu"])
        if options.temperature:  # a row's draws are its own, however many others are asked with it
            at_once = 1
        start = 0
        while start < len(rows):
            part = rows[start : start + at_once]
            prompts = [self._ids(renderer, found.prompts[arm.name][i]) for i in part]
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
                    what = f"{failed.what}\n{arm.name}: {done} of {len(found.questions)} rows are answered and kept in {store.path}"
                    without = ",".join(a.name for a in self.arms if a.model != "endpoint")
                    rest = f", or compare without it: --arms {without}" if without else ""
                    raise RunError(what, f"{failed.fix}; the same command goes on from there{rest}")

    @staticmethod
    def _record(arm: Arm, found: Asked, i: int, key: str, answer: dict[str, Any]) -> dict[str, Any]:
        question, prompt = found.questions[i], found.prompts[arm.name][i]
        return {
            "arm": arm.name, "row": question.row, "key": key, "question": question.shown, "gold": question.gold, **answer,
            "prompt": prompt.messages[0].content if prompt.raw else prompt.as_dicts(), "shots": [s.origin for s in prompt.shots],
            "passages": [{k: v for k, v in asdict(p).items() if k != "text"} for p in prompt.passages],
        }  # fmt: skip

    # ---- what is told

    def say(self, name: str, text: str) -> None:
        self.console.print(f"{name:<9}{text}", markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def _bar(self, total: int, done: int) -> Iterator[Callable[[str], None]]:
        """A bar on a terminal; elsewhere a line when an arm begins."""
        if not self.console.is_terminal:
            told: set[str] = set()

            def tell(arm: str) -> None:
                if arm not in told:
                    told.add(arm)
                    self.say("", f"answering: {arm}")

            yield tell
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task("answers", total=total, completed=done)
            yield lambda arm: progress.update(task, advance=1, description=arm)
