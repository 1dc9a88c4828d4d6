"""What is tried: `lora.rank=8,16,64` is a list, `train.learning_rate=1e-4..1e-3` a range, one value alone an override."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.config.explain import keys
from tunesmith.config.load import load
from tunesmith.config.schema import RunConfig
from tunesmith.config.yaml12 import read
from tunesmith.errors import ConfigError

Setting = Mapping[str, str]  # key -> value as an override has it

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
RANGE = re.compile(rf"\s*({NUMBER})\s*\.\.\s*({NUMBER})\s*((?::\w+)*)\s*")
KINDS = ("int", "linear", "log")
WIDE = 10  # a range whose ends are so many times apart is searched by its logarithm
DIGITS = 3  # of a value drawn from a range: 0.000213, not 0.00021347612
REFUSED = {
    "output": "the sweep names the run folders; --out names its own",
    "seed": "--seeds N repeats each setting with N seeds",
    "data.held_out": "it is what the settings are ranked by, and must stay the same",
}


@dataclass(frozen=True)
class Axis:
    """A setting and what it may be: `values` in the order given, or a range from `low` to `high`."""

    key: str
    values: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    log: bool = False

    @property
    def ends(self) -> tuple[str, ...]:
        """All values of a list; the two ends of a range."""
        return self.values or (self.text(self.low), self.text(self.high))

    def text(self, value: float) -> str:
        """A number of the range as an override has it; rounded, but never out of the range."""
        if self.whole:
            return str(round(value))
        return plain(min(max(float(f"{value:.{DIGITS}g}"), self.low), self.high))

    def holds(self, text: str) -> bool:
        if self.values:
            return text in self.values
        try:
            value = float(text)
        except ValueError:
            return False
        return self.low <= value <= self.high and not (self.whole and value % 1)

    def draw(self, trial: Any) -> str:
        """The value that an optuna trial has or draws."""
        if self.values:
            return str(trial.suggest_categorical(self.key, self.values))
        if self.whole:
            return self.text(trial.suggest_int(self.key, round(self.low), round(self.high), log=self.log))
        return self.text(trial.suggest_float(self.key, self.low, self.high, log=self.log))

    def fixed(self, text: str) -> str | int | float:
        """`text` as optuna keeps it."""
        return text if self.values else int(float(text)) if self.whole else float(text)

    def describe(self) -> str:
        if self.values:
            return f"{self.key}: {', '.join(self.values)}"
        return f"{self.key}: {self.text(self.low)} to {self.text(self.high)}{', by its logarithm' if self.log else ''}"


def space(config: RunConfig, settings: Sequence[str]) -> tuple[RunConfig, list[Axis]]:
    """The run file under its plain overrides, and the axes. Every value is checked against the schema.

    ConfigError names an unknown key (and the near one), a value that the key may not be, an empty list, a range that is none.
    """
    overrides, axes = [], []
    for text in settings:
        found = _axis(text)
        if found is None:
            overrides.append(text)
        elif any(axis.key == found.key for axis in axes):
            raise ConfigError(f"{text}: {found.key} is given twice", "write all its values in one list")
        else:
            axes.append(found)
    if not axes:
        raise ConfigError(
            "nothing to try: no setting has several values", "add one, such as lora.rank=8,16,64 or train.learning_rate=1e-4..1e-3"
        )
    config = load(config, *overrides)
    for axis in axes:
        for value in axis.ends:
            load(config, f"{axis.key}={value}")
        if axis.key not in keys():
            raise ConfigError(f"{axis.key}: is a section, not a setting", f"`tunesmith explain {axis.key}` lists its settings")
    return config, axes


def grid(axes: Sequence[Axis]) -> list[dict[str, str]]:
    """Every combination of all values; of a range its ends."""
    return [
        dict(zip((a.key for a in axes), combination, strict=True)) for combination in itertools.product(*(a.ends for a in axes))
    ]


def corners(axes: Sequence[Axis], most: int) -> Iterator[dict[str, str]]:
    """Combinations that hold the extremes: every one where there are at most `most`, else of each axis its first and last value."""
    if math.prod(len(a.ends) for a in axes) > most:
        axes = [Axis(a.key, (a.ends[0], a.ends[-1])) for a in axes]
    yield from itertools.islice(grid(axes), most)


def own(config: RunConfig, axes: Sequence[Axis]) -> dict[str, str]:
    """What the run file itself says for each axis."""
    return {axis.key: plain(_value(config, axis.key)) for axis in axes}


def overrides(setting: Setting) -> list[str]:
    return [f"{key}={value}" for key, value in setting.items()]


def words(setting: Setting) -> str:
    return " ".join(overrides(setting))


def plain(value: Any) -> str:
    """A value as YAML in one line that reads back as the same; text without quotes where it needs none."""
    if hasattr(value, "model_dump"):
        value = value.model_dump(mode="json")
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return json.dumps(list(value) if isinstance(value, tuple) else value, default=lambda v: v.model_dump(mode="json"))
    if isinstance(value, float):
        short = f"{value:g}".replace("e-0", "e-").replace("e+0", "e+")
        return short if float(short) == value else repr(value)
    try:
        reads_back = read(str(value)).tree == value
    except ConfigError:
        reads_back = False
    return str(value) if reads_back else json.dumps(value)


def _axis(text: str) -> Axis | None:
    key, equals, value = text.partition("=")
    key = key.strip()
    example = f"write {key or 'key.path'}=a,b,c or {key or 'key.path'}=lo..hi"
    if not equals or not key:
        raise ConfigError(f"{text}: is no setting", example)
    if not value.strip():
        raise ConfigError(f"{text}: has no values", example)
    if found := RANGE.fullmatch(value):
        return _range(text, key, *found.groups())
    if ".." in value and not any(c in value for c in "/,["):
        raise ConfigError(f"{text}: is no range", f"write two numbers, such as {key}=1..10")
    try:
        items = read(f"[{value}]").tree
    except ConfigError as fault:
        raise ConfigError(f"{text}: is no list: {fault.what}", example) from None
    if not isinstance(items, list) or any(item is None for item in items):
        raise ConfigError(f"{text}: a value is empty", example)
    if len(items) < 2 and not value.rstrip().endswith(","):
        return None
    _refuse(text, key)
    return Axis(key, tuple(dict.fromkeys(plain(item) for item in items)))


def _range(text: str, key: str, low: str, high: str, how: str) -> Axis:
    kinds = [kind for kind in how.split(":") if kind]
    if wrong := [kind for kind in kinds if kind not in KINDS]:
        raise ConfigError(
            f"{text}: unknown kind of range {wrong[0]!r}", f"after the range may stand: {', '.join(':' + k for k in KINDS)}"
        )
    _refuse(text, key)
    whole = "int" in kinds or (key in keys() and "whole number" in keys()[key].kind)
    lo, hi = float(low), float(high)
    if not lo < hi:
        raise ConfigError(f"{text}: a range goes from a smaller number to a larger one", f"write {key}={high}..{low}, or one value")
    if whole and (lo % 1 or hi % 1):
        raise ConfigError(f"{text}: {key} is a whole number", f"write {key}={math.ceil(lo)}..{math.floor(hi)}")
    log = "log" in kinds or ("linear" not in kinds and not whole and lo > 0 and hi / lo >= WIDE * (1 - 1e-9))
    if log and lo <= 0:
        raise ConfigError(f"{text}: a range by its logarithm begins above 0", f"write {key}={low}..{high}:linear")
    return Axis(key, low=lo, high=hi, whole=whole, log=log)


def _refuse(text: str, key: str) -> None:
    if key in REFUSED:
        raise ConfigError(f"{text}: {key} cannot be swept", REFUSED[key])


def _value(config: RunConfig, key: str) -> Any:
    if key == "train.learning_rate":
        return config.train.rate(config.method)
    found: Any = config
    for part in key.split("."):
        found = getattr(found, part)
    return found
