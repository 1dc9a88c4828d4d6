"""Tunesmith: fine-tune an open language model on your own data, on one GPU or a laptop, with proof that it helped.

import tunesmith
tunesmith.check("run.yaml").print()
run = tunesmith.train("run.yaml", "train.epochs=1")

Every verb of the command line is a function here. It is found in tunesmith.api when it is first used, so that `import tunesmith`
imports nothing else.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunesmith.api import (
        chat,
        check,
        compare,
        doctor,
        explain,
        export,
        generate,
        guard,
        init,
        merge,
        plan,
        prepare,
        report,
        serve,
        stream,
        sweep,
        train,
    )


def _others() -> float:
    """Programs beside this one that want a core: now, where Linux says so, else on the last minute's average."""
    try:
        with open("/proc/loadavg") as f:
            return int(f.read().split()[3].partition("/")[0]) - 1
    except (OSError, ValueError, IndexError):
        return os.getloadavg()[0] if hasattr(os, "getloadavg") else float("inf")


# Before torch brings OpenMP in: where other programs want the cores, its threads wait asleep, not spinning. A step of the demo on
# two cores that others used took 3.3 s with spinning threads and 0.6 s with sleeping ones. On idle cores a short spin before the
# sleep makes 2,290 tokens a second of 1,430 (and 960 where both cores get busy later). The average of a minute is no guide: a demo
# after other work had ended slept, and took four minutes in place of two and a half.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if _others() < (os.cpu_count() or 1):
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

__all__ = [
    "chat",
    "check",
    "compare",
    "doctor",
    "explain",
    "export",
    "generate",
    "guard",
    "init",
    "merge",
    "plan",
    "prepare",
    "report",
    "serve",
    "stream",
    "sweep",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("tunesmith.api"), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("tunesmith")
    raise AttributeError(f"module 'tunesmith' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


class _Verbs(ModuleType):
    """Some rooms bear a verb's name (plan.py, train/). Importing one would set it as an attribute here, over the function, and the
    second `tunesmith.plan(...)` of a notebook would call a module. The verb stays; a room's names are imported from it
    (`from tunesmith.plan import make_plan`)."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Verbs
