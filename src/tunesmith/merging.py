"""A run's adapter folded into its base: a standard Hugging Face folder that transformers and vLLM load."""

from __future__ import annotations

from pathlib import Path

from tunesmith import adapters, models
from tunesmith.errors import RunError
from tunesmith.files import folder_atomic
from tunesmith.hub import resolve_model
from tunesmith.models.place import place
from tunesmith.run import Run
from tunesmith.tokenizer import Tokenizer


def merge_run(path: Path, out: Path, *, onto: str) -> Path:
    """Merge the run at `path` into a new folder `out`. `onto`: auto | nf4 (the dequantised base of a QLoRA run) | dense (the original weights)."""
    run = Run.open(path)
    config = run.config
    if config.method == "full":
        raise RunError(
            f"{path}: method full has no adapter to merge", f"its weights are a Hugging Face folder already: {run.model}"
        )
    if onto not in ("auto", "nf4", "dense"):
        raise RunError(f"--onto {onto}: is not known", "write auto, nf4 or dense")
    if out.exists() and any(out.iterdir()):
        raise RunError(f"{out}: is not empty", "name a new folder")
    where = place(config.memory)
    store = "nf4" if onto == "nf4" or (onto == "auto" and config.method == "qlora") else "dense"
    model = models.load(resolve_model(config.model).path, dtype=where.dtype, device=where.device, store=store)
    adapters.load(model, run.adapter)
    adapters.merge(model, dtype=where.dtype)
    with folder_atomic(out) as temp:
        models.save_checkpoint(model, temp)
        Tokenizer.load(run.tokenizer).save(temp)
    return out
