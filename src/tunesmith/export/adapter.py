"""adapter: the PEFT folder as training wrote it, with the run's tokenizer and template and what ends an answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tunesmith.adapters import storage
from tunesmith.export.source import Source


def write(source: Source, folder: Path) -> None:
    shutil.copyfile(source.run.adapter / storage.WEIGHTS, folder / storage.WEIGHTS)
    config = json.loads((source.run.adapter / storage.CONFIG).read_text("utf-8"))
    if not source.hub_name:  # a folder of this machine is nothing to others, and what it is called is nobody's business
        config["base_model_name_or_path"] = None
    (folder / storage.CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    source.write_words(folder)
