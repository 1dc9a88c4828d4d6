"""A few seconds on the device: the rates that a plan's time is made of (plan/rates.py), each of what a run really calls.

The last measurement is of whole layers, forward and backward, through what training calls: what they take over what the plan
computes from the single rates becomes a factor, so that what no rate tells (launches, a busy machine) is in the time all the same.
Two depths are timed, and only the layers between them count: a run's time is its layers', and what a pass has once (the head, its
start) is a large part of two layers and a small one of thirty. Taken from a whole pass, plans were 8 to 31 % too fast (an H100).
"""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tunesmith import adapters
from tunesmith.config.schema import Lora, RunConfig
from tunesmith.data.pack import collate
from tunesmith.devices import Device
from tunesmith.levels import WHOLE
from tunesmith.models.decoder import Decoder
from tunesmith.models.fast import FastLayers, policies
from tunesmith.models.place import Place
from tunesmith.ops import attention, fp8, nf4
from tunesmith.ops.attention import Layout
from tunesmith.plan.choice import Open
from tunesmith.plan.layers import Layers
from tunesmith.plan.rates import WIDER, Rates, machine
from tunesmith.spec import Spec
from tunesmith.train.replay import plain
from tunesmith.types import Batch, Example, Origin

REPEATS, LEAST = 5, 0.02  # times that each is taken, the median counts; seconds that one of them lasts at least
FACTOR = 0.4, 2.5  # a factor beyond these is a fault of the measurement, not a property of the device
SIZES = {  # tokens and widths of products, tokens of documents, tokens of attention at once, bytes that are copied
    "cuda": ((512, 2048, 8192), (1024, 2048, 4096), (512, 2048, 8192, 32768), 8192, 1 << 30),
    "mps": ((512, 2048), (1024, 2048), (512, 2048), 2048, 1 << 28),
    "cpu": ((32, 128, 512, 2048), (256, 512, 1024), (64, 256, 1024), 1024, 1 << 27),
}
HEAT = {"cuda": 0.25, "mps": 0.1, "cpu": 0.1}  # seconds that whole layers are timed, REPEATS times: a hot GPU clocks down
LAYERS = {  # what the whole layers look like, how many, and tokens that go through at once
    "cuda": (
        Spec(vocab=32000, dim=4096, hidden=14336, layers=3, heads=32, kv_heads=8, head_dim=128, context=8192, norm_eps=1e-5),
        4096,
    ),
    "mps": (
        Spec(vocab=8192, dim=1024, hidden=2816, layers=3, heads=16, kv_heads=8, head_dim=64, context=8192, norm_eps=1e-5),
        1024,
    ),
    "cpu": (Spec(vocab=4096, dim=512, hidden=1408, layers=4, heads=8, kv_heads=4, head_dim=64, context=8192, norm_eps=1e-5), 512),
}


def measure(device: Device, where: Place) -> Rates:
    """The rates of the device that torch computes on. Takes 10 to 25 s, and at most 4.3 GiB of a GPU's memory."""
    kind = where.device.type
    tokens, widths, lengths, at_once, size = SIZES[kind]
    clock = Clock(where.device)
    low = where.dtype in (torch.bfloat16, torch.float16)
    products = {"16bit" if low else "fp32": [*_products(clock, tokens, widths, where.dtype)]}
    if low and kind == "cuda":
        products["fp32"] = [*_products(clock, tokens[1:2], widths[1:2], torch.float32)]
    if not low:  # nobody trains in 16 bits here unless asked to
        products["16bit"] = [*_products(clock, tokens[-2:-1], widths[1:2], torch.bfloat16)]
    if not fp8.supported(where.device):
        products["fp8"] = [*_fp8_products(clock, tokens, widths)]
    found = Rates(
        products=products, attention=[*_attention(clock, lengths, at_once, where.dtype)], copy=_copy(clock, size),
        decode=_decode(clock, where.dtype), link=_link(clock) if kind == "cuda" else device.bandwidth * 1e9,
        launch=_launch(clock, where), factors={}, where=f"{machine(device)}, {datetime.date.today().isoformat()}",
    )  # fmt: skip
    return replace(found, factors=_factors(clock, device, where, found))


class Clock:
    """Seconds of work on a device."""

    def __init__(self, device: torch.device):
        self.device = device

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def __call__(self, work: Callable[[], Any], least: float = LEAST) -> float:
        work()
        self.wait()
        once = self._span(work, 1)
        count = max(1, round(least / max(once, 1e-7)))
        return statistics.median(self._span(work, count) / count for _ in range(REPEATS))

    def _span(self, work: Callable[[], Any], count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            work()
        self.wait()
        return time.perf_counter() - start

    def random(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.float32).to(dtype)


def _products(clock: Clock, tokens, widths, dtype: torch.dtype) -> Iterator[tuple[int, int, float]]:
    for width in widths:
        weight = clock.random(WIDER * width, width, dtype=dtype)
        for n in tokens:
            with suppress(torch.OutOfMemoryError):
                x = clock.random(n, width, dtype=dtype)
                yield n, width, 2.0 * n * WIDER * width * width / clock(lambda x=x, w=weight: torch.mm(x, w.t()))


def _fp8_products(clock: Clock, tokens, widths) -> Iterator[tuple[int, int, float]]:
    for width in widths:
        w8, scale = fp8.quantise_rows(clock.random(WIDER * width, width, dtype=torch.bfloat16))
        scale = scale.flatten()
        for n in tokens:
            with suppress(torch.OutOfMemoryError):
                x8, sx = fp8.quantise_rows(clock.random(n, width, dtype=torch.bfloat16))
                took = clock(lambda x8=x8, sx=sx, w8=w8, scale=scale: fp8.matmul(x8, sx, w8, scale))
                yield n, width, 2.0 * n * WIDER * width * width / took


def _attention(clock: Clock, lengths, at_once: int, dtype: torch.dtype) -> Iterator[tuple[int, int, float, float]]:
    for width in (128, 64) if clock.device.type != "cpu" else (64,):
        heads = 2048 // width if clock.device.type != "cpu" else 8
        for n in lengths:
            with suppress(torch.OutOfMemoryError):
                total = max(n, at_once)
                layout = Layout.of([n] * (total // n), clock.device)
                q, k, v = (clock.random(total, h, width, dtype=dtype).requires_grad_() for h in (heads, heads // 4, heads // 4))
                gradient = clock.random(total, heads, width, dtype=dtype)

                def forward(q=q, k=k, v=v, layout=layout, width=width) -> Tensor:
                    return attention.attention(q, k, v, layout, width**-0.5)

                def both(forward=forward, q=q, k=k, v=v, gradient=gradient) -> None:
                    torch.autograd.grad(forward(), (q, k, v), gradient)

                with torch.no_grad():
                    one = clock(forward)
                two = max(clock(both) - one, 0.3 * one)
                work = 4.0 * total * (n / 2) * heads * width
                yield width, n, work / one, 2.5 * work / two


def _copy(clock: Clock, size: int) -> float:
    x, y = (torch.zeros(size, dtype=torch.uint8, device=clock.device) for _ in range(2))
    return 2.0 * size / clock(lambda: y.copy_(x))


def _decode(clock: Clock, dtype: torch.dtype) -> float:
    side = 4096 if clock.device.type != "cpu" else 1024
    stored = nf4.quantise(clock.random(side, side, dtype=dtype))
    return side * side / clock(lambda: nf4.dense(stored, dtype))


def _link(clock: Clock, size: int = 1 << 28) -> float:
    """Both ways at once, as offloaded layers move; the slower counts."""
    host = [torch.zeros(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    card = [torch.zeros(size, dtype=torch.uint8, device=clock.device) for _ in range(2)]
    sides = [torch.cuda.Stream() for _ in range(2)]

    def work() -> None:
        with torch.cuda.stream(sides[0]):
            card[0].copy_(host[0], non_blocking=True)
        with torch.cuda.stream(sides[1]):
            host[1].copy_(card[1], non_blocking=True)

    return size / clock(work)


def _launch(clock: Clock, where: Place) -> float:
    """Of one composed layer with an adapter, so small that nothing of it is arithmetic."""
    spec = replace(LAYERS["cpu"][0], vocab=64, dim=64, hidden=64, layers=8, heads=2, kv_heads=2, head_dim=32)
    model, layout = _model(spec, where), Layout.of([8], clock.device)
    tokens = torch.zeros(8, dtype=torch.long, device=clock.device)
    return clock(lambda: model.hidden(tokens, layout)) / spec.layers


# ---- whole layers ----------------------------------------------------------------------------------------------------------------


def _factors(clock: Clock, device: Device, where: Place, rates: Rates) -> dict[str, float]:
    spec, tokens = LAYERS[clock.device.type]
    length = tokens // 4
    batch, heat = _batch(tokens // length, length), HEAT[clock.device.type]
    config = RunConfig.model_validate({
        "model": "probe", "method": "lora", "output": "none", "data": {"train": "rows.jsonl", "held_out": 0, "max_length": length},
        "train": {"batch_size": tokens // length}, "eval": {"samples": 0},
    })  # fmt: skip
    passes: dict[str, list[tuple[float, float]]] = {"composed": [], "half-blocks": []}  # seconds: taken, computed
    with suppress(torch.OutOfMemoryError):
        for depth in (1, spec.layers):
            model = _model(replace(spec, layers=depth), where)
            job = Open.of(config, model.spec, np.full(100, length), device, rates, half_blocks=False)

            def step(model=model) -> None:
                _pass(model, batch, where.device)

            passes["composed"].append((clock(step, heat), job._composed_pass(tokens, False)))
            if not job.composed_because:
                model.fast = FastLayers(model, policies(depth))
                layers = Layers(depth, "keep", False, WHOLE)
                passes["half-blocks"].append((clock(step, heat), float(job._half_pass(layers, layers, 0, tokens, tokens, False))))
    found = {path: (p[1][0] - p[0][0]) / (p[1][1] - p[0][1]) for path, p in passes.items() if len(p) == 2}
    return {path: min(max(factor, FACTOR[0]), FACTOR[1]) for path, factor in found.items()}


def _model(spec: Spec, where: Place) -> nn.Module:
    """Random weights and an adapter beside all linears."""
    model = Decoder(spec, dtype=where.dtype, device=where.device)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.normal_(0, 0.02)
    adapters.attach(model, Lora(rank=16, alpha=16), seed=0)
    return model.train()


def _batch(count: int, length: int) -> Batch:
    ids, learn = np.arange(length, dtype=np.int32) % 4096, np.arange(length) > 0
    return collate([Example(ids, learn, Origin("probe", 1)) for _ in range(count)])


def _pass(model: nn.Module, batch: Batch, device: torch.device) -> None:
    plain(model, batch, device, 1.0)
    for p in adapters.trainable(model).values():
        p.grad = None
