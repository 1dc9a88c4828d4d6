"""Any transformers causal language model behind the Decoder's face: slower, same trainer, same adapters.

The only room that imports transformers' modelling code. What a checkpoint may decide is narrow: config.json is cut down to the keys
its config class declares, weights come through our own safetensors reader, and no code of a checkpoint is ever run.

Packing several documents into one stream isolates them in some models and leaks in silence in others (no error, wrong losses).
So at load document A is changed and document B must not move, by exactly nothing, and must answer as it does alone; where it
moves, documents run one by one, and `note` says so. The logits, and the key/value cache, are put to the same kind of test.

Shape letters: T tokens in the stream, N documents, t tokens of one document, L chosen rows, D model width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tunesmith.errors import MissingExtra, ModelError, install
from tunesmith.models import weights
from tunesmith.models.linear import NF4Linear
from tunesmith.models.weights import FLOATS, MARK, QUANTISED, Progress, Stored
from tunesmith.ops.attention import Layout
from tunesmith.spec import checkpoint_quantization, read_config

NEEDED = (5, 17)  # transformers, and below 6

# Fields that every config class declares and that a checkpoint has no say in: how it runs, what it returns, what it was called.
OURS = {"dtype", "torch_dtype", "output_hidden_states", "output_attentions", "return_dict", "use_cache", "chunk_size_feed_forward",
        "problem_type", "id2label", "label2id", "num_labels", "transformers_version", "architectures", "is_encoder_decoder",
        "use_mambapy", "pretraining_tp", "slow_but_exact", "gradient_checkpointing"}  # fmt: skip
# Older spellings that the config classes still read, in the text models of transformers 5.17 to 5.23.
OLDER = {"rope_theta", "rope_scaling", "rotary_pct", "rotary_emb_base", "rotary_dim", "partial_rotary_factor", "n_embed",
         "rope_local_base_freq", "local_rope_theta", "global_rope_theta", "swa_rope_theta", "sliding_window_pattern",
         "sliding_window_size", "original_max_position_embeddings", "use_sliding_window", "tie_word_embeddings", "moe_layer_freq",
         "first_k_dense_replace", "full_attention_interval", "no_rope_layer_interval", "head_dim", "attention_bias"}  # fmt: skip
DROPOUT = re.compile(
    r"(?!summary|classifier)(.*_)?(p?drop|layerdrop|dropout)(_rate|_prob|_p)?"
)  # attn_pdrop, attention_dropout, dropout_p
DERIVED = re.compile(r"(rotary_emb\.inv_freq|(^|\.)position_ids|\.att(n|ention)\.(masked_)?bias)$")  # buffers of older versions
LINEARS = ("Linear", "FalconLinear", "Conv1D")  # by name, as is: another subclass may do more than multiply
READ_DIRECTLY = ("dt_proj",)  # mamba multiplies by its weight without calling it
LENGTH_BOUND = ("dynamic", "longrope")  # rotary tables that transformers chooses by the longest document of a batch


class Fallback(nn.Module):
    """A transformers model with the face of models/decoder.py. Module and parameter names are transformers' own.

    `packs`: documents run side by side in one stream; else one by one. `notes`: what a person should know, one line each.
    """

    spec = None

    def __init__(self, hf: nn.Module, config: Mapping[str, Any], *, notes: Sequence[str] = (), transposed: Sequence[str] = ()):
        super().__init__()
        self.__dict__["hf"] = hf  # not a child: its children are ours, so names are the checkpoint's and twins land in both
        self.__dict__.update(_modules=hf._modules, _parameters=hf._parameters, _buffers=hf._buffers)
        self.config, self.notes = dict(config), list(notes)
        self.transposed = frozenset(transposed)  # Conv1D weights kept in an NF4 store, which is [out, in]
        dynamic = any(rope.get("rope_type") == "dynamic" for rope in _ropes(hf.config))
        self._grown = [m for m in hf.modules() if hasattr(m, "max_seq_len_cached")] if dynamic else []
        self._takes = inspect.signature(self._trunk().forward).parameters
        self._checkpoint_layers = False
        self.packs, self.plain, self.caches = False, True, False
        self.train(hf.training)

    # ---- the face

    @property
    def note(self) -> str:
        return "; ".join(self.notes)

    @property
    def device(self) -> torch.device:
        """Where it runs, as `embedding_device`."""
        return self.embedding_device

    @property
    def embedding_device(self) -> torch.device:
        """Where its tokens are looked up."""
        return next(self.hf.parameters()).device

    @property
    def vocab(self) -> int:
        head = self.hf.get_output_embeddings()
        return getattr(head, "base", head).weight.shape[0]

    @property
    def context(self) -> int | None:
        """Tokens it was made for: longer documents are refused, because a table of positions has no row for them."""
        tokens = getattr(self.hf.config, "max_position_embeddings", None)
        for rope in _ropes(self.hf.config):
            if tokens is not None and rope.get("rope_type") == "dynamic":
                tokens = int(tokens * rope.get("factor", 1))
        return tokens

    @property
    def checkpoint_layers(self) -> bool:
        """Keep only each layer's input and compute the layer again in the backward; gradients stay the same."""
        return self._checkpoint_layers

    @checkpoint_layers.setter
    def checkpoint_layers(self, on: bool) -> None:
        if on and not self.hf.supports_gradient_checkpointing:
            self.notes.append("transformers cannot recompute the activations of this model: they are kept")
        elif on or self._checkpoint_layers:
            # transformers renamed it in 5.2x; the older name is what 5.17 has
            kind = "activation" if hasattr(self.hf, "activation_checkpointing_enable") else "gradient"
            if on:
                getattr(self.hf, f"{kind}_checkpointing_enable")({"use_reentrant": False})
            else:
                getattr(self.hf, f"{kind}_checkpointing_disable")()
        self._checkpoint_layers = on and self.hf.supports_gradient_checkpointing

    def relieve(self) -> bool:
        """As Decoder's: nothing here only saves time."""
        return False

    def leaner(self) -> str:
        """As Decoder's."""
        before = self._checkpoint_layers
        self.checkpoint_layers = True
        return "checkpoint" if self._checkpoint_layers and not before else ""

    def train(self, mode: bool = True) -> Fallback:
        self.hf.train(mode)
        return super().train(mode)

    def get_input_embeddings(self) -> nn.Module:
        return self.hf.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.hf.get_output_embeddings()

    def plain_head(self) -> tuple[Tensor, float | None] | None:
        """(weight [V, D], None) where logits are x W^T and nothing else; None where a bias, a scale, a cap or a twin comes in."""
        head = self.hf.get_output_embeddings()
        return (head.weight, None) if self.plain and type(head) is nn.Linear and head.bias is None else None

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """For `batch` sequences of at most `capacity` tokens, prompt and answer together."""
        return Cache(self, batch, capacity)

    def hidden(self, tokens_T: Tensor, layout: Layout, *, rows: Tensor | None = None, cache: Cache | None = None,
               noise: Callable[[Tensor], Tensor] | None = None) -> Tensor:  # fmt: skip
        """The stream after the final norm [T, D], or its `rows` [L, D]. As Decoder.hidden; raises ModelError past the context."""
        held = cache.lengths if cache else [0] * len(layout.lengths)
        longest = max(past + new for past, new in zip(held, layout.lengths, strict=True))
        if self.context is not None and longest > self.context:
            raise ModelError(f"a document of {longest:,} tokens; this model was made for {self.context:,}",
                             f"set data.max_length: {self.context}, or use shorter prompts and answers")  # fmt: skip
        if cache is not None:
            x_TD = torch.cat([cache.grow(i, t) for i, t in enumerate(tokens_T.split(layout.lengths))])
        else:
            noised = None if noise is None else noise(self.get_input_embeddings()(tokens_T))
            bounds = (0, layout.bounds[-1]) if self.packs else layout.bounds
            x_TD = torch.cat([self._run(tokens_T[a:b], layout.positions_T[a:b], None if noised is None else noised[a:b])
                              for a, b in pairwise(bounds)])  # fmt: skip
        return x_TD if rows is None else x_TD[rows]

    def logits(self, x: Tensor) -> Tensor:
        """The vocabulary projection [..., V] and all that the model does to it after."""
        if self.plain:
            return self.hf.get_output_embeddings()(x)
        flat = x.reshape(1, -1, x.shape[-1])
        with self._trunk_gives(flat):
            y = self.hf(inputs_embeds=flat, use_cache=False).logits
        return y.view(*x.shape[:-1], -1)

    def forward(self, tokens_T: Tensor, layout: Layout | None = None) -> Tensor:
        """Logits [T, V]; `layout` None: one document."""
        return self.logits(self.hidden(tokens_T, layout or Layout.of([len(tokens_T)], tokens_T.device)))

    def save_checkpoint(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """A standard Hugging Face folder in `dtype` (default: the model's own); quantised linears are written dense."""
        names, shapes = {}, {}
        seen: set[int] = set()
        for name, tensor in self.state_dict(keep_vars=True).items():
            if QUANTISED_PART.fullmatch(name) and isinstance(self.get_submodule(name.rpartition(".")[0]), NF4Linear):
                continue
            if id(tensor) not in seen:  # the first name of a tied matrix
                seen.add(id(tensor))
                names[name], shapes[name] = tensor, self._saved_shape(name, tensor)
        out = dtype or self.get_input_embeddings().weight.dtype
        tied = self._tied()
        config = (
            {**self.config, "tie_word_embeddings": tied} if tied != self.config.get("tie_word_embeddings", tied) else self.config
        )
        weights.write_checkpoint(folder, config, shapes, lambda name: self._saved(name, out), out)

    # ---- how

    def _new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.hf.config)

    def _trunk(self) -> nn.Module:
        return self.hf.base_model

    def _run(self, tokens_t: Tensor, positions_t: Tensor, noised_tD: Tensor | None, **more: Any) -> Tensor:
        """Hidden states of one row of tokens. No attention mask: with one, or with a cache, packed rows see each other."""
        more = {"use_cache": False, **more}
        for rotary in self._grown:  # else a short document after a long one is rotated by the long one's table
            for name in [n for n in vars(rotary) if n.endswith("max_seq_len_cached")]:
                setattr(rotary, name, 0)
        if "position_ids" in self._takes:
            more["position_ids"] = positions_t[None]
        if noised_tD is None:
            return self._trunk()(tokens_t[None], **more)[0][0]
        hook = self.get_input_embeddings().register_forward_hook(lambda module, args, output: noised_tD[None])
        try:
            return self._trunk()(tokens_t[None], **more)[0][0]
        finally:
            hook.remove()

    @contextmanager
    def _trunk_gives(self, x_1LD: Tensor) -> Iterator[None]:
        """While it lasts the model's trunk answers with these hidden states, so that its forward is the head alone."""
        from transformers.modeling_outputs import BaseModelOutputWithPast

        name, trunk = self.hf.base_model_prefix, self._trunk()
        self.hf._modules[name] = _Given(BaseModelOutputWithPast(last_hidden_state=x_1LD))
        try:
            yield
        finally:
            self.hf._modules[name] = trunk

    def _saved_shape(self, name: str, tensor: Tensor) -> tuple[int, ...]:
        path, _, leaf = name.rpartition(".")
        module = self.get_submodule(path)
        if leaf == "weight" and hasattr(module, "out_features"):
            shape = (module.out_features, module.in_features)
            return shape[::-1] if path in self.transposed else shape
        return tuple(tensor.shape)

    def _saved(self, name: str, dtype: torch.dtype) -> Tensor:
        path, _, leaf = name.rpartition(".")
        module = self.get_submodule(path)
        if leaf != "weight" or not hasattr(module, "out_features"):
            return getattr(module, leaf)
        dense = module.dequantize(dtype) if hasattr(module, "dequantize") else module.weight
        return dense.t() if path in self.transposed else dense

    def _tied(self) -> bool:
        return self.hf.get_output_embeddings().weight is self.hf.get_input_embeddings().weight


def _ropes(config: Any) -> list[Mapping[str, Any]]:
    """The rotary settings: one, or one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [rope] if "rope_type" in rope else [part for part in rope.values() if isinstance(part, Mapping)]


QUANTISED_PART = re.compile(r".*\.(absmax|nested_absmax|nested_map|offset)")


class _Given(nn.Module):
    def __init__(self, output: Any):
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **more: Any) -> Any:
        return self.output


class Cache:
    """What `batch` sequences hold: transformers' own cache for each, or, for a model whose cache did not pass the test at load,
    their tokens, computed again at each step."""

    def __init__(self, model: Fallback, batch: int, capacity: int):
        self.model, self.capacity = model, capacity
        self.tokens: list[Tensor] = [torch.empty(0, dtype=torch.int64)] * batch
        self.held = [model._new_cache() if model.caches else None for _ in range(batch)]

    @property
    def lengths(self) -> list[int]:
        return [len(t) for t in self.tokens]

    def grow(self, i: int, new_t: Tensor) -> Tensor:
        """Hidden states of the new tokens of sequence i."""
        past = len(self.tokens[i])
        self.tokens[i] = torch.cat([self.tokens[i].to(new_t.device), new_t])
        assert len(self.tokens[i]) <= self.capacity, "the cache is full"
        positions = torch.arange(past + len(new_t), device=new_t.device)
        if self.held[i] is None:
            return self.model._run(self.tokens[i], positions, None)[past:]
        return self.model._run(new_t, positions[past:], None, use_cache=True, past_key_values=self.held[i])

    def keep(self, indices: Sequence[int]) -> None:
        """Drops all other sequences; those kept are renumbered in the order given."""
        self.tokens, self.held = [self.tokens[i] for i in indices], [self.held[i] for i in indices]


# ------------------------------------------------------------------ loading
def load(folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
         store: Literal["dense", "nf4"] = "dense", progress: Progress | None = None) -> Fallback:  # fmt: skip
    """A checkpoint folder as a Fallback, its linears dense in `dtype` or as NF4 (embedding and head stay dense).

    Raises MissingExtra without transformers, ModelError with every fault of config and files at once.
    """
    folder = Path(folder)
    raw = read_config(folder)
    config, notes = _config(raw)
    stored, faults = weights.find_tensors(folder)
    if faults:
        raise ModelError(weights.listed(folder, faults), "download the checkpoint again")
    hf = _skeleton(config, dtype)
    changes = _conversions(hf)
    if not all(isinstance(c, _renaming()) for c in changes):
        if checkpoint_quantization(raw):
            what = f"model_type {raw['model_type']!r} with weights that bitsandbytes has quantised"
            raise ModelError(f"{folder}: {what} is not loaded here", "use its 16-bit weights")
        hf = _by_transformers(folder, type(hf), config, stored, dtype)
        notes.append(
            "its files hold other tensors than its modules: transformers put them together, with the whole checkpoint in memory"
        )
        transposed = _quantise(hf) if store == "nf4" else []
    else:
        source = _match(folder, hf, stored, changes, quantised=checkpoint_quantization(raw) is not None)
        transposed = _make_room(hf) if store == "nf4" else []
        _fill(hf, source, stored, transposed, dtype, device, progress)
        _set_buffers(hf)
    hf.requires_grad_(False).to(device).eval()
    model = Fallback(hf, raw, notes=notes, transposed=transposed)
    _try(model)
    return model


def _config(raw: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """transformers' config object from the keys its class declares, and notes on what was left out or changed."""
    os.environ.setdefault("USE_HUB_KERNELS", "NO")  # else some models fetch compiled code by name when they first run
    try:
        import transformers
    except ImportError:
        raise MissingExtra("this architecture runs through transformers, which is not installed", install("fallback")) from None
    version = tuple(int(n) for n in transformers.__version__.split(".")[:2])
    if not NEEDED <= version < (6,):
        raise MissingExtra(
            f"transformers {transformers.__version__} is installed; 5.17 or newer and below 6 is needed", install("fallback")
        )
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = raw.get("model_type")
    if kind not in CONFIG_MAPPING:
        fix = "use a checkpoint whose architecture is part of transformers; code inside a checkpoint is never run"
        raise ModelError(f"transformers {transformers.__version__} knows no model_type {kind!r}", fix)
    kept, dropped, silenced = _allowed(raw, CONFIG_MAPPING[kind])
    notes = []
    if strange := sorted(set(dropped) - OURS - {"model_type", "auto_map", "_name_or_path", "quantization_config"}):
        notes.append(f"keys of config.json that transformers' {kind} does not declare were ignored: {', '.join(strange)}")
    if "mamba" in kind:
        notes.append("PEFT does not read adapters on out_proj and dt_proj of this family: set lora.targets: [in_proj, x_proj]")
    if silenced:
        notes.append(f"the model's own dropout ({', '.join(silenced)}) is off; lora.dropout is what regularises here")
    try:
        config = CONFIG_MAPPING[kind](**kept)
    except (TypeError, ValueError, KeyError, AttributeError, *_strict_errors()) as e:
        raise ModelError(
            f"config.json: transformers refuses it: {' '.join(str(e).split())[:300]}", "download the checkpoint again"
        ) from e
    return config, notes


def _strict_errors() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import StrictDataclassError

    return (StrictDataclassError,)


def _allowed(raw: Mapping[str, Any], cls: Any) -> tuple[dict[str, Any], list[str], list[str]]:
    """(keys passed on, keys left out, dropouts set to zero). Only what the class declares as a property of the model is passed."""
    fields = {field.name: field.default for field in dataclasses.fields(cls)}
    declared = ({*fields, *cls.attribute_map} | OLDER) - OURS
    kept, dropped, silenced = {}, [], []
    for key, value in raw.items():
        if key not in declared:  # `_attn_implementation_internal`, which once fetched code (CVE-2026-4372), is declared by none
            dropped.append(key)
        elif DROPOUT.fullmatch(key) and isinstance(value, (int, float)) and not isinstance(value, bool):
            kept[key] = 0.0
            if value:
                silenced.append(key)
        else:
            kept[key] = _plain(value)
    for key, default in fields.items():  # a class's own default, such as gpt2's 0.1
        if DROPOUT.fullmatch(key) and key not in kept and isinstance(default, float) and default > 0:
            kept[key] = 0.0
            silenced.append(key)
    for key, part in cls.sub_configs_defaults.items():  # such as mpt's attn_config
        if isinstance(kept.get(key), dict) and hasattr(part.config_class, "attribute_map"):
            kept[key], _, more = _allowed(kept[key], part.config_class)
            silenced += [f"{key}.{name}" for name in more]
    return kept, dropped, silenced


def _plain(value: Any) -> Any:
    """JSON as it is, without keys that begin with an underscore at any depth."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items() if not k.startswith("_")}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def _skeleton(config: Any, dtype: torch.dtype) -> nn.Module:
    """The model on the meta device: shapes, no memory."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"transformers has no causal language model for model_type {config.model_type!r}", "use a decoder-only checkpoint"
        )
    with torch.device("meta"):
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config(config, dtype=dtype)


def _conversions(hf: nn.Module) -> list[Any]:
    """transformers' own steps between this model's files and its modules: new names, experts that it stacks ..."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(hf, add_legacy=False)


def _renaming() -> type:
    from transformers.core_model_loading import WeightRenaming

    return WeightRenaming


def _match(
    folder: Path, hf: nn.Module, stored: Mapping[str, Stored], renamings: Sequence[Any], *, quantised: bool
) -> dict[str, str]:
    """model name -> file name for every tensor of the model, ties once. Raises ModelError with all faults."""
    need = hf.state_dict(keep_vars=True)
    prefix = f"{hf.base_model_prefix}."
    ignored = [*map(re.compile, hf._keys_to_ignore_on_load_unexpected or ()), DERIVED]
    packed = {name.removesuffix(MARK) for name in stored if name.endswith(MARK)} if quantised else set()
    source: dict[str, str] = {}
    extra = []
    for name in stored:
        part = QUANTISED.fullmatch(name)
        if part is not None and part["linear"] in packed:
            continue
        now = name
        for renaming in renamings:
            now = renaming.rename_source_key(now)[0]
        found = next((n for n in (now, prefix + now, now.removeprefix(prefix)) if n in need), None)
        if found is not None:
            source[found] = name
        elif not any(p.search(name) for p in ignored):
            extra.append(f"{name}: not part of transformers' {type(hf).__name__} with this config.json")
    faults = []
    groups: dict[int, list[str]] = {}
    for name, tensor in need.items():
        groups.setdefault(id(tensor), []).append(name)
    for names in groups.values():
        given = [n for n in names if n in source]
        if not given:
            faults.append(f"{names[0]}: missing")
        for name in given:
            at, shape = stored[source[name]], tuple(need[name].shape)
            if source[name].removesuffix(".weight") in packed:
                if at.dtype != "U8":
                    faults.append(f"{name}: {at.dtype} where nf4 codes belong")
            elif at.shape != shape:
                faults.append(f"{source[name]}: shape {list(at.shape)} where config.json asks for {list(shape)}")
            elif at.dtype not in FLOATS and need[name].is_floating_point():
                faults.append(f"{source[name]}: stored as {at.dtype}; {', '.join(FLOATS)} are read")
        if len(given) > 1 and not faults:
            _check_equal(folder, [stored[source[n]] for n in given], given)
            for name in given[1:]:
                del source[name]
    if faults or extra:
        raise ModelError(
            weights.listed(folder, faults + sorted(extra)),
            "download the checkpoint again, or use the config.json of these weights",
        )
    return source


def _check_equal(folder: Path, tied: Sequence[Stored], names: Sequence[str]) -> None:
    with weights.Files() as files:
        first, *others = (s.read(files(s.file)) for s in tied)
        if not all(first.dtype == o.dtype and torch.equal(first, o) for o in others):
            fix = "set tie_word_embeddings to false in its config.json if they are meant to be different"
            raise ModelError(f"{folder}: config.json ties {' and '.join(names)}, but the files hold different matrices", fix)


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def _to_pack(hf: nn.Module) -> dict[str, nn.Module]:
    """The linears that NF4 stores: all but the head."""
    head = hf.get_output_embeddings()
    return {n: m for n, m in hf.named_modules()
            if type(m).__name__ in LINEARS and m is not head and n.rpartition(".")[2] not in READ_DIRECTLY}  # fmt: skip


def _make_room(hf: nn.Module) -> list[str]:
    """Empty NF4 linears in the place of dense ones; returns the names of those that were Conv1D, whose weight is [in, out]."""
    found = _to_pack(hf)
    for name, old in found.items():
        i, o = tuple(old.weight.shape) if _is_conv1d(old) else (old.in_features, old.out_features)
        hf.set_submodule(name, NF4Linear(i, o, old.bias is not None, dtype=old.weight.dtype, device="meta"))
    return [name for name, old in found.items() if _is_conv1d(old)]


def _quantise(hf: nn.Module) -> list[str]:
    """As `_make_room` with what the dense linears hold, one at a time."""
    dense = {name: (m.weight.detach(), None if m.bias is None else m.bias.detach()) for name, m in _to_pack(hf).items()}
    transposed = _make_room(hf)
    for name in list(dense):
        weight, bias = dense.pop(name)
        module = hf.get_submodule(name)
        module.set_weight("weight", weight.t().contiguous() if name in transposed else weight)
        if bias is not None:
            module.set_weight("bias", bias)
    return transposed


def _fill(hf: nn.Module, source: Mapping[str, str], stored: Mapping[str, Stored], transposed: Sequence[str],
          dtype: torch.dtype, device: torch.device | str, progress: Progress | None) -> None:  # fmt: skip
    """Every tensor from its file into its place, one at a time; one that several names share stays one."""
    names: dict[int, list[str]] = {}
    for name, tensor in hf.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    shared = {name: group for group in names.values() for name in group}
    wide = tuple(hf._keep_in_fp32_modules_strict or ()) + (tuple(hf._keep_in_fp32_modules or ()) if dtype == torch.float16 else ())
    total, done = sum(stored[n].end - stored[n].start for n in source.values()), 0
    in_file_order = sorted(source, key=lambda name: (stored[source[name]].file, stored[source[name]].start))
    with weights.Files() as files:
        for name in in_file_order:
            at, (path, _, leaf) = stored[source[name]], name.rpartition(".")
            module = hf.get_submodule(path)
            linear = source[name].removesuffix(".weight")
            if leaf == "weight" and linear + MARK in stored:
                group = {n.removeprefix(f"{linear}."): s for n, s in stored.items() if n.startswith(f"{linear}.weight")}
                _put_quantised(module, {n: s.read(files(s.file)).to(device) for n, s in group.items()}, dtype)
            else:
                tensor = at.read(files(at.file)).to(device)
                if tensor.is_floating_point():
                    tensor = tensor.to(torch.float32 if any(part in name.split(".") for part in wide) else dtype)
                if isinstance(module, NF4Linear):
                    module.set_weight(leaf, tensor.t().contiguous() if path in transposed and leaf == "weight" else tensor)
                else:
                    _put(hf, shared[name], tensor)
            done += at.end - at.start
            if progress:
                progress(done, total)


def _put(hf: nn.Module, names: Sequence[str], tensor: Tensor) -> None:
    """One tensor in all its places."""
    parameter = nn.Parameter(tensor, requires_grad=False) if tensor.is_floating_point() else tensor
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = hf.get_submodule(path)
        setattr(module, leaf, parameter if leaf in module._parameters else tensor)


def _put_quantised(module: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """bitsandbytes' NF4 into an NF4 store as it is, or decoded into a dense linear. It writes Conv1D as [out, in]."""
    if isinstance(module, NF4Linear):
        return module.set_quantised(tensors)
    o, i = tuple(module.weight.shape)[:: -1 if _is_conv1d(module) else 1]
    store = NF4Linear(i, o, dtype=dtype, device="meta")
    store.set_quantised(tensors)
    dense = store.dequantize(dtype)
    module.weight = nn.Parameter(dense.t().contiguous() if _is_conv1d(module) else dense, requires_grad=False)


@torch.no_grad()
def _set_buffers(hf: nn.Module) -> None:
    """Tables that no file holds (rotary frequencies, causal masks) as transformers' own `initialize_weights` computes them.

    It is asked twice, over zeros and over ones: what comes out different was never written, and is refused rather than guessed.
    """
    for tensor in [*hf.parameters(), *hf.buffers()]:
        tensor._is_hf_initialized = not tensor.is_meta
    owners = {path: m for path, m in hf.named_modules() if any(b is not None and b.is_meta for b in m._buffers.values())}
    empty = {
        (path, name): buffer
        for path, m in owners.items()
        for name, buffer in m._buffers.items()
        if buffer is not None and buffer.is_meta
    }
    found: list[dict[tuple[str, str], Tensor]] = []
    for fill in (torch.zeros_like, torch.ones_like):
        for (path, name), buffer in empty.items():
            owners[path]._buffers[name] = fill(buffer, device="cpu")
        for module in hf.modules():
            module._is_hf_initialized = module not in owners.values()
        hf.initialize_weights()
        found.append({(path, name): owners[path]._buffers[name] for path, name in empty})
    left = [".".join(key) for key in empty if not torch.equal(found[0][key], found[1][key])]
    left += [name for name, tensor in [*hf.named_parameters(), *hf.named_buffers()] if tensor.is_meta]
    left += [f"{path}.{k}" for path, m in hf.named_modules() for k, v in vars(m).items() if isinstance(v, Tensor) and v.is_meta]
    if left:
        what = f"transformers' {type(hf).__name__} leaves {', '.join(left[:4])} without a value when its weights are loaded"
        raise ModelError(what, "use a checkpoint of another family")


def _by_transformers(folder: Path, cls: type, config: Any, stored: Mapping[str, Stored], dtype: torch.dtype) -> nn.Module:
    """A model whose files hold other tensors than its modules: read by us, put together by transformers, which opens no file."""
    with weights.Files() as files:
        tensors = {name: s.read(files(s.file)) for name, s in stored.items()}
    hf, info = cls.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True)
    faults = [f"{n}: missing" for n in sorted(info["missing_keys"])]
    faults += [f"{n}: not part of this model" for n in sorted(info["unexpected_keys"])]
    faults += [f"{n}: wrong shape" for n in sorted(map(str, info["mismatched_keys"]))]
    if faults:
        raise ModelError(weights.listed(folder, faults), "download the checkpoint again, or use the config.json of these weights")
    return hf


# ------------------------------------------------------------------ what it can do, tried
@torch.no_grad()
def _try(model: Fallback) -> None:
    """Sets `packs`, `plain` and `caches` from what the model does on a few tokens."""
    hf, kind = model.hf, type(model.hf).__name__
    device = model.get_input_embeddings().weight.device
    a, other, b = (torch.arange(n, device=device) * step % model.vocab for n, step in ((7, 3), (7, 5), (9, 11)))
    other = (other + 1) % model.vocab
    try:
        alone_b, alone_a = (model.hidden(t, Layout.of([len(t)], device)) for t in (b, a))
    except (TypeError, ValueError, AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, ImportError) as e:
        fix = "use a checkpoint of another family; with method: qlora, method: lora may work, which keeps its linears dense"
        raise ModelError(f"transformers' {kind} does not run on tokens alone: {' '.join(str(e).split())[:200]}", fix) from e

    def same(x: Tensor, y: Tensor) -> bool:
        """To rounding: errors of eps at each step add up to less than sqrt(eps) of the size of the whole. Some models compute in
        float32 whatever they are given."""
        tolerance = max(torch.finfo(t.dtype).eps for t in (x, y, torch.empty(0, dtype=torch.float32))) ** 0.5
        return bool((x.double() - y.double()).norm() <= tolerance * y.double().norm())

    if not alone_b.isfinite().all():
        raise ModelError(
            f"transformers' {kind} answers nan or inf with these weights", "load it in another dtype (memory.dtype: fp32)"
        )
    changed = torch.cat([b[:-1], (b[-1:] + 1) % model.vocab])
    if not same(model.hidden(changed, Layout.of([len(b)], device))[:-1], alone_b[:-1]):
        raise ModelError(f"transformers' {kind} lets a token see those after it", "use a causal language model (a decoder)")
    direct = hf(b[None], use_cache=False).logits[0]
    for plain in (True, False):
        model.plain = plain
        if plain and hf.get_output_embeddings() is None:
            continue
        if same(model.logits(alone_b), direct):
            break
    else:
        raise ModelError(
            f"transformers' {kind} makes its logits in a way that is not known here", "use a checkpoint of another family"
        )

    why = ""
    if bound := [rope["rope_type"] for rope in _ropes(hf.config) if rope.get("rope_type") in LENGTH_BOUND]:
        why = f"its rotary table ({bound[0]}) follows the longest document of a batch"
    elif "position_ids" not in model._takes:
        why = "it takes no positions"
    else:
        model.packs = True
        layout = Layout.of([len(a), len(b)], device)
        first, second = (model.hidden(torch.cat([x, b]), layout) for x in (a, other))
        if not torch.equal(first[len(a) :], second[len(a) :]):
            why = "in a packed batch a document moves when the one before it is changed"
        elif not same(first[len(a) :], alone_b) or not same(first[: len(a)], alone_a):
            why = "a document of a packed batch answers otherwise than alone"
    model.packs = not why
    if why:
        model.notes.append(f"documents run one by one, which is slower: {why}")
    model.caches = not bound and _cache_works(model, b, alone_b, same)
    if not model.caches:
        model.notes.append("answers are computed again from their first token at each step: its cache did not pass the test")


def _cache_works(model: Fallback, b: Tensor, whole: Tensor, same: Callable[[Tensor, Tensor], bool]) -> bool:
    if "past_key_values" not in model._takes:
        return False
    model.caches = True
    try:
        cache = model.new_cache(1, len(b))
        parts = [model.hidden(t, Layout.of([len(t)], b.device), cache=cache) for t in b.split([5, 2, 1, 1])]
    except (TypeError, ValueError, AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError):
        return False  # whatever it is, computing again is right
    return same(torch.cat(parts), whole)
