"""What an export begins with: a run that is checked, and its weights as they are asked for, one tensor at a time.

A tensor of the result is made when it is asked for: the base's is read from its file, quantised and decoded again where the run
was trained over 4 bits, the adapter's part is read and folded in, and the dtype is rounded to once. Nothing is held in between,
so a model of any size needs its largest tensor a few times over in main memory, and never a GPU.

Models that run through transformers are loaded whole instead: their modules are not ours to take one by one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from tunesmith import adapters, models
from tunesmith.adapters import storage
from tunesmith.adapters.swap import PREFIX, Settings, set_config
from tunesmith.data import formats
from tunesmith.data.render import Renderer, build_renderer
from tunesmith.errors import AdapterError, ModelError, RunError
from tunesmith.files import ensure_room, write_atomic
from tunesmith.hub import ResolvedModel, resolve_model
from tunesmith.models import weights
from tunesmith.models.decoder import Decoder
from tunesmith.models.linear import Linear, NF4Linear
from tunesmith.models.place import DTYPES, place
from tunesmith.models.weights import MARK, Files, Stored, check, find_tensors, read_header, write_checkpoint
from tunesmith.run import Run, base_fingerprint
from tunesmith.spec import checkpoint_quantization, linear_shapes, read_config, spec_of, support, tensor_shapes
from tunesmith.types import Conversation

STORES = ("auto", "nf4", "dense")


def untold(done: int, total: int | None) -> None:
    """Progress that nobody looks at."""


@dataclass
class Source:
    """A finished run and where its weights come from. `base` is the checkpoint under the adapter, for method full the run's own.
    `tell` hears how many of how many tensors were made; None: nobody knows how many."""

    run: Run
    base: ResolvedModel
    dtype: torch.dtype  # what an export in 16 or 32 bits is written in: the run's own
    tell: Callable[[int, int | None], None] = untold

    @property
    def full(self) -> bool:
        return self.run.config.method == "full"

    @property
    def name(self) -> str:
        return Path(os.path.abspath(self.run.path)).name  # the path may end in ..

    @property
    def hub_name(self) -> str:
        """owner/name of the model that was tuned; '' where it was a folder or the embedded one."""
        manifest = self.run.manifest
        return str(manifest.get("base_name") or "") if manifest.get("base_revision") else ""

    @property
    def origin(self) -> Path | None:
        """Where the model lies that was tuned; None where that is no longer here, which method full does not need."""
        if not self.full:
            return self.base.path
        try:
            return resolve_model(self.run.config.model, weights=False, offline=True).path
        except ModelError:
            return None

    @cached_property
    def renderer(self) -> Renderer:
        """What the run was trained with."""
        return build_renderer(self.run.tokenizer, self.run.config.data, date=self.run.manifest.get("date"), saved=True)

    @cached_property
    def held_out(self) -> list[Conversation]:
        """The rows that were never learned, as training kept them; none where the run held none out."""
        path = self.run.data / "held_out.jsonl"
        if not path.is_file():
            return []
        try:
            return [formats.from_dict(json.loads(line)) for line in path.read_text("utf-8").splitlines() if line.strip()]
        except (ValueError, KeyError, TypeError, AttributeError) as fault:
            raise RunError(f"{path}: not held-out rows as training wrote them ({fault})", "put the run's own file back") from None

    def store(self, onto: str) -> str:
        """auto is what the run was trained over."""
        if onto not in STORES:
            raise RunError(f"--onto {onto}: is not known", f"write {', '.join(STORES)}")
        if onto == "auto":
            return "nf4" if self.run.config.method == "qlora" else "dense"
        if onto == "nf4" and self.full:
            raise RunError("--onto nf4: a run of method full has no base in 4 bits", "leave --onto out")
        return onto

    @contextmanager
    def opened(self, onto: str, *, adapter: bool = True) -> Iterator[Weights]:
        """The result's weights while the files are open, or its base's alone. Raises ModelError for a model that is not native."""
        with Files() as files:
            folder = self.run.adapter if adapter and not self.full else None
            yield Weights(self.base.path, folder, self.store(onto), self.dtype, files, self.tell)

    @property
    def native(self) -> bool:
        return support(read_config(self.base.path)).state == "native"

    def write_words(self, folder: Path) -> None:
        """Tokenizer, template and generation_config.json: what ends an answer here ends it in every other program."""
        self.renderer.save(folder)
        tokenizer, stops = self.renderer.tokenizer, sorted(self.renderer.stop_ids)
        first = [i for i in (tokenizer.eos_id,) if i in stops]
        generation = {"eos_token_id": first + [i for i in stops if i not in first]}
        generation |= {f"{name}_token_id": i for name, i in (("bos", tokenizer.bos_id), ("pad", tokenizer.pad_id)) if i is not None}
        write_atomic(folder / "generation_config.json", json.dumps(generation, indent=2) + "\n", durable=False)

    def write_model(self, folder: Path, onto: str, *, shard_bytes: int = weights.SHARD_BYTES) -> None:
        """A Hugging Face folder: weights, config, tokenizer, template, what ends an answer."""
        if self.native:
            with self.opened(onto) as found:
                ensure_room(folder.parent, sum(map(math.prod, found.shapes.values())) * self.dtype.itemsize, "the export")
                write_checkpoint(folder, found.config, found.shapes, found.tensor, self.dtype, shard_bytes=shard_bytes)
                written, faults = find_tensors(folder)
                faults += [] if faults else check(found.spec, written)[1]
                if faults:  # a disk that lies
                    raise ModelError(weights.listed(folder, faults), "export again, to another disk")
        else:
            model = models.load(self.base.path, dtype=self.dtype, store=self.store(onto))
            if not self.full:
                adapters.load(model, self.run.adapter)
                adapters.merge(model, dtype=self.dtype)
            models.save_checkpoint(model, folder, dtype=self.dtype)
        self.write_words(folder)
        _name_the_ids(folder, self.renderer)


def _name_the_ids(folder: Path, renderer: Renderer) -> None:
    """config.json names the ids that its tokenizer has: some programs ask it and not generation_config.json."""
    config = read_config(folder)
    for name, index in (("bos", renderer.tokenizer.bos_id), ("eos", renderer.tokenizer.eos_id), ("pad", renderer.tokenizer.pad_id)):
        known = config.get(f"{name}_token_id")
        if index is not None and index not in (known if isinstance(known, list) else [known]):
            config[f"{name}_token_id"] = index
    write_atomic(folder / "config.json", json.dumps(config, indent=2) + "\n", durable=False)


def open_run(path: Path) -> Source:
    """Raises RunError for a run without a result, and where the base is not what it was; ModelError where it is not there."""
    run = Run.open(path)
    config, state = run.config, run.status().state
    dtype = DTYPES.get(run.manifest.get("dtype") or "") or place(config.memory).dtype
    if config.method == "full":
        if not (run.model / "config.json").is_file():
            raise RunError(
                f"{path}: this run has no result yet, its state is {state}", "finish it: tunesmith train RUN.yaml --resume"
            )
        return Source(run, ResolvedModel(run.model, str(run.model)), dtype)
    if not (run.adapter / storage.CONFIG).is_file():
        raise RunError(f"{path}: this run has no adapter yet, its state is {state}", "finish it: tunesmith train RUN.yaml --resume")
    try:
        base = resolve_model(config.model)
    except ModelError as fault:
        moved = f"where it lies elsewhere now, write that as `model` in {run.path / 'run.yaml'}"
        raise ModelError(f"the base of this run: {fault.what}", f"{fault.fix}; {moved}") from None
    if run.manifest.get("base") not in (None, base_fingerprint(base.path)):
        raise RunError(
            f"{base.path}: is not the base this run was trained on: its files have changed since", "put the former files back"
        )
    return Source(run, base, dtype)


class Weights:
    """A native model's tensors by the checkpoint's own names, the adapter in them. `shapes` lists them in order.

    base     folder of the checkpoint
    adapter  folder of a PEFT adapter, or None
    store    nf4: each linear of a layer is quantised and decoded before the adapter is added, as it was under the training
    dtype    of every tensor given
    tell     hears of each
    """

    def __init__(
        self, base: Path, adapter: Path | None, store: str, dtype: torch.dtype, files: Files,
        tell: Callable[[int, int | None], None] = untold,
    ):  # fmt: skip
        self._tell, self._made = tell, 0
        config = read_config(base)
        self.spec = spec_of(config)
        self.dtype, self.store, self._files = dtype, store, files
        self._stored, faults = find_tensors(base)
        if not faults:
            self._source, faults = check(self.spec, self._stored, quantised=checkpoint_quantization(config) is not None)
        if faults:
            raise ModelError(weights.listed(base, faults), "download the checkpoint again")
        self._linears = {f"model.layers.{i}.{name}" for i in range(self.spec.layers) for name in linear_shapes(self.spec)}
        self._adapter: dict[str, Stored] = {}
        self._whole: dict[str, Stored] = {}  # PEFT's own copy of an embedding or projection that was resized
        self.settings: Settings | None = None
        """What the adapter is, on this model; None where there is none."""
        model = Decoder(self.spec, linear=partial(_meta, dtype=dtype), config=dict(config), dtype=dtype, device="meta")
        model.tie()
        if adapter is not None:
            self._adapt(model, adapter)
        self.spec, self.config = model.spec, dict(model.config)
        self.shapes = tensor_shapes(self.spec)

    def _adapt(self, model: Decoder, folder: Path) -> None:
        """Which tensors the adapter changes, and how the vocabulary changes with it: longer, or no longer tied."""
        found, faults = read_header(folder / storage.WEIGHTS)
        if faults:
            raise AdapterError("\n".join(faults), "get this adapter again")
        settings = storage.resolve(model, storage.read_config(folder))
        self._adapter = {name.removeprefix(PREFIX): at for name, at in found.items()}
        for name, at in self._adapter.items():
            plain = name.replace(".base_layer.", ".")
            module = plain.rpartition(".")[0]
            if plain in ("model.embed_tokens.weight", "lm_head.weight") and module not in settings.modules_to_save:
                self._whole[plain] = at
        lengths = [at.shape[0] for at in self._whole.values()] + [1 + i for ids in settings.tokens.values() for i in ids]
        if lengths and max(lengths) > self.spec.vocab:
            set_config(model, "vocab_size", max(lengths))
        apart = {"lm_head", "model.embed_tokens"} & {*settings.targets, *settings.modules_to_save}
        if self.spec.tied and apart:
            set_config(model, "tie_word_embeddings", False)
        self.settings = settings
        self._check(model)

    def _check(self, model: Decoder) -> None:
        """Every tensor that the settings ask for is there, in the shape that belongs; all faults at once."""
        settings, faults = self.settings, []
        for name in settings.targets:
            module = model.get_submodule(name)
            rank = settings.rank_of(name)
            need = {"lora_A.weight": (rank, module.in_features), "lora_B.weight": (module.out_features, rank)}
            if settings.variant == "dora":
                need["lora_magnitude_vector"] = (module.out_features,)
            for leaf, shape in need.items():
                at = self._adapter.get(f"{name}.{leaf}")
                if at is None or at.shape != shape:
                    faults.append(
                        f"  {name}.{leaf}: {'missing' if at is None else f'{list(at.shape)} where {list(shape)} belongs'}"
                    )
        if faults:
            more = [f"  and {len(faults) - 8} more"] * (len(faults) > 8)
            raise AdapterError(
                "the adapter does not fit this model:\n" + "\n".join(faults[:8] + more), "use the base of this adapter"
            )

    # ---- one tensor

    def tensor(self, name: str) -> Tensor:
        """The tensor of this name on the CPU in `dtype`, freshly made."""
        self._tell(self._made, len(self.shapes))
        self._made += 1
        path, _, leaf = name.rpartition(".")
        settings = self.settings
        if settings is not None:
            whole = next((s for s in settings.modules_to_save if path == s or path.startswith(f"{s}.")), None)
            if whole is not None:
                return self.adapter(name).to(self.dtype)
            if path in settings.targets and leaf == "weight":
                return self._folded(path)
            if ids := settings.tokens.get(path):
                rows = self._token_rows(path)
                weight = self._base(name)
                weight[list(ids)] = rows.to(weight.dtype)
                return weight
        return self._base(name)

    def _folded(self, path: str) -> Tensor:
        """W + scale B A, or DoRA's, by the adapter's own code: one twin, made for this weight alone."""
        settings = self.settings
        base = self._linear(path)
        rank = settings.rank_of(path)
        method = adapters.METHODS[settings.variant]
        twin = method.twin(base, rank, method.scale(settings.alpha_of(path), rank))
        with torch.no_grad():
            for leaf, parameter in twin.tensors().items():
                parameter.copy_(self.adapter(f"{path}.{leaf}"))
        return twin.folded(self.dtype).weight.detach()

    def _linear(self, path: str) -> Linear | NF4Linear:
        """The base's linear with its weight and no bias, which no adapter reads."""
        name = f"{path}.weight"
        if path in self._linears and self.store == "nf4":
            out, into = self._shape_of(name)
            store = NF4Linear(into, out, dtype=self.dtype, device="meta")
            if group := self._packed(name):
                store.set_quantised(group)
            else:
                store.set_weight("weight", self._dense(name))
            return store
        weight = self._dense(name)
        plain = Linear(weight.shape[1], weight.shape[0], dtype=self.dtype, device="meta")
        plain.set_weight("weight", weight)
        return plain

    def _base(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        if leaf == "weight" and path in self._linears and self.store == "nf4":
            return self._linear(path).dequantize(self.dtype)
        return self._dense(name)

    def _shape_of(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def _packed(self, name: str) -> dict[str, Tensor]:
        """bitsandbytes' parts of a weight that is stored in NF4; empty where it is stored dense."""
        if name.removesuffix(".weight") + MARK not in self._stored:
            return {}
        path = name.removesuffix(".weight")
        return {
            n.removeprefix(f"{path}."): s.read(self._files(s.file))
            for n, s in self._stored.items()
            if n.startswith(f"{path}.weight")
        }

    def _dense(self, name: str) -> Tensor:
        """As the base's files hold it, in `dtype`; embedding and projection as long as the vocabulary is now."""
        if group := self._packed(name):
            out, into = self._shape_of(name)
            store = NF4Linear(into, out, dtype=self.dtype, device="meta")
            store.set_quantised(group)
            return store.dequantize(self.dtype)
        stored = self._whole.get(name)
        if stored is None:
            source = self._source.get(name) or self._source["model.embed_tokens.weight"]  # a head that is no longer tied
            stored = self._stored[source]
        found = stored.read(self._files(stored.file)).to(self.dtype)
        if name in ("model.embed_tokens.weight", "lm_head.weight") and len(found) < self.spec.vocab:
            mean = found.float().mean(0, keepdim=True).to(found.dtype)  # as adapters.swap.grow_vocabulary starts them
            found = torch.cat([found, mean.expand(self.spec.vocab - len(found), -1)])
        return found

    def _token_rows(self, path: str) -> Tensor:
        leaf = "token_adapter.trainable_tokens_delta"
        name = f"{path}.{leaf}" if f"{path}.{leaf}" in self._adapter else f"model.embed_tokens.{leaf}"  # tied: kept once
        return self.adapter(name)

    def adapter(self, name: str) -> Tensor:
        """A tensor of the adapter by PEFT's name without its prefix, as stored."""
        at = self._adapter.get(name)
        if at is None:
            raise AdapterError(f"the adapter lacks {name}", "get this adapter again")
        return at.read(self._files(at.file))

    def adapter_shape(self, name: str) -> tuple[int, ...]:
        return self._adapter[name].shape


def _meta(i: int, o: int, bias: bool, dtype: torch.dtype) -> Linear:
    return Linear(i, o, bias, dtype=dtype, device="meta")
