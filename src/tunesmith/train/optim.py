"""AdamW over float32 masters, the learning-rate schedule, clipping and fp16's loss scale: all that turns a gradient into a step.

Everything here is a function of its state, and the state is plain tensors and numbers, so a checkpoint holds it without pickle.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.config.schema import Train
from tunesmith.errors import TunesmithError

DECAY_SHARE = 0.2  # wsd: the last fifth falls to zero (Hägele et al. 2024 find 10-20 % enough)


def schedule(kind: str, step: int, total: int, warmup_ratio: float) -> float:
    """The share of the peak learning rate used by step `step` (0 .. total - 1).

    The decay is transformers' (cosine, linear and wsd reach zero at `total`). So is the length of the warm-up, but no step is
    spent on a rate of zero: it rises by 1 / (warmup + 1) each step where theirs rises from 0 by 1 / warmup.
    """
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    match kind:
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return 1 - progress
        case "wsd":
            left = max(1, math.ceil(total * DECAY_SHARE))
            return min(1.0, (total - step) / left)
    return 1.0


def learning_rate(train: Train, method: str) -> float:
    """The peak rate: as given, or the method's usual one."""
    return train.rate(method)


class Flat:
    """Parameters of one kind one behind the other in one tensor, and their gradients in another: a step is then a launch where it
    was one a tensor, and a gradient lies where it lay before, as a recorded pass needs (train/replay.py).

    Each begins at a multiple of BLOCK numbers, so that the 8-bit averages of a parameter have scales of their own.
    """

    BLOCK = 256  # bitsandbytes' 8-bit averages: one scale for so many

    def __init__(self, parameters: Mapping[str, nn.Parameter]):
        ends = list(accumulate(-(-p.numel() // self.BLOCK) * self.BLOCK for p in parameters.values()))
        device = next(iter(parameters.values())).device
        self.values = nn.Parameter(torch.zeros(ends[-1], dtype=torch.float32, device=device))
        self.values.grad = torch.zeros_like(self.values)
        self.at = {name: slice(start, start + p.numel())
                   for (name, p), start in zip(parameters.items(), [0, *ends], strict=False)}  # fmt: skip
        for name, p in parameters.items():
            at = self.at[name]
            self.values.data[at] = p.detach().flatten()
            p.data, p.grad = self.values.data[at].view(p.shape), self.values.grad[at].view(p.shape)

    def part(self, name: str, value: Tensor) -> Tensor:
        """What of an optimiser's tensor belongs to one parameter: of numbers, of codes, or of the scales of blocks of them."""
        at = self.at[name]
        if value.numel() == self.values.numel():
            return value[at]
        return value[at.start // self.BLOCK : -(-at.stop // self.BLOCK)]


class FusedAdamW:
    """torch.optim.AdamW(fused=True) over the same kernel, with its groups and its state, to the bit.

    torch's own class imports all of torch.compile at its first step: 1 s, and 8 s where no bytecode is kept.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float = 1e-8):
        self.param_groups, self.betas, self.eps = groups, betas, eps
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self.found_inf: Tensor | None = None  # 1: this step changes nothing

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            kinds: dict[tuple, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    kinds.setdefault((p.device, p.dtype), []).append(p)
            for (device, _), ps in kinds.items():
                for p in ps:
                    if p not in self.state:
                        kept = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
                        self.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=device)} | kept
                steps, first, second = ([self.state[p][key] for p in ps] for key in ("step", "exp_avg", "exp_avg_sq"))
                torch._foreach_add_(steps, 1)
                found = None if self.found_inf is None else self.found_inf.to(device)
                torch._fused_adamw_(
                    ps, [p.grad for p in ps], first, second, [], steps, lr=group["lr"], beta1=self.betas[0], beta2=self.betas[1],
                    weight_decay=group["weight_decay"], eps=self.eps, amsgrad=False, maximize=False, found_inf=found,
                )  # fmt: skip
                if found is not None:
                    torch._foreach_sub_(steps, [found] * len(steps))


class Optimizer:
    """AdamW over float32 masters, or bitsandbytes' with averages in 8 bits.

    On an NVIDIA GPU float32 parameters, which adapters are, lie flat (`Flat`) and keep their gradients' place.

    A parameter in lower precision has a float32 master and a float32 gradient: the parameter is the master, rounded. bf16 keeps
    eight bits, so an update under 0.4 % of a weight would round to nothing. Gradients of such parameters move to the master as they
    come, so several micro-batches add up in float32 and only one layer's 16-bit gradient lives at a time.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], train: Train, fast: Iterable[str] = (), *, flat: bool | None = None):
        """`parameters` by name; `fast` names those LoRA+ speeds up by `train.loraplus_ratio` (the B matrices). `flat`: whether they
        are laid flat; None: where `flat_fits`.
        """
        self.parameters, self.train = dict(parameters), train
        self.masters: dict[str, Tensor] = {}
        self._hooks = []
        for name, p in self.parameters.items():
            if p.dtype in (torch.float32, torch.float64):
                self.masters[name] = p
            else:
                master = p.detach().float()
                self.masters[name] = master
                self._hooks.append(p.register_post_accumulate_grad_hook(_move_gradient(master)))
        fast, groups = set(fast), {}
        for name, master in self.masters.items():
            ratio = train.loraplus_ratio if name in fast else 1.0
            decay = train.weight_decay if master.ndim >= 2 else 0.0
            groups.setdefault((ratio, decay), {})[name] = master
        self.ratios = [ratio for ratio, _ in groups]
        devices = {m.device.type for m in self.masters.values()}
        self.flats = (
            [Flat(group) for group in groups.values()] if (flat_fits(self.parameters.values()) if flat is None else flat) else []
        )
        tensors = [[flat.values] for flat in self.flats] or [list(group.values()) for group in groups.values()]
        chosen = [{"params": ps, "lr": 0.0, "weight_decay": decay} for (_, decay), ps in zip(groups, tensors, strict=True)]
        self.eight, self.fused = train.optimizer != "adamw", train.optimizer == "adamw" and devices <= {"cpu", "cuda"}
        if self.eight:
            self.adamw = _eight_bit(train.optimizer, devices)(chosen, betas=train.betas)
        else:
            self.adamw = (FusedAdamW if self.fused else torch.optim.AdamW)(chosen, betas=train.betas)

    def begin(self, parts: int) -> None:
        """A step of so many micro-batches begins; here they only add up (train/inside.py cannot)."""

    def outcome(self) -> str:
        """What became of a step whose loss or gradient is not finite."""
        return "step not applied"

    def set_rate(self, rate: float) -> None:
        """Set the rate of the next step; LoRA+'s fast group learns at its multiple."""
        for group, ratio in zip(self.adamw.param_groups, self.ratios, strict=True):
            group["lr"] = rate * ratio

    def rates(self) -> list[float]:
        """The rates the groups really have, for the check that they are the scheduled ones."""
        return [g["lr"] / r for g, r in zip(self.adamw.param_groups, self.ratios, strict=True)]

    def gradients(self) -> list[Tensor]:
        """All gradients that are there: one flat tensor a group, or one a master."""
        tensors = [flat.values for flat in self.flats] or list(self.masters.values())
        return [t.grad for t in tensors if t.grad is not None]

    def scale_gradients(self, factor: float | Tensor) -> None:
        torch._foreach_mul_(self.gradients(), factor)

    def gradient_norm(self) -> Tensor:
        """The norm over all gradients, a scalar on their device; nan or inf if any is."""
        grads = self.gradients()
        if not grads:
            return torch.zeros(())
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)).float())

    def step(self, loss: Tensor | None = None) -> Tensor:
        """Clip, update the masters, round them into the parameters, drop the gradients; nothing of it where `loss` or the gradient
        is nan or inf. Returns the gradient's norm, a scalar on its device.

        torch's AdamW is queued without asking the device for a number, for which it would stand idle.
        bitsandbytes' cannot be told on the device to do nothing, so with 8 bits that wait is back.
        """
        norm, limit = self.gradient_norm(), self.train.max_grad_norm
        if limit:
            self.scale_gradients((limit / (norm + 1e-6)).clamp(max=1.0))
        finite = torch.isfinite(norm)
        if loss is not None:
            finite &= torch.isfinite(loss.detach()).to(norm.device)
        if self.fused:
            self.adamw.found_inf = (~finite).float()
            self.adamw.step()
        elif finite:
            self.adamw.step()
        with torch.no_grad():
            for name, p in self.parameters.items():
                if self.masters[name] is not p:
                    p.copy_(self.masters[name])
        self.clear()
        return norm

    def clear(self) -> None:
        """Drop every gradient, also one that an interrupted backward left on a 16-bit parameter. Flat ones become zero."""
        for flat in self.flats:
            flat.values.grad.zero_()
        for tensor in (*self.masters.values(), *self.parameters.values()) if not self.flats else ():
            tensor.grad = None

    def never_moved(self) -> list[str]:
        """Names whose every gradient so far was exactly zero or absent."""
        self._settle()
        size = "exp_avg_sq", "absmax2", "state2"  # the squares' average, or what scales its 8-bit codes
        return [name for name in self.masters if not any(key in size and v.any() for key, v in self._moments(name).items())]

    def _moments(self, name: str) -> dict[str, Any]:
        """What the optimiser keeps of one parameter: its tensors are views, its step a number or a tensor of one."""
        for flat in self.flats:
            if name in flat.at:
                found = self.adamw.state.get(flat.values, {})
                return {k: v if k == "step" or k.startswith("qmap") else flat.part(name, v) for k, v in found.items()}
        return self.adamw.state.get(self.masters[name], {})

    @torch.no_grad()
    def put(self, masters: Mapping[str, Tensor]) -> None:
        """Set the masters, and through them the parameters, to these values by name."""
        for name, master in self.masters.items():
            master.copy_(masters[name])
            if master is not self.parameters[name]:
                self.parameters[name].copy_(master)

    def state(self) -> dict[str, Tensor]:
        """Masters and moments by name, for a checkpoint: plain tensors, also of 8 bits and their scales."""
        self._settle()
        out = {f"master/{n}": m.detach() for n, m in self.masters.items()}
        for name, master in self.masters.items():
            for key, value in self._moments(name).items():
                if not key.startswith("qmap"):  # the 8-bit map, one for all
                    value = value if isinstance(value, Tensor) else torch.tensor(float(value))
                    out[f"{key}/{name}"] = value.view(master.shape) if value.numel() == master.numel() else value
        return out

    def _settle(self) -> None:
        """Paged moments are main memory that the device writes: it must have done so before anyone reads them."""
        if self.train.optimizer.startswith("paged") and torch.cuda.is_available():
            torch.cuda.synchronize()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take a checkpoint's masters and moments. KeyError names what is missing: a checkpoint is whole or it is not used."""
        self.put({name: state[f"master/{name}"] for name in self.masters})
        if self.eight or self.flats:
            self._load_in_place(state)
            return
        for name, master in self.masters.items():
            moments = {key: state[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in state}
            if moments:
                counter = master.device if self.fused else "cpu"  # where torch keeps `step`
                self.adamw.state[master] = {
                    key: value.to(counter if key == "step" else master.device, copy=True) for key, value in moments.items()
                }

    @torch.no_grad()
    def _load_in_place(self, state: Mapping[str, Tensor]) -> None:
        """bitsandbytes makes its own buffers, paged ones too, and flat averages hold many parameters': a checkpoint's numbers are
        copied into them.
        """
        flats = {id(flat.values): flat for flat in self.flats}
        names = {id(master): [name] for name, master in self.masters.items()} | {key: list(f.at) for key, f in flats.items()}
        for g, group in enumerate(self.adamw.param_groups):
            for i, tensor in enumerate(group["params"]):
                there = [name for name in names[id(tensor)] if f"step/{name}" in state]
                if not there:
                    continue
                if self.eight:
                    self.adamw.init_state(group, tensor, g, i)
                else:
                    moments = {key: torch.zeros_like(tensor) for key in ("exp_avg", "exp_avg_sq")}
                    self.adamw.state[tensor] = {"step": torch.zeros((), device=tensor.device)} | moments
                kept = self.adamw.state[tensor]
                step = state[f"step/{there[0]}"]
                if self.eight and id(tensor) in flats and kept["state1"].dtype is torch.uint8:
                    # of what fills a block up nothing was saved, and code 0 is the lowest value: it would widen the block's scale
                    kept["state1"].fill_(int(kept["qmap1"].abs().argmin()))
                kept["step"] = int(step) if self.eight else step.to(tensor.device, torch.float32, copy=True)
                for name in there:
                    for key, value in self._moments(name).items():
                        if key != "step" and not key.startswith("qmap"):
                            value.copy_(state[f"{key}/{name}"].view(value.shape))
        self._settle()


def flat_fits(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether these are laid flat: all float32, on one NVIDIA GPU, and fewer than bitsandbytes counts in 32 bits."""
    parameters = list(parameters)
    kinds = {(p.dtype, p.device) for p in parameters}
    if sum(-(-p.numel() // Flat.BLOCK) * Flat.BLOCK for p in parameters) >= 1 << 31:
        return False
    return len(kinds) == 1 and all(dtype is torch.float32 and device.type == "cuda" for dtype, device in kinds)


def _eight_bit(name: str, devices: set[str]):
    """bitsandbytes' AdamW of this name. Tensors of fewer than 4,096 numbers keep their averages in float32."""
    if devices != {"cuda"}:
        raise TunesmithError(f"train.optimizer: {name} needs an NVIDIA GPU", "set train.optimizer: adamw")
    try:
        from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit
    except ImportError as e:
        fix = "pip install 'tunesmith[bnb]', or set train.optimizer: adamw"
        raise TunesmithError(f"train.optimizer: {name} needs bitsandbytes, which cannot be imported: {e}", fix) from e
    return {"adamw_8bit": AdamW8bit, "paged_adamw_8bit": PagedAdamW8bit}[name]


def _move_gradient(master: Tensor):
    def hook(p: Tensor) -> None:
        if master.grad is None:
            master.grad = p.grad.float()
        else:
            master.grad += p.grad
        p.grad = None

    return hook


@dataclass
class LossScale:
    """fp16's loss scale: doubled after `patience` good steps, halved when a gradient overflows. 1 and idle for bf16 and fp32."""

    value: float = 1.0
    good: int = 0
    patience: int = 1000

    @classmethod
    def of(cls, dtype: torch.dtype) -> LossScale:
        return cls(2.0**14) if dtype is torch.float16 else cls()

    @property
    def active(self) -> bool:
        return self.value != 1.0

    def overflowed(self) -> bool:
        """Halve; False when there is nothing left to halve, so the overflow is the model's own."""
        self.good = 0
        if self.value <= 2.0:
            return False
        self.value /= 2
        return True

    def went_well(self) -> None:
        self.good += 1
        if self.active and self.good >= self.patience:
            self.value, self.good = min(self.value * 2, 2.0**24), 0
