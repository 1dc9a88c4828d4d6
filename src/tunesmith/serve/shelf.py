"""The runs that are served over one base: opened at start, adapters loaded and dropped by name while it serves.

The first source decides the model: a run folder, a checkpoint folder, a hub id, `embedded`. Every other one is a run of the same
base, stored the same way (4 bits for qlora), or a PEFT folder over it; `--adapters FOLDER` names a folder of such, looked through
again whenever a name is asked for. A name from a client is looked up among these and is never part of a path.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith import adapters
from tunesmith.chat import ADAPTER, Talker, renderer_of
from tunesmith.config.schema import Memory
from tunesmith.data.render import Renderer, build_renderer
from tunesmith.errors import AdapterError, ConfigError, RunError, TunesmithError
from tunesmith.hub import resolve_model
from tunesmith.models import lean
from tunesmith.registry import did_you_mean
from tunesmith.run import Run
from tunesmith.serve.engine import Engine, Limits
from tunesmith.serve.job import Missing
from tunesmith.serve.service import Served

ROOM = 0.85  # of a device's free memory that decoded 4-bit weights may take


@dataclass(frozen=True, slots=True)
class Found:
    """An adapter in a folder: PEFT's files, and the run they belong to."""

    adapter: Path
    run: Run | None


class Shelf:
    """What clients may name. Thread-safe; `engine` is made but not started."""

    def __init__(self, sources: Sequence[str | Path], *, folder: Path | None = None, memory: Memory | None = None,
                 limits: dict[str, Any] | None = None):  # fmt: skip
        if not sources:
            raise ConfigError("nothing to serve", "name a run folder or a model")
        self._lock, self.folder = threading.Lock(), folder
        if folder is not None and not folder.is_dir():
            raise RunError(f"{folder}: there is no such folder", "name a folder of runs or adapters with --adapters")
        self.talker = Talker.open(sources[0], memory=memory)
        model, run = self.talker.model, self._run_of(sources[0])
        self.store = "nf4" if run is not None and run.config.method == "qlora" else "dense"
        self.notes = [self._densify(model)] if self.store == "nf4" else []
        tuned = bool(adapters.twins(model))
        self.base = run.config.model if tuned else str(sources[0])
        base_name = _short(self.base) if tuned or run is None else self.talker.name
        self.engine = Engine(model, base=base_name, limits=Limits.on(model.device, **limits or {}))
        self.served: dict[str, Served] = {}
        if tuned:
            self.engine.adopt(self.talker.name)
            self._put(self.talker.name, self.talker.renderer, adapter=self.talker.name, base=base_name)
            if base_name not in self.served:
                self._put(base_name, build_renderer(resolve_model(self.base).path))
        else:
            self._put(base_name, self.talker.renderer)
        self._under, self._sources = base_name, {}
        for source in sources[1:]:
            found = self._found(Path(source))
            if found is None:
                raise RunError(
                    f"{source}: neither a run with an adapter nor an adapter", "name run folders or PEFT folders after the first"
                )
            name = self._name(found)
            if name in self._sources or name in self.served:
                raise ConfigError(f"{source}: a second model named {name!r}", "rename one of the folders")
            self._sources[name] = found
            self.load(name)

    # ---- for the service

    def models(self) -> dict[str, Served]:
        return dict(self.served)

    def adapters(self) -> dict[str, bool]:
        """Names that may be loaded, and whether they are."""
        return {name: name in self.served for name in sorted({*self._known(), *(n for n, s in self.served.items() if s.adapter)})}

    def load(self, name: str) -> Served:
        """Raises Missing for a name that is not among the folders, AdapterError for an adapter that does not fit the base."""
        with self._lock:
            if name in self.served:
                return self.served[name]
            known = self._known()
            if name not in known:
                raise Missing(f"no adapter {name[:80]!r} here", did_you_mean(name[:80], known) or "name its folder at start")
            found = known[name]
            try:
                if found.run is not None:
                    self._same_base(found.run)
                renderer = self._renderer(found)
                self.engine.load(name, found.adapter)
            except TunesmithError as e:  # clients may read it: names say enough
                raise AdapterError(_placeless(e.what, found, name), _placeless(e.fix, found, name)) from None
            return self._put(name, renderer, adapter=name, base=self._under)

    def drop(self, name: str) -> None:
        """Answers of it that are on their way end. Raises Missing for a name that is not loaded, or is no adapter."""
        with self._lock:
            served = self.served.get(name)
            if served is None or not served.adapter:
                loaded = [n for n, s in self.served.items() if s.adapter]
                raise Missing(f"no adapter {name[:80]!r} is loaded", did_you_mean(name[:80], loaded))
            del self.served[name]
            self.engine.drop(name)
            served.renderer.close()

    def close(self) -> None:
        self.engine.close()
        for served in self.served.values():
            served.renderer.close()

    # ---- inside

    def _put(self, name: str, renderer: Renderer, adapter: str = "", base: str = "") -> Served:
        renderer.stop_ids  # noqa: B018 - vets the template now, not with the first request
        self.served[name] = Served(name, renderer, adapter, base)
        return self.served[name]

    def _known(self) -> dict[str, Found]:
        """By name: the sources given at start, and what the folder holds now."""
        found: dict[str, Found] = {}
        for path in sorted(self.folder.iterdir()) if self.folder is not None else ():
            try:
                one = self._found(path)
            except (TunesmithError, OSError) as e:  # damaged, or being written: not offered, and the others are
                print(f"note    {path.name}: {str(e).splitlines()[0]}", file=sys.stderr, flush=True)
                continue
            if one is not None:
                found[self._name(one)] = one
        return found | self._sources

    @staticmethod
    def _found(path: Path) -> Found | None:
        if (path / "run.yaml").is_file():
            run = Run.open(path)
            return Found(run.adapter, run) if (run.adapter / ADAPTER).is_file() else None
        return Found(path, None) if (path / ADAPTER).is_file() else None

    @staticmethod
    def _name(found: Found) -> str:
        return (found.adapter if found.run is None else found.run.path).absolute().name

    @staticmethod
    def _run_of(source: str | Path) -> Run | None:
        return Run.open(source) if (Path(source) / "run.yaml").is_file() else None

    def _renderer(self, found: Found) -> Renderer:
        if found.run is not None:
            return renderer_of(found.run)
        own = found.adapter if (found.adapter / "tokenizer.json").is_file() else None
        return build_renderer(own or resolve_model(self.base).path)

    def _same_base(self, run: Run) -> None:
        config = run.config
        base, ours = resolve_model(config.model).path, resolve_model(self.base).path
        if Path(base).resolve() != Path(ours).resolve():
            raise AdapterError(
                f"{run.path.name}: it was tuned over {_short(config.model)}, another base", "serve it with a server of its own"
            )
        store = "nf4" if config.method == "qlora" else "dense"
        if store != self.store:
            words = {"nf4": "over the base in 4 bits", "dense": "over the base in 16 bits"}
            raise AdapterError(f"{run.path.name}: it was tuned {words[store]}, and here the base lies {words[self.store][14:]}",
                               "serve it with a server of its own")  # fmt: skip

    @staticmethod
    def _densify(model: Any) -> str:
        """4-bit weights are decoded at start where there is room: the numbers are the same, and no step decodes them again."""
        import torch

        weights = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, lean.NF4Linear))
        size = torch.finfo(next(m.dtype for m in model.modules() if isinstance(m, lean.NF4Linear))).bits // 8
        if model.device.type == "cuda":
            free = torch.cuda.mem_get_info(model.device)[0]
        else:
            from tunesmith.serve.engine import main_memory

            free = main_memory()
        if weights * size > ROOM * free - (2 << 30 if model.device.type == "cuda" else 0):
            return "4-bit weights are decoded again at each step: there is no room for them decoded; slow"
        count = lean.densify(model)
        return f"{count} linears decoded from 4 bits once: {weights * size / 2**30:.1f} GiB"


def _short(model: str) -> str:
    """What clients call a base: a folder's own name, no path of this machine; a hub id without its revision."""
    return Path(model).absolute().name if Path(model).exists() else model.partition("@")[0]


def _placeless(text: str, found: Found, name: str) -> str:
    """Without folders of this machine: the adapter's own becomes its name, any other path its last part."""
    for path in (found.adapter, *(() if found.run is None else (found.run.path,))):
        for place in (path.resolve(), path.absolute(), path):
            text = text.replace(str(place), name)
    return re.sub(r"(?<![\w.:/])(?:~|\.{1,2})?/(?:[^\s/'\":,;]+/)*(?=[^\s/])", "", text)
