"""One tree of errors, each with what is wrong and its fix.

    TunesmithError            exit 2: the user can mend it; printed as `error:` and `fix:`, never a traceback
    ├── ConfigError           the run file: unknown key, wrong type, contradiction
    ├── DataError             rows, files, encodings, nothing to train
    │   └── TemplateError     a chat template that cannot be rendered or trusted
    ├── ModelError            a checkpoint that is damaged, incomplete, unsafe or unknown
    │   └── AdapterError      adapter files, targets, shapes
    ├── DoesNotFit            memory or disk
    ├── MissingExtra          an optional dependency
    ├── RunError              a run folder: locked, damaged, changed since
    ├── ExportRefused         exit 1: an export that is not what was trained
    ├── ExportFailed          exit 1: some of several formats
    └── TrainingFailed        exit 1: training ran and must not be called a success
    Interrupted               exit 130: saved and stopped on request

Anything else that escapes is a bug of ours and keeps its traceback.
"""

from __future__ import annotations


class TunesmithError(Exception):
    """What is wrong, and the fix. `what` may hold several lines, one fault each."""

    exit_code = 2

    def __init__(self, what: str, fix: str = ""):
        super().__init__(what if not fix else f"{what}\nfix: {fix}")
        self.what, self.fix = what, fix

    def __reduce__(self):  # survives a process pool
        return type(self), (self.what, self.fix)


class ConfigError(TunesmithError): ...


class DataError(TunesmithError): ...


class TemplateError(DataError): ...


class ModelError(TunesmithError): ...


class AdapterError(ModelError): ...


class DoesNotFit(TunesmithError): ...


class MissingExtra(TunesmithError): ...


def install(extra: str) -> str:
    """The command that installs an optional dependency, as a fix: from the checkout, since no package index has Tunesmith yet."""
    return f'in the Tunesmith checkout: pip install -c constraints.txt -e ".[{extra}]"'


class RunError(TunesmithError): ...


class ExportRefused(TunesmithError):
    """An export that is not what was trained."""

    exit_code = 1


class ExportFailed(TunesmithError):
    """Some of several formats could not be written; the others were tried."""

    exit_code = 1


class TrainingFailed(TunesmithError):
    exit_code = 1


class Interrupted(TunesmithError):
    exit_code = 130
