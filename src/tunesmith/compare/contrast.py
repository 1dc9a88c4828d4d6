"""What the house's style is told from: the base's answers to training questions, beside those that were written to them. No torch.

evaluate/adherence.py learns the difference. The questions are training rows, never held-out ones, and both answers belong to the
same question. Where there are too few such rows, no base, or answers that cannot be told apart, adherence is not measured, and a
note says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunesmith.compare import arms
from tunesmith.compare.arms import ARMS, Arm, Prompt, Question
from tunesmith.data.render import RowRefused
from tunesmith.evaluate.adherence import LEAST, LEAST_ROWS, Adherence, learn
from tunesmith.evaluate.metrics import Metric, Scored

NAME = "adherence"
ROWS = 128  # training rows that are asked, spread over all
ARM = Arm("base (training rows)", "base", ARMS["base"].order, "the base model, for the style's classifier")


@dataclass
class Contrast:
    """The training questions, what the base is asked and what it answers."""

    questions: list[Question]
    prompts: dict[str, list[Prompt]]
    max_tokens: int
    arms: list[Arm] = field(default_factory=lambda: [ARM])
    answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def choose(data: Any, held_out: Sequence[Question], fits: Callable[[Prompt], bool], max_tokens: int) -> Contrast | str:
    """Training rows to ask; or why there are none."""
    seen = {arms.same_question(q.shown) for q in held_out}
    every: list[Question] = []
    for row in arms.training_rows(data):
        asked = arms.question_of(len(every), row)
        if asked is None or any(m.role == "tool" for m in asked.before) or (key := arms.same_question(asked.shown)) in seen:
            continue
        seen.add(key)
        every.append(asked)
        if len(every) == arms.POOL:
            break
    questions, prompts = [], []
    for i in arms.spread(len(every), ROWS):
        prompt = arms.compose(ARM, every[i])
        try:
            if fits(prompt):
                questions.append(every[i])
                prompts.append(prompt)
        except RowRefused:
            continue
    if len(questions) < LEAST_ROWS:
        return f"{len(questions)} training rows ask something of their own, and a classifier needs {LEAST_ROWS}"
    return Contrast(questions, {ARM.name: prompts}, max_tokens)


def metric_of(contrast: Contrast, golds: Sequence[str]) -> tuple[Metric | None, dict[str, Any], str]:
    """(the metric, what is told of it, why there is none), once the base has answered."""
    heard = learn([q.gold for q in contrast.questions], [row["answer"] for row in contrast.answers[ARM.name]])
    others, damaged = ({"accuracy": h.accuracy, "interval": list(h.interval), "of": h.of} for h in (heard.others, heard.damaged))
    told = {
        "rows": len(contrast.questions), "others": others, "damaged": damaged, "written": float(heard.keeps(golds).mean()),
        "measured": heard.others.enough, "whole": heard.damaged.enough,
    }  # fmt: skip
    if not told["measured"]:
        right = f"{heard.others.accuracy:.0%} of cases (at least {heard.others.interval[0]:.0%})"
        return None, told, f"a classifier tells the training answers from the base's in {right}, and {LEAST:.0%} are needed"
    says = f"a classifier takes it for one of the training answers, not the base's{' or a piece of one' if told['whole'] else ''}"
    says += f"; right on {heard.others.accuracy:.1%} of unseen ones"
    return Metric(NAME, says, _score(heard), _any, binary=True, form=True), told, ""


def _any(golds: Sequence[str]) -> str:
    return ""


def _score(heard: Adherence) -> Callable[[Sequence[str], Sequence[str]], Scored]:
    return lambda answers, golds: Scored(heard.keeps(answers))
