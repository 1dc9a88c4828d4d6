"""A run's adapter folded into its base: a standard Hugging Face folder that transformers and vLLM load."""

from __future__ import annotations

from pathlib import Path

from tunesmith import adapters, models
from tunesmith.errors import RunError
from tunesmith.files import folder_atomic
from tunesmith.hub import resolve_model
from tunesmith.models.place import place
from tunesmith.run import Run, base_fingerprint
from tunesmith.tokenizer import Tokenizer

STORES = ("auto", "nf4", "dense")


def merge_run(path: Path, out: Path, *, onto: str) -> Path:
    """Merge the run at `path` into a new folder `out`.

    `onto`: nf4, the dequantised 4-bit base that a QLoRA run was trained over; dense, the original weights; auto, what was trained
    over. Raises RunError for a run without an adapter, a base that is another than it was, or an `out` that holds something.
    """
    run = Run.open(path)
    config, state = run.config, run.status().state
    if config.method == "full":
        raise RunError(
            f"{path}: method full has no adapter to merge", f"its weights are a Hugging Face folder already: {run.model}"
        )
    if not (run.adapter / "adapter_config.json").is_file():
        raise RunError(f"{path}: this run has no adapter yet, its state is {state}", "finish it: tunesmith train RUN.yaml --resume")
    if onto not in STORES:
        raise RunError(f"--onto {onto}: is not known", f"write {', '.join(STORES)}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise RunError(f"{out}: is {'not empty' if out.is_dir() else 'a file'}", "name a new folder")
    base = resolve_model(config.model)
    if run.manifest.get("base") not in (None, base_fingerprint(base.path)):
        raise RunError(
            f"{base.path}: is not the base this run was trained on: its files have changed since", "put the former files back"
        )
    where = place(config.memory)
    store = "nf4" if onto == "nf4" or (onto == "auto" and config.method == "qlora") else "dense"
    model = models.load(base.path, dtype=where.dtype, device=where.device, store=store)
    adapters.load(model, run.adapter)
    adapters.merge(model, dtype=where.dtype)
    with folder_atomic(out) as temp:
        models.save_checkpoint(model, temp)
        Tokenizer.load(run.tokenizer).save(temp)
    return out
