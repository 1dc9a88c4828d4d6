"""What a card can do: a table of known ones, this machine's own, and `24GB` or `cpu` where no name is known. No torch.

Sizes are what `nvidia-smi` reports, in GiB. Rates are the makers' dense figures with float32 accumulation (data sheets and
architecture papers; half the "with sparsity" figure where only that is printed): bounds that no training reaches, see plan.py.
"""

from __future__ import annotations

import csv
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from tunesmith.errors import ConfigError, ModelError
from tunesmith.registry import did_you_mean

GIB = 1 << 30
Kind = Literal["cuda", "mps", "cpu"]


@dataclass(frozen=True, slots=True)
class Device:
    """Where a run computes. `free` is what it may take now; of a card that is not here, all of it."""

    name: str
    kind: Kind
    total: int  # bytes
    free: int  # bytes
    tflops: float  # 16-bit matrix products on a GPU, float32 on a CPU
    bandwidth: float  # GB/s of its memory
    bf16: bool
    fp8: bool = False
    local: bool = False  # found on this machine
    guessed: bool = False  # its rates are a guess, its memory is not
    link: float = 0.0  # GB/s each way between it and main memory; 0: it is main memory
    host: int = 0  # bytes of main memory that are free beside it; 0: not known

    def __str__(self) -> str:
        size = self.total / GIB
        return f"{self.name}, {size:.0f} GB" if f"{size:.0f} GB" not in self.name else self.name


class Card(NamedTuple):
    name: str
    gib: float
    tflops: float  # bf16, or fp16 where there is no bf16
    bandwidth: float
    bf16: bool = True
    fp8: bool = False
    link: float = 25.0  # GB/s each way to main memory: PCIe 4 x16; 50 is PCIe 5 x16, 12 is PCIe 3 x16 or PCIe 4 x8


# Rates of a card of which only the memory is known: a slow one of that size, so that the time is no promise.
UNKNOWN_TFLOPS, UNKNOWN_BANDWIDTH, UNKNOWN_LINK = 60.0, 450.0, 12.0
CORE_TFLOPS, CPU_BANDWIDTH = (
    0.05,
    25.0,
)  # float32 of one logical core with AVX2 at about 3 GHz, two threads a core; two DDR4 channels


def parse_device(text: str) -> Device:
    """`4090`, `a100-40`, `H200`, `m2-max`, `m4-pro-48GB`, `24GB`, `cpu`, `cpu-16GB`. ConfigError names the near card."""
    plain = _key(text)
    if plain == "cpu":
        return _cpu()
    if found := re.fullmatch(r"(cpu)?(\d+(?:\.\d+)?)(?:gb|gib|g)", plain):
        size = round(float(found[2]) * GIB)
        if size <= 0:
            raise ConfigError(f"--gpu {text}: no memory", "name a card (4090, a100-40, h200), a size (24GB) or cpu")
        if found[1]:
            return replace(_cpu(), total=size, free=size, local=False, name=f"a CPU with {found[2]} GB")
        return Device(
            f"a GPU with {found[2]} GB",
            "cuda",
            size,
            size,
            UNKNOWN_TFLOPS,
            UNKNOWN_BANDWIDTH,
            True,
            guessed=True,
            link=UNKNOWN_LINK,
        )
    if (mac := _apple(plain)) is not None:
        return mac
    if plain in CARDS:
        card = CARDS[plain]
        size = round(card.gib * GIB)
        return Device(card.name, "cuda", size, size, card.tflops, card.bandwidth, card.bf16, card.fp8, link=card.link)
    raise ConfigError(f"--gpu {text}: no such card is known", f"{_near(plain)}; or give its memory: 24GB")


def local_device(wanted: Literal["auto", "cuda", "cpu", "mps"] = "auto") -> Device:
    """This machine's: its first NVIDIA GPU (CUDA_VISIBLE_DEVICES counts), else the CPU. ModelError when `wanted` is not here."""
    if wanted in ("auto", "cuda"):
        if found := _nvidia():
            return found
        if wanted == "cuda":
            fix = "plan for a card by name (--gpu 4090), or set memory.device: cpu"
            raise ModelError("memory.device is cuda, but nvidia-smi finds no NVIDIA GPU here", fix)
    if wanted == "mps":
        if platform.system() != "Darwin" or platform.machine() != "arm64":
            raise ModelError("memory.device is mps, but this is no Mac with Apple silicon", "set memory.device: cpu")
        here = _cpu()
        free = min(here.free, round(metal_share(here.total) * here.total))
        return replace(here, name="Apple GPU", kind="mps", free=free, tflops=5.0, bandwidth=100.0, guessed=True)
    return _cpu()


def smallest_that_holds(gib: float) -> Card | None:
    """The smallest known card with at least this much memory; of equal ones the first in the table."""
    fitting = [card for card in TABLE if card.gib >= gib]
    return min(fitting, key=lambda card: card.gib) if fitting else None


# ---- NVIDIA ----------------------------------------------------------------------------------------------------------------------


def _nvidia(environ: Mapping[str, str] = os.environ) -> Device | None:
    query = "index,uuid,name,memory.total,memory.free,compute_cap"
    try:
        done = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"],
                              capture_output=True, text=True, timeout=10, check=True)  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return read_nvidia_smi(done.stdout, environ.get("CUDA_VISIBLE_DEVICES"))


def read_nvidia_smi(text: str, visible: str | None = None) -> Device | None:
    """The device that CUDA would call 0, from nvidia-smi's csv (index, uuid, name, total and free MiB, compute capability)."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if len(row) == 6]
    if visible is not None:
        first = visible.split(",")[0].strip()
        rows = [row for row in rows if row[0] == first or (first.startswith("GPU-") and row[1].startswith(first))]
    for _, _, name, total, free, capability in rows:
        try:
            size, left = int(total) << 20, int(free) << 20
        except ValueError:  # "[N/A]" of an integrated GPU that shares the host's memory
            continue
        known = CARDS.get(_key(name)) or _by_size(name, size / GIB)
        major = float(capability) if re.fullmatch(r"\d+\.\d+", capability) else 0.0
        bf16, fp8 = (major >= 8, major >= 8.9) if major else (known is None or known.bf16, known is not None and known.fp8)
        rates = (known.tflops, known.bandwidth) if known else (UNKNOWN_TFLOPS, UNKNOWN_BANDWIDTH)
        return Device(name.removeprefix("NVIDIA "), "cuda", size, left, *rates, bf16, fp8, local=True, guessed=known is None,
                      link=known.link if known else UNKNOWN_LINK, host=_memory()[1])  # fmt: skip
    return None


def _by_size(name: str, gib: float) -> Card | None:
    """`NVIDIA A100-SXM4-80GB`, `NVIDIA H100 80GB HBM3`: the known card whose words are all in the name, nearest in size."""
    words = set(re.findall(r"[a-z]+\d*|\d+[a-z]*", name.lower()))
    fitting = [
        c for c in TABLE if set(re.findall(r"[a-z]+\d*|\d+[a-z]*", _words(c.name))) <= words and abs(c.gib - gib) < 0.1 * gib
    ]
    return max(fitting, key=lambda c: (len(c.name), -abs(c.gib - gib))) if fitting else None


def _words(name: str) -> str:
    """A table name without its size, and without SXM, which the driver leaves out (it does say PCIe)."""
    return re.sub(r"\b(\d+ gb|sxm)\b", "", name.lower())


# ---- Apple -----------------------------------------------------------------------------------------------------------------------


def metal_share(total: int) -> float:
    """Of so many bytes of unified memory, what Metal lets a GPU use unless `iogpu.wired_limit_mb` says otherwise.

    Its recommendedMaxWorkingSetSize as people have read it: 11.84 of 16 GiB (github.com/AlexsJones/llmfit/pull/754), 17.76 of 24
    (github.com/sgl-project/sglang/pull/29949), 107.52 of 128 on two machines (github.com/antirez/ds4/pull/893). Sizes between 24
    and 128 GiB are taken to be as the small ones.
    """
    return 0.84 if total >= 128 * GIB else 0.74


def _apple(plain: str) -> Device | None:
    """`m1`, `m2max`, `m3ultra256`, `m4pro48gb`; without a size the smallest that is sold. None for no such name."""
    found = re.fullmatch(r"(?:apple)?(m\d)(pro|max|ultra)?(\d+)?(?:gb|g)?", plain)
    if not found or (name := f"{found[1]}{found[2] or ''}") not in APPLE:
        return None
    sizes, tflops, bandwidth = APPLE[name]
    if found[3] and int(found[3]) not in sizes:
        raise ConfigError(f"--gpu {plain}: that chip has no {found[3]} GB", f"name one of {', '.join(f'{n} GB' for n in sizes)}")
    total = int(found[3] or sizes[0]) * GIB
    words = f"Apple {found[1].upper()}{f' {found[2].title()}' if found[2] else ''} {total // GIB} GB"
    return Device(words, "mps", total, round(metal_share(total) * total), tflops, bandwidth, False, guessed=True)


# ---- CPU -------------------------------------------------------------------------------------------------------------------------


def _cpu() -> Device:
    total, free = _memory()
    cores = _cores()
    name = f"this CPU, {cores} {'core' if cores == 1 else 'cores'}"
    return Device(name, "cpu", total, free, CORE_TFLOPS * cores, CPU_BANDWIDTH, bf16=False, local=True, guessed=True)


def _cores() -> int:
    """Cores this process may use: the affinity mask and the container's quota count."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _first_line("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit() and int(quota[1]):
        cores = min(cores, max(1, round(int(quota[0]) / int(quota[1]))))
    return max(1, cores)


def _memory() -> tuple[int, int]:
    """(all, available) bytes of main memory; a container's limit counts. 8 GiB where no system call answers."""
    total, free = 8 * GIB, 0
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    elif platform.system() == "Windows":
        total, free = _windows_memory()
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        free = int(found[1]) << 10 if found else free
    except OSError:
        pass
    free = free or total * 3 // 4  # macOS: what the system and open programs leave, roughly
    limit = _first_line("/sys/fs/cgroup/memory.max")
    if limit.isdigit():
        used = _first_line("/sys/fs/cgroup/memory.current")
        total = min(total, int(limit))
        free = min(free, int(limit) - (int(used) if used.isdigit() else 0))
    return total, max(0, min(free, total))


def _windows_memory() -> tuple[int, int]:
    import ctypes

    class Status(ctypes.Structure):  # MEMORYSTATUSEX
        _fields_ = (("length", ctypes.c_ulong), ("load", ctypes.c_ulong), ("total", ctypes.c_ulonglong),
                    ("free", ctypes.c_ulonglong), ("rest", ctypes.c_ulonglong * 5))  # fmt: skip

    status = Status(length=ctypes.sizeof(Status))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
    return status.total, status.free


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text().split("\n")[0].strip()
    except OSError:
        return ""


# ---- the table -------------------------------------------------------------------------------------------------------------------


def _key(text: str) -> str:
    """What names are compared by: `NVIDIA GeForce RTX 4090` and `4090` are one."""
    plain = re.sub(r"nvidia|geforce|tesla|laptop gpu|\brtx\b|rtx(?=\d)|[\s_-]+", " ", text.lower())
    return plain.replace(" ", "")


def _near(plain: str) -> str:
    hint = did_you_mean(plain, [*CARDS, *APPLE])
    return hint if hint.startswith("did") else f"known: {', '.join(sorted(CARDS))}"


TABLE = (
    Card("RTX 3060", 12, 25.6, 360),
    Card("RTX 3070", 8, 40.6, 448),
    Card("RTX 3080", 10, 59.5, 760),
    Card("RTX 3090", 24, 71, 936),
    Card("RTX 3090 Ti", 24, 80, 1008),
    Card("RTX 4060", 8, 30, 272, fp8=True, link=12),
    Card("RTX 4060 Ti 16 GB", 16, 44, 288, fp8=True, link=12),
    Card("RTX 4070", 12, 58, 504, fp8=True),
    Card("RTX 4070 Ti Super", 16, 88, 672, fp8=True),
    Card("RTX 4080", 16, 97.5, 717, fp8=True),
    Card("RTX 4090", 24, 165, 1008, fp8=True),
    Card("RTX 5060 Ti 16 GB", 16, 47, 448, fp8=True),
    Card("RTX 5070", 12, 62, 672, fp8=True, link=50),
    Card("RTX 5070 Ti", 16, 88, 896, fp8=True, link=50),
    Card("RTX 5080", 16, 112, 960, fp8=True, link=50),
    Card("RTX 5090", 32, 209, 1792, fp8=True, link=50),
    Card("RTX 2080 Ti", 11, 54, 616, bf16=False, link=12),
    Card("RTX A4000", 16, 77, 448),
    Card("RTX A5000", 24, 111, 768),
    Card("RTX A6000", 48, 155, 768),
    Card("RTX 5000 Ada", 32, 131, 576, fp8=True),
    Card("RTX 6000 Ada", 48, 182, 960, fp8=True),
    Card("RTX PRO 6000", 96, 503, 1792, fp8=True, link=50),
    Card("T4", 15, 65, 320, bf16=False, link=12),
    Card("V100 16 GB", 16, 125, 900, bf16=False, link=12),
    Card("V100 32 GB", 32, 125, 900, bf16=False, link=12),
    Card("A10", 22.5, 125, 600),
    Card("A10G", 22.5, 70, 600),
    Card("A30", 24, 165, 933),
    Card("A40", 45, 150, 696),
    Card("A100 40 GB", 40, 312, 1555),
    Card("A100 80 GB", 80, 312, 2039),
    Card("L4", 22.5, 121, 300, fp8=True),
    Card("L40", 45, 181, 864, fp8=True),
    Card("L40S", 45, 362, 864, fp8=True),
    Card("H100 PCIe", 79.6, 756, 2039, fp8=True, link=50),
    Card("H100 SXM", 79.6, 989, 3350, fp8=True, link=50),
    Card("H100 NVL", 93.6, 835, 3938, fp8=True, link=50),
    Card("GH200", 95.6, 989, 4000, fp8=True, link=200),
    Card("H200", 140.4, 989, 4800, fp8=True, link=55),  # its link: measured, from and to pinned memory
    Card("B200", 179, 2250, 8000, fp8=True, link=50),
)
APPLE: dict[str, tuple[tuple[int, ...], float, float]] = {  # GB sold, float32 TFLOP/s with all cores, GB/s
    "m1": ((8, 16), 2.6, 68), "m1pro": ((16, 32), 5.2, 200), "m1max": ((32, 64), 10.4, 400), "m1ultra": ((64, 128), 20.8, 800),
    "m2": ((8, 16, 24), 3.6, 100), "m2pro": ((16, 32), 6.8, 200), "m2max": ((32, 64, 96), 13.6, 400),
    "m2ultra": ((64, 128, 192), 27.2, 800), "m3": ((8, 16, 24), 4.1, 100), "m3pro": ((18, 36), 7.4, 150),
    "m3max": ((36, 48, 64, 96, 128), 16.0, 400), "m3ultra": ((96, 256, 512), 32.0, 819), "m4": ((16, 24, 32), 4.3, 120),
    "m4pro": ((24, 48, 64), 9.2, 273), "m4max": ((36, 48, 64, 128), 18.4, 546),
}  # fmt: skip
_NAMED = {_key(card.name): card for card in TABLE}
CARDS: dict[str, Card] = {  # as a person types it; without a size, the smaller one is meant
    **{key.removesuffix("gb"): card for key, card in _NAMED.items()},
    **_NAMED,
    "a100": _NAMED["a10040gb"],
    "v100": _NAMED["v10016gb"],
    "h100": _NAMED["h100sxm"],
    "h10080": _NAMED["h100sxm"],
    "4060ti": _NAMED["4060ti16gb"],
    "5060ti": _NAMED["5060ti16gb"],
    "4070tis": _NAMED["4070tisuper"],
}
