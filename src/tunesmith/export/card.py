"""README.md of an export, the model card: what it is made of, what it was measured at, how it is loaded. No path of a machine."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from tunesmith.export.parity import Parity
from tunesmith.export.source import Source
from tunesmith.redact import redact

LOADED = {
    "adapter": "peft",
    "merged": "transformers",
    "vllm": "transformers",
    "gguf": "gguf",
    "ollama": "gguf",
    "gguf-lora": "gguf",
}
RULE = "---"


def card(source: Source, to: str, parity: Parity, hints: list[str], licence: dict[str, str]) -> str:
    """The whole text. `hints` are lines that say how to load it."""
    run, manifest = source.run, source.run.manifest
    base = source.hub_name
    shown = base or Path(run.config.model).name
    front = {
        "library_name": LOADED[to],
        "pipeline_tag": "text-generation",
        **({"base_model": base} if base else {}),
        **licence,
        "tags": list(dict.fromkeys(["tunesmith", run.config.method, *(["lora"] if not source.full else [])])),
    }
    lines = [RULE, yaml.safe_dump(front, sort_keys=False).rstrip(), RULE, "", f"# {source.name}", ""]
    lines += [f"Tuned from **{shown}** with Tunesmith {manifest['versions'].get('tunesmith', '')}.".replace(" .", "."), ""]
    lines += ["| | |", "|---|---|", f"| Base | {shown} |", f"| Base revision | {manifest.get('base_revision') or 'none'} |"]
    lines += [
        f"| Base fingerprint | `{manifest.get('base') or 'unknown'}` |",
        f"| Data fingerprint | `{manifest.get('data') or 'unknown'}` |",
    ]
    lines += [f"| Method | {run.config.method}, seed {run.config.seed}, {manifest.get('steps', 'an unknown number of')} steps |"]
    named = " ".join(dict.fromkeys(licence.values())) or "unknown: the licence of the base model and of the data applies"
    lines += [f"| Licence | {named} |", ""]
    if losses := _losses(run.path):
        lines += ["## Before and after", "", f"Loss on held-out rows: {losses[0]:.4f} before, {losses[1]:.4f} after.", ""]
    lines += [
        "## Is this file what was trained?",
        "",
        f"**{parity.state}**" + (f": {'; '.join(parity.reasons)}" if parity.reasons else ""),
        "",
    ]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in parity.lines()), ""]
    if parity.notes:
        lines += [*(f"- {note}" for note in parity.notes), ""]
    if hints:
        lines += ["## How to load it", "", "```sh", *hints, "```", ""]
    if to == "adapter" and not base:
        lines += [
            f"Its base, **{shown}**, came from a folder and is on no hub; `tunesmith.run.base_fingerprint(FOLDER)` gives the "
            "fingerprint above for the same one. Elsewhere `AutoPeftModelForCausalLM` cannot find it: load the base, then "
            "`PeftModel.from_pretrained(base, ADAPTER)`.",
            "",
        ]
    return redact("\n".join(lines))


def _losses(run: Path) -> tuple[float, float] | None:
    try:
        loss = json.loads((run / "comparison.json").read_text("utf-8"))["loss"]
        return float(loss["before"]), float(loss["after"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
