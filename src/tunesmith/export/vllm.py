"""vllm: the merged folder, and how to serve it. vLLM and transformers load the same files."""

from __future__ import annotations

import shlex
from pathlib import Path

from tunesmith.spec import read_config


def serve_options(name: str, folder: Path) -> str:
    """What follows `vllm serve FOLDER` for the model in `folder`."""
    config = read_config(folder)
    parts = ["--served-model-name", name, "--dtype", config["torch_dtype"]]
    if reach := config.get("max_position_embeddings") or config.get("n_positions"):  # gpt2's name for it
        parts += ["--max-model-len", str(reach)]
    return shlex.join([*parts, "--generation-config", "auto"])


def adapter_line(name: str, base: str, out: Path, rank: int) -> str:
    """The command that serves an adapter over its base, with the words and the ends of answers that it was trained with."""
    modules = f"{name}={out}"
    ranks = next((r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= rank), rank)
    words = ["--tokenizer", str(out), "--generation-config", str(out)]
    return shlex.join(["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(ranks), "--lora-modules", modules, *words])
