"""vllm: the merged folder, and how to serve it. vLLM and transformers load the same files."""

from __future__ import annotations

import shlex
from pathlib import Path

from tunesmith.export.source import Source
from tunesmith.spec import read_config

DTYPES = {"bfloat16": "bfloat16", "float16": "float16", "float32": "float32"}


def serve_line(source: Source, out: Path, folder: Path) -> str:
    """The command; `folder` is where the files lie now, `out` where they will."""
    config = read_config(folder)
    parts = ["vllm", "serve", str(out), "--served-model-name", source.name, "--dtype", config["torch_dtype"]]
    parts += ["--max-model-len", str(config["max_position_embeddings"]), "--generation-config", "auto"]
    return shlex.join(parts)


def adapter_line(source: Source, out: Path, rank: int) -> str:
    """The same for an adapter over its base."""
    base = source.base.name if source.base.revision else str(source.base.path)
    modules = f"{source.name}={out}"
    ranks = next((r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= rank), rank)
    return shlex.join(["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(ranks), "--lora-modules", modules])
