"""adapter: the PEFT folder as training wrote it, with the run's tokenizer and template and what ends an answer."""

from __future__ import annotations

import shutil
from pathlib import Path

from tunesmith.adapters import storage
from tunesmith.errors import RunError
from tunesmith.export.source import Source


def write(source: Source, folder: Path) -> None:
    """Raises RunError for a run that has no adapter."""
    if source.full:
        raise RunError(f"{source.run.path}: method full has no adapter", "export --to merged: its weights are whole already")
    for name in (storage.CONFIG, storage.WEIGHTS):
        shutil.copyfile(source.run.adapter / name, folder / name)
    source.write_words(folder)
