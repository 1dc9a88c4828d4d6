"""AdamW inside the backward: each weight is updated, and its gradient dropped, as soon as its gradient is whole.

`train.optimizer: adamw_8bit_inside`, for method: full. Gradients never stand side by side and there are no float32 masters, so that
beside activations a weight takes 4.03 bytes: itself in bf16, two 8-bit averages, their scales (ops/adamw8.py). Where adamw takes 18
and adamw_8bit 12.03, a Mistral-7B's 7.24 billion take 27.2 GiB. What is given up for it:

    one backward a step     the gradients of several micro-batches cannot add up: a weight has moved when the second comes
    no clipping             the norm of all gradients is known when all weights have moved; it is still measured and recorded
    no loss scale           fp16's gradients overflow, and such a step could not be taken back
    no way back             a weight whose own gradient is nan or inf stays as it is, decided on the device; those before it in the
                            backward have moved. A nan in the loss reaches every gradient, so then nothing moves. Out of memory
                            after the first update ends the run, whose checkpoint stands
    masters                 a bf16 weight is rounded stochastically: small steps count on average, with noise

A step follows from (seed, step, weight's name): a run that continues from a checkpoint repeats an unbroken one to the bit.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from tunesmith.config.schema import INSIDE, Train
from tunesmith.errors import DoesNotFit, TrainingFailed, TunesmithError
from tunesmith.ops import adamw8
from tunesmith.ops.adamw8 import Averages, How
from tunesmith.train.loss import draw
from tunesmith.train.optim import Optimizer

UNSEEN = -1.0  # in the place of a gradient's norm


def optimizer_for(parameters: Mapping[str, nn.Parameter], train: Train, *, fast: Iterable[str], seed: int) -> Optimizer | Inside:
    """The optimiser that `train` asks for; they have one face."""
    return Inside(parameters, train, seed) if train.optimizer == INSIDE else Optimizer(parameters, train, fast)


class Inside:
    """The face of `Optimizer`. Only the backward that follows `begin` updates; any other measures its gradients and drops them."""

    flats = ()  # nothing lies flat: passes are not recorded

    def __init__(self, parameters: Mapping[str, nn.Parameter], train: Train, seed: int):
        self.parameters, self.train, self.seed = dict(parameters), train, seed
        self.masters = self.parameters  # a weight is its own
        for name, p in self.parameters.items():
            if p.dtype not in (torch.bfloat16, torch.float32):
                raise TunesmithError(f"train.optimizer: {INSIDE}: {name} is {p.dtype}", "set memory.dtype: bf16")
            if not p.is_contiguous() or p.numel() >= 1 << 31:
                raise TunesmithError(
                    f"train.optimizer: {INSIDE}: {name} is strided or too large", "set train.optimizer: adamw_8bit"
                )
        device, count = next(iter(self.parameters.values())).device, len(self.parameters)
        self.averages = {name: Averages.of(p) for name, p in self.parameters.items()}
        self.norms = torch.full((count,), UNSEEN, device=device)  # of the last backward's gradients
        self.counts = torch.zeros(count, dtype=torch.float64, device=device)  # updates of each weight so far
        self.names = torch.from_numpy(np.stack([_int32(draw(zlib.crc32(n.encode()))) for n in self.parameters])).to(device)
        self.keys, self.corrections = torch.zeros_like(self.names), torch.zeros(count, 2, device=device)
        self.steps, self.rate = 0, 0.0
        self.armed = False
        self.moved: set[str] = set()  # since `begin`
        of = zip(self.norms.unbind(), self.corrections.unbind(), self.keys.unbind(), strict=True)
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._hook(name, *views))
            for (name, p), views in zip(self.parameters.items(), of, strict=True)
        ]

    @torch.no_grad()
    def begin(self, parts: int) -> None:
        """The next backward is the step's; it has `parts` micro-batches, which must be one."""
        if parts != 1:
            what = f"step {self.steps + 1} takes {parts} micro-batches, and train.optimizer: {INSIDE} updates within the first"
            raise TrainingFailed(what, "lower train.batch_size, or set train.optimizer: adamw_8bit")
        self.norms.fill_(UNSEEN)
        b1, b2 = self.train.betas
        self.corrections[:, 0] = 1 / (1 - torch.pow(b1, self.counts + 1))
        self.corrections[:, 1] = 1 / (1 - torch.pow(b2, self.counts + 1)).sqrt()
        for column, bits in enumerate(_int32(draw(self.seed, self.steps)).tolist()):
            self.keys[:, column] = self.names[:, column] ^ bits
        self.armed, self.moved = True, set()

    def _hook(self, name: str, norm: Tensor, correction: Tensor, keys: Tensor) -> Callable[[nn.Parameter], None]:
        @torch.no_grad()
        def hook(p: nn.Parameter) -> None:
            gradient, p.grad = p.grad, None
            torch.linalg.vector_norm(gradient, dtype=torch.float32, out=norm)
            if not self.armed:
                return
            if name in self.moved:
                raise TunesmithError(
                    f"train.optimizer: {INSIDE}: the gradient of {name} came in two parts", "set train.optimizer: adamw_8bit"
                )
            self.moved.add(name)
            how = How(self.rate, self.train.betas, self.train.weight_decay if p.ndim >= 2 else 0.0)
            adamw8.update_(p, gradient, self.averages[name], how, norm, correction, keys)

        return hook

    def step(self, loss: Tensor | None = None) -> Tensor:
        """End the step: count what moved. Returns the norm over all gradients, a scalar on their device."""
        self.counts += self._applied()
        self.steps += 1
        self.armed = False
        return self.gradient_norm()

    def _applied(self) -> Tensor:
        """Which weights the last backward has moved, or would have."""
        return torch.isfinite(self.norms) & (self.norms >= 0)

    def outcome(self) -> str:
        """What became of a step whose loss or gradient is not finite."""
        moved = int(self._applied().sum()) if self.moved else 0
        return f"step applied to {moved} of {len(self.parameters)} weights only" if moved else "step not applied"

    def gradient_norm(self) -> Tensor:
        """The norm over the gradients of the last backward; nan or inf if any is."""
        return torch.linalg.vector_norm(self.norms.clamp(min=0))

    def clear(self) -> None:
        """As if there had been no backward. DoesNotFit where it has moved weights: they cannot be moved back."""
        for p in self.parameters.values():
            p.grad = None
        self.norms.fill_(UNSEEN)
        if self.armed and self.moved:
            raise DoesNotFit(
                f"step {self.steps + 1} ran out of device memory after {len(self.moved)} of {len(self.parameters)} weights were "
                f"updated, which train.optimizer: {INSIDE} cannot take back",
                "set memory.activations: checkpoint, or lower train.batch_size or data.max_length; the last checkpoint stands",
            )
        self.armed = False

    def set_rate(self, rate: float) -> None:
        self.rate = rate

    def rates(self) -> list[float]:
        return [self.rate]

    def scale_gradients(self, factor: float | Tensor) -> None:
        raise AssertionError("a loss scale was refused when the run file was read")

    def never_moved(self) -> list[str]:
        """Names whose every gradient so far was exactly zero or absent."""
        return [name for name, a in self.averages.items() if not (a.m_scale.any() or a.v_scale.any())]

    @torch.no_grad()
    def put(self, masters: Mapping[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            p.copy_(masters[name])

    def state(self) -> dict[str, Tensor]:
        """Weights, averages and counts by name, for a checkpoint."""
        out = {"steps": torch.tensor(self.steps)}
        counts = self.counts.cpu()
        for i, (name, p) in enumerate(self.parameters.items()):
            a = self.averages[name]
            out |= {
                f"master/{name}": p.detach(), f"step/{name}": counts[i].clone(), f"exp_avg/{name}": a.m, f"exp_avg_sq/{name}": a.v,
                f"exp_avg_scale/{name}": a.m_scale, f"exp_avg_sq_scale/{name}": a.v_scale,
            }  # fmt: skip
        return out

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take a checkpoint's. KeyError names what is missing."""
        self.put({name: state[f"master/{name}"] for name in self.parameters})
        self.counts.copy_(torch.stack([state[f"step/{name}"] for name in self.parameters]))
        for name, a in self.averages.items():
            a.m.copy_(state[f"exp_avg/{name}"]), a.v.copy_(state[f"exp_avg_sq/{name}"])
            a.m_scale.copy_(state[f"exp_avg_scale/{name}"]), a.v_scale.copy_(state[f"exp_avg_sq_scale/{name}"])
        self.steps = int(state["steps"])


def _int32(bits: int) -> np.ndarray:
    """64 bits as two int32."""
    return np.array([bits], np.uint64).view(np.int32)
