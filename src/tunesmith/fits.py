"""What a model takes and what fits where, without data: each way to use it on one card, and on the sizes that cards are sold in.

Every number is plan.py's, asked for rows that all have one length. No torch, under a second.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tunesmith.config.schema import RunConfig
from tunesmith.devices import GIB, Device, parse_device, smallest_that_holds
from tunesmith.errors import ConfigError
from tunesmith.plan import METHODS, MICRO_CAP, Component, answering, budget_of, least, pinnable, usable, ways
from tunesmith.plan.page import gb, print_fits
from tunesmith.spec import Spec

if TYPE_CHECKING:
    from rich.console import Console

Way = Literal["inference", "full", "lora", "qlora"]
WAYS: tuple[Way, ...] = ("inference", *reversed(METHODS))
SIZES = {8: "8GB", 12: "12GB", 16: "16GB", 24: "24GB", 48: "48GB", 80: "80GB", 141: "h200"}  # GB on the box: the card that is asked
USUAL = 2048  # tokens: the context where none is named, and the rows whose micro-batch is counted
SHORTEST = 256  # tokens: shorter rows are not looked for
NEAR = 1.0  # GiB: by less than this, more rows at once are leaner than one
PARTS = {  # components by what they are for; of a way, those that are there
    "weights": ("linear weights", "embedding, head, norms", "decoded weights"),
    "trained": ("adapter", "room for adapters", "masters", "gradients", "optimiser"),
    "activations": ("activations", "largest transient"),
    "answers": ("KV cache", "reading, logits", "sample answers"),
    "overhead": ("context, allocator",),
}


@dataclass(frozen=True)
class Use:
    """One way to use the model on the device. Sizes are GiB."""

    way: Way
    activations: str  # empty: nothing is trained
    tokens: int  # at once
    components: tuple[Component, ...]
    least: float  # with nothing kept that can be made again and one row at a time

    @cached_property
    def needs(self) -> float:
        return sum(self.parts.values())

    @cached_property
    def parts(self) -> dict[str, float]:
        """GiB on the device by what they are for (PARTS)."""
        on_device = [c for c in self.components if c.where == "device"]
        return {part: sum(c.bytes for c in on_device if c.name in names) / GIB for part, names in PARTS.items()}

    @property
    def beside(self) -> dict[str, float]:
        """GiB of main memory beside a GPU, and on disk with all that training may leave."""
        places = {"main memory": "host", "disk": "disk"}
        return {name: sum(c.bytes for c in self.components if c.where == where) / GIB for name, where in places.items()}


@dataclass(frozen=True)
class Fits:
    """`uses` on one device at one context; `longest` and `micro_batch` for each way and size of SIZES, 0 where nothing fits."""

    model: str
    device: Device
    budget: float
    context: int
    reach: int  # tokens that the checkpoint was made for
    rows: int  # tokens of the rows that `micro_batch` counts
    uses: tuple[Use, ...]
    longest: dict[Way, tuple[int, ...]]
    micro_batch: dict[Way, tuple[int, ...]]
    floor: tuple[Way, float, float]  # the leanest way, what it takes at `context`, and at the shortest
    page: Path | None = None
    sizes: tuple[int, ...] = tuple(SIZES)

    @property
    def table(self) -> list[tuple[str, ...]]:
        """A row for each component of any way: its name, and GB in each way; main memory and disk last."""
        names = dict.fromkeys(c.name for use in self.uses for c in use.components if c.where == "device" and c.bytes)
        order = [name for part in PARTS.values() for name in part if name in names]
        rows = [(name, [sum(c.bytes for c in u.components if c.name == name and c.where == "device") / GIB for u in self.uses])
                for name in order]  # fmt: skip
        rows += [(place, [use.beside[place] for use in self.uses]) for place in ("main memory", "disk")]
        return [(name, *(gb(size, 2) if size else "-" for size in sizes)) for name, sizes in rows]

    @property
    def notes(self) -> tuple[str, ...]:
        return (
            "longest row: the longest context that fits, one row at a time; k is 1,024 tokens",
            f"rows of {self.rows:,} tokens: so many of them fit at once, up to {MICRO_CAP['cuda']:,}, where no more is gained",
            "training counts answers to held-out rows, as long as the longest row; eval.samples=0 spares them",
            "memory is counted from config.json, without the weights",
        )

    def holds(self, use: Use) -> bool:
        """Whether the device has room for it."""
        return use.needs <= usable(self.budget, self.device)

    @property
    def fits(self) -> bool:
        """Whether any way does."""
        return any(map(self.holds, self.uses))

    @property
    def verdict(self) -> tuple[str, str]:
        """What fits, and what would lower the rest or the floor."""
        fitting = [use.way for use in self.uses if self.holds(use)]
        rest = [use for use in self.uses if not self.holds(use)]
        at = f"{gb(self.budget)} GB at {self.context:,} tokens"
        if not fitting:
            way, here, shortest = self.floor
            shorter = f"--context {SHORTEST} ({gb(shortest)} GB), " if shortest < 0.99 * here else ""
            card = smallest_that_holds(here)
            fix = f"{shorter}a smaller model" + (f", or a card such as {card.name}" if card else "")
            return f"nothing fits {at}: the floor is {gb(here)} GB, with {way}", f"what lowers it: {fix}"
        return f"{', '.join(fitting)} fit{'s' * (len(fitting) == 1)} {at}", "; ".join(
            f"{use.way} takes {gb(use.least)} GB at the least" for use in rest
        )

    def print(self, console: Console | None = None) -> None:
        from rich.console import Console

        print_fits(self, console or Console())


def what_fits(config: RunConfig, spec: Spec, device: Device, context: int | None = None) -> Fits:
    """All ways of using the model. `config` gives the settings of its method's section, its data is not read.

    Raises ConfigError for a context that the checkpoint was not made for.
    """
    rows = min(USUAL, spec.reach)
    context = rows if context is None else context
    if not 8 <= context <= spec.reach:
        what = "is too short" if context < 8 else f"is beyond the checkpoint's: it was made for {spec.reach:,} tokens"
        raise ConfigError(f"--context {context:,} {what}", f"give 8 to {spec.reach}")
    config = config.model_copy(update={"data": config.data.model_copy(update={"max_length": spec.reach})})

    def inference(length: int, count: int, where: Device) -> Use:
        parts = answering(config, spec, length=length, count=count, device=where)
        return Use("inference", "", length * count, parts, sum(c.bytes for c in parts if c.where == "device") / GIB)

    known: dict[tuple[Any, ...], float] = {}

    def needs(way: Way, length: int, tokens: int | None, where: Device) -> float:
        """GiB at the least. It depends on the kind of device and the main memory beside it, which several cards share."""
        key = (way, length, tokens, where.kind, where.bf16, where.link > 0, pinnable(where))
        if key not in known and way == "inference":
            known[key] = inference(length, (tokens or length) // length, where).needs
        elif key not in known:
            known[key] = least(config, spec, way, length=length, tokens=tokens, device=where)
        return known[key]

    def goes(way: Way, length: int, card: Device) -> bool:
        """Whether rows of this length fit; more of them at once, which are not recorded, can be a little leaner than one."""
        room, one = usable(card.total / GIB, card), needs(way, length, length, card)
        return one <= room or (one <= room + NEAR and needs(way, length, None, card) <= room)

    uses = [inference(context, 1, device)]
    for choice, floor, components in reversed(ways(config, spec, length=context, device=device)):
        uses.append(Use(choice.method, choice.activations, choice.micro_batch_tokens, components, floor))
    cards = [parse_device(name) for name in SIZES.values()]
    lengths = _lengths(spec.reach)
    counts = [rows << k for k in range(20) if rows << k <= max(rows, MICRO_CAP["cuda"])]
    leanest = min(uses, key=lambda use: use.least)
    return Fits(
        model=config.model, device=device, budget=float(budget_of(config, device)), context=context, reach=spec.reach, rows=rows,
        uses=tuple(uses),
        longest={way: _most(lengths, cards, lambda n, card, way=way: goes(way, n, card)) for way in WAYS},
        micro_batch={
            way: _most(counts, cards, lambda n, card, way=way: needs(way, rows, n, card) <= usable(card.total / GIB, card))
            for way in WAYS
        },
        floor=(leanest.way, leanest.least, needs(leanest.way, min(context, SHORTEST), None, device)),
    )  # fmt: skip


def _lengths(reach: int) -> list[int]:
    """Eight to each doubling, and the longest."""
    steps = [eighth << k for k in range(5, 40) for eighth in range(8, 16)]
    return [n for n in steps if SHORTEST <= n < reach] + [reach]


def _most(sizes: Sequence[int], cards: Sequence[Device], goes: Callable[[int, Device], bool]) -> tuple[int, ...]:
    """For each card, smallest first, the largest of the rising sizes that fits it; 0 where none does."""
    found: list[int] = []
    at = 0  # so many fit the card before
    for card in cards:
        if at < len(sizes) and goes(sizes[-1], card):
            at = len(sizes)
        elif at < len(sizes):
            at = bisect_left(sizes, True, lo=at, hi=len(sizes) - 1, key=lambda n, card=card: not goes(n, card))
        found.append(sizes[at - 1] if at else 0)
    return tuple(found)
