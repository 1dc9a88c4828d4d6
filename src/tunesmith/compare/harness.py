"""A task of lm-evaluation-harness on a model of ours, by the task's own rules: one name of its list, or a task file of your own.

The package is an extra and is imported only when such a task is named. Prompts are as the task writes them, without a template.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.errors import DataError, MissingExtra, install

if TYPE_CHECKING:
    from tunesmith.chat import Talker

YAMLS = (".yaml", ".yml")
_NAME = re.compile(r"""^task:[ \t]*["']?([^\s"'#]+)""", re.MULTILINE)  # the file itself is read by the harness alone


def _package() -> Any:
    try:
        import lm_eval
    except ImportError:
        raise MissingExtra("--forgetting lm-eval:TASK needs lm-evaluation-harness", install("harness")) from None
    return lm_eval


def version() -> str:
    return str(getattr(_package(), "__version__", ""))


def known(task: str) -> int:
    """Raises MissingExtra without the package, DataError for a task that it does not know. (0: it counts its documents itself.)"""
    _manager(task)
    return 0


def _manager(task: str) -> tuple[Any, str]:
    """(its task manager, the task's name in it)."""
    _package()
    from lm_eval.tasks import TaskManager

    path = Path(task)
    if path.suffix in YAMLS:
        try:
            named = _NAME.search(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as fault:
            raise DataError(f"--forgetting lm-eval:{task}: no task file: {fault}", "name a YAML with the key `task`") from None
        if named is None:
            raise DataError(f"--forgetting lm-eval:{task}: no task file: it has no `task:`", "name a YAML with the key `task`")
        name = named[1]
        manager = TaskManager(include_path=str(path.parent.absolute()), include_defaults=False)
    else:
        name, manager = task, TaskManager()
    if name not in manager.all_tasks:
        raise DataError(f"--forgetting lm-eval:{task}: the harness has no such task", "lm-eval ls tasks names them; or name a YAML")
    return manager, name


def evaluate(talker: Talker, task: str, most: int) -> dict[str, dict[str, Any]]:
    """Metric -> {values: one a document, in the task's order, higher_is_better}; of at most `most` documents of each part."""
    lm_eval = _package()
    manager, name = _manager(task)
    quiet, before = logging.getLogger("lm_eval"), logging.getLogger("lm_eval").level
    quiet.setLevel(logging.ERROR)
    try:
        found = lm_eval.simple_evaluate(
            model=model_of(talker), tasks=[name], task_manager=manager, limit=most, bootstrap_iters=0, log_samples=True
        )
    except (OSError, ValueError, KeyError, ConnectionError) as fault:
        what = f"--forgetting lm-eval:{task}: the harness could not run it: {type(fault).__name__}: {fault}"
        raise DataError(what, "its data must be on this machine; run it once with lm-eval itself to see more") from None
    finally:
        quiet.setLevel(before)
    out: dict[str, dict[str, Any]] = {}
    for part, samples in sorted(found["samples"].items()):
        # one entry a filter of the task's; the first is the task's own
        first = samples[0].get("filter") if samples else None
        samples = sorted((s for s in samples if s.get("filter") == first), key=lambda s: s["doc_id"])
        for metric in samples[0].get("metrics", ()) if samples else ():
            values = [s.get(metric) for s in samples]
            if all(isinstance(v, (int, float, bool)) for v in values):
                title = metric if len(found["samples"]) == 1 else f"{part} {metric}"
                higher = found.get("higher_is_better", {}).get(part, {}).get(metric)
                out[title] = {"values": [float(v) for v in values], "higher_is_better": higher is not False}
    if not out:
        what = f"--forgetting lm-eval:{task}: none of its metrics has a number for each document"
        raise DataError(what, "name a task with such a metric (acc, exact_match ...)")
    return out


def model_of(talker: Talker) -> Any:
    """The harness's face of a model: how likely a continuation is, and what it would write."""
    import torch
    from lm_eval.api.model import LM

    from tunesmith.generate import generate
    from tunesmith.ops.attention import Layout

    model, tokenizer, limit = talker.model, talker.renderer.tokenizer, talker.context
    prefix = list(tokenizer.prefix_ids) or sorted(talker.renderer.stop_ids)[:1]  # something must stand before the first token

    @torch.no_grad()
    def likelihood(before: Sequence[int], after: Sequence[int]) -> tuple[float, bool]:
        """(log-probability in nats of `after` behind `before`, whether greedy decoding would write it)."""
        after = list(after)[-(limit - 1) :] if limit else list(after)
        if not after:
            return 0.0, True
        room = limit - len(after) if limit else len(before)
        ids = [*(list(before)[-room:] if room > 0 else []), *after]
        rows = torch.arange(len(ids) - len(after) - 1, len(ids) - 1, device=model.device)
        tokens = torch.tensor(ids, device=model.device)
        logits = model.logits(model.hidden(tokens, Layout.of([len(ids)], model.device), rows=rows)).float()
        picked = tokens[-len(after) :]
        sure = logits.log_softmax(-1).gather(-1, picked[:, None]).sum()
        return float(sure), bool((logits.argmax(-1) == picked).all())

    def split(context: str, continuation: str) -> tuple[list[int], list[int]]:
        """A blank at the context's end belongs to the continuation, as tokenizers have it."""
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        if not context:
            return prefix, tokenizer.encode(continuation)
        whole, head = tokenizer.encode(context + continuation), tokenizer.encode(context)
        return [*prefix, *head], whole[len(head) :]

    class Ours(LM):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [likelihood(*split(*r.args)) for r in requests]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return [self._rolling(r.args[0]) for r in requests]

        def _rolling(self, text: str) -> float:
            ids, window, total = tokenizer.encode(text), (limit or 1025) - 1, 0.0
            for start in range(0, len(ids), window):
                before = ids[start - 1 : start] if start else prefix
                total += likelihood(before[-1:], ids[start : start + window])[0]
            return total

        def generate_until(self, requests: list[Any]) -> list[str]:
            return [self._write(*r.args) for r in requests]

        def _write(self, context: str, told: dict[str, Any]) -> str:
            until = told.get("until") or []
            until = [until] if isinstance(until, str) else list(until)
            most = int(told.get("max_gen_toks", 256))
            ids = [*prefix, *tokenizer.encode(context)]
            if limit:
                most = min(most, limit // 2)
                ids = ids[-(limit - most) :]
            stop = sorted(talker.renderer.stop_ids)
            text = tokenizer.decode(generate(model, [ids], stop_ids=stop, max_tokens=most)[0], skip_special=True)
            for end in filter(None, until):
                text = text.split(end)[0]
            return text

    return Ours()
