"""Advice before training, each piece with its reason and where the reason comes from: one table of rules, at most three lines.

A rule speaks only where the settings are questionable for these rows; settings near what is usual get no line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from tunesmith.config.schema import RunConfig

MOST = 3  # lines: a person reads three
FEW = 50  # rows that a prompt or a look-up serves as well
SMALL = 1000  # rows that a wide adapter learns by heart
REPEATS = 4  # passes after which repeated rows bring little
FEW_STEPS = 10
WIDE_MODEL = 1024  # hidden width from which the papers' rates hold; smaller models want higher ones
DATED = 0.3  # share of answers that hold what changes
SAMPLE = 200  # answers looked at
GUIDE = "docs/hyperparameters.md"
RATES = {("full", True): (1e-6, 1e-4), ("full", False): (1e-5, 2e-3), ("lora", True): (2e-5, 2e-3), ("lora", False): (1e-4, 2e-2)}
SCALES = (0.25, 8.0)  # alpha / rank, or alpha / sqrt(rank)
DOCUMENTS = (".pdf", ".docx", ".md", ".html", ".htm")
CHANGES = re.compile(
    r"[$€£¥]\s?\d|\b\d+(?:[.,]\d+)?\s?(?:USD|EUR|GBP|dollars?|euros?)\b|\b(?:19|20)\d\d-\d\d-\d\d\b|\b\d{1,2}[:.]\d\d\s?(?:am|pm)\b"
    r"|\b(?:as of|currently|in stock|out of stock|opening hours|latest version|this (?:week|month|year))\b"
    r"|\b(?:January|February|March|April|June|July|August|September|October|November|December) \d{1,2}\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Job:
    """What the rules look at. None: not known yet, and a rule that needs it is silent."""

    config: RunConfig
    rows: int | None = None  # examples to train on in an epoch
    width: int | None = None  # of the model
    answers: tuple[str, ...] = ()

    @property
    def adapter(self) -> bool:
        """Whether rank and alpha are this run's to choose."""
        return self.config.method != "full" and self.config.lora.continue_from == "none"

    @property
    def epochs(self) -> float:
        train = self.config.train
        if train.max_steps and self.rows:
            return train.max_steps * train.batch_size / self.rows
        return 0.0 if train.max_steps else train.epochs


@dataclass(frozen=True)
class Advice:
    """`key` is what to look at; `why` names the reason, `source` where it was shown."""

    key: str
    what: str
    why: str
    source: str

    def __str__(self) -> str:
        return f"{self.what}: {self.why} ({self.source})"


def advise(job: Job) -> list[Advice]:
    """What is questionable, the gravest first, at most MOST."""
    found = (rule(job) for rule in RULES)
    return [advice for advice in found if advice][:MOST]


def answers_of(conversations: Iterable) -> tuple[str, ...]:
    """What the assistant says in the first SAMPLE conversations (types.Conversation)."""

    def said() -> Iterator[str]:
        for conversation, _ in zip(conversations, range(SAMPLE), strict=False):
            yield from (m.content for m in conversation.messages if m.role in ("assistant", "completion"))

    return tuple(said())


# ---- the rules, the gravest first ------------------------------------------------------------------------------------------------


def _few_rows(job: Job) -> Advice | None:
    if job.rows is None or job.rows >= FEW:
        return None
    return Advice(
        "data.train",
        f"{job.rows} {'row' if job.rows == 1 else 'rows'} to train on",
        "so few are mostly learned by heart; first try a prompt that shows the best of them as examples",
        "Brown et al. 2020, arXiv 2005.14165; a thousand careful rows did well in Zhou et al. 2023, arXiv 2305.11206",
    )


def _changing_facts(job: Job) -> Advice | None:
    sources = [s.path for s in job.config.data.train if s.path.lower().endswith(DOCUMENTS)]
    hits = sum(bool(CHANGES.search(answer)) for answer in job.answers)
    if len(job.answers) >= 10 and hits >= DATED * len(job.answers):
        what = f"{hits} of {len(job.answers)} answers looked at hold prices, dates or what else changes"
    elif sources:
        what = f"{sources[0]} is a document, learned as text"
    else:
        return None
    why = "tuning teaches how to answer, and new facts slowly and with mistakes; put facts into the prompt by retrieval"
    return Advice("data.train", what, why, "Ovadia et al. 2023, arXiv 2312.05934; Gekhman et al. 2024, arXiv 2405.05904")


def _rate(job: Job) -> Advice | None:
    config = job.config
    if job.width is None:
        return None
    low, high = RATES["full" if config.method == "full" else "lora", job.width >= WIDE_MODEL]
    rate = config.train.rate(config.method)
    if low <= rate <= high:
        return None
    side = "likely to jump or diverge" if rate > high else "likely to end before it has learned"
    return Advice(
        "train.learning_rate",
        f"train.learning_rate: {rate:g} is outside {low:g} to {high:g}, usual for {config.method} on a model of this width",
        f"{side}; an adapter wants about ten times the rate of full",
        f"Schulman et al. 2025, LoRA Without Regret; our sweep in {GUIDE}",
    )


def _repeats(job: Job) -> Advice | None:
    if job.epochs <= REPEATS or job.config.eval.early_stop or (job.rows or 0) < FEW:
        return None
    kept = job.config.eval.keep_best and job.config.data.held_out != 0
    end = "the run ends with its best weights, but eval.early_stop: 3 saves the time" if kept else "the last weights are kept"
    return Advice(
        "train.epochs",
        f"each row is read {job.epochs:g} times",
        f"beyond {REPEATS} passes repeats bring little and rows are learned by heart; {end}",
        f"Muennighoff et al. 2023, arXiv 2305.16264; our sweep in {GUIDE}",
    )


def _few_steps(job: Job) -> Advice | None:
    train = job.config.train
    if job.rows is None or job.rows < FEW or train.max_steps or (steps := train.steps(job.rows)) >= FEW_STEPS:
        return None
    return Advice(
        "train.batch_size",
        f"the run has {steps} {'step' if steps == 1 else 'steps'}",
        f"too few to learn from; train.batch_size: {max(1, train.batch_size // 4)} takes more of them over the same rows",
        f"Schulman et al. 2025: adapters bear large batches badly; our sweep in {GUIDE}",
    )


def _wide_adapter(job: Job) -> Advice | None:
    rank = job.config.lora.rank
    if not job.adapter or job.rows is None or not FEW <= job.rows < SMALL or rank <= 64:
        return None
    return Advice(
        "lora.rank",
        f"lora.rank: {rank} for {job.rows:,} rows",
        "costs memory and time; a small set is held by rank 8 to 32 as well",
        f"Hu et al. 2021, arXiv 2106.09685, section 7.2; our sweep in {GUIDE}",
    )


def _narrow_adapter(job: Job) -> Advice | None:
    rank = job.config.lora.rank
    if not job.adapter or job.rows is None or job.rows < 20_000 or rank > 8:
        return None
    return Advice(
        "lora.rank",
        f"lora.rank: {rank} for {job.rows:,} rows",
        "a narrow adapter holds less than so many rows say, and its loss levels off; 32 to 128 keeps up",
        "Biderman et al. 2024, arXiv 2405.09673; Schulman et al. 2025, LoRA Without Regret",
    )


def _scale(job: Job) -> Advice | None:
    lora = job.config.lora
    if not job.adapter:
        return None
    scale = lora.alpha / (lora.rank**0.5 if lora.variant == "rslora" else lora.rank)
    if SCALES[0] <= scale <= SCALES[1]:
        return None
    by = "alpha / sqrt(rank)" if lora.variant == "rslora" else "alpha / rank"
    return Advice(
        "lora.alpha",
        f"{by} is {scale:.3g}",
        f"the update is scaled by it, so it acts like a {'higher' if scale > 1 else 'lower'} learning rate; 1 or 2 is usual",
        f"Hu et al. 2021, arXiv 2106.09685; for rslora Kalajdzievski 2023, arXiv 2312.03732; our sweep in {GUIDE}",
    )


def _attention_alone(job: Job) -> Advice | None:
    targets = job.config.lora.targets
    attention = {"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"}
    if not job.adapter or targets == "all-linear" or not set(targets) <= attention or (job.rows or 0) < FEW:
        return None
    return Advice(
        "lora.targets",
        f"lora.targets: {', '.join(targets)} leaves the MLPs as they are",
        "attention alone learns less than all linears, even at a higher rank",
        f"Dettmers et al. 2023, arXiv 2305.14314; Schulman et al. 2025; our sweep in {GUIDE}",
    )


RULES: tuple[Callable[[Job], Advice | None], ...] = (
    _few_rows, _changing_facts, _rate, _repeats, _few_steps, _scale, _wide_adapter, _narrow_adapter, _attention_alone,
)  # fmt: skip
