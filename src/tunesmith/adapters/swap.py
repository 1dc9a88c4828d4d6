"""Settings of an adapter as resolved on a model, and the exchange of modules for their adapted twins."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.adapters.beside import Saved, Tokens
from tunesmith.adapters.lora import METHODS, Lora, Twin, is_conv1d, is_linear
from tunesmith.adapters.targets import is_pattern, matches, of_pattern, saved_whole, shadowed
from tunesmith.errors import AdapterError
from tunesmith.registry import did_you_mean

PREFIX = "base_model.model."  # PEFT's, before every name in its files
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
HEADS = ("lm_head", "embed_out", "output_projection")


@dataclass(frozen=True, slots=True)
class Settings:
    """What an adapter is. Module names are full; `tokens` maps a module to the rows trained in it, the embedding first."""

    rank: int
    alpha: float
    dropout: float = 0.0
    variant: str = "lora"
    targets: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    transposed: bool = False  # the targets are Conv1D: PEFT's fan_in_fan_out

    def rank_of(self, name: str) -> int:
        return of_pattern(self.rank_pattern, name, self.rank)

    def alpha_of(self, name: str) -> float:
        return of_pattern(self.alpha_pattern, name, self.alpha)


def unmatched(targets: Sequence[str], **patterns: Mapping[str, object]) -> None:
    """AdapterError for each key of a pattern that no target matches: it would do nothing, in silence."""
    faults = [
        f"lora.{which}: {key!r} matches none of the adapted modules"
        for which, table in patterns.items()
        for key in table
        if not any(of_pattern({key: True}, name, False) for name in targets)
    ]
    if faults:
        last = sorted({name.rpartition(".")[2] for name in targets})
        raise AdapterError(
            "\n".join(faults), f"a key is the end of a name, or a pattern without slashes; the modules are {', '.join(last)}"
        )


def root(model: nn.Module) -> nn.Module:
    """The module from which the checkpoint's names count: a wrapper around a transformers model answers it as `checkpoint_root`."""
    return getattr(model, "checkpoint_root", model)


def at(model: nn.Module, name: str) -> nn.Module:
    return root(model).get_submodule(name)


def modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module by its own name, a twin as one: nothing inside it."""
    inside = ""
    for name, module in root(model).named_modules():
        if inside and name.startswith(inside):
            continue
        inside = f"{name}." if isinstance(module, Twin) else ""
        if name:
            yield name, module


def twins(model: nn.Module) -> dict[str, Twin]:
    return {name: module for name, module in modules(model) if isinstance(module, Twin)}


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in modules(model) if is_linear(module)}


def vocabulary(model: nn.Module) -> tuple[str | None, str | None]:
    """Names of the embedding and of the vocabulary projection, None for one that is not there. A transformers model is asked."""
    by_name = dict(modules(model))

    def find(getter: str, known: Sequence[str]) -> str | None:
        if hasattr(root(model), getter):
            wanted = getattr(root(model), getter)()
            return next((name for name, module in by_name.items() if module is wanted), None)
        return next((name for name in by_name if name.rpartition(".")[2] in known), None)

    return find("get_input_embeddings", EMBEDDINGS), find("get_output_embeddings", HEADS)


def resolve_targets(model: nn.Module, targets: str | Sequence[str], modules_to_save: Sequence[str] = ()) -> tuple[str, ...]:
    """Full names of the linears meant. Raises AdapterError, all faults at once, for an entry that means none."""
    candidates, head = linears(model), vocabulary(model)[1]
    if targets == "all-linear":
        entries = {name: [name] for name in candidates if name != head}
        if not entries:
            raise AdapterError("this model has no linear to adapt", "name the modules in lora.modules_to_save, or use method: full")
    else:
        entries = {entry: [name for name in candidates if matches(entry, name)] for entry in targets}
    faults = []
    others = [name for name, _ in modules(model) if name not in candidates]
    for entry in (entry for entry, found in entries.items() if not found):
        if not is_pattern(entry) and (wrong := [name for name in others if matches(entry, name)]):
            faults.append(f"lora.targets: {entry!r} is {wrong[0]}, which is no linear")
            continue
        known = sorted({name.rpartition(".")[2] for name in candidates} | (set(candidates) if "." in entry else set()))
        hint = "" if is_pattern(entry) else did_you_mean(entry, known)
        faults.append(f"lora.targets: {entry!r} matches no linear" + (f"; {hint}" if hint.startswith("did") else ""))
    if faults:
        known = sorted({name.rpartition(".")[2] for name in candidates})
        raise AdapterError("\n".join(faults), f"name some of: {', '.join(known)}; or set lora.targets: all-linear")
    meant = {name for found in entries.values() for name in found}
    return tuple(name for name in candidates if name in meant and not shadowed(name, modules_to_save))


def resolve_saved(model: nn.Module, wanted: Sequence[str]) -> tuple[str, ...]:
    """Full names of the modules trained whole: those whose name is, or ends after a dot in, an entry.

    PEFT matches without the dot; a name it would read more widely than we do is refused, because the file would not load there.
    """
    names, found, faults = [name for name, _ in modules(model)], [], []
    for entry in wanted:
        hits = [name for name in names if matches(entry, name)]
        if not hits:
            faults.append(
                f"lora.modules_to_save: no module is named {entry!r}; {did_you_mean(entry, {n.rpartition('.')[2] for n in names})}"
            )
        found += [name for name in hits if name not in found]
    embedding = vocabulary(model)[0]
    for name in found:
        module = at(model, name)
        if isinstance(module, nn.ModuleList) or (embedding or "").startswith(f"{name}."):
            faults.append(f"lora.modules_to_save: {name!r} holds the layers themselves; `method: full` trains every weight")
        elif not any(True for _ in module.parameters()):
            faults.append(f"lora.modules_to_save: {name!r} has no weights")
        if outer := [other for other in found if name.startswith(f"{other}.")]:
            faults.append(f"lora.modules_to_save: {name!r} lies in {outer[0]!r}, which is trained whole")
        if more := [other for other in names if saved_whole(name, other) and other not in found]:
            faults.append(f"lora.modules_to_save: PEFT would read {name!r} as {more[0]!r} too")
    if faults:
        raise AdapterError("\n".join(faults), "use the last part of a module's name, or its full name")
    return tuple(found)


def swap_in(model: nn.Module, settings: Settings, *, seed: int, starts: Mapping[str, Tensor]) -> None:
    """Freezes the model and puts the twins in. `starts` holds the trained rows' first values [K, D] by module name.

    Each A is drawn from a generator seeded with `seed` and the module's name: the order of modules and the device do not matter.
    """
    model.requires_grad_(False)
    method = METHODS[settings.variant]
    for name in settings.targets:
        rank = settings.rank_of(name)
        twin = method.twin(at(model, name), rank, method.scale(settings.alpha_of(name), rank), settings.dropout)
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        twin.reset(torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1))
        put(model, name, twin)
    first: Tokens | None = None
    for name, ids in settings.tokens.items():
        base = at(model, name)
        tied = first if first is not None and base.weight is first.base.weight else None
        twin = Tokens(base, ids, starts[name], tied)
        first = first or twin
        put(model, name, twin)
    for name in settings.modules_to_save:
        put(model, name, Saved(at(model, name)))
    model.adapter_settings = settings


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """`module` in the place of `name`, in its mode of training or evaluation."""
    module.train(at(model, name).training)
    root(model).set_submodule(name, module)


def settings_of(model: nn.Module) -> Settings:
    settings = getattr(model, "adapter_settings", None)
    if not isinstance(settings, Settings):
        raise AdapterError("this model has no adapter", "attach or load one first")
    return settings


def grow_vocabulary(model: nn.Module, rows: int) -> None:
    """Embedding and projection get at least `rows` rows; the new ones hold the mean of the old, as transformers starts them."""
    names = [name for name in vocabulary(model) if name is not None]
    grown: dict[int, nn.Parameter] = {}
    for name in names:
        module = at(model, name)
        old = module.weight
        if old.shape[0] >= rows:
            continue
        if id(old) not in grown:
            mean = old.detach().float().mean(0, keepdim=True).to(old.dtype)
            grown[id(old)] = nn.Parameter(torch.cat([old.detach(), mean.expand(rows - old.shape[0], -1)]), requires_grad=False)
        module.weight = grown[id(old)]
        if getattr(module, "bias", None) is not None:
            module.bias = nn.Parameter(
                torch.cat([module.bias.detach(), module.bias.new_zeros(rows - old.shape[0])]), requires_grad=False
            )
        for attribute in ("num_embeddings", "out_features"):
            if hasattr(module, attribute):
                setattr(module, attribute, rows)
    if grown:
        set_config(model, "vocab_size", rows)


def set_config(model: nn.Module, key: str, value: Any) -> None:
    """Writes a key of the model's config.json, be it a dict or transformers' object, and the Spec's field that came from it."""
    config, spec = getattr(model, "config", None), getattr(model, "spec", None)
    of_spec = {"vocab_size": "vocab", "tie_word_embeddings": "tied"}
    if isinstance(config, dict):
        config[key] = value
    elif config is not None:
        setattr(config, key, value)
    if is_dataclass(spec) and hasattr(spec, of_spec[key]):
        model.spec = replace(spec, **{of_spec[key]: value})


def transposed(model: nn.Module, targets: Sequence[str]) -> bool:
    return any(is_conv1d(at(model, name)) for name in targets)


def loras(model: nn.Module) -> dict[str, Lora]:
    return {name: twin for name, twin in twins(model).items() if isinstance(twin, Lora)}
