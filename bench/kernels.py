"""Times each kernel at Mistral-7B's shapes and prints what share of the card's own copy rate it reaches.

    python bench/kernels.py [--tokens 8192]

Medians of triton.testing.do_bench, which flushes L2 between runs. Bytes are what a kernel must read and write once; the second read
of a row that a two-pass kernel finds in L2 is not counted.
"""

from __future__ import annotations

import argparse

import torch
from triton.testing import do_bench

from tunesmith.ops import backend, fp8, int8, linear_ce, low_rank, nf4, rms_norm, rotary, swiglu

D, F, QKV, VOCAB = 4096, 14336, 6144, 32000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192)
    tokens = parser.parse_args().tokens
    backend.set_mode("triton")
    print(backend.why())
    copy = copy_rate()
    print(f"{'a copy of 1 GiB':32} {'':>9} {copy / 1e12:6.2f} TB/s")
    for name, nbytes, call in cases(tokens):
        seconds = time(call)
        print(f"{name:32} {seconds * 1e6:7.1f} us {nbytes / seconds / 1e12:6.2f} TB/s {nbytes / seconds / copy:5.0%} of a copy")


def copy_rate() -> float:
    """Bytes read and written a second by torch's copy of 1 GiB on the device."""
    source = torch.empty(1 << 29, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / time(lambda: target.copy_(source))


def time(call) -> float:
    return do_bench(call, warmup=25, rep=100, return_mode="median") / 1e3


def cases(t: int):
    """(name, bytes, call) of each kernel."""

    def randn(*shape):
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    def e4m3(*shape):
        return torch.empty(shape, device="cuda", dtype=fp8.E4M3)

    hardware = torch.cuda.get_device_capability() >= backend.NEEDS_FP8
    for label, n, k in (("qkv", QKV, D), ("o", D, D), ("gate-up", 2 * F, D), ("down", D, F)):
        q, out = nf4.quantise(randn(n, k)), torch.empty(n, k, device="cuda", dtype=torch.bfloat16)
        yield f"nf4.decode {label}", q.nbytes + out.nbytes, lambda q=q, out=out: nf4.decode(q, out)
        if hardware:
            rows, columns = (x / 448 for x in nf4.absmax_rows_columns(q))
            out = e4m3(n, k)
            yield f"nf4.decode_fp8 {label}", q.nbytes + out.nbytes, lambda q=q, s=rows, o=out: nf4.decode_fp8(q, s, o)
            out = e4m3(k, n)
            yield (
                f"nf4.decode_fp8_transposed {label}",
                q.nbytes + out.nbytes,
                lambda q=q, s=columns, o=out: nf4.decode_fp8_transposed(q, s, o),
            )

    x, weight, residual = randn(t, D), randn(D), randn(t, D)
    h, rstd = rms_norm.forward(x, weight, 1e-5)
    yield "rms_norm.forward", 4 * t * D, lambda: rms_norm.forward(x, weight, 1e-5, h)
    yield "rms_norm.backward + residual", 8 * t * D, lambda: rms_norm.backward(h, x, weight, rstd, residual, residual)
    fused, angle = randn(t, QKV), torch.rand(t, 64, device="cuda")
    heads = fused[:, : 40 * 128].view(t, 40, 128)
    cos, sin = angle.cos(), angle.sin()
    yield "rotary.rotate_ q and k", 4 * heads.numel() + 512 * t, lambda: rotary.rotate_(heads, cos, sin)
    both, a = randn(t, 2 * F), randn(t, F)
    yield "swiglu.forward", 6 * t * F, lambda: swiglu.forward(both, a)
    yield "swiglu.backward_", 12 * t * F, lambda: swiglu.backward_(a, both)
    codes, scale = int8.quantise_groups(both)
    yield "int8.quantise_groups", both.nbytes + codes.nbytes + scale.nbytes, lambda: int8.quantise_groups(both)
    yield (
        "int8.dequantise_groups",
        both.nbytes + codes.nbytes + scale.nbytes,
        lambda: int8.dequantise_groups(codes, scale, both),
    )
    if hardware:
        yield "rms_norm.forward_fp8", 5 * t * D, lambda: rms_norm.forward_fp8(x, weight, 1e-5)
        yield "swiglu.forward_fp8", 7 * t * F, lambda: swiglu.forward_fp8(both)
        low, b = randn(t, 64)[:, :32], randn(2 * F, 64)[:, :32]
        low_da, a_FR, both8, a8 = randn(t, 64)[:, :16], randn(16, F).t(), fp8.empty_rows(both), fp8.empty_rows(a)
        yield "swiglu.forward + low", 10 * t * F, lambda: swiglu.forward(both, a, low=(low, b))
        yield "  to e4m3 too", 11 * t * F, lambda: swiglu.forward(both, a, low=(low, b), quantised=a8)
        yield "swiglu.backward_ + low", 12 * t * F, lambda: swiglu.backward_(a, both, low_da=(low_da, a_FR))
        yield (
            "  to e4m3 too",
            14 * t * F,
            lambda: swiglu.backward_(a, both, low_da=(low_da, a_FR), quantised=both8),
        )
        parts = [randn(t, n, 128) for n in (32, 8, 8)]
        yield "rotary.split", 4 * t * QKV, lambda: rotary.split(fused, 32, cos, sin, *parts)
        yield "rotary.split + low", 4 * t * QKV, lambda: rotary.split(fused, 32, cos, sin, *parts, (low, b[:QKV]))
        x8 = fp8.empty_rows(x)
        yield "rms_norm.backward to e4m3 too", 9 * t * D, lambda: rms_norm.backward(h, x, weight, rstd, x, x, x8)
        yield f"low_rank.add_ {D}", 4 * t * D, lambda: low_rank.add_(x, (low, b[:D]))
        yield f"fp8.quantise_rows {D}", 3 * t * D, lambda: fp8.quantise_rows(x)
        yield f"fp8.quantise_rows {2 * F}", 6 * t * F, lambda: fp8.quantise_rows(both)
    labels = torch.randint(VOCAB, (1024,), device="cuda")
    logits = randn(1024, VOCAB)
    yield "linear_ce.softmax_ce_ 32000", 2 * logits.nbytes, lambda: linear_ce.softmax_ce_(logits, labels)
    large = randn(512, 128256)
    yield "linear_ce.softmax_ce_ 128256", 2 * large.nbytes, lambda: linear_ce.softmax_ce_(large, labels[:512])


if __name__ == "__main__":
    main()
