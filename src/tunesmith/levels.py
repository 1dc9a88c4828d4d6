"""What a layer may keep for its backward: the one table, read by the layers (ops/half_blocks.py) and by the plan. No torch."""

from __future__ import annotations

Level = str
WHOLE = 1 << 30  # tokens of a tile of an MLP half: all at once

# Names of what is kept; all else is made again. `low_*` are A x of a group, 2 bytes a rank and token; `rstd_*` 4 bytes a row.
SAVED: dict[Level, tuple[str, ...]] = {
    "keep": ("x", "rstd_1", "q", "k", "v", "out", "lse", "low_qkv", "low_o", "mid", "rstd_2", "gate_up", "low_gate_up", "low_down"),
    "int8": ("x", "rstd_1", "q", "k", "v", "out", "lse", "low_qkv", "low_o", "mid", "rstd_2", "codes", "scales", "low_gate_up",
             "low_down"),
    "recompute": ("x", "rstd_1", "q", "k", "v", "out", "lse", "low_qkv", "low_o", "mid", "low_down"),
    "attention": ("x", "out", "lse", "low_down"),
    "checkpoint": ("x", "low_down"),
}  # fmt: skip
RECORDED = 16384  # tokens of a pass up to which it is recorded as a CUDA graph; beyond, launches are under 2 % of it
