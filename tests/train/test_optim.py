"""AdamW over float32 masters against torch's plain AdamW; schedules by their formulas; clipping, groups, fp16's loss scale."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tunesmith.config import schema
from tunesmith.errors import TunesmithError
from tunesmith.train import optim
from tunesmith.train.optim import LossScale, Optimizer, learning_rate, schedule

SHAPES = {"a.lora_A.weight": (4, 6), "a.lora_B.weight": (6, 4), "a.magnitude": (6,), "embed": (10, 6)}


def parameters(seed=0, dtype=torch.float32, shapes=SHAPES):
    g = torch.Generator().manual_seed(seed)
    return {n: nn.Parameter(torch.randn(s, generator=g).to(dtype)) for n, s in shapes.items()}


def gradients(step, ps, scale=1.0):
    g = torch.Generator().manual_seed(100 + step)
    return {n: torch.randn(p.shape, generator=g) * scale for n, p in ps.items()}


@pytest.mark.parametrize(("limit", "scale"), [(1.0, 1.0), (1.0, 0.01), (0.0, 10.0)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_torchs(limit, scale, decay):
    """20 steps against torch's single-tensor AdamW with torch's clipping; decay on matrices only."""
    ours, theirs = parameters(), parameters()
    train = schema.Train(weight_decay=decay, max_grad_norm=limit, betas=(0.9, 0.95))
    optimizer = Optimizer(ours, train)
    groups = [
        {"params": [p for p in theirs.values() if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in theirs.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    oracle = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), foreach=False, fused=False)
    for step in range(20):
        rate = 0.01 * schedule("cosine", step, 20, 0.1)
        for ps in (ours, theirs):
            for (_, p), g in zip(ps.items(), gradients(step, ps, scale).values(), strict=True):
                p.grad = g.clone()
        optimizer.set_rate(rate)
        norm = optimizer.step()
        for group in oracle.param_groups:
            group["lr"] = rate
        wanted = nn.utils.clip_grad_norm_(theirs.values(), limit or math.inf, foreach=False)
        oracle.step()
        assert norm.item() == pytest.approx(wanted.item(), rel=1e-6)
    for name, p in ours.items():
        torch.testing.assert_close(p, theirs[name], rtol=2e-6, atol=2e-7)
        assert p.grad is None


def test_lora_plus_multiplies_the_rate_of_b_alone():
    ours, plain = parameters(), parameters()
    fast = Optimizer(ours, schema.Train(loraplus_ratio=16.0, max_grad_norm=0.0), fast=["a.lora_B.weight"])
    slow = Optimizer(plain, schema.Train(max_grad_norm=0.0))
    for optimizer, ps in ((fast, ours), (slow, plain)):
        for n, g in gradients(0, ps).items():
            ps[n].grad = g
        optimizer.set_rate(1e-3)
        optimizer.step()
    assert fast.rates() == pytest.approx([1e-3] * len(fast.rates())) and len(fast.rates()) == 2
    start = parameters()
    for n, p in ours.items():
        ratio = ((p - start[n]) / (plain[n] - start[n])).mean().item()
        assert ratio == pytest.approx(16.0 if n == "a.lora_B.weight" else 1.0, rel=1e-3)


def test_16_bit_weights_have_float32_masters():
    """bf16 loses an update under 0.4 % of a weight; its master does not: 400 steps of 1e-5 move a weight of 1 to 0.996."""
    p = nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    optimizer = Optimizer({"w": p}, schema.Train(max_grad_norm=0.0))
    assert optimizer.masters["w"].dtype == torch.float32 and p.dtype == torch.bfloat16
    naive = torch.ones((), dtype=torch.bfloat16)
    for _ in range(400):
        (p.float() * 2).sum().backward()
        assert p.grad is None and optimizer.masters["w"].grad.dtype == torch.float32
        optimizer.set_rate(1e-5)
        optimizer.step()
        naive = (naive - 1e-5).to(torch.bfloat16)
    assert naive == 1.0
    assert optimizer.masters["w"].mean().item() == pytest.approx(1 - 400 * 1e-5, abs=1e-5)
    assert torch.equal(p, optimizer.masters["w"].to(torch.bfloat16)) and p[0, 0] != 1.0


def test_micro_batches_of_16_bit_weights_add_up_in_float32():
    """256 + 1 is 256 in bf16."""
    p = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    optimizer = Optimizer({"w": p}, schema.Train())
    for size in (256.0, 1.0, 1.0):
        (p * size).sum().backward()
    assert optimizer.masters["w"].grad.tolist() == [[258.0] * 2] * 2
    p.grad = torch.ones_like(p)
    optimizer.clear()
    assert p.grad is None and optimizer.masters["w"].grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_state_holds_everything(dtype):
    """Three steps, a checkpoint, three steps more: the bits of six steps."""

    def step(optimizer, ps, k):
        for n, g in gradients(k, ps).items():
            optimizer.masters[n].grad = g.to(optimizer.masters[n].dtype)
        optimizer.set_rate(0.01)
        optimizer.step()

    whole, first, second = (parameters(dtype=dtype) for _ in range(3))
    unbroken, before = Optimizer(whole, schema.Train()), Optimizer(first, schema.Train())
    for k in range(6):
        step(unbroken, whole, k)
    for k in range(3):
        step(before, first, k)
    kept = {n: t.clone() for n, t in before.state().items()}
    after = Optimizer(second, schema.Train())
    after.load(kept)
    for k in range(3, 6):
        step(after, second, k)
    for n, t in unbroken.state().items():
        assert torch.equal(t, after.state()[n]), n
    assert all(torch.equal(p, second[n]) for n, p in whole.items())
    with pytest.raises(KeyError):
        Optimizer(parameters(), schema.Train()).load({n: t for n, t in kept.items() if n != "master/embed"})


def test_what_never_moved():
    ps = parameters()
    optimizer = Optimizer(ps, schema.Train())
    assert optimizer.never_moved() == list(ps)
    for n, g in gradients(0, ps).items():
        ps[n].grad = torch.zeros_like(g) if n == "embed" else None if n == "a.magnitude" else g
    optimizer.set_rate(0.1)
    optimizer.step()
    assert optimizer.never_moved() == ["a.magnitude", "embed"]


def test_a_gradient_that_is_not_finite_is_seen():
    ps = parameters()
    optimizer = Optimizer(ps, schema.Train())
    assert optimizer.gradient_norm() == 0.0
    for bad in (math.nan, math.inf):
        for n, g in gradients(0, ps).items():
            ps[n].grad = g
        ps["a.magnitude"].grad[3] = bad
        assert not math.isfinite(optimizer.gradient_norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_that_is_not_finite_changes_nothing_but_is_reported(dtype):
    """Neither weights nor moments nor the count of steps: the next good step is what it would have been."""

    def good(optimizer, ps, k):
        for n, g in gradients(k, ps).items():
            optimizer.masters[n].grad = g.float()
        optimizer.set_rate(0.01)

    one, two = parameters(dtype=dtype), parameters(dtype=dtype)
    steady, shaken = Optimizer(one, schema.Train()), Optimizer(two, schema.Train())
    for k in range(3):
        good(steady, one, k)
        steady.step(torch.ones(()))
        good(shaken, two, k)
        assert shaken.step(torch.tensor(math.nan)).isfinite()
        good(shaken, two, k)
        shaken.masters["embed"].grad[0, 0] = math.inf
        assert not shaken.step(torch.ones(())).isfinite()
        assert all(m.grad is None for m in shaken.masters.values())
        good(shaken, two, k)
        shaken.step(torch.ones(()))
    wanted = steady.state()
    assert all(torch.equal(t, wanted[n]) for n, t in shaken.state().items())


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5])
@pytest.mark.parametrize("total", [1, 2, 7, 100])
def test_schedules(kind, warmup, total):
    """Rises to 1 without a step of rate 0, never above it, falls (or stays) after; every step has a rate above zero."""
    rates = [schedule(kind, s, total, warmup) for s in range(total)]
    rising = math.ceil(total * warmup)
    assert all(0 < r <= 1 for r in rates)
    assert rates[:rising] == pytest.approx([(s + 1) / (rising + 1) for s in range(rising)])
    assert rates[rising:] == sorted(rates[rising:], reverse=True)
    if rising < total and kind != "wsd":
        assert rates[rising] == 1.0
    if kind == "constant":
        assert set(rates[rising:]) <= {1.0}
    if kind == "wsd" and total == 100 and warmup < 0.5:
        assert rates[rising:81] == [1.0] * (81 - rising) and rates[90] == pytest.approx(0.5) and rates[99] == pytest.approx(0.05)


def test_the_peak_rate_is_the_methods():
    assert learning_rate(schema.Train(), "full") == 2e-5 and learning_rate(schema.Train(), "qlora") == 2e-4
    assert learning_rate(schema.Train(learning_rate=0.5), "full") == 0.5


def test_the_loss_scale_of_fp16():
    scale = LossScale.of(torch.float16)
    assert scale.active and scale.value == 2.0**14 and not LossScale.of(torch.bfloat16).active
    assert scale.overflowed() and scale.value == 2.0**13
    for _ in range(scale.patience):
        scale.went_well()
    assert scale.value == 2.0**14 and scale.good == 0
    for _ in range(13):
        assert scale.overflowed()
    assert scale.value == 2.0 and not scale.overflowed() and scale.value == 2.0, "then it is the model's own overflow"
    idle = LossScale()
    for _ in range(5000):
        idle.went_well()
    assert idle.value == 1.0 and not idle.overflowed()


# ---- 8-bit averages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_averages_need_a_gpu_and_bitsandbytes_by_name(name, monkeypatch):
    with pytest.raises(TunesmithError, match=f"{name} needs an NVIDIA GPU"):
        Optimizer(parameters(), schema.Train(optimizer=name))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(TunesmithError, match=rf"{name} needs bitsandbytes(?s:.*)tunesmith\[bnb\]"):
        optim._eight_bit(name, {"cuda"})


def eight_bit_steps(optimizer, ps, steps):
    for step in steps:
        for p, g in zip(ps.values(), gradients(step, ps).values(), strict=True):
            put_gradient(p, g)
        optimizer.set_rate(0.01)
        optimizer.step()


def put_gradient(p, g):
    """Into the flat gradients where the optimiser has laid them out (on a GPU), as a backward would."""
    if p.grad is None:
        p.grad = g.to(p.device, copy=True)
    else:
        p.grad.copy_(g)


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("size", [1, pytest.param(64, marks=pytest.mark.gpu)])
def test_8_bit_averages_go_on_from_a_checkpoint_and_follow_torchs(name, size, monkeypatch):
    """On a CPU bitsandbytes steps only what it keeps in 32 bits, tensors of fewer than 4,096 numbers; on a GPU all."""
    pytest.importorskip("bitsandbytes")
    where = "cuda" if size > 1 else "cpu"
    eight_bit = optim._eight_bit
    monkeypatch.setattr(optim, "_eight_bit", lambda name, devices: eight_bit(name, {"cuda"}))

    def made():
        g = torch.Generator().manual_seed(0)
        shapes = {"a.lora_A.weight": (4 * size, 64 * size), "a.lora_B.weight": (6, 4), "unused": (2, 2)}
        return {n: nn.Parameter(torch.randn(s, generator=g).to(where)) for n, s in shapes.items()}

    whole, torchs = made(), made()
    train = schema.Train(optimizer=name)
    one, exact = Optimizer(whole, train), Optimizer(torchs, schema.Train())
    eight_bit_steps(one, whole, range(4))
    saved = {k: v.clone() for k, v in one.state().items()}
    assert all(isinstance(v, torch.Tensor) for v in saved.values()) and not any("qmap" in k for k in saved)
    assert (saved["state1/a.lora_A.weight"].dtype is torch.uint8) == (size > 1)
    eight_bit_steps(one, whole, range(4, 8))
    eight_bit_steps(exact, torchs, range(8))
    again = made()
    other = Optimizer(again, train)
    other.load(saved)
    eight_bit_steps(other, again, range(4, 8))
    for n in whole:
        assert torch.equal(whole[n], again[n]) and (whole[n] - torchs[n]).abs().max() < 0.02, n
    before = whole["a.lora_A.weight"].detach().clone()
    put_gradient(whole["a.lora_A.weight"], torch.full_like(before, math.nan))
    one.step()
    assert torch.equal(before, whole["a.lora_A.weight"]) and one.never_moved() == []


def test_8_bit_averages_laid_flat_go_on_where_a_size_is_no_multiple_of_a_block(monkeypatch):
    pytest.importorskip("bitsandbytes")
    eight_bit = optim._eight_bit
    monkeypatch.setattr(optim, "_eight_bit", lambda name, devices: eight_bit(name, {"cuda"}))
    shapes, train = {"a.lora_A.weight": (37, 131), "a.lora_B.weight": (66, 41)}, schema.Train(optimizer="adamw_8bit")
    whole, again = parameters(shapes=shapes), parameters(shapes=shapes)
    one, other = Optimizer(whole, train, flat=True), Optimizer(again, train, flat=True)

    def steps(optimizer, ps, which):
        for k in which:
            for n, g in gradients(k, ps).items():  # smaller and smaller: what a block's scale holds of before shows
                ps[n].grad.copy_(g * 0.1**k)
            optimizer.set_rate(0.01)
            optimizer.step()

    steps(one, whole, range(3))
    saved = {k: v.clone() for k, v in one.state().items()}
    other.load(saved)
    assert all(torch.equal(v, saved[k]) for k, v in other.state().items())
    steps(one, whole, range(3, 6)), steps(other, again, range(3, 6))
    assert all(torch.equal(p, again[n]) for n, p in whole.items())
    assert all(torch.equal(v, one.state()[k]) for k, v in other.state().items())


def test_laid_flat_is_what_one_gpu_holds_and_32_bits_count():
    def of(count, dtype=torch.float32, device="cuda"):
        return SimpleNamespace(dtype=dtype, device=torch.device(device), numel=lambda: count)

    assert optim.flat_fits([of(1 << 30), of(1 << 29)]) and not optim.flat_fits([of(1 << 30), of(1 << 30)])
    assert not optim.flat_fits([of(8), of(8, torch.bfloat16)]) and not optim.flat_fits([of(8, device="cpu")])


@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_laid_flat_it_takes_the_same_steps(ratio):
    """Bit for bit, through a gradient that is not finite, a checkpoint and its load; parameters and gradients keep their place."""
    train = schema.Train(loraplus_ratio=ratio, weight_decay=0.1, max_grad_norm=0.0)
    wide = {n: (16 * s[0], *s[1:]) for n, s in SHAPES.items()}  # whole vectors: torch's CPU kernel rounds the rest otherwise
    one, two = parameters(shapes=wide), parameters(shapes=wide)
    apart, flat = Optimizer(one, train, fast={"embed"}), Optimizer(two, train, fast={"embed"}, flat=True)
    places = {n: (p.data_ptr(), p.grad.data_ptr()) for n, p in two.items()}

    def step(optimizer, ps, k, bad=False):
        for n, g in gradients(k, ps).items():
            if n != "a.magnitude":  # never has one
                ps[n].grad = g if ps[n].grad is None else ps[n].grad.add_(g)
        if bad:
            ps["embed"].grad[0, 0] = math.nan
        optimizer.set_rate(0.01)
        return optimizer.step(torch.ones(()))

    for k in range(6):
        norms = step(apart, one, k, k == 2), step(flat, two, k, k == 2)
        assert k == 2 or norms[0] == pytest.approx(norms[1].item(), rel=1e-6)
        if k == 3:
            kept = {n: t.clone() for n, t in flat.state().items()}
            two = parameters(shapes=wide)
            flat = Optimizer(two, train, fast={"embed"}, flat=True)
            flat.load(kept)
            places = {n: (p.data_ptr(), p.grad.data_ptr()) for n, p in two.items()}
    assert all(torch.equal(p, two[n]) for n, p in one.items())
    assert places == {n: (p.data_ptr(), p.grad.data_ptr()) for n, p in two.items()}
    mine = flat.state()
    assert all(torch.equal(t, mine[n]) for n, t in apart.state().items())
    assert flat.never_moved() == apart.never_moved() == ["a.magnitude"]
    assert all(not p.grad.any() for p in two.values())
    with pytest.raises(KeyError):
        Optimizer(parameters(shapes=wide), train, flat=True).load({n: t for n, t in kept.items() if n != "exp_avg/embed"})


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_fused_step_is_torchs_to_the_bit(where):
    """Several groups, a parameter without a gradient, a step that is not applied."""

    def made():
        g = torch.Generator().manual_seed(0)
        ps = [nn.Parameter(torch.randn(shape, generator=g).to(where)) for shape in ((40, 30), (7,), (5, 5), (3,))]
        return ps, [{"params": ps[:2], "lr": 0.01, "weight_decay": 0.1}, {"params": ps[2:], "lr": 0.02, "weight_decay": 0.0}]

    (ours, groups), (theirs, same) = made(), made()
    one, two = optim.FusedAdamW(groups, (0.9, 0.95)), torch.optim.AdamW(same, betas=(0.9, 0.95), fused=True)
    g = torch.Generator().manual_seed(1)
    for step in range(5):
        for p, q in zip(ours[:3], theirs[:3], strict=True):
            p.grad = torch.randn(p.shape, generator=g).to(where)
            q.grad = p.grad.clone()
        one.found_inf = two.found_inf = torch.tensor(float(step == 2), device=where)
        one.step()
        two.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
        assert one.state.get(p, {}).keys() == two.state.get(q, {}).keys()
        assert all(torch.equal(value, two.state[q][key]) for key, value in one.state.get(p, {}).items())
    assert one.state[ours[0]]["step"] == 4 and ours[3] not in one.state
