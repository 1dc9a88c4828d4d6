"""PEFT's adapter files: adapter_config.json and adapter_model.safetensors, read and written.

What is written loads in PEFT, vLLM and llama.cpp; what PEFT writes for LoRA, rsLoRA and DoRA loads here. Fields that change what an
adapter computes and that we do not know are refused by name, never ignored.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from tunesmith.adapters.swap import (
    PREFIX,
    Settings,
    at,
    grow_vocabulary,
    linears,
    modules,
    settings_of,
    swap_in,
    transposed,
    twins,
    vocabulary,
)
from tunesmith.adapters.targets import layer_of, matches, saved_whole, shadowed, short_names
from tunesmith.errors import AdapterError
from tunesmith.files import write_atomic

Check = Callable[[Any], bool]

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

# Fields of LoraConfig (peft 0.21) that change what the adapter computes, with the values that mean "not used".
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "lora_bias": (False, None),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
}
TOKEN_ROOM = 1 << 16  # how far past the vocabulary a trained token may lie: rows up to it are made


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _rank(value: Any) -> bool:
    return _whole(value) and value > 0


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _list(of: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(of, value))


def _table(of: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(_text, value)) and all(map(of, value.values()))


# What each field may hold; null, or no field, is the default of all but the first two.
SHAPES: dict[str, tuple[str, tuple[Check, ...]]] = {
    "r": ("a positive whole number", (_rank,)),
    "lora_alpha": ("a positive number", (_positive,)),
    "lora_dropout": ("a number from 0 to below 1", (lambda value: value == 0 or (_positive(value) and value < 1),)),
    "target_modules": ("a pattern or a list of names", (_text, _list(_text))),
    "exclude_modules": ("a pattern or a list of names", (_text, _list(_text))),
    "modules_to_save": ("a list of names", (_list(_text),)),
    "rank_pattern": ("positive whole numbers by pattern", (_table(_rank),)),
    "alpha_pattern": ("positive numbers by pattern", (_table(_positive),)),
    "layers_to_transform": ("a layer's number or a list of them", (_whole, _list(_whole))),
    "layers_pattern": ("a pattern or a list of them", (_text, _list(_text))),
    "trainable_token_indices": ("ids, or lists of ids by module", (_list(_whole), _table(_list(_whole)))),
}
PATTERNS = ("target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern", "layers_pattern")

# init_lora_weights that also change the base's weights: the adapter alone does not tell what was trained.
MOVES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a PEFT LoRA adapter that can be loaded here. Raises AdapterError with every reason it cannot."""
    path = folder / CONFIG
    if not path.is_file():
        raise AdapterError(f"{folder} has no {CONFIG}", "give the folder of a PEFT adapter")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise AdapterError(f"{path} is no JSON: {e}", "this adapter is damaged: get it again") from e
    if not isinstance(config, dict):
        raise AdapterError(f"{path} holds no settings", "this adapter is damaged: get it again")
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{path}: peft_type is {config.get('peft_type')!r}; LORA is what can be loaded", "use a LoRA, rsLoRA or DoRA adapter"
        )
    faults = [
        f"{key}: {config[key]!r} is not supported" for key, off in UNSUPPORTED.items() if key in config and config[key] not in off
    ]
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(MOVES_BASE):
        faults.append(f"init_lora_weights: {start!r} changed the base's weights too, which this folder does not hold")
    if config.get("use_dora") and config.get("use_rslora"):
        faults.append("use_dora with use_rslora is not supported")
    damaged = [
        f"{key}: {reprlib.repr(config.get(key))}, not {wanted}"
        for key, (wanted, allowed) in SHAPES.items()
        if (config.get(key) is not None or key in ("r", "lora_alpha")) and not any(check(config.get(key)) for check in allowed)
    ]
    sound = [key for key in PATTERNS if not any(fault.startswith(f"{key}: ") for fault in damaged)]
    damaged += [f"{key}: {why}" for key in sound for why in _no_patterns(config.get(key))]
    if damaged:
        raise AdapterError(
            "\n".join(f"{path}: {fault}" for fault in faults + damaged), "this adapter's settings are damaged: get it again"
        )
    if faults:
        raise AdapterError(
            "\n".join(f"{path}: {fault}" for fault in faults), "merge that adapter with PEFT into a model folder, and use that"
        )
    return config


def _no_patterns(entries: str | Iterable[str] | None) -> Iterator[str]:
    """Why an entry is no regular expression, which is what PEFT reads these as."""
    for entry in [entries] if isinstance(entries, str) else entries or []:
        try:
            re.compile(entry)
        except (re.error, RecursionError, OverflowError) as e:
            yield f"{reprlib.repr(entry)} is no pattern: {e}"


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors by their names without PEFT's prefix."""
    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / PICKLED).exists():
            fix = f"load it with PEFT where you trust it and save it again: PEFT writes {WEIGHTS}"
            raise AdapterError(f"{folder / PICKLED} is a pickle, which can run code when it is read; it is not opened", fix)
        raise AdapterError(f"{folder} has no {WEIGHTS}", "give the folder of a PEFT adapter")
    try:
        return {name.removeprefix(PREFIX): tensor for name, tensor in load_file(path).items()}
    except SafetensorError as e:
        raise AdapterError(f"{path} is damaged: {e}", "get this adapter again") from e


def resolve(model: nn.Module, config: Mapping[str, Any]) -> Settings:
    """What the config means on this model, before any twin is in. Names that mean nothing here show as missing tensors later."""
    saved_entries = config.get("modules_to_save") or []
    saved = tuple(n for n, _ in modules(model) if any(saved_whole(e, n) for e in saved_entries))
    targets = tuple(n for n in linears(model) if _targeted(config, n) and not shadowed(n, saved_entries))
    return Settings(
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout") or 0.0,
        variant="dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora",
        targets=targets,
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        modules_to_save=saved,
        tokens=_tokens(model, config.get("trainable_token_indices")),
        transposed=transposed(model, targets),
    )


def _targeted(config: Mapping[str, Any], name: str) -> bool:
    """PEFT's check_target_module_exists."""

    def hit(entries: str | Sequence[str] | None) -> bool:
        if isinstance(entries, str):
            return matches(f"/{entries}/", name)
        return any(matches(entry, name) for entry in entries or [])

    if config.get("exclude_modules") and hit(config["exclude_modules"]):
        return False
    targets = config.get("target_modules")
    if not hit(targets):
        return False
    layers = config.get("layers_to_transform")
    if isinstance(targets, str) or layers is None or layers == []:
        return True
    pattern = config.get("layers_pattern") or []
    return layer_of(name, [pattern] if isinstance(pattern, str) else pattern) in ([layers] if isinstance(layers, int) else layers)


def _tokens(model: nn.Module, wanted: Sequence[int] | Mapping[str, Sequence[int]] | None) -> dict[str, tuple[int, ...]]:
    """PEFT's trainable_token_indices by full names; a projection that shares the embedding's matrix trains the same rows."""
    if not wanted:
        return {}
    embedding, head = vocabulary(model)
    if embedding is None:
        raise AdapterError(
            "the adapter trains tokens, and this model's embedding is not found", "use the base model of the adapter"
        )
    names = [n for n, _ in modules(model)]
    by_entry = dict(wanted) if isinstance(wanted, Mapping) else {embedding: wanted}
    if far := [i for ids in by_entry.values() for i in ids if i >= len(at(model, embedding).weight) + TOKEN_ROOM]:
        raise AdapterError(f"the adapter trains token {max(far):,}, far past this vocabulary", "use the base model of the adapter")
    found = {n: tuple(ids) for entry, ids in by_entry.items() for n in names if matches(entry, n)}
    if embedding in found and head is not None and at(model, head).weight is at(model, embedding).weight:
        found[head] = found[embedding]
    return dict(sorted(found.items(), key=lambda item: item[0] != embedding))


def put_in(model: nn.Module, settings: Settings, tensors: Mapping[str, Tensor], *, seed: int = 0) -> None:
    """Twins in place, the tensors that belong to them copied. Raises AdapterError with every wrong, missing or extra tensor."""
    ids = [i for rows in settings.tokens.values() for i in rows]
    if ids:
        grow_vocabulary(model, max(ids) + 1)
    starts = {name: at(model, name).weight[list(rows)] for name, rows in settings.tokens.items()}
    swap_in(model, settings, seed=seed, starts=starts)
    copy_tensors(model, tensors)


def vocabulary_into_base(model: nn.Module, settings: Settings, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PEFT writes the whole embedding or projection too when it was resized or is a target itself; such tensors go into the base,
    which grows where they are longer. Returns the others."""
    others = {}
    for key, tensor in tensors.items():
        name, _, leaf = key.replace(".base_layer.", ".").rpartition(".")
        if name not in vocabulary(model) or leaf not in ("weight", "bias") or name in settings.modules_to_save:
            others[key] = tensor
            continue
        grow_vocabulary(model, len(tensor))
        place = getattr(at(model, name), leaf)
        if place.shape != tensor.shape:
            raise AdapterError(
                f"{key}: {list(tensor.shape)} where {list(place.shape)} belongs", "use the base model of this adapter"
            )
        with torch.no_grad():
            place.copy_(tensor)
    return others


def copy_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies every tensor into its place; names are PEFT's, with or without its prefix. All faults are raised before any copy."""
    places = {name.removeprefix(PREFIX): parameter for name, parameter in named(model).items()}
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    wrong = [f"{name}: {list(tensors[name].shape)} where {list(place.shape)} belongs"
             for name, place in places.items() if name in tensors and tensors[name].shape != place.shape]  # fmt: skip
    kinds = [f"{name}: {t.dtype}".replace("torch.", "") for name, t in tensors.items() if not t.is_floating_point()]
    faults = (
        _listed("wrong shape", wrong)
        + _listed("no floating-point numbers", kinds)
        + _listed("missing", places.keys() - tensors.keys())
    )
    faults += _listed("without a place in this model", tensors.keys() - places.keys())
    if faults:
        raise AdapterError(
            "the adapter does not fit this model:\n" + "\n".join(faults), "use the base model that its adapter_config.json names"
        )
    with torch.no_grad():
        for name, place in places.items():
            place.copy_(tensors[name])


def _listed(kind: str, names: Iterable[str], show: int = 8) -> list[str]:
    names = sorted(names)
    return [f"  {kind}: {name}" for name in names[:show]] + [f"  {kind}: and {len(names) - show} more"] * (len(names) > show)


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every tensor of the adapter under the name PEFT's file gives it."""
    return {f"{PREFIX}{name}.{key}": parameter for name, twin in twins(model).items() for key, parameter in twin.tensors().items()}


def load(model: nn.Module, folder: str | Path, *, trainable: bool = False) -> Settings:
    """Puts a PEFT adapter folder on a model that has none. Not trainable unless asked."""
    folder = Path(folder)
    if twins(model):
        raise AdapterError("this model already has an adapter", "merge it first, or load the model again")
    config, tensors = read_config(folder), read_tensors(folder)
    settings = resolve(model, config)
    put_in(model, settings, vocabulary_into_base(model, settings, tensors))
    for parameter in named(model).values():
        parameter.requires_grad_(trainable)
    return settings


def save(model: nn.Module, folder: str | Path, *, base_name: str, revision: str | None = None) -> None:
    """Writes the adapter as PEFT does, each file at once (the config last). The same adapter gives the same bytes.

    `base_name` is the hub id or folder that others find the base under; `revision` its commit.
    """
    folder, settings = Path(folder), settings_of(model)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: parameter.detach().to("cpu", torch.float32).contiguous() for name, parameter in sorted(named(model).items())}
    write_atomic(folder / WEIGHTS, to_bytes(tensors, metadata={"format": "pt"}))
    config = json.dumps(
        config_of(model, settings, base_name, revision), indent=2
    )  # not sorted: the first pattern that matches wins
    write_atomic(folder / CONFIG, config + "\n")


def config_of(model: nn.Module, settings: Settings, base_name: str, revision: str | None = None) -> dict[str, Any]:
    """adapter_config.json: the fields that readers use."""
    names = [name for name, _ in modules(model)]
    alpha = settings.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": revision,
        "r": settings.rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": settings.dropout,
        "target_modules": short_names(settings.targets, names),
        "modules_to_save": sorted(settings.modules_to_save) or None,
        "trainable_token_indices": {name: list(ids) for name, ids in settings.tokens.items()} or None,
        "rank_pattern": dict(settings.rank_pattern),
        "alpha_pattern": dict(settings.alpha_pattern),
        "use_rslora": settings.variant == "rslora",
        "use_dora": settings.variant == "dora",
        "fan_in_fan_out": settings.transposed,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
    }
