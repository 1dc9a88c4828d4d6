"""Every kernel on an NVIDIA GPU at a model's sizes, in bf16, fp16 and e4m3, against its plain definition. Outputs start as NaN.

tests/ops runs the same kernels at odd sizes, there too on the GPU when there is one; bench/kernels.py times them.
"""

import pytest
import torch
from torch.testing import assert_close

from tunesmith.ops import backend, fp8, int8, linear_ce, low_rank, nf4, rms_norm, rotary, swiglu

pytestmark = pytest.mark.gpu
T, D, F = 8192, 4096, 14336  # Mistral-7B, 4 x 2048 tokens
HALVES = [torch.bfloat16, torch.float16]
needs_fp8 = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < backend.NEEDS_FP8, reason="no e4m3 hardware"
)


@pytest.fixture(autouse=True)
def kernels():
    torch.manual_seed(0)
    with backend.use("triton"):
        yield


def randn(*shape, dtype=torch.bfloat16, scale=1.0):
    return (torch.randn(shape, device="cuda") * scale).to(dtype)


def poisoned(*shape, dtype=torch.bfloat16, beside=0):
    """Full of NaN, as a view with `beside` more columns in its rows."""
    return torch.full((*shape[:-1], shape[-1] + beside), torch.nan, device="cuda").to(dtype)[..., : shape[-1]]


def same_bytes(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def plain(function, *args):
    with backend.use("reference"):
        return function(*args)


def within(a, b, steps=2, atol=1e-3):
    """Within `steps` of the last bit of `a`'s dtype."""
    assert_close(a.float(), b.float(), rtol=steps * torch.finfo(a.dtype).eps, atol=atol)


def test_auto_takes_the_kernels():
    with backend.use("auto"):
        assert backend.triton_for(torch.zeros(1, device="cuda")), backend.why()
        assert backend.why().startswith("kernels: Triton")


@pytest.mark.parametrize("shape", [(D, D), (2 * F, D), (D, F), (1024, D), (300, 4100), (257, 333)], ids=str)
def test_nf4_decode(shape):
    q = nf4.quantise(randn(*shape, scale=0.02))
    for dtype in (*HALVES, torch.float32):
        wanted = nf4.dequantise(q, dtype)
        for beside in (0, 16, 48 * 16):
            out = poisoned(*shape, dtype=dtype, beside=beside)
            assert torch.equal(nf4.decode(q, out), wanted)
            if beside:
                assert out._base[:, shape[1] :].isnan().all()


@needs_fp8
@pytest.mark.parametrize("shape", [(D, D), (2 * F, D), (D, F), (304, 4112), (257, 334)], ids=str)
def test_nf4_decode_to_e4m3(shape):
    q = nf4.quantise(randn(*shape, scale=0.02))
    rows, columns = nf4.absmax_rows_columns(q)
    dense = nf4.dequantise(q).abs()
    assert torch.equal(rows, dense.amax(1)) and torch.equal(columns, dense.amax(0))
    rows, columns = rows / 448, columns / 448
    wanted, turned = nf4.reference_decode_fp8(q, rows), nf4.reference_decode_fp8_transposed(q, columns)
    for beside in (0, 16):
        assert same_bytes(nf4.decode_fp8(q, rows, poisoned(*shape, dtype=fp8.E4M3, beside=beside)), wanted)
        assert same_bytes(
            nf4.decode_fp8_transposed(q, columns, poisoned(*shape[::-1], dtype=fp8.E4M3, beside=beside)), turned
        )  # fmt: skip


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("width", [D, 5120, 8192, 16384])
def test_rms_norm(dtype, width):
    x, dh, residual = (randn(T, width, dtype=dtype) for _ in range(3))
    weight = randn(width, dtype=dtype)
    h, rstd = rms_norm.forward(x, weight, 1e-5, poisoned(T, width, dtype=dtype, beside=64))
    wanted, wanted_rstd = plain(rms_norm.forward, x, weight, 1e-5)
    within(h, wanted)
    assert_close(rstd, wanted_rstd, rtol=2e-6, atol=0)
    wanted = plain(rms_norm.backward, dh, x, weight, rstd, residual)
    within(rms_norm.backward(dh, x, weight, rstd, residual, poisoned(T, width, dtype=dtype)), wanted)
    within(rms_norm.backward(dh, x, weight, rstd, residual, dh), wanted)


@needs_fp8
def test_rms_norm_with_e4m3():
    x, weight = randn(T, D), randn(D)
    h, rstd, h8, scale = rms_norm.forward_fp8(x, weight, 1e-5)
    plain_h, plain_rstd = rms_norm.forward(x, weight, 1e-5)
    within(h, plain_h)  # another number of warps adds up a row in another order
    assert_close(rstd, plain_rstd, rtol=2e-6, atol=0)
    wanted8, wanted = fp8.reference_quantise_rows(h)
    assert torch.equal(scale, wanted) and same_bytes(h8, wanted8)


@pytest.mark.parametrize("dtype", HALVES)
def test_rotary(dtype):
    fused = randn(T, 48 * 128, dtype=dtype)
    start, x = fused.clone(), fused[:, : 40 * 128].view(T, 40, 128)  # queries and keys of a fused product
    angle = torch.rand(T, 64, device="cuda") * 1e4
    cos, sin = angle.cos(), angle.sin()
    wanted = rotary.reference(x.float(), cos.to(dtype), sin.to(dtype))
    rotary.rotate_(x, cos, sin)
    within(x, wanted, 1, 2e-3)
    assert torch.equal(fused[:, 40 * 128 :], start[:, 40 * 128 :])
    out = poisoned(T, 40, 128, dtype=dtype)
    rotary.rotate_into(x, cos, sin, out, inverse=True)
    within(out, start[:, : 40 * 128].view(T, 40, 128), 4, 4e-2)  # the table's own rounding: its length is not 1


@pytest.mark.parametrize("dtype", HALVES)
def test_swiglu(dtype):
    both, da = randn(T, 2 * F, dtype=dtype, scale=3), randn(T, F, dtype=dtype)
    a = swiglu.forward(both, poisoned(T, F, dtype=dtype, beside=32))
    within(a, swiglu.reference(*both.chunk(2, -1)))
    wide = both.float()
    gate, up = wide.chunk(2, -1)
    s = gate.sigmoid()
    wanted = torch.cat([da.float() * up * s * (1 + gate * (1 - s)), da.float() * (gate * s).to(dtype).float()], 1)
    swiglu.backward_(da, both)
    assert torch.equal(da, a)
    within(both, wanted)


@needs_fp8
def test_swiglu_with_e4m3():
    for hidden in (F, 28672):
        both = randn(2048, 2 * hidden, scale=3)
        a, a8, scale = swiglu.forward_fp8(both)
        wanted8, wanted = fp8.reference_quantise_rows(a)
        assert torch.equal(a, swiglu.forward(both)) and torch.equal(scale, wanted) and same_bytes(a8, wanted8)


@needs_fp8
def test_low_rank_parts_are_added_in_the_kernels():
    """To the last bits as if they had been added in bf16 first; the same again to the bit; e4m3 as of what was written."""
    rows = 3000
    both, da = randn(rows, 2 * F), randn(rows, F)
    low, b = randn(rows, 64)[:, :32], randn(2 * F, 64, scale=0.2)[:, :32]
    low_da, a = randn(rows, 80)[:, 64:], randn(16, F, scale=0.2).t()
    whole, whole_da = low_rank.reference_added(both, (low, b)), low_rank.reference_added(da, (low_da, a))
    room = fp8.empty_rows(da)
    completed = both.clone()
    out = swiglu.forward(completed, poisoned(rows, F), low=(low, b), quantised=room)
    close_in_norm(completed, whole)
    assert torch.equal(out, swiglu.forward(completed))
    wanted8, wanted = fp8.reference_quantise_rows(out)
    assert torch.equal(room[1], wanted) and same_bytes(room[0], wanted8)
    again, again_da, room = both.clone(), da.clone(), fp8.empty_rows(both)
    swiglu.backward_(again_da, again, low=(low, b), low_da=(low_da, a), quantised=room)
    assert torch.equal(again_da, out)
    wanted8, wanted = fp8.reference_quantise_rows(again)
    assert torch.equal(room[1], wanted) and same_bytes(room[0], wanted8)
    swiglu.backward_(da, completed, low_da=(low_da, a))  # what is kept complete gives what is made again, to the bit
    assert torch.equal(completed, again)
    swiglu.backward_(whole_da, whole)
    close_in_norm(completed, whole)
    qkv, angle = randn(rows, 48 * 128), torch.rand(rows, 64, device="cuda") * 1e4
    parts, wanted = ([poisoned(rows, n, 128) for n in (32, 8, 8)] for _ in "ab")
    low, b = randn(rows, 64)[:, :48], randn(48 * 128, 64, scale=0.2)[:, :48]
    rotary.split(qkv, 32, angle.cos(), angle.sin(), *parts, (low, b))
    rotary.split(low_rank.reference_added(qkv, (low, b)), 32, angle.cos(), angle.sin(), *wanted)
    for x, y in zip(parts, wanted, strict=True):
        close_in_norm(x, y)
    x, weight, dh = randn(rows, D), randn(D), randn(rows, D)
    _, rstd = rms_norm.forward(x, weight, 1e-5)
    room = fp8.empty_rows(x)
    dx = rms_norm.backward(dh, x, weight, rstd, x, quantised=room)
    within(dx, rms_norm.backward(dh, x, weight, rstd, x))
    wanted8, wanted = fp8.reference_quantise_rows(dx)
    assert torch.equal(room[1], wanted) and same_bytes(room[0], wanted8)


def close_in_norm(a, b):
    """A sum that lies at the middle of two numbers rounds either way, and then one part in 256 differs: seldom."""
    assert a.isfinite().all() and ((a.float() - b.float()).norm() / b.float().norm()).item() < 1e-3


@needs_fp8
@pytest.mark.parametrize("width", [D, F, 2 * F])
def test_fp8_rows(width):
    x = randn(T, width + 16)[:, :width]
    x[3] = 0
    x8, scale = fp8.quantise_rows(x)
    wanted8, wanted = fp8.reference_quantise_rows(x)
    assert torch.equal(scale, wanted) and same_bytes(x8, wanted8)


@needs_fp8
@pytest.mark.parametrize("rows", [1, 17, 1000, T])
def test_fp8_product(rows):
    """Fast accumulation keeps 14 bits of partial sums: 1 % of the product's norm at most, where e4m3 itself costs 3.7 %."""
    (x8, sx), (w8, sw) = fp8.quantise_rows(randn(rows, D)), fp8.quantise_rows(randn(6144, D))
    assert fp8.supported("cuda") == ""
    y = fp8.matmul(x8, sx, w8, sw.flatten())
    wanted = fp8.reference_matmul(x8, sx, w8, sw.flatten(), torch.float32)
    assert y.dtype == torch.bfloat16
    assert ((y.float() - wanted).norm() / wanted.norm()).item() < 1e-2


@pytest.mark.parametrize("dtype", HALVES)
def test_int8_groups(dtype):
    x = randn(T, 2 * F, dtype=dtype)
    codes, scale = int8.quantise_groups(x)
    wanted = int8.reference_quantise_groups(x)
    assert torch.equal(codes, wanted[0]) and torch.equal(scale, wanted[1])
    out = int8.dequantise_groups(codes, scale, poisoned(T, 2 * F, dtype=dtype, beside=64))
    assert torch.equal(out, int8.reference_dequantise_groups(codes, scale, torch.empty_like(x)))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("vocab", [32000, 128256, 262144])
def test_softmax_and_its_gradient(dtype, vocab):
    logits, labels = randn(512, vocab, dtype=dtype, scale=4), torch.randint(vocab, (512,), device="cuda")
    wide = logits.float().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(wide, labels, reduction="none")
    (slope,) = torch.autograd.grad(wanted.sum(), wide)
    losses = linear_ce.softmax_ce_(logits, labels)
    assert_close(losses, wanted.detach(), rtol=1e-5, atol=1e-5)
    within(logits, slope, 2, 1e-6)


def test_the_loss_needs_no_wide_copy():
    """4,096 rows over 128,256 words: the chunk's logits once in bf16, and d_x; never an fp32 copy of them."""
    x, w = randn(4096, D, scale=0.1).requires_grad_(), randn(128256, D, scale=0.1)
    labels = torch.randint(128256, (4096,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    total, _ = linear_ce.linear_cross_entropy(x, w, labels)
    total.backward()
    chunk = linear_ce.rows_at_once(x, 128256) * 128256 * 2
    assert torch.cuda.max_memory_allocated() - before < 1.5 * chunk + 4 * x.numel() * 2  # and cuBLAS' workspace
    y = x.detach().requires_grad_()
    with backend.use("reference"):
        wanted, _ = linear_ce.linear_cross_entropy(y, w, labels)
        wanted.backward()
    assert_close(total, wanted, rtol=1e-5, atol=0)
    assert ((x.grad.float() - y.grad.float()).norm() / y.grad.float().norm()).item() < 5e-3


def test_offsets_past_two_to_the_31():
    """4.3 G numbers: row offsets must be 64-bit."""
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB")
    rows = 160_000  # x 28672 = 4.6 G
    both = torch.zeros(rows, 2 * F, dtype=torch.bfloat16, device="cuda")
    both[-1] = 1
    a = swiglu.forward(both)
    assert (a[-1] == torch.nn.functional.silu(both[-1, :F])).all() and (a[-2] == 0).all()
    codes, _ = int8.quantise_groups(both)
    assert (codes[-1] >= 126).all() and not codes[-2].any()  # 126: the scale is rounded up to bf16
