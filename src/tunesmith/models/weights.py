"""Weights between safetensors files and a Decoder, one tensor at a time; nothing is unpickled and no state dict is ever held.

The headers are read and checked by hand before anything is allocated, and all faults are listed at once. A tensor's bytes are read
straight into the tensor that is handed to the model: a load needs at most one tensor beyond the model (on a GPU two, and 256 MiB
of main memory: models/reading.py).

The file format (safetensors): 8 bytes little-endian length n, n bytes of JSON {name: {dtype, shape, data_offsets}}, then the data.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from tunesmith.errors import ModelError
from tunesmith.files import fsync_folder, room, write_file
from tunesmith.models.decoder import Decoder
from tunesmith.models.linear import Linear, NF4Linear
from tunesmith.models.reading import to_device
from tunesmith.spec import Spec, checkpoint_quantization, read_config, spec_of, tensor_shapes

Progress = Callable[[int, int], None]  # bytes read, bytes in all
Shapes = Mapping[str, tuple[int, ...]]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
SHARD_BYTES = 5 * 2**30  # a shard's size where it is not given, as transformers writes them
SHOWN = 12  # faults listed before the rest is counted

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8, "BOOL": 1,
         "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")

# buffers that older versions of transformers wrote and that follow from the config
IGNORED = re.compile(r"(model\.layers\.\d+\.self_attn\.|model\.)rotary_emb\.inv_freq")
QUANTISED = re.compile(r"(?P<linear>.+)\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)")
MARK = ".weight.quant_state.bitsandbytes__nf4"


@dataclass(frozen=True, slots=True)
class Stored:
    """Where one tensor lies."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # byte in the file
    end: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start

    def read(self, file: BinaryIO, scratch: Tensor | None = None) -> Tensor:
        """The tensor on the CPU in its stored dtype; its bytes are read once, into it or into `scratch` (uint8)."""
        raw = torch.empty(self.size, dtype=torch.uint8) if scratch is None else scratch[: self.size]
        if self.size:
            file.seek(self.start)
            if file.readinto(memoryview(raw.numpy())) != self.size:
                raise ModelError(f"{self.file}: ended while it was being read", "download the checkpoint again")
        return raw.view(DTYPES[self.dtype]).view(self.shape)


# ------------------------------------------------------------------ headers
def read_header(path: Path) -> tuple[dict[str, Stored], list[str]]:
    """The tensors of one safetensors file, and what is wrong with it; reads only the header."""
    where, broken = path.name, "download it again"
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > min(size - 8, LONGEST_HEADER):
                return {}, [f"{where}: {size:,} bytes, truncated in its header or no safetensors file; {broken}"]
            raw = json.loads(file.read(length))
    except FileNotFoundError:
        return {}, [f"{where}: missing"]
    except OSError as e:
        return {}, [f"{where}: cannot be read: {e.strerror}"]
    except (ValueError, RecursionError):
        return {}, [f"{where}: its header is damaged; {broken}"]
    if not isinstance(raw, dict):
        return {}, [f"{where}: its header is damaged; {broken}"]
    found: dict[str, Stored] = {}
    faults: list[str] = []
    for name, entry in raw.items():
        if name == "__metadata__":
            continue
        stored = _entry(path, entry, 8 + length)
        if stored is None:
            faults.append(f"{where}: the entry of {name} is damaged; {broken}")
        else:
            found[name] = stored
    end = 8 + length
    for name, stored in sorted(found.items(), key=lambda item: item[1].start):
        if stored.start != end:
            faults.append(f"{where}: {name} does not begin where the tensor before it ends; {broken}")
        end = stored.end
    if not faults and size != end:
        how = "truncated" if size < end else "too long"
        faults.append(f"{where}: {how}, {size:,} bytes where its header says {end:,}; {broken}")
    return found, faults


def _entry(path: Path, entry: Any, base: int) -> Stored | None:
    """One header entry, None where its dtype, shape and offsets do not agree."""
    if not isinstance(entry, dict):
        return None
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")

    def whole(values: Any) -> bool:
        return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)

    if not isinstance(dtype, str) or not whole(shape) or not whole(offsets) or len(offsets) != 2:
        return None
    if dtype in BYTES and math.prod(shape) * BYTES[dtype] != offsets[1] - offsets[0]:
        return None
    return Stored(path, dtype, tuple(shape), base + offsets[0], base + offsets[1])


def find_tensors(folder: Path) -> tuple[dict[str, Stored], list[str]]:
    """Every tensor of a checkpoint folder, sharded or single, and all that is wrong with its files."""
    if (folder / INDEX).is_file():
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            shard_of = index["weight_map"]
            if not all(isinstance(v, str) and re.fullmatch(r"[\w.\-]+\.safetensors", v) for v in shard_of.values()):
                raise ValueError("a weight_map entry names no safetensors file of this folder")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            return {}, [f"{INDEX}: damaged ({e}); download it again"]
        tensors: dict[str, Stored] = {}
        faults: list[str] = []
        for shard in sorted(set(shard_of.values())):
            found, wrong = read_header(folder / shard)
            faults += wrong
            for name, stored in found.items():
                if name in tensors:
                    faults.append(f"{name}: in {tensors[name].file.name} and in {shard}")
                tensors[name] = stored
            if not wrong:
                lost = [name for name, s in shard_of.items() if s == shard and name not in found]
                faults += [f"{name}: not in {shard}, where {INDEX} says it is" for name in lost]
        return tensors, faults
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    if shards := sorted(folder.glob("model-*-of-*.safetensors")):
        return {}, [f"{INDEX}: missing, beside {len(shards)} shards"]
    if list(folder.glob("*.bin")) or list(folder.glob("*.pth")) or list(folder.glob("*.pt")):
        raise ModelError(
            f"{folder}: holds its weights only as pickled files (.bin), which can run code when opened; they are never opened here",
            "convert it once, in an environment you trust, with transformers: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW, safe_serialization=True)",
        )
    return {}, [f"{SINGLE}: missing"]


# ------------------------------------------------------------------ checking
def check(spec: Spec, stored: Mapping[str, Stored], *, quantised: bool = False) -> tuple[dict[str, str], list[str]]:
    """(model name -> file name for each tensor the model needs, all faults). Quantised linears are checked by their packed size."""
    need = tensor_shapes(spec)
    source = {name: name for name in need}
    if spec.tied and "model.embed_tokens.weight" not in stored and "lm_head.weight" in stored:
        source["model.embed_tokens.weight"] = "lm_head.weight"  # one tensor under its other name
    faults: list[str] = []
    packed = {name.removesuffix(MARK) for name in stored if name.endswith(MARK)}
    for name, shape in need.items():
        found = stored.get(source[name])
        if found is None:
            faults.append(f"{source[name]}: missing")
        elif name.removesuffix(".weight") in packed:
            if found.dtype != "U8" or math.prod(found.shape) != -(-math.prod(shape) // 2):
                faults.append(f"{name}: {found.dtype} {list(found.shape)} where {-(-math.prod(shape) // 2):,} bytes of nf4 belong")
        else:
            if found.shape != shape:
                faults.append(f"{name}: shape {list(found.shape)} where config.json asks for {list(shape)}")
            if found.dtype not in FLOATS:
                faults.append(f"{name}: stored as {found.dtype}; {', '.join(FLOATS)} are read")
    extra = set(stored) - set(source.values())
    if quantised:
        extra -= {n for n in extra if (m := QUANTISED.fullmatch(n)) and m["linear"] in packed}
    extra -= {n for n in extra if IGNORED.fullmatch(n) or (spec.tied and n == "lm_head.weight")}
    if extra and set(need) <= {f"model.{n}" for n in stored} | {"lm_head.weight"}:
        faults.append("every name lacks its 'model.' prefix: a bare trunk; save it as a causal language model with transformers")
    faults += [f"{name}: not part of a model with this config.json" for name in sorted(extra)]
    return source, faults


def listed(folder: Path, faults: list[str]) -> str:
    shown = faults[:SHOWN] + ([f"... and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else [])
    return "\n  ".join([f"{folder}: {len(faults)} fault{'s' if len(faults) > 1 else ''} in its weights", *shown])


# ------------------------------------------------------------------ loading
def load(folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
         linear: type[nn.Module] = Linear, progress: Progress | None = None) -> Decoder:  # fmt: skip
    """A native checkpoint as a Decoder on `device` in `dtype`.

    `linear` is the class of the layers' linears, called as `linear(in, out, bias, dtype=, device=)`: Linear (dense) or NF4Linear,
    which quantises each weight as it comes in and takes bitsandbytes' own NF4 weights as they are. Raises ModelError with
    every fault of the files at once, before anything is allocated.
    """
    folder = Path(folder)
    config = read_config(folder)
    spec = spec_of(config)
    stored, faults = find_tensors(folder)
    quantised = checkpoint_quantization(config) is not None
    if not faults:
        source, faults = check(spec, stored, quantised=quantised)
    if faults:
        raise ModelError(listed(folder, faults), "download the checkpoint again, or use the config.json of these weights")
    model = Decoder(spec, linear=partial(_place, linear, dtype=dtype), config=config, dtype=dtype, device="meta")
    total, done = sum(stored[name].size for name in set(source.values())), 0
    device, scratch = torch.device(device), torch.empty(0, dtype=torch.uint8)  # one buffer for all that is cast or moved: freeing
    largest = max(stored[name].size for name in source.values())  # many of different sizes leaves holes in the heap
    modules = dict(model.named_modules())
    in_file_order = [name for *_, name in sorted((stored[there].file, stored[there].start, name) for name, there in source.items())]
    packed = {name for name in in_file_order if name.removesuffix(".weight") + MARK in stored}
    spans = [(at.file, at.start, at.end) for name in in_file_order if name not in packed and (at := stored[source[name]])]
    streams = device.type == "cuda" and hasattr(os, "preadv")
    with Files() as files, contextlib.closing(to_device(spans, device)) as stream:
        for name in in_file_order:
            at = stored[source[name]]
            path, _, leaf = name.rpartition(".")
            module = modules[path]
            if name in packed:
                group = {n.removeprefix(f"{path}."): s for n, s in stored.items() if n.startswith(f"{path}.weight")}
                _take_quantised(module, {n: s.read(files(s.file)).to(device) for n, s in group.items()}, dtype)
            else:
                if streams:
                    tensor = next(stream).view(DTYPES[at.dtype]).view(at.shape).to(dtype)
                else:
                    copied = DTYPES[at.dtype] != dtype or device.type != "cpu"
                    if copied and not len(scratch):
                        scratch = torch.empty(largest, dtype=torch.uint8)
                    tensor = at.read(files(at.file), scratch if copied else None).to(device=device, dtype=dtype)
                if hasattr(module, "set_weight"):
                    module.set_weight(leaf, tensor)
                else:
                    setattr(module, leaf, nn.Parameter(tensor))
            done += at.size
            if progress:
                progress(done, total)
        if spec.tied and {"model.embed_tokens.weight", "lm_head.weight"} <= set(stored):
            _check_tied(folder, stored, files)
    model.tie()
    left = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    assert not left, f"left without a value: {left}"
    return model


def _place(linear: type[nn.Module], i: int, o: int, bias: bool, dtype: torch.dtype) -> nn.Module:
    return linear(i, o, bias, dtype=dtype, device="meta")


def _take_quantised(module: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """bitsandbytes' NF4 into an NF4 store as it is, or decoded into a dense one."""
    if hasattr(module, "set_quantised"):
        return module.set_quantised(tensors)
    store = NF4Linear(module.in_features, module.out_features, dtype=dtype, device="meta")
    store.set_quantised(tensors)
    module.set_weight("weight", store.dequantize(dtype))


def _check_tied(folder: Path, stored: Mapping[str, Stored], files: Files) -> None:
    """A tied checkpoint that holds both names must hold one matrix, else one of the two would be dropped in silence."""
    a, b = stored["model.embed_tokens.weight"], stored["lm_head.weight"]
    if (a.shape, a.dtype) != (b.shape, b.dtype) or not torch.equal(a.read(files(a.file)), b.read(files(b.file))):
        fix = "set tie_word_embeddings to false in its config.json if the head is meant to be its own"
        raise ModelError(f"{folder}: config.json ties the head to the embedding, but the files hold two different matrices", fix)


class Files:
    """Open files, one handle each."""

    def __enter__(self) -> Files:
        self.stack, self.open = contextlib.ExitStack(), {}
        return self

    def __call__(self, path: Path) -> BinaryIO:
        if path not in self.open:
            self.open[path] = self.stack.enter_context(path.open("rb", buffering=0))
        return self.open[path]

    def __exit__(self, *error: object) -> None:
        self.stack.close()


# ------------------------------------------------------------------ saving
def save_checkpoint(model: nn.Module, folder: str | Path, *, dtype: torch.dtype | None = None,
                    config: Mapping[str, Any] | None = None, shard_bytes: int = SHARD_BYTES) -> None:  # fmt: skip
    """A standard Hugging Face folder: config.json and safetensors, sharded past `shard_bytes`; one tensor at a time.

    Linears are asked for `dequantize(dtype)`, so an NF4 store is written dense. `dtype` None: the norms' own.
    `config` adds to or replaces keys of the model's config.json.
    """
    config = {**model.config, **(config or {})}
    shapes = tensor_shapes(spec_of({k: v for k, v in config.items() if k != "quantization_config"}))
    out = dtype or model.get_parameter("model.norm.weight").dtype
    write_checkpoint(folder, config, shapes, partial(_tensor, model, out), out, shard_bytes=shard_bytes)


def _tensor(model: nn.Module, dtype: torch.dtype, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    return module.dequantize(dtype) if leaf == "weight" and hasattr(module, "dequantize") else getattr(module, leaf)


def write_checkpoint(folder: str | Path, config: Mapping[str, Any], shapes: Shapes, tensor: Callable[[str], Tensor],
                     dtype: torch.dtype, *, shard_bytes: int = SHARD_BYTES) -> None:  # fmt: skip
    """As `save_checkpoint`, from any source: `tensor(name)` is asked once for each name of `shapes`, in order, and held no longer.

    The index and config.json come last, so a folder that was cut short does not load. A full disk is DoesNotFit.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    code = next(k for k, v in DTYPES.items() if v == dtype)
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, shape in shapes.items():
        n = math.prod(shape) * BYTES[code]
        if shards[-1] and size + n > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + n, total + n
    names = [SINGLE] if len(shards) == 1 else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    dropped = ("auto_map", "quantization_config", "_name_or_path", "torch_dtype", "dtype")
    kept = {k: v for k, v in config.items() if k not in dropped}
    with room(folder, total):
        for stale in (INDEX, "config.json"):
            (folder / stale).unlink(missing_ok=True)
        for file, members in zip(names, shards, strict=True):
            _write_shard(folder / file, {n: shapes[n] for n in members}, tensor, dtype, code)
        for old in folder.glob("model*.safetensors"):  # of a save with other shards: transformers would read it first
            if old.name not in names:
                old.unlink()
        if len(shards) > 1:
            where = {n: file for file, members in zip(names, shards, strict=True) for n in members}
            _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
        _write_json(folder / "config.json", {**kept, "torch_dtype": str(dtype).removeprefix("torch.")})
        fsync_folder(folder)


def _write_shard(path: Path, shapes: Shapes, tensor: Callable[[str], Tensor], dtype: torch.dtype, code: str) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        end = at + math.prod(shape) * BYTES[code]
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # data starts at a multiple of 8, as safetensors itself writes it

    def pieces() -> Iterator[bytes | memoryview]:
        yield len(raw).to_bytes(8, "little")
        yield raw
        for name, shape in shapes.items():
            value = tensor(name).detach().to(device="cpu", dtype=dtype).contiguous()
            assert tuple(value.shape) == tuple(shape), f"{name}: {list(value.shape)} where {list(shape)} was announced"
            yield memoryview(value.view(-1).view(torch.uint8).numpy())

    _write(path, pieces())


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    _write(path, [(json.dumps(value, indent=2) + "\n").encode()])


def _write(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Whole or absent: written beside, synced, renamed."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    write_file(part, pieces)
    os.replace(part, path)
