"""gguf: one file for llama.cpp, Ollama and what builds on them, written here tensor by tensor with the `gguf` package.

f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 and q4_0 are written here. K-quants (q6_k, q5_k_m ...) are made by llama.cpp's own quantiser
out of an f16 or bf16 file, where `llama-quantize` or llama-cpp-python is there. Below 8 bits the vocabulary's two matrices stay
in q8_0: they decide every token, and a small model is mostly made of them. Norms and biases are always f32.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.errors import MissingExtra, ModelError, RunError, install
from tunesmith.export.gguf_model import PERMUTED, Model, gguf_name, model_of, paired, scale_ratio
from tunesmith.export.gguf_words import keys_of, swallows_spaces
from tunesmith.export.source import Source
from tunesmith.files import ensure_room
from tunesmith.spec import read_config, spec_of

SUFFIX = ".gguf"
ROWS = 1 << 24  # weights quantised at once: 64 MiB in float32
SLOWEST = 2_000_000  # bytes a second that llama.cpp's quantiser reads on the slowest machine, after ten minutes
OURS = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
K_QUANTS = ("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k")
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12,
              "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "bf16": 32}  # fmt: skip
LARGEST_F16 = 65_504.0


def the_package() -> Any:
    """The `gguf` package. Raises MissingExtra."""
    if find_spec("gguf") is None:
        raise MissingExtra("GGUF files need the package gguf", install("export"))
    import gguf

    return gguf


def check_quant(quant: str) -> str:
    """Raises RunError for a quantisation that is not known, or that needs a program which is not here."""
    if quant not in (*OURS, *K_QUANTS):
        raise RunError(f"--quant {quant}: is not known", f"write one of {', '.join((*OURS, *K_QUANTS))}")
    if quant in K_QUANTS and quantiser() is None:
        raise RunError(
            f"--quant {quant}: K-quants are made by llama.cpp's own quantiser, which is not here",
            "put llama-quantize on the PATH, or pip install llama-cpp-python; or write --quant q8_0, q5_1 or q4_0",
        )
    return quant


def quantiser() -> str | None:
    """`llama-quantize`, `llama_cpp` (the Python binding), or None."""
    return "llama-quantize" if shutil.which("llama-quantize") else "llama_cpp" if find_spec("llama_cpp") else None


def write(source: Source, path: Path, quant: str, onto: str, *, adapter: bool = True) -> list[str]:
    """Write the GGUF (without `adapter`, of the base alone); returns what a person should know.

    Raises ModelError for what llama.cpp does not have.
    """
    check_quant(quant)
    if quant not in K_QUANTS:
        return _write(source, path, quant, onto, adapter)
    whole = path.with_name(f".{path.name}.f32")
    try:
        notes = _write(source, whole, "bf16" if source.dtype == torch.bfloat16 else "f16", onto, adapter)
        source.tell(0, None)
        _quantise(whole, path, quant)
    finally:
        whole.unlink(missing_ok=True)
    return notes


def _write(source: Source, path: Path, quant: str, onto: str, adapter: bool) -> list[str]:
    if not source.native:
        kind = read_config(source.base.path).get("model_type")
        raise ModelError(
            f"model_type {kind!r}: no GGUF is written for a model that runs through transformers",
            "export --to merged, and use llama.cpp's own convert_hf_to_gguf.py on that folder",
        )
    gguf = the_package()
    with source.opened(onto, adapter=adapter) as weights:
        model = model_of(weights)
        writer = gguf.GGUFWriter(None, model.architecture)
        _facts(writer, gguf, model, source, quant)
        for name, value in keys_of(source.renderer, weights.spec.vocab).items():
            _add(writer, gguf, f"tokenizer.{name}", value)
        kinds = [_kind(gguf, quant, t.role, t.shape) for t in model.tensors]
        needed = 0
        for tensor, kind in zip(model.tensors, kinds, strict=True):
            block, size = gguf.GGML_QUANT_SIZES[kind]
            total = int(np.prod(tensor.shape)) // block * size
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), total, raw_dtype=kind)
            needed += total
        ensure_room(path.parent.parent, needed, "the export")
        _open(writer, path)
        for tensor, kind in zip(model.tensors, kinds, strict=True):
            writer.write_tensor_data(encoded(gguf, tensor.name, tensor.make(), kind))
        writer.close()
    return model.notes


def _open(writer: Any, path: Path) -> None:
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _facts(writer: Any, gguf: Any, model: Model, source: Source, quant: str) -> None:
    writer.add_type("model")
    writer.add_name(source.name + (" (phi-3 tokens)" if swallows_spaces(source.renderer) else ""))
    writer.add_quantization_version(2)
    writer.add_file_type(FILE_TYPES[quant])
    for name, value in model.keys.items():
        _add(writer, gguf, f"{model.architecture}.{name}", value)


def _add(writer: Any, gguf: Any, key: str, value: Any) -> None:
    """A Python value by its type: counts are unsigned 32-bit, token ids too."""
    kinds = gguf.GGUFValueType
    if isinstance(value, bool):
        writer.add_key_value(key, value, kinds.BOOL)
    elif isinstance(value, int):
        writer.add_key_value(key, value, kinds.UINT32)
    elif isinstance(value, float):
        writer.add_key_value(key, value, kinds.FLOAT32)
    elif isinstance(value, str):
        writer.add_key_value(key, value, kinds.STRING)
    else:
        inner = {str: kinds.STRING, float: kinds.FLOAT32, int: kinds.INT32}[type(value[0])]
        if key.endswith("precompiled_charsmap"):
            inner = kinds.UINT8
        writer.add_key_value(key, value, kinds.ARRAY, sub_type=inner)


def _kind(gguf: Any, quant: str, role: str, shape: tuple[int, ...]) -> Any:
    """How a tensor is stored. Rows that no block divides are f16."""
    kinds = gguf.GGMLQuantizationType
    if role == "vector":
        return kinds.F32
    if role == "vocabulary" and quant in ("q4_0", "q4_1", "q5_0", "q5_1"):
        quant = "q8_0"
    kind = kinds[quant.upper()]
    return kinds.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def encoded(gguf: Any, name: str, tensor: Tensor, kind: Any) -> np.ndarray:
    """The tensor's bytes as GGUF has them. Raises ModelError for what is no number, or too large for 16 bits."""
    kinds = gguf.GGMLQuantizationType
    if not torch.isfinite(tensor).all():
        raise ModelError(f"{name} holds nan or inf", "this run has broken: go back to an earlier checkpoint")
    if kind == kinds.F32:
        return tensor.float().numpy()
    if kind == kinds.BF16:
        return tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
    if kind == kinds.F16:
        if (largest := tensor.abs().max().item()) > LARGEST_F16:
            raise ModelError(f"{name} holds {largest:g}, which f16 does not", "export with --quant bf16 or f32")
        return tensor.to(torch.float16).numpy()
    rows = max(1, ROWS // tensor.shape[-1])
    return np.concatenate([gguf.quantize(part.float().contiguous().numpy(), kind) for part in tensor.split(rows)])


# ---- K-quants


def _quantise(whole: Path, out: Path, quant: str) -> None:
    """llama.cpp's quantiser in a process of its own. Raises ModelError with its last words."""
    if quantiser() == "llama-quantize":
        command = ["llama-quantize", str(whole), str(out), quant.upper()]
    else:
        command = [sys.executable, "-c", _BINDING, str(whole), str(out), str(FILE_TYPES[quant])]
    limit = 600 + whole.stat().st_size / SLOWEST
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, timeout=limit)
    except subprocess.TimeoutExpired:
        raise ModelError(f"llama.cpp's quantiser was ended after {limit / 60:.0f} minutes", "use --quant q8_0") from None
    if done.returncode or not out.is_file():
        last = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise ModelError("\n".join([f"llama.cpp's quantiser failed with {done.returncode}", *last]), "use --quant q8_0")


_BINDING = """
import sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = int(sys.argv[3])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), params))
"""


# ---- a LoRA adapter


def write_adapter(source: Source, path: Path) -> list[str]:
    """The run's adapter as a GGUF that llama.cpp lays over the base (`--lora`). Raises ModelError for what it cannot lay over."""
    gguf = the_package()
    config = read_config(source.base.path)
    with source.opened("dense") as weights:
        model = model_of(weights)
        settings, adapter = weights.settings, weights.adapter
        faults = []
        if settings.variant == "dora":
            faults.append("DoRA's magnitudes")
        if settings.tokens or settings.modules_to_save:
            faults.append("tokens or modules that were trained whole")
        if "lm_head" in settings.targets and spec_of(config).tied:
            faults.append("part for a vocabulary projection that the base shares with its embedding")
        if faults:
            raise ModelError(f"a GGUF adapter has no {' and no '.join(faults)}", "export --to gguf: there they are in the weights")
        if (ranks := {settings.rank_of(n) for n in settings.targets}) and len(ranks) > 1:
            raise ModelError(f"a GGUF adapter has one rank, this one has {sorted(ranks)}", "export --to gguf")
        rank = settings.rank
        alphas = {settings.alpha_of(n) for n in settings.targets}
        if len(alphas) > 1:
            raise ModelError("a GGUF adapter has one alpha, this one has several", "export --to gguf")
        alpha = alphas.pop()
        if settings.variant == "rslora":  # llama.cpp divides by the rank
            alpha *= rank**0.5
        spec = spec_of(config)
        writer = gguf.GGUFWriter(None, model.architecture)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(alpha))
        parts: list[tuple[str, Callable[[], Tensor], tuple[int, ...]]] = []
        for name in settings.targets:
            a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
            part = name.rpartition(".")[2]
            heads = {"q_proj": spec.heads, "k_proj": spec.kv_heads}.get(part) if model.architecture in PERMUTED else None
            ratio = scale_ratio(model.architecture, spec) if part == "q_proj" and not spec.qk_norm else 1.0

            def up(b=b, heads=heads, ratio=ratio) -> Tensor:
                found = adapter(b) * ratio
                return found if heads is None else paired(found, heads)

            base = gguf_name(f"{name}.weight", spec)
            parts.append((f"{base}.lora_a", lambda a=a: adapter(a), weights.adapter_shape(a)))
            parts.append((f"{base}.lora_b", up, weights.adapter_shape(b)))
        for name, _, shape in parts:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), int(np.prod(shape)) * 4)
        _open(writer, path)
        for _, make, _ in parts:
            writer.write_tensor_data(make().float().contiguous().numpy())
        writer.close()
    return model.notes
