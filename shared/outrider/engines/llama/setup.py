"""What an engine needs before it is made: settings; checks of the file, the memory and the model.

`lib` is the module of bindings, handed in by `outrider.engines.llama.engine`.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from outrider.core.estimates import LONGEST
from outrider.engines import processor
from outrider.engines.llama.devices import ON_PROCESSOR, Device, Offload, arguments
from outrider.errors import ModelNotFound, ModelUnusable

log = logging.getLogger("outrider.engines.llama.engine")

# name: (enum ggml_type, bytes for one value)
CACHE_TYPES = {
    "f32": (0, 4.0),
    "f16": (1, 2.0),
    "bf16": (30, 2.0),
    "q8_0": (8, 34 / 32),
    "q4_0": (2, 18 / 32),
}
GIB = 2.0**30
MOST_SLOTS = 256  # LLAMA_MAX_SEQ
LONG = 2048  # a draft with a context of more tokens does without flash attention
MOST_ALIKE = 63  # tokens; from 64 on the flash attention kernel rounds otherwise
FEW = 2  # tokens: at three rows of logits, Mesa 22.3's software device ends the process
SNAPSHOT_ROOM = 2**29  # bytes that the snapshots of all slots may take
BRANCH = 32  # tokens
CHECKPOINTS = 2  # of each slot are sure to be kept: see `outrider.engines.llama.states`
Progress = Callable[[float], None] | None  # is told the loaded share, 0 to 1
NEEDED = "its weights, KV cache and workspace"
CANNOT_TAKE_BACK = "this kind of model cannot take back single tokens, as drafting needs"


@dataclass(frozen=True, slots=True)
class LlamaSettings:
    """How to load and run a model. Raises ValueError for a value out of range."""

    context: int  # tokens per slot; rounded up to a multiple of 256
    slots: int
    threads: int
    offload: Offload = ON_PROCESSOR
    batch: int = 512  # most tokens of one `extend`
    ubatch: int = 512  # most tokens of one pass over the weights
    flash_attention: bool = True
    drafts: bool = False  # it only drafts: no answer depends on how its logits are rounded
    exact: bool = False  # a token's logits do not depend on how many are evaluated with it
    tiled: bool = True  # kernels for 8 rows or more of K-quants, where exact allows them
    repack: bool = True  # weights in an order of the processor's, where exact allows it
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    unified: bool | None = False  # one cache for all slots; None: if it is faster here
    spare: int = 0  # see `ModelInfo`; where they share a cache, each has `BRANCH` cells of its own
    branches: int = 0  # so many spare slots if rows are cheap here, and a cache that all share

    def __post_init__(self) -> None:
        for name in ("context", "slots", "threads", "batch", "ubatch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        most = min(self.batch, MOST_SLOTS)
        if not self.slots + max(self.spare, self.branches) <= most:
            raise ValueError(f"slots, with those for branches, must be at most {most}")
        if min(self.spare, self.branches) < 0:
            raise ValueError("spare and branches must be at least 0")
        for cache_type in (self.cache_type_k, self.cache_type_v):
            if cache_type not in CACHE_TYPES:
                raise ValueError(
                    f"cache type {cache_type!r} is not one of {', '.join(CACHE_TYPES)}"
                )
        if self.cache_type_v.startswith("q") and not self.flash_attention:
            raise ValueError(f"cache_type_v = {self.cache_type_v!r} needs flash_attention")
        if self.exact and self.unified:
            raise ValueError("exact logits need a cache for each slot: unified = False")
        if self.exact and self.offload.layers:
            raise ValueError("exact logits need all layers on the processor: offload.layers = 0")

    @property
    def rounded_context(self) -> int:
        return -(-self.context // 256) * 256

    @property
    def all_slots(self) -> int:
        return self.slots + self.spare

    @property
    def cells(self) -> int:
        """Tokens that all slots can hold together."""
        if self.unified:
            return self.rounded_context * self.slots + BRANCH * self.spare
        return self.rounded_context * self.all_slots

    def for_cheap_rows(self, has_states: bool) -> LlamaSettings | None:
        """What would be better if rows are cheap here; None: nothing.

        `has_states`: a copy of a sequence costs one of its state.
        """
        if self.exact or self.spare:
            return None
        if self.branches and not has_states:
            return replace(self, unified=True, spare=self.branches, branches=0)
        if self.unified is None and self.slots > 1:
            return replace(self, unified=True, branches=0)
        return None

    @property
    def widest(self) -> int:
        """Most tokens of one pass over the weights, of which `exact` allows only so many."""
        return min(self.ubatch, MOST_ALIKE) if self.exact else self.ubatch

    @property
    def used_threads(self) -> int:
        """One if exact: a second one splits a lone row's attention, which rounds differently."""
        return 1 if self.exact else self.threads


# enum ggml_log_level: 1 debug (thousands of lines), 2 info, 3 warning, 4 error, 5 continued line;
# an error is ours to tell, as the call fails too: llama.cpp logs four for a cancelled decode
LEVELS = {2: logging.DEBUG, 3: logging.INFO, 4: logging.INFO}
complaints: deque[str] = deque(maxlen=8)  # llama.cpp's latest errors, which it only logs


def forward_log(level: int, text: bytes, _: Any) -> None:
    """Write a line of llama.cpp's log to ours, and remember errors for `reasons`."""
    if level not in LEVELS:
        return
    line = text.decode("utf-8", "replace").strip()
    if level == 4:
        complaints.append(line)
    log.log(LEVELS[level], "%s", line)


def filled(struct: Any, **values: Any) -> Any:
    """`struct` with `values` set. Raises TypeError for a misspelt one, which ctypes would take."""
    unknown = values.keys() - {field[0] for field in struct._fields_}
    if unknown:
        raise TypeError(f"{type(struct).__name__} has no {', '.join(sorted(unknown))}")
    for name, value in values.items():
        setattr(struct, name, value)
    return struct


def check_file(path: Path) -> int:
    """The size of the model in bytes, all parts together. Raises ModelNotFound, ModelUnusable."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except FileNotFoundError as exc:
        raise ModelNotFound(f"{path}: no such file") from exc
    except OSError as exc:
        raise ModelUnusable(f"{path}: cannot be read ({exc.strerror})") from exc
    if magic != b"GGUF":
        raise ModelUnusable(f"{path}: not a GGUF file")
    part = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", path.name)
    parts = path.parent.glob(f"{part[1]}-?????-of-{part[2]}.gguf") if part else [path]
    return sum(file.stat().st_size for file in parts)


def check_memory(path: Path, needed: float, available: float, what: str) -> None:
    """Raise ModelUnusable if more bytes are needed than there are."""
    if needed > available:
        raise ModelUnusable(
            f"{path}: {what} would take about {needed / GIB:.2f} GiB of memory, and here "
            f"{available / GIB:.2f} GiB are available (limits of a container included)"
        )


def load_model(
    lib: Any,
    path: Path,
    settings: LlamaSettings,
    devices: Sequence[Device],
    progress: Progress,
) -> Any:
    """llama.cpp's handle of the model, whose layers are on `devices` as far as the settings say.

    Raises ModelUnusable, or what `progress` raised.
    """
    failure: list[BaseException] = []

    def report(share: float, _: Any) -> bool:
        try:
            if progress:
                progress(share)
        except BaseException as exc:  # no exception can pass through C
            failure.append(exc)
        return not failure

    # repacked weights round differently from 4 rows on; the AMX kernels do not
    repack = settings.repack and (not settings.exact or has_instructions("amx_int8", lib))
    callback = lib.llama_progress_callback(report)
    params = filled(
        lib.llama_model_default_params(),
        n_gpu_layers=settings.offload.layers if devices else 0,
        use_extra_bufts=repack,
        progress_callback=callback,
        **arguments(lib, devices, settings.offload.split),
    )
    complaints.clear()
    model = lib.llama_model_load_from_file(os.fsencode(path), params)
    if failure:
        if model:
            lib.llama_model_free(model)
        raise failure[0]
    if not model:
        raise ModelUnusable(f"{path}: llama.cpp cannot load this file ({reasons()})")
    return model


def reasons() -> str:
    """Why llama.cpp failed, in its own words: the first is the cause, the rest its consequences."""
    return complaints[0] if complaints else "it does not say why"


def has_instructions(name: str, lib: Any) -> bool:
    """Whether the library was built with these, such as "amx_int8", and the processor has them."""
    built = f"{name.upper()} = 1".encode() in lib.llama_print_system_info()
    return built and name in processor.instructions()


def check_kind(lib: Any, path: Path, model: Any) -> None:
    """Raise ModelUnusable for a model that cannot go on with a text."""
    if lib.llama_model_has_encoder(model) or not lib.llama_model_has_decoder(model):
        raise ModelUnusable(f"{path}: not a model that continues a text")
    if lib.llama_model_is_diffusion(model):
        raise ModelUnusable(f"{path}: a diffusion model does not generate token by token")
    if lib.llama_vocab_type(lib.llama_model_get_vocab(model)) == 0:
        raise ModelUnusable(f"{path}: the file holds no vocabulary")


def metadata(lib: Any, model: Any, key: str) -> str | None:
    """The value of `key` in the model's file; None if it has none."""
    size = 256
    while True:
        buffer = ctypes.create_string_buffer(size)
        length = lib.llama_model_meta_val_str(model, key.encode(), buffer, size)
        if length < size:  # as of snprintf: how long it is, even if cut
            return buffer.value.decode("utf-8", "replace") if length >= 0 else None
        size = length + 1


def cache_size(lib: Any, model: Any, settings: LlamaSettings) -> float:
    """About how many bytes the KV cache of all slots takes, were every layer like the first."""
    family = metadata(lib, model, "general.architecture")
    head = lib.llama_model_n_embd(model) // max(1, lib.llama_model_n_head(model))
    k_head = int(metadata(lib, model, f"{family}.attention.key_length") or head)
    v_head = int(metadata(lib, model, f"{family}.attention.value_length") or head)
    k_bytes, v_bytes = CACHE_TYPES[settings.cache_type_k][1], CACHE_TYPES[settings.cache_type_v][1]
    heads = lib.llama_model_n_layer(model) * lib.llama_model_n_head_kv(model)
    heads /= int(metadata(lib, model, f"{family}.full_attention_interval") or 1)
    token = heads * (k_head * k_bytes + v_head * v_bytes)
    return float(settings.cells * token)


def state_size(lib: Any, model: Any) -> int:
    """About how many bytes the state of a recurrent or hybrid model takes; 0: it has none."""
    if not (lib.llama_model_is_recurrent(model) or lib.llama_model_is_hybrid(model)):
        return 0
    family = metadata(lib, model, "general.architecture")
    width: int = lib.llama_model_n_embd(model)
    layers: int = lib.llama_model_n_layer(model)

    def number(key: str) -> int:
        return int(metadata(lib, model, f"{family}.{key}") or 0)

    inner, state, groups = (
        number(f"ssm.{name}") for name in ("inner_size", "state_size", "group_count")
    )
    convolved = max(0, number("ssm.conv_kernel") - 1) * (inner + 2 * groups * state)
    short = max(0, number("shortconv.l_cache") - 1) * width
    layer = convolved + short + inner * state + number("wkv.head_size") * width
    return 4 * layer * layers


def snapshots(lib: Any, model: Any, settings: LlamaSettings) -> int:
    """How many states behind the last tokens of a pass llama.cpp is to keep, if it can.

    So much of a block can be taken back at no cost: of a draft, which has passes of one token,
    nothing.
    """
    size = settings.all_slots * state_size(lib, model)
    if settings.drafts or not size:
        return 0
    return max(0, min(LONGEST, SNAPSHOT_ROOM // size, settings.widest - 2))


def workspace_size(lib: Any, model: Any, settings: LlamaSettings) -> float:
    """About how many bytes a pass takes: its logits, or else the mask and scores of attention."""
    flash, _, _ = attention(settings, False)
    heads = 2 if flash else lib.llama_model_n_head(model) + 1
    vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    widest = max(vocabulary, heads * settings.rounded_context)
    return 4.0 * min(settings.batch, settings.widest) * float(widest)


def needed(lib: Any, model: Any, settings: LlamaSettings, weights: int) -> float:
    """About how many bytes a model takes whose weights take so many; see `NEEDED`."""
    states = 1 + CHECKPOINTS + snapshots(lib, model, settings)
    states *= settings.all_slots * state_size(lib, model)
    workspace = workspace_size(lib, model, settings)
    return weights + cache_size(lib, model, settings) + states + workspace


def attention(settings: LlamaSettings, bf16: bool) -> tuple[bool, str, str]:
    """Whether to use llama.cpp's flash attention kernel, and the types of the keys and values.

    On a processor that kernel is slow for few rows behind a long text in f16: the default draft
    took 11.5 ms for a token behind 8 others, 15.2 behind 250, 24.6 behind 1,000. A model that only
    drafts may compute otherwise. In bf16 (`bf16`: the processor has instructions for it) it took
    11.5, 12.7 and 16.2 ms, but twice as long for long prompts; without the kernel 12.7, 12.6 and
    14.5 ms. Exact, it computes as its target does: a model that drafts for itself is always right.
    """
    given = settings.flash_attention, settings.cache_type_k, settings.cache_type_v
    ours = settings.drafts and not (settings.offload.layers or settings.exact)
    if not ours or given != (True, "f16", "f16"):
        return given
    if settings.context > LONG:
        return False, "f16", "f16"
    return (True, "bf16", "bf16") if bf16 else given


def make_context(
    lib: Any, path: Path, model: Any, settings: LlamaSettings, devices: Sequence[Device]
) -> Any:
    """llama.cpp's handle of the model's KV cache. Raises ModelUnusable."""
    context = settings.rounded_context
    flash, type_k, type_v = attention(settings, has_instructions("avx512_bf16", lib))
    params = filled(
        lib.llama_context_default_params(),
        n_ctx=settings.cells,
        n_batch=min(settings.batch, context),
        n_ubatch=min(settings.batch, settings.widest, *(FEW for one in devices if one.is_software)),
        n_seq_max=settings.all_slots,
        n_threads=settings.used_threads,
        n_threads_batch=settings.used_threads,
        # on a GPU as llama.cpp finds: not every one has the kernel, and the processor is far away
        flash_attn_type=(-1 if settings.offload.layers else 1) if flash else 0,
        type_k=CACHE_TYPES[type_k][0],
        type_v=CACHE_TYPES[type_v][0],
        swa_full=True,  # else a sliding window forgets what a rollback needs
        kv_unified=bool(settings.unified),
        n_rs_seq=snapshots(lib, model, settings),
    )
    complaints.clear()
    handle = lib.llama_init_from_model(model, params)
    if not handle:
        needed = cache_size(lib, model, settings) / GIB
        raise ModelUnusable(
            f"{path}: llama.cpp cannot set up a KV cache of about {needed:.1f} GiB, "
            f"{settings.slots} slots of {context} tokens ({reasons()})"
        )
    return handle


def describe_device(settings: LlamaSettings, devices: Sequence[Device]) -> str:
    threads = settings.used_threads
    text = f"cpu, {threads} thread{'s' if threads > 1 else ''}"
    if hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        text += f" on core{'s' if len(cores) > 1 else ''} {', '.join(map(str, cores))}"
    if devices:
        layers = "all" if settings.offload.layers < 0 else settings.offload.layers
        named = ", ".join(f"{device.name} ({device.description})" for device in devices)
        return f"{named}, {layers} layers; {text}"
    return text


def units(lib: Any, model: Any, settings: LlamaSettings, devices: Sequence[Device]) -> list[str]:
    """What computes the layers: see `ModelInfo.units`."""
    layers = settings.offload.layers
    is_whole = layers < 0 or layers > lib.llama_model_n_layer(model)  # the output counts as one
    rest = [] if devices and is_whole else ["cpu"]
    return sorted({*rest, *(device.unit for device in devices)})
