"""Checkpoints: tensors in safetensors, the rest in JSON, whole or absent, and the newest one that verifies wins.

    checkpoints/step-00000120/tensors.safetensors    weights that train, optimiser moments, RNG states as uint8
                              state.json             step, epoch, data position, schedule: JSON, floats exact
                              manifest.json          size and sha256 of both

No pickle anywhere. Only the holder of the run's lock may call `save` and `prune`; `newest_valid` and `load` change nothing on disk.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tunesmith.errors import RunError
from tunesmith.files import ensure_room, folder_atomic, former, make_folder, remove_folder, settle, verify, write_atomic, write_file

FORMAT = 1
TENSORS, STATE = "tensors.safetensors", "state.json"
NAME = re.compile(r"step-(\d{8,})")
RNG = "rng/"  # prefix of the RNG states among the tensors

DTYPES = {  # in the order in which safetensors lays them out: widest first, so that every tensor is aligned
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.uint32: "U32", torch.int32: "I32",
    torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16", torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint whose every byte was verified."""

    path: Path
    step: int


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Write `folder/step-XXXXXXXX`; it appears whole or not at all. A tensor leaves its device only while it is written.

    `state` may hold None, bool, int, float (nan and inf too), str, list, tuple (comes back as list) and dicts with text keys.
    Raises DoesNotFit with both numbers when the disk is too small, before anything is written.
    """
    assert "step" not in state or state["step"] == step, "the step is given once"
    make_folder(folder)
    settle(folder)
    text, needed = _state_text(step, state), bytes_needed(tensors, state)
    ensure_room(folder, needed, f"the checkpoint of step {step}")
    target = folder / f"step-{step:08d}"
    with folder_atomic(target, needed=needed) as temp:
        write_file(temp / TENSORS, _pieces(_header(tensors), tensors))
        write_file(temp / STATE, [text.encode()])
    return target


def newest_valid(folder: Path) -> tuple[Found | None, list[str]]:
    """The newest checkpoint whose manifest verifies, and what is wrong with each newer one (file and fault). Changes nothing."""
    candidates = {path: path.name for path in folder.iterdir() if NAME.fullmatch(path.name)} if folder.is_dir() else {}
    candidates |= {path: name for name, path in former(folder).items() if NAME.fullmatch(name)}
    problems: list[str] = []
    for path, name in sorted(candidates.items(), key=lambda item: _step(item[1]), reverse=True):
        step = _step(name)
        if not (wrong := verify(path) or _state_problems(path, step)):
            return Found(path, step), problems
        problems += wrong
    return None, problems


def load(source: Found | Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors on `device` and the state, with its `step`. A bare path is verified first; RunError names every damaged file."""
    path = source.path if isinstance(source, Found) else Path(source)
    if not isinstance(source, Found) and (problems := verify(path)):
        raise RunError("\n".join(problems), "take an older checkpoint: --resume finds the newest whole one by itself")
    try:
        with safe_open(path / TENSORS, framework="pt", device=str(device)) as f:
            names = list(f.keys())
            tensors = {name: f.get_tensor(name).clone() for name in names}  # clones: no view of a file that prune will remove
        return tensors, _decode(json.loads((path / STATE).read_bytes()))
    except (OSError, SafetensorError, ValueError) as e:
        raise RunError(
            f"{path}: cannot be read: {e}", "take an older checkpoint: --resume finds the newest whole one by itself"
        ) from e


def prune(folder: Path, keep: int) -> list[Path]:
    """Remove the checkpoints older than the newest `keep` whole ones. Returns what was removed.

    Nothing goes before the newest one was verified to the last byte (read back from the disk); the other `keep - 1` count when
    their files are there in full size. Damaged ones do not count, so the last valid one stays.
    """
    assert keep >= 2, "the last one may be damaged or in the middle of being written"
    whole, _ = newest_valid(folder)
    if whole is None:
        return []
    older = sorted(
        (p for p in folder.iterdir() if NAME.fullmatch(p.name) and _step(p.name) < whole.step), key=lambda p: -_step(p.name)
    )
    kept, removed = 1, []
    for path in sorted(older, key=lambda p: _step(p.name), reverse=True):
        if kept == keep:
            removed.insert(0, path)
        elif not verify(path, deep=False):
            kept += 1
    for path in removed:  # oldest first
        remove_folder(path)
    return removed


def bytes_needed(tensors: Mapping[str, Tensor], state: Mapping[str, Any] | None = None) -> int:
    """Bytes one checkpoint takes on disk: the tensors, their header, the state, the manifest."""
    header = len(_header(tensors)) if tensors else 16
    return header + _bytes(tensors) + len(_state_text(0, state or {})) + 1024


def preflight(kept: Mapping[Path, Mapping[str, Tensor]], keep: int) -> None:
    """Before the first step: DoesNotFit when the disk cannot hold `keep` checkpoints and the one being written. `kept`: what one of
    them holds, for each folder they are in.
    """
    needed = (keep + 1) * sum(bytes_needed(tensors) for tensors in kept.values())
    held = sum(f.stat().st_size for folder in kept if folder.is_dir() for f in folder.glob("*/*"))
    ensure_room(next(iter(kept)), max(0, needed - held), f"keeping {keep} checkpoints and writing the next")


def rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every generator's state: torch's as uint8 tensors (`rng/torch`, `rng/cuda/0`, `rng/mps`), Python's and numpy's as JSON."""
    tensors = {f"{RNG}torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        tensors |= {f"{RNG}cuda/{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    if torch.backends.mps.is_available():
        tensors[f"{RNG}mps"] = torch.mps.get_rng_state()
    kind, key, *rest = np.random.get_state()
    version, internal, gauss = random.getstate()
    return tensors, {"python": [version, list(internal), gauss], "numpy": [kind, key.tolist(), *rest]}


def restore_rng(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> list[str]:
    """Put every generator back. `tensors` may hold others beside the `rng/` ones. Returns a line for each device that is not here:
    a run that moves to another device goes on, but not bit for bit.
    """
    torch.set_rng_state(tensors[f"{RNG}torch"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, key, *rest = state["numpy"]
    np.random.set_state((kind, np.array(key, dtype=np.uint32), *rest))
    missing = []
    for name in sorted(n for n in tensors if n.startswith((f"{RNG}cuda/", f"{RNG}mps"))):
        device = name.removeprefix(RNG).replace("/", ":")
        if device == "mps" and torch.backends.mps.is_available():
            torch.mps.set_rng_state(tensors[name].cpu())
        elif device.startswith("cuda") and int(device.split(":")[1]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(tensors[name].cpu(), device)
        else:
            missing.append(f"the checkpoint was written with device {device}, which is not here: its random draws start afresh")
    return missing


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write or replace one safetensors file, atomically and durably, one tensor at a time (the library's holds all of them)."""
    header = _header(tensors, metadata)
    write_atomic(path, _pieces(header, tensors), needed=len(header) + _bytes(tensors))


def _pieces(header: bytes, tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    yield header
    for name in _order(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        if tensor.numel():
            yield tensor.reshape(-1).view(torch.uint8).numpy().data


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _order(tensors: Mapping[str, Tensor]) -> list[str]:
    for name, t in tensors.items():
        assert t.dtype in DTYPES, f"{name}: {t.dtype} has no place in safetensors"
    ranks = {dtype: rank for rank, dtype in enumerate(DTYPES)}
    return sorted(tensors, key=lambda n: (ranks[tensors[n].dtype], n))


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Length (uint64, little endian) and JSON, padded with spaces to 8 bytes: safetensors' format."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name in _order(tensors):
        t = tensors[name]
        end = at + t.numel() * t.element_size()
        entries[name] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _step(name: str) -> int:
    match = NAME.fullmatch(name)
    assert match, name
    return int(match[1])


def _state_text(step: int, state: Mapping[str, Any]) -> str:
    return json.dumps(_encode({**state, "format": FORMAT, "step": step}, "state"), allow_nan=False) + "\n"


def _state_problems(path: Path, step: int) -> list[str]:
    """Whole, but is it this step's, and in a form we read?"""
    try:
        state = json.loads((path / STATE).read_bytes())
    except (OSError, ValueError) as e:
        return [f"{path.name}/{STATE}: cannot be read: {e}"]
    if state.get("format") != FORMAT:
        return [f"{path.name}/{STATE}: format {state.get('format')}, this version reads {FORMAT}"]
    if state.get("step") != step:
        return [f"{path.name}/{STATE}: belongs to step {state.get('step')}, not to this folder"]
    return []


def _encode(value: Any, where: str) -> Any:
    """JSON that gives every value back: repr() keeps finite floats exact, nan and inf become {"$float": "nan"}."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": repr(float(value))}
    if isinstance(value, (list, tuple)):
        return [_encode(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, Mapping):
        assert all(isinstance(k, str) and k != "$float" for k in value), f"{where}: keys must be text"
        return {k: _encode(v, f"{where}.{k}") for k, v in value.items()}
    assert value is None or type(value) in (bool, int, float, str), f"{where}: {type(value).__name__} is no JSON value"
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(v) for v in value]
    if isinstance(value, dict):
        return float(value["$float"]) if set(value) == {"$float"} else {k: _decode(v) for k, v in value.items()}
    return value
