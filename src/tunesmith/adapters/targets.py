"""Which modules an adapter means: PEFT's name matching, rule for rule, so that a file says the same to PEFT, vLLM and us. No torch.

The rules are those of peft 0.21: tuners_utils.check_target_module_exists, utils.other.get_pattern_key and _set_trainable.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


def matches(target: str, name: str) -> bool:
    """`target` is a last name (`q_proj`), a full name, or a pattern between slashes that must match the whole name."""
    if is_pattern(target):
        return re.fullmatch(target[1:-1], name) is not None
    return name == target or name.endswith(f".{target}")


def is_pattern(target: str) -> bool:
    return len(target) > 2 and target[0] == target[-1] == "/"


def shadowed(name: str, modules_to_save: Iterable[str]) -> bool:
    """PEFT never adapts a module that is, or lies inside, one that is trained whole. Each entry is read as a pattern."""
    return any(re.match(rf"(^|.*\.){entry}($|\..*)", name) for entry in modules_to_save)


def saved_whole(entry: str, name: str) -> bool:
    """PEFT trains every module whose name ends in the entry, dot or no dot: `norm` means `input_layernorm` too."""
    return name.endswith(entry)


def layer_of(name: str, layers_pattern: Sequence[str] = ()) -> int | None:
    """The first number after a part of the name (or after one of `layers_pattern`): 3 for model.layers.3.mlp.experts.0.up."""
    if not layers_pattern:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", name)
        return int(found[1]) if found else None
    for pattern in layers_pattern:
        if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name):
            return int(found[1])
    return None


def of_pattern(patterns: Mapping[str, T], name: str, default: T) -> T:
    """The value of the first key that matches the end of `name`; keys are patterns and match from a dot or the start."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def short_names(chosen: Iterable[str], all_names: Iterable[str]) -> list[str]:
    """The sorted last names that mean exactly `chosen` among `all_names`, or, where none do, the full names."""
    chosen = set(chosen)
    last = {name.rpartition(".")[2] for name in chosen}
    meant = {name for name in all_names if any(matches(target, name) for target in last)}
    return sorted(last if meant == chosen else chosen)
