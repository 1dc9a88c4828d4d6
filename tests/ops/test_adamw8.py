"""AdamW with 8-bit averages: what a code loses, that no rounding has a bias, torch's AdamW as the measure, the kernel."""

import math

import pytest
import torch

from tunesmith.ops import adamw8, backend
from tunesmith.ops.adamw8 import BLOCK, Averages, How, reference_update_, round_, update_

BETAS = (0.9, 0.999)


def correction(t, device="cpu"):
    return torch.tensor([1 / (1 - BETAS[0] ** t), 1 / math.sqrt(1 - BETAS[1] ** t)], device=device)


def keys(t, device="cpu"):
    return torch.tensor([17 * t, -(t**3)], dtype=torch.int32, device=device)


def bits(n, seed=0):
    return torch.randint(0, 1 << 16, (n,), generator=torch.Generator().manual_seed(seed))


def gradients(shape, steps, dtype, seed=1):
    """Sizes a hundred apart, a common direction under the noise."""
    g = torch.Generator().manual_seed(seed)
    size = 10 ** (-4 + 2 * torch.rand(shape, generator=g))
    towards = torch.randn(shape, generator=g)
    return [(size * (0.5 * towards + torch.randn(shape, generator=g))).to(dtype) for _ in range(steps)]


def steps(weight, found, how, update=reference_update_, averages=None, start=0):
    averages = averages or Averages.of(weight)
    for t, g in enumerate(found, start + 1):
        norm = torch.linalg.vector_norm(g.float())
        update(weight, g, averages, how, norm, correction(t, weight.device), keys(t, weight.device))
    return averages


def test_a_code_is_as_near_as_its_neighbours_are_apart():
    """m within 2 sqrt(|m| / scale) / 127 of the scale, v the same with 256; v is never read as 0; a block of zeros stays zeros."""
    x = torch.randn(8 * BLOCK, generator=torch.Generator().manual_seed(0)) * 10 ** -torch.linspace(0, 8, 8 * BLOCK)
    x[: BLOCK // 2] *= 1e-4
    x[-BLOCK:] = 0
    m_code, m_scale = adamw8._codes_m(x, bits(len(x)))
    v_code, v_scale = adamw8._codes_v(x.square(), bits(len(x)))
    m, v = Averages(m_code.to(torch.int8), v_code.to(torch.uint8), m_scale, v_scale).read()
    assert m_code.abs().max() == 127 and v_code.max() == 255 and v_code.min() == 0
    for value, read, scale, levels in ((x, m, m_scale, 127), (x.square(), v, v_scale, 256)):
        scale = scale.repeat_interleave(BLOCK)
        apart = (2 * (value.abs() / scale.clamp(min=1e-30)).sqrt() / levels + 2 / levels**2) * scale
        assert ((value - read).abs() <= apart * 1.001).all()
    assert (v[:-BLOCK] > 0).all() and not m[-BLOCK:].any() and not v[-BLOCK:].any()


@pytest.mark.parametrize("what", ["m", "v", "weight"])
def test_no_rounding_has_a_bias(what):
    """The mean of 20,000 roundings of a number between two codes is that number, within 4 of its own standard errors."""
    n, value = 20_000, torch.tensor([0.00123])
    many, r = value.repeat(n), bits(n)
    if what == "weight":
        read = round_(many, r).float()
    else:
        codes, scale = (adamw8._codes_m if what == "m" else adamw8._codes_v)(torch.cat([torch.ones(1), many[:-1]]), r)
        assert len(scale) == -(-n // BLOCK)
        codes = adamw8._rounded(many * (127**2 if what == "m" else 256**2), what == "v", 127 if what == "m" else 256, r)
        read = (codes / (127 if what == "m" else 256)).square()
    assert len(read.unique()) == 2
    assert abs(read.double().mean() - value.double()).item() < 4 * read.double().std().item() / n**0.5


def test_the_random_bits_are_even_and_their_own():
    """Every bit is set in half of the places; neighbours, the two words, other keys and the next step have nothing in common."""
    place = torch.arange(1 << 16)
    first, second = adamw8.random_bits(place, keys(1))
    other, _ = adamw8.random_bits(place, keys(2))
    flags = [((word >> b) & 1).double() - 0.5 for word in (first, second, other) for b in range(32)]
    table = torch.stack([*flags, *(f.roll(1) for f in flags)])
    alike = (table @ table.t()) / (0.25 * len(place)) - torch.eye(len(table))
    assert table.mean(1).abs().max() < 5 * 0.5 / len(place) ** 0.5
    assert alike.abs().max() < 6 / len(place) ** 0.5
    assert torch.equal(first[100:], adamw8.random_bits(place[100:], keys(1))[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [40, 400])
def test_it_goes_where_adamw_goes(count, dtype):
    """Against torch's AdamW in float32 with the same gradients, of sizes a hundred apart: the ways differ by 12 and 15 %
    of their length after 40 and 400 steps, in bf16 by 20 and 16 % (the length outgrows the noise), and point the same way."""
    start = (0.02 * torch.randn(64, 128, generator=torch.Generator().manual_seed(0))).to(dtype)
    found = gradients(start.shape, count, dtype)
    ours, theirs = start.clone(), torch.nn.Parameter(start.float().clone())
    oracle = torch.optim.AdamW([theirs], lr=1e-4, betas=BETAS, weight_decay=0.1)
    steps(ours, found, How(1e-4, BETAS, 0.1))
    for g in found:
        theirs.grad = g.float()
        oracle.step()
    way, wanted = (ours.float() - start.float()).flatten(), (theirs.detach() - start.float()).flatten()
    assert (way - wanted).norm() / wanted.norm() < (0.18 if dtype is torch.float32 else 0.23)
    assert torch.cosine_similarity(way, wanted, 0) > (0.985 if dtype is torch.float32 else 0.975)


def test_small_steps_of_a_bf16_weight_count_on_average():
    """Steps of 1e-5 are lost to a weight of 1 in bf16, whose neighbour below is at 0.996. 400 of them: 0.996 on average over 8,192
    weights, with the noise that ops/adamw8.py names."""
    weight = torch.ones(8192, dtype=torch.bfloat16)
    steps(weight, [torch.ones_like(weight)] * 400, How(1e-5, BETAS))
    noise = (400 * 1e-5 / 256) ** 0.5
    assert weight.float().mean().item() == pytest.approx(1 - 400 * 1e-5, abs=4 * noise / 8192**0.5)
    assert weight.float().std().item() <= 1.05 * noise


def test_the_second_average_falls_when_gradients_do():
    """v moves by a thousandth a step, its codes are 0.8 % apart and more: rounded to the nearest it would stay where it was."""
    loud, still = torch.full((4 * BLOCK,), 1e-2), torch.full((4 * BLOCK,), 1e-4)
    still[::16] = 1e-2  # so that the scale stays
    weight = torch.zeros(4 * BLOCK)
    averages = steps(weight, [loud] * 100 + [still] * 1000, How(1e-6, BETAS))
    _, v = averages.read()
    exact = (1 - 0.999**100) * 1e-4 * 0.999**1000
    assert v[still == 1e-4].mean().item() == pytest.approx(exact + (1 - 0.999**1000) * 1e-8, rel=0.03)


def test_nothing_of_it_where_the_gradient_is_not_finite(kernels):
    for update in (reference_update_, update_):
        weight = torch.randn(300, device=kernels).bfloat16()
        averages = steps(weight, [g.to(kernels) for g in gradients(weight.shape, 3, torch.bfloat16)], How(1e-3, BETAS))
        before = [t.clone() for t in (weight, averages.m, averages.v, averages.m_scale, averages.v_scale)]
        bad = torch.ones_like(weight)
        for value in (math.nan, math.inf, -math.inf):
            bad[7] = value
            steps(weight, [bad], How(1e-3, BETAS), update, averages)
            after = (weight, averages.m, averages.v, averages.m_scale, averages.v_scale)
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (BLOCK,), (7, 100), (40, 130)], ids=str)
def test_the_kernel_is_the_definition(kernels, shape, dtype):
    """In the interpreter bit for bit in bf16; a GPU contracts products and sums and divides to the last bit but one, so there a few
    roundings fall the other way: codes by one, bf16 weights to their neighbour, fewer than one in a hundred."""
    start = (0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(kernels, dtype)
    found = [g.to(kernels) for g in gradients(shape, 4, dtype)]
    one, two = start.clone(), start.clone()
    how = How(1e-3, BETAS, 0.1)
    with backend.use("reference"):
        first = steps(one, found, how)
    second = steps(two, found, how, update_)
    torch.testing.assert_close(one, two, rtol=2**-7 if dtype is torch.bfloat16 else 1e-5, atol=1e-7)
    for a, b in ((first.m, second.m), (first.v, second.v)):
        assert (a.int() - b.int()).abs().max() <= 1 and (a != b).float().mean() < 0.01
    if dtype is torch.bfloat16:
        assert (one != two).float().mean() < 0.01
    torch.testing.assert_close(first.m_scale, second.m_scale, rtol=0.02, atol=0)
    torch.testing.assert_close(first.v_scale, second.v_scale, rtol=0.02, atol=0)
    if kernels == "cpu" and dtype is torch.bfloat16:
        assert torch.equal(one, two) and torch.equal(first.v, second.v)


def test_the_reference_in_chunks_is_the_reference(monkeypatch):
    found = gradients((3000,), 3, torch.bfloat16)
    one, two = torch.zeros(3000, dtype=torch.bfloat16), torch.zeros(3000, dtype=torch.bfloat16)
    steps(one, found, How(1e-3, BETAS))
    monkeypatch.setattr(adamw8, "CHUNK", 2 * BLOCK)
    steps(two, found, How(1e-3, BETAS))
    assert torch.equal(one, two)
