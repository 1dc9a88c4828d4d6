"""vllm: the merged folder, and how to serve it. vLLM and transformers load the same files."""

from __future__ import annotations

import shlex
from pathlib import Path

from tunesmith.spec import read_config


def serve_options(name: str, folder: Path) -> str:
    """What follows `vllm serve FOLDER` for the model in `folder`."""
    config = read_config(folder)
    parts = ["--served-model-name", name, "--dtype", config["torch_dtype"]]
    parts += ["--max-model-len", str(config["max_position_embeddings"]), "--generation-config", "auto"]
    return shlex.join(parts)


def adapter_line(name: str, base: str, out: Path, rank: int) -> str:
    """The command that serves an adapter over its base."""
    modules = f"{name}={out}"
    ranks = next((r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= rank), rank)
    return shlex.join(["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(ranks), "--lora-modules", modules])
