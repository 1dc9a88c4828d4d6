"""What the card does by itself (rates, host link), and where a step of ours spends its time (profile). Run by gpu_arms.py."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gpu_limits import Rates, Shapes, classes
from gpu_rows import CONFIGS, ROWS, data, tiny

SKINNY = 64  # a matrix product with a side up to this is LoRA's
# class -> what its kernels' names hold, tried in this order; names of the product's Triton kernels belong here too
KERNELS = {
    "attention": r"flash|fmha|sdpa|attention|_attn|cudnn.*(fort|mha)",
    "decode": r"nf4|dequant|decode|kDequantize",
    "quantise": r"quantis|quantiz|to_fp8|cast.*e4m3|amax",
    "norm": r"rms|layer_?norm",
    "swiglu": r"swiglu|silu|glu_",
    "rope": r"rope|rotary|rotate",
    "LoRA": r"lora|skinny|low_rank",
    "cross-entropy": r"cross_entropy|log_?softmax|nll|linear_ce|softmax",
    "optimiser": r"adam|optim|multi_tensor|lpnorm|foreach",
    "GEMM": r"gemm|nvjet|cutlass|xmma|cublas|splitk|_mm_|matmul",
    "copies": r"memcpy|memset|copy|catarray|fill",
}
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::_scaled_mm", "aten::linear", "aten::matmul")


def seconds(work: Callable[[], Any], repeat: int = 20) -> float:
    """Mean time of `work` on the GPU."""
    import torch

    for _ in range(3):
        work()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeat):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeat / 1e3


def rates(task: dict[str, Any]) -> dict[str, Any]:
    """Copy in TB/s (bytes read and written), matrix products in TFLOP/s, at 8192^3 and at a layer's own shapes; cuDNN attention."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    found: dict[str, Any] = {
        "card": torch.cuda.get_device_name(),
        "memory_GiB": torch.cuda.get_device_properties(0).total_memory / 2**30,
    }

    def put(name: str, work: Callable[[], Any], amount: float) -> None:
        found[name] = round(amount / seconds(work) / 1e12, 3)

    x, y = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    put("copy_tbs", partial(y.copy_, x), 2 * x.numel())

    def matrix(rows: int, columns: int) -> Any:
        return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)

    def products(shapes: list[tuple[int, int, int]]) -> tuple[Callable, Callable, float]:
        pairs = [(matrix(m, k), matrix(n, k)) for m, n, k in shapes]
        small = [(a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)) for a, b in pairs]
        scales = [(torch.ones(len(a), 1, device="cuda"), torch.ones(1, len(b), device="cuda")) for a, b in pairs]

        def bf16() -> None:
            for a, b in pairs:
                a @ b.t()

        def fp8() -> None:
            for (a, b), (sa, sb) in zip(small, scales, strict=True):
                torch._scaled_mm(a, b.t(), scale_a=sa, scale_b=sb, out_dtype=torch.bfloat16, use_fast_accum=True)

        return bf16, fp8, sum(2.0 * m * n * k for m, n, k in shapes)

    layer = [(8192, 6144, 4096), (8192, 4096, 4096), (8192, 28672, 4096), (8192, 4096, 14336)]  # 4 x 2048 tokens of a 7B
    for name, shapes in (("gemm", [(8192, 8192, 8192)]), ("layer", layer)):
        bf16, fp8, work = products(shapes)
        put(f"{name}_bf16_tflops", bf16, work)
        if torch.cuda.get_device_capability() >= (8, 9):
            put(f"{name}_fp8_tflops", fp8, work)
    for batch, seq in ((4, 2048), (1, 8192)):
        try:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                forward, backward = attention_passes(batch, seq)
                work = 2.0 * batch * seq * seq * 32 * 128
                put(f"attention_{seq}_forward_tflops", forward, work)
                put(f"attention_{seq}_backward_tflops", backward, 2.5 * work)
        except RuntimeError as e:
            found["attention"] = f"cuDNN: {str(e)[:100]}"
    return found


def attention_passes(batch: int, seq: int) -> tuple[Callable, Callable]:
    """Causal attention of 32 heads of 128: its forward and its backward."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v, d = (torch.randn(batch, 32, seq, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(4))
    y = scaled_dot_product_attention(q, k, v, is_causal=True)
    forward = partial(scaled_dot_product_attention, q, k, v, is_causal=True)
    return forward, partial(torch.autograd.grad, y, (q, k, v), d, retain_graph=True)


def link(task: dict[str, Any]) -> dict[str, Any]:
    """GB/s between pinned host memory and the card: each way alone, both at once, and while a matrix product runs."""
    import time

    import torch

    size = 1 << 30
    host_in, host_out = (torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2))
    card_in, card_out = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    streams = {name: torch.cuda.Stream() for name in ("to_card", "to_host", "gemm")}
    host_in.fill_(1)
    host_out.fill_(1)
    torch.mm(a, a)

    def go(names: tuple[str, ...], repeat: int = 8) -> dict[str, float]:
        work = {
            "to_card": lambda: card_in.copy_(host_in, non_blocking=True),
            "to_host": lambda: host_out.copy_(card_out, non_blocking=True),
            "gemm": lambda: torch.mm(a, a),
        }
        spans, count = {}, {name: repeat * (20 if name == "gemm" else 1) for name in names}
        torch.cuda.synchronize()
        start = time.perf_counter()
        for name in names:
            with torch.cuda.stream(streams[name]):
                first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                first.record()
                for _ in range(count[name]):
                    work[name]()
                last.record()
                spans[name] = first, last
        torch.cuda.synchronize()
        wall = time.perf_counter() - start
        out = {"wall_s": round(wall, 3)}
        for name, (first, last) in spans.items():
            took = first.elapsed_time(last) / 1e3
            out[name] = round(count[name] * (2 * 8192**3 / 1e12 if name == "gemm" else size / 1e9) / took, 1)
        return out

    go(("to_card", "to_host", "gemm"))
    cases = {
        "to card": ("to_card",), "to host": ("to_host",), "both at once": ("to_card", "to_host"), "gemm alone": ("gemm",),
        "to card, under a gemm": ("to_card", "gemm"), "to host, under a gemm": ("to_host", "gemm"),
        "both, under a gemm": ("to_card", "to_host", "gemm"),
    }  # fmt: skip
    return {"card": torch.cuda.get_device_name(), "link": {name: go(names) for name, names in cases.items()}}


# ---- the profile of our step -----------------------------------------------------------------------------------------------------


def class_of(kernel: str) -> str:
    """Which class of work a kernel's name belongs to; `other` where nothing is known."""
    low = kernel.lower()
    return next((name for name, pattern in KERNELS.items() if re.search(pattern, low)), "other")


def skinny(operation: str, shapes: list) -> bool:
    """Whether a matrix product is one of LoRA's: one of its sides is at most SKINNY."""
    sides = [s for shape in shapes if isinstance(shape, (list, tuple)) and len(shape) >= 2 for s in shape[-2:]]
    return operation in PRODUCTS and bool(sides) and min(sides) <= SKINNY


def sorted_by_class(events: Any) -> tuple[dict[str, dict[str, list]], dict[str, dict[str, list]]]:
    """({class: {kernel: [microseconds, calls]}}, the same of `other` by the operation that launched it)."""
    from torch.autograd import DeviceType

    total: dict[str, list] = defaultdict(lambda: [0.0, 0])
    small: dict[str, list] = defaultdict(lambda: [0.0, 0])
    launched: dict[str, str] = {}
    for event in events:
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            total[event.name][0] += event.device_time_total
            total[event.name][1] += 1
        elif event.device_type == DeviceType.CPU:
            for kernel in getattr(event, "kernels", ()):
                launched[kernel.name] = event.name
                if skinny(event.name, event.input_shapes or []):
                    small[kernel.name][0] += kernel.duration
                    small[kernel.name][1] += 1
    out: dict[str, dict[str, list]] = defaultdict(dict)
    for name, (us, calls) in total.items():
        kind, (s_us, s_calls) = class_of(name), small.get(name, (0.0, 0))
        if kind in ("GEMM", "other") and s_calls:
            out["LoRA"][name] = [s_us, s_calls]
            us, calls = us - s_us, calls - s_calls
        if calls > 0:
            out[kind][name] = [us, calls]
    return out, {name: launched.get(name, "") for name in out.get("other", {})}


def profile(task: dict[str, Any]) -> dict[str, Any]:
    """Our step on a row under torch's profiler: kernels in classes, beside the time each class takes at the card's full rate."""
    import torch
    from gpu_arms import Ours, default_knobs

    row = ROWS[task["row"]]
    row = tiny(row) if task["tiny"] else row
    steps = data(row, 5, Path(task["gsm8k"]) if task["gsm8k"] else None, CONFIGS[row.model]["vocab_size"])
    run = Ours(row, Path(task["checkpoint"]), default_knobs(row, task["arm"], task["budget_gib"]) | task["knobs"])
    for step in steps[:-1]:
        run(step)
    cuda = torch.cuda.is_available()
    kinds = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if cuda else [])
    with torch.profiler.profile(activities=kinds, record_shapes=True) as found:
        run(steps[-1])
        if cuda:
            torch.cuda.synchronize()
    table, other = sorted_by_class(found.events())
    shapes = Shapes.of(CONFIGS[row.model])
    how = {"fp8": run.applied.get("compute") == "fp8", "store": row.store}
    full = classes(
        shapes, Rates.of(task["rates"], row.seq), "keep" if row.policy == "keep" else "ckpt", steps[-1].tokens, row.seq, **how
    )
    kinds_ms = {kind: sum(us for us, _ in kernels.values()) / 1e3 for kind, kernels in table.items()}
    lines = ["| class | ms | calls | at full rate, ms |", "|---|---|---|---|"]
    for kind in sorted(set(kinds_ms) | set(full), key=lambda k: -kinds_ms.get(k, 0.0)):
        calls = sum(n for _, n in table.get(kind, {}).values())
        lines.append(f"| {kind} | {kinds_ms.get(kind, 0.0):.2f} | {calls} | {full[kind] * 1e3:.2f} |" if kind in full else
                     f"| {kind} | {kinds_ms.get(kind, 0.0):.2f} | {calls} | |")  # fmt: skip
    lines.append(f"| all | {sum(kinds_ms.values()):.2f} | | {sum(full.values()) * 1e3:.2f} |")
    largest = sorted(((us, n, kind, name) for kind, kernels in table.items() for name, (us, n) in kernels.items()), reverse=True)[
        :40
    ]
    lines += ["", "largest kernels: ms, calls, class, name"]
    lines += [f"{us / 1e3:9.2f} {n:6} {kind:14} {name[:90]} {other.get(name, '')}" for us, n, kind, name in largest]
    print("\n".join(lines), flush=True)
    ms = {name: round(value, 3) for name, value in kinds_ms.items()}
    least = {name: round(value * 1e3, 3) for name, value in full.items()}
    return {"applied": run.applied, "classes_ms": ms, "full_rate_ms": least, "text": "\n".join(lines)}
