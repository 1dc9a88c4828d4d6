"""Rotary: the written-once rotation equals the definition and turns back; tables are chosen per document."""

import math

import pytest
import torch
from torch.testing import assert_close

from tunesmith.ops import backend
from tunesmith.ops import rotary as op
from tunesmith.ops.rotary import frequencies, reference, rotate, tables
from tunesmith.spec import Rope

FACTORS = {"short_factor": (1.0, 2.0), "long_factor": (3.0, 4.0), "original_max_position_embeddings": 8}
LONG = Rope(kind="longrope", scaling=(*FACTORS.items(), ("factor", None), ("attention_factor", None)))
DYNAMIC = Rope(kind="dynamic", scaling=(("factor", 2.0),))


@pytest.mark.parametrize("width", [8, 11])  # 11: three numbers of a head are not rotated
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rotate_equals_the_definition_and_its_backward_turns_back(width, dtype):
    x = torch.randn(5, 3, width, dtype=dtype, requires_grad=True)
    angle = torch.randn(5, 4)
    cos, sin = angle.cos(), angle.sin()
    y = rotate(x, cos, sin)
    assert torch.equal(y, reference(x, cos, sin))
    (theirs,) = torch.autograd.grad(reference(x, cos, sin), x, dy := torch.randn_like(y))
    assert_close(torch.autograd.grad(y, x, dy)[0], theirs)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(lambda x: rotate(x, cos.double(), sin.double()), x)


def test_a_pair_turns_by_position_times_frequency():
    freq, gain = frequencies(Rope(theta=100.0), 4, 64, 10)
    assert_close(freq, torch.tensor([1.0, 0.1]))
    assert gain == 1.0
    cos, sin = tables(Rope(theta=100.0), 4, 64, torch.tensor([0, 3]), [2], None, torch.float32)
    x = torch.tensor([[[1.0, 0.0, 0.0, 0.0]]]).expand(2, 1, 4)
    assert_close(rotate(x, cos, sin)[1, 0], torch.tensor([math.cos(3.0), 0.0, math.sin(3.0), 0.0]))


@pytest.mark.parametrize("rope", [LONG, DYNAMIC], ids=lambda r: r.kind)
def test_the_table_is_the_documents_own(rope):
    positions, documents = torch.cat([torch.arange(5), torch.arange(20)]), torch.tensor([0] * 5 + [1] * 20)
    cos, sin = tables(rope, 4, 16, positions, [5, 20], lambda: documents, torch.float32)
    short = tables(rope, 4, 16, positions[:5], [5], None, torch.float32)
    long = tables(rope, 4, 16, positions[5:], [20], None, torch.float32)
    assert torch.equal(cos[:5], short[0]) and torch.equal(sin[:5], short[1])
    assert torch.equal(cos[5:], long[0]) and torch.equal(sin[5:], long[1])
    assert not torch.equal(cos[1:5], cos[6:10])


def test_longrope_switches_past_its_first_context():
    assert torch.equal(frequencies(LONG, 4, 16, 8)[0], frequencies(LONG, 4, 16, 1)[0])
    assert_close(
        frequencies(LONG, 4, 16, 9)[0] * torch.tensor([3.0, 4.0]), frequencies(LONG, 4, 16, 8)[0] * torch.tensor([1.0, 2.0])
    )
    assert frequencies(LONG, 4, 16, 9)[1] == math.sqrt(1 + math.log(2) / math.log(8))


def test_tables_kept_from_inference_serve_training():
    where = Rope(theta=123.0), 4, 16, torch.arange(3), [3], None, torch.float32  # a theta of its own: nothing is kept of it yet
    with torch.inference_mode():
        tables(*where)
    x = torch.randn(3, 1, 4, requires_grad=True)
    rotate(x, *tables(*where)).sum().backward()
    assert x.grad is not None


# ---- the kernels ----------------------------------------------------------------------------------------------------------------

ON_THIS = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()  # the interpreter's bf16 is silently wrong


def close_to_the_definition(y, x, cos, sin):
    """`reference` rounds two products and their sum, the kernel once: within two steps of the larger of the pair."""
    most = x.abs().amax(-1, keepdim=True).float() * 1.5
    return ((y.float() - reference(x, cos, sin).float()).abs() <= 2 * torch.finfo(x.dtype).eps * most + 1e-6).all()


@pytest.mark.parametrize("dtype", ON_THIS)
@pytest.mark.parametrize(("tokens", "heads", "half", "width"), [(5, 3, 4, 11), (3, 32, 64, 128), (2, 5, 5, 10), (0, 2, 4, 8)])
def test_the_rotation_kernel(kernels, tokens, heads, half, width, dtype):
    """On the query's place in a fused [T, (heads + 2) * width] buffer: what lies beside it stays."""
    g = torch.Generator().manual_seed(0)
    fused = torch.randn(tokens, (heads + 2) * width, generator=g).to(kernels, dtype)
    angle = torch.randn(tokens, half, generator=g).to(kernels)
    cos, sin = angle.cos(), angle.sin()
    before, x = fused.clone(), fused[:, width : (heads + 1) * width].view(tokens, heads, width)
    start = x.clone()
    assert op.rotate_(x, cos, sin) is x
    assert close_to_the_definition(x, start, cos, sin)
    assert torch.equal(x[..., 2 * half :], start[..., 2 * half :])
    elsewhere = torch.full_like(before, torch.nan)
    out = elsewhere[:, width : (heads + 1) * width].view(tokens, heads, width)
    assert torch.equal(op.rotate_into(start, cos, sin, out), x)
    assert elsewhere[:, :width].isnan().all() and elsewhere[:, (heads + 1) * width :].isnan().all()
    op.rotate_into(start, cos, sin, out, inverse=True)
    assert close_to_the_definition(out, start, cos, -sin)
    op.rotate_(x, cos, sin, inverse=True)
    assert_close(fused, before, rtol=0, atol=8 * torch.finfo(dtype).eps)
    assert torch.equal(fused[:, :width], before[:, :width]) and torch.equal(
        fused[:, (heads + 1) * width :], before[:, (heads + 1) * width :]
    )


def test_plain_torch_turns_in_place_too():
    x, angle = torch.randn(5, 3, 11), torch.randn(5, 4)
    wanted = reference(x, angle.cos(), angle.sin())
    back = x.clone()
    assert torch.equal(op.rotate_(x, angle.cos(), angle.sin()), wanted)
    assert_close(op.rotate_(x, angle.cos(), angle.sin(), inverse=True), back)


MODES = ["reference", pytest.param("triton", marks=pytest.mark.skipif(backend.triton is None, reason="no triton"))]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("heads", "kv", "width", "half"), [(4, 2, 8, 4), (3, 1, 10, 3), (5, 5, 6, 1)])
def test_split_and_join_are_rotations_of_the_parts(mode, heads, kv, width, half):
    torch.manual_seed(0)
    n = (heads + 2 * kv) * width
    qkv, angle = torch.randn(7, n + 3)[:, :n], torch.randn(7, half)
    cos, sin = angle.cos(), angle.sin()
    parts = [torch.full((7, h, width), math.nan) for h in (heads, kv, kv)]
    with backend.use(mode):
        op.split(qkv, heads, cos, sin, *parts)
        back = torch.full((7, n + 2), math.nan)
        op.join(*parts, cos, sin, back[:, :n])
    q, k, v = qkv.unflatten(-1, (-1, width)).split([heads, kv, kv], 1)
    assert_close(parts[0], reference(q, cos, sin))
    assert_close(parts[1], reference(k, cos, sin))
    assert torch.equal(parts[2], v)
    assert_close(back[:, :n], qkv, atol=1e-5, rtol=1e-5)
    assert back[:, n:].isnan().all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("tokens", "heads", "kv", "width", "half"), [(7, 4, 2, 8, 4), (70, 3, 1, 10, 3), (5, 5, 5, 40, 17)])
def test_split_adds_a_low_rank_part_first(mode, tokens, heads, kv, width, half):
    torch.manual_seed(0)
    n = (heads + 2 * kv) * width
    qkv, angle = torch.randn(tokens, n + 3)[:, :n], torch.randn(tokens, half)
    low, b, cos, sin = torch.randn(tokens, 8)[:, :5], torch.randn(n, 5), angle.cos(), angle.sin()
    parts = [torch.full((tokens, h, width), math.nan) for h in (heads, kv, kv)]
    with backend.use(mode):
        op.split(qkv, heads, cos, sin, *parts, (low, b))
    q, k, v = (qkv + low @ b.t()).unflatten(-1, (-1, width)).split([heads, kv, kv], 1)
    assert_close(parts[0], reference(q, cos, sin), rtol=1e-5, atol=1e-5)
    assert_close(parts[1], reference(k, cos, sin), rtol=1e-5, atol=1e-5)
    assert_close(parts[2], v, rtol=1e-5, atol=1e-5)
