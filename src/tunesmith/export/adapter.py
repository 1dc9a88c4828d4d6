"""adapter: the PEFT folder as training wrote it, with the run's tokenizer and template and what ends an answer.

PEFT's AutoPeftModelForCausalLM loads it by the base that adapter_config.json names: the hub's name where the base came from there,
else its folder, which means nothing on another machine and may say more than is meant to be said there: an export that is to be
pushed names none, and its card says which base it needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tunesmith.adapters import storage
from tunesmith.export.source import Source


def write(source: Source, folder: Path, *, stays: bool = True) -> None:
    """`stays`: on this machine."""
    shutil.copyfile(source.run.adapter / storage.WEIGHTS, folder / storage.WEIGHTS)
    config = json.loads((source.run.adapter / storage.CONFIG).read_text("utf-8"))
    config["base_model_name_or_path"] = source.hub_name or (str(source.base.path.resolve()) if stays else None)
    (folder / storage.CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    source.write_words(folder)
