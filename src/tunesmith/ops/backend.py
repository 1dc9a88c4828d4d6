"""Which kernels run: Triton's on an NVIDIA GPU of Ampere or later, plain PyTorch elsewhere; and the ops' one door to Triton.

    auto        Triton where it can run, else the reference; `why()` says which, and the reason
    triton      Triton or an error; on a CPU only in its interpreter (TRITON_INTERPRET=1, for tests: slow, fp32 and fp16 only)
    reference   plain PyTorch

The mode is one plain global, not a context variable: on a GPU a backward runs on autograd's own threads, which see no other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from tunesmith.errors import TunesmithError

try:
    import triton
    import triton.language as tl
except ImportError:  # no build for this machine (macOS, Windows): every op has its reference
    triton = tl = None

Mode = Literal["auto", "triton", "reference"]
MODES = ("auto", "triton", "reference")
NEEDS = (8, 0)  # Ampere: bf16 arithmetic
NEEDS_FP8 = (8, 9)  # Ada, Hopper, Blackwell: the conversion to e4m3 in hardware
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read here because @jit reads it when the ops are imported

_mode: Mode = "auto"


def jit(kernel):
    """`triton.jit`; without Triton the function as it is, which nobody then calls."""
    return kernel if triton is None else triton.jit(kernel)


def round_up(n: int) -> int:
    """The next power of two: block sizes must be."""
    return 1 << max(n - 1, 0).bit_length()


def warps_for(values: int) -> int:
    """How many warps share a row held in registers: 16 values a thread, which is two loads of 16 bytes in 16-bit types."""
    return min(16, max(1, values // 512))


def set_mode(mode: Mode) -> None:
    """For all of the process, from now on."""
    global _mode
    if mode not in MODES:
        raise TunesmithError(f"kernels: {mode!r} is none of {', '.join(MODES)}", "take auto")
    _mode = mode


@contextmanager
def use(mode: Mode) -> Iterator[None]:
    """`set_mode` for the body, then as before."""
    before = _mode
    set_mode(mode)
    try:
        yield
    finally:
        set_mode(before)


def triton_for(x: Tensor, needs: tuple[int, int] = NEEDS) -> bool:
    """Whether the Triton kernel runs for `x`; in mode `triton` a reason not to is an error. `needs`: the least capability."""
    if _mode == "reference":
        return False
    reason = obstacle(x.device, needs)
    if _mode == "triton" and reason:
        raise TunesmithError(
            f"kernels: triton cannot run here: {reason}", "set kernels to auto, or run on an NVIDIA GPU with triton"
        )
    return not reason and (x.is_cuda or _mode == "triton")


def asked() -> bool:
    """Whether kernels are asked for by name: `auto` takes those alone that have run on a card."""
    return _mode == "triton"


@cache
def obstacle(device: torch.device, needs: tuple[int, int] = NEEDS) -> str:
    """Why no Triton kernel can run on `device`, or ''."""
    if triton is None:
        return "triton is not installed"
    if INTERPRETED:
        return "" if device.type == "cpu" else "TRITON_INTERPRET=1 is set, which runs kernels on the CPU"
    if device.type != "cuda":
        return f"the tensors are on {device.type}, not on an NVIDIA GPU"
    if torch.version.hip:
        return "AMD GPUs are untested"
    found = torch.cuda.get_device_capability(device)
    if found < needs:
        return "the GPU has compute capability {}.{}, below {}.{}".format(*found, *needs)
    return ""


def why() -> str:
    """One line: what runs and for what reason."""
    if _mode == "reference":
        return "kernels: plain PyTorch (as asked)"
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if reason := obstacle(device):
        return f"kernels: plain PyTorch ({reason})"
    if device.type == "cuda":
        return f"kernels: Triton {triton.__version__} on {torch.cuda.get_device_name(device)}"
    if _mode == "triton":
        return f"kernels: Triton {triton.__version__} in its interpreter"
    return "kernels: plain PyTorch (no NVIDIA GPU)"


class Recorded:
    """Launches whose every argument stays where it is: run once, then captured as a CUDA graph, replayed from then on.

    A launch costs Python 20 to 27 us. A step of 2,048 tokens through a Mistral-7B on an H200 opens weights 256 times, two launches
    each: 181 and 189 ms without this, 145 and 132 with it, in turn in one process. `body` must allocate nothing.
    """

    def __init__(self, body: Callable[[], object]):
        self.body, self.graph, self.runs = body, None, 0

    def __call__(self) -> None:
        if torch.cuda.is_current_stream_capturing():  # part of a larger recording (train/replay.py)
            self.body()
        elif self.graph is not None:
            self.graph.replay()
        elif self.runs == 0:  # compiles and loads the kernels, which a capture may not
            self.runs = 1
            self.body()
        else:
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
            with torch.cuda.stream(stream):
                graph.capture_begin(capture_error_mode="thread_local")
                self.body()
                graph.capture_end()
            self.graph = graph
            graph.replay()
