"""vllm: the merged folder, and how to serve it or an adapter over its base. vLLM and transformers load the same files."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.spec import read_config

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be


def serve_options(name: str, folder: Path) -> str:
    """What follows `vllm serve FOLDER` for the model in `folder`."""
    config = read_config(folder)
    parts = ["--served-model-name", name, "--dtype", config["torch_dtype"]]
    if reach := config.get("max_position_embeddings") or config.get("n_positions"):  # gpt2's name for it
        parts += ["--max-model-len", str(reach)]
    return shlex.join([*parts, "--generation-config", "auto"])


def adapter_line(name: str, base: str, out: Path, adapter: Mapping[str, Any], dtype: str) -> str:
    """The command that serves an adapter over its base. `adapter` is its adapter_config.json.

    Tokenizer, template and what ends an answer are those beside the adapter: vLLM would take the base's. Without --dtype it
    makes bfloat16 of a base in float32.
    """
    words = ["--tokenizer", str(out), "--generation-config", str(out), "--dtype", dtype]
    lora = ["--enable-lora", "--max-lora-rank", str(max_lora_rank(adapter)), "--lora-modules", f"{name}={out}"]
    return shlex.join(["vllm", "serve", base, *words, *lora])


def max_lora_rank(adapter: Mapping[str, Any]) -> int:
    """The smallest of RANKS that holds the adapter. Raises StopIteration where none does: `adapter_refusals` says so before."""
    return next(rank for rank in RANKS if rank >= _widest(adapter))


def adapter_refusals(adapter: Mapping[str, Any]) -> list[str]:
    """Why vLLM 0.32 cannot serve this adapter over its base; folded into the weights it can serve each of them."""
    faults = []
    if adapter.get("use_dora"):
        faults.append("DoRA")
    if adapter.get("modules_to_save"):
        faults.append(f"whole modules ({', '.join(adapter['modules_to_save'])})")
    if adapter.get("trainable_token_indices"):
        faults.append("trained tokens")
    if _widest(adapter) > RANKS[-1]:
        faults.append(f"rank {_widest(adapter)}, over {RANKS[-1]}")
    return faults


def _widest(adapter: Mapping[str, Any]) -> int:
    return max([adapter["r"], *(adapter.get("rank_pattern") or {}).values()])
