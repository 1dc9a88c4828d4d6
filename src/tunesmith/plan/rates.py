"""What a device does by itself: measured in a few seconds by train/probe.py and kept for this machine, or assumed from its data
sheet. A plan's time is made of these (speed.py).

They are kept under the names of the device, its driver and torch: another driver or torch asks for another probe. No torch here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tunesmith.devices import Device
from tunesmith.files import write_atomic

FORMAT = 1
WIDER = 4  # a product is [tokens, width] x [width, WIDER x width]: a transformer's, in and out of its MLP


@dataclass(frozen=True)
class Rates:
    """`products`: by precision (16bit, fp32, fp8) rows of (tokens, width, FLOP/s). `attention`: rows of (head width, tokens of a
    document, forward FLOP/s, backward FLOP/s), causal. `copy`: bytes/s read and written. `decode`: 4-bit weights/s made dense.
    `link`: bytes/s each way to main memory. `launch`: seconds that one layer's forward takes however few its tokens.
    `factors`: by path (half-blocks, composed) what real layers took in the probe over what is computed from all this.
    """

    products: Mapping[str, Sequence[Sequence[float]]]
    attention: Sequence[Sequence[float]]
    copy: float
    decode: float
    link: float
    launch: float
    factors: Mapping[str, float]
    where: str = ""  # device, driver, torch and day of the measurement; empty: assumed

    def product(self, precision: str, tokens: float, width: float) -> float:
        """FLOP/s of a product of so many tokens, between the measured ones; fewer tokens than were measured read the weights all
        the same."""
        rows = self.products[precision]
        widths = sorted({w for _, w, _ in rows})
        low, high, share = _between(widths, width)
        found = []
        for w in (low, high):
            known = sorted((t, rate) for t, at, rate in rows if at == w)
            found.append(_interpolated(known, tokens) * min(1.0, tokens / known[0][0]))
        return found[0] ** (1 - share) * found[1] ** share

    def attend(self, head_dim: int, length: float) -> tuple[float, float]:
        """FLOP/s of attention's forward and backward in documents of so many tokens."""
        heads = min({h for h, *_ in self.attention}, key=lambda h: abs(math.log(h / head_dim)))
        at = [row for row in self.attention if row[0] == heads]
        forward, backward = (_interpolated(sorted((row[1], row[i]) for row in at), length) for i in (2, 3))
        return forward, backward


def assumed(device: Device) -> Rates:
    """Of a device that nobody has measured: the shares of its printed figures that an H100 reaches (a GPU), or one core did."""
    peak, memory = device.tflops * 1e12, device.bandwidth * 1e9
    if device.kind == "cpu":
        products = {"fp32": [(64, 512, 0.55 * peak), (512, 512, 0.7 * peak)], "16bit": [(64, 512, 0.2 * peak)]}
        return Rates(products, [(64, 512, 0.3 * peak, 0.3 * peak)], 0.8 * memory, memory / 24, memory, 500e-6, {})
    shares = H100 if device.kind == "cuda" else [(512, 4096, 0.3)]
    sixteen = [(t, w, share * peak) for t, w, share in shares]
    products = {
        "16bit": sixteen,
        "fp32": [(t, w, rate / 8) for t, w, rate in sixteen],
        "fp8": [(t, w, 1.85 * r) for t, w, r in sixteen],
    }
    attention = [(h, n, f * peak, b * peak) for h, n, f, b in H100_ATTENTION]
    return Rates(products, attention, 0.9 * memory, 0.9 * memory / 2.5, device.link * 1e9 or memory, 1e-3, {})


# of the printed 989 TFLOP/s of an H100 (bench/results/gpu.jsonl and plan.jsonl have the measurements)
H100 = [
    (512, 1024, 0.30), (2048, 1024, 0.45), (8192, 1024, 0.55), (512, 2048, 0.52), (2048, 2048, 0.70), (8192, 2048, 0.75),
    (512, 4096, 0.62), (2048, 4096, 0.72), (8192, 4096, 0.75),
]  # fmt: skip
H100_ATTENTION = [
    (128, 512, 0.25, 0.20), (128, 2048, 0.54, 0.40), (128, 8192, 0.62, 0.52), (128, 32768, 0.63, 0.54),
    (64, 512, 0.18, 0.14), (64, 2048, 0.38, 0.28), (64, 8192, 0.44, 0.36), (64, 32768, 0.45, 0.38),
]  # fmt: skip


# ---- kept for this machine -------------------------------------------------------------------------------------------------------


def machine(device: Device) -> str:
    """`NVIDIA H100 80GB HBM3, driver 570.124, torch 2.11.0`: what a measurement holds for."""
    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = "unknown"
    if device.kind == "cuda":
        return f"{device.name}, driver {_driver() or 'unknown'}, torch {torch}"
    return f"{device.name} ({_processor()}), torch {torch}"


def file_of(device: Device, cache: Path | None = None) -> Path:
    """Where this machine's measurement is kept: TUNESMITH_CACHE, or ~/.cache/tunesmith."""
    root = cache or Path(os.environ.get("TUNESMITH_CACHE") or "~/.cache/tunesmith").expanduser()
    name = machine(device)
    return (
        root / "rates" / f"{re.sub(r'[^a-z0-9]+', '-', device.name.lower())}-{hashlib.sha256(name.encode()).hexdigest()[:12]}.json"
    )


def keep(rates: Rates, device: Device, cache: Path | None = None) -> Path:
    """Write a measurement; a reader sees all of it or none. Returns the file."""
    file = file_of(device, cache)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps({"format": FORMAT, "machine": machine(device), **asdict(rates)}, indent=1), durable=False)
    return file


def kept(device: Device, cache: Path | None = None) -> Rates | None:
    """This machine's measurement; None of a card that is not here, where there is none, or where it cannot be read."""
    if not device.local:
        return None
    try:
        found = json.loads(file_of(device, cache).read_text())
        if found.pop("format") != FORMAT or found.pop("machine") != machine(device):
            return None
        rates = Rates(**found)
        return rates if _sound(rates) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sound(rates: Rates) -> bool:
    values = [*(row[2] for rows in rates.products.values() for row in rows), *(x for row in rates.attention for x in row[2:])]
    values += [rates.copy, rates.decode, rates.link, rates.launch, *rates.factors.values()]
    return all(isinstance(v, (int, float)) and math.isfinite(v) and v > 0 for v in values)


def _driver() -> str:
    try:
        found = re.search(r"Module[^\n]*?\s(\d+\.\d[\d.]*)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return ""
    return found[1] if found else ""


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


# ---- between what was measured ---------------------------------------------------------------------------------------------------


def _interpolated(known: Iterable[tuple[float, float]], at: float) -> float:
    """The value at `at` between (place, value) in order of their places, on logarithmic scales; the ends go on level."""
    table = dict(known)
    low, high, share = _between(list(table), at)
    return table[low] ** (1 - share) * table[high] ** share


def _between(places: Sequence[float], at: float) -> tuple[Any, Any, float]:
    """The two of the rising places around `at`, and how far it lies between them (0 to 1), in logarithms."""
    at = min(max(at, places[0]), places[-1])
    high = next(i for i, place in enumerate(places) if place >= at)
    low = max(0, high - 1) if places[high] > at else high
    span = math.log(places[high] / places[low]) if high > low else 0.0
    return places[low], places[high], math.log(at / places[low]) / span if span else 0.0
