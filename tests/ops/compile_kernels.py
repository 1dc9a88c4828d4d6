"""Compiles every kernel for an NVIDIA GPU that need not be here: python compile_kernels.py 90 [FOLDER for the PTX].

The ops are called as a step calls them, on CPU tensors; a stand-in for the driver names the target, and a launch stops after the
compilation. A kernel that Triton or ptxas refuses (a type, a layout, a conversion the target lacks) fails here, on any machine.
"""

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from tunesmith.ops import adamw8, backend, fp8, int8, linear_ce, low_rank, nf4, nucleus, rms_norm, rotary, swiglu

cast_fp8 = fp8.cast


def main(capability: int, folder: str | None = None) -> None:
    target = GPUTarget("cuda", capability, 32)
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
        )
    )  # fmt: skip
    backend.obstacle = lambda device, needs=backend.NEEDS: "" if needs <= divmod(capability, 10) else "too old"
    run, count = JITFunction.run, itertools.count()

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        name = f"{self.fn.__module__.rsplit('.', 1)[-1]}.{self.fn.__name__}"
        print(name, len(kernel.asm["cubin"]))
        if folder:
            (Path(folder) / f"{next(count):03d}.{name}.ptx").write_text(kernel.asm["ptx"])

    JITFunction.run = compile_only
    with backend.use("triton"):
        call_all(torch.bfloat16, fp8=capability >= 89, odd=capability == 90)


def call_all(
    dtype: torch.dtype, fp8: bool, odd: bool, tokens: int = 2, width: int = 4096, hidden: int = 14336, vocab: int = 32000
) -> None:
    """Each kernel at Mistral-7B's widths, and where asked at odd ones."""
    e4m3 = torch.float8_e4m3fn
    for rows, columns in ((16, width), (3, 70))[: 1 + odd]:
        q = nf4.quantise(torch.randn(rows, columns))
        plain = nf4.NF4(q.codes, nf4.absmax_of(q), None, None, None, q.shape)
        side_by_side = nf4.NF4(q.codes, q.absmax, q.nested_absmax, q.nested_map, q.offset.repeat(len(q.nested_absmax)), q.shape)
        nf4.decode(q, torch.empty(rows, columns, dtype=dtype))
        nf4.decode(side_by_side, torch.empty(rows, columns + 16, dtype=dtype)[:, :columns])
        nf4.decode(plain, torch.empty(rows, columns, dtype=dtype))
        if fp8:
            nf4.decode_fp8(q, torch.ones(rows), torch.empty(rows, columns, dtype=e4m3))
            nf4.decode_fp8_transposed(q, torch.ones(columns), torch.empty(columns, rows, dtype=e4m3))
            cast_fp8(torch.empty(rows, columns, dtype=dtype), torch.ones(rows), torch.empty(rows, columns, dtype=e4m3), False)
            cast_fp8(torch.empty(rows, columns, dtype=dtype), torch.ones(columns), torch.empty(columns, rows, dtype=e4m3), True)
    for d, f, v in ((width, hidden, vocab), (33, 35, 101))[: 1 + odd]:
        x, weight = torch.randn(tokens, d, dtype=dtype), torch.ones(d, dtype=dtype)
        h, rstd = rms_norm.forward(x, weight, 1e-5)
        rms_norm.backward(h, x, weight, rstd)
        rms_norm.backward(h, x, weight, rstd, x, x)
        both = torch.randn(tokens, 2 * f, dtype=dtype)
        a = swiglu.forward(both)
        int8.dequantise_groups(*int8.quantise_groups(both), both)
        swiglu.backward_(a, both)
        low, b = torch.randn(tokens, 64, dtype=dtype)[:, :32], torch.randn(2 * f, 64, dtype=dtype)[:, :32]
        a_fr = torch.randn(16, f, dtype=dtype).t()
        swiglu.forward(both, a, low=(low, b))
        swiglu.backward_(a, both, low=(low, b), low_da=(low[:, :16], a_fr))
        swiglu.backward_(a, both, low=(low, b))
        logits = torch.randn(tokens, v, dtype=dtype)
        linear_ce.softmax_ce_(logits, torch.zeros(tokens, dtype=torch.int64))
        linear_ce.softmax_ce_(logits, torch.zeros(tokens, dtype=torch.int64), gradient=False)
        if fp8:
            rms_norm.forward_fp8(x, weight, 1e-5)
            rms_norm.backward(h, x, weight, rstd, x, x, fp8_rows(x))
            swiglu.forward_fp8(both)
            swiglu.forward(both, a, low=(low, b), quantised=fp8_rows(a))
            swiglu.backward_(a, both, low=(low, b), low_da=(low[:, :16], a_fr), quantised=fp8_rows(both))
            quantise_rows(x), quantise_rows(both)
    for weight in (torch.randn(width, 3, dtype=dtype), torch.randn(width)):
        place = torch.ones(()), torch.ones(2), torch.ones(2, dtype=torch.int32)
        adamw8.update_(weight, weight.clone(), adamw8.Averages.of(weight), adamw8.How(1e-3, (0.9, 0.999)), *place)
    nucleus.pick(torch.rand(tokens, 128_256), [0.9] * tokens, torch.zeros(tokens, dtype=torch.float64))
    angle = torch.zeros(tokens, 64)
    parts = [torch.empty(tokens, n, 128, dtype=dtype) for n in (32, 8, 8)]
    rotary.split(torch.randn(tokens, 48 * 128, dtype=dtype), 32, angle, angle, *parts)
    of_qkv = torch.randn(tokens, 64, dtype=dtype), torch.randn(48 * 128, 64, dtype=dtype)
    rotary.split(torch.randn(tokens, 48 * 128, dtype=dtype), 32, angle, angle, *parts, of_qkv)
    rotary.split(torch.randn(tokens, 48 * 128, dtype=dtype), 32, angle[:, :20], angle[:, :20], *parts, of_qkv)
    rotary.join(*parts, angle[:, :20], angle[:, :20], torch.empty(tokens, 48 * 128 + 64, dtype=dtype)[:, : 48 * 128])
    a, b = torch.randn(16, width), torch.randn(width, 16)
    matrix = torch.empty(2 * width + 64, width + 64, dtype=dtype)
    two = [(a, b, 0.5, slice(0, width), slice(0, 16)), (a, b, 2.0, slice(width, 2 * width), slice(16, 32))]
    low_rank.place(two, matrix[2 * width :, :width], matrix[: 2 * width, width:])
    x, low = torch.randn(tokens, width, dtype=dtype), torch.randn(tokens, 64, dtype=dtype)
    low_rank.residual(x, low, matrix[:width, width:], torch.empty_like(x))
    low_rank.residual(x, low, matrix[:width, width:], torch.empty_like(x), x)
    low_rank.add_(x, (low[:, :16], matrix[2 * width : 2 * width + 16, :width].t()))
    rotary.rotate_(torch.randn(tokens, 48, 128, dtype=dtype)[:, :32], angle, angle)
    rotary.rotate_into(h[:, None, :21], angle[:, :10], angle[:, :10], torch.empty(tokens, 1, 21, dtype=dtype), inverse=True)


quantise_rows, fp8_rows = fp8.quantise_rows, fp8.empty_rows

if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
