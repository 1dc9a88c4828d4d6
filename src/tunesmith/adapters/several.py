"""Several adapters over one base at once: each row of a pass takes its own, and all rows share the base's product.

    bank = Bank(model)
    bank.load("support", folder)            PEFT's files; AdapterError leaves everything as it was
    bank.choose([bank.number("support"), 0, ...])    for each row of the next pass; 0 is the base
    bank.drop("support")

Plain and rank-stabilised LoRA of all adapters lie stacked, A [R, I] and B [O, R]: a row's product with A is multiplied by its scale
where the rank is its own adapter's and by 0 elsewhere, so that any mix of adapters is two products more. DoRA, trained tokens and
modules trained whole run for their rows alone, adapter by adapter.

Shape letters: T rows of a pass, I inputs, O outputs, R ranks of all adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tunesmith.adapters import storage
from tunesmith.adapters.lora import Lora, Twin, is_conv1d, is_linear
from tunesmith.adapters.swap import at, root, twins, vocabulary
from tunesmith.errors import AdapterError
from tunesmith.ops.attention import to_device
from tunesmith.registry import did_you_mean

MERGE = "merge it and serve the merged folder alone: tunesmith merge RUN OUT"


class Choice:
    """The adapter of each row of a pass, by number; None where all take the base."""

    def __init__(self):
        self.number_T: Tensor | None = None
        self.rows: Tensor | None = None
        self.present: frozenset[int] = frozenset()
        self._masks: dict[object, Tensor] = {}

    def of(self, rows: int) -> Tensor | None:
        """For a module that gets `rows` rows: all of the stream, or those of them that come out of the last layer."""
        if self.number_T is None or rows == len(self.number_T):
            return self.number_T
        assert self.rows is not None and rows == len(self.rows), "a module got rows that nobody chose an adapter for"
        return self.number_T[self.rows]

    def mask(self, owner_R: Tensor, scale_R: Tensor, signature: tuple, number_T: Tensor) -> Tensor:
        """[T, R]: a rank's scale where it is the row's own, else 0. Made once a pass for all modules of one signature."""
        key = signature, len(number_T)
        if key not in self._masks:
            self._masks[key] = torch.where(number_T[:, None] == owner_R, scale_R, 0)
        return self._masks[key]

    def clear(self) -> None:
        self._masks.clear()


class Stack:
    """The low-rank parts of some adapters over linears that share an input: A [R, I], B [O, R], whose rank is whose."""

    def __init__(self, parts: Sequence[tuple[int, Lora, int]], outputs: int, dtype: torch.dtype):
        """`parts`: (adapter's number, twin, first of its outputs)."""
        device, ranks = parts[0][1].lora_A.device, [twin.rank for _, twin, _ in parts]
        with torch.no_grad():
            self.a_RI = torch.cat([twin.lora_A for _, twin, _ in parts]).to(dtype)
            self.b_OR = torch.zeros(outputs, sum(ranks), dtype=dtype, device=device)
            column = 0
            for (_, twin, row), rank in zip(parts, ranks, strict=True):
                self.b_OR[row : row + twin.out_features, column : column + rank] = twin.lora_B.to(dtype)
                column += rank
        owners = [(number, twin.scale) for (number, twin, _), rank in zip(parts, ranks, strict=True) for _ in range(rank)]
        self.signature = tuple(owners)
        self.owner_R = torch.tensor([number for number, _ in owners], device=device)
        self.scale_R = torch.tensor([scale for _, scale in owners], dtype=dtype, device=device)

    def add(self, x_TI: Tensor, y_TO: Tensor, choice: Choice, number_T: Tensor) -> None:
        """y += scale B A x, each row by its own adapter."""
        low_TR = F.linear(x_TI, self.a_RI) * choice.mask(self.owner_R, self.scale_R, self.signature, number_T)
        y_TO.addmm_(low_TR, self.b_OR.t())


class Stacked:
    """A stack with the choice it follows."""

    def __init__(self, stack: Stack, choice: Choice):
        self.stack, self.choice = stack, choice

    def add(self, x_TI: Tensor, y_TO: Tensor) -> None:
        number_T = self.choice.of(len(x_TI))
        if number_T is not None:
            self.stack.add(x_TI, y_TO, self.choice, number_T)


class Several(nn.Module):
    """A module in the place of `base` that answers for each row with that row's adapter."""

    def __init__(self, base: nn.Module, choice: Choice):
        super().__init__()
        self.base, self.choice = base, choice
        self.own: dict[int, Twin] = {}  # not submodules: their bases are this one's
        self.stack: Stack | None = None
        self.train(base.training)

    def refresh(self) -> None:
        """Follow `own` as it is now."""
        parts = [(number, twin, 0) for number, twin in self.own.items() if type(twin) is Lora]
        dtype = self.base.weight.dtype if self.base.weight.is_floating_point() else self.base.dtype
        self.stack = Stack(parts, parts[0][1].out_features, dtype) if parts else None

    @property
    def plain(self) -> bool:
        """Whether every adapter here is nothing but a low-rank product."""
        return all(type(twin) is Lora for twin in self.own.values())

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.base, "bias", None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        number_T = self.choice.of(len(x))
        if number_T is None:
            return y
        if self.stack is not None:
            self.stack.add(x, y, self.choice, number_T)
        for number in self.choice.present:
            twin = self.own.get(number)
            if twin is not None and type(twin) is not Lora:
                rows = (number_T == number).nonzero()[:, 0]
                if len(rows):
                    y = y.index_copy(0, rows, twin(x[rows]).to(y.dtype))
        return y


class Bank:
    """The adapters of one model, by name. Not for several threads: who runs the model calls it between passes."""

    def __init__(self, model: nn.Module):
        self.model, self.choice = model, Choice()
        self._numbers: dict[str, int] = {}
        self._places: dict[str, Several] = {}
        self._last = 0

    @property
    def names(self) -> list[str]:
        return list(self._numbers)

    @property
    def numbers(self) -> list[int]:
        return list(self._numbers.values())

    @property
    def plain(self) -> bool:
        """Whether all adapters are nothing but low-rank products."""
        return all(place.plain for place in self._places.values())

    def number(self, name: str) -> int:
        if name not in self._numbers:
            raise AdapterError(f"no adapter {name!r} is loaded", did_you_mean(name, self._numbers) or "load it first")
        return self._numbers[name]

    def choose(self, numbers: Sequence[int], rows: Tensor | None = None) -> None:
        """The adapter of each row of the next pass; `rows`: those that come out of its last layer."""
        self.choice.clear()
        self.choice.present = frozenset(numbers) - {0}
        self.choice.rows = rows
        self.choice.number_T = to_device(torch.tensor(numbers), self.model.device) if self.choice.present else None

    def adopt(self, name: str) -> None:
        """The adapter that is on the model already, under this name."""
        assert not self._numbers, "only the first adapter can come with the model"
        self._keep(name, self._unswap())

    def load(self, name: str, folder: str | Path) -> None:
        """PEFT's files in `folder`, under `name`. Raises AdapterError, and then nothing has changed."""
        if name in self._numbers:
            raise AdapterError(f"an adapter {name!r} is loaded already", "drop it first, or choose another name")
        self._check(Path(folder))
        self._restore()
        try:
            storage.load(self.model, folder)
            found = self._unswap()
            wrong = [n for n, twin in found.items() if not (is_linear(twin.base) or not list(twin.base.children()))]
            conv = [n for n, twin in found.items() if is_conv1d(twin.base)]
            if wrong or conv:
                which = ", ".join((wrong + conv)[:3])
                raise AdapterError(f"{folder}: it trains {which} in a way that is not served beside others", MERGE)
            self._keep(name, found)
        finally:
            self._unswap()
            for place, several in self._places.items():
                root(self.model).set_submodule(place, several)

    def drop(self, name: str) -> None:
        """Its memory is free when this returns."""
        number = self.number(name)
        del self._numbers[name]
        for place, several in list(self._places.items()):
            if several.own.pop(number, None) is not None:
                several.refresh()
            if not several.own:
                root(self.model).set_submodule(place, self._places.pop(place).base)
        self.choose([])

    def stacked(self, modules: Sequence[nn.Module], starts: Sequence[int], outputs: int) -> Stacked | None:
        """The low-rank parts over linears that became one matrix, whose outputs begin at `starts`; None where there are none."""
        found = zip(modules, starts, strict=True)
        parts = [(number, twin, row) for m, row in found if isinstance(m, Several) for number, twin in m.own.items()]
        return Stacked(Stack(parts, outputs, modules[0].weight.dtype), self.choice) if parts else None

    # ---- inside

    def _keep(self, name: str, found: dict[str, Twin]) -> None:
        self._last += 1
        self._numbers[name] = self._last
        for place, twin in found.items():
            twin.eval().requires_grad_(False)
            if place not in self._places:
                self._places[place] = Several(twin.base, self.choice)
                root(self.model).set_submodule(place, self._places[place])
            self._places[place].own[self._last] = twin
            self._places[place].refresh()

    def _unswap(self) -> dict[str, Twin]:
        """The model's twins, taken out of it."""
        found = twins(self.model)
        for place, twin in found.items():
            root(self.model).set_submodule(place, twin.base)
        return found

    def _restore(self) -> None:
        for place, several in self._places.items():
            root(self.model).set_submodule(place, several.base)

    def _check(self, folder: Path) -> None:
        """An adapter that changes the base's vocabulary would change it for all."""
        config, tensors = storage.read_config(folder), storage.read_tensors(folder)
        names = [name for name in vocabulary(self.model) if name is not None]
        base = {name: at(self.model, name).weight for name in names}
        saved = config.get("modules_to_save") or []
        for key, tensor in tensors.items():
            name, _, leaf = key.replace(".base_layer.", ".").rpartition(".")
            if leaf == "weight" and name in base and not any(name.endswith(s) for s in saved):
                place = base[name]
                if tensor.shape != place.shape or not torch.equal(tensor.to(place), place):
                    raise AdapterError(f"{folder}: it changes {name} of the base", MERGE)
        wanted = config.get("trainable_token_indices") or []
        ids = [i for part in (wanted.values() if isinstance(wanted, dict) else [wanted]) for i in part]
        if base and ids and max(ids) >= len(next(iter(base.values()))):
            raise AdapterError(f"{folder}: it adds tokens to the base's vocabulary", MERGE)
